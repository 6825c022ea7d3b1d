"""The real thing at toy size: a teacher captured, its folder deleted, students trained; and the same with it alive."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import kd
from kd.pipeline.store import Signal, open_view
from kd.stages.train_student.rows import Rows
from kd.stages.train_student.trainer import Distillation

METHODS = "soft-target,pkd:0.1:layer_map=1-1"


@dataclass(frozen=True)
class Captured:
    view: Path
    teacher: Path
    """A copy for the tests that want it alive; the folder that was captured is gone."""


@pytest.fixture(scope="module")
def captured(tiny_teacher: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Captured:
    folder = tmp_path_factory.mktemp("captured")
    shutil.copytree(tiny_teacher, folder / "teacher")
    pq.write_table(pa.table({"text": sentences}), folder / "text.parquet")
    kd.cache_teacher(
        teacher=str(folder / "teacher"),
        dataset=str(folder / "text.parquet"),
        text_column="text",
        store=str(folder / "store"),
        signals="logits,hidden.cls@all,hidden.tok@1",
        hidden_dtype="float32",
        rows_per_shard=16,
        batch_tokens=128,
        output_dir=str(folder / "view"),
    )
    shutil.rmtree(folder / "teacher")
    return Captured(folder / "view", tiny_teacher)


def train(captured: Captured, run: Path, **fields: Any) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    values = {
        "view": str(captured.view),
        "student": "bert:num_layers=1",
        "method": METHODS,
        "output_dir": str(run),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "logging_steps": 1,
    }
    kd.train_student(**{**values, **fields})
    history: list[dict[str, Any]] = json.loads((run / "metrics.json").read_text())["history"]
    return [entry for entry in history if "loss" in entry]


def test_a_student_learns_from_the_store_after_the_teacher_is_deleted(captured: Captured, tmp_path: Path) -> None:
    log = train(
        captured,
        tmp_path / "run",
        student="bilstm:hidden_size=24",
        method="soft-target",
        validation_fraction=0.25,
        num_train_epochs=40,
        learning_rate=5e-3,
    )
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert metrics["agreement"] >= 0.7


def test_the_loss_curve_equals_that_of_a_live_teacher_run_in_the_stores_batches(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lossless store: the teacher runs in every step, over whole shards in the batches of the capture."""
    from transformers import AutoModelForSequenceClassification

    from kd.stages.cache_teacher.onednn import use_onednn
    from kd.stages.cache_teacher.runner import Runner, plan_batches

    stored = train(captured, tmp_path / "stored")

    view = open_view(captured.view)
    signals = (Signal("logits"), Signal("hidden.cls", 1))
    teacher = AutoModelForSequenceClassification.from_pretrained(str(captured.teacher), attn_implementation="sdpa")
    use_onednn(teacher)
    runner = Runner(teacher, dict.fromkeys(signals, "float32"))
    rows_per_shard = view.store.layout.rows_per_shard
    num_runs = 0

    def live(self: Rows, index_B: np.ndarray) -> dict[str, torch.Tensor]:
        nonlocal num_runs
        assert self.signals == signals
        wanted = view.rows[index_B]
        values: dict[Signal, np.ndarray] = {
            signal: np.full((len(wanted), 3 if signal.layer is None else 32), np.nan, np.float32) for signal in signals
        }
        for shard in np.unique(wanted // rows_per_shard).tolist():
            held = view.store.read_tokens(shard)
            places = np.flatnonzero(wanted // rows_per_shard == shard)
            whole = {
                signal: np.empty((len(held.token_ids), found.shape[1]), np.float32) for signal, found in values.items()
            }
            batches = plan_batches(held.token_ids.lengths, view.store.layout.batch_tokens)
            for said in runner.run(held.token_ids, held.segment_ids, batches):
                num_runs += 1
                for signal, array in said.values.items():
                    whole[signal][said.slots] = array
            for signal, array in whole.items():
                values[signal][places] = array[wanted[places] % rows_per_shard]
        return {str(signal): torch.from_numpy(array) for signal, array in values.items()}

    monkeypatch.setattr(Rows, "_signals", live)
    # The teacher runs in the training thread, and draws no random number.
    alive = train(captured, tmp_path / "alive", dataloader_num_workers=0)
    assert num_runs > len(alive) == 24
    assert [(e["step"], e["loss"], e["grad_norm"]) for e in alive] == [
        (e["step"], e["loss"], e["grad_norm"]) for e in stored
    ]
    files = [tmp_path / name / "model.safetensors" for name in ("stored", "alive")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_loss_curve_is_close_to_that_of_a_live_teacher_on_the_training_batches(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    stored = train(captured, tmp_path / "stored")
    teacher = AutoModelForSequenceClassification.from_pretrained(str(captured.teacher)).eval()
    forward = Distillation.forward

    def live(self: Distillation, inputs: Any, labels: Any, has_gold: Any, signals: Any) -> Any:
        with torch.no_grad():
            said = teacher(**inputs, output_hidden_states=True)
        fresh = {"logits": said.logits, "hidden.cls@1": said.hidden_states[1][:, 0]}
        assert fresh.keys() == signals.keys()
        return forward(self, inputs, labels, has_gold, fresh)

    monkeypatch.setattr(Distillation, "forward", live)
    alive = train(captured, tmp_path / "alive")
    np.testing.assert_allclose([e["loss"] for e in alive], [e["loss"] for e in stored], rtol=1e-5)


def test_a_store_rolled_by_one_row_would_be_seen(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same student on other rows' signals ends with a far higher loss: the join is what it learns from."""
    fields = {
        "student": "bilstm:hidden_size=24",
        "method": "soft-target",
        "learning_rate": 5e-3,
        "num_train_epochs": 12,
    }
    right = train(captured, tmp_path / "right", **fields)
    signals_of = Rows._signals

    def rolled(self: Rows, index_B: np.ndarray) -> Any:
        return signals_of(self, np.roll(index_B, 1))

    monkeypatch.setattr(Rows, "_signals", rolled)
    wrong = train(captured, tmp_path / "wrong", **fields)
    assert np.mean([e["loss"] for e in wrong[-6:]]) > 2 * np.mean([e["loss"] for e in right[-6:]])
