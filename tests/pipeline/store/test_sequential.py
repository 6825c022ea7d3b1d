"""The sequential test: when it stops, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from kd.pipeline.store.sequential import SequentialTest


def rows_until_decided(share: float, seed: int) -> tuple[int, bool | None]:
    test, random = SequentialTest(0.05), np.random.default_rng(seed)
    for row in range(2000):
        test.add(bool(random.random() < share))
        if test.verdict is not None:
            return row + 1, test.verdict
    return 2000, None


def test_good_rows_alone_decide_it_within_64() -> None:
    assert rows_until_decided(0.0, 0) == (59, True)
    assert SequentialTest(0.05).rows_needed == 59
    assert SequentialTest(0.01).rows_needed == 299


def test_bad_rows_alone_decide_it_at_once() -> None:
    assert rows_until_decided(1.0, 0) == (1, False)


@pytest.mark.parametrize(("share", "wrong"), [(0.05, True), (0.001, False)])
def test_either_statement_is_wrong_in_at_most_one_case_of_twenty(share: float, wrong: bool) -> None:
    verdicts = [rows_until_decided(share, seed)[1] for seed in range(600)]
    # Three standard deviations of 600 draws above 5 %.
    assert verdicts.count(wrong) / 600 <= 0.05 + 3 * (0.05 * 0.95 / 600) ** 0.5


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.0001 to 0\.5"):
        SequentialTest(0.9)
