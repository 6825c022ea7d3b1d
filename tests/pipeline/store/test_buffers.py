"""Buffers of shards: used again where they fit, never two owners, never more than were in use at once."""

from __future__ import annotations

import numpy as np

from kd.pipeline.store.buffers import SpareBuffers


def where(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_that_was_given_back_is_used_again_in_another_shape_and_dtype() -> None:
    spare = SpareBuffers()
    first = spare.take((1000, 8), "float16")
    address = where(first)
    spare.give([first])
    again = spare.take((500, 4), "<f8")
    assert where(again) == address
    assert again.shape == (500, 4) and again.dtype == np.float64 and again.flags.c_contiguous


def test_two_that_are_in_use_never_share_memory() -> None:
    spare = SpareBuffers()
    one, two = spare.take((100,), "int8"), spare.take((100,), "int8")
    assert not np.shares_memory(one, two)
    spare.give([one])
    three = spare.take((90,), "int8")
    assert not np.shares_memory(two, three)


def test_a_larger_shard_replaces_the_memory_of_a_smaller_one() -> None:
    spare = SpareBuffers()
    spare.give([spare.take((10,), "int8"), spare.take((20,), "int8")])
    large = spare.take((1 << 20,), "int8")
    assert large.nbytes == 1 << 20
    spare.give([large])
    assert len(spare._spare) == 2


def test_nothing_takes_nothing() -> None:
    assert SpareBuffers().take((0, 5), "float32").shape == (0, 5)
