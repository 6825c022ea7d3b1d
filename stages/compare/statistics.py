"""Means, shares of the gap and paired intervals: pure functions of arrays.

Dimension key: N examples, C classes, W words of all examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...pipeline.ragged import Ragged, ranges
from ..entities import BioTags
from ..metrics import LOWER_IS_BETTER, decide, metric


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation (None for one value).

    >>> mean_and_deviation([0.5])
    (0.5, None)
    """
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), deviation


def share_of_gap(value: float, baseline: float, teacher: float, *, metric_name: str) -> float | None:
    """`(value - baseline) / (teacher - baseline)`; None where the teacher is no better than the baseline.

    >>> round(share_of_gap(0.83, 0.72, 0.86, metric_name="accuracy"), 3)
    0.786
    """
    gap = teacher - baseline
    better = gap < 0 if metric_name in LOWER_IS_BETTER else gap > 0
    return (value - baseline) / gap if better and abs(gap) > 1e-9 else None


def paired_bootstrap(
    metric_name: str,
    task: str,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    labels: np.ndarray | Ragged,
    *,
    samples: int,
    seed: int,
    confidence: float = 0.95,
    label_names: Sequence[str] = (),
) -> tuple[float, float]:
    """Interval of mean metric of `first` minus that of `second`, over resamples of the examples.

    Every resample takes the same examples for all models; seeds are averaged inside it, so the interval speaks of
    the split and not of the seeds.

    Args:
        metric_name: any of `metrics.metric_names`.
        task: of the models.
        first, second: logits [N, C] per seed; of words [W, C].
        labels: of the N examples.
        samples: number of resamples.
        seed: of the resampling.
        confidence: share of the resamples inside the interval.
        label_names: of a token task.
    """
    generator = np.random.default_rng(seed)
    num = len(labels)
    if isinstance(labels, Ragged) and (metric_name == "accuracy" or BioTags.of(label_names)):
        counted = [
            np.stack([tag_counts(metric_name, logits, labels, label_names) for logits in side])
            for side in (first, second)
        ]
        gains = np.empty(samples)
        for index in range(samples):
            rows = generator.integers(0, num, num)
            means = [np.mean([_share(counts[rows].sum(axis=0)) for counts in side]) for side in counted]
            gains[index] = means[0] - means[1]
    elif metric_name == "accuracy":
        # A mean over examples: resampling it is resampling one number per example.
        assert not isinstance(labels, Ragged)
        gain_N = _mean_correct(first, labels) - _mean_correct(second, labels)
        differences = [
            gain_N[generator.integers(0, num, (min(100, samples - start), num))].mean(axis=1)
            for start in range(0, samples, 100)
        ]
        gains = np.concatenate(differences)
    else:
        gains = np.empty(samples)
        for index in range(samples):
            rows = generator.integers(0, num, num)
            gold: np.ndarray | Ragged
            if isinstance(labels, Ragged):
                gold, rows = labels.take(rows), ranges(labels.offsets[:-1][rows], labels.lengths[rows])
            else:
                gold = labels[rows]
            means = [
                np.mean([metric(metric_name, task, logits[rows], gold, label_names) for logits in side])
                for side in (first, second)
            ]
            gains[index] = means[0] - means[1]
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains, [tail, 1 - tail])
    return float(low), float(high)


def _mean_correct(logits: Sequence[np.ndarray], labels_N: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean([decide("single-label", logits_NC) == labels_N for logits_NC in logits], axis=0))


def tag_counts(metric_name: str, logits_WC: np.ndarray, gold: Ragged, label_names: Sequence[str]) -> np.ndarray:
    """int64 [N, 2] per example a share's numerator and denominator, whose sums over examples give the metric.

    Of entities those of F1, precision or recall: right ones (twice, for F1) over those that are predicted, there, or
    both; else words with the right tag over all words. A word without logits counts as `O`.
    """
    predicted_W = decide("token", logits_WC)
    bio = BioTags.of(label_names)
    if bio is not None:
        predicted_W = np.where(predicted_W < 0, bio.outside, predicted_W)
    row_W, num = np.repeat(np.arange(len(gold)), gold.lengths), len(gold)
    if bio is None or metric_name == "accuracy":
        right_N = np.bincount(row_W, predicted_W == gold.values, minlength=num)
        return np.stack([right_N, gold.lengths], axis=1).astype(np.int64)
    found, wanted = (bio.spans(tags) for tags in (Ragged(predicted_W, gold.offsets), gold))
    in_both = {*zip(*wanted, strict=True)} & {*zip(*found, strict=True)}
    right_N = np.bincount(row_W[np.array([start for start, _, _ in in_both], np.int64)], minlength=num)
    found_N, wanted_N = (np.bincount(row_W[starts], minlength=num) for starts in (found[0], wanted[0]))
    shares = {"f1": (2 * right_N, found_N + wanted_N), "precision": (right_N, found_N), "recall": (right_N, wanted_N)}
    return np.stack(shares[metric_name], axis=1).astype(np.int64)


def _share(counts_2: np.ndarray) -> float:
    return float(counts_2[0] / counts_2[1]) if counts_2[1] else 0.0
