"""Parts of a student that a phase may train: `embeddings`, `layers`, `head`, and the `projections` of its methods."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...pipeline.errors import UsageError, near_match

NAMES = ("embeddings", "layers", "head", "projections")
_COMPARED: dict[str, Callable[[int, int], bool]] = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
_LAYER = re.compile(r"(?:^|\.)(?:\w*layers?|\w*blocks?|h)\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)(?:\.|$)")


@dataclass(frozen=True)
class Place:
    """Where a parameter is: one of `NAMES`, and for `layers` which, counted from 1."""

    name: str
    layer: int = 0

    def __str__(self) -> str:
        return f"{self.name}={self.layer}" if self.layer else self.name


def place_of(parameter: str) -> Place:
    """The part that a parameter of a `Distillation` belongs to, by its name; what is in no other is `head`.

    >>> place_of("student.bert.encoder.layer.0.attention.self.query.weight")
    Place(name='layers', layer=1)
    >>> place_of("student.classifier.weight")
    Place(name='head', layer=0)
    """
    if parameter.startswith("projections."):
        return Place("projections")
    if found := _LAYER.search(parameter):
        return Place("layers", int(found[1]) + 1)
    return Place("embeddings" if _EMBEDDINGS.search(parameter) else "head")


@dataclass(frozen=True)
class Part:
    """A part as a recipe names it.

    Attributes:
        text: `embeddings`, `layers`, `layers<=2`, `layers>=2`, `layers=2`, `head` or `projections`.
        name: of it, without the comparison.
        compared, layer: which layers; all where `compared` is empty.
    """

    text: str
    name: str
    compared: str = ""
    layer: int = 0

    def __contains__(self, place: Place) -> bool:
        if place.name != self.name:
            return False
        return not self.compared or _COMPARED[self.compared](place.layer, self.layer)


def parse_parts(texts: str | Sequence[str], *, num_layers: int) -> tuple[Part, ...] | None:
    """Parts from their texts; None is all of them.

    Args:
        texts: `all`, or parts, in a list or with commas between.
        num_layers: of the student.

    Raises:
        UsageError: nothing is called so (near matches are named), or the student has no such layer.
    """
    pieces = [piece.strip() for piece in (texts.split(",") if isinstance(texts, str) else texts)]
    if pieces == ["all"]:
        return None
    parts = tuple(_parse(piece, num_layers) for piece in pieces)
    if not parts:
        raise UsageError("no part is named", fix=f"all, or some of {', '.join(NAMES)}")
    return parts


def _parse(text: str, num_layers: int) -> Part:
    found = re.fullmatch(r"(\w+)\s*(?:(<=|>=|=)\s*(\d+))?", text)
    name = found[1] if found else text
    if found is None or name not in NAMES or (found[2] and name != "layers"):
        known = (*NAMES, "layers<=k", "layers>=k", "layers=k", "all")
        raise UsageError(f"{text!r} is no part of a student{near_match(name, known)}")
    if not found[2]:
        return Part(text, name)
    layer = int(found[3])
    if not 1 <= layer <= num_layers:
        raise UsageError(f"{text!r}: the student has layers 1 to {num_layers}")
    return Part(text, name, found[2], layer)


def lowest_first(parts: Sequence[Part] | None, num_layers: int) -> list[Place]:
    """Places of the student that the parts hold, from the embeddings up to the head."""
    places = [Place("embeddings"), *(Place("layers", layer) for layer in range(1, num_layers + 1)), Place("head")]
    return [place for place in places if parts is None or any(place in part for part in parts)]
