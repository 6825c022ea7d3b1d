"""Operator `mention`: a named entity becomes another one of its type that the labelled rows hold (Dai and Adel, 2020).

Mentions are what the gold tags of the originals mark, so rows without gold have none. A type's mentions are drawn as
often as they occur; they follow from what the corpus holds, not from the order in which it was read.

While a text is changed a mention is one item, whatever its number of words: it takes part in swaps as a whole, other
operators leave it alone, and it becomes words before the window is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...pipeline.ragged import Ragged, offsets_of, ranges
from ..entities import BioTags
from .draws import FloatArray, IntArray
from .pools import Pools

_FIRST = -2
"""The number of mention 0 among the words of a text; those of others are below it. -1 is a deleted word."""


@dataclass(frozen=True, eq=False)
class Mentions:
    """The mentions of a corpus.

    Attributes:
        pools: every (type, words joined by spaces), and how often it occurs.
        words: per entry of the pools its words, as numbers of the vocabulary.
    """

    pools: Pools
    words: Ragged

    @classmethod
    def of(cls, counts: Mapping[tuple[int, str], int], numbers: Mapping[str, int]) -> Mentions:
        """From the occurrences of every (type, words joined by spaces) and the number of every word."""
        pools = Pools.of(counts)
        return cls(
            pools, Ragged.from_rows([[numbers[word] for word in text.split(" ")] for text in pools.words], "int64")
        )


@dataclass(frozen=True, eq=False)
class Spans:
    """The mentions in the texts that variants are made of.

    Attributes:
        starts: int64 [S] place of the first word of each, among the words of all texts; rising.
        ends: int64 [S] place after its last word.
        entries: int64 [S] which of `Mentions.pools` it is.
        offsets: int64 [N + 1]: text i has those from `offsets[i]` up to `offsets[i + 1]`.
    """

    starts: IntArray
    ends: IntArray
    entries: IntArray
    offsets: IntArray

    @classmethod
    def of(cls, tags: Ragged, texts: Iterable[list[str]], bio: BioTags, pools: Pools) -> Spans:
        """Where the tags of texts, below 0 for words without gold, mark mentions.

        Args:
            tags: per text a row.
            texts: their words.
            bio: what the tags say.
            pools: of the mentions, by the number of their type; these are among them.
        """
        starts, ends, types = bio.spans(tags)
        words = [word for text in texts for word in text]
        names = (" ".join(words[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
        entries = [pools.numbers[pair] for pair in zip(types.tolist(), names, strict=True)]
        return cls(starts, ends, np.array(entries, np.int64), np.searchsorted(starts, tags.offsets))

    @cached_property
    def lengths(self) -> IntArray:
        """int64 [N] mentions of every text."""
        return np.diff(self.offsets)


def count_mentions(tags: Ragged, texts: Iterable[list[str]], bio: BioTags) -> dict[tuple[int, str], int]:
    """How often each (type, words joined by spaces) is marked."""
    words = [word for text in texts for word in text]
    counts: dict[tuple[int, str], int] = {}
    for start, end, kind in zip(*(column.tolist() for column in bio.spans(tags)), strict=True):
        pair = (kind, " ".join(words[start:end]))
        counts[pair] = counts.get(pair, 0) + 1
    return counts


@dataclass(frozen=True, eq=False)
class ReplaceMentions:
    """Replaces a mention by one drawn from those of its type, with this probability; it may draw the same one.

    Two draws a mention: whether, and which; all of a text's first, then all of the others.

    Attributes:
        probability: of every mention.
        mentions: what is drawn from.
        spans: the mentions of the texts.
    """

    probability: float
    mentions: Mentions
    spans: Spans

    def num_draws(self, rows: IntArray) -> IntArray:
        """Draws that variants of these texts take."""
        return 2 * self.spans.lengths[rows]

    def choose(self, rows: IntArray, draws: FloatArray, starts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """`(variants, spans, entries)` of the mentions that are replaced, int64 [K] each.

        Args:
            rows: int64 [V] the text of each variant.
            draws: where variants draw from.
            starts: int64 [V] where in it each begins.
        """
        lengths = self.spans.lengths[rows]
        variants = np.repeat(np.arange(len(rows)), lengths)
        spans = ranges(self.spans.offsets[:-1][rows], lengths)
        chosen = np.flatnonzero(draws[ranges(starts, lengths)] < self.probability)
        which = draws[ranges(starts + lengths, lengths)][chosen]
        return variants[chosen], spans[chosen], self.mentions.pools.draw(self.spans.entries[spans[chosen]], which)

    def spelled_out(self, words: IntArray) -> tuple[IntArray, IntArray]:
        """`(words, items)`: every mention among these numbers becomes its words; and which number each word is of."""
        at = np.flatnonzero(words <= _FIRST)
        entries = entry_of(words[at])
        lengths = np.ones(len(words), np.int64)
        lengths[at] = self.mentions.words.lengths[entries]
        items = np.repeat(np.arange(len(words)), lengths)
        spelled = words[items]
        spelled[ranges(offsets_of(lengths)[at], lengths[at])] = self.mentions.words.take(entries).values
        return spelled, items


def number_of(entries: IntArray) -> IntArray:
    """What stands for mentions among the numbers of words."""
    return _FIRST - entries


def entry_of(numbers: IntArray) -> IntArray:
    """Which mentions these numbers stand for."""
    return _FIRST - numbers


def rebuilt(tags: Ragged, bio: BioTags) -> Ragged:
    """Tags well formed again after words came and went: what begins with `I-X` begins with `B-X`."""
    starts, _, types = bio.spans(tags)
    values: npt.NDArray[np.int64] = tags.values.copy()
    values[starts] = bio.begin[types]
    return Ragged(values, tags.offsets)
