"""Numbers of many rows, kept in temporary files instead of memory. The files have no names and go with the process."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..disk import disk_full_explained
from ..ragged import IntArray

Array = npt.NDArray[Any]
IN_MEMORY_BYTES = 1 << 22
"""Below this size, a column is an ordinary array."""
BLOCK_ROWS = 1 << 16
"""Rows that are in memory at once where all of them are gone through."""


def blocks(num_rows: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """Slices that cover rows 0 to `num_rows`, one block after another."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def passed(array: Array, size: int = BLOCK_ROWS) -> Iterator[tuple[slice, Array]]:
    """The blocks of an array, one after another, each with its slice; what was passed is not kept in memory."""
    for part in blocks(len(array), size):
        yield part, array[part]
        release(array)


def column(parts: Iterable[Array], dtype: npt.DTypeLike, shape: tuple[int, ...] = ()) -> Array:
    """All parts [n, *shape], one after another, as `Appended.all` gives them."""
    file = Appended(dtype)
    for part in parts:
        file.append(part)
    return file.all(shape)


def release(array: Array) -> None:
    """Take the pages of a mapped `column` out of this process; they come back when they are touched."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class Appended:
    """Numbers in a temporary file (in TMPDIR) that grows at its end, and of which any part is read into memory."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="kd-", buffering=0)  # noqa: SIM115 - goes with this object
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, values: Array) -> None:
        """Add entries."""
        block = np.ascontiguousarray(values, dtype=self._dtype)
        # A file without a name: the error would be laid at the disk of whatever is being made.
        with disk_full_explained(f"temporary files, {tempfile.gettempdir()} (TMPDIR)"):
            self._file.seek(0, 2)
            _write(self._file, block)
        self._size += block.nbytes // self._dtype.itemsize

    def all(self, shape: tuple[int, ...] = ()) -> Array:
        """[n, *shape] everything, as one array that cannot be written to.

        From `IN_MEMORY_BYTES` on it is mapped: its pages are read where they are touched, and the system takes them
        back when memory is short. `release` gives them back at once.
        """
        if self._size * self._dtype.itemsize < IN_MEMORY_BYTES:
            values = self.read(0, self._size)
            values.flags.writeable = False
        else:
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            values = np.frombuffer(mapped, dtype=self._dtype)
        return values.reshape(-1, *shape)

    def read(self, start: int, stop: int) -> Array:
        """Entries `start` to `stop`, one dimension."""
        values = np.empty(stop - start, dtype=self._dtype)
        self._file.seek(start * self._dtype.itemsize)
        left = memoryview(values.view(np.uint8).data)
        while left.nbytes:
            count = self._file.readinto(left)
            if not count:
                raise OSError("a temporary file of kd was cut short")
            left = left[count:]
        return values


class Partitions:
    """Records, each in one of `count` parts; a part is read back in the order in which its records were added."""

    def __init__(self, dtype: npt.DTypeLike, count: int) -> None:
        self.count = count
        self._records = Appended(dtype)
        self._bounds: list[IntArray] = []

    def add(self, parts: IntArray, records: Array) -> None:
        """Add records [n], each to its part [n]."""
        order = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=self.count))
        self._bounds.append(np.concatenate([[0], ends]) + len(self._records))
        self._records.append(records[order])

    def read(self, part: int) -> Array:
        """The records of a part."""
        found = [self._records.read(bounds[part], bounds[part + 1]) for bounds in self._bounds]
        return np.concatenate([self._records.read(0, 0), *found])


def _write(file: Any, block: Array) -> None:
    left = memoryview(block.reshape(-1).view(np.uint8).data)
    while left.nbytes:
        left = left[file.write(left) :]
