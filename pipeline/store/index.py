"""The row index: which row stands where. One Parquet file per shard, its columns checked against each other."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ..errors import RefusedError, VerificationError
from ..ragged import IntArray, offsets_of
from .arrow import from_arrow, to_arrow
from .compacted import PARQUET_ERRORS
from .files import SMALL_FILE_BYTES, Blob, StoreFiles
from .footer import UNCOMPRESSED, row_groups
from .keys import Keys, SortedKeys, first_occurrences, keys_from_arrow, keys_to_arrow
from .layout import StoreLayout, index_file
from .records import IndexRecord, Record
from .scratch import Appended, release

SCHEMA = pa.schema(
    [
        pa.field("row_key", pa.binary(16), nullable=False),
        pa.field("row_slot", pa.uint32(), nullable=False),
        pa.field("token_start", pa.uint32(), nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
    ]
)
SCHEMA_WITH_PAIRS = SCHEMA.append(pa.field("pair_start", pa.uint32(), nullable=False))


def encode_index(keys: Keys, lengths: IntArray, *, pairs: bool = False) -> tuple[bytes, IndexRecord]:
    """The Parquet file of a shard whose rows stand in slots 0, 1, ... without gaps, and its record.

    Args:
        pairs: whether the store has an axis of token pairs.
    """
    columns = [
        keys_to_arrow(keys),
        to_arrow(np.arange(len(keys), dtype=np.uint32)),
        to_arrow(offsets_of(lengths)[:-1].astype(np.uint32)),
        to_arrow(lengths.astype(np.uint32)),
    ]
    if pairs:
        columns.append(to_arrow(offsets_of(lengths**2)[:-1].astype(np.uint32)))
    table = pa.table(columns, schema=SCHEMA_WITH_PAIRS if pairs else SCHEMA)
    buffer = io.BytesIO()
    # Row keys are random bits: neither a dictionary nor a compressor helps.
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_statistics=False)
    data = buffer.getvalue()
    return data, IndexRecord(len(data), xxhash.xxh3_128_hexdigest(data), content_hash(keys, lengths))


def content_hash(keys: Keys, lengths: IntArray) -> str:
    """xxh3_128 of all row keys, then of all numbers of tokens as uint32: 32 hex."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(keys).tobytes())
    digest.update(lengths.astype("<u4").tobytes())
    return digest.hexdigest()


def read_index(files: StoreFiles, record: Record, *, fresh: bool = False) -> tuple[Keys, IntArray]:
    """(row keys [rows, 2], number of tokens int64 [rows]) of a shard, checked against its record.

    Args:
        fresh: read the file of the store itself, not a copy on this machine: to verify it.

    Raises:
        VerificationError: absent, damaged, or not what the record says.
    """
    name = index_file(record.shard)
    try:
        return _decode(_read(files, index_blob(record), fresh), record)
    except FileNotFoundError:
        what = "is missing"
    except (ValueError, pa.ArrowException, RefusedError, VerificationError) as error:
        what = f"is damaged: {error}"
    raise VerificationError(
        f"{files.path(name)} {what}", fix=f"see all damage with: kd store verify {files.url}"
    ) from None


def index_blob(record: Record) -> Blob:
    """The index file of a shard, by the shard's first record."""
    assert record.index is not None
    return Blob(index_file(record.shard), record.index.bytes, record.index.xxh3_128)


def _read(files: StoreFiles, blob: Blob, fresh: bool) -> bytes:
    if blob.bytes > SMALL_FILE_BYTES:
        raise ValueError(f"its record says {blob.bytes} bytes; at most {SMALL_FILE_BYTES} are expected")
    path = None if fresh else files.fetch(blob)
    size = files.size(blob.name) if path is None else os.path.getsize(path)
    if size != blob.bytes:
        raise ValueError(f"it has {size} bytes, its record says {blob.bytes}")
    data = files.read(blob.name) if path is None else Path(path).read_bytes()
    if xxhash.xxh3_128_hexdigest(data) != blob.xxh3_128:
        raise ValueError("its bytes do not have the recorded checksum")
    return data


def _decode(data: bytes, record: Record) -> tuple[Keys, IntArray]:
    assert record.index is not None
    keys, lengths = decode_index(data, num_rows=record.rows)
    if int(lengths.sum()) != record.tokens:
        raise ValueError(f"num_tokens sums to {int(lengths.sum())}, the record says {record.tokens}")
    if record.pairs and int((lengths**2).sum()) != record.pairs:
        raise ValueError(f"num_tokens squared sums to {int((lengths**2).sum())}, the record says {record.pairs}")
    if content_hash(keys, lengths) != record.index.content:
        raise ValueError("its content does not have the recorded checksum")
    return keys, lengths


def decode_index(data: bytes, *, num_rows: int | None = None) -> tuple[Keys, IntArray]:
    """(row keys [rows, 2], number of tokens int64 [rows]) from the bytes of an index, its columns checked.

    Args:
        num_rows: how many there must be; None is whatever fits into the file.

    Raises:
        ValueError, pyarrow.ArrowException, RefusedError: say what is wrong with it.
    """
    try:
        return _decode_columns(data, num_rows)
    except PARQUET_ERRORS as error:
        raise ValueError(f"not Parquet: {error}") from None


def _decode_columns(data: bytes, num_rows: int | None) -> tuple[Keys, IntArray]:
    parquet = pq.ParquetFile(pa.BufferReader(data))
    with_pairs = parquet.schema_arrow.equals(SCHEMA_WITH_PAIRS)
    if not with_pairs and not parquet.schema_arrow.equals(SCHEMA):
        raise ValueError(f"its columns are {parquet.schema_arrow.names}, expected {SCHEMA.names}")
    found = parquet.metadata.num_rows
    if num_rows is not None and found != num_rows:
        raise ValueError(f"it has {found} rows, its record says {num_rows}")
    if found * 28 > len(data):
        raise ValueError(f"it has {found} rows in {len(data)} bytes, which is not as kd writes them")
    groups = row_groups(data)
    # A page may unfold to any size where it is compressed, and a group may say another number of rows than the file.
    if sum(rows for rows, _ in groups) != found or any(
        codec != UNCOMPRESSED for _, codecs in groups for codec in codecs
    ):
        raise ValueError("it is compressed, or its parts do not have the rows of the whole")
    table = parquet.read(use_threads=False)
    slots, starts, lengths = (
        from_arrow(table.column(name), np.uint32).astype(np.int64) for name in ("row_slot", "token_start", "num_tokens")
    )
    if not np.array_equal(slots, np.arange(len(table))):
        raise ValueError("row_slot does not count from 0 without gaps")
    if (lengths < 1).any() or not np.array_equal(starts, offsets_of(lengths)[:-1]):
        raise ValueError("token_start is not the running sum of num_tokens, which are at least 1")
    if with_pairs and not np.array_equal(table.column("pair_start").to_numpy(), offsets_of(lengths**2)[:-1]):
        raise ValueError("pair_start is not the running sum of num_tokens squared")
    return keys_from_arrow(table.column("row_key")), lengths


class _Columns(NamedTuple):
    keys: Keys
    token_offsets: npt.NDArray[np.uint32]
    pair_offsets: npt.NDArray[np.uint32]
    """Empty where the store has no pairs."""


@dataclass(frozen=True)
class RowIndex:
    """The row indexes of all shards, at one moment.

    A row's number never changes: `shard * rows_per_shard + slot`. What is known of all rows is gathered once into
    temporary files and mapped from there, so that it takes no memory that the system cannot have back.
    """

    files: StoreFiles
    layout: StoreLayout
    allocations: Sequence[Record]

    @cached_property
    def _sizes(self) -> IntArray:
        """int64 [num_shards] rows of each shard."""
        return np.array([record.rows for record in self.allocations], dtype=np.int64)

    @cached_property
    def _first(self) -> IntArray:
        """int64 [num_shards] where each shard begins in `token_offsets`."""
        return offsets_of(self._sizes + 1)[:-1]

    @cached_property
    def _columns(self) -> _Columns:
        """What is known of all rows, gathered in one pass over the files of all shards."""
        self._fetch()
        keys, tokens, pairs = Appended(np.uint64), Appended(np.uint32), Appended(np.uint32)
        for record in self.allocations:
            shard_keys, lengths = read_index(self.files, record)
            keys.append(shard_keys.reshape(-1))
            tokens.append(offsets_of(lengths))
            if self.layout.pairs_per_shard:
                pairs.append(offsets_of(lengths**2))
        return _Columns(keys.all((2,)), tokens.all(), pairs.all())

    @property
    def token_offsets(self) -> npt.NDArray[np.uint32]:
        """uint32: of each shard one after another, the running sum of its rows' tokens, from 0: one more than rows.

        Slots of a shard that hold no row take nothing, however many its layout has.
        """
        return self._columns.token_offsets

    def _fetch(self) -> None:
        """Copy what is remote to this machine, all at once: one by one, they would be waited for one by one."""
        self.files.fetch_all([index_blob(record) for record in self.allocations])

    @property
    def pair_offsets(self) -> npt.NDArray[np.uint32]:
        """uint32: as `token_offsets`, of each row's tokens squared; of a store with an axis of token pairs."""
        return self._columns.pair_offsets

    def pair_starts(self, rows: IntArray) -> IntArray:
        """int64 [N] first pair inside the shard, of rows that exist."""
        shards = rows // self.layout.rows_per_shard
        slots = rows - shards * self.layout.rows_per_shard
        return self.pair_offsets[self._first[shards] + slots].astype(np.int64)

    def shards(self) -> Iterator[tuple[Keys, IntArray]]:
        """Of each shard, the keys of its rows and their row numbers; one shard is in memory at a time."""
        self._fetch()
        for record in self.allocations:
            keys, _ = read_index(self.files, record)
            yield keys, np.arange(record.rows) + record.shard * self.layout.rows_per_shard

    @property
    def num_rows(self) -> int:
        """Of all shards."""
        return int(self._sizes.sum())

    def lookup(self, wanted: Keys) -> IntArray:
        """int64 [N] row number of each key [N, 2], -1 where the store has no such row."""
        first, distinct = first_occurrences(wanted)
        rows = np.full(len(first), -1, dtype=np.int64)
        if len(first):
            asked = SortedKeys(wanted[first])
            for keys, numbers in self.shards():
                at = asked.find(keys)
                rows[at[at >= 0]] = numbers[at >= 0]
        return rows[distinct]

    def row_keys(self, rows: IntArray) -> Keys:
        """[N, 2] keys of rows that exist."""
        shards = rows // self.layout.rows_per_shard
        # Where a shard begins among the rows: its beginning among the offsets, of which each shard has one more.
        at = self._first[shards] - shards + rows - shards * self.layout.rows_per_shard
        return self._columns.keys[at]

    def release(self) -> None:
        """Take the pages that were read out of this process; they come back when they are touched."""
        for array in self.__dict__.get("_columns", ()):
            release(array)

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """(shard, first token inside the shard, number of tokens) of each row, int64 [N].

        Raises:
            RefusedError: a row number that the store does not have.
        """
        if rows.size and rows.min() < 0:
            self._refuse(rows, rows < 0)
        shards = rows // self.layout.rows_per_shard
        if rows.size and shards.max() >= len(self.allocations):
            self._refuse(rows, shards >= len(self.allocations))
        slots = rows - shards * self.layout.rows_per_shard
        if (absent := slots >= self._sizes[shards]).any():
            self._refuse(rows, absent)
        at = self._first[shards] + slots
        starts = self.token_offsets[at].astype(np.int64)
        lengths = self.token_offsets[at + 1].astype(np.int64) - starts
        return shards, starts, lengths

    def _refuse(self, rows: IntArray, bad: npt.NDArray[np.bool_]) -> NoReturn:
        raise RefusedError(
            f"store {self.files.url} has no row {int(rows[bad][0])} ({int(bad.sum())} such of {len(rows)})",
            fix="was the view made for another store? run kd cache-teacher again",
        )
