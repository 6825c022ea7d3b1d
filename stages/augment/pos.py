"""Operator `pos`: a word becomes another word of the corpus with the same part of speech (Tang et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .pools import Pools


@dataclass(frozen=True)
class ReplaceByPos:
    """Replaces a word with this probability by one drawn from the pool of its tag, as often as the corpus uses it.

    One draw. The word drawn may be the same one. A tag without a pool keeps the word, and takes its draw all the same.
    """

    probability: float
    pools: Pools
    name: str = "pos"

    def replace(self, word: str, tag: int, draw: Callable[[], float]) -> str:
        """A word from the pool of `tag`."""
        return self.pools.word(tag, draw()) or word
