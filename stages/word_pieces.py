"""Which of the teacher's tokens each word of a view begins with: a column of its own, written beside the examples.

With it a student is trained on words without the teacher's tokenizer. What stands there cannot be told from token ids
alone, so it is checked against the corpus and the store, and by its digest, before anything is read through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ..pipeline.errors import VerificationError
from ..pipeline.ragged import Ragged

if TYPE_CHECKING:
    import pyarrow as pa

    from ..pipeline.store import View

COLUMN = "first_pieces"
"""Of the view: list<int16>, one number per word; of its manifest: the digest of that column."""
NO_PIECE = -1
"""Stands for a word that was cut off, or of which the tokenizer leaves nothing."""


def with_first_pieces(table: pa.Table, pieces: Ragged) -> pa.Table:
    """The examples with the column.

    Args:
        pieces: int16, per row one number per word: which token it begins with, from 0; or `NO_PIECE`.
    """
    import pyarrow as pa

    column = pa.ListArray.from_arrays(pa.array(pieces.offsets.astype(np.int32)), pa.array(pieces.values, pa.int16()))
    return table.append_column(COLUMN, column)


def digest(pieces: Ragged) -> str:
    """32 hex: xxh3_128 of the numbers of words as uint32, then of all entries as int16."""
    found = xxhash.xxh3_128(pieces.lengths.astype("<u4").tobytes())
    found.update(pieces.values.astype("<i2").tobytes())
    return found.hexdigest()


def read_first_pieces(view: View) -> Ragged:
    """The column of a view, int16.

    Raises:
        VerificationError: there is none, it is not what was written, or it does not fit the words of the corpus or the
            rows of the store.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def broken(what: str) -> VerificationError:
        return VerificationError(
            f"view {view.path}: {what}", fix="run kd cache-teacher again with --overwrite: the teacher need not run"
        )

    table = view.examples
    if COLUMN not in table.column_names or table.schema.field(COLUMN).type != pa.list_(pa.int16()):
        raise broken(f"its words are joined to no tokens: it lacks the column {COLUMN} ({pa.list_(pa.int16())})")
    column = table[COLUMN].combine_chunks()
    if column.null_count or column.flatten().null_count:
        raise broken(f"the column {COLUMN} has gaps")
    pieces = Ragged.from_lengths(_array(column.flatten()), _array(pc.list_value_length(column)))
    words_N = _array(pc.add(pc.count_substring(table["text_a"].combine_chunks(), " "), 1))
    tokens_N = view.reader.lengths(view.rows)
    bad_N = (pieces.lengths != words_N) | _badly_placed(pieces, tokens_N)
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise broken(
            f"{int(bad_N.sum())} of {len(bad_N)} examples have words that cannot begin where the column {COLUMN} says; "
            f"example {row} has {int(words_N[row])} words, {int(tokens_N[row])} tokens and {pieces[row].tolist()[:20]}"
        )
    if digest(pieces) != view.content.get(COLUMN):
        raise broken(f"the column {COLUMN} is not the one that was written: words would meet other words' targets")
    return pieces


def _badly_placed(pieces: Ragged, tokens_N: np.ndarray) -> np.ndarray:
    """bool [N]: rows in which a word begins outside of the row's tokens, or not behind the word before."""
    rows_W = np.repeat(np.arange(len(pieces)), pieces.lengths)
    values_W = pieces.values.astype(np.int64)
    bad_W = (values_W < NO_PIECE) | (values_W >= tokens_N[rows_W])
    begins = np.flatnonzero(values_W >= 0)
    same_row = rows_W[begins[1:]] == rows_W[begins[:-1]]
    bad_W[begins[1:]] |= same_row & (values_W[begins[1:]] <= values_W[begins[:-1]])
    return np.bincount(rows_W[bad_W], minlength=len(pieces)) > 0


def _array(column: Any) -> np.ndarray:
    return np.asarray(column.to_numpy(zero_copy_only=False))
