"""Which text of a pair a variant changes."""

from __future__ import annotations

import numpy as np

from .draws import FloatArray, IntArray

PAIR_SIDES = ("cycle", "alternate", "random")
SIDES = ("a", "b", "both")
"""What a variant changes, by number."""


def sides(iterations: IntArray, pair_sides: str, draws: FloatArray) -> IntArray:
    """The number of the side in `SIDES`, per variant.

    "cycle" takes the three in turn by iteration (Tang et al.), "alternate" the first two (TinyBERT), "random" one in
    three each by the draw (castorini/d-bert).
    """
    if pair_sides == "random":
        return (draws * 3).astype(np.int64)
    return iterations % (3 if pair_sides == "cycle" else 2)
