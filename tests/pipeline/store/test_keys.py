"""Row keys depend on exactly what the teacher reads."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store.keys import first_occurrences, keys_from_arrow, keys_to_arrow, match_keys, row_keys


def by_hand(tokens: list[int], segments: list[int]) -> bytes:
    data = b"kd-row-1" + struct.pack("<Q", len(tokens))
    data += b"".join(struct.pack("<I", token) for token in tokens) + bytes(segments)
    return hashlib.blake2b(data, digest_size=16).digest()


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged.from_rows(rows, "int64")


def test_a_key_is_the_hash_that_the_format_names() -> None:
    keys = row_keys(ragged([[101, 7, 102], [70000]]), ragged([[0, 0, 1], [0]]))
    assert keys[0].tobytes() == by_hand([101, 7, 102], [0, 0, 1])
    assert keys[1].tobytes() == by_hand([70000], [0])


def test_no_segment_ids_are_segment_ids_of_zero() -> None:
    tokens = ragged([[1, 2], [3]])
    np.testing.assert_array_equal(row_keys(tokens), row_keys(tokens, ragged([[0, 0], [0]])))


def test_the_dtype_in_which_ids_arrive_does_not_matter() -> None:
    tokens = ragged([[1, 2], [3]])
    small = Ragged(tokens.values.astype(np.uint16), tokens.offsets)
    np.testing.assert_array_equal(row_keys(tokens), row_keys(small))


def test_row_borders_order_and_segments_all_count() -> None:
    rows = [[1, 2, 3], [1, 2], [3, 2, 1], [1], [2, 3], [0, 1, 2], [1, 2, 3, 0]]
    keys = row_keys(ragged(rows))
    assert len({key.tobytes() for key in keys}) == len(rows)
    other = row_keys(ragged([[1, 2, 3]]), ragged([[0, 0, 1]]))
    assert other[0].tobytes() != keys[0].tobytes()


@pytest.mark.parametrize("bad", [[-1], [1 << 32]])
def test_ids_that_do_not_fit_are_refused(bad: list[int]) -> None:
    with pytest.raises(RefusedError, match="token ids must be 0 to 4294967295"):
        row_keys(ragged([bad]))


def test_segment_ids_must_have_the_rows_lengths() -> None:
    with pytest.raises(RefusedError, match="different lengths"):
        row_keys(ragged([[1, 2]]), ragged([[0]]))
    with pytest.raises(RefusedError, match="segment ids must be 0 to 255"):
        row_keys(ragged([[1]]), ragged([[256]]))
    with pytest.raises(RefusedError, match="must be integers"):
        row_keys(Ragged.from_rows([[1.5]], "float32"))


# Two bits per half make equal halves of different keys common.
small_keys = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12)


@settings(deadline=None)
@given(small_keys, small_keys)
def test_matching_agrees_with_a_dictionary(known: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    first: dict[tuple[int, int], int] = {}
    for position, key in enumerate(known):
        first.setdefault(key, position)
    arrays = [np.array(keys, dtype=np.uint64).reshape(-1, 2) for keys in (known, wanted)]
    assert match_keys(*arrays).tolist() == [first.get(key, -1) for key in wanted]


@settings(deadline=None)
@given(small_keys)
def test_first_occurrences_agree_with_a_dictionary(keys: list[tuple[int, int]]) -> None:
    numbers: dict[tuple[int, int], int] = {}
    for key in keys:
        numbers.setdefault(key, len(numbers))
    first, distinct = first_occurrences(np.array(keys, dtype=np.uint64).reshape(-1, 2))
    assert distinct.tolist() == [numbers[key] for key in keys]
    assert first.tolist() == [keys.index(key) for key in numbers]


def test_keys_survive_arrow_in_chunks_and_slices() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, (10, 2), dtype=np.uint64)
    column = keys_to_arrow(keys)
    assert column[3].as_py() == keys[3].tobytes()
    np.testing.assert_array_equal(keys_from_arrow(pa.chunked_array([column[:4], column[4:]])), keys)
    np.testing.assert_array_equal(keys_from_arrow(column[2:5]), keys[2:5])
    assert keys_from_arrow(pa.chunked_array([], type=pa.binary(16))).shape == (0, 2)


def test_a_column_that_does_not_hold_keys_is_refused() -> None:
    for column in (pa.array([b"x" * 15]), pa.array([b"x" * 16, None], type=pa.binary(16))):
        with pytest.raises(RefusedError, match="row keys must be"):
            keys_from_arrow(column)
