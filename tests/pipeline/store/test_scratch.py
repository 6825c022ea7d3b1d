"""Numbers in temporary files: what was put there comes back, mapped or in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.store import scratch
from kd.pipeline.store.scratch import Appended, Partitions, blocks, column, release


@pytest.mark.parametrize("mapped", [False, True])
def test_a_column_is_its_parts_one_after_another(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if mapped:
        monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 1)
    parts = [np.arange(6).reshape(3, 2), np.empty((0, 2), int), np.array([[7, 8]])]
    joined = column(parts, np.uint32, (2,))
    np.testing.assert_array_equal(joined, np.concatenate(parts))
    assert joined.dtype == np.uint32 and not joined.flags.writeable
    release(joined)
    np.testing.assert_array_equal(joined, np.concatenate(parts))


def test_a_column_of_nothing_is_empty() -> None:
    assert column([], np.int64, (2,)).shape == (0, 2)


def test_any_part_of_a_file_is_read_while_it_grows() -> None:
    file = Appended(np.int64)
    file.append(np.arange(5))
    assert file.read(1, 3).tolist() == [1, 2]
    file.append(np.arange(5, 9))
    assert (len(file), file.read(3, 9).tolist(), file.read(4, 4).tolist()) == (9, [3, 4, 5, 6, 7, 8], [])


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), max_size=20), max_size=4))
def test_parts_come_back_in_the_order_in_which_they_were_dealt(dealt: list[list[tuple[int, int]]]) -> None:
    partitions = Partitions(np.int64, 4)
    for block in dealt:
        pairs = np.array(block, dtype=np.int64).reshape(-1, 2)
        partitions.add(pairs[:, 0], pairs[:, 1])
    for part in range(4):
        expected = [value for block in dealt for number, value in block if number == part]
        assert partitions.read(part).tolist() == expected


def test_blocks_cover_all_rows_once() -> None:
    assert [(part.start, part.stop) for part in blocks(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    assert not list(blocks(0))
