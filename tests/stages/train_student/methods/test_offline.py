"""Offline is online: what a store gives of a teacher, against the teacher run beside the student, for every method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import kd
from kd.stages.train_student.attention_watch import AttentionWatch
from kd.stages.train_student.methods import StudentOutputs

from .beside import Ready
from .cases import CASES, Case
from .worlds import World

SIGNALS = ("hidden.cls@all", "hidden.mean@all", "hidden.tok@all", "attention.score@1-2", "attention.qkv@1-2")
STUDENT = "bert:num_layers=2:hidden_size=16:heads=4"
ROWS = np.arange(3, 11)
OTHERS = np.arange(20, 30)


@pytest.fixture(scope="module", params=["float32", "float16"])
def view(
    request: pytest.FixtureRequest, tiny_teacher: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    pq.write_table(pa.table({"text": sentences[:40]}), folder / "text.parquet")
    kd.cache_teacher(
        teacher=str(tiny_teacher),
        dataset=str(folder / "text.parquet"),
        text_column="text",
        store=str(folder / "store"),
        signals=",".join(["logits", *(f"{signal}:{request.param}" for signal in SIGNALS)]),
        output_dir=str(folder / "view"),
    )
    return request.param, folder / "view"


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(str(tiny_teacher)).eval()


def live(teacher: Any, inputs: Mapping[str, Tensor]) -> World:
    """What the teacher shows of a batch when it runs beside the student."""
    watch = AttentionWatch(teacher)
    with torch.no_grad(), watch:
        shown = teacher(**inputs, output_hidden_states=True)
    return World(inputs["attention_mask"].bool(), shown.logits, shown.hidden_states, watch.heads())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)
def test_the_stores_signals_train_as_the_live_teacher_would(case: Case, view: tuple[str, Path], teacher: Any) -> None:
    dtype, folder = view
    ready = Ready.over(folder, STUDENT, case.spec)
    rows, signals = ready.rows, ready.prepared.signals
    assert not ready.prepared.derives

    batch, others = rows.batch(ROWS), rows.batch(OTHERS)
    shown, shown_others = live(teacher, batch["inputs"]), live(teacher, others["inputs"])
    online = {str(signal): shown.signal(signal) for signal in signals}
    online_others = {str(s): shown_others.signal(s) for s in signals if s.kind.axis == "example"}
    assert {name: values.shape for name, values in batch["signals"].items() if name != "family"} == {
        name: values.shape for name, values in online.items()
    }

    cached = ready.step(batch, negatives=rows.sentence_signals(OTHERS))
    beside = ready.step(batch, signals=online, negatives=online_others)
    tolerance = 1e-6 if dtype == "float32" else 1e-3
    assert cached[0] == pytest.approx(beside[0], rel=tolerance)
    assert torch.cosine_similarity(cached[1], beside[1], dim=0).item() >= 0.9999
    assert beside[0] > 1e-3 and beside[1].norm() > 1e-6

    rolled = {name: values.roll(1, 0) for name, values in batch["signals"].items()}
    other, _ = ready.step(batch, signals=rolled, negatives=rows.sentence_signals(OTHERS))
    assert abs(other - cached[0]) > tolerance * cached[0], "rows of others would not be noticed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)
def test_under_autocast_the_student_is_in_bfloat16_and_the_loss_is_not(
    case: Case, view: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Ready.over(view[1], STUDENT, case.spec)
    seen: list[tuple[torch.dtype, bool]] = []
    loss = type(case.method).loss

    def watched(self: Any, outputs: StudentOutputs, *rest: Any) -> dict[str, Tensor]:
        seen.append((outputs.logits_BC.dtype, torch.is_autocast_enabled("cpu")))
        return loss(self, outputs, *rest)

    monkeypatch.setattr(type(case.method), "loss", watched)
    with torch.autocast("cpu", torch.bfloat16):
        shown = ready.distillation(**ready.rows.batch(ROWS), negatives=ready.rows.sentence_signals(OTHERS))
    assert seen == [(torch.bfloat16, False)]
    assert shown["loss"].dtype == torch.float32 and {value.dtype for value in shown["terms"].values()} == {
        torch.float32
    }
    shown["loss"].backward()
    assert all(p.grad.isfinite().all() for p in ready.distillation.parameters() if p.grad is not None)


def test_a_teacher_shows_the_same_logits_watched_or_not(teacher: Any) -> None:
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert isinstance(live(teacher, inputs).outputs(), StudentOutputs)
    with torch.no_grad():
        assert torch.equal(live(teacher, inputs).logits, teacher(**inputs).logits)
