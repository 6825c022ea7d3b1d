"""Ragged arrays: rows of different lengths, one after another, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """N rows of different lengths.

    Attributes:
        values: [total, ...] the rows, one after another, any dtype.
        offsets: int64 [N + 1], rising from 0 to total; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: Array
    offsets: IntArray

    def __post_init__(self) -> None:
        offsets = self.offsets
        if offsets.dtype != np.int64 or offsets.ndim != 1 or not offsets.size:
            raise ValueError(f"offsets must be int64 [N + 1], got {offsets.dtype} {list(offsets.shape)}")
        if self.values.ndim < 1:
            raise ValueError("values must have at least one axis")
        if offsets[0] != 0 or offsets[-1] != len(self.values) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets must rise from 0 to {len(self.values)} (the number of values), "
                f"got {int(offsets[0])} to {int(offsets[-1])}"
            )

    @classmethod
    def from_lengths(cls, values: Array, lengths: npt.ArrayLike) -> Ragged:
        """Cut `values` [total, ...] into rows of these lengths, which sum to total."""
        return cls(values, offsets_of(lengths))

    @classmethod
    def from_rows(cls, rows: Sequence[npt.ArrayLike], dtype: npt.DTypeLike) -> Ragged:
        """Join rows (lists or arrays of equal trailing shape) into one.

        >>> Ragged.from_rows([[1, 2], [], [3]], "int64").lengths.tolist()
        [2, 0, 1]
        """
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        lengths = np.fromiter((len(array) for array in arrays), dtype=np.int64, count=len(arrays))
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_padded(cls, padded: Array, lengths: npt.ArrayLike) -> Ragged:
        """Take the first `lengths[i]` entries of every row of `padded` [N, T, ...]."""
        lengths_N = np.asarray(lengths, dtype=np.int64)
        if len(lengths_N) != len(padded) or (lengths_N > padded.shape[1]).any():
            raise ValueError(f"{len(lengths_N)} lengths do not fit padded rows of shape {list(padded.shape)}")
        return cls.from_lengths(padded[np.arange(padded.shape[1]) < lengths_N[:, None]], lengths_N)

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, in order; at least one part."""
        return cls.from_lengths(
            np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        """Row `row`, a view."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self.values[start:stop] for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.values, other.values)

    @property
    def lengths(self) -> IntArray:
        """int64 [N]"""
        return np.diff(self.offsets)

    def take(self, rows: npt.ArrayLike) -> Ragged:
        """The given rows, in the given order; a copy."""
        rows_M = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows_M]
        return Ragged.from_lengths(self.values[ranges(self.offsets[:-1][rows_M], lengths)], lengths)

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows `start` to `stop` (exclusive); a view of the values."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        low, high = self.offsets[start], self.offsets[stop]
        return Ragged(self.values[low:high], self.offsets[start : stop + 1] - low)

    def to_padded(self, pad_value: Any = 0, *, length: int | None = None) -> Array:
        """[N, T, ...] with `pad_value` after each row; T is `length`, or the longest row."""
        lengths = self.lengths
        width = int(lengths.max(initial=0)) if length is None else length
        if (lengths > width).any():
            raise ValueError(f"the longest row has {int(lengths.max())} entries, length is {width}")
        padded = np.full((len(self), width, *self.values.shape[1:]), pad_value, dtype=self.values.dtype)
        padded[np.arange(width) < lengths[:, None]] = self.values
        return padded


def offsets_of(lengths: npt.ArrayLike) -> IntArray:
    """int64 [N + 1] running sum of N lengths, from 0."""
    lengths_N = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(lengths_N) + 1, dtype=np.int64)
    np.cumsum(lengths_N, out=offsets[1:])
    return offsets


def ranges(starts: npt.ArrayLike, lengths: npt.ArrayLike) -> IntArray:
    """`start, start + 1, ..., start + length - 1` for each pair, one after another.

    >>> ranges([5, 0], [2, 3]).tolist()
    [5, 6, 0, 1, 2]
    """
    starts_N, lengths_N = np.asarray(starts, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    offsets = offsets_of(lengths_N)
    return np.repeat(starts_N - offsets[:-1], lengths_N) + np.arange(offsets[-1])
