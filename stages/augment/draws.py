"""Random numbers that belong to one variant of one example, whoever computes it and in whatever order."""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np

AUG_VERSION = "1"
"""Raised when the same configuration starts to give other variants: draw order, key, operators, pools."""


class Draws:
    """Uniform draws per (seed, configuration, example, iteration).

    A variant reads its draws in order from numpy's Philox with the 128-bit key
    BLAKE2b-128(seed as int64 LE ‖ config_hash ‖ example_id ‖ iteration as uint32 LE). One draw is one double in
    [0, 1); an integer below n is `int(draw * n)`. There is no other source of randomness.
    """

    def __init__(self, seed: int, config_hash: bytes) -> None:
        self._prefix = struct.pack("<q", seed) + config_hash
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def of(self, example_id: bytes, iteration: int, count: int) -> list[float]:
        """The first `count` draws of a variant."""
        key = blake2b(self._prefix + example_id + struct.pack("<I", iteration), digest_size=16).digest()
        # Setting the state of one generator takes a quarter of the time that a new one takes.
        self._state["state"]["key"] = np.frombuffer(key, dtype="<u8")
        self._bits.state = self._state
        return self._generator.random(count).tolist()  # type: ignore[no-any-return]
