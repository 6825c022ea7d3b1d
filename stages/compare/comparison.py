"""Predict with every model, count, time, and write the report."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...pipeline.artifact import atomic_write_bytes
from ...pipeline.config import command_line
from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged
from ...pipeline.stage import Progress, StageContext, StageResult
from ..corpus import Corpus
from ..evaluate import SMALL_SPLIT, matching_columns
from ..metrics import agreement, check_metric, main_metric, task_metrics
from ..predict import Predictor, load_predictor
from .groups import Group, baselines, make_groups, plain_soft_targets, read_run, told_apart_by_view
from .stage import Compare
from .statistics import mean_and_deviation, paired_bootstrap, share_of_gap
from .table import markdown_report
from .timing import measure_speed

TEACHER = "teacher"


@dataclass(frozen=True)
class Scored:
    """A row of the table: one model, or several that differ in their seed.

    Attributes:
        logits: float32 [N, C] per seed, columns in the order of the reference.
        metrics: per seed.
        model: one of them, on the CPU, to time and to count.
    """

    logits: list[np.ndarray]
    metrics: list[dict[str, float]]
    model: Predictor


def compare(stage: Compare, context: StageContext) -> StageResult:
    """Do what `kd compare` does."""
    corpus = stage.read_split()
    labels = corpus.tags()[0] if corpus.info.task == "token" else corpus.labels()[0]
    groups = make_groups(
        [read_run(path) for path in stage.runs], search=stage.search, search_metric=stage.search_metric
    )
    max_length = groups[0].first.content.get("max_length")
    progress = context.progress

    teacher_model = None
    if stage.teacher is not None:
        teacher_model = load_predictor(stage.teacher, device=stage.device)
        if max_length and teacher_model.content.get("max_length") != max_length:
            # The teacher as captured: shown as many tokens as the store showed it.
            teacher_model = load_predictor(stage.teacher, device=stage.device, max_length=max_length)
    reference = teacher_model or load_predictor(groups[0].first.path, device=stage.device)
    task = reference.task
    names = reference.label_names
    metric_name = check_metric(stage.metric or main_metric(task, names), task, len(names), names)

    teacher = None if teacher_model is None else _scored([teacher_model], reference, corpus, labels, stage, progress)
    scored = [
        _scored(
            [load_predictor(run.path, device=stage.device) for run in group.runs],
            reference,
            corpus,
            labels,
            stage,
            progress,
        )
        for group in groups
    ]

    # Groups that differ in training alone have one speed: the first of them is timed.
    twins: dict[tuple[str, int], str] = {}
    timed_as = [
        twins.setdefault((group.first.student, row.model.num_parameters), str(index))
        for index, (group, row) in enumerate(zip(groups, scored, strict=True))
    ]
    models = {name: scored[int(name)].model for name in twins.values()}
    if teacher is not None:
        models[TEACHER] = teacher.model
    speeds: dict[str, dict[str, float]] = {}
    if stage.latency_texts:
        for model in models.values():
            model.model.to("cpu")  # type: ignore[arg-type]
        found = measure_speed(
            models, *corpus.texts(), num_texts=stage.latency_texts, seed=stage.bootstrap_seed, progress=progress
        )
        speeds = {
            name: {"p50_ms": 1e3 * s.p50_s, "p95_ms": 1e3 * s.p95_s, "rows_per_s": s.rows_per_s}
            for name, s in found.items()
        }
        if TEACHER in speeds:
            for speed in speeds.values():
                speed["speed_up"] = speeds[TEACHER]["p50_ms"] / speed["p50_ms"]

    rows = [
        _row(group, row, task, teacher)
        | {"view": told_apart_by_view(group, groups), "cost": _cost(row.model) | speeds.get(name, {})}
        for group, row, name in zip(groups, scored, timed_as, strict=True)
    ]
    notes = _add_differences(rows, groups, scored, teacher, metric_name, task, labels, names, stage, progress)
    if task == "single-label" and len(corpus) < SMALL_SPLIT:
        accuracy = (teacher or scored[-1]).metrics[0]["accuracy"]
        error = np.sqrt(accuracy * (1 - accuracy) / len(corpus))
        notes.append(f"{len(corpus)} rows: one standard error of an accuracy is about {100 * error:.1f} points")
    if stage.search and any(run.evaluated_on == stage.dataset for group in groups for run in group.runs):
        notes.append(f"the values of {', '.join(stage.search)} were chosen on {stage.dataset} itself")
    if any(len(group.runs) == 1 for group in groups):
        notes.append("one seed: no spread over seeds is known; evidence takes three, five below 5,000 rows")
    notes += stage.notes

    summary: dict[str, Any] = {
        "dataset": stage.dataset,
        "rows": len(corpus),
        "task": task,
        "classes": len(names),
        "main_metric": metric_name,
        "teacher": None
        if teacher is None
        else {
            "path": stage.teacher,
            "metrics": teacher.metrics[0],
            "cost": _cost(teacher.model) | speeds.get(TEACHER, {}),
            "labelled_rows": teacher.model.content.get("labelled_rows"),
            "labels_per_class": teacher.model.content.get("labels_per_class"),
        },
        "groups": rows,
        "notes": notes,
        "machine": machine(),
        "command": shlex.join(command_line(stage)),
    }
    folder = Path(stage.output_dir)
    summary["plot"] = _plot(summary, folder, progress)
    summary["report"] = str(folder / "report.md")
    atomic_write_bytes(folder / "report.md", markdown_report(summary).encode())
    atomic_write_bytes(folder / "comparison.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
    return StageResult(summary=summary, content={"main_metric": metric_name, "task": task, "num_groups": len(rows)})


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _scored(
    models: Sequence[Predictor],
    reference: Predictor,
    corpus: Corpus,
    labels: np.ndarray | Ragged,
    stage: Compare,
    progress: Progress,
) -> Scored:
    logits, metrics = [], []
    for model in models:
        order = matching_columns(model, reference)
        logits_NC = model.predict(*corpus.texts(), batch_size=stage.batch_size, progress=progress)
        logits_NC = logits_NC if order is None else logits_NC[:, order]
        try:
            metrics.append(task_metrics(reference.task, logits_NC, labels, reference.label_names))
        except RefusedError as error:
            raise RefusedError(f"{model.path}: {error.what}", details=error.details, fix=error.fix) from None
        logits.append(logits_NC)
    return Scored(logits, metrics, models[0])


def _cost(model: Predictor) -> dict[str, float]:
    return {
        "parameters": model.num_parameters,
        "parameters_without_embeddings": model.num_parameters - model.num_embedding_parameters,
        "megabytes": model.num_bytes / 1e6,
    }


def _row(group: Group, scored: Scored, task: str, teacher: Scored | None) -> dict[str, Any]:
    """One row of the table, JSON-ready, without what it takes other rows to say."""
    run = group.first
    spread = {name: mean_and_deviation([found[name] for found in scored.metrics]) for name in scored.metrics[0]}
    found = {
        "role": group.role,
        "student": run.student,
        "init": run.init,
        "method": run.method if run.role == "distilled" else "gold labels",
        "training_rows": run.rows,
        "steps": run.steps,
        "train_seconds": run.seconds,
        "seeds": [member.seed for member in group.runs],
        "runs": [
            {"path": str(member.path), "seed": member.seed, "metrics": metrics}
            for member, metrics in zip(group.runs, scored.metrics, strict=True)
        ],
        "metrics": {name: mean for name, (mean, _) in spread.items()},
        "deviations": {name: deviation for name, (_, deviation) in spread.items()},
        "agreement": None,
        "tried": [dataclasses.asdict(point) for point in group.tried],
    }
    if teacher is not None:
        found["agreement"] = float(
            np.mean([agreement(task, logits_NC, teacher.logits[0]) for logits_NC in scored.logits])
        )
    return found


def _add_differences(
    rows: list[dict[str, Any]],
    groups: Sequence[Group],
    scored: Sequence[Scored],
    teacher: Scored | None,
    metric_name: str,
    task: str,
    labels: np.ndarray | Ragged,
    names: Sequence[str],
    stage: Compare,
    progress: Progress,
) -> list[str]:
    """Add to every distilled row its shares of the gap and its gains over the start and over plain soft targets; return
    what must be said of it."""
    notes: list[str] = []
    means = [row["metrics"][metric_name] for row in rows]
    index_of = {id(group): index for index, group in enumerate(groups)}

    def best(found: Sequence[Group]) -> int | None:
        # Of several baselines the best one: the distilled student is not to win by a badly tuned peer.
        sign = 1.0 if _higher_is_better(metric_name) else -1.0
        return max((index_of[id(group)] for group in found), key=lambda index: sign * means[index], default=None)

    def gain(index: int, base: int) -> dict[str, float]:
        low, high = paired_bootstrap(
            metric_name,
            task,
            scored[index].logits,
            scored[base].logits,
            labels,
            samples=stage.bootstrap_samples,
            seed=stage.bootstrap_seed,
            label_names=names,
        )
        return {"mean": means[index] - means[base], "low": low, "high": high}

    for index, group in enumerate(groups):
        if group.role != "distilled":
            continue
        floors, starts = baselines(group, groups)
        floor, start = best(floors), best(starts)
        teacher_value = None if teacher is None else teacher.metrics[0][metric_name]
        for name, base in (("share_of_floor_gap", floor), ("share_of_start_gap", start)):
            rows[index][name] = None
            if base is not None and teacher_value is not None:
                rows[index][name] = share_of_gap(means[index], means[base], teacher_value, metric_name=metric_name)
        rows[index]["gain_over_start"] = None
        plain = plain_soft_targets(group, groups)
        rows[index]["gain_over_plain"] = None if plain is None else gain(index, index_of[id(plain)])
        label = f"{group.first.student} from {group.first.init}, {group.first.method}"
        for role, base in (("floor", floor), ("start", start)):
            if base is not None and (role == "start" or base != start):
                notes += _unequal_budgets(label, group, role, groups[base], stage.search)
        if start is None:
            notes.append(f"no baseline from the same start for {label}: train one with --baseline")
            continue
        rows[index]["gain_over_start"] = gain(index, start)
    return notes


def _unequal_budgets(label: str, group: Group, role: str, baseline: Group, search: Sequence[str]) -> list[str]:
    """One note if a distilled group and its baseline did not have the same to learn with, searched options apart."""
    ours, theirs = group.first.budget, baseline.first.budget
    differing = [
        f"{name.replace('_', ' ')} {ours[name]} against {theirs[name]}"
        for name in ours
        if name in theirs and name not in search and ours[name] != theirs[name]
    ]
    return [f"unequal budgets: {label} and its {role}: {', '.join(differing)}"] if differing else []


def _higher_is_better(metric_name: str) -> bool:
    from ..metrics import LOWER_IS_BETTER

    return metric_name not in LOWER_IS_BETTER


def _plot(summary: Mapping[str, Any], folder: Path, progress: Progress) -> str | None:
    if find_spec("matplotlib") is None:
        progress.warn('no plot: matplotlib is not installed; pip install "kd-pipeline[report]" adds it')
        return None
    from .plot import save_plot

    save_plot(summary, folder / "comparison.png")
    return str(folder / "comparison.png")
