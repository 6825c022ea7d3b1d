"""Operator `ngram`: keep a short run of the (already changed) words and drop the rest (Tang et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_WORDS = 5


@dataclass(frozen=True)
class Window:
    """With this probability, keeps n words in a row, n uniform in 1..5, their start uniform; all, where n reaches that.

    One draw; when taken, two more: n, then the start.
    """

    probability: float
    name: str = "ngram"

    def bounds(self, num_words: int, draw: Callable[[], float]) -> tuple[int, int] | None:
        """First word kept and the one after the last; None when nothing is cut."""
        if draw() >= self.probability:
            return None
        length = 1 + int(draw() * MAX_WORDS)
        place = draw()
        if length >= num_words:
            return None
        start = int(place * (num_words - length + 1))
        return start, start + length
