from __future__ import annotations

import numpy as np
import pytest

from kd.pipeline.ragged import Ragged
from kd.stages.compare.statistics import mean_and_deviation, paired_bootstrap, share_of_gap, tag_counts
from kd.stages.metrics import task_metrics


def one_hot(predicted: np.ndarray, num: int = 2) -> np.ndarray:
    return np.eye(num)[predicted]


def test_shares_of_the_gap_by_hand() -> None:
    assert share_of_gap(0.8, 0.6, 0.9, metric_name="accuracy") == pytest.approx(2 / 3)
    assert share_of_gap(0.5, 0.6, 0.9, metric_name="accuracy") == pytest.approx(-1 / 3)
    assert share_of_gap(0.95, 0.6, 0.9, metric_name="accuracy") == pytest.approx(7 / 6)
    assert share_of_gap(0.5, 0.8, 0.3, metric_name="nll") == pytest.approx(0.6)


@pytest.mark.parametrize(("teacher", "name"), [(0.6, "accuracy"), (0.5, "accuracy"), (0.7, "nll")])
def test_there_is_no_share_of_a_gap_that_is_not_there(teacher: float, name: str) -> None:
    assert share_of_gap(0.8, 0.6, teacher, metric_name=name) is None


def test_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_the_interval_holds_the_difference_and_narrows_with_the_rows() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for num in (200, 20_000):
        labels = generator.integers(0, 2, num)
        good = np.where(generator.random(num) < 0.9, labels, 1 - labels)
        bad = np.where(generator.random(num) < 0.8, labels, 1 - labels)
        low, high = paired_bootstrap(
            "accuracy", "single-label", [one_hot(good)], [one_hot(bad)], labels, samples=500, seed=0
        )
        assert low <= (good == labels).mean() - (bad == labels).mean() <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_equal_models_differ_by_exactly_nothing() -> None:
    labels = np.array([0, 1] * 50)
    same = [one_hot(np.zeros(100, int))]
    for name in ("accuracy", "macro_f1"):
        found = paired_bootstrap(name, "single-label", same, same, labels, samples=100, seed=0)
        assert found == (0.0, 0.0)


def test_the_short_way_for_accuracy_equals_the_general_one() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 300)
    first = [generator.normal(size=(300, 2)) + one_hot(labels) for _ in range(3)]
    second = [generator.normal(size=(300, 2)) for _ in range(2)]
    quick = paired_bootstrap("accuracy", "single-label", first, second, labels, samples=3000, seed=0)
    # Accuracy is micro F1 of one-hot decisions; subset accuracy takes the general way.
    general = paired_bootstrap(
        "subset_accuracy",
        "multi-label",
        [np.where(one_hot(logits.argmax(1)) > 0, 1.0, -1.0) for logits in first],
        [np.where(one_hot(logits.argmax(1)) > 0, 1.0, -1.0) for logits in second],
        one_hot(labels),
        samples=600,
        seed=1,
    )
    np.testing.assert_allclose(quick, general, atol=0.02)


def test_constant_predictions_have_an_interval_for_correlations() -> None:
    generator = np.random.default_rng(0)
    labels = generator.normal(size=80)
    low, high = paired_bootstrap(
        "pearson", "regression", [labels[:, None]], [np.ones((80, 1))], labels, samples=100, seed=0
    )
    assert low == pytest.approx(1.0) and high == pytest.approx(1.0)


BIO = ("O", "B-A", "I-A", "B-B", "I-B")


def tagged(seed: int) -> tuple[np.ndarray, np.ndarray, Ragged]:
    """(logits of a good model, of a bad one, gold tags) of 60 rows; some words were not seen."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, 60)
    gold = generator.integers(0, 5, lengths.sum())
    sides = []
    for share in (0.9, 0.6):
        predicted = np.where(generator.random(len(gold)) < share, gold, generator.integers(0, 5, len(gold)))
        logits = one_hot(predicted, 5)
        logits[generator.random(len(gold)) < 0.03] = np.nan
        sides.append(logits)
    return sides[0], sides[1], Ragged.from_lengths(gold, lengths)


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "accuracy"])
def test_counts_of_rows_add_up_to_the_metric_of_words(name: str) -> None:
    good, bad, gold = tagged(0)
    values = []
    for logits in (good, bad):
        right, of = tag_counts(name, logits, gold, BIO).sum(axis=0)
        values.append(task_metrics("token", logits, gold, BIO)[name])
        assert right / of == pytest.approx(values[-1], abs=1e-12)
    low, high = paired_bootstrap(name, "token", [good], [bad], gold, samples=200, seed=0, label_names=BIO)
    assert low < values[0] - values[1] < high and low > 0


def test_tags_that_are_not_bio_are_resampled_by_row_too() -> None:
    good, bad, gold = tagged(1)
    names = tuple("abcde")
    for name in ("accuracy", "macro_f1"):
        gain = [task_metrics("token", logits, gold, names)[name] for logits in (good, bad)]
        low, high = paired_bootstrap(name, "token", [good], [bad], gold, samples=100, seed=0, label_names=names)
        assert low < gain[0] - gain[1] < high and low > 0
