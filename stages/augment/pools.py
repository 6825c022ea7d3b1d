"""Pools: for every part of speech, the words of the corpus that were tagged so, with how often."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ...pipeline.fingerprint import fingerprint


@dataclass(frozen=True)
class Pools:
    """Words and counts per tag.

    A draw picks an occurrence, so frequent words come often. Words are kept sorted, with running totals: the pool
    follows from what the corpus holds, not from the order in which it was read, and takes the memory of a vocabulary.

    Attributes:
        words: per tag, the different words in order of their code points.
        totals: per tag, occurrences of the words up to and with this one; the last is the size of the pool.
    """

    words: Mapping[int, tuple[str, ...]]
    totals: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, counts: Mapping[tuple[int, str], int]) -> Pools:
        """Pools from the number of occurrences of each (tag, word)."""
        words: dict[int, list[str]] = {}
        numbers: dict[int, list[int]] = {}
        for (tag, word), count in sorted(counts.items()):
            words.setdefault(tag, []).append(word)
            numbers.setdefault(tag, []).append(count)
        return cls(
            {tag: tuple(group) for tag, group in words.items()},
            {tag: tuple(accumulate(group)) for tag, group in numbers.items()},
        )

    @cached_property
    def digest(self) -> str:
        """32 hex: hash of tags, words and counts."""
        return fingerprint([[tag, self.words[tag], self.totals[tag]] for tag in sorted(self.words)])

    def word(self, tag: int, draw: float) -> str | None:
        """The word at `draw` in [0, 1) of the pool; None when no word of the corpus has this tag."""
        totals = self.totals.get(tag)
        return None if totals is None else self.words[tag][bisect_right(totals, int(draw * totals[-1]))]

    def identical_rate(self) -> float:
        """The share of replacements expected to draw the word that is there: mean over words of their pool share."""
        same = size = 0.0
        for totals in self.totals.values():
            counts = [after - before for before, after in zip((0, *totals), totals, strict=False)]
            same += sum(count * count for count in counts) / totals[-1]
            size += totals[-1]
        return same / size if size else 0.0


def count_words(words: Iterable[str], tags: Iterable[int], counts: Counter[tuple[int, str]]) -> None:
    """Add one text to the counts that `Pools.of` takes."""
    counts.update(zip(tags, words, strict=True))
