"""Words that may stand for a word: lists worked out before the variants are made, and the draw from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ...pipeline.ragged import Ragged
from .draws import FloatArray, IntArray
from .tagger import CLOSED_CLASS


@dataclass(frozen=True)
class ReplaceByCandidate:
    """Replaces a word by one of its candidates, all equally likely.

    A word without candidates stays.

    Attributes:
        candidates: per word, or per place of the corpus, the numbers of the words that may stand there.
        by_place: whether `candidates` has a row per place and not per word.
    """

    candidates: Ragged
    by_place: bool = False

    def replace(self, words: IntArray, places: IntArray, draws: FloatArray) -> IntArray:
        """A candidate of each word, or the word."""
        replaced = words.copy()
        rows = places if self.by_place else words
        starts, ends = self.candidates.offsets[rows], self.candidates.offsets[rows + 1]
        some = ends > starts
        chosen = starts[some] + (draws[some] * (ends - starts)[some]).astype(np.int64)
        replaced[some] = self.candidates.values[chosen]
        return replaced


def is_content_word(word: str) -> bool:
    """Whether candidates are looked for: letters only, and not of the closed classes of English.

    >>> [word for word in "the plot , which we 2 like".split() if is_content_word(word)]
    ['plot', 'like']
    """
    return word.isalpha() and word.lower() not in CLOSED_CLASS


def cased_like(word: str, model: str) -> str:
    """`word` with the capitals of `model`: its first letter's, or all.

    >>> cased_like("movie", "Film"), cased_like("movie", "FILM"), cased_like("movie", "film")
    ('Movie', 'MOVIE', 'movie')
    """
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def as_column(lists: Sequence[Sequence[str]]) -> pa.Table:
    """Candidate lists as they are kept on disk: one list of words per row."""
    return pa.table({"candidates": pa.array(lists, pa.list_(pa.string()))})


def from_column(table: pa.Table, first: int) -> tuple[Ragged, pa.Array]:
    """What `as_column` made: per row the numbers of its words, and the different words, numbered from `first`."""
    column = table["candidates"].combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    words = column.flatten().dictionary_encode()
    return Ragged.from_lengths(first + words.indices.to_numpy().astype(np.int64), lengths), words.dictionary
