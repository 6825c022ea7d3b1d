"""The first token's hidden state needs no array of its own where all tokens' are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import open_view
from kd.stages.train_student import TrainStudent


def test_students_of_token_states_and_of_sentence_states_are_the_same_student(
    bench: Any, sentences: list[str], tmp_path: Path
) -> None:
    corpus = bench.corpus(sentences[:40])
    for name in ("cls", "tok"):
        store, view = str(tmp_path / f"store-{name}"), tmp_path / f"view-{name}"
        bench.capture(corpus, rows_per_shard=16, signals=f"logits,hidden.{name}@all", store=store, output_dir=str(view))
    own, derived = open_view(tmp_path / "view-cls"), open_view(tmp_path / "view-tok")
    assert [one["signal"] for one in derived.store.inspect()["derivable"] if one["exact"]] == [
        "hidden.cls@0", "hidden.cls@1", "hidden.cls@2",
    ]  # fmt: skip
    for layer in range(3):
        signal = f"hidden.cls@{layer}"
        wanted = own.reader.gather(signal, own.rows)
        found = derived.reader.gather(signal, derived.rows)
        assert (found.dtype, wanted.dtype) == (np.float16, np.float16)
        np.testing.assert_array_equal(found, wanted)
    for name in ("cls", "tok"):
        run = TrainStudent(
            view=(str(tmp_path / f"view-{name}"),),
            student="bilstm:hidden_size=6:num_layers=2",
            method=("soft-target", "pkd:0.1"),
            output_dir=str(tmp_path / f"run-{name}"),
            per_device_train_batch_size=8,
            num_train_epochs=1.0,
        )
        execute(run, StageContext())
    one, two = ((tmp_path / f"run-{name}" / "model.safetensors").read_bytes() for name in ("cls", "tok"))
    assert one == two


def test_a_student_of_derived_signals_learns_as_one_of_stored_signals(
    bench: Any, sentences: list[str], tmp_path: Path
) -> None:
    """TinyBERT and MiniLMv2: from all they need, stored, and from the least that gives it; both in float32."""
    corpus = bench.corpus(sentences[:40])
    kept = {
        "stored": {"signals": "hidden.tok@all:float32,attention.score@all:float32,attention.qkv@all:float32"},
        "derived": {"signals": "hidden.tok@1+2:float32", "sidecars": ("embeddings", "attn_in@all")},
    }
    losses = {}
    for name, options in kept.items():
        view = tmp_path / f"view-{name}"
        bench.capture(corpus, store=str(tmp_path / f"store-{name}"), output_dir=str(view), **options)
        run = TrainStudent(
            view=(str(view),),
            student="bert:num_layers=2:heads=4",
            method=("tinybert", "minilmv2:0.5"),
            output_dir=str(tmp_path / f"run-{name}"),
            per_device_train_batch_size=8,
            max_steps=4,
            logging_steps=1,
        )
        execute(run, StageContext())
        history = json.loads((tmp_path / f"run-{name}" / "metrics.json").read_text())["history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses["stored"]) == 4
    assert losses["derived"] == pytest.approx(losses["stored"], rel=1e-5)
