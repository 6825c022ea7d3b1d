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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import RefusedError, VerificationError
from ..ragged import IntArray
from .files import StoreFiles
from .index import RowIndex
from .keys import Keys
from .layout import GROUP_FILE, StoreLayout
from .mapping import SUPPORTED, ShardMap
from .records import HEAD_BYTES, Catalogue, FileRecord
from .shard import decode_index, is_contiguous
from .signal import ArraySpec, Signal

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
    try:
        path = files.readable(file.file)
        with open(path, "rb", buffering=0) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            head = stream.read(HEAD_BYTES)
    except FileNotFoundError:
        what = "is missing"
    else:
        if size != file.bytes:
            what = f"has {size} bytes, its record says {file.bytes}"
        elif xxhash.xxh3_128_hexdigest(head) != file.head:
            what = "does not begin with the recorded bytes: another file stands in its place, or it is damaged"
        else:
            return path
    raise VerificationError(
        f"{file.spec.signal}, shard {file.shard}: {file.file} {what}",
        fix=f"see all damage with: kd store verify {files.url}",
    )


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
        array = zarr.open_array(f"{files.root}/{spec.path}", mode="r", zarr_format=3)
        values = np.asarray(array[file.shard * capacity : file.shard * capacity + entries])
    except Exception as error:  # whatever a codec raises on bytes that are not its own
        raise VerificationError(
            f"{spec.signal}, shard {file.shard}: {file.file} cannot be read through zarr: {error}",
            fix=f"see all damage with: kd store verify {files.url}",
        ) from error
    # Zarr reads an absent chunk as fill values without a word, and no stored entry is one.
    absent = np.isnan(values) if values.dtype.kind == "f" else values == np.iinfo(values.dtype).max
    if values.shape != (entries, *spec.shape) or values.dtype != spec.dtype or absent.any():
        raise VerificationError(f"{spec.signal}, shard {file.shard}: {file.file} lacks some of its {entries} entries")
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
        self.present = catalogue.present(spec)
        self.complete = bool(self.present.all())
        self.map = self._mapped(catalogue.num_shards) if SUPPORTED else None
        self._cache: OrderedDict[int, Array] = OrderedDict()
        self._lock = threading.Lock()

    def _mapped(self, num_shards: int) -> ShardMap | None:
        paths = {}
        for shard, file in self._records.items():
            path = check_file(self._files, file)
            if not proves_contiguous(path, self._layout, file, self._entries[shard]):
                return None
            paths[shard] = path
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


class StoreReader:
    """Gathers batches of rows. A snapshot: sees what was committed when it was made.

    Safe to use from several threads, and to hand to other processes (it opens the store again there).
    """

    def __init__(self, store: TeacherStore) -> None:
        self._store = store
        self.files, self.layout = store.files, store.layout
        self.catalogue: Catalogue = store.catalogue()
        self.index = RowIndex(self.files, self.layout, self.catalogue.allocations)
        self._arrays: dict[str, _Array] = {}
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return StoreReader, (self._store,)

    def spec(self, signal: Signal | str) -> ArraySpec:
        """How a signal is stored; RefusedError when no shard holds it."""
        return self._array(signal).spec

    def lengths(self, rows: npt.ArrayLike) -> IntArray:
        """int64 [B] number of tokens of each row."""
        return self.index.locate(_row_numbers(rows))[2]

    def row_keys(self, rows: npt.ArrayLike) -> Keys:
        """[B, 2] the row keys, as `keys.row_keys` makes them."""
        rows_B = _row_numbers(rows)
        self.index.locate(rows_B)
        return self.index.row_keys(rows_B)

    def has(self, signal: Signal | str, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """[B] whether the signal is captured for each row."""
        rows_B = _row_numbers(rows)
        shards, _, _ = self.index.locate(rows_B)
        signal = Signal.parse(signal) if isinstance(signal, str) else signal
        spec = self.catalogue.specs.get(signal.path)
        return np.zeros(len(rows_B), dtype=bool) if spec is None else self.catalogue.present(spec)[shards]

    def gather(self, signal: Signal | str, rows: npt.ArrayLike, *, out: Array | None = None) -> Array:
        """[B, ...] one entry per row of an example-axis signal, in the stored dtype; a copy.

        Args:
            out: memory to use, as in `gather_tokens`.

        Raises:
            RefusedError: a row that the store does not have, or whose shard was not captured for this signal.
        """
        array = self._array(signal, "example")
        rows_B = _row_numbers(rows)
        shards, _, _ = self.index.locate(rows_B)
        self._require(array, shards)
        slots = rows_B - shards * self.layout.rows_per_shard
        values = _memory(out, (len(rows_B), *array.spec.shape), array.spec.dtype)
        if array.map is not None:
            np.take(array.map.values, shards * array.map.stride + slots, axis=0, out=values, mode="clip")
        else:
            for shard in np.unique(shards).tolist():
                mine = shards == shard
                values[mine] = array.shard(shard)[slots[mine]]
        return values

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
            out: memory to use instead of allocating: a contiguous array of the stored dtype with at least as many
                numbers as the result, whatever its shape. The result is its beginning.

        Returns:
            (values [B, T, ...] in the stored dtype, lengths int64 [B]); T is the longest of the rows.

        Raises:
            RefusedError: as `gather`.
        """
        array = self._array(signal, "token")
        rows_B = _row_numbers(rows)
        shards, starts, lengths = self.index.locate(rows_B)
        self._require(array, shards)
        if max_tokens is not None:
            lengths = np.minimum(lengths, max_tokens)
        width = int(lengths.max()) if len(lengths) else 0
        values = _memory(out, (len(rows_B), width, *array.spec.shape), array.spec.dtype)
        columns = np.arange(width)
        padding = columns >= lengths[:, None]
        if array.map is not None:
            positions = (shards * array.map.stride + starts)[:, None] + columns
            np.putmask(positions, padding, len(array.map.values) - 1)
            np.take(array.map.values, positions, axis=0, out=values, mode="clip")
            if pad_value:
                values[padding] = pad_value
        else:
            values[padding] = pad_value
            for shard in np.unique(shards).tolist():
                for row in np.flatnonzero(shards == shard).tolist():
                    start, length = int(starts[row]), int(lengths[row])
                    values[row, :length] = array.shard(shard)[start : start + length]
        return values, lengths

    def _array(self, signal: Signal | str, axis: str | None = None) -> _Array:
        array = self._arrays.get(str(signal))
        if array is None:
            signal = Signal.parse(signal) if isinstance(signal, str) else signal
            spec = self.catalogue.specs.get(signal.path)
            if spec is None:
                held = sorted(str(spec.signal) for spec in self.catalogue.specs.values())
                raise RefusedError(
                    f"store {self.files.url} holds no {signal}",
                    details=[f"captured: {', '.join(held) or 'nothing'}"],
                    fix=f"run kd cache-teacher with --signals {signal}",
                )
            with self._opening:
                array = self._arrays.get(str(signal)) or _Array(self, spec)
                self._arrays[str(signal)] = array
        if axis is not None and array.spec.axis != axis:
            method = "gather_tokens" if array.spec.axis == "token" else "gather"
            raise RefusedError(f"{signal} has one entry per {array.spec.axis}", fix=f"use {method}")
        return array

    def _require(self, array: _Array, shards: IntArray) -> None:
        if array.complete:
            return
        present = array.present[shards]
        if not present.all():
            missing = np.unique(shards[~present]).tolist()
            raise RefusedError(
                f"{array.spec.signal} was not captured for {int((~present).sum())} of {len(shards)} rows "
                f"(shard{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:10]))})",
                fix=f"run kd cache-teacher with --signals {array.spec.signal}: it captures what is missing",
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
