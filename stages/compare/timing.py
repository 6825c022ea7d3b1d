"""CPU latency and throughput of several models, measured so that they can be compared.

One thread, one core, models taking turns text by text: whatever else the machine does, it does to all of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...pipeline.stage import Progress
from ..predict import Predictor

WARM_UP = 10
ROUNDS = 3
THROUGHPUT_ROWS = 256
THROUGHPUT_BATCH = 32


@dataclass(frozen=True)
class Speed:
    """Of one model on one CPU thread, tokenising included.

    Attributes:
        p50_s, p95_s: median and 95th percentile of a call with one text.
        rows_per_s: of calls with 256 texts in batches of 32, the median of 3.
    """

    p50_s: float
    p95_s: float
    rows_per_s: float


def measure_speed(
    models: Mapping[str, Predictor],
    texts_a: Sequence[str],
    texts_b: Sequence[str] | None,
    *,
    num_texts: int,
    seed: int,
    progress: Progress,
) -> dict[str, Speed]:
    """Speed by model name, on texts drawn from those given."""
    chosen = np.random.default_rng(seed).permutation(len(texts_a))
    single = [(texts_a[row], None if texts_b is None else texts_b[row]) for row in chosen[:num_texts]]
    many = chosen[:THROUGHPUT_ROWS]
    many_a, many_b = [texts_a[row] for row in many], None if texts_b is None else [texts_b[row] for row in many]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rates: dict[str, list[float]] = {name: [] for name in models}
    task = progress.task("timing", total=len(single) + ROUNDS, unit="rounds")
    with _one_quiet_thread():
        for name, model in models.items():
            assert model.device.type == "cpu", f"{name} is on {model.device}"
            for index in range(WARM_UP):
                model.seconds_for(*single[index % len(single)])
        for text_a, text_b in single:
            for name, model in models.items():
                seconds[name].append(model.seconds_for(text_a, text_b))
            task.advance(1)
        for _ in range(ROUNDS):
            for name, model in models.items():
                start = time.perf_counter()
                model.predict(many_a, many_b, batch_size=THROUGHPUT_BATCH)
                rates[name].append(len(many) / (time.perf_counter() - start))
            task.advance(1)
    task.done()
    return {
        name: Speed(
            p50_s=float(np.percentile(seconds[name], 50)),
            p95_s=float(np.percentile(seconds[name], 95)),
            rows_per_s=float(np.median(rates[name])),
        )
        for name in models
    }


@contextlib.contextmanager
def _one_quiet_thread() -> Iterator[None]:
    """One thread on one core, no garbage collection; everything as before afterwards."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    collecting = gc.isenabled()
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
