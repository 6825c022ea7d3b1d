"""What several methods ask for: hidden states of both models, a fit of their shapes, maps between their widths."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from ..losses.reduce import wide
from .base import Shapes, Unfit

SHOWN_AT = {"cls": "sentence", "mean": "mean", "tok": "token"}
"""What a student shows in place of `hidden.cls`, `hidden.mean` and `hidden.tok`."""


def hidden_signals(at: str, layers: Iterable[int]) -> tuple[Signal, ...]:
    """Teacher states `at` "cls", "mean" or "tok" of some layers, each once."""
    return tuple(dict.fromkeys(Signal(f"hidden.{at}", layer) for layer in layers))


def state_reads(at: str, layers: Iterable[int]) -> tuple[str, ...]:
    """The student outputs that stand against such states, of some layers, each once."""
    return tuple(dict.fromkeys(f"{SHOWN_AT[at]}@{layer}" for layer in layers))


def require_same_heads(shapes: Shapes, method: str, *, fix: str | None = None) -> None:
    """Refuse unless both models attend with the same number of heads, so that head h can be compared with head h.

    Raises:
        Unfit: with `fix` as the way to use the method all the same.
    """
    require_attention(shapes, method, fix=fix)
    if shapes.student_heads != shapes.teacher_heads:
        raise Unfit(
            f"method {method!r} compares attention head by head, and the student has {shapes.student_heads} heads, the "
            f"teacher {shapes.teacher_heads}",
            fix=fix,
        )


def require_attention(shapes: Shapes, method: str, *, fix: str | None = None) -> None:
    """Refuse a student or teacher without attention."""
    for side, heads in (("student", shapes.student_heads), ("teacher", shapes.teacher_heads)):
        if not heads:
            raise Unfit(f"method {method!r} compares attention, and the {side} has none that can be watched", fix=fix)


def one_width(widths: Iterable[int], method: str) -> int:
    """The width that all of a student's layers have which share one projection.

    Raises:
        Unfit: they differ.
    """
    found = {*widths}
    if len(found) > 1:
        raise Unfit(
            f"method {method!r} shares one projection, and the student's layers it reads are "
            f"{' and '.join(map(str, sorted(found)))} wide",
            fix="leave layer 0 out",
        )
    return found.pop()


def widths_at(at: str, shapes: Shapes) -> tuple[int, ...]:
    """The student's widths, layer 0 first, of what is compared `at` "cls" (its sentence vectors) or elsewhere."""
    return shapes.sentence_widths if at == "cls" else shapes.token_widths


def one_map(width: int, shapes: Shapes, *, bias: bool = True) -> nn.ModuleDict:
    """`linear`, from a width of the student to the teacher's; nothing where they are the same."""
    if width == shapes.teacher_width:
        return nn.ModuleDict()
    return nn.ModuleDict({"linear": nn.Linear(width, shapes.teacher_width, bias=bias)})


def map_per_pair(
    pairs: Iterable[tuple[int, int]], widths: tuple[int, ...], shapes: Shapes, *, bias: bool = True
) -> nn.ModuleDict:
    """A linear map for every pair of layers whose widths differ, by its name "2-6"; `widths` as of `widths_at`."""
    return nn.ModuleDict(
        {
            f"{own}-{other}": nn.Linear(widths[own], shapes.teacher_width, bias=bias)
            for own, other in pairs
            if widths[own] != shapes.teacher_width
        }
    )


def project(projections: nn.ModuleDict, name: str, states: Tensor) -> Tensor:
    """`states` through the projection of that name, or as they are where none was needed; cached ones are float16."""
    if name not in projections:
        return states
    projected: Tensor = projections[name](wide(states))
    return projected
