"""Lists in TextBrewer's keys: each entry is a method of kd with the same value, or is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kd.pipeline.errors import UsageError
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.intermediate_matches import expand_matches
from kd.stages.train_student.methods import parse_methods

MATCH: dict[str, Any] = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 0.5}


def written(folder: Path, *matches: Any) -> str:
    file = folder / "matches.yaml"
    file.write_text(yaml.safe_dump([*matches]))
    return str(file)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "fitnets:0.5:layer_map=1-2:reduction=token"),
        ({"proj": ["linear", 312, 768]}, "fitnets:0.5:layer_map=1-2:reduction=token"),
        ({"loss": "cos"}, "distilbert:0.5:layer_map=1-2:reduction=token"),
        ({"loss": "pkd"}, "pkd:0.5:layer_map=1-2"),
        ({"loss": "fsp", "layer_T": [0, 2], "layer_S": [0, 1]}, "fsp:0.5:layer_map=0-0+1-2"),
        (
            {"feature": "attention", "loss": "attention_mse"},
            "tinybert:0.5:layer_map=2-3:hidden=false:embedding=false:reduction=token",
        ),
        (
            {"feature": "attention", "loss": "attention_ce", "weight": 3},
            "ir-kd:3:layer_map=2-3:cosine=false:reduction=token",
        ),
    ],
)
def test_a_match_becomes_a_method(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (term,) = parse_methods(expand_matches([written(tmp_path, {**MATCH, **changes})]))
    assert str(term) == expected


def test_a_file_stands_beside_methods_and_its_weight_may_be_left_out(tmp_path: Path) -> None:
    match = {name: value for name, value in MATCH.items() if name != "weight"}
    file = written(tmp_path, match, {**match, "layer_T": 4})
    terms = parse_methods(expand_matches([f"soft-target:0.9,{file}", "hard:0.1"]))
    assert [term.method.name for term in terms] == ["soft-target", "fitnets", "fitnets", "hard"]
    assert [term.weight for term in terms] == [0.9, 1.0, 1.0, 0.1]
    whole = tmp_path / "config.json"
    whole.write_text('{"intermediate_matches": [{"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "cos"}]}')
    assert expand_matches([str(whole)]) == ["distilbert:1:reduction=token:layer_map=1-2"]


def test_a_weight_is_kept_to_its_last_digit_and_yaml_is_the_same_as_elsewhere(tmp_path: Path) -> None:
    (term,) = parse_methods(expand_matches([written(tmp_path, {**MATCH, "weight": 0.123456789})]))
    assert term.weight == 0.123456789 and parse_methods(str(term)) == (term,)
    file = tmp_path / "matches.yaml"
    file.write_text("- {layer_T: 2, layer_S: 1, feature: hidden, loss: cos, weight: 1e-3}\n")
    assert expand_matches([str(file)]) == ["distilbert:0.001:reduction=token:layer_map=1-2"]
    file.write_text("- layer_T: 2\n  layer_T: 3\n")
    with pytest.raises(UsageError, match=r"matches\.yaml:2: 'layer_T' stands twice"):
        expand_matches([str(file)])


@pytest.mark.parametrize(
    ("match", "words"),
    [
        ({**MATCH, "loss": "mmd"}, "'mmd' has no counterpart in kd"),
        ({**MATCH, "feature": "attention", "loss": "attention_mse_sum"}, "sums over heads"),
        ({**MATCH, "loss": "attention_mse"}, "no loss 'attention_mse' of feature 'hidden'"),
        ({**MATCH, "layer": 3}, "unknown key 'layer' (did you mean"),
        ({"layer_T": 2, "feature": "hidden"}, "lacks layer_S and loss"),
        ({**MATCH, "layer_T": "two"}, "layer_T is 'two'"),
        ({**MATCH, "loss": "fsp"}, "takes two layers"),
        ({**MATCH, "weight": 0}, "expected a number above 0"),
        ({**MATCH, "weight": 10**400}, "expected a number above 0"),
        ({**MATCH, "proj": ["relu", 312, 768]}, "projections are linear"),
        ({**MATCH, "proj": ["linear", 312, 768, {"lr": 1e-3}]}, "one learning rate"),
        ("hidden", "expected keys layer_T"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_its_place(match: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="match 2 of ") as error:
        expand_matches([written(tmp_path, MATCH, match)])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "expected the node content"), ("{}", "no list of matches"), (None, "does not exist")],
)
def test_a_file_that_holds_no_matches_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "matches.yml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=words):
        expand_matches([str(file)])


def test_a_run_trains_by_the_file_and_a_change_of_it_is_another_run(view: Any, tmp_path: Path) -> None:
    file = written(tmp_path, MATCH)
    fields: dict[str, Any] = {"view": (str(view.path),), "student": "bert:num_layers=1", "output_dir": "unused"}
    first = TrainStudent(**fields, method=("soft-target", file))
    assert first.prepared.method == "soft-target:1,fitnets:0.5:layer_map=1-2:reduction=token"
    before = first.inputs()
    written(tmp_path, {**MATCH, "weight": 0.7})
    assert TrainStudent(**fields, method=("soft-target", file)).inputs()["method"] != before["method"]
