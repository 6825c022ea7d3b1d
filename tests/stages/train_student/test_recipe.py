"""Recipes as they are read: what phases come out, how long they are, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd.pipeline.errors import UsageError
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.methods import Shapes
from kd.stages.train_student.parts import Place, parse_parts, place_of
from kd.stages.train_student.recipe import Phase, num_steps, read_recipe
from kd.stages.train_student.schedules import parse_schedule

SHAPES = Shapes(
    task="single-label",
    num_labels=3,
    token_widths=(16,) * 4,
    sentence_widths=(16,) * 4,
    teacher_layers=6,
    teacher_width=32,
)
KD = {"name": "kd", "method": "soft-target", "share": 1.0}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[Phase, ...]]:
    """The phases of a recipe with these entries."""

    def make(*phases: Any, **options: Any) -> tuple[Phase, ...]:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"name": "toy", "phases": list(phases)}, sort_keys=False))
        stage = TrainStudent(view=("v",), output_dir="o", recipe=str(file), **options)
        return read_recipe(str(file), stage, SHAPES)

    return make


def test_phases_have_their_methods_lengths_and_options(read: Callable[..., tuple[Phase, ...]]) -> None:
    hint = {
        "name": "hint",
        "method": "fitnets:10:layer_map=1-3",
        "share": 0.25,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "trainable": ["embeddings", "layers<=1", "projections"],
    }
    first, last = read(hint, {**KD, "share": 0.75})
    assert first.method == "fitnets:10:layer_map=1-3" and last.method == "soft-target:1"
    assert first.options == {"learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    assert not first.selects and last.selects
    assert num_steps((first, last), total=10, steps_per_epoch=5) == (2, 8)
    assert first.to_config()["trainable"] == ["embeddings", "layers<=1", "projections"]


def test_what_a_phase_says_of_itself_reads_back_as_the_same_phase(read: Callable[..., tuple[Phase, ...]]) -> None:
    entry = {
        "name": "kd",
        "method": "soft-target:4:temperature=3,hard",
        "share": 1.0,
        "learning_rate": 1e-4,
        "until": "loss:every=20:patience=2",
        "lr_multipliers": ["head:5"],
        "trainable": ["layers>=2", "head"],
        "unfreeze_every": 0.25,
        "schedules": {"soft-target.weight": "linear:start=4:end=1"},
    }
    (phase,) = read(entry)
    (again,) = read(phase.to_config())
    assert again == phase and again.to_config() == phase.to_config()


@pytest.mark.parametrize(("total", "steps"), [(10, (3, 4, 3)), (3, (1, 1, 1)), (100, (33, 34, 33))])
def test_shares_use_up_exactly_all_steps(
    read: Callable[..., tuple[Phase, ...]], total: int, steps: tuple[int, ...]
) -> None:
    phases = read(*({"name": name, "method": "soft-target", "share": 1 / 3} for name in "abc"))
    assert num_steps(phases, total=total, steps_per_epoch=1) == steps


def test_phases_may_have_lengths_of_their_own(read: Callable[..., tuple[Phase, ...]]) -> None:
    phases = read(
        {"name": "a", "method": "soft-target", "max_steps": 7},
        {"name": "b", "method": "hard", "num_train_epochs": 1.5},
    )
    assert num_steps(phases, total=1000, steps_per_epoch=5) == (7, 8)


def test_an_entry_per_layer_stands_for_one_phase_for_each_layer_of_the_student(
    read: Callable[..., tuple[Phase, ...]],
) -> None:
    layers = {
        "name": "layer",
        "per_layer": "skip",
        "method": "fitnets:layer_map={pairs}, pkd:layer_map={pair}",
        "share": 0.6,
        "trainable": ["layers={layer}", "projections"],
    }
    phases = read(layers, {**KD, "share": 0.4})
    assert [phase.name for phase in phases] == ["layer-1", "layer-2", "layer-3", "kd"]
    assert [phase.method for phase in phases[:2]] == [
        "fitnets:1:layer_map=1-2,pkd:1:layer_map=1-2",
        "fitnets:1:layer_map=1-2+2-4,pkd:1:layer_map=2-4",
    ]
    assert num_steps(phases, total=100, steps_per_epoch=1) == (20, 20, 20, 40)
    assert [part.text for part in phases[1].trainable or ()] == ["layers=2", "projections"]


def test_schedules_change_weights_and_options_from_step_to_step(read: Callable[..., tuple[Phase, ...]]) -> None:
    (phase,) = read(
        {
            **KD,
            "method": "soft-target:temperature=3,hard:0.5",
            "schedules": {
                "soft-target.temperature": "annealing:start=4:end=1",
                "soft-target.weight": "linear:start=4:end=1",
            },
        }
    )
    found = [list(map(str, phase.terms_at(step, 4))) for step in range(4)]
    assert found == [
        ["soft-target:4:temperature=4", "hard:0.5"],
        ["soft-target:3:temperature=3", "hard:0.5"],
        ["soft-target:2", "hard:0.5"],
        ["soft-target:1:temperature=1", "hard:0.5"],
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("constant:value=3", [3, 3, 3, 3, 3, 3]),
        ("linear:start=0:end=1", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("annealing:start=10:end=1:stages=2", [10, 10, 10, 1, 1, 1]),
        ("annealing:start=1:end=3", [1, 1, 2, 2, 3, 3]),
    ],
)
def test_a_schedule_by_hand(text: str, values: list[float]) -> None:
    schedule = parse_schedule(text)
    assert [schedule.at(step, 6) for step in range(6)] == pytest.approx(values)
    assert str(schedule) == text
    assert schedule.at(0, 1) == values[0]


def test_parts_are_unfrozen_from_the_top_one_more_every_so_many_steps(read: Callable[..., tuple[Phase, ...]]) -> None:
    (phase,) = read({**KD, "unfreeze_every": 2})
    shown = [[str(place) for place in phase.places_at(step, 20, 3) or []] for step in (0, 1, 2, 6, 8, 19)]
    assert shown == [
        ["head"],
        ["head"],
        ["layers=3", "head"],
        ["layers=1", "layers=2", "layers=3", "head"],
        ["embeddings", "layers=1", "layers=2", "layers=3", "head"],
        ["embeddings", "layers=1", "layers=2", "layers=3", "head"],
    ]
    (part,) = read({**KD, "unfreeze_every": 0.5, "trainable": ["layers>=3", "head"]})
    assert [[str(place) for place in part.places_at(step, 8, 3) or []] for step in (3, 4, 7)] == [
        ["head"],
        *[["layers=3", "head"]] * 2,
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("student.bert.embeddings.word_embeddings.weight", Place("embeddings")),
        ("student.bert.encoder.layer.11.output.dense.bias", Place("layers", 12)),
        ("student.bert.pooler.dense.weight", Place("head")),
        ("student.classifier.weight", Place("head")),
        ("student.mobilebert.embeddings.embedding_transformation.weight", Place("embeddings")),
        ("student.mobilebert.encoder.layer.0.ffn.1.output.dense.weight", Place("layers", 1)),
        ("student.embeddings.weight", Place("embeddings")),
        ("student.layers.1.backward_lstm.weight_ih_l0", Place("layers", 2)),
        ("student.head.weight", Place("head")),
        ("student.distilbert.transformer.layer.2.attention.q_lin.weight", Place("layers", 3)),
        ("projections.0.1-2.weight", Place("projections")),
    ],
)
def test_a_parameter_belongs_to_a_part(name: str, place: Place) -> None:
    assert place_of(name) == place


def test_parts_are_named_alone_or_with_a_comparison() -> None:
    assert parse_parts("all", num_layers=3) is None
    parts = parse_parts("embeddings, layers<=2, head", num_layers=3)
    assert parts is not None
    places = [Place(name) for name in ("embeddings", "head", "projections")] + [Place("layers", k) for k in (1, 2, 3)]
    held = [place for place in places if any(place in part for part in parts)]
    assert held == [Place("embeddings"), Place("head"), Place("layers", 1), Place("layers", 2)]


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([{**KD, "methods": "hard"}], ["recipe.yaml:6", "a phase has no key 'methods'", "did you mean 'method'"]),
        ([{**KD, "method": "soft-targets"}], ["method of phase 'kd'", "soft-target"]),
        ([{**KD, "method": "soft-target:temprature=2"}], ["temprature", "temperature"]),
        ([{**KD, "method": "fitnets:layer_map=4-1"}], ["layer 4 of the student"]),
        ([{"name": "kd", "share": 1}], ["phase 'kd' has no `method`"]),
        ([{**KD, "share": 0.5}, {**KD, "name": "b", "share": 0.4}], ["sum to 0.9; expected 1", "kd 0.5, b 0.4"]),
        ([{**KD, "share": 0}], ["share of phase 'kd': 0 is not a number above 0"]),
        ([{**KD, "share": -0.5}, {**KD, "name": "b", "share": 1.5}], ["-0.5 is not a number above 0"]),
        ([{**KD, "share": 10**400}], ["is not a number above 0"]),
        ([{**KD, "share": True, "per_layer": "skip", "method": "pkd:layer_map={pair}"}], ["True is not a number"]),
        ([{**KD, "method": 5}], ["method of phase 'kd': 5 is not a text or a list of texts"]),
        ([{**KD, "trainable": [["head"]]}], ["trainable of phase 'kd'", "is not a text or a list of texts"]),
        ([{**KD, "method": "soft-target:temperature=nan"}], ["'nan'; expected a number"]),
        ([{**KD, "schedules": {"soft-target.weight": "annealing:start=inf:end=0"}}], ["'inf'; expected a number"]),
        (
            [{**KD, "schedules": {"soft-target.weight": "annealing:start=4:end=1:stages=-2"}}],
            ["'stages' of schedule 'annealing' is -2; expected 0 or more"],
        ),
        ([{**KD, "max_steps": 5}], ["phase 'kd' says twice how long it is"]),
        ([KD, {"name": "b", "method": "hard"}], ["phase 'kd' has a share, and phase 'b' has none"]),
        ([{"name": "kd", "method": "hard"}], ["no phase says how long it is"]),
        ([{"name": "kd", "method": "hard", "max_steps": 0}], ["phase 'kd'", "--max-steps is 0"]),
        ([{**KD, "learning_rate": "fast"}], ["learning_rate of phase 'kd' is 'fast'; expected a number"]),
        ([{**KD, "share": 0.5}] * 2, ["two phases are called 'kd'"]),
        ([{**KD, "name": "a b"}], ["name 'a b'"]),
        ([{**KD, "trainable": ["layers<=4"]}], ["'layers<=4': the student has layers 1 to 3"]),
        ([{**KD, "trainable": ["heads"]}], ["'heads' is no part of a student", "head"]),
        ([{**KD, "trainable": ["head<=2"]}], ["'head<=2' is no part"]),
        ([{**KD, "trainable": ["projections"]}], ["begins with training no part of the student"]),
        (
            [{**KD, "method": "pkd:layer_map=1-2", "trainable": ["layers>=2", "head"]}],
            ["begins with training layers=2, layers=3, head", "sentence@1"],
        ),
        ([{**KD, "method": "fitnets:layer_map=1-2", "trainable": ["head"], "unfreeze_every": 5}], ["token@1"]),
        ([{**KD, "unfreeze_every": 0}], ["unfreeze_every of phase 'kd'"]),
        ([{**KD, "until": "los"}], ["until of phase 'kd'", "'los' is nothing that is watched here", "loss"]),
        ([{**KD, "until": "pkd:below=1"}], ["'pkd' is nothing that is watched here"]),
        ([{**KD, "until": "loss:patience=0"}], ["until of phase 'kd'", "would never hold"]),
        ([{**KD, "lr_multipliers": 2}], ["lr_multipliers of phase 'kd': 2 is not a list of PART:FACTOR"]),
        ([{**KD, "lr_multipliers": {"haed": 2}}], ["lr_multipliers of phase 'kd'", "did you mean 'head'"]),
        (
            [{**KD, "trainable": ["layers>=2", "head"], "lr_multipliers": ["head:2", "layers=1:2"]}],
            ["phase 'kd' trains layers=2, layers=3, head, not layers=1"],
        ),
        ([{**KD, "load_best_model_at_end": True}], ["needs rows to evaluate on"]),
        ([{**KD, "schedules": {"hard.temperature": "constant:value=1"}}], ["'hard.temperature' is nothing to change"]),
        (
            [{**KD, "method": "hard", "schedules": {"hard.temperature": "constant:value=1"}}],
            ["method 'hard' has no 'temperature' to change", "here: hard.weight"],
        ),
        ([{**KD, "schedules": {"soft-target.temprature": "linear:start=2:end=1"}}], ["soft-target.temperature"]),
        ([{**KD, "schedules": {"soft-target.temperature": "linear:start=2:end=0"}}], ["expected above 0"]),
        ([{**KD, "schedules": {"soft-target.weight": "linear:start=-1:end=0"}}], ["would be -1"]),
        (
            [{**KD, "schedules": {"soft-target.weight": "linera:start=1:end=0"}}],
            ["unknown schedule 'linera'", "linear"],
        ),
        ([{**KD, "schedules": {"soft-target.weight": "linear:start=1"}}], ["lacks end"]),
        ([{**KD, "per_layer": "uniform"}], ["per_layer is 'uniform'; expected skip or last"]),
        ([{**KD, "per_layer": "skip", "method": "pkd:layer_map={pear}"}], ["{pear} stands for nothing", "pair"]),
        ([], ["`phases` is not a list of phases"]),
        (["kd"], ["phase 1 is not `key: value` lines"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(
    read: Callable[..., tuple[Phase, ...]], phases: list[Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        read(*phases)
    for word in words:
        assert word in str(refused.value)


def test_a_phase_without_a_step_is_refused(read: Callable[..., tuple[Phase, ...]]) -> None:
    phases = read({**KD, "share": 0.01}, {**KD, "name": "b", "share": 0.99})
    with pytest.raises(UsageError, match=r"phase 'kd' has no step: its share 0\.01 of 10 steps"):
        num_steps(phases, total=10, steps_per_epoch=5)


def test_lengths_of_phases_and_of_the_run_exclude_each_other(read: Callable[..., tuple[Phase, ...]]) -> None:
    with pytest.raises(UsageError, match="--max-steps and phases with lengths of their own"):
        read({"name": "a", "method": "hard", "max_steps": 5}, max_steps=10)


def test_a_recipe_takes_the_place_of_methods() -> None:
    with pytest.raises(UsageError, match="--method and --recipe exclude each other"):
        TrainStudent(view=("v",), output_dir="o", recipe="r.yaml", method=("hard",))
