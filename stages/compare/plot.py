"""The comparison as a picture: the main metric per row, and the metric against latency. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"floor": "#9e9e9e", "start": "#5c85c4", "distilled": "#d1662b", "teacher": "#2f6b3a"}


def save_plot(summary: Mapping[str, Any], path: Path) -> None:
    """Write the PNG; one panel without times, two with them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric, groups, teacher = summary["main_metric"], summary["groups"], summary["teacher"]
    timed = "p50_ms" in groups[0]["cost"]
    figure = Figure(figsize=(11 if timed else 6.5, 0.5 * len(groups) + 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]

    bars = axes[0]
    values = [group["metrics"][metric] for group in groups]
    errors = [group["deviations"][metric] or 0.0 for group in groups]
    names = [f"{group['role']}: {group['student']}\n{group['init']}, {group['method']}" for group in groups]
    bars.barh(range(len(groups)), values, xerr=errors, color=[COLOURS[group["role"]] for group in groups], height=0.6)
    bars.set_yticks(range(len(groups)), names, fontsize=8)
    bars.invert_yaxis()
    everything = [*values, *([teacher["metrics"][metric]] if teacher else [])]
    low, high = min(everything), max(everything)
    if low > 0:
        # Bars that start at zero hide differences of a few points.
        bars.set_xlim(max(0.0, low - 0.6 * max(high - low, 0.02)), high + 0.1 * max(high - low, 0.02))
    if teacher:
        bars.axvline(teacher["metrics"][metric], color=COLOURS["teacher"], linestyle="--", linewidth=1.2)
        bars.set_title("dashed: teacher", fontsize=8)
    bars.set_xlabel(f"{metric} on {Path(summary['dataset']).name}")

    if timed:
        points = axes[1]
        for group in groups:
            points.scatter(group["cost"]["p50_ms"], group["metrics"][metric], color=COLOURS[group["role"]], s=40)
        if teacher:
            points.scatter(
                teacher["cost"]["p50_ms"], teacher["metrics"][metric], color=COLOURS["teacher"], marker="*", s=120
            )
        points.set_xscale("log")
        points.set_xlabel("latency p50, ms (one text, one CPU thread)")
        points.set_ylabel(metric)
        for role, colour in COLOURS.items():
            points.scatter([], [], color=colour, label=role)
        points.legend(fontsize=8)
        points.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
