from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError, UsageError
from kd.stages import metrics

sklearn = pytest.importorskip("sklearn.metrics")


@st.composite
def single_label(draw):
    num_classes = draw(st.integers(2, 6))
    num = draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = generator.integers(0, draw(st.integers(1, num_classes)), num)
    return generator.normal(size=(num, num_classes)) * 3, labels


@settings(max_examples=150, deadline=None)
@given(single_label())
def test_single_label_metrics_equal_scikit_learn(case) -> None:
    logits, labels = case
    found = metrics.task_metrics("single-label", logits, labels)
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro", zero_division=0))
    assert found["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["nll"] == pytest.approx(sklearn.log_loss(labels, probs, labels=range(logits.shape[1])))
    if logits.shape[1] == 2:
        assert found["f1"] == pytest.approx(sklearn.f1_score(labels, predicted, zero_division=0))
    assert tuple(found) == metrics.metric_names("single-label", logits.shape[1])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5))
def test_multi_label_metrics_equal_scikit_learn(seed: int, num: int, num_labels: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num, num_labels))
    labels = (generator.random((num, num_labels)) < 0.3).astype(np.float32)
    found = metrics.task_metrics("multi-label", logits, labels)
    predicted = (logits > 0).astype(int)
    # scikit-learn reads one column as a binary single-label task, so one column is compared by hand.
    if num_labels > 1:
        expected = sklearn.f1_score(labels, predicted, average="micro", zero_division=0)
        assert found["micro_f1"] == pytest.approx(expected)
        expected = sklearn.f1_score(labels, predicted, average="macro", zero_division=0)
        assert found["macro_f1"] == pytest.approx(expected)
        assert found["subset_accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    else:
        assert found["micro_f1"] == pytest.approx(sklearn.f1_score(labels[:, 0], predicted[:, 0], zero_division=0))
    probs = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(probs) + (1 - labels) * np.log(1 - probs))
    assert found["nll"] == pytest.approx(expected)
    assert tuple(found) == metrics.metric_names("multi-label", num_labels)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=40))
def test_correlations_equal_scipy_ties_included(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = np.array(pairs, float).T
    found = metrics.task_metrics("regression", x[:, None], y)
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    assert found["pearson"] == pytest.approx(0.0 if constant else stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(0.0 if constant else stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    ("predicted", "labels"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [5.0, 5.0]), ([1.0], [2.0])]
)
def test_a_correlation_with_a_constant_is_zero_and_not_nan(predicted: list[float], labels: list[float]) -> None:
    assert metrics.pearson(np.array(predicted), np.array(labels)) == 0.0
    assert metrics.spearman(np.array(predicted), np.array(labels)) == 0.0


def test_a_nearly_constant_prediction_does_not_leave_the_range() -> None:
    x = 1e8 + np.array([0.0, 1e-8, 2e-8])
    assert -1.0 <= metrics.pearson(x, np.array([1.0, 2.0, 3.0])) <= 1.0


def test_ece_by_hand() -> None:
    # Two examples at confidence 3/4, one right and one wrong; two at 1/2 + a little, both right.
    low, high = math.log(0.51 / 0.49), math.log(3.0)
    logits = np.array([[high, 0.0], [high, 0.0], [low, 0.0], [low, 0.0]])
    labels = np.array([0, 1, 0, 0])
    expected = 0.5 * abs(0.75 - 0.5) + 0.5 * abs(0.51 - 1.0)
    assert metrics.ece("single-label", logits, labels, num_bins=10) == pytest.approx(expected)


def test_a_certain_and_right_model_is_calibrated() -> None:
    assert metrics.ece("single-label", np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 1])) == 0.0


def test_adding_a_constant_to_the_logits_of_a_row_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 4)), generator.integers(0, 4, 50)
    shifted = logits + generator.normal(size=(50, 1)) * 100
    before = metrics.task_metrics("single-label", logits, labels)
    assert metrics.task_metrics("single-label", shifted, labels) == pytest.approx(before, abs=1e-9)


def test_huge_logits_give_finite_figures() -> None:
    found = metrics.task_metrics("single-label", np.array([[1e6, -1e6], [1e6, -1e6]]), np.array([0, 1]))
    assert found["nll"] == pytest.approx(1e6)
    assert all(math.isfinite(value) for value in found.values())
    found = metrics.task_metrics("multi-label", np.array([[1e6, -1e6]]), np.array([[0, 1]]))
    assert found["nll"] == pytest.approx(1e6)


def test_one_class_alone_is_scored() -> None:
    found = metrics.task_metrics("single-label", np.zeros((3, 1)), np.zeros(3, int))
    assert found["accuracy"] == 1.0
    assert found["matthews"] == 0.0
    assert found["nll"] == 0.0


def test_nan_logits_are_refused_with_the_row() -> None:
    logits = np.zeros((4, 2))
    logits[2, 1] = np.nan
    with pytest.raises(RefusedError, match="1 of 4 rows") as raised:
        metrics.task_metrics("single-label", logits, np.zeros(4, int))
    assert "first row: 2" in str(raised.value)


def test_no_rows_are_refused() -> None:
    with pytest.raises(RefusedError, match="no labelled row"):
        metrics.task_metrics("single-label", np.zeros((0, 2)), np.zeros(0, int))


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    with pytest.raises(RefusedError, match="2 classes"):
        metrics.task_metrics("single-label", np.zeros((2, 2)), np.array([0, label]))


@pytest.mark.parametrize("task", ["single-label", "multi-label", "regression"])
def test_one_metric_equals_its_entry_among_all(task: str) -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(40, 2 if task != "regression" else 1))
    labels = {
        "single-label": generator.integers(0, 2, 40),
        "multi-label": generator.integers(0, 2, (40, 2)),
        "regression": generator.normal(size=40),
    }[task]
    for name, value in metrics.task_metrics(task, logits, labels).items():
        assert metrics.metric(name, task, logits, labels) == pytest.approx(value)


def test_agreement_counts_equal_decisions() -> None:
    ones, other = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([[5.0, 1.0], [3.0, 1.0]])
    assert metrics.agreement("single-label", ones, other) == 0.5
    assert metrics.agreement("multi-label", ones, other) == 0.75
    assert metrics.agreement("regression", np.array([[1.0], [2.0]]), np.array([[10.0], [20.0]])) == pytest.approx(1.0)


def test_an_unknown_metric_lists_near_matches() -> None:
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        metrics.check_metric("acuracy", "single-label", 3)
