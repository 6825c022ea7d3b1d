"""Batches: every row with its own tokens, labels and signals, gathered ahead or not, from one store or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kd.pipeline.ragged import Ragged
from kd.pipeline.store import Signal, open_view
from kd.stages.train_student.loader import BatchLoader, gather_ahead
from kd.stages.train_student.order import BatchOrder
from kd.stages.train_student.rows import Rows, StoredTokens, StoreRows, TokensInMemory

SIGNALS = tuple(Signal.parse(text) for text in ("logits", "hidden.cls@1", "hidden.tok@2"))


def stored(*views: Any) -> StoreRows:
    opened = [open_view(view.path) for view in views]
    return StoreRows([view.reader for view in opened], [view.rows for view in opened])


def rows_of(*views: Any, signals: tuple[Signal, ...] = SIGNALS, pad_token_id: int = 0) -> Rows:
    source = stored(*views)
    count = len(source)
    return Rows(
        tokens=StoredTokens(source),
        labels=np.arange(count),
        has_gold=np.arange(count) % 2 == 0,
        pad_token_id=pad_token_id,
        stored=source,
        signals=signals,
    )


def check_planted(
    batch: dict[str, Any], planted: Callable[..., np.ndarray], teachers: Sequence[str] | None = None
) -> None:
    lengths = batch["inputs"]["attention_mask"].sum(1).tolist()
    for row, length in enumerate(lengths):
        ids = batch["inputs"]["input_ids"][row, :length].tolist()
        teacher = "one" if teachers is None else teachers[row]
        assert np.array_equal(batch["signals"]["logits"][row], planted("logits", ids, teacher=teacher))
        assert np.array_equal(batch["signals"]["hidden.cls@1"][row], planted("hidden.cls@1", ids, teacher=teacher))
        tokens = batch["signals"]["hidden.tok@2"][row].numpy()
        expected = planted("hidden.tok@2", ids, teacher=teacher)
        assert np.array_equal(tokens[:length], expected) and not tokens[length:].any()


def test_every_row_meets_its_own_signals(view: Any, planted: Callable[..., np.ndarray]) -> None:
    rows = rows_of(view)
    index = np.random.default_rng(0).permutation(len(rows))[:50]
    batch = rows.batch(index)
    assert batch["labels"].tolist() == index.tolist()
    assert batch["has_gold"].tolist() == (index % 2 == 0).tolist()
    check_planted(batch, planted)


def test_rows_of_several_stores_stand_one_after_another(
    plant: Callable[..., Any], view: Any, sentences: list[str], planted: Callable[..., np.ndarray]
) -> None:
    other = plant(sentences[100:160], teacher="two")
    rows = rows_of(view, other)
    assert len(rows) == 180
    alone = rows_of(other)
    index = np.array([170, 3, 121, 119, 120, 60, 179])
    batch = rows.batch(index)
    check_planted(batch, planted, ["one" if row < 120 else "two" for row in index])
    own = alone.batch(index[index >= 120] - 120)
    width = own["inputs"]["input_ids"].shape[1]
    assert torch.equal(batch["inputs"]["input_ids"][index >= 120][:, :width], own["inputs"]["input_ids"])
    assert np.array_equal(rows.tokens.lengths[120:], alone.tokens.lengths)


def test_scores_of_several_stores_are_padded_to_the_longest_row_and_stand_head_by_head() -> None:
    class Scores:
        """A reader of rows of one length, two heads: row r's scores count up from 100 r."""

        def __init__(self, length: int) -> None:
            self.length = length

        def gather_pairs(self, signal: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            count = self.length**2 * 2
            values = 100 * rows[:, None] + np.arange(count)
            return values.reshape(-1, self.length, self.length, 2), np.full(len(rows), self.length)

    both = StoreRows([Scores(2), Scores(3)], [np.array([5, 6]), np.array([7])])  # type: ignore[list-item]
    signal = Signal("attention.score", 1)
    pairs, lengths = both.gather_padded(signal, np.array([2, 0]))
    assert pairs.shape == (2, 3, 3, 2) and lengths.tolist() == [3, 2]
    assert pairs[0].ravel().tolist() == [*range(700, 718)]
    assert pairs[1, :2, :2].ravel().tolist() == [*range(500, 508)]
    assert not pairs[1, 2:].any() and not pairs[1, :, 2:].any()

    empty = np.zeros(3, np.int64)
    tokens = TokensInMemory(Ragged.from_lengths(np.zeros(8, np.int64), [2, 3, 3]), Ragged.from_lengths(empty, [3]))
    rows = Rows(tokens, np.zeros(3), np.ones(3, bool), 0, stored=both, signals=(signal,))
    scores = rows.batch(np.array([2, 0]))["signals"]["attention.score@1"]
    assert scores.shape == (2, 2, 3, 3)
    assert scores[0, 1].tolist() == [[701, 703, 705], [707, 709, 711], [713, 715, 717]]


def test_dtypes_and_padding_of_a_batch(view: Any) -> None:
    batch = rows_of(view, pad_token_id=7).batch(np.arange(20))
    inputs = batch["inputs"]
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 7).all()
    assert batch["signals"]["logits"].dtype == torch.float32
    assert batch["signals"]["hidden.cls@1"].dtype == torch.float16


def test_tokens_in_memory_give_the_same_batches_as_the_store(view: Any) -> None:
    source = stored(view)
    tokens = StoredTokens(source)
    ids, lengths, segments = tokens.gather(np.arange(len(source)), segments=True)
    assert segments is not None
    held = TokensInMemory(Ragged.from_padded(ids, lengths), Ragged.from_padded(segments, lengths))
    index = np.array([5, 1, 77])
    for ours, theirs in zip(held.gather(index, segments=True), tokens.gather(index, segments=True), strict=True):
        assert np.array_equal(ours, theirs)


def test_seen_tokens_are_those_of_the_asked_rows(view: Any) -> None:
    rows = rows_of(view)
    index = np.array([4, 9, 30])
    batch = rows.batch(index)["inputs"]
    expected = np.unique(batch["input_ids"][batch["attention_mask"] == 1])
    assert np.array_equal(rows.seen_tokens(index, 200, rows_at_once=2), expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_gathering_ahead_keeps_the_order(view: Any, threads: int) -> None:
    rows = rows_of(view)
    batches = [np.arange(start, start + 7) for start in range(0, 105, 7)]
    found = list(gather_ahead(rows, batches, threads=threads))
    assert [batch["labels"].tolist() for batch in found] == [batch.tolist() for batch in batches]


def test_pinned_batches_are_pinned_tensor_by_tensor(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: a copy that is told apart by its place stands in for it."""
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    rows, index = rows_of(view), np.arange(9)
    (batch,) = gather_ahead(rows, [index], pinned=True)
    expected = rows.batch(index)
    for group, names in (("inputs", expected["inputs"]), ("signals", expected["signals"])):
        assert {*batch[group]} == {*names}
        for name, tensor in batch[group].items():
            assert tensor.data_ptr() in pinned and torch.equal(tensor, expected[group][name])
    assert batch["labels"].data_ptr() in pinned and batch["has_gold"].data_ptr() in pinned


def test_an_error_while_gathering_ahead_reaches_the_training_loop(view: Any) -> None:
    with pytest.raises(IndexError):
        list(gather_ahead(rows_of(view), [np.array([0]), np.array([10_000])]))


def test_the_loader_resumes_in_mid_epoch_and_measures_its_wait(view: Any) -> None:
    rows = rows_of(view, signals=())
    order = BatchOrder(rows=np.arange(120), lengths=rows.tokens.lengths, batch_size=10, accumulation=2, seed=1)

    def labels(loader: BatchLoader, epochs: range) -> list[list[int]]:
        found = []
        for epoch in epochs:
            loader.set_epoch(epoch)
            found += [batch["labels"].tolist() for batch in loader]
        return found

    whole = BatchLoader(rows, order)
    every = labels(whole, range(3))
    assert len(whole) == 12 and len(every) == 36 and whole.wait_s > 0
    assert labels(BatchLoader(rows, order, first_step=8), range(1, 3)) == every[16:]
    assert labels(BatchLoader(rows, order, first_step=12), range(2, 3)) == every[24:]


def test_stopping_early_leaves_no_thread_behind(view: Any) -> None:
    import threading

    iterator = gather_ahead(rows_of(view), [np.array([i]) for i in range(100)])
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kd-gather")]
