"""A student trained from float16 or int8 signals follows one trained from float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.stage import StageContext, execute
from kd.stages.train_student import TrainStudent

SIGNALS = "logits{logits},hidden.cls@2{hidden},hidden.tok@1{hidden}"


def losses(view: Any, output: Path) -> list[float]:
    execute(
        TrainStudent(
            view=(str(view.path),),
            student="bilstm:hidden_size=6:head_size=8",
            method=("soft-target:0.5:temperature=2", "fitnets:0.5:layer_map=1-1", "pkd:0.5:layer_map=1-2"),
            init="random",
            output_dir=str(output),
            per_device_train_batch_size=8,
            num_train_epochs=2.0,
            logging_steps=1,
        ),
        StageContext(),
    )
    history = json.loads((output / "metrics.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def exact(plant: Callable[..., Any], sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    view = plant(sentences[:60], signals=SIGNALS.format(logits=":float32", hidden=":float32"))
    return losses(view, tmp_path_factory.mktemp("exact") / "run")


@pytest.mark.parametrize(
    ("logits", "hidden", "tolerance"), [(":float16", ":float16", 1e-3), ("", ":int8", 5e-3), (":int8", ":int8", 5e-3)]
)
def test_losses_stay_within_a_stated_distance_of_float32(
    plant: Callable[..., Any],
    sentences: list[str],
    exact: list[float],
    tmp_path: Path,
    logits: str,
    hidden: str,
    tolerance: float,
) -> None:
    lossy = plant(sentences[:60], signals=SIGNALS.format(logits=logits, hidden=hidden))
    found = losses(lossy, tmp_path / "run")
    assert len(found) >= 10 and found != exact
    assert found == pytest.approx(exact, rel=tolerance)
