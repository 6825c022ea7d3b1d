"""The comparison as text: aligned columns for a terminal, Markdown for a file. Pure functions of the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"
PERCENT = frozenset(
    {
        "accuracy",
        "macro_f1",
        "micro_f1",
        "f1",
        "precision",
        "recall",
        "subset_accuracy",
        "matthews",
        "pearson",
        "spearman",
    }
)


def plain_report(summary: Mapping[str, Any]) -> str:
    """Both tables, the gains and the footer, for a terminal."""
    quality, cost = quality_table(summary), cost_table(summary)
    lines = [
        f"{summary['dataset']}: {summary['rows']} rows, {summary['task']}"
        + (f", {summary['classes']} classes" if summary["classes"] else ""),
        "",
        *_aligned(quality),
        "",
        *_aligned(cost),
    ]
    gains = gain_lines(summary)
    return "\n".join([*lines, *([""] if gains else []), *gains, "", *footer_lines(summary)])


def markdown_report(summary: Mapping[str, Any]) -> str:
    """The same as a Markdown page, with the plot."""
    lines = [
        f"# Comparison on {summary['dataset']}",
        "",
        f"{summary['rows']} rows, task {summary['task']}"
        + (f", {summary['classes']} classes." if summary["classes"] else "."),
        "",
        *_markdown(quality_table(summary)),
        "",
        "Shares of the gap: (distilled − floor) / (teacher − floor), where the floor is the same student from a random"
        " start on gold labels; and (distilled − start) / (teacher − start), where the start is the same student from"
        " the same start on gold labels. The second is what the teacher's signals add. Over soft targets: distilled −"
        " the same student on soft targets and gold labels alone, with its 95 % interval over examples.",
        "",
        *_markdown(cost_table(summary)),
        "",
    ]
    if summary["groups"] and "p50_ms" in summary["groups"][0]["cost"]:
        lines += [
            "Times are those of one CPU thread, tokenising included, one text a call; rows/s in batches of 32.",
            "",
        ]
    if summary.get("plot"):
        lines += ["![main metric and latency](comparison.png)", ""]
    lines += [f"- {line}" for line in [*gain_lines(summary), *footer_lines(summary)]]
    runs = [run for group in summary["groups"] for run in group["runs"]]
    lines += ["", "## Runs", "", *_markdown(_run_table(runs, summary["main_metric"]))]
    return "\n".join(lines) + "\n"


def quality_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: the teacher, then the groups."""
    metric, teacher = summary["main_metric"], summary["teacher"]
    names = list(dict.fromkeys([metric, *_metrics_shown(summary)]))
    header = ["role", "student", "start", "learned from", "view", "rows", "seeds", *names]
    table = [[*header, "agreement", "of floor gap", "of start gap", "over soft targets"]]
    if teacher is not None:
        figures = [_figure(name, teacher["metrics"][name]) for name in names]
        labelled = _count(teacher.get("labelled_rows"))
        table.append(["teacher", "", "", "gold labels", "", labelled, "", *figures, "", "", "", ""])
    for group in summary["groups"]:
        texts = [group["role"], group["student"], group["init"], group["method"], group.get("view") or ""]
        figures = [_figure(name, group["metrics"][name], group["deviations"][name]) for name in names]
        row = [*texts, _count(group["training_rows"]), str(len(group["seeds"])), *figures]
        if teacher is not None:
            shares = [group.get("share_of_floor_gap"), group.get("share_of_start_gap")]
            row += [_figure("accuracy", group["agreement"]), *(_share(share, group["role"]) for share in shares)]
        else:
            row += ["", "", ""]
        table.append([*row, _gain(group.get("gain_over_plain"), metric)])
    return _without_empty_columns(table)


def cost_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: size and speed of one model per row."""
    entries = [("teacher", "", summary["teacher"]["cost"])] if summary["teacher"] is not None else []
    entries += [(group["role"], group["student"], group["cost"]) for group in summary["groups"]]
    timed = "p50_ms" in entries[0][2]
    header = ["role", "student", "parameters", "without embeddings", "MB"]
    header += ["p50 ms", "p95 ms", "rows/s"] if timed else []
    header += ["speed-up"] if timed and summary["teacher"] is not None else []
    table, seen = [header], set()
    for role, student, cost in entries:
        # Groups that differ in training alone have one size and one speed.
        if student and (student, cost["parameters"]) in seen:
            continue
        seen.add((student, cost["parameters"]))
        row = [
            role if not student else "student",
            student,
            f"{cost['parameters'] / 1e6:.2f} M",
            f"{cost['parameters_without_embeddings'] / 1e6:.2f} M",
            f"{cost['megabytes']:.1f}",
        ]
        if timed:
            row += [f"{cost['p50_ms']:.2f}", f"{cost['p95_ms']:.2f}", f"{cost['rows_per_s']:.0f}"]
        if timed and summary["teacher"] is not None:
            row.append(f"{cost['speed_up']:.1f}x")
        table.append(row)
    return table


def gain_lines(summary: Mapping[str, Any]) -> list[str]:
    """One line per distilled row that has a baseline from the same start."""
    metric, lines = summary["main_metric"], []
    for group in summary["groups"]:
        gain = group.get("gain_over_start")
        if gain is None:
            continue
        scale = 100.0 if metric in PERCENT else 1.0
        unit = " points" if metric in PERCENT else ""
        view = f" on {group['view']}" if group.get("view") else ""
        lines.append(
            f"distilled − start, {group['student']} from {group['init']}, {group['method']}{view}: "
            f"{scale * gain['mean']:+.2f}{unit} of {metric}, "
            f"95 % interval over examples {scale * gain['low']:+.2f} to {scale * gain['high']:+.2f}"
        )
    return lines


def search_lines(summary: Mapping[str, Any]) -> list[str]:
    """One line per row whose options were chosen among several values."""
    lines = []
    for group in summary["groups"]:
        points = [
            f"{', '.join(f'{name} {value}' for name, value in point['options'].items())} "
            f"({_figure(point['metric'], point['score'])})"
            for point in group["tried"]
        ]
        if points:
            lines.append(
                f"chosen by validation {group['tried'][0]['metric']}: {group['role']} {group['student']} from "
                f"{group['init']}, {group['method']}: {points[0]}, not {', '.join(points[1:])}"
            )
    return lines


def footer_lines(summary: Mapping[str, Any]) -> list[str]:
    """Labels, steps, wall time, notes, machine and command."""
    lines = []
    teacher = summary["teacher"] or {}
    if teacher.get("labelled_rows"):
        per_class = teacher.get("labels_per_class")
        lines.append(
            f"labels: {teacher['labelled_rows']}" + (f", {per_class} per class" if per_class else "") + " (teacher)"
        )
    steps = sorted({group["steps"] for group in summary["groups"]})
    seconds = [group["train_seconds"] for group in summary["groups"] if group["train_seconds"]]
    trained = f"steps per run: {', '.join(map(str, steps))}"
    lines.append(trained + (f"; training took {min(seconds):.0f} to {max(seconds):.0f} s a run" if seconds else ""))
    lines += search_lines(summary)
    lines += summary["notes"]
    machine = summary["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")
    lines.append(f"machine: {where}; torch {machine['torch']}, transformers {machine['transformers']}")
    lines.append(f"command: {summary['command']}")
    return lines


def _metrics_shown(summary: Mapping[str, Any]) -> list[str]:
    if summary["task"] == "token":
        return [*summary["groups"][0]["metrics"]]
    wanted = {
        "single-label": ["accuracy", "macro_f1", "matthews", "ece", "nll"],
        "multi-label": ["micro_f1", "macro_f1", "ece", "nll"],
        "regression": ["pearson", "spearman", "mse"],
    }[summary["task"]]
    if summary["task"] == "single-label" and summary["classes"] == 2:
        wanted[1] = "f1"
    return wanted


def _run_table(runs: Sequence[Mapping[str, Any]], metric: str) -> list[list[str]]:
    return [
        ["run", "seed", metric],
        *([run["path"], str(run["seed"]), _figure(metric, run["metrics"][metric])] for run in runs),
    ]


def _figure(name: str, value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return NOTHING
    scale, digits = (100.0, 2) if name in PERCENT else (1.0, 3)
    text = f"{scale * value:.{digits}f}"
    return text if deviation is None else f"{text} ± {scale * deviation:.{digits}f}"


def _share(share: float | None, role: str) -> str:
    if role != "distilled":
        return ""
    return NOTHING if share is None else f"{100 * share:.0f} %"


def _gain(gain: Mapping[str, float] | None, metric: str) -> str:
    """A difference and its interval; nothing where there is none."""
    if gain is None:
        return ""
    scale, digits = (100.0, 2) if metric in PERCENT else (1.0, 3)
    mean, low, high = (f"{scale * gain[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _without_empty_columns(table: Sequence[Sequence[str]]) -> list[list[str]]:
    kept = [column for column in zip(*table, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*kept, strict=True)]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; columns of figures to the right."""
    columns = []
    for column in zip(*table, strict=True):
        width = max(map(len, column))
        is_text = column[0] in ("role", "student", "start", "learned from", "view")
        columns.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = table
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in escaped),
    ]
