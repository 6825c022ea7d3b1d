"""What a method asks for, said for a given teacher: signals, bytes per example, student outputs, which students fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...pipeline.errors import UsageError
from ...pipeline.store.signal import Axis, Sizes, format_signals
from ..cache_teacher.choice import smallest
from .methods import Method, Shapes, fitting_form, methods

BERT_BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "num_labels": 2}
"""The teacher that facts are about unless another is named."""

STUDENTS: Mapping[str, str] = {
    "own tokens": "any student",
    "no attention": "the teacher's tokens",
    "other heads": "the teacher's tokens, attention",
    "same heads": "the teacher's tokens, as many heads as the teacher",
}
"""What a student must have, by the least of the students a method can be used with as it is."""


def student_forms(teacher: Mapping[str, Any] = BERT_BASE) -> dict[str, tuple[str, Shapes]]:
    """Students as they differ to methods, by what they are called: what to write, and their shapes."""
    width, heads = int(teacher["hidden_size"]), int(teacher["num_attention_heads"])
    narrow = width // 2 // heads * heads or heads
    widths = {"bilstm": (width, 300, 300), "bert": (width,) * 4, "narrow": (narrow,) * 4, "mobilebert": (width,) * 5}
    attention = {"bilstm": (0, 0), "bert": (heads, width), "narrow": (heads, narrow), "mobilebert": (4, 128)}
    names = {
        "bilstm": ("bilstm", "bilstm:num_layers=2"),
        "bert": ("bert", "bert"),
        "narrow": ("narrower bert", f"bert:hidden_size={narrow}:heads={heads}"),
        "mobilebert": ("mobilebert", "mobilebert"),
    }
    return {
        name: (
            text,
            Shapes(
                task="single-label",
                num_labels=2,
                token_widths=widths[form],
                sentence_widths=widths[form],
                teacher_layers=int(teacher["num_hidden_layers"]),
                teacher_width=width,
                student_heads=attention[form][0],
                attention_width=attention[form][1],
                teacher_heads=heads,
            ),
        )
        for form, (name, text) in names.items()
    }


def methods_of(shapes: Shapes) -> dict[str, str | None]:
    """Every method with the options by which it fits two models: none for as it is, None for those that cannot."""
    return {name: fitting_form(name, shapes) for name in methods}


def method_facts(teacher: Mapping[str, Any], *, length: int, student_layers: int | None = None) -> list[dict[str, Any]]:
    """One entry per method with its options at their defaults, in the order of names.

    Args:
        teacher: fields of its config.json: `num_hidden_layers`, `hidden_size`, `num_attention_heads`, `num_labels`.
        length: tokens of an example.
        student_layers: of the student, of the teacher's width and heads; None takes half the teacher's.

    Returns:
        What `methods.describe()` says, and `signals` (as `--signals` takes them), `bytes_per_example` of them stored
        as they are in their default encodings, `smallest` and `smallest_bytes` (what `cache-teacher --for` stores of a
        large corpus of such examples, where they follow from it), `sidecars` (which that takes, once per teacher),
        `reads` (student outputs), `students` (what one must have).

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
        nothing = {"signals": "", "smallest": "", "sidecars": [], "reads": ""}
        return {**nothing, "bytes_per_example": None, "smallest_bytes": None, "students": error.what}
    entries: dict[Axis, int] = {"example": 1, "token": length, "pair": length * length}
    # Of many examples: sidecars, once per teacher, count for nothing.
    choice = smallest(
        signals, entries, sizes, form.teacher_layers, holds=lambda way: True, sidecar_bytes=lambda sidecar: 0
    )
    return {
        "signals": format_signals(signals),
        "bytes_per_example": sum(sizes.of(signal, entries) for signal in signals),
        "smallest": format_signals(choice.signals),
        "smallest_bytes": sum(choice.bytes_of.values()),
        "sidecars": list(choice.sidecars),
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
