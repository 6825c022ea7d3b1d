"""Means, shares of the gap and paired intervals: pure functions of arrays. Dimension key: N examples, C classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    labels: np.ndarray,
    *,
    samples: int,
    seed: int,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of mean metric of `first` minus that of `second`, over resamples of the examples.

    Every resample takes the same examples for all models; seeds are averaged inside it, so the interval speaks of
    the split and not of the seeds.

    Args:
        metric_name: any of `metrics.metric_names`.
        task: of the models.
        first, second: logits [N, C] per seed.
        labels: of the N examples.
        samples: number of resamples.
        seed: of the resampling.
        confidence: share of the resamples inside the interval.
    """
    generator = np.random.default_rng(seed)
    num = len(labels)
    if metric_name == "accuracy":
        # A mean over examples: resampling it is resampling one number per example.
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
            means = [
                np.mean([metric(metric_name, task, logits[rows], labels[rows]) for logits in side])
                for side in (first, second)
            ]
            gains[index] = means[0] - means[1]
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains, [tail, 1 - tail])
    return float(low), float(high)


def _mean_correct(logits: Sequence[np.ndarray], labels_N: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean([decide("single-label", logits_NC) == labels_N for logits_NC in logits], axis=0))
