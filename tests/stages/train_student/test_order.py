"""The order of training rows: exact, independent of ranks and of accumulation, found again by step number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import UsageError
from kd.stages.train_student.order import BatchOrder


def order(count: int = 103, **changes: int) -> BatchOrder:
    lengths = np.random.default_rng(0).integers(3, 40, count)
    values: dict[str, int] = {"batch_size": 8, "seed": 3, **changes}
    return BatchOrder(rows=np.arange(count) + 1000, lengths=lengths, **values)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(8, 200),
    batch_size=st.integers(1, 9),
    ranks=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 2),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_at_most_once_in_full_steps(
    count: int, batch_size: int, ranks: int, accumulation: int, epoch: int
) -> None:
    found = order(count, batch_size=batch_size, num_ranks=ranks, accumulation=accumulation)
    steps = np.stack([*found.steps(epoch)])
    assert steps.shape == (found.steps_per_epoch, found.rows_per_step)
    assert len(np.unique(steps)) == steps.size and steps.min() >= 1000 and steps.max() < 1000 + count
    assert count - steps.size < found.rows_per_step
    assert found.rows_per_step % (ranks * accumulation) == 0


def test_over_epochs_every_row_comes_as_often_as_any_other_but_for_the_rest() -> None:
    found = order(103)
    counts = np.bincount(
        np.concatenate([rows for epoch in range(40) for rows in found.steps(epoch)]) - 1000, minlength=103
    )
    assert counts.min() >= 30 and counts.max() <= 40
    assert {*np.concatenate([*found.steps(0)]).tolist()} != {*np.concatenate([*found.steps(1)]).tolist()}


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(32, 400),
    rows_per_step=st.sampled_from([8, 16, 32]),
    accumulation=st.sampled_from([1, 2]),
    epoch=st.integers(0, 3),
    first_step=st.integers(0, 5),
)
def test_a_step_has_the_same_rows_on_1_2_and_4_ranks(
    count: int, rows_per_step: int, accumulation: int, epoch: int, first_step: int
) -> None:
    expected = [rows.tolist() for rows in order(count, batch_size=rows_per_step).steps(epoch, first_step)]
    for ranks in (1, 2, 4):
        batch_size = rows_per_step // ranks // accumulation
        shape = {"batch_size": batch_size, "accumulation": accumulation, "num_ranks": ranks}
        by_rank = [[*order(count, rank=rank, **shape).batches(epoch, first_step)] for rank in range(ranks)]
        assert all(len(batches) == accumulation * len(expected) for batches in by_rank)
        passes = [np.concatenate(slices) for slices in zip(*by_rank, strict=True)]
        steps = [np.concatenate(passes[first : first + accumulation]) for first in range(0, len(passes), accumulation)]
        assert [rows.tolist() for rows in steps] == expected


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    def rows(found: BatchOrder, epoch: int) -> list[list[int]]:
        return [step.tolist() for step in found.steps(epoch)]

    assert rows(order(), 2) == rows(order(), 2)
    assert rows(order(), 2) != rows(order(), 3)
    assert rows(order(), 2) != rows(order(seed=4), 2)


def test_a_resumed_epoch_is_the_rest_of_the_same_epoch() -> None:
    found = order(accumulation=2, batch_size=4)
    batches = list(found.batches(1))
    assert all(np.array_equal(a, b) for a, b in zip(batches[6:], found.batches(1, first_step=3), strict=True))


def test_rows_of_a_step_have_similar_lengths() -> None:
    found = order(1000, batch_size=10)
    lengths = dict(zip(found.rows.tolist(), found.lengths.tolist(), strict=True))
    spread = np.mean([np.ptp([lengths[row] for row in step]) for step in map(np.ndarray.tolist, found.steps(0))])
    assert spread < 5


def test_fewer_rows_than_a_batch_make_one_step_of_all_of_them() -> None:
    small = order(5, batch_size=64)
    assert small.rows_per_step == 5 and small.steps_per_epoch == 1
    assert sorted(next(small.batches(0))) == [1000, 1001, 1002, 1003, 1004]


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be shared by 4 processes"):
        order(3, num_ranks=4)
