"""Operator `pos`: a word becomes another word of the corpus with the same part of speech (Tang et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from .draws import FloatArray, IntArray
from .pools import Pools


@dataclass(frozen=True)
class ReplaceByPos:
    """Replaces a word by one drawn from the pool of its tag, as often as the corpus uses it.

    The word drawn may be the same one.
    """

    pools: Pools

    def replace(self, words: IntArray, places: IntArray, draws: FloatArray) -> IntArray:
        """Words from the pools of their tags."""
        return self.pools.draw(words, draws)
