"""Masked text: which tokens are asked for follows from row key and seed alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kd.pipeline.errors import VerificationError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store.keys import row_keys
from kd.stages.masking import NO_LABEL, NOTHING, MaskedRows, Masking

SPECIAL = (0, 1, 2, 3, 4)
MASKING = Masking(seed=0, share=0.15, slots=10, mask_token_id=4, vocabulary=1000, special_ids=SPECIAL)


def rows(count: int, seed: int = 0, *, longest: int = 64) -> Ragged:
    """[CLS] words [SEP], of 3 to `longest` tokens."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = generator.integers(5, 1000, generator.integers(1, longest - 1))
        found.append(np.concatenate([[2], words, [3]]))
    return Ragged.from_lengths(np.concatenate(found), np.array([*map(len, found)]))


def apply(ids: Ragged, masking: Masking = MASKING, *, wider: int = 0) -> MaskedRows:
    padded = np.pad(ids.to_padded(), ((0, 0), (0, wider)))
    return masking.apply(padded, ids.lengths, row_keys(ids))


def test_a_row_is_masked_alike_in_any_batch_and_padding() -> None:
    ids = rows(20)
    together = apply(ids, wider=7)
    for row in range(20):
        alone = apply(ids.take(np.array([row])))
        length = int(ids.lengths[row])
        assert alone.ids_BT[0, :length].tolist() == together.ids_BT[row, :length].tolist()
        assert alone.positions_BM[0].tolist() == together.positions_BM[row].tolist()
        assert alone.labels_BM[0].tolist() == together.labels_BM[row].tolist()


def test_a_share_of_the_words_is_asked_for_special_tokens_never_and_one_word_at_least() -> None:
    ids = rows(200)
    masked = apply(ids)
    before = ids.to_padded()
    for row, length in enumerate(ids.lengths.tolist()):
        places = masked.positions_BM[row][masked.positions_BM[row] >= 0]
        assert len(places) == max(1, int(0.15 * (length - 2) + 0.5))
        assert (np.diff(places) > 0).all() and places.min() >= 1 and places.max() < length - 1
        assert masked.labels_BM[row, : len(places)].tolist() == before[row, places].tolist()
        assert (masked.positions_BM[row, len(places) :] == NOTHING).all()
        assert (masked.labels_BM[row, len(places) :] == NO_LABEL).all()
        others = np.setdiff1d(np.arange(length), places)
        assert (masked.ids_BT[row, others] == before[row, others]).all()


def test_of_ten_words_eight_are_masked_and_one_is_replaced() -> None:
    ids = rows(2000)
    masked = apply(ids)
    used = masked.positions_BM >= 0
    found = np.take_along_axis(masked.ids_BT, masked.positions_BM.clip(0), 1)[used]
    labels = masked.labels_BM[used]
    assert len(labels) > 8_000
    shares = [(found == 4).mean(), ((found != 4) & (found != labels)).mean(), (found == labels).mean()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.015)
    replaced = found[(found != 4) & (found != labels)]
    assert np.abs(np.histogram(replaced, bins=4, range=(0, 1000))[0] / len(replaced) - 0.25).max() < 0.06


def test_every_place_is_as_likely_as_any_other_and_another_seed_chooses_others() -> None:
    ids = Ragged.from_lengths(
        np.concatenate(
            [np.concatenate([[2], row, [3]]) for row in np.random.default_rng(0).integers(5, 1000, (4000, 20))]
        ),
        np.full(4000, 22),
    )
    first, second = (apply(ids, replace(MASKING, seed=seed)).positions_BM for seed in (0, 1))
    counts = np.bincount(first[first >= 0], minlength=22)[1:21] / 4000
    assert counts == pytest.approx(0.15, abs=0.025)
    # Two independent choices of 3 of 20 are the same once in 1140 rows.
    assert (first == second).all(1).mean() < 0.005


def test_rows_without_words_and_batches_of_such_rows_ask_for_nothing() -> None:
    masked = apply(Ragged.from_lengths(np.array([2, 3, 2, 3]), np.array([2, 2])))
    assert masked.ids_BT.tolist() == [[2, 3], [2, 3]] and (masked.positions_BM == NOTHING).all()


def test_a_store_keeps_it_and_views_of_other_seeds_are_alike() -> None:
    assert Masking.from_capture({"max_length": 64, "masking": MASKING.to_json()}) == MASKING
    assert Masking.from_capture({}) is None
    assert MASKING.alike(replace(MASKING, seed=5)) and not MASKING.alike(replace(MASKING, share=0.2))


@pytest.mark.parametrize(
    "edit",
    [
        5, {"special_ids": 3}, {"special_ids": ["x"]}, {"slots": 1 << 30}, {"share": "x"}, {"share": float("nan")},
        {"vocabulary": 0}, {"seed": 0.5}, {"mask_token_id": -1}, {"more": 1},
    ],
)  # fmt: skip
def test_an_identity_that_was_forged_is_refused(edit: Any) -> None:
    """Tracebacks in most of these, and memory for a billion slots in one."""
    capture = {"max_length": 64, "masking": MASKING.to_json()}
    assert Masking.from_capture(capture) == MASKING
    with pytest.raises(VerificationError, match="how its rows are masked"):
        Masking.from_capture(capture | {"masking": MASKING.to_json() | edit if isinstance(edit, dict) else edit})
