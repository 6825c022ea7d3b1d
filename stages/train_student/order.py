"""The order in which rows are trained on: one global order from seed and epoch, independent of ranks.

Dimension key: N rows, G rows of one optimiser step over all ranks and accumulated forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...pipeline.errors import UsageError
from ..shuffled_batches import length_grouped_batches


@dataclass(frozen=True)
class BatchOrder:
    """Which rows every forward pass of a training run reads.

    An epoch is N // G optimiser steps of exactly G rows of similar length; the N mod G rows left over are others in
    each epoch. A step is cut into one slice per accumulated forward pass and rank, so the rows of a step, and with
    them the loss curve, depend on neither. Everything follows from the fields: a run resumes by its step number.

    Attributes:
        rows: ints [N] rows to train on; any width, and nothing of their number is kept beside them.
        lengths: ints [N] tokens of each of them.
        batch_size: rows per rank and forward pass.
        accumulation: forward passes per optimiser step.
        num_ranks, rank: how many processes share a step, and which one this is.
        seed: of the run.
        first_epoch: epochs that earlier phases have begun: this one goes on with others.
    """

    rows: np.ndarray
    lengths: np.ndarray
    batch_size: int
    accumulation: int = 1
    num_ranks: int = 1
    rank: int = 0
    seed: int = 0
    first_epoch: int = 0

    def __post_init__(self) -> None:
        if len(self.rows) < self.num_slices:
            raise UsageError(
                f"{len(self.rows)} rows to train on cannot be shared by {self.num_ranks} processes with "
                f"{self.accumulation} forward passes per step",
                fix="fewer processes, or a smaller --gradient-accumulation-steps",
            )

    @property
    def num_slices(self) -> int:
        """Slices of one optimiser step."""
        return self.accumulation * self.num_ranks

    @property
    def rows_per_step(self) -> int:
        """G; less than asked for where there are fewer rows."""
        return rows_per_step(len(self.rows), self.batch_size, self.num_slices)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, at least 1."""
        return len(self.rows) // self.rows_per_step

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """The rows [G] of every optimiser step of an epoch, over all ranks, from a step on."""
        epoch += self.first_epoch
        batches = length_grouped_batches(
            self.lengths, batch_size=self.rows_per_step, seed=self.seed, epoch=epoch, first=first_step
        )
        for _, batch in zip(range(first_step, self.steps_per_epoch), batches, strict=False):
            yield self.rows[batch]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """The rows of this rank's forward passes, from a step of the epoch on."""
        for step in self.steps(epoch, first_step):
            yield from step.reshape(self.accumulation, self.num_ranks, -1)[:, self.rank]


def rows_per_step(num_rows: int, batch_size: int, num_slices: int) -> int:
    """Rows of an optimiser step that is cut into so many slices of at most `batch_size` rows."""
    return min(batch_size * num_slices, num_rows // num_slices * num_slices)
