"""InputRows on disk: which of them a store holds, which are equal, and where the others go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import InputRows, StoreLayout, create_or_open
from kd.pipeline.store import inputs as inputs_module
from kd.pipeline.store.inputs import match_inputs, new_shards, plan_new, row_numbers, shards_of
from kd.pipeline.store.keys import row_keys
from kd.pipeline.store.store import preview

LAYOUT = StoreLayout(rows_per_shard=4, tokens_per_shard=16, chunk_bytes=64)
# Few different rows, so that equal ones are common.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=40)


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged.from_rows(rows, np.int64)


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that forty rows are many of them."""
    monkeypatch.setattr(inputs_module, "STEP_ROWS", 3)
    monkeypatch.setattr(inputs_module, "BLOCK_ROWS", 8)
    monkeypatch.setattr(inputs_module, "PART_KEYS", 5)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, cut=st.integers(0, 40))
def test_what_was_added_comes_back_whatever_the_pieces(rows: list[list[int]], cut: int) -> None:
    inputs = InputRows(LAYOUT)
    for piece in (rows[:cut], rows[cut:]):
        inputs.add(ragged(piece), ragged([[1] * len(row) for row in piece]))
    steps = list(inputs.steps())
    assert [row.tolist() for _, ids, _ in steps for row in ids] == rows
    assert all((segments.values == 1).all() and ids.offsets.tolist() == segments.offsets.tolist()
               for _, ids, segments in steps)  # fmt: skip
    assert (inputs.num_rows, inputs.num_tokens) == (len(rows), sum(map(len, rows)))
    every = slice(0, len(rows))
    np.testing.assert_array_equal(inputs.keys(every), row_keys(ragged(rows), ragged([[1] * len(row) for row in rows])))
    assert inputs.lengths(every).tolist() == [len(row) for row in rows]


@settings(deadline=None, max_examples=60)
@given(stored=ROWS, rows=ROWS)
def test_matches_are_those_of_a_dictionary(stored: list[list[int]], rows: list[list[int]]) -> None:
    distinct = [list(row) for row in dict.fromkeys(map(tuple, stored))]
    numbers = {tuple(row): 100 + place for place, row in enumerate(distinct)}
    shards = [
        (row_keys(ragged(distinct[start : start + 4])), np.arange(start, min(start + 4, len(distinct))) + 100)
        for start in range(0, len(distinct), 4)
    ]
    inputs = InputRows.of(LAYOUT, ragged(rows))
    matches = match_inputs(inputs, shards, len(distinct))

    first: dict[tuple[int, ...], int] = {}
    for position, row in enumerate(rows):
        first.setdefault(tuple(row), position)
    expected = [numbers.get(tuple(row), -1 - first[tuple(row)]) for row in rows]
    assert matches.places.tolist() == expected
    new = sorted(position for row, position in first.items() if row not in numbers)
    assert (matches.num_new, matches.num_known) == (len(new), len(first) - len(new))
    assert matches.ordinals(np.array(new, dtype=np.int64)).tolist() == [*range(len(new))]

    planned = plan_new(inputs, matches)
    written = [(keys, ids, segments) for keys, ids, segments in new_shards(inputs, matches, planned)]
    assert [row.tolist() for _, ids, _ in written for row in ids] == [rows[position] for position in new]
    assert all(np.array_equal(keys, row_keys(ids, segments)) for keys, ids, segments in written)
    assert [len(keys) for keys, _, _ in written] == [shard.rows for shard in planned]
    found = row_numbers(matches, planned, 50, LAYOUT.rows_per_shard)
    for row, number in zip(rows, found.tolist(), strict=True):
        if tuple(row) in numbers:
            assert number == numbers[tuple(row)]
        else:
            shard, slot = divmod(number, LAYOUT.rows_per_shard)
            assert written[shard - 50][1][slot].tolist() == row
    assert shards_of(found, LAYOUT.rows_per_shard) == tuple(sorted({number // 4 for number in found.tolist()}))


def test_rows_packed_from_disk_make_the_store_that_rows_in_memory_made(tmp_path: Path, identity, tools) -> None:
    ids, segments = tools.make_rows(50)
    some = np.array([*range(30), *range(10), *range(50)])
    ids, segments = ids.take(some), segments.take(some)
    whole = create_or_open(tmp_path / "whole", identity, tools.layout)
    in_one = whole.allocate(ids, segments)
    pieces = create_or_open(tmp_path / "pieces", identity, tools.layout)
    inputs = InputRows(tools.layout)
    for start in range(0, len(some), 7):
        inputs.add(ids.slice(start, start + 7), segments.slice(start, start + 7))
    planned = preview(inputs)
    in_pieces = pieces.allocate_inputs(inputs)
    np.testing.assert_array_equal(in_one.rows, in_pieces.rows)
    assert tools.tree(tmp_path / "whole") == tools.tree(tmp_path / "pieces")
    assert planned.num_new == in_pieces.num_new == 50 and in_pieces.num_duplicates == 40
    # In the same places as a plan of all distinct rows at once: the format says that they are packed in order.
    assert in_one.rows[:30].tolist() == in_one.rows[40:70].tolist()
    assert sorted(in_one.rows[40:]) == in_one.rows[40:].tolist()


def test_an_id_that_does_not_fit_is_named_by_its_row_in_the_corpus() -> None:
    inputs = InputRows(LAYOUT)
    inputs.add(ragged([[1, 2]] * 5))
    with pytest.raises(RefusedError, match="token_ids of row 7: 65535 is not 0 to 65534"):
        inputs.add(ragged([[1], [2], [3, 65535], [4]]))
    with pytest.raises(RefusedError, match="different lengths"):
        inputs.add(ragged([[1, 2]]), ragged([[0]]))
