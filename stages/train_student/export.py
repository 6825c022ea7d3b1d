"""The run folder: a student that `from_pretrained` opens, its card, its metrics and its resolved configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...pipeline.artifact import atomic_write_bytes

GENERAL_TAGS = {"masked-lm": "fill-mask", "encoder": "feature-extraction"}
"""What hubs call students that are for no task in particular."""
PIPELINE_TAGS = {**GENERAL_TAGS, "token": "token-classification"}
"""What hubs call students that do not classify texts."""
RECIPE = "recipe.yaml"
"""The phases of a run that had several, as `--recipe` reads them."""


@dataclass(frozen=True)
class Report:
    """What a run has to say of itself.

    Attributes:
        role: "distilled" or "baseline".
        student, start, method: as the user would write them, defaults resolved.
        views: fingerprint by path.
        teacher: its identity, from the store.
        task, label_names, columns, max_length: what the student predicts, from what.
        seed: of the run.
        num_parameters: of the exported student.
        evaluated_on: what `metrics` were measured on; None when nothing was.
        metrics: of the exported student.
        start_facts: what the start gave it.
        training: steps, rows, losses and speed.
        phases: what came of each, where there were several.
        recipe: the phases as a recipe file has them, or None.
        arguments: the resolved configuration.
        history: what the `Trainer` logged.
    """

    role: str
    student: str
    start: str
    method: str
    views: Mapping[str, str]
    teacher: Mapping[str, Any]
    task: str
    label_names: tuple[str, ...]
    columns: Mapping[str, str | None]
    max_length: int
    seed: int
    num_parameters: int
    evaluated_on: str | None
    metrics: Mapping[str, float]
    start_facts: Mapping[str, Any]
    training: dict[str, Any]
    phases: list[dict[str, Any]]
    recipe: Mapping[str, Any] | None
    arguments: Mapping[str, Any]
    history: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Figures for people."""
        shown = ("steps", "rows", "rows_with_gold", "rows_per_s", "reader_wait_share", "best_step")
        return {
            "role": self.role,
            "student": self.student,
            "init": self.start,
            "method": self.method,
            "num_parameters": self.num_parameters,
            **{name: self.training[name] for name in shown},
            **({"phases": self._short_phases()} if self.phases else {}),
            **({"evaluated_on": self.evaluated_on, **self.metrics} if self.evaluated_on else {}),
        }

    def _learning_rate(self) -> Any:
        """The one of all phases, or theirs in a row where they differ."""
        if not self.phases:
            return self.arguments.get("learning_rate")
        rates = [facts["learning_rate"] for facts in self.phases]
        return rates[0] if len({*rates}) == 1 else rates

    def _short_phases(self) -> dict[str, Any]:
        return {facts["name"]: {"steps": facts["steps"], **facts["last_losses"]} for facts in self.phases}

    def content(self) -> dict[str, Any]:
        """The kind-specific part of the manifest."""
        return {
            "role": self.role,
            "student": self.student,
            "init": self.start,
            "method": self.method,
            "view": list(self.views.values()),
            "seed": self.seed,
            "steps": self.training["steps"],
            **({"phases": self.phases} if self.phases else {}),
            "budget": {
                "max_steps": self.training["max_steps"],
                "rows_per_step": self.training["rows_per_step"],
                "rows_with_gold": self.training["rows_with_gold"],
                "learning_rate": self._learning_rate(),
                "lr_multipliers": list(self.arguments.get("lr_multipliers") or ()),
            },
            "task": self.task,
            "label_names": list(self.label_names),
            "columns": dict(self.columns),
            "max_length": self.max_length,
            "num_parameters": self.num_parameters,
            "metrics": dict(self.metrics),
        }


def export_run(
    folder: str | Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report
) -> None:
    """Write the run folder; its manifest is the stage's to write.

    Args:
        student: on the CPU, complete, in evaluation mode.
    """
    folder = Path(folder)
    student.save_pretrained(folder)
    # Truncation and padding of the last call are no part of a tokenizer, yet would be saved with it.
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, report.max_length)
    tokenizer.save_pretrained(folder)
    metrics = {
        "role": report.role,
        "evaluated_on": report.evaluated_on,
        "metrics": dict(report.metrics),
        "training": report.training,
        **({"phases": report.phases} if report.phases else {}),
        "start": dict(report.start_facts),
        "num_parameters": report.num_parameters,
        "history": report.history,
    }
    atomic_write_bytes(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    resolved = yaml.safe_dump(dict(report.arguments), sort_keys=False, allow_unicode=True)
    atomic_write_bytes(folder / "resolved_config.yaml", resolved.encode())
    if report.recipe is not None:
        recipe = yaml.safe_dump(dict(report.recipe), sort_keys=False, allow_unicode=True)
        atomic_write_bytes(folder / RECIPE, recipe.encode())
    atomic_write_bytes(folder / "README.md", model_card(report, model_type=student.config.model_type).encode())


def model_card(report: Report, *, model_type: str) -> str:
    """The model card, as Markdown with the metadata that hubs read."""
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS.get(report.task, "text-classification"),
        "tags": ["kd-pipeline", model_type, *(["knowledge-distillation"] if report.role == "distilled" else [])],
    }
    if report.metrics:
        header["metrics"] = list(report.metrics)
    origin = (
        "It learned from stored outputs of a teacher; the teacher was not loaded."
        if report.role == "distilled"
        else "It learned masked words alone: the baseline that a distilled student is compared with."
        if report.task in GENERAL_TAGS
        else "It learned from gold labels alone: the baseline that a distilled student is compared with."
    )
    rows = {
        "student": f"`{report.student}`",
        "start": f"`{report.start}`",
        "method": f"`{report.method}`",
        "parameters": f"{report.num_parameters:,}",
        "training rows": f"{report.training['rows']:,}, {report.training['rows_with_gold']:,} with a gold label",
        "steps": f"{report.training['steps']:,} of {report.training['rows_per_step']} rows",
        "longest input": f"{report.max_length} tokens",
        "seed": str(report.seed),
        "teacher": f"{report.teacher.get('model_type', '')} `{str(report.teacher.get('tensors', ''))[:16]}`",
        "views": ", ".join(f"`{fingerprint[:8]}`" for fingerprint in report.views.values()),
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {report.role.capitalize()} student `{report.student.partition(':')[0]}`",
        "",
        *(_general_use if report.task in GENERAL_TAGS else _use)(report.task, origin, model_type),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
    ]
    if report.metrics:
        lines += [f"Measured on `{report.evaluated_on}`:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in report.metrics.items()] + [""]
    if report.label_names:
        shown = ", ".join(f"`{name}`" for name in report.label_names[:100])
        rest = len(report.label_names) - 100
        lines += [f"Labels: {shown}{f', and {rest} more' if rest > 0 else ''}", ""]
    return "\n".join(lines)


def _use(task: str, origin: str, model_type: str) -> list[str]:
    return [
        f"A {task} {'' if task == 'token' else 'text '}classifier made by `kd train-student`. {origin}",
        "",
        "```python",
        "import kd",
        "",
        'student = kd.load_student("path/to/this/folder")',
        'student.tags([["a", "list", "of", "words"]])' if task == "token" else 'student(["a text"])  # logits',
        "```",
        *_plain_loading(task, model_type),
    ]


def _general_use(task: str, origin: str, model_type: str) -> list[str]:
    opened = "AutoModelForMaskedLM" if task == "masked-lm" else "AutoModel"
    return [
        f"An encoder for no task in particular, made by `kd train-student` from text without labels. {origin}",
        "Fine-tune it: `kd train-student --student path/to/this/folder`.",
        "",
        f"`{opened}.from_pretrained` and `AutoTokenizer.from_pretrained` open it.",
    ]


def _plain_loading(task: str, model_type: str) -> list[str]:
    if model_type.startswith("kd-"):
        return []
    opened = f"AutoModelFor{'Token' if task == 'token' else 'Sequence'}Classification"
    return ["", f"`{opened}.from_pretrained` and `AutoTokenizer.from_pretrained` open it too."]
