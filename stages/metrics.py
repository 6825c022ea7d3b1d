"""Task metrics: pure functions of arrays. Dimension key: N examples, C classes or labels, W words of all examples.

A task is "single-label" (logits [N, C], labels [N] class indices), "multi-label" (logits [N, C], labels [N, C] of
0 and 1, a logit above 0 predicts the label), "regression" (logits [N, 1] or [N], labels [N]) or "token" (logits [W, C],
NaN of a word that the model did not see; labels `Ragged`, a row of tags per example). Where a metric is
undefined (a correlation with a constant, an F1 without positives) it is 0, so that it can be compared and stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import RefusedError, UsageError, near_match
from ..pipeline.ragged import Ragged
from .entities import tag_metric_names, tag_metrics

Array = NDArray[Any]

MAIN_METRIC = {"single-label": "accuracy", "multi-label": "micro_f1", "regression": "pearson"}
LOWER_IS_BETTER = frozenset({"nll", "ece", "mse"})


def main_metric(task: str, label_names: Sequence[str] = ()) -> str:
    """The metric that picks checkpoints and heads tables: accuracy, micro_f1, pearson, or f1 of entities."""
    return tag_metric_names(label_names)[0] if task == "token" else MAIN_METRIC[task]


def metric_names(task: str, num_classes: int, label_names: Sequence[str] = ()) -> tuple[str, ...]:
    """What `task_metrics` returns for the task, in its order; those of a token task hang on the names of its tags."""
    if task == "token":
        return tag_metric_names(label_names)
    if task == "single-label":
        f1 = ("f1",) if num_classes == 2 else ()
        return ("accuracy", "macro_f1", *f1, "matthews", "ece", "nll")
    if task == "multi-label":
        return ("micro_f1", "macro_f1", "subset_accuracy", "ece", "nll")
    return ("pearson", "spearman", "mse")


def check_metric(name: str, task: str, num_classes: int, label_names: Sequence[str] = ()) -> str:
    """`name`, or a UsageError that lists near matches when the task has no such metric."""
    names = metric_names(task, num_classes, label_names)
    if name not in names:
        raise UsageError(f"{name!r} is not a metric of {task} tasks{near_match(name, names)}")
    return name


def task_metrics(
    task: str, logits_NC: Array, labels: Array | Ragged, label_names: Sequence[str] = ()
) -> dict[str, float]:
    """Every metric of the task, by name: `metric_names` lists them, NLL is in nats.

    Args:
        task: one of the above.
        logits_NC: logits.
        labels: gold labels; none is missing.
        label_names: of a token task.

    Raises:
        RefusedError: no rows, a logit that is not finite, or a label outside the classes.
    """
    if isinstance(labels, Ragged):
        return tag_metrics(_tags(logits_NC, labels), labels, label_names)
    logits_NC, labels = _checked(task, logits_NC, labels)
    if task == "regression":
        predicted_N = logits_NC[:, 0]
        return {
            "pearson": pearson(predicted_N, labels),
            "spearman": spearman(predicted_N, labels),
            "mse": float(np.mean((predicted_N - labels) ** 2)),
        }
    calibration = {"ece": ece(task, logits_NC, labels), "nll": nll(task, logits_NC, labels)}
    predicted = decide(task, logits_NC)
    if task == "multi-label":
        return {
            "micro_f1": micro_f1(predicted, labels),
            "macro_f1": multi_label_macro_f1(predicted, labels),
            "subset_accuracy": float(np.mean((predicted == labels).all(axis=1))),
            **calibration,
        }
    binary = {"f1": f1(predicted, labels)} if logits_NC.shape[1] == 2 else {}
    return {
        "accuracy": accuracy(predicted, labels),
        "macro_f1": macro_f1(predicted, labels),
        **binary,
        "matthews": matthews(predicted, labels),
        **calibration,
    }


def metric(name: str, task: str, logits_NC: Array, labels: Array | Ragged, label_names: Sequence[str] = ()) -> float:
    """One metric of `task_metrics`, without computing the others where that is expensive."""
    if isinstance(labels, Ragged):
        return task_metrics(task, logits_NC, labels, label_names)[name]
    if task == "regression" and name in ("pearson", "spearman"):
        predicted_N = np.asarray(logits_NC, np.float64).reshape(-1)
        return (pearson if name == "pearson" else spearman)(predicted_N, np.asarray(labels, np.float64))
    if name in ("ece", "nll", "mse", "subset_accuracy"):
        return task_metrics(task, logits_NC, labels)[name]
    predicted = decide(task, logits_NC)
    if task == "multi-label":
        return {"micro_f1": micro_f1, "macro_f1": multi_label_macro_f1}[name](predicted, labels)
    return {"accuracy": accuracy, "macro_f1": macro_f1, "f1": f1, "matthews": matthews}[name](predicted, labels)


def agreement(task: str, student_NC: Array, teacher_NC: Array) -> float:
    """Share of decisions on which two models agree; for regression the Pearson correlation of their outputs.

    Of words those count that both saw.
    """
    if task == "regression":
        return pearson(np.asarray(student_NC).reshape(-1), np.asarray(teacher_NC).reshape(-1))
    same: Array = np.equal(decide(task, student_NC), decide(task, teacher_NC))
    if task == "token":
        same = same[np.isfinite(student_NC).all(axis=1) & np.isfinite(teacher_NC).all(axis=1)]
    return float(np.mean(same))


def decide(task: str, logits_NC: Array) -> Array:
    """What the logits predict: class indices [N], 0/1 labels [N, C], or the numbers themselves [N].

    Of words the index of a tag [W], -1 where a word has no logits.
    """
    if task == "token":
        seen_W = np.asarray(np.isfinite(logits_NC).all(axis=1))
        return np.where(seen_W, np.argmax(np.where(seen_W[:, None], logits_NC, 0.0), axis=1), -1)
    if task == "single-label":
        return np.asarray(np.argmax(logits_NC, axis=1))
    if task == "multi-label":
        return (np.asarray(logits_NC) > 0).astype(np.int64)
    return np.asarray(logits_NC).reshape(-1)


def accuracy(predicted_N: Array, labels_N: Array) -> float:
    """Share of equal entries.

    >>> accuracy(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
    0.75
    """
    return float(np.mean(np.asarray(predicted_N) == np.asarray(labels_N)))


def f1(predicted_N: Array, labels_N: Array, positive: int = 1) -> float:
    """F1 of one class of a single-label task: the harmonic mean of its precision and recall.

    >>> f1(np.array([1, 1, 0]), np.array([1, 0, 0])) == 2 / 3
    True
    """
    return _f1(np.asarray(predicted_N) == positive, np.asarray(labels_N) == positive)


def macro_f1(predicted_N: Array, labels_N: Array) -> float:
    """Mean F1 over the classes that occur among labels or predictions (as in scikit-learn)."""
    predicted_N, labels_N = np.asarray(predicted_N), np.asarray(labels_N)
    classes = np.union1d(predicted_N, labels_N)
    return float(np.mean([f1(predicted_N, labels_N, positive=c) for c in classes]))


def micro_f1(predicted_NC: Array, labels_NC: Array) -> float:
    """F1 over all entries of a multi-label task together."""
    return _f1(np.asarray(predicted_NC) > 0, np.asarray(labels_NC) > 0)


def multi_label_macro_f1(predicted_NC: Array, labels_NC: Array) -> float:
    """Mean over labels of their F1; a label that neither occurs nor is predicted counts 0 (as in scikit-learn)."""
    predicted_NC, labels_NC = np.asarray(predicted_NC) > 0, np.asarray(labels_NC) > 0
    return float(np.mean([_f1(predicted_NC[:, c], labels_NC[:, c]) for c in range(labels_NC.shape[1])]))


def matthews(predicted_N: Array, labels_N: Array) -> float:
    """Matthews correlation for any number of classes (Gorodkin, 2004), from -1 to 1.

    >>> matthews(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0]))
    -1.0
    """
    predicted_N, labels_N = np.asarray(predicted_N), np.asarray(labels_N)
    classes = np.union1d(predicted_N, labels_N)
    true = np.array([np.sum(labels_N == c) for c in classes], np.float64)
    chosen = np.array([np.sum(predicted_N == c) for c in classes], np.float64)
    num = float(len(labels_N))
    correct = float(np.sum(predicted_N == labels_N))
    spread = (num**2 - chosen @ chosen) * (num**2 - true @ true)
    return float((correct * num - chosen @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted_N: Array, labels_N: Array) -> float:
    """Linear correlation, from -1 to 1; 0 when either side is constant.

    >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 6)
    1.0
    """
    predicted_N, labels_N = np.asarray(predicted_N, np.float64), np.asarray(labels_N, np.float64)
    if len(predicted_N) < 2 or np.ptp(predicted_N) == 0 or np.ptp(labels_N) == 0:
        return 0.0
    predicted_N, labels_N = predicted_N - predicted_N.mean(), labels_N - labels_N.mean()
    norm = np.linalg.norm(predicted_N) * np.linalg.norm(labels_N)
    return float(np.clip(predicted_N @ labels_N / norm, -1.0, 1.0)) if norm > 0 else 0.0


def spearman(predicted_N: Array, labels_N: Array) -> float:
    """Rank correlation, from -1 to 1; ties take their mean rank; 0 when either side is constant."""
    return pearson(_mean_ranks(predicted_N), _mean_ranks(labels_N))


def nll(task: str, logits_NC: Array, labels: Array) -> float:
    """Mean negative log-likelihood of the labels in nats, per example (per entry for multi-label)."""
    logits_NC = np.asarray(logits_NC, np.float64)
    if task == "multi-label":
        return float(np.mean(np.logaddexp(0.0, logits_NC) - np.asarray(labels) * logits_NC))
    labels_N = np.asarray(labels, np.int64)
    return float(-np.mean(log_softmax(logits_NC)[np.arange(len(labels_N)), labels_N]))


def ece(task: str, logits_NC: Array, labels: Array, num_bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over bins of equal width (Guo et al., 2017).

    Confidence is the probability of the predicted class, or of each decision for multi-label.
    """
    logits_NC = np.asarray(logits_NC, np.float64)
    if task == "multi-label":
        confidence = (1.0 / (1.0 + np.exp(-np.abs(logits_NC)))).reshape(-1)
    else:
        confidence = np.exp(log_softmax(logits_NC).max(axis=1))
    correct = (decide(task, logits_NC) == np.asarray(labels)).reshape(-1)
    # Bins are open on the left, so a confidence of exactly 1 falls into the last one.
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, confidence - correct, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def log_softmax(logits_NC: Array) -> NDArray[np.float64]:
    """Log-probabilities [N, C], float64, stable for any finite logits."""
    logits_NC = np.asarray(logits_NC, np.float64)
    shifted = logits_NC - logits_NC.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _f1(predicted: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    total = float(predicted.sum() + labels.sum())
    return float(2.0 * np.sum(predicted & labels) / total) if total else 0.0


def _mean_ranks(values_N: Array) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values_N), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]


def _tags(logits_WC: Array, gold: Ragged) -> Ragged:
    """The tags that logits predict, beside the gold ones."""
    if not len(gold.values):
        raise RefusedError("there is no labelled row to score")
    logits = np.asarray(logits_WC, np.float64)
    assert len(logits) == len(gold.values), f"{len(logits)} rows of logits for {len(gold.values)} words"
    bad = np.flatnonzero(np.isinf(logits).any(axis=1) | (np.isnan(logits).any(axis=1) & ~np.isnan(logits).all(axis=1)))
    if len(bad):
        raise RefusedError(
            f"the model gives logits that are not finite for {len(bad)} of {len(logits)} words",
            details={"first word": int(bad[0]), "its logits": logits[bad[0]][:8].tolist()},
            fix="the model has diverged or overflows: train it again with a lower --learning-rate, or in float32",
        )
    if gold.values.min() < 0 or gold.values.max() >= logits.shape[1]:
        raise RefusedError(
            f"tags reach from {gold.values.min()} to {gold.values.max()}; the model has {logits.shape[1]} classes",
            fix="give the dataset the model was trained for",
        )
    return Ragged(np.asarray(decide("token", logits)), gold.offsets)


def _checked(task: str, logits_NC: Array, labels: Array) -> tuple[NDArray[np.float64], Array]:
    logits = np.asarray(logits_NC, np.float64)
    labels = np.asarray(labels)
    if len(labels) == 0:
        raise RefusedError("there is no labelled row to score")
    logits = logits.reshape(len(logits), -1)
    assert len(logits) == len(labels), f"{len(logits)} rows of logits for {len(labels)} labels"
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad_rows):
        raise RefusedError(
            f"the model gives logits that are not finite for {len(bad_rows)} of {len(logits)} rows",
            details={"first row": int(bad_rows[0]), "its logits": logits[bad_rows[0]][:8].tolist()},
            fix="the model has diverged or overflows: train it again with a lower --learning-rate, or in float32",
        )
    num_classes = logits.shape[1]
    if task == "single-label" and not (labels.min() >= 0 and labels.max() < num_classes):
        raise RefusedError(
            f"labels reach from {labels.min()} to {labels.max()}; the model has {num_classes} classes",
            fix="give the dataset the model was trained for",
        )
    if task == "multi-label" and labels.shape != logits.shape:
        raise RefusedError(f"labels have shape {labels.shape}, the model's logits {logits.shape}")
    return logits, labels
