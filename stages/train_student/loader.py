"""Batches gathered ahead of the training step, and how long the step had to wait for them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from .order import BatchOrder
from .rows import Batch, Rows

BATCHES_AHEAD = 4


class BatchLoader:
    """What the `Trainer` iterates over in training: one pass of it is one epoch.

    Threads gather the next batches while a step computes; they run numpy alone, which lets go of the interpreter while
    it copies, and never touch a random generator.

    Attributes:
        dataset: the rows, as the `Trainer` looks for them.
        wait_s: seconds that training has waited for batches so far.

    Args:
        rows: what batches are made of.
        order: which rows make a batch.
        first_step: optimiser steps that an interrupted run has done.
        last_step: optimiser steps in all; a run that was interrupted after them gets no batch.
        threads: how many gather ahead; 0 gathers when a batch is asked for.
        pinned: as `gather_ahead` takes it.
    """

    def __init__(
        self,
        rows: Rows,
        order: BatchOrder,
        *,
        first_step: int = 0,
        last_step: int | None = None,
        threads: int = 1,
        pinned: bool = False,
    ) -> None:
        self.dataset = rows
        self.order = order
        self.pinned = pinned
        self.wait_s = 0.0
        self._first_step, self._last_step = first_step, last_step
        self._epoch = first_step // order.steps_per_epoch
        self._threads = threads

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.order.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Called by the `Trainer` before each pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        done_epochs, done_steps = divmod(self._first_step, self.order.steps_per_epoch)
        skipped = done_steps if self._epoch == done_epochs else 0
        batches = self.order.batches(self._epoch, skipped)
        if self._last_step is not None:
            left = self._last_step - self._epoch * self.order.steps_per_epoch - skipped
            batches = itertools.islice(batches, max(left, 0) * self.order.accumulation)
        gathered = gather_ahead(self.dataset, batches, threads=self._threads, pinned=self.pinned)
        try:
            while True:
                started = time.perf_counter()
                try:
                    batch = next(gathered)
                except StopIteration:
                    return
                finally:
                    self.wait_s += time.perf_counter() - started
                yield batch
        finally:
            gathered.close()


def gather_ahead(
    rows: Rows, batches: Iterable[np.ndarray], *, threads: int = 1, pinned: bool = False
) -> Generator[Batch, None, None]:
    """The batches in their order, some gathered before they are asked for.

    Args:
        rows: what they are made of.
        batches: the rows of each.
        threads: how many gather; 0 gathers when a batch is asked for.
        pinned: whether tensors are put into memory that a GPU copies from by itself. torch keeps such memory and hands
            it out again, never before the copies from it are done.
    """

    def gather(index: np.ndarray) -> Batch:
        batch = rows.batch(index)
        return _pinned(batch) if pinned else batch

    if threads <= 0:
        yield from map(gather, batches)
        return
    queue: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="kd-gather") as pool:
        try:
            for index in batches:
                queue.append(pool.submit(gather, index))
                if len(queue) >= BATCHES_AHEAD * threads:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def _pinned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _pinned(each) for name, each in value.items()}
    return value.pin_memory() if isinstance(value, Tensor) else value
