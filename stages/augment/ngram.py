"""Operator `ngram`: keep a short run of the (already changed) words and drop the rest (Tang et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .draws import FloatArray, IntArray

MAX_WORDS = 5


@dataclass(frozen=True)
class Window:
    """With this probability, keeps n words in a row, n uniform in 1..5, their start uniform; all, where n reaches that.

    Three draws a text: whether, n, the start.
    """

    probability: float

    def bounds(self, num_words: IntArray, draws_N3: FloatArray) -> tuple[IntArray, IntArray]:
        """First word kept and the one after the last, of each text; 0 and its length where nothing is cut."""
        length = 1 + (draws_N3[:, 1] * MAX_WORDS).astype(np.int64)
        start = (draws_N3[:, 2] * (num_words - length + 1)).astype(np.int64)
        cut = (draws_N3[:, 0] < self.probability) & (length < num_words)
        return np.where(cut, start, 0), np.where(cut, start + length, num_words)
