"""Random numbers that belong to one variant of one example, whoever computes it and in whatever order."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pipeline.ragged import offsets_of

AUG_VERSION = "2"
"""Raised when the same configuration starts to give other variants: places of draws, key, operators, pools."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_STEPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
_ROUNDS = 10


class Draws:
    """Uniform draws per (seed, configuration, example, iteration).

    A variant has the numbers of numpy's Philox with the 128-bit key
    BLAKE2b-128(seed as int64 LE ‖ config_hash ‖ example_id ‖ iteration as uint32 LE). One draw is one double in
    [0, 1); an integer below n is `int(draw * n)`. There is no other source of randomness.
    """

    def __init__(self, seed: int, config_hash: bytes) -> None:
        self._prefix = struct.pack("<q", seed) + config_hash

    def of(
        self, example_ids: Sequence[bytes], iterations: Sequence[int], counts: IntArray
    ) -> tuple[FloatArray, IntArray]:
        """`(draws, starts)`: the first `counts[i]` draws of variant i are `draws[starts[i]:starts[i] + counts[i]]`."""
        prefix, pack = self._prefix, struct.Struct("<I").pack
        keys = b"".join(
            blake2b(prefix + example_id + pack(iteration), digest_size=16).digest()
            for example_id, iteration in zip(example_ids, iterations, strict=True)
        )
        return _philox(np.frombuffer(keys, dtype="<u8").reshape(-1, 2), counts)


def _philox(keys_N2: _Words, counts_N: IntArray) -> tuple[FloatArray, IntArray]:
    """What `numpy.random.Generator(Philox(key=...)).random(count)` gives for many keys at once; `starts` as above.

    Philox 4x64-10 (Salmon et al., 2011): block b of a key, counted from 1, is four numbers.
    """
    starts_N = offsets_of(-(-counts_N // 4))
    of_block = np.repeat(np.arange(len(counts_N)), np.diff(starts_N))
    key = [keys_N2[of_block, 0], keys_N2[of_block, 1]]
    zero = np.zeros(len(of_block), dtype=np.uint64)
    block = (np.arange(len(of_block)) - starts_N[of_block] + 1).astype(np.uint64)
    counter = [block, zero, zero, zero]
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiplied(counter[0], _MULTIPLIERS[0])
        high_1, low_1 = _multiplied(counter[2], _MULTIPLIERS[1])
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [key[0] + _STEPS[0], key[1] + _STEPS[1]]
    values = np.stack(counter, axis=1).reshape(-1)
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53, 4 * starts_N[:-1]


def _multiplied(values: _Words, by: int) -> tuple[_Words, Any]:
    """The high and low 64 bits of each product."""
    by_low, by_high = np.uint64(by & 0xFFFFFFFF), np.uint64(by >> 32)
    low, high = values & _LOW, values >> _HALF
    middle = high * by_low + (low * by_low >> _HALF)
    rest = (middle & _LOW) + low * by_high
    return high * by_high + (middle >> _HALF) + (rest >> _HALF), values * np.uint64(by)
