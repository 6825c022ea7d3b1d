"""Ragged arrays hold what they were given, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.ragged import Ragged, offsets_of, ranges

rows_of_ints = st.lists(st.lists(st.integers(0, 60000), max_size=6), max_size=8)


@settings(deadline=None)
@given(rows_of_ints)
def test_rows_come_back_as_they_were_given(rows: list[list[int]]) -> None:
    ragged = Ragged.from_rows(rows, "uint16")
    assert [row.tolist() for row in ragged] == rows
    assert len(ragged) == len(rows)
    assert ragged.values.dtype == np.uint16


@settings(deadline=None)
@given(rows_of_ints, st.integers(0, 3))
def test_padding_and_cutting_again_changes_nothing(rows: list[list[int]], more: int) -> None:
    ragged = Ragged.from_rows(rows, "int64")
    width = int(ragged.lengths.max(initial=0)) + more
    padded = ragged.to_padded(-1, length=width)
    assert padded.shape == (len(rows), width)
    assert int((padded == -1).sum()) == padded.size - len(ragged.values)
    assert Ragged.from_padded(padded, ragged.lengths) == ragged


@settings(deadline=None)
@given(rows_of_ints, st.data())
def test_take_and_slice_agree_with_lists(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.from_rows(rows, "int64")
    chosen = data.draw(st.lists(st.integers(0, max(0, len(rows) - 1)), max_size=5)) if rows else []
    assert [row.tolist() for row in ragged.take(chosen)] == [rows[i] for i in chosen]
    start, stop = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))
    assert [row.tolist() for row in ragged.slice(start, stop)] == rows[start:stop]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=6))
def test_ranges_agree_with_python(pairs: list[tuple[int, int]]) -> None:
    expected = [value for start, length in pairs for value in range(start, start + length)]
    assert ranges([start for start, _ in pairs], [length for _, length in pairs]).tolist() == expected


def test_rows_with_further_axes_keep_them() -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    ragged = Ragged.from_lengths(values, [1, 0, 5])
    assert ragged.to_padded().shape == (3, 5, 2)
    assert ragged[2].tolist() == values[1:].tolist()
    assert ragged[-1].tolist() == ragged[2].tolist()
    assert Ragged.concatenate([ragged, ragged.slice(0, 1)]).lengths.tolist() == [1, 0, 5, 1]


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 3, 2, 3], [], [[0, 3]]])
def test_offsets_that_do_not_cut_the_values_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets must"):
        Ragged(np.zeros(3), np.array(offsets, dtype=np.int64))


def test_a_row_that_is_not_there_is_an_index_error() -> None:
    ragged = Ragged.from_rows([[1]], "int64")
    with pytest.raises(IndexError):
        ragged[1]


def test_padding_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="longest row has 2"):
        Ragged.from_rows([[1, 2]], "int64").to_padded(length=1)
    with pytest.raises(ValueError, match="do not fit"):
        Ragged.from_padded(np.zeros((1, 2)), [3])


def test_offsets_of_no_rows_is_one_zero() -> None:
    assert offsets_of([]).tolist() == [0]
