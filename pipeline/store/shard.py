"""Shard files: what Zarr's sharding codec writes, made without copying the buffer and read without decoding it.

A file is its inner chunks, one after another, then per chunk its offset and length (uint64, little endian; the
highest value twice for an absent chunk), then the CRC-32C of that index (uint32).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ABSENT = np.uint64(2**64 - 1)


def encode_index(num_chunks: int, present: int, chunk_bytes: int) -> bytes:
    """The end of a shard file whose first `present` of `num_chunks` inner chunks are stored, in order."""
    index = np.full((num_chunks, 2), ABSENT, dtype="<u8")
    index[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:present, 1] = chunk_bytes
    encoded = index.tobytes()
    return encoded + crc32c(encoded).to_bytes(4, "little")


def decode_index(encoded: bytes, num_chunks: int) -> npt.NDArray[np.uint64]:
    """uint64 [num_chunks, 2] offsets and lengths from the end of a shard file.

    Raises:
        ValueError: not that long, or its checksum does not fit.
    """
    if len(encoded) != 16 * num_chunks + 4:
        raise ValueError(f"the index has {len(encoded)} bytes, expected {16 * num_chunks + 4}")
    if crc32c(encoded[:-4]) != int.from_bytes(encoded[-4:], "little"):
        raise ValueError("the checksum of the index does not fit")
    return np.frombuffer(encoded[:-4], dtype="<u8").reshape(num_chunks, 2)


def is_contiguous(index: npt.NDArray[np.uint64], *, entries: int, chunk_length: int, chunk_bytes: int) -> bool:
    """Whether the first `entries` entries stand one after another from the start of the file, uncompressed."""
    present = -(-entries // chunk_length)
    offsets = np.arange(present, dtype=np.uint64) * np.uint64(chunk_bytes)
    return bool(
        present <= len(index) and (index[:present, 0] == offsets).all() and (index[:present, 1] == chunk_bytes).all()
    )


def crc32c(data: Any) -> int:
    """CRC-32C (Castagnoli) of bytes."""
    import google_crc32c

    return int(google_crc32c.value(bytes(data)))
