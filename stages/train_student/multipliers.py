"""Learning rates of a student's parts, as multiples of the run's: `embeddings:0.1`, `layers<=2:0.5`, `head:5`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...pipeline.errors import UsageError
from .parts import NAMES, Part, Place, lowest_first, parse_parts, place_of

FACTOR = "lr_multiplier"
"""What it is called in an optimiser's groups."""


@dataclass(frozen=True)
class Multiplier:
    """What the learning rate of a part is multiplied with, at every step."""

    part: Part
    factor: float

    def __str__(self) -> str:
        return f"{self.part.text}:{self.factor:g}"


def parse_multipliers(given: str | Sequence[str] | Mapping[str, Any], *, num_layers: int) -> tuple[Multiplier, ...]:
    """Multipliers from their texts.

    Args:
        given: `PART:FACTOR`, in a list or with commas between; or factors by part.
        num_layers: of the student.

    Raises:
        UsageError: not of that form, no such part (near matches are named), a factor that is not above 0, or two
            factors for the same part.
    """
    if isinstance(given, Mapping):
        given = [f"{name}:{factor}" for name, factor in given.items()]
    if not isinstance(given, str | Sequence):
        raise UsageError(f"{given!r} is not a list of PART:FACTOR")
    texts = [given] if isinstance(given, str) else given
    pieces = [piece.strip() for text in texts for piece in str(text).split(",")]
    found = []
    for piece in filter(None, pieces):
        name, colon, factor = piece.rpartition(":")
        if not colon:
            raise UsageError(f"{piece!r} is not PART:FACTOR", fix=f"parts: {', '.join(NAMES)}, layers<=2 and the like")
        parts = parse_parts(name, num_layers=num_layers)
        if parts is None:
            raise UsageError(f"{piece!r} is for all parts", fix="another learning rate")
        try:
            value = float(factor)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UsageError(
                f"{piece!r}: {factor!r} is not a number above 0", fix="`trainable` in a recipe freezes parts"
            )
        found.append(Multiplier(parts[0], value))
    places = [*lowest_first(None, num_layers), Place("projections")]
    for place in places:
        holding = [multiplier for multiplier in found if place in multiplier.part]
        if len(holding) > 1:
            raise UsageError(f"{place} has two factors: {' and '.join(map(str, holding))}", fix="one for each part")
    return tuple(found)


def factor_of(parameter: str, multipliers: Iterable[Multiplier]) -> float:
    """The factor of a parameter of a `Distillation`, by its name; 1 where no multiplier is about its part."""
    place = place_of(parameter)
    return next((multiplier.factor for multiplier in multipliers if place in multiplier.part), 1.0)


def idle(multipliers: Iterable[Multiplier], parameters: Iterable[str]) -> list[Multiplier]:
    """Those whose part has no parameter, by the names of a `Distillation`'s."""
    places = {place_of(parameter) for parameter in parameters}
    return [multiplier for multiplier in multipliers if not any(place in multiplier.part for place in places)]


def regrouped(
    groups: Iterable[Mapping[str, Any]], names: Mapping[int, str], multipliers: Sequence[Multiplier]
) -> list[dict[str, Any]]:
    """An optimiser's groups of parameters, divided by factor, with the learning rates that follow.

    Args:
        groups: as the optimiser was made with, before its first step.
        names: of the parameters, by `id`.
    """
    found = []
    for group in groups:
        by_factor: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factor_of(names[id(parameter)], multipliers), []).append(parameter)
        for factor, parameters in sorted(by_factor.items()):
            found.append({**group, "params": parameters, "lr": factor * group["lr"], FACTOR: factor})
    return found
