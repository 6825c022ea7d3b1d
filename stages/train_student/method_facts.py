"""What a method asks for, said for a given teacher: signals, bytes per example, student outputs, which students fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...pipeline.errors import UsageError
from ...pipeline.store.signal import Axis, Sizes, format_signals
from .methods import Method, Shapes, methods

BERT_BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "num_labels": 2}
"""The teacher that facts are about unless another is named."""

STUDENTS: Mapping[str, str] = {
    "own tokens": "any student",
    "no attention": "the teacher's tokens",
    "other heads": "the teacher's tokens, attention",
    "same heads": "the teacher's tokens, as many heads as the teacher",
}
"""What a student must have, by the least of the students a method can be used with as it is."""


def method_facts(teacher: Mapping[str, Any], *, length: int, student_layers: int | None = None) -> list[dict[str, Any]]:
    """One entry per method with its options at their defaults, in the order of names.

    Args:
        teacher: fields of its config.json: `num_hidden_layers`, `hidden_size`, `num_attention_heads`, `num_labels`.
        length: tokens of an example.
        student_layers: of the student, of the teacher's width and heads; None takes half the teacher's.

    Returns:
        What `methods.describe()` says, and `signals` (as `--signals` takes them), `bytes_per_example` of them stored
        as they are in their default encodings, `reads` (student outputs), `students` (what one must have).

    Raises:
        UsageError: sizes below 1.
    """
    num_layers, width = int(teacher["num_hidden_layers"]), int(teacher["hidden_size"])
    heads, num_labels = int(teacher.get("num_attention_heads") or 0), int(teacher.get("num_labels") or 2)
    depth = max(1, num_layers // 2) if student_layers is None else student_layers
    for name, value in (("--length", length), ("--student-layers", depth)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    form = Shapes(
        task="single-label",
        num_labels=num_labels,
        token_widths=(width,) * (depth + 1),
        sentence_widths=(width,) * (depth + 1),
        teacher_layers=num_layers,
        teacher_width=width,
        student_heads=heads,
        attention_width=width,
        teacher_heads=heads,
    )
    sizes = Sizes(label=num_labels, hidden=width, head=heads)
    return [{**entry, **_facts(methods.make(entry["name"], {}), form, sizes, length)} for entry in methods.describe()]


def _facts(method: Method, form: Shapes, sizes: Sizes, length: int) -> dict[str, Any]:
    try:
        signals = method.signals(form)
    except UsageError as error:
        return {"signals": "", "bytes_per_example": None, "reads": "", "students": error.what}
    entries: dict[Axis, int] = {"example": 1, "token": length, "pair": length * length}
    return {
        "signals": format_signals(signals),
        "bytes_per_example": sum(sizes.of(signal, entries) for signal in signals),
        "reads": _grouped(method.reads(form)),
        "students": STUDENTS[_least_student(method, form)],
    }


def _grouped(reads: Iterable[str]) -> str:
    """`token@1`, `token@2`, `score@2` as `token@1+2,score@2`."""
    layers: dict[str, list[str]] = {}
    for read in reads:
        kind, _, layer = read.partition("@")
        layers.setdefault(kind, []).append(layer)
    return ",".join(kind + ("@" + "+".join(its) if its != [""] else "") for kind, its in layers.items())


def _least_student(method: Method, form: Shapes) -> str:
    forms = {
        "no attention": replace(form, student_heads=0, attention_width=0),
        "other heads": replace(form, student_heads=2 * form.student_heads),
        "same heads": form,
    }
    for name, tried in forms.items():
        try:
            signals = method.signals(tried)
        except UsageError:
            continue
        return "own tokens" if all(signal.kind.axis == "example" for signal in signals) else name
    raise AssertionError("a method that fits the teacher's own shape fits some student")
