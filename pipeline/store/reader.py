"""Reading: batches of rows, gathered from memory-mapped shard files without work per row.

A shard file is mapped only after its size, its head and its own index have shown that it is the recorded file and
that its entries stand one after another; anything else (compressed, or written by other software) goes through
zarr, whole shards at a time into a bounded cache.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import KdError, RefusedError, VerificationError
from ..ragged import IntArray
from .codec import decode, decoded_dtype
from .files import Blob, StoreFiles
from .index import RowIndex
from .keys import Keys
from .layout import GROUP_FILE, StoreLayout, fill_value
from .mapping import SUPPORTED, ShardMap
from .records import HEAD_BYTES, Catalogue, FileRecord
from .scratch import blocks
from .shard import decode_index, is_contiguous
from .signal import RAW, ArraySpec, Signal

if TYPE_CHECKING:
    from .store import TeacherStore

Array = npt.NDArray[Any]
HARMLESS_CODECS = ("blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd")
"""Those of the Zarr v3 specification; others could be anything that is installed."""
CACHE_BYTES = 1 << 30
"""Whole shards kept in memory by readers of arrays that cannot be mapped."""


def check_file(files: StoreFiles, file: FileRecord) -> str:
    """Path of a shard file whose size and head are as recorded.

    Raises:
        VerificationError: absent, of another size, or beginning with other bytes than recorded.
    """
    see_all = f"see all damage with: kd store verify {files.url}"
    try:
        path = files.fetch(Blob(file.file, file.bytes, file.xxh3_128))
        with open(path, "rb", buffering=0) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            head = stream.read(HEAD_BYTES)
    except FileNotFoundError:
        what = "is missing"
    except KdError as error:
        raise type(error)(
            f"{file.spec.label}, shard {file.shard}: {error.what}", details=error.details, fix=error.fix or see_all
        ) from error
    else:
        if size != file.bytes:
            what = f"has {size} bytes, its record says {file.bytes}"
        elif xxhash.xxh3_128_hexdigest(head) != file.head:
            what = "does not begin with the recorded bytes: another file stands in its place, or it is damaged"
        else:
            return path
    raise VerificationError(f"{file.spec.label}, shard {file.shard}: {file.file} {what}", fix=see_all)


def proves_contiguous(path: str, layout: StoreLayout, file: FileRecord, entries: int) -> bool:
    """Whether the index at the end of a shard file shows its entries uncompressed and in order from the start."""
    spec, num_chunks = file.spec, layout.num_chunks(file.spec)
    if file.bytes != layout.file_bytes(spec, entries):
        return False
    with open(path, "rb", buffering=0) as stream:
        stream.seek(file.bytes - 16 * num_chunks - 4)
        encoded = stream.read()
    try:
        index = decode_index(encoded, num_chunks)
    except ValueError:
        return False
    chunk = layout.chunk_length(spec)
    return is_contiguous(index, entries=entries, chunk_length=chunk, chunk_bytes=chunk * spec.entry_bytes)


def read_shard(files: StoreFiles, layout: StoreLayout, file: FileRecord, entries: int) -> Array:
    """All entries [entries, ...] of one shard of one array, in memory.

    Raises:
        VerificationError: not the recorded file, or some of its entries are absent.
    """
    path = check_file(files, file)
    if proves_contiguous(path, layout, file, entries):
        count = entries * math.prod(file.spec.shape)
        values = np.fromfile(path, dtype=np.dtype(file.spec.dtype).newbyteorder("<"), count=count)
        return values.reshape(entries, *file.spec.shape)
    return _read_through_zarr(files, layout, file, entries)


def _read_through_zarr(files: StoreFiles, layout: StoreLayout, file: FileRecord, entries: int) -> Array:
    import zarr

    spec, capacity = file.spec, layout.capacity(file.spec.axis)
    try:
        metadata = json.loads(files.read(f"{spec.path}/{GROUP_FILE}"))
        _require_harmless(metadata, spec, capacity)
        array = zarr.open_array(files.path(spec.path), mode="r", zarr_format=3)
        values = np.asarray(array[file.shard * capacity : file.shard * capacity + entries])
    except Exception as error:  # whatever a codec raises on bytes that are not its own
        raise VerificationError(
            f"{spec.label}, shard {file.shard}: {file.file} cannot be read through zarr: {error}",
            fix=f"see all damage with: kd store verify {files.url}",
        ) from error
    # Zarr reads an absent chunk as fill values without a word, and no stored entry is one.
    absent = np.isnan(values) if values.dtype.kind == "f" else values == fill_value(spec)
    if values.shape != (entries, *spec.shape) or values.dtype != spec.dtype or absent.any():
        raise VerificationError(f"{spec.label}, shard {file.shard}: {file.file} lacks some of its {entries} entries")
    return values


def _require_harmless(metadata: Any, spec: ArraySpec, capacity: int) -> None:
    """ValueError unless zarr.json describes this array, in chunks no larger than a shard, with known codecs."""
    chunk_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    found = {"shape": metadata["shape"][1:], "dtype": metadata["data_type"], "chunk": chunk_shape[1:]}
    if found != {"shape": [*spec.shape], "dtype": spec.dtype, "chunk": [*spec.shape]} or chunk_shape[0] > capacity:
        raise ValueError(f"zarr.json describes {metadata['data_type']} in chunks of {chunk_shape}")
    codecs = [*metadata["codecs"]]
    for codec in codecs:
        if codec["name"] not in HARMLESS_CODECS:
            raise ValueError(f"zarr.json asks for the codec {codec['name']!r}")
        codecs += codec.get("configuration", {}).get("codecs", [])


class _Array:
    """One array of a store as a reader sees it: mapped, or shard by shard through zarr."""

    def __init__(self, reader: StoreReader, spec: ArraySpec) -> None:
        files, layout, catalogue = reader.files, reader.layout, reader.catalogue
        self.spec = spec
        self._files, self._layout = files, layout
        self._records = catalogue.files[spec.path]
        self._entries = {shard: catalogue.allocations[shard].entries(spec) for shard in self._records}
        self.mapped, self.all_mapped = np.zeros(catalogue.num_shards, dtype=bool), False
        self.map = self._mapped(catalogue.num_shards, reader.shards) if SUPPORTED else None
        self._cache: OrderedDict[int, Array] = OrderedDict()
        self._lock = threading.Lock()

    def _map_of(self, shards: IntArray) -> ShardMap | None:
        """The map when all of these shards are in it."""
        return self.map if self.all_mapped or self.mapped[shards].all() else None

    def _mapped(self, num_shards: int, wanted: Collection[int] | None) -> ShardMap | None:
        paths = {}
        records = {shard: file for shard, file in self._records.items() if wanted is None or shard in wanted}
        blobs = [Blob(file.file, file.bytes, file.xxh3_128) for file in records.values()]
        if not self._files.hold(blobs):
            return None
        self._files.fetch_all(blobs)
        for shard, file in records.items():
            path = check_file(self._files, file)
            if not proves_contiguous(path, self._layout, file, self._entries[shard]):
                return None
            paths[shard] = path
        self.mapped[[*paths]] = True
        self.all_mapped = bool(self.mapped.all())
        try:
            return ShardMap(
                paths,
                num_shards=num_shards,
                capacity=self._layout.capacity(self.spec.axis),
                shape=self.spec.shape,
                dtype=self.spec.dtype,
                data_bytes=lambda shard: self._entries[shard] * self.spec.entry_bytes,
            )
        except OSError:
            return None

    def shard(self, shard: int) -> Array:
        """[entries, ...] of one shard, through the cache."""
        with self._lock:
            values = self._cache.pop(shard, None)
            if values is None:
                values = read_shard(self._files, self._layout, self._records[shard], self._entries[shard])
            self._cache[shard] = values
            while len(self._cache) > 1 and sum(cached.nbytes for cached in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return values

    def take(self, shards: IntArray, slots: IntArray, out: Array | None = None) -> Array:
        """[B, ...] entries of the example axis, as stored."""
        values = np.empty((len(shards), *self.spec.shape), self.spec.dtype) if out is None else out
        mapped = self._map_of(shards)
        if mapped is not None:
            np.take(mapped.values, shards * mapped.stride + slots, axis=0, out=values, mode="clip")
        else:
            for shard in np.unique(shards).tolist():
                mine = shards == shard
                values[mine] = self.shard(shard)[slots[mine]]
        return values

    def take_tokens(self, shards: IntArray, starts: IntArray, lengths: IntArray, out: Array | None = None) -> Array:
        """[B, T, ...] entries of the token axis, as stored; zeros after a row's end."""
        width = int(lengths.max()) if len(lengths) else 0
        values = np.empty((len(shards), width, *self.spec.shape), self.spec.dtype) if out is None else out
        mapped = self._map_of(shards)
        if mapped is not None:
            columns = np.arange(width)
            positions = (shards * mapped.stride + starts)[:, None] + columns
            np.putmask(positions, columns >= lengths[:, None], len(mapped.values) - 1)
            np.take(mapped.values, positions, axis=0, out=values, mode="clip")
        else:
            values[...] = 0
            for shard in np.unique(shards).tolist():
                for row in np.flatnonzero(shards == shard).tolist():
                    start, length = int(starts[row]), int(lengths[row])
                    values[row, :length] = self.shard(shard)[start : start + length]
        return values

    def take_pairs(self, shards: IntArray, starts: IntArray, lengths: IntArray, out: Array | None = None) -> Array:
        """[B, T, T, ...] entries of the pair axis, as stored; zeros beyond a row's tokens.

        Args:
            starts: first pair of each row inside its shard.
            lengths: tokens of each row.
        """
        width = int(lengths.max()) if len(lengths) else 0
        values = np.empty((len(shards), width, width, *self.spec.shape), self.spec.dtype) if out is None else out
        mapped = self._map_of(shards)
        if mapped is not None:
            columns = np.arange(width)
            inside_BT = columns < lengths[:, None]
            positions_BTT = (shards * mapped.stride + starts)[:, None, None] + (
                columns[:, None] * lengths[:, None, None] + columns
            )
            np.putmask(positions_BTT, ~(inside_BT[:, :, None] & inside_BT[:, None, :]), len(mapped.values) - 1)
            np.take(mapped.values, positions_BTT, axis=0, out=values, mode="clip")
        else:
            values[...] = 0
            for shard in np.unique(shards).tolist():
                for row in np.flatnonzero(shards == shard).tolist():
                    start, length = int(starts[row]), int(lengths[row])
                    block = self.shard(shard)[start : start + length * length]
                    values[row, :length, :length] = block.reshape(length, length, *self.spec.shape)
        return values


class _Stored:
    """A signal as a reader gives it: each shard from the most exact of the encodings that it has there.

    Every number of a row is then the same in any batch. All come in one dtype, float32 unless all are float16.
    """

    def __init__(self, signal: Signal, encodings: Sequence[Sequence[_Array]], choice: npt.NDArray[np.int8]) -> None:
        self.encodings, self.choice = encodings, choice
        self.complete = bool((choice >= 0).all())
        # Of what was asked for, where that is derived from another signal.
        first = encodings[0][0].spec
        self.spec = replace(first, signal=replace(first.signal, name=signal.name))
        dtypes = {_dtype(arrays[0].spec) for arrays in encodings}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"

    def fill(self, out: Array, shards: IntArray, take: Callable[[_Array, Any, Array | None], Array]) -> Array:
        """Put the numbers of some rows into `out`.

        Args:
            take: entries as stored: of an array, of the rows a mask or slice selects, perhaps into given memory.
        """
        used = self.choice[shards] if len(self.encodings) > 1 else None
        for number, arrays in enumerate(self.encodings):
            mine: Any = slice(None) if used is None else used == number
            if used is not None and not mine.any():
                continue
            spec = arrays[0].spec
            if used is None and len(arrays) == 1:
                take(arrays[0], mine, out)
                continue
            parts = {array.spec.part: take(array, mine, None) for array in arrays}
            if used is None:
                decode(spec.encoding, parts, out)
                continue
            values = decode(spec.encoding, parts)
            # Of tokens and pairs, these rows may all be shorter than the longest of the batch.
            if spec.axis != "example":
                padded = np.zeros((len(values), *out.shape[1:]), out.dtype)
                width = values.shape[1]
                padded[(slice(None), slice(width), slice(width))[: 2 if spec.axis == "token" else 3]] = values
                values = padded
            out[mine] = values
        return out


def _dtype(spec: ArraySpec) -> str:
    return spec.dtype if spec.encoding == RAW else decoded_dtype(spec.encoding)


class StoreReader:
    """Gathers batches of rows. A snapshot: sees what was committed when it was made.

    Safe to use from several threads, and to hand to other processes (it opens the store again there).

    A signal may be asked for in one encoding (`hidden.tok@6:int8`); else each shard gives its most exact one.

    Args:
        store: to read.
        encodings: of signals that are asked for without one.
        shards: that are read fast; the others, if any, one by one. None is all.
    """

    def __init__(
        self,
        store: TeacherStore,
        encodings: Mapping[Signal, str] | None = None,
        shards: Collection[int] | None = None,
    ) -> None:
        self._store, self._encodings = store, dict(encodings or {})
        self.shards = None if shards is None else frozenset(shards)
        self.files, self.layout = store.files, store.layout
        self.catalogue: Catalogue = store.catalogue()
        self.index = RowIndex(self.files, self.layout, self.catalogue.allocations)
        self._arrays: dict[str, _Array] = {}
        self._stored: dict[str, _Stored] = {}
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return StoreReader, (self._store, self._encodings, self.shards)

    def spec(self, signal: Signal | str) -> ArraySpec:
        """How a signal is stored, in the most exact of its encodings; RefusedError when no shard holds it."""
        return self._open(signal).spec

    def lengths(self, rows: npt.ArrayLike) -> IntArray:
        """int64 [B] number of tokens of each row."""
        rows_B = _row_numbers(rows)
        lengths = np.empty(len(rows_B), dtype=np.int64)
        for part in blocks(len(rows_B)):
            lengths[part] = self.index.locate(rows_B[part])[2]
        return lengths

    def row_keys(self, rows: npt.ArrayLike) -> Keys:
        """[B, 2] the row keys, as `keys.row_keys` makes them."""
        rows_B = _row_numbers(rows)
        self.index.locate(rows_B)
        return self.index.row_keys(rows_B)

    def has(self, signal: Signal | str, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """[B] whether the signal is captured for each row."""
        rows_B = _row_numbers(rows)
        held = self.catalogue.choice(self._groups(self._asked(signal))) >= 0
        mask = np.empty(len(rows_B), dtype=bool)
        for part in blocks(len(rows_B)):
            mask[part] = held[self.index.locate(rows_B[part])[0]]
        return mask

    def gather(self, signal: Signal | str, rows: npt.ArrayLike, *, out: Array | None = None) -> Array:
        """[B, ...] one entry per row of an example-axis signal, in the stored dtype (int8: float32); a copy.

        `hidden.cls` of a layer whose tokens are stored is the first of them where it is not stored itself.

        Args:
            out: memory to use, as in `gather_tokens`.

        Raises:
            RefusedError: a row that the store does not have, or whose shard was not captured for this signal.
        """
        stored = self._open(signal, "example")
        rows_B = _row_numbers(rows)
        shards, starts, _ = self.index.locate(rows_B)
        self._require(stored, signal, shards)
        slots = rows_B - shards * self.layout.rows_per_shard
        values = _memory(out, (len(rows_B), *stored.spec.shape), stored.dtype)

        def take(array: _Array, mine: Any, out: Array | None) -> Array:
            if array.spec.axis == "example":
                return array.take(shards[mine], slots[mine], out)
            first = np.ones(len(shards[mine]), dtype=np.int64)
            return array.take_tokens(shards[mine], starts[mine], first, None if out is None else out[:, None])[:, 0]

        return stored.fill(values, shards, take)

    def gather_tokens(
        self,
        signal: Signal | str,
        rows: npt.ArrayLike,
        *,
        max_tokens: int | None = None,
        pad_value: float = 0,
        out: Array | None = None,
    ) -> tuple[Array, IntArray]:
        """Padded entries of all tokens of some rows of a token-axis signal, and the rows' lengths.

        Args:
            max_tokens: keep at most this many leading tokens of a row.
            pad_value: what follows the last token of a row.
            out: memory to use instead of allocating: a contiguous array of the result's dtype with at least as many
                numbers as the result, whatever its shape. The result is its beginning.

        Returns:
            (values [B, T, ...] in the stored dtype (int8: float32), lengths int64 [B]); T is the longest of the rows.

        Raises:
            RefusedError: as `gather`.
        """
        values, lengths = self._gather_ragged("token", signal, rows, max_tokens=max_tokens, out=out)
        if pad_value:
            values[np.arange(values.shape[1]) >= lengths[:, None]] = pad_value
        return values, lengths

    def gather_pairs(
        self, signal: Signal | str, rows: npt.ArrayLike, *, out: Array | None = None
    ) -> tuple[Array, IntArray]:
        """Padded entries of all pairs of tokens of some rows of a pair-axis signal, and the rows' lengths.

        Args:
            out: memory to use, as in `gather_tokens`.

        Returns:
            (values [B, T, T, ...], by the token that attends, then by the one attended to, in the stored dtype (int8:
            float32), zeros where one is none of the row's; lengths int64 [B]); T is the longest of the rows.

        Raises:
            RefusedError: as `gather`.
        """
        return self._gather_ragged("pair", signal, rows, out=out)

    def _gather_ragged(
        self,
        axis: str,
        signal: Signal | str,
        rows: npt.ArrayLike,
        *,
        max_tokens: int | None = None,
        out: Array | None = None,
    ) -> tuple[Array, IntArray]:
        stored = self._open(signal, axis)
        rows_B = _row_numbers(rows)
        shards, starts, lengths = self.index.locate(rows_B)
        self._require(stored, signal, shards)
        if max_tokens is not None:
            lengths = np.minimum(lengths, max_tokens)
        width = int(lengths.max()) if len(lengths) else 0
        sides, take = [width], _Array.take_tokens
        if axis == "pair":
            sides, take = [width, width], _Array.take_pairs
            starts = self.index.pair_starts(rows_B)
        values = _memory(out, (len(rows_B), *sides, *stored.spec.shape), stored.dtype)
        stored.fill(
            values, shards, lambda array, mine, out: take(array, shards[mine], starts[mine], lengths[mine], out)
        )
        return values, lengths

    def _asked(self, signal: Signal | str) -> Signal:
        signal = Signal.parse(signal) if isinstance(signal, str) else signal
        encoding = self._encodings.get(signal)
        return signal if encoding is None else replace(signal, encoding=encoding)

    def _open(self, signal: Signal | str, axis: str | None = None) -> _Stored:
        stored = self._stored.get(str(signal))
        if stored is None:
            asked = self._asked(signal)
            groups = self._groups(asked)
            choice = self.catalogue.choice(groups)
            # Encodings that no shard is read in are left closed.
            used = [number for number in range(len(groups)) if (choice == number).any()]
            if not used:
                held = sorted({spec.label for spec in self.catalogue.specs.values()})
                raise RefusedError(
                    f"store {self.files.url} holds no {asked}",
                    details=[f"captured: {', '.join(held) or 'nothing'}"],
                    fix=f"run kd cache-teacher with --signals {asked}",
                )
            with self._opening:
                encodings = [[self._array(spec) for spec in groups[number]] for number in used]
                renumbered = np.full(len(choice), -1, dtype=np.int8)
                for new, old in enumerate(used):
                    renumbered[choice == old] = new
                stored = self._stored[str(signal)] = _Stored(asked, encodings, renumbered)
        if axis is not None and stored.spec.axis != axis:
            method = {"example": "gather", "token": "gather_tokens", "pair": "gather_pairs"}[stored.spec.axis]
            raise RefusedError(f"{signal} has one entry per {stored.spec.axis}", fix=f"use {method}")
        return stored

    def _groups(self, asked: Signal) -> list[tuple[ArraySpec, ...]]:
        """The arrays that give a signal, by encoding; the nearest come first, those it is derived from last."""
        groups = [*self.catalogue.stored(asked)]
        if asked.name == "hidden.cls":
            groups += self.catalogue.stored(replace(asked, name="hidden.tok"))
        return groups

    def _array(self, spec: ArraySpec) -> _Array:
        if spec.path not in self._arrays:
            self._arrays[spec.path] = _Array(self, spec)
        return self._arrays[spec.path]

    def _require(self, stored: _Stored, signal: Signal | str, shards: IntArray) -> None:
        if stored.complete:
            return
        present = stored.choice[shards] >= 0
        if not present.all():
            missing = np.unique(shards[~present]).tolist()
            raise RefusedError(
                f"{self._asked(signal)} was not captured for {int((~present).sum())} of {len(shards)} rows "
                f"(shard{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:10]))})",
                fix=f"run kd cache-teacher with --signals {self._asked(signal)}: it captures what is missing",
            )


def _row_numbers(rows: npt.ArrayLike) -> IntArray:
    rows_B = np.asarray(rows)
    if rows_B.ndim != 1 or (rows_B.size and rows_B.dtype.kind not in "iu"):
        raise RefusedError(f"row numbers must be a list of integers, got {rows_B.dtype} {list(rows_B.shape)}")
    return rows_B.astype(np.int64, copy=False)


def _memory(out: Array | None, shape: tuple[int, ...], dtype: str) -> Array:
    if out is None:
        return np.empty(shape, dtype=dtype)
    size = math.prod(shape)
    if out.dtype != dtype or not out.flags.c_contiguous or out.size < size:
        raise RefusedError(
            f"out must be contiguous {dtype} with at least {size} numbers, got {out.dtype} of {out.size}"
        )
    return out.reshape(-1)[:size].reshape(shape)
