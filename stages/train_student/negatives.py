"""Rows that a contrastive method compares a batch with: drawn for every step, their teacher signals read anew."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .order import BatchOrder
from .rows import Rows


class NegativeRows:
    """Signals of rows drawn at random for a step: from seed, phase and step alone, so alike on all ranks and resumes.

    Args:
        rows: with the signals.
        order: which of them are trained on, and the seed.
        count: how many to draw; all, where there are fewer.
    """

    def __init__(self, rows: Rows, order: BatchOrder, count: int) -> None:
        self._rows, self._order = rows, order
        self._count = min(count, len(order.rows))
        self._step = -1
        self._drawn: Mapping[str, torch.Tensor] = {}

    def drawn(self, step: int, device: torch.device | str) -> Mapping[str, torch.Tensor]:
        """Signals of one entry per row, [K, ...] by name; those of a step's forward passes are the same."""
        if step != self._step:
            generator = np.random.default_rng((0x6E6567, self._order.seed, step, self._order.first_epoch))
            places = generator.choice(len(self._order.rows), self._count, replace=False)
            found = self._rows.sentence_signals(np.sort(self._order.rows[places]))
            self._drawn = {name: values.to(device) for name, values in found.items()}
            self._step = step
        return self._drawn
