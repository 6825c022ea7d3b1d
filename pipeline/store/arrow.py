"""Numbers and bytes to Arrow and back without pandas, which pyarrow's own conversions import (40 MB, half a second)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_pools = threading.Lock()


@contextlib.contextmanager
def no_memory_kept() -> Iterator[None]:
    """Let Arrow take its memory from the C library meanwhile, and give back all of it.

    Its own allocator keeps 24 MiB of a process where 5 MiB were used at once, `release_unused` or not.
    """
    with _pools:
        before = pa.default_memory_pool()
        pa.set_memory_pool(pa.system_memory_pool())
        try:
            yield
        finally:
            pa.set_memory_pool(before)


def to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """A column of numbers [N] without nulls, of the same type; shares the memory where it lies in one piece."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def bytes_to_arrow(values: Sequence[bytes], dtype: pa.DataType) -> pa.Array:
    """A column of binary or string type [N] without nulls; less than 2 GiB together."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(np.fromiter(map(len, values), dtype=np.int32, count=len(values)), out=offsets[1:])
    return pa.Array.from_buffers(dtype, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])


def from_arrow(column: pa.Array | pa.ChunkedArray, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """[N] the numbers of a column of this type; ValueError when it has another type, or nulls."""
    wanted = np.dtype(dtype)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.empty(0, dtype=wanted)]
    for chunk in chunks:
        if chunk.type != pa.from_numpy_dtype(wanted) or chunk.null_count:
            raise ValueError(f"it must be {wanted} without nulls, got {chunk.type}")
        if len(chunk):
            start = chunk.offset * wanted.itemsize
            parts.append(np.frombuffer(chunk.buffers()[1], dtype=wanted, count=len(chunk), offset=start))
    return np.concatenate(parts)
