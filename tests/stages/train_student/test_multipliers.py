"""Learning rates of parts: how they are written, which parameters they reach, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kd.pipeline.artifact import open_artifact
from kd.pipeline.errors import UsageError
from kd.pipeline.stage import StageContext, execute
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.multipliers import factor_of, idle, parse_multipliers, regrouped

MULTIPLIERS = ("embeddings:0.1", "layers=2:0.5", "head:5", "projections:2")


def test_a_parameter_has_the_factor_of_its_part() -> None:
    multipliers = parse_multipliers("embeddings:0.1, layers>=2:0.5", num_layers=3)
    assert parse_multipliers(["embeddings:0.1", "layers>=2:0.5"], num_layers=3) == multipliers
    assert parse_multipliers({"embeddings": 0.1, "layers>=2": 0.5}, num_layers=3) == multipliers
    assert [str(multiplier) for multiplier in multipliers] == ["embeddings:0.1", "layers>=2:0.5"]
    names = (
        "bert.embeddings.word_embeddings.weight",
        *(f"bert.encoder.layer.{n}.x" for n in range(3)),
        "classifier.bias",
    )
    assert [factor_of(f"student.{name}", multipliers) for name in names] == [0.1, 1.0, 0.5, 0.5, 1.0]
    assert parse_multipliers((), num_layers=3) == ()
    others = parse_multipliers("projections:2,layers=1:3,layers=3:4", num_layers=3)
    assert [str(multiplier) for multiplier in idle(others, [f"student.{name}" for name in names[:3]])] == [
        "projections:2",
        "layers=3:4",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("embedings:0.1", "did you mean 'embeddings'"),
        ("embeddings", "is not PART:FACTOR"),
        ("all:2", "is for all parts"),
        ("head:0", "'0' is not a number above 0"),
        ("head:-1", "is not a number above 0"),
        ("head:nan", "is not a number above 0"),
        ("head:fast", "'fast' is not a number above 0"),
        ("layers=4:2", "the student has layers 1 to 3"),
        ("layers:0.5,layers=3:2", "layers=3 has two factors: layers:0.5 and layers=3:2"),
    ],
)
def test_what_is_no_multiplier_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_multipliers(text, num_layers=3)
    assert words in str(refused.value)


def test_groups_are_divided_by_factor_and_keep_the_rest_of_what_they_say() -> None:
    parameters = {
        name: torch.nn.Parameter(torch.zeros(1)) for name in ("student.head.a", "student.head.b", "student.layers.0.c")
    }
    a, b, c = parameters.values()
    groups = [{"params": [a, c], "lr": 0.5, "weight_decay": 0.1}, {"params": [b], "lr": 0.5, "weight_decay": 0.0}]
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = regrouped(groups, names, parse_multipliers("head:4", num_layers=1))
    assert [[len(group["params"]), group["lr"], group["weight_decay"]] for group in found] == [
        [1, 0.5, 0.1],
        [1, 2.0, 0.1],
        [1, 2.0, 0.0],
    ]
    assert found[1]["params"][0] is a and found[2]["params"][0] is b


def trained(view: Any, output: Path, **fields: Any) -> dict[str, torch.Tensor]:
    values: dict[str, Any] = {
        "view": (str(view.path),),
        "student": "bert:hidden_size=16:heads=2:num_layers=2:intermediate_size=16:dropout=0",
        "method": ("soft-target", "fitnets:layer_map=1-1"),
        "output_dir": str(output),
        "max_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0,
        **fields,
    }
    execute(TrainStudent(**values), StageContext())
    return load_file(output / "model.safetensors")


def test_the_first_update_of_a_part_is_multiplied_and_that_of_others_is_the_same(view: Any, tmp_path: Path) -> None:
    """Of a step from the same weights; Adam's first update follows from the gradient's sign and the learning rate."""
    start = trained(view, tmp_path / "start", learning_rate=1e-30)
    plain, scaled = trained(view, tmp_path / "plain"), trained(view, tmp_path / "scaled", lr_multipliers=MULTIPLIERS)
    factors = {"embeddings": 0.1, "layer.1.": 0.5, "classifier": 5.0, "pooler": 5.0}
    seen = set()
    for name, weight in start.items():
        found = [part for part in factors if part in name]
        if not found:
            assert torch.equal(plain[name], scaled[name]), name
            continue
        moved = [(model[name] - weight).double() for model in (plain, scaled)]
        torch.testing.assert_close(moved[1], factors[found[0]] * moved[0], atol=2e-6, rtol=2e-2)
        seen |= {found[0]} if moved[0].abs().max() > 1e-4 else set()
    assert seen == set(factors)
    log = [
        entry for entry in json.loads((tmp_path / "scaled" / "metrics.json").read_text())["history"] if "loss" in entry
    ]
    assert [entry["learning_rate"] for entry in log] == pytest.approx([1e-3]), "the one that factors multiply"
    config = yaml.safe_load((tmp_path / "scaled" / "resolved_config.yaml").read_text())
    assert config["lr_multipliers"] == list(MULTIPLIERS)


def test_a_run_without_multipliers_is_the_one_it_was(view: Any, tmp_path: Path) -> None:
    stages = [
        TrainStudent(view=(str(view.path),), output_dir=str(tmp_path / "run"), **fields)
        for fields in ({}, {"lr_multipliers": ("head:5",)})
    ]
    assert "lr_multipliers" not in stages[0].identity_config()
    assert stages[1].identity_config()["lr_multipliers"] == ["head:5"]


def test_a_phase_may_have_multipliers_of_its_own(view: Any, tmp_path: Path) -> None:
    phases = [
        {"name": "hint", "method": "fitnets:layer_map=1-1", "share": 0.5, "lr_multipliers": ["projections:10"]},
        {"name": "kd", "method": "soft-target", "share": 0.5},
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"phases": phases}))
    trained(
        view, tmp_path / "run", recipe=str(file), method=TrainStudent.method, max_steps=2, lr_multipliers=("head:5",)
    )
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["phases"]
    assert [facts["lr_multipliers"] for facts in found] == [["projections:10"], ["head:5"]]
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["phases"]
    assert [phase["lr_multipliers"] for phase in resolved] == [["projections:10"], ["head:5"]]
    assert open_artifact(tmp_path / "run").manifest["identity"]["config"]["recipe"]["1 hint"]["lr_multipliers"]
