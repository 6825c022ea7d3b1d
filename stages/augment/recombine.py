"""Operator `recombine`: one text of a pair becomes that of another row, so that the teacher labels a new pair.

Meant for tasks in which both texts have the same part, such as paraphrases. A text is drawn from all different texts of
its side, each equally likely, and is never the one that stands there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.fingerprint import fingerprint
from .dedup import joined
from .draws import FloatArray, IntArray
from .pairs import SIDES
from .words import split_words

RECOMBINE_DRAWS = 3
"""Whether, which side of both, which text."""
_LETTERS = SIDES[:2]


@dataclass(frozen=True, eq=False)
class Texts:
    """The different texts of one side of a corpus, in the order of their UTF-8 bytes.

    Attributes:
        texts: K strings.
        folded: K strings, as they count for equality.
        lengths: int64 [K] words of each.
    """

    texts: pa.Array
    folded: pa.Array
    lengths: IntArray

    def numbers(self, texts: pa.Array) -> IntArray:
        """int64 [N] which of them these are; all must be among them."""
        found: IntArray = pc.index_in(texts, value_set=self.texts).to_numpy().astype(np.int64)
        return found


def text_tables(originals: pa.Table) -> pa.Table:
    """What `read_texts` reads: the texts of both sides of the originals."""
    tables = []
    for letter in _LETTERS:
        found = pc.unique(originals[f"text_{letter}"])
        texts = found.take(pc.sort_indices(found))
        words = [split_words(text) for text in texts.to_pylist()]
        columns = {
            "side": pa.repeat(pa.scalar(letter), len(texts)),
            "text": texts,
            "folded": pa.array(map(joined, texts.to_pylist(), words), pa.string()),
            "n_words": pa.array(map(len, words), pa.int64()),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


@lru_cache(maxsize=1)
def read_texts(file: Path, digest: str) -> tuple[Texts, ...]:
    """The texts of each side, from a file of `text_tables`; `digest` is that of the corpus, which decides over them."""
    from .generate import read_arrow

    table, sides = read_arrow(file), []
    for letter in _LETTERS:
        rows = table.filter(pc.equal(table["side"], letter)).combine_chunks()
        columns = (rows[name].combine_chunks() for name in ("text", "folded", "n_words"))
        texts, folded, lengths = columns
        sides.append(Texts(texts, folded, lengths.to_numpy()))
    return tuple(sides)


def texts_digest(sides: tuple[Texts, ...]) -> str:
    """32 hex: hash of the texts that are drawn from."""
    return fingerprint([side.texts.to_pylist() for side in sides])


@dataclass(frozen=True, eq=False)
class Recombine:
    """With this probability, replaces a text of a pair.

    It is the one that the variant changes; where that is both, one by the draw.

    Attributes:
        probability: of a variant.
        own: per side int64 [N], the number of the text that stands there.
        sizes: texts of each side.
    """

    probability: float
    own: tuple[IntArray, ...]
    sizes: tuple[int, ...]

    def texts(self, rows: IntArray, side: IntArray, draws_V3: FloatArray) -> list[IntArray]:
        """Per side int64 [V]: the number of the text that takes its place in a variant; -1 where none does.

        Args:
            rows: int64 [V] the row of each variant.
            side: int64 [V] what it changes, as index into `pairs.SIDES`.
            draws_V3: in [0, 1).
        """
        both = len(_LETTERS)
        chosen = np.where(side == both, (draws_V3[:, 1] * both).astype(np.int64), side)
        is_taken = draws_V3[:, 0] < self.probability
        found = []
        for number, (own, size) in enumerate(zip(self.own, self.sizes, strict=True)):
            drawn = (draws_V3[:, 2] * (size - 1)).astype(np.int64)
            drawn += drawn >= own[rows]
            found.append(np.where(is_taken & (chosen == number) & (size > 1), drawn, -1))
        return found
