"""Texts to the exact token ids that a model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged
from ..words import first_pieces

CHUNK_ROWS = 4096
MOST_TOKENS_OF_WORDS = (1 << 15) - 1
"""Where words begin is kept as int16."""


@dataclass(frozen=True)
class Encoded:
    """N tokenised rows.

    Attributes:
        token_ids: int64 ids per row, special tokens included, no padding.
        segment_ids: uint8 token types per row, same lengths; zeros for a tokenizer without them.
        truncated: bool [N], rows of which something was cut off.
        first_pieces: int16, per row and word the token it begins with, -1 where it has none; None unless asked for.
    """

    token_ids: Ragged
    segment_ids: Ragged
    truncated: np.ndarray
    first_pieces: Ragged | None = None


def encode(
    tokenizer: Any, texts_a: Sequence[str], texts_b: Sequence[str] | None, max_length: int
) -> tuple[Ragged, Ragged]:
    """Token ids (int64) and segment ids (uint8) of every text or pair, special tokens included, no padding.

    Rows longer than `max_length` tokens are cut, pairs from their longer side.
    """
    encoded = encode_rows(tokenizer, texts_a, texts_b, max_length)
    return encoded.token_ids, encoded.segment_ids


def encode_rows(
    tokenizer: Any,
    texts_a: Sequence[str],
    texts_b: Sequence[str] | None,
    max_length: int,
    *,
    words: bool = False,
    first_row: int = 0,
    advance: Callable[[int], None] = lambda rows: None,
) -> Encoded:
    """As `encode`, and which rows were cut.

    Args:
        words: also find where each word begins; the texts are words with one space between them.
        first_row: number of the first row in the corpus, for messages.
        advance: called with numbers of rows done.

    Raises:
        RefusedError: `max_length` leaves no room for text, or a row has no tokens at all; words are asked for, and the
            tokenizer does not say what its tokens are of.
    """
    special = tokenizer.num_special_tokens_to_add(pair=texts_b is not None)
    if max_length <= special:
        raise RefusedError(
            f"--max-length {max_length} leaves no room for text beside {special} special tokens",
            fix=f"give at least {special + 1}",
        )
    if words and not tokenizer.is_fast:
        raise RefusedError(
            f"{type(tokenizer).__name__} does not say what part of a text a token is of, and words have to meet tokens",
            fix="a checkpoint with a tokenizer.json",
        )
    if words and max_length > MOST_TOKENS_OF_WORDS:
        raise RefusedError(f"--max-length {max_length}: rows of words have at most {MOST_TOKENS_OF_WORDS} tokens")
    has_segments = "token_type_ids" in tokenizer.model_input_names
    pieces: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    cut: list[np.ndarray] = []
    for start in range(0, len(texts_a), CHUNK_ROWS):
        part_a = list(texts_a[start : start + CHUNK_ROWS])
        part_b = None if texts_b is None else list(texts_b[start : start + CHUNK_ROWS])
        encoding = tokenizer(
            part_a,
            part_b,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=has_segments,
        )
        rows = encoding["input_ids"]
        lengths.append(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        total = int(lengths[-1].sum())
        ids.append(np.fromiter((token for row in rows for token in row), dtype=np.int64, count=total))
        if has_segments:
            types = encoding["token_type_ids"]
            segments.append(np.fromiter((kind for row in types for kind in row), dtype=np.uint8, count=total))
        else:
            segments.append(np.zeros(total, dtype=np.uint8))
        cut.append(_was_cut(tokenizer, encoding, lengths[-1], part_a, part_b, max_length))
        if words:
            pieces += [first_pieces(row, text) for row, text in zip(encoding.encodings, part_a, strict=True)]
        advance(len(rows))
    every_length = np.concatenate([np.empty(0, dtype=np.int64), *lengths])
    if (every_length == 0).any():
        row = int(np.argmin(every_length))
        raise RefusedError(f"row {first_row + row} has no tokens: {texts_a[row][:60]!r}", fix="drop rows without text")
    return Encoded(
        Ragged.from_lengths(np.concatenate([np.empty(0, dtype=np.int64), *ids]), every_length),
        Ragged.from_lengths(np.concatenate([np.empty(0, dtype=np.uint8), *segments]), every_length),
        np.concatenate([np.empty(0, dtype=bool), *cut]),
        Ragged.from_rows(pieces, np.int16) if words else None,
    )


def _was_cut(
    tokenizer: Any,
    encoding: Any,
    lengths: np.ndarray,
    texts_a: Sequence[str],
    texts_b: Sequence[str] | None,
    max_length: int,
) -> np.ndarray:
    """Which rows lost tokens; only those of full length can have."""
    cut = np.zeros(len(lengths), dtype=bool)
    full = np.flatnonzero(lengths >= max_length)
    if encoding.encodings is not None:
        for row in full.tolist():
            cut[row] = bool(encoding.encodings[row].overflowing)
        return cut
    for row in full.tolist():  # a tokenizer written in Python: count again without the limit
        whole = tokenizer(texts_a[row], None if texts_b is None else texts_b[row], truncation=False, verbose=False)
        cut[row] = len(whole["input_ids"]) > max_length
    return cut
