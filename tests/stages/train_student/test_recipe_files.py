"""The recipes that come with kd: all are read and resolved for two students, two are run whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kd
from kd.pipeline.stage import StageContext, execute
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.methods import Shapes
from kd.stages.train_student.recipe import KEYS, num_steps, read_recipe

RECIPES = sorted((Path(__file__).resolve().parents[3] / "workflows" / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


def shapes(num_layers: int, width: int) -> Shapes:
    """A student of these layers beside a teacher of 6, both with 4 heads."""
    return Shapes(
        task="single-label",
        num_labels=3,
        token_widths=(width,) * (num_layers + 1),
        sentence_widths=(width,) * (num_layers + 1),
        teacher_layers=6,
        teacher_width=32,
        student_heads=4,
        attention_width=width,
        teacher_heads=4,
    )


@pytest.mark.parametrize("file", RECIPES, ids=NAMES)
@pytest.mark.parametrize(("num_layers", "width"), [(3, 32), (2, 16)])
def test_a_recipe_fits_students_of_any_depth_and_width(file: Path, num_layers: int, width: int) -> None:
    stage = TrainStudent(view=("v",), output_dir="o", recipe=str(file))
    phases = read_recipe(str(file), stage, shapes(num_layers, width))
    steps = num_steps(phases, total=200, steps_per_epoch=20)
    assert sum(steps) == 200
    assert all(phase.method and phase.to_config()["share"] > 0 for phase in phases)
    assert any(phase.signals(shapes(num_layers, width)) for phase in phases)


def test_the_layer_by_layer_recipes_have_a_phase_for_each_layer_of_the_student() -> None:
    found = {}
    for file in RECIPES:
        stage = TrainStudent(view=("v",), output_dir="o", recipe=str(file))
        found[file.stem] = [phase.method for phase in read_recipe(str(file), stage, shapes(3, 32))]
    assert found["ir-kd-stacked"][:3] == [f"ir-kd:1:layer_map={pairs}" for pairs in ("1-2", "1-2+2-4", "1-2+2-4+3-6")]
    assert found["ir-kd-progressive"][:3] == [f"ir-kd:1:layer_map={pair}" for pair in ("1-2", "2-4", "3-6")]
    assert found["mobilebert-progressive"][1:4] == [f"mobilebert:1:layer_map={pair}" for pair in ("1-2", "2-4", "3-6")]


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("fitnets", "bert:hidden_size=16:heads=2:num_layers=2:intermediate_size=16"),
        ("gradual-unfreezing", "bilstm:hidden_size=6:head_size=8"),
        ("annealing", "bilstm:hidden_size=6:head_size=8"),
    ],
)
def test_a_recipe_runs_whole(view: Any, tmp_path: Path, name: str, student: str) -> None:
    file = next(path for path in RECIPES if path.stem == name)
    stage = TrainStudent(
        view=(str(view.path),),
        student=student,
        recipe=str(file),
        max_steps=30,
        per_device_train_batch_size=8,
        output_dir=str(tmp_path / "run"),
    )
    summary = execute(stage, StageContext()).summary
    assert summary["steps"] == 30 and len(summary["phases"]) in (2, 3)
    assert kd.load_student(tmp_path / "run")(view.texts[:2]).shape == (2, 3)


def test_the_how_tos_recipes_are_read_and_it_names_every_key_and_every_file(tmp_path: Path) -> None:
    page = (RECIPES[0].parents[2] / "docs" / "how-to" / "train-in-phases.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    assert len(examples) == 2
    for number, text in enumerate(examples):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert len(read_recipe(str(file), TrainStudent(view=("v",), output_dir="o"), shapes(3, 32))) >= 2
    assert all(f"`{key}`" in page for key in KEYS)
    assert all(f"`{path.name}`" in page for path in RECIPES)


@pytest.mark.slow
def test_every_recipe_runs_over_one_capture(tiny_teacher: Path, sentences: list[str], tmp_path: Path) -> None:
    from kd.stages.cache_teacher import CacheTeacher

    labels = ["negative", "neutral", "positive"] * 20
    pq.write_table(pa.table({"text": sentences[:60], "label": labels}), tmp_path / "data.parquet")
    capture = CacheTeacher(
        teacher=str(tiny_teacher),
        dataset=str(tmp_path / "data.parquet"),
        text_column="text",
        label_column="label",
        store=str(tmp_path / "store"),
        signals="logits,hidden.tok@all,hidden.cls@all,attention.score@all",
        output_dir=str(tmp_path / "view"),
    )
    execute(capture, StageContext())
    for file in RECIPES:
        stage = TrainStudent(
            view=(str(tmp_path / "view"),),
            student="bert:num_layers=2:hidden_size=16:heads=4:intermediate_size=16",
            recipe=str(file),
            max_steps=14,
            per_device_train_batch_size=8,
            save_strategy="no",
            output_dir=str(tmp_path / file.stem),
        )
        summary = execute(stage, StageContext()).summary
        assert summary["steps"] == 14, file.stem
        for facts in summary.get("phases", {}).values():
            assert all(value > 0 for name, value in facts.items() if name.startswith("loss"))
