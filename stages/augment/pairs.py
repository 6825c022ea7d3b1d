"""Which text of a pair a variant changes."""

from __future__ import annotations

from collections.abc import Callable

PAIR_SIDES = ("cycle", "random")
_CYCLE = ("a", "b", "both")


def side(iteration: int, pair_sides: str, draw: Callable[[], float]) -> str:
    """ "a", "b" or "both": in turn by iteration (Tang et al.), or one in three each by a draw (castorini/d-bert).

    "cycle" draws nothing, "random" draws once, before anything else of the variant. The sides are never swapped: the
    order carries meaning in inference tasks.
    """
    return _CYCLE[iteration % 3] if pair_sides == "cycle" else _CYCLE[int(draw() * 3)]
