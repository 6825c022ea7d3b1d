"""The order of rows: a permutation of which any part is found by itself, in batches of similar length."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.stages.shuffled_batches import Shuffle, length_grouped_batches


def whole_order(lengths: np.ndarray, batch_size: int = 16, seed: int = 0, epoch: int = 0, first: int = 0) -> list[int]:
    batches = [*length_grouped_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch, first=first)]
    return [row for batch in batches for row in batch.tolist()]


@given(st.integers(0, 3000), st.integers(0, 5), st.integers(0, 5))
def test_a_shuffle_is_a_permutation_whatever_the_count(count: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Shuffle(count, seed, epoch).at(0, count)), np.arange(count))


@given(st.integers(1, 500), st.data())
def test_any_part_of_a_shuffle_is_what_the_whole_has_there(count: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    shuffle = Shuffle(count, 7)
    assert np.array_equal(shuffle.at(start, stop), shuffle.at(0, count)[start:stop])


def test_every_order_of_a_few_rows_comes_about_equally_often() -> None:
    found = Counter(tuple(Shuffle(3, seed).at(0, 3).tolist()) for seed in range(3000))
    assert {*found} == {*permutations(range(3))}
    assert all(400 < count < 600 for count in found.values()), found


def test_every_row_comes_to_every_place_equally_often() -> None:
    """Pearson's statistic of 50 x 50 counts lies within five standard deviations of what true shuffles give."""
    count, draws = 50, 2000
    met = np.zeros((count, count))
    for seed in range(draws):
        met[np.arange(count), Shuffle(count, 1, seed).at(0, count)] += 1
    statistic = ((met - draws / count) ** 2 / (draws / count)).sum()
    assert abs(statistic - count * (count - 1)) < 5 * np.sqrt(2 * count * (count - 1))


def test_neighbours_in_a_shuffle_have_nothing_to_do_with_each_other() -> None:
    order = np.concatenate([Shuffle(10_000, seed).at(0, 10_000) for seed in range(20)]).astype(float)
    for distance in (1, 2, 100):  # 100: a row of the shuffle's table
        assert abs(np.corrcoef(order[:-distance], order[distance:])[0, 1]) < 0.01


@given(st.lists(st.integers(1, 100), max_size=400), st.integers(1, 40), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_has_every_row_once_whatever_the_sizes(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = [*length_grouped_batches(np.array(lengths, int), batch_size=batch_size, seed=seed, epoch=epoch)]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))


@settings(max_examples=50)
@given(st.integers(1, 1500), st.integers(1, 8), st.integers(0, 220))
def test_an_epoch_begins_at_any_batch(count: int, batch_size: int, first: int) -> None:
    lengths = np.arange(count) % 37
    assert whole_order(lengths, batch_size, first=first) == whole_order(lengths, batch_size)[first * batch_size :]


def test_a_batch_in_the_middle_of_a_million_rows_costs_its_own_pool_alone() -> None:
    class Watched(np.ndarray[tuple[int], np.dtype[np.uint8]]):
        asked = 0

        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            Watched.asked += len(index)
            return np.asarray(self)[index]

    lengths = (np.arange(1_000_000) % 60).astype(np.uint8).view(Watched)
    next(length_grouped_batches(lengths, batch_size=64, seed=1, epoch=0, first=7_000))
    assert 0 < Watched.asked <= 50 * 64


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else() -> None:
    lengths = np.arange(1000) % 37
    assert whole_order(lengths) == whole_order(lengths) == whole_order(lengths.astype(np.uint8))
    orders = [whole_order(lengths), whole_order(lengths, epoch=1), whole_order(lengths, seed=1)]
    assert len({*map(tuple, orders)}) == 3


@pytest.mark.parametrize("num_batches", [100, 51])
def test_batches_hold_similar_lengths_and_stand_in_no_order_of_length(num_batches: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 16 * num_batches)
    batches = lengths[whole_order(lengths)].reshape(-1, 16)
    spreads = batches.max(1) - batches.min(1)
    assert spreads.mean() < 10 and spreads.max() < 40
    assert abs(np.corrcoef(batches.mean(1), np.arange(len(batches)))[0, 1]) < 0.3
