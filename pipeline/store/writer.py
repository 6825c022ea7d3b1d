"""Writing one shard: buffers in memory, refused when a value is bad, committed all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError, VerificationError
from ..ragged import IntArray, offsets_of, ranges
from .codec import LIMITS, encode
from .files import Buffer, Staged
from .layout import StoreLayout, fill_value
from .records import FileRecord, Record, hash_parts
from .shard import encode_index
from .signal import ArraySpec, Signal

if TYPE_CHECKING:
    from .store import TeacherStore


def shard_parts(layout: StoreLayout, spec: ArraySpec, values: npt.NDArray[Any]) -> list[Buffer]:
    """A shard file as the buffers it is made of, without copying `values` [entries, ...]."""
    chunk = layout.chunk_length(spec)
    padding = layout.padded_length(spec, len(values)) - len(values)
    return [
        np.ascontiguousarray(values, dtype=np.dtype(spec.dtype).newbyteorder("<")).reshape(-1).view(np.uint8),
        np.full((padding, *spec.shape), fill_value(spec)).reshape(-1).view(np.uint8),
        encode_index(layout.num_chunks(spec), -(-len(values) // chunk), chunk * spec.entry_bytes),
    ]


def commit_files(store: TeacherStore, allocation: Record, staged: Mapping[FileRecord, Staged]) -> Record | None:
    """Publish staged files of one shard and record them; those that a record names by now are left out.

    Returns:
        The record, or None when all of them are left out.
    """
    with store.files.lock():
        records = store.shard_records(allocation.shard)
        if allocation not in records:
            raise VerificationError(f"shard {allocation.shard} of {store.url} lost its allocation while it was written")
        there = {file.spec.path for record in records for file in record.files}
        kept = tuple(file for file in staged if file.spec.path not in there)
        if not kept:
            return None
        for file in kept:
            staged[file].publish()
        record = Record(
            allocation.store,
            allocation.shard,
            allocation.rows,
            allocation.tokens,
            kept,
            allocation=allocation.digest,
            pairs=allocation.pairs,
        )
        store.files.create(record.file, record.encode())
    return record


class ShardWriter:
    """Collects the signals of one shard and commits them together. Made by `TeacherStore.writer`.

    Rows may come in any order and any batches, each once; `commit` refuses while one is missing. What is put is kept in
    every encoding that the writer was made for. `put_*` and `commit` may run in different threads, one after the other.
    """

    def __init__(self, store: TeacherStore, allocation: Record, lengths: IntArray, specs: Sequence[ArraySpec]) -> None:
        self.shard = allocation.shard
        self._store, self._allocation = store, allocation
        self._lengths = lengths
        self._specs: dict[Signal, list[ArraySpec]] = {}
        for spec in specs:
            self._specs.setdefault(spec.signal, []).append(spec)
        self._buffers = {
            spec.path: store.buffers.take((allocation.entries(spec), *spec.shape), spec.dtype) for spec in specs
        }
        self._written = {signal: np.zeros(allocation.rows, dtype=bool) for signal in self._specs}

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self._allocation.rows

    @property
    def num_bytes(self) -> int:
        """Memory held by the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def put_rows(self, signal: Signal | str, slots: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """Take one entry per row of an example-axis signal.

        Args:
            slots: [B] places of the rows inside the shard, distinct.
            values: [B, ...] floating point, before any encoding.

        Raises:
            RefusedError: a value that is not finite or that an encoding cannot hold, naming signal and row.
        """
        specs, slots_B = self._check(signal, slots, "example")
        self._put(specs, values, slots_B, np.ones(len(slots_B), dtype=np.int64), slots_B)

    def put_tokens(self, signal: Signal | str, slots: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """Take the entries of all tokens of some rows of a token-axis signal.

        Args:
            slots: [B] places of the rows inside the shard, distinct.
            values: [total, ...] the rows' tokens, row after row in the order of `slots`, without padding.

        Raises:
            RefusedError: as `put_rows`.
        """
        specs, slots_B = self._check(signal, slots, "token")
        self._put_ragged(specs, values, slots_B, self._lengths)

    def put_pairs(self, signal: Signal | str, slots: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """Take the entries of all pairs of tokens of some rows of a pair-axis signal.

        Args:
            slots: [B] places of the rows inside the shard, distinct.
            values: [total, ...] n * n entries of each row of n tokens, first by the token that attends, row after row
                in the order of `slots`.

        Raises:
            RefusedError: as `put_rows`.
        """
        specs, slots_B = self._check(signal, slots, "pair")
        self._put_ragged(specs, values, slots_B, self._lengths**2)

    def put(self, signal: Signal | str, slots: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """The one of `put_rows`, `put_tokens` and `put_pairs` that fits the signal."""
        axis = (Signal.parse(signal) if isinstance(signal, str) else signal).kind.axis
        {"example": self.put_rows, "token": self.put_tokens, "pair": self.put_pairs}[axis](signal, slots, values)

    def _put_ragged(
        self, specs: list[ArraySpec], values: npt.NDArray[Any], slots_B: IntArray, entries: IntArray
    ) -> None:
        """Entries of rows that have `entries` [rows of the shard] each."""
        starts = offsets_of(entries)[:-1]
        self._put(specs, values, slots_B, entries[slots_B], ranges(starts[slots_B], entries[slots_B]))

    def _put(
        self, specs: list[ArraySpec], values: npt.NDArray[Any], slots: IntArray, lengths: IntArray, places: IntArray
    ) -> None:
        signal = specs[0].signal
        shape = (len(places), *next((spec.shape for spec in specs if not spec.part), values.shape[1:]))
        if values.shape != shape:
            raise RefusedError(
                f"{signal}: values of these {len(slots)} rows have shape {[*shape]}, got {list(values.shape)}"
            )
        encodings = dict.fromkeys(spec.encoding for spec in specs)
        for encoding in encodings:
            self._refuse_bad_values(signal, encoding, values, slots, lengths)
        for encoding in encodings:
            parts = encode(encoding, values)
            for spec in specs:
                if spec.encoding == encoding:
                    self._buffers[spec.path][places] = parts[spec.part]
        self._written[signal][slots] = True

    def _check(self, signal: Signal | str, slots: npt.ArrayLike, axis: str) -> tuple[list[ArraySpec], IntArray]:
        signal = Signal.parse(signal) if isinstance(signal, str) else signal
        specs = self._specs.get(signal)
        if specs is None:
            raise RefusedError(
                f"this writer does not hold {signal}", details=[f"it holds: {', '.join(map(str, self._specs))}"]
            )
        if signal.kind.axis != axis:
            method = {"example": "put_rows", "token": "put_tokens", "pair": "put_pairs"}[signal.kind.axis]
            raise RefusedError(f"{signal} has one entry per {signal.kind.axis}", fix=f"use {method}")
        slots_B = np.asarray(slots, dtype=np.int64)
        if slots_B.ndim != 1 or (slots_B.size and not 0 <= slots_B.min() <= slots_B.max() < self._allocation.rows):
            raise RefusedError(f"shard {self.shard} has row slots 0 to {self._allocation.rows - 1}, got {slots!r}")
        again = self._written[signal][slots_B]
        if again.any() or len(np.unique(slots_B)) != len(slots_B):
            twice = slots_B[again] if again.any() else slots_B
            raise RefusedError(f"{signal}: row {self._row(int(twice[0]))} was written twice")
        return specs, slots_B

    def _row(self, slot: int) -> int:
        return self.shard * self._store.layout.rows_per_shard + slot

    def _refuse_bad_values(
        self, signal: Signal, encoding: str, values: npt.NDArray[Any], slots: IntArray, lengths: IntArray
    ) -> None:
        if values.dtype.kind != "f":
            raise RefusedError(f"{signal}: values must be floating point, got {values.dtype}")
        if not values.size:
            return
        limit = LIMITS[encoding]
        if _all_below(values, limit):
            return
        flat = values.reshape(len(values), -1).astype(np.float64)
        for bad, what in (
            (~np.isfinite(flat), "is not finite"),
            (np.abs(flat) >= limit, f"does not fit {encoding}"),
        ):
            entries = np.flatnonzero(bad.any(axis=1))
            if not len(entries):
                continue
            entry = int(entries[0])
            position = int(np.searchsorted(np.cumsum(lengths), entry, side="right"))
            value = float(flat[entry][bad[entry]][0])
            inside, slot = entry - int(lengths[:position].sum()), int(slots[position])
            attending, attended = divmod(inside, int(self._lengths[slot]))
            place = {"token": f", token {inside}", "pair": f", tokens {attending} and {attended}"}.get(
                signal.kind.axis, ""
            )
            raise RefusedError(
                f"{signal} of row {self._row(slot)} (shard {self.shard}, slot {slot}{place}) {what}: {value}",
                details=[f"{int(bad.sum())} such values of {flat.size} in this batch"],
                fix="capture this signal as float32"
                if np.isfinite(value)
                else "the teacher is broken for this input: check its weights and compute dtype (try --dtype float32)",
            )

    def commit(self) -> Record | None:
        """Write the shard files and their record; from then on the shard holds these signals, for good.

        Returns:
            The record, or None when another process had committed all of them before: its files are kept.

        Raises:
            RefusedError: a row is missing.
        """
        files = self._store.files
        if not (todo := self._uncommitted()):
            return None
        with contextlib.ExitStack() as stack:
            staged = {}
            for file, parts in self.encoded(todo):
                staged[file] = stack.enter_context(files.stage(file.file, parts))
                del parts
            record = commit_files(self._store, self._allocation, staged)
        self._store.buffers.give(self._buffers.values())
        self._buffers = {}
        return record

    def encoded(self, specs: Iterable[ArraySpec] | None = None) -> Iterator[tuple[FileRecord, list[Buffer]]]:
        """The shard files as they are to be written: record and parts of each, sorted by path.

        Args:
            specs: those wanted; None is all.

        Raises:
            RefusedError: a row is missing.
        """
        for signal, written in self._written.items():
            if not written.all():
                slot = int(np.argmin(written))
                raise RefusedError(
                    f"{signal}: {int((~written).sum())} rows of shard {self.shard} were never written, "
                    f"the first is row {self._row(slot)}"
                )
        # Sorted, so that two writers of the same files never hold one another's next.
        wanted = [spec for specs in self._specs.values() for spec in specs] if specs is None else specs
        for spec in sorted(wanted, key=lambda spec: spec.path):
            parts = shard_parts(self._store.layout, spec, self._buffers[spec.path])
            yield FileRecord(spec, self.shard, *hash_parts(parts)), parts

    def _uncommitted(self) -> list[ArraySpec]:
        records = self._store.shard_records(self.shard)
        if self._allocation not in records:
            raise VerificationError(f"shard {self.shard} of {self._store.url} lost its allocation while it was written")
        done = {file.spec.path for record in records for file in record.files}
        return [spec for specs in self._specs.values() for spec in specs if spec.path not in done]


def _all_below(values: npt.NDArray[Any], limit: float) -> bool:
    """Whether all magnitudes are below `limit` > 65504, which no infinity and no NaN is."""
    if values.dtype == np.float16:
        # numpy compares float16 one by one; as integers, infinity and everything above it are 0x7c00 and more.
        return bool((values.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    # NaN makes both extremes NaN, and every comparison with it false.
    return -limit < float(values.min()) and float(values.max()) < limit
