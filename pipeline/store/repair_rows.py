"""Damaged token ids, segment ids and row indexes: made from each other, or from the texts they came from.

The row key in the index is a hash of a row's ids, the allocation record has the checksums of all three files and of
the index's content. So a guess is cheap to check and cannot be wrong: where rows begin, which segments they have, which
bit was turned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import KdError
from ..ragged import IntArray, Ragged, offsets_of
from .index import content_hash, encode_index, read_index
from .keys import Keys, first_occurrences, match_keys, row_keys
from .layout import index_file
from .records import Record, hash_parts
from .repair import Outcome
from .signal import ArraySpec
from .store import TeacherStore
from .verify import compare_file
from .writer import shard_parts

Ids = npt.NDArray[Any]
MAX_WINDOWS = 1 << 12
"""Runs of rows of a corpus that are tried as the rows of a shard whose index and ids are both lost."""


@dataclass(frozen=True)
class Inputs:
    """Rows as the teacher reads them, tokenised from texts: N distinct ones in order of first appearance.

    Attributes:
        token_ids: N rows.
        segment_ids: N rows of the same lengths.
    """

    token_ids: Ragged
    segment_ids: Ragged

    @classmethod
    def distinct(cls, token_ids: Ragged, segment_ids: Ragged) -> Inputs:
        """Each row once."""
        first, _ = first_occurrences(row_keys(token_ids, segment_ids))
        return cls(token_ids.take(first), segment_ids.take(first))

    @cached_property
    def keys(self) -> Keys:
        return row_keys(self.token_ids, self.segment_ids)


def repair_rows(
    store: TeacherStore, allocations: Iterable[Record], shards: Container[int], inputs: Inputs | None, outcome: Outcome
) -> None:
    """Restore damaged indexes and ids where their checksums prove it; hold the lock.

    Args:
        allocations: of all shards.
        shards: to look at.
        inputs: rows of the corpora that the store was made from, as far as they are given.
    """
    everywhere = [*allocations]
    for record in everywhere:
        if record.shard not in shards:
            continue
        others = [other for other in everywhere if other is not record]
        _Shard(store, record, others, inputs, outcome).repair()


class _Shard:
    """Index and ids of one shard while they are being restored."""

    def __init__(
        self, store: TeacherStore, record: Record, others: Sequence[Record], inputs: Inputs | None, outcome: Outcome
    ) -> None:
        self.store, self.record, self.others, self.inputs, self.outcome = store, record, others, inputs, outcome
        self.files = {file.spec: file for file in record.files}
        self.ids_spec, self.segments_spec = store.layout.input_specs
        self.damaged = {spec for spec, file in self.files.items() if compare_file(store.files, file) is not None}
        try:
            self.index: tuple[Keys, IntArray] | None = read_index(store.files, record)
        except KdError:
            self.index = None

    def repair(self) -> None:
        if self.index is not None and not self.damaged:
            return
        found = self._from_index() if self.index is not None else self._without_index()
        if found is None:
            for spec in sorted(self.damaged, key=lambda spec: spec.path):
                self.outcome.lose(self.files[spec].file, self._how_to_get_back())
            if self.index is None:
                self.outcome.lose(index_file(self.record.shard), self._how_to_get_back())
            return
        keys, rows = found
        self._write(keys, rows)

    def _how_to_get_back(self) -> str:
        if self.inputs is None:
            return "give the texts it was made from (--corpus or --dataset), or restore it from a copy"
        return "the texts given do not make it: give those the store was captured from, or restore it from a copy"

    # --- the index is whole ------------------------------------------------------------------------------------------

    def _from_index(self) -> tuple[Keys, Inputs] | None:
        """Rows that have the keys of the index: as read, with a small change, or from the texts."""
        assert self.index is not None
        keys, lengths = self.index
        ids, segments = (self._as_read(spec, lengths) for spec in (self.ids_spec, self.segments_spec))
        bad = (row_keys(ids, segments) != keys).any(axis=1)
        ids_rows, segment_rows = [*ids], [*segments]
        known = match_keys(self.inputs.keys, keys) if self.inputs is not None else np.full(len(keys), -1)
        for row in np.flatnonzero(bad).tolist():
            wanted = keys[row]
            if known[row] >= 0:
                assert self.inputs is not None
                found = self.inputs.token_ids[int(known[row])], self.inputs.segment_ids[int(known[row])]
            else:
                guess = self._guess(ids_rows[row], segment_rows[row], wanted)
                if guess is None:
                    return None
                found = guess
            ids_rows[row], segment_rows[row] = found
        return keys, Inputs(*(Ragged.from_rows(rows, np.int64) for rows in (ids_rows, segment_rows)))

    def _as_read(self, spec: ArraySpec, lengths: IntArray) -> Ragged:
        """A damaged file's entries, zeros for those that are not there."""
        values = np.zeros(self.record.tokens, dtype=spec.dtype)
        there = self._entries(spec)
        values[: len(there)] = there[: len(values)]
        return Ragged.from_lengths(values, lengths)

    def _entries(self, spec: ArraySpec) -> Ids:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        try:
            # What was added to a file stands behind its entries.
            data = next(self.store.files.blocks(self.files[spec].file, self.record.tokens * dtype.itemsize), b"")
            return np.frombuffer(bytes(data), dtype=dtype, count=len(data) // dtype.itemsize)
        except (KdError, OSError):
            return np.empty(0, dtype=dtype)

    def _guess(self, ids: Ids, segments: Ids, wanted: npt.NDArray[np.uint64]) -> tuple[Ids, Ids] | None:
        """The row near this one that has the wanted key."""
        guesses = []
        if self.segments_spec in self.damaged:
            guesses.append(_other_segments(ids, segments))
        if self.ids_spec in self.damaged:
            guesses.append((row, segments) for row in _one_bit_off(ids))
        for candidates in guesses:
            tried = [*candidates]
            keys = row_keys(*(Ragged.from_rows(rows, np.int64) for rows in zip(*tried, strict=True)))
            hits = np.flatnonzero((keys == wanted).all(axis=1))
            if len(hits):
                return tried[int(hits[0])]
        return None

    # --- the index is not ----------------------------------------------------------------------------------------

    def _without_index(self) -> tuple[Keys, Inputs] | None:
        """Rows whose keys and lengths have the recorded hash: cut out of the ids, or a run of the texts."""
        assert self.record.index is not None
        for rows in (*self._cut_in_places(), *self._runs_of_texts()):
            if len(rows.token_ids) != self.record.rows:
                continue
            if content_hash(rows.keys, rows.token_ids.lengths) == self.record.index.content:
                return rows.keys, rows
        return None

    def _cut_in_places(self) -> Iterator[Inputs]:
        if self.ids_spec in self.damaged:
            return
        ids = self._entries(self.ids_spec)
        for lengths in self._lengths(ids):
            if len(lengths) != self.record.rows or lengths.sum() != len(ids) or (lengths < 1).any():
                continue
            rows = Ragged.from_lengths(ids, lengths)
            segments = [self._as_read(self.segments_spec, lengths)]
            if self.segments_spec in self.damaged:
                segments += [Ragged.from_lengths(np.zeros(len(ids), np.uint8), lengths), _after_first_end(rows)]
            for guess in segments:
                yield Inputs(rows, guess)

    def _lengths(self, ids: Ids) -> Iterator[IntArray]:
        """Where rows may begin: as a damaged index says in one of its columns, or wherever the first token stands."""
        for column in ("num_tokens", "token_start"):
            try:
                data = self.store.files.read(index_file(self.record.shard))
                values = pq.read_table(pa.BufferReader(data), columns=[column]).column(column).to_numpy()
            except (KdError, OSError, ValueError, pa.ArrowException):
                continue
            if column == "num_tokens":
                yield values.astype(np.int64)
            else:
                yield np.diff(np.append(values.astype(np.int64), self.record.tokens))
        if len(ids):
            starts = np.flatnonzero(ids == ids[0])
            yield np.diff(np.append(starts, len(ids)))

    def _runs_of_texts(self) -> Iterator[Inputs]:
        """Rows of the texts that stand one after another and fit the shard; rows that others hold left out."""
        if self.inputs is None:
            return
        known = match_keys(self._keys_of_others(), self.inputs.keys) >= 0
        left = np.flatnonzero(~known)
        if len(left) < self.record.rows:
            return
        offsets = offsets_of(self.inputs.token_ids.lengths[left])
        sums = offsets[self.record.rows :] - offsets[: -self.record.rows]
        for start in np.flatnonzero(sums == self.record.tokens)[:MAX_WINDOWS].tolist():
            chosen = left[start : start + self.record.rows]
            yield Inputs(self.inputs.token_ids.take(chosen), self.inputs.segment_ids.take(chosen))

    def _keys_of_others(self) -> Keys:
        keys = [np.empty((0, 2), dtype=np.uint64)]
        for record in self.others:
            with contextlib.suppress(KdError):
                keys.append(read_index(self.store.files, record)[0])
        return np.concatenate(keys)

    # --- writing ---------------------------------------------------------------------------------------------------

    def _write(self, keys: Keys, rows: Inputs) -> None:
        shard, files = self.record.shard, self.store.files
        for spec, ragged in ((self.ids_spec, rows.token_ids), (self.segments_spec, rows.segment_ids)):
            if spec not in self.damaged:
                continue
            file = self.files[spec]
            parts = shard_parts(self.store.layout, spec, ragged.values)
            if hash_parts(parts) == (file.bytes, file.xxh3_128, file.head):
                files.write(file.file, parts)
                self.outcome.restore(shard, str(spec.signal), file.file, "every row has its row key again")
            else:
                self.outcome.lose(file.file, "its rows are known, but other software wrote the file: restore a copy")
        if self.index is None:
            data, index = encode_index(keys, rows.token_ids.lengths, pairs=bool(self.record.pairs))
            if index == self.record.index:
                files.write(index_file(shard), [data])
                self.outcome.restore(shard, "index", index_file(shard), "its content has the recorded hash again")
            else:
                self.outcome.lose(
                    index_file(shard),
                    f"its content is known, but pyarrow {pa.__version__} writes it otherwise than the version that "
                    "made it: repair with that one, or restore a copy",
                )


def _other_segments(ids: Ids, segments: Ids) -> Iterator[tuple[Ids, Ids]]:
    """Segments that a row could have: two parts divided anywhere, or as they are with one bit turned."""
    for start in range(len(ids), 0, -1):
        yield ids, (np.arange(len(ids)) >= start).astype(np.uint8)
    for row in _one_bit_off(segments):
        yield ids, row


def _one_bit_off(row: Ids) -> Iterator[Ids]:
    for place in range(len(row)):
        for bit in range(8 * row.dtype.itemsize):
            changed = row.copy()
            changed[place] ^= row.dtype.type(1 << bit)
            yield changed


def _after_first_end(rows: Ragged) -> Ragged:
    """Segment 1 behind the first token that ends its row too, as in `[CLS] a [SEP] b [SEP]`."""
    segments: Sequence[Ids] = [(np.arange(len(row)) > int(np.argmax(row == row[-1]))).astype(np.uint8) for row in rows]
    return Ragged.from_rows(segments, np.uint8)
