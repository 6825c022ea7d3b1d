"""Rows that a contrastive method compares with, and layers that are drawn: the same on all ranks and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.stages.train_student import TrainStudent
from kd.stages.train_student.negatives import NegativeRows
from kd.stages.train_student.order import BatchOrder
from kd.stages.train_student.trainer import Distillation


class RowsByNumber:
    """Rows whose only signal is their number."""

    def __init__(self) -> None:
        self.gathered: list[np.ndarray] = []

    def sentence_signals(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        self.gathered.append(index)
        return {"logits": torch.from_numpy(index[:, None].astype(np.float32))}


def order(**fields: Any) -> BatchOrder:
    rows = np.arange(100, 150)
    return BatchOrder(**{"rows": rows, "lengths": np.full(50, 4), "batch_size": 8, "seed": 3, **fields})


def numbers(drawn: Any) -> list[int]:
    return [int(number) for number in drawn["logits"][:, 0]]


def test_rows_are_drawn_by_seed_and_step_alike_on_all_ranks() -> None:
    whole = NegativeRows(RowsByNumber(), order(), 12)  # type: ignore[arg-type]
    second = NegativeRows(RowsByNumber(), order(num_ranks=2, rank=1, batch_size=4), 12)  # type: ignore[arg-type]
    steps = [numbers(whole.drawn(step, "cpu")) for step in range(5)]
    # A run that goes on at step 3 draws what an undisturbed one drew there.
    assert [numbers(second.drawn(step, "cpu")) for step in (3, 4)] == steps[3:]
    assert all(len({*drawn}) == 12 and min(drawn) >= 100 and max(drawn) < 150 for drawn in steps)
    assert len({tuple(drawn) for drawn in steps}) == 5
    other = NegativeRows(RowsByNumber(), order(seed=4), 12)  # type: ignore[arg-type]
    assert numbers(other.drawn(0, "cpu")) != steps[0]


def test_the_forward_passes_of_a_step_share_what_was_drawn_for_it() -> None:
    rows = RowsByNumber()
    negatives = NegativeRows(rows, order(), 12)  # type: ignore[arg-type]
    assert negatives.drawn(0, "cpu") is negatives.drawn(0, "cpu")
    negatives.drawn(1, "cpu")
    assert len(rows.gathered) == 2


def test_more_negatives_than_rows_are_all_rows() -> None:
    drawn = NegativeRows(RowsByNumber(), order(), 500).drawn(0, "cpu")  # type: ignore[arg-type]
    assert numbers(drawn) == [*range(100, 150)]


def test_a_training_in_phases_draws_rows_for_every_step_and_layers_for_every_epoch(
    view: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[tuple[int, int, bytes]] = []
    forward = Distillation.forward

    def watching(self: Distillation, **given: Any) -> Any:
        seen.append((self.seed, self.epoch, given["negatives"]["hidden.cls@1"].numpy().tobytes()))
        assert "hidden.tok@1" not in given["negatives"]
        assert len(given["signals"]["family"].unique()) == 40 and len(given["negatives"]["family"].unique()) == 5
        return forward(self, **given)

    monkeypatch.setattr(Distillation, "forward", watching)
    recipe = tmp_path / "recipe.yaml"
    method = '"soft-target, rail-kd:size=4:final=true, codir:size=4:negatives=5:form=nce, fitnets"'
    lines = [f"  - {{name: p{epochs}, method: {method}, num_train_epochs: {epochs}}}" for epochs in (1, 2)]
    recipe.write_text("\n".join(["phases:", *lines]))
    stage = TrainStudent(
        view=(str(view.path),),
        student="bert:num_layers=2",
        recipe=str(recipe),
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=40,
        seed=11,
    )
    from kd.pipeline.stage import execute

    assert execute(stage).failure is None
    # A phase goes on with the epochs after those before it.
    assert [entry[:2] for entry in seen] == [(11, epoch) for epoch in range(3) for _ in range(3)]
    assert len({negatives for *_, negatives in seen}) == 9
