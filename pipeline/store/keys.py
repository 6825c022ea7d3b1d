"""Row keys: 128 bits over exactly what the teacher reads. Equal inputs have equal keys, whoever asks, whenever.

A set of N keys is a uint64 array [N, 2] whose memory is the N digests of 16 bytes, one after another.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError
from ..ragged import IntArray, Ragged

if TYPE_CHECKING:
    import pyarrow as pa

Keys = npt.NDArray[np.uint64]
PREFIX = b"kd-row-1"


def row_keys(token_ids: Ragged, segment_ids: Ragged | None = None) -> Keys:
    """[N, 2] uint64: BLAKE2b-128 of `kd-row-1`, the number of tokens, the token ids, the segment ids.

    The number is a uint64, token ids are uint32, all little endian; segment ids are uint8. No segment ids
    is the same as all zero.

    Raises:
        RefusedError: an id that does not fit, or segment ids of other lengths than the token ids.
    """
    tokens = _checked(token_ids, "<u4", "token ids")
    if segment_ids is None:
        segments = np.zeros(len(tokens), dtype=np.uint8)
    else:
        if not np.array_equal(segment_ids.offsets, token_ids.offsets):
            raise RefusedError("segment ids and token ids have different lengths")
        segments = _checked(segment_ids, "<u1", "segment ids")
    offsets = token_ids.offsets.tolist()
    lengths = token_ids.lengths.astype("<u8").tobytes()
    token_bytes, segment_bytes = memoryview(tokens.tobytes()), memoryview(segments.tobytes())
    digests = bytearray(16 * len(token_ids))
    start_of_all = hashlib.blake2b(PREFIX, digest_size=16)
    for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
        digest = start_of_all.copy()
        digest.update(lengths[8 * row : 8 * row + 8])
        digest.update(token_bytes[4 * start : 4 * stop])
        digest.update(segment_bytes[start:stop])
        digests[16 * row : 16 * row + 16] = digest.digest()
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def _checked(ragged: Ragged, dtype: str, what: str) -> npt.NDArray[np.unsignedinteger]:
    values = ragged.values
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise RefusedError(f"{what} must be integers, one per token; got {values.dtype} {list(values.shape)}")
    limit = int(np.iinfo(dtype).max)
    if values.size and (int(values.min()) < 0 or int(values.max()) > limit):
        raise RefusedError(f"{what} must be 0 to {limit}, got {int(values.min())} to {int(values.max())}")
    return np.ascontiguousarray(values, dtype=dtype)


class SortedKeys:
    """Keys [M, 2] sorted once, to be searched many times."""

    def __init__(self, known: Keys) -> None:
        self._known = known
        self._order = np.argsort(known[:, 0], kind="stable")
        self._high = known[self._order, 0]

    def find(self, wanted: Keys) -> IntArray:
        """int64 [N]: for each wanted key its (first) position among the known ones, -1 where it is not there."""
        positions = np.full(len(wanted), -1, dtype=np.int64)
        at = np.searchsorted(self._high, wanted[:, 0], side="left")
        open_ = np.arange(len(wanted))
        # Different keys that share their first 64 bits stand next to each other: step on until the halves agree.
        while True:
            keep = at[open_] < len(self._high)
            open_ = open_[keep]
            open_ = open_[self._high[at[open_]] == wanted[open_, 0]]
            if not len(open_):
                return positions
            candidates = self._order[at[open_]]
            found = self._known[candidates, 1] == wanted[open_, 1]
            positions[open_[found]] = candidates[found]
            open_ = open_[~found]
            at[open_] += 1


def match_keys(known: Keys, wanted: Keys) -> IntArray:
    """int64 [N]: for each wanted key its (first) position in `known` [M, 2], -1 where it is not there."""
    if not len(known) or not len(wanted):
        return np.full(len(wanted), -1, dtype=np.int64)
    return SortedKeys(known).find(wanted)


def first_occurrences(keys: Keys) -> tuple[IntArray, IntArray]:
    """The distinct keys in order of first appearance.

    Returns:
        (first [U], distinct [N]), int64: where each distinct key appears first, and which of the U each row is.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in order of appearance
    ordered = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.cumsum(starts) - 1
    first = order[starts]
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    distinct = np.empty(len(keys), dtype=np.int64)
    distinct[order] = rank[group]
    return np.sort(first), distinct


def keys_to_arrow(keys: Keys) -> pa.Array:
    """As a fixed_size_binary(16) column."""
    import pyarrow as pa

    buffer = pa.py_buffer(np.ascontiguousarray(keys).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, buffer])


def keys_from_arrow(column: pa.Array | pa.ChunkedArray) -> Keys:
    """[N, 2] from a fixed_size_binary(16) column without nulls; a copy."""
    import pyarrow as pa

    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = []
    for chunk in chunks:
        if chunk.type != pa.binary(16) or chunk.null_count:
            raise RefusedError(f"row keys must be fixed_size_binary(16) without nulls, got {chunk.type}")
        data = np.frombuffer(chunk.buffers()[1] or b"", dtype=np.uint8)
        parts.append(data[16 * chunk.offset : 16 * (chunk.offset + len(chunk))])
    joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
    return joined.view(np.uint64).reshape(-1, 2)


def key_hex(keys: Keys, row: int) -> str:
    """32 hex digits of one key, for messages."""
    return keys[row].tobytes().hex()
