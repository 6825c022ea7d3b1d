"""Pools: for every part of speech, the words of the corpus that were tagged so, with how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...pipeline.fingerprint import fingerprint
from .draws import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Pools:
    """Every (tag, word) of a corpus with how often it occurs; the operators know a word as its number here.

    Entries are sorted by tag, then word: the pools follow from what the corpus holds, not from the order in which it
    was read, and take the memory of a vocabulary. A draw picks an occurrence, so frequent words come often.

    Attributes:
        tags: int64 [E]; 0 throughout where nothing was tagged.
        words: E words.
        counts: int64 [E] occurrences; 0 for a word that is known and never drawn.
    """

    tags: IntArray
    words: tuple[str, ...]
    counts: IntArray

    @classmethod
    def of(cls, counts: Mapping[tuple[int, str], int]) -> Pools:
        """Pools from the number of occurrences of each (tag, word)."""
        pairs = sorted(counts)
        tags, numbers = [tag for tag, _ in pairs], [counts[pair] for pair in pairs]
        return cls(np.array(tags, np.int64), tuple(word for _, word in pairs), np.array(numbers, np.int64))

    @cached_property
    def numbers(self) -> dict[tuple[int, str], int]:
        """The entry of a (tag, word)."""
        return {pair: number for number, pair in enumerate(zip(self.tags.tolist(), self.words, strict=True))}

    @cached_property
    def digest(self) -> str:
        """32 hex: hash of tags, words and counts."""
        return fingerprint([self.tags.tolist(), self.words, self.counts.tolist()])

    @cached_property
    def _ends(self) -> IntArray:
        """Occurrences of the entries up to and with each."""
        return np.cumsum(self.counts)

    @cached_property
    def _ranges(self) -> tuple[IntArray, IntArray]:
        """Per entry: occurrences before its pool, and in it."""
        before = np.concatenate([[0], self._ends])
        first, last = (np.searchsorted(self.tags, self.tags, side=side) for side in ("left", "right"))
        return before[first], before[last] - before[first]

    def draw(self, entries: IntArray, draws: FloatArray) -> IntArray:
        """An entry of the pool of each of these, at `draws` in [0, 1); the entry itself where the pool is empty."""
        starts, sizes = (column[entries] for column in self._ranges)
        found = np.searchsorted(self._ends, starts + (draws * sizes).astype(np.int64), side="right")
        return np.where(sizes > 0, found, entries)

    def identical_rate(self) -> float:
        """The share of replacements expected to draw the word that is there: mean over words of their pool share."""
        sizes = np.maximum(self._ranges[1], 1)
        total = self.counts.sum()
        return float((self.counts * self.counts / sizes).sum() / total) if total else 0.0
