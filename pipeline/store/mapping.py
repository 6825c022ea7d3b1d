"""One array out of many shard files: each mapped at a fixed distance inside one reserved range of addresses.

A batch of rows from anywhere in the store is then one `numpy.take`, with no work per row or per shard. Entry
`shard * stride + slot` of the array is slot `slot` of shard `shard`. Nothing is read until it is touched, and
touching a shard that was not mapped would end the process: callers check first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# The same on Linux, macOS and the BSDs; Python's mmap module does not name them.
_MAP_FIXED = 0x10
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value

SUPPORTED = sys.maxsize > 2**32 and os.name == "posix"
"""Elsewhere the reader goes through zarr."""


class ShardMap:
    """The committed shards of one array as one numpy array, read only.

    Attributes:
        values: [num_shards * stride + 1, ...] stored dtype; the last entry is zero, to pad with.
        stride: entries from one shard to the next.

    Raises:
        OSError: the system refuses to map (too many mappings, no address space).
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        *,
        num_shards: int,
        capacity: int,
        shape: tuple[int, ...],
        dtype: str,
        data_bytes: Callable[[int], int],
    ) -> None:
        numbers = np.dtype((np.dtype(dtype).newbyteorder("<"), shape))
        entry = numbers.itemsize
        # Files are mapped at whole pages, so a shard's range ends where both an entry and a page end.
        page = mmap.ALLOCATIONGRANULARITY
        whole = page // np.gcd(page, entry)
        self.stride = int(-(-capacity // whole) * whole)
        size = (num_shards * self.stride + 1) * entry
        end = -(-size // page) * page
        address = _map(None, end, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.close = weakref.finalize(self, _unmap, address, end)
        for shard, path in paths.items():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                start = address + shard * self.stride * entry
                _map(start, data_bytes(shard), mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
            finally:
                os.close(descriptor)
        last = num_shards * self.stride * entry
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _map(address + last, end - last, mmap.PROT_READ, flags, -1)
        memory = memoryview((ctypes.c_char * size).from_address(address))
        self.values: npt.NDArray[Any] = np.frombuffer(memory, dtype=numbers.base).reshape(-1, *shape)
        self.values.flags.writeable = False


_libc = ctypes.CDLL(None, use_errno=True) if SUPPORTED else None


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
    assert _libc is not None
    function = _libc.mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    result = function(address, length, protection, flags, descriptor, 0)
    if result is None or result == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {length} bytes: {os.strerror(number)}")
    return int(result)


def _unmap(address: int, length: int) -> None:
    assert _libc is not None
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.munmap(address, length)
