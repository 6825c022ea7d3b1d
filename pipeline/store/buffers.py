"""Memory that shards are collected in, used again for the shards that come after them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 4096
"""Of the beginnings of buffers: what the kernel asks for to take them to a disk as they are."""


class SpareBuffers:
    """Memory of shards that are on disk, for the next ones.

    Memory that is new to a process costs more than filling it: the kernel clears it page by page, and takes it back
    when it is given up. It never holds more buffers than were in use at one time. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """An array of this shape and dtype, C-contiguous and aligned to `ALIGNMENT`; what is in it is left over."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            self._spare.sort(key=lambda buffer: buffer.nbytes)
            needed = size + ALIGNMENT
            place = next((place for place, buffer in enumerate(self._spare) if buffer.nbytes >= needed), None)
            if place is not None:
                buffer = self._spare.pop(place)
            else:
                if self._spare:
                    self._spare.pop()  # too small: given up for the one that is
                # Shards differ a little in size; pages that are never touched take no memory.
                step = 1 << max(12, needed.bit_length() - 3)
                buffer = np.empty(-(-needed // step) * step, dtype=np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT
        return buffer[start : start + size].view(dtype).reshape(shape)

    def give(self, arrays: Iterable[npt.NDArray[Any]]) -> None:
        """Take back arrays that `take` gave and that nobody reads any more."""
        with self._lock:
            for array in arrays:
                while isinstance(array.base, np.ndarray):
                    array = array.base
                self._spare.append(array)
