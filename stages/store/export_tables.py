"""Rows of a store as Arrow columns, and the Parquet files they go into."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...pipeline.ragged import offsets_of
from ...pipeline.store.reader import StoreReader
from ...pipeline.store.signal import SEGMENT_IDS, TOKEN_IDS, Signal
from ..masking import NO_LABEL, Masking

BLOCK_BYTES = 64 << 20
"""Of signals, padded, that are in memory at once."""
FILE_BYTES = 256 << 20
"""A file is closed when its rows have taken this much memory."""


def column_names(signals: Sequence[Signal]) -> dict[Signal, str]:
    """Columns of signals, as words: `hidden_tok_6` for `hidden.tok@6`; with the encoding where there are several."""
    bare = [signal.bare for signal in signals]
    return {
        signal: re.sub(r"\W", "_", str(signal if bare.count(signal.bare) > 1 else signal.bare)) for signal in signals
    }


def plain_columns(table: pa.Table) -> pa.Table:
    """Columns of a corpus in types that every Parquet reader has: no dictionaries, no fixed-size binary."""
    for index, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif pa.types.is_fixed_size_binary(kind):
            kind = pa.binary()
        if kind != field.type:
            table = table.set_column(index, field.name, table.column(index).cast(kind))
    return table


def blocks(reader: StoreReader, signals: Sequence[Signal], rows: np.ndarray) -> Iterator[slice]:
    """Parts of `rows` whose signals take at most about `BLOCK_BYTES` when padded, in order."""
    per_entry = {"example": 0, "token": 16, "pair": 0}
    for signal in signals:
        spec = reader.spec(signal)
        per_entry[spec.axis] += 4 * int(np.prod(spec.shape))
    lengths = reader.lengths(rows)
    start = 0
    while start < len(rows):
        longest = np.maximum.accumulate(lengths[start : start + 4096])
        needed = per_entry["example"] + per_entry["token"] * longest + per_entry["pair"] * longest**2
        needed *= np.arange(1, len(longest) + 1)
        stop = start + max(1, int(np.searchsorted(needed, BLOCK_BYTES, side="right")))
        yield slice(start, stop)
        start = stop


def signal_column(reader: StoreReader, signal: Signal, rows: np.ndarray) -> pa.Array:
    """One entry per row: lists of fixed size, or per token a list of such lists, or per pair lists of lists of them."""
    shape = reader.spec(signal).shape
    if signal.kind.axis == "example":
        return _fixed(reader.gather(signal, rows), shape)
    if signal.kind.axis == "token":
        values_BTD, lengths = reader.gather_tokens(signal, rows)
        inside_BT = np.arange(values_BTD.shape[1]) < lengths[:, None]
        return _lists(_fixed(values_BTD[inside_BT], shape), lengths)
    values_BTTH, lengths = reader.gather_pairs(signal, rows)
    inside_BT = np.arange(values_BTTH.shape[1]) < lengths[:, None]
    pairs = _fixed(values_BTTH[inside_BT[:, :, None] & inside_BT[:, None, :]], shape)
    return _lists(_lists(pairs, np.repeat(lengths, lengths)), lengths)


def _fixed(values: np.ndarray, shape: tuple[int, ...]) -> pa.Array:
    """Entries [N, *shape] as lists of fixed size, one in another where the shape has several dimensions."""
    column = pa.array(values.reshape(-1))
    for size in reversed(shape):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _lists(values: pa.Array, lengths: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets_of(lengths).astype(np.int32)), values)


def input_columns(
    reader: StoreReader, rows: np.ndarray, *, mask: bool, masking: Masking | None = None
) -> dict[str, pa.Array]:
    """`input_ids` (list of int32), and either `attention_mask` (ones) or `token_type_ids` (both list of int8).

    Where rows are masked, `input_ids` are so too, and `labels` (list of int32) has what stood there, -100 elsewhere.
    """
    ids_BT, lengths = reader.gather_tokens(TOKEN_IDS, rows)
    inside_BT = np.arange(ids_BT.shape[1]) < lengths[:, None]
    offsets = pa.array(offsets_of(lengths).astype(np.int32))
    columns = {}
    if masking is not None:
        masked = masking.apply(ids_BT, lengths, reader.row_keys(rows))
        ids_BT, labels_BT = masked.ids_BT, np.full_like(masked.ids_BT, NO_LABEL)
        at, slots = np.nonzero(masked.positions_BM >= 0)
        labels_BT[at, masked.positions_BM[at, slots]] = masked.labels_BM[at, slots]
        columns["labels"] = pa.ListArray.from_arrays(offsets, pa.array(labels_BT[inside_BT].astype(np.int32)))
    columns["input_ids"] = pa.ListArray.from_arrays(offsets, pa.array(ids_BT[inside_BT].astype(np.int32)))
    if mask:
        ones = np.ones(int(lengths.sum()), dtype=np.int8)
        columns["attention_mask"] = pa.ListArray.from_arrays(offsets, pa.array(ones))
    else:
        segments_BT, _ = reader.gather_tokens(SEGMENT_IDS, rows)
        columns["token_type_ids"] = pa.ListArray.from_arrays(offsets, pa.array(segments_BT[inside_BT].astype(np.int8)))
    return columns


def top_columns(logits_BC: np.ndarray, k: int) -> dict[str, pa.Array]:
    """`token_ids` and `top_values`: the classes with the k largest logits and those logits, the largest first.

    Of equal logits the lower class comes first.
    """
    order_BK = np.argsort(-logits_BC, axis=1, kind="stable")[:, :k]
    values_BK = np.take_along_axis(logits_BC, order_BK, axis=1).astype(np.float32)
    return {
        "token_ids": pa.FixedSizeListArray.from_arrays(pa.array(order_BK.astype(np.int32).reshape(-1)), k),
        "top_values": pa.FixedSizeListArray.from_arrays(pa.array(values_BK.reshape(-1)), k),
    }


class SplitFiles:
    """Parquet files of one split: `data/train-00000-of-00002.parquet`, named when their number is known."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema) -> None:
        self.split, self.num_rows = split, 0
        self._folder, self._schema = folder / "data", schema
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parts: list[Path] = []
        self._rows: list[int] = []
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0

    def write(self, table: pa.Table) -> None:
        """Append rows; a row group of their own."""
        if self._writer is None:
            self._parts.append(self._folder / f"{self.split}-{len(self._parts):05d}.part")
            self._rows.append(0)
            self._writer = pq.ParquetWriter(self._parts[-1], self._schema)
            self._bytes = 0
        self._writer.write_table(table.cast(self._schema))
        self._bytes += table.nbytes
        self._rows[-1] += len(table)
        self.num_rows += len(table)
        if self._bytes >= FILE_BYTES:
            self._close()

    def finish(self) -> Mapping[str, Any]:
        """Rows by file name, relative to the export."""
        self._close()
        named = {}
        for number, (part, rows) in enumerate(zip(self._parts, self._rows, strict=True)):
            name = f"{self.split}-{number:05d}-of-{len(self._parts):05d}.parquet"
            part.rename(part.with_name(name))
            named[f"data/{name}"] = rows
        return named

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
