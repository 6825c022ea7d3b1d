"""A table reduced to the rows that training reaches trains exactly as the whole one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kd.stages.train_student.seen_rows import SeenRows


def table(padding_idx: int | None = 0) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(40, 6, padding_idx=padding_idx)


SEEN = np.array([0, 3, 7, 8, 21])


def test_every_id_gives_its_row_seen_or_not() -> None:
    whole = table()
    reduced = SeenRows(whole, SEEN)
    ids = torch.arange(40).reshape(4, 10)
    assert torch.equal(reduced(ids), whole(ids))
    assert torch.equal(reduced.full().weight, whole.weight)


@pytest.mark.parametrize("padding_idx", [0, None, 30])
def test_training_moves_the_same_rows_by_the_same_amounts(padding_idx: int | None) -> None:
    whole = table(padding_idx)
    reduced = SeenRows(whole, SEEN)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.0) for m in (whole, reduced)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        ids = torch.from_numpy(SEEN)[torch.randint(0, len(SEEN), (3, 4), generator=generator)]
        for module, optimizer in zip((whole, reduced), optimizers, strict=True):
            optimizer.zero_grad()
            module(ids).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(reduced.full().weight, whole.weight, atol=1e-6, rtol=1e-6)
    assert reduced.full().padding_idx == padding_idx
    assert sum(p.numel() for p in reduced.parameters()) == len(SEEN) * 6


def test_a_checkpoint_holds_the_seen_rows_alone() -> None:
    assert {name: tuple(value.shape) for name, value in SeenRows(table(), SEEN).state_dict().items()} == {
        "weight": (5, 6)
    }
