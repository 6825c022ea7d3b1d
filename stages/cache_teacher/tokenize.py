"""Texts to the exact token ids that a model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Encoded:
    """N tokenised rows.

    Attributes:
        token_ids: int64 ids per row, special tokens included, no padding.
        segment_ids: uint8 token types per row, same lengths; zeros for a tokenizer without them.
        truncated: bool [N], rows of which something was cut off.
    """

    token_ids: Ragged
    segment_ids: Ragged
    truncated: np.ndarray


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
    first_row: int = 0,
    advance: Callable[[int], None] = lambda rows: None,
) -> Encoded:
    """As `encode`, and which rows were cut.

    Args:
        first_row: number of the first row in the corpus, for messages.
        advance: called with numbers of rows done.

    Raises:
        RefusedError: `max_length` leaves no room for text, or a row has no tokens at all.
    """
    special = tokenizer.num_special_tokens_to_add(pair=texts_b is not None)
    if max_length <= special:
        raise RefusedError(
            f"--max-length {max_length} leaves no room for text beside {special} special tokens",
            fix=f"give at least {special + 1}",
        )
    has_segments = "token_type_ids" in tokenizer.model_input_names
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
        advance(len(rows))
    every_length = np.concatenate([np.empty(0, dtype=np.int64), *lengths])
    if (every_length == 0).any():
        row = int(np.argmin(every_length))
        raise RefusedError(f"row {first_row + row} has no tokens: {texts_a[row][:60]!r}", fix="drop rows without text")
    return Encoded(
        Ragged.from_lengths(np.concatenate([np.empty(0, dtype=np.int64), *ids]), every_length),
        Ragged.from_lengths(np.concatenate([np.empty(0, dtype=np.uint8), *segments]), every_length),
        np.concatenate([np.empty(0, dtype=bool), *cut]),
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
