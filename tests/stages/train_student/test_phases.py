"""Whole trainings in phases: what each trains and hands on, and that a kill anywhere changes nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kd
from kd.pipeline.artifact import open_artifact
from kd.pipeline.config import build_stage, read_config
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import NullProgress, StageContext, execute
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.trainer import Distillation

BERT = "bert:hidden_size=16:heads=2:num_layers=2:intermediate_size=16"
HINT = {
    "name": "hint",
    "method": "fitnets:layer_map=1-1",
    "share": 0.4,
    "trainable": ["embeddings", "layers<=1", "projections"],
}
KD = {
    "name": "kd",
    "method": "soft-target:4:temperature=3,hard",
    "share": 0.4,
    "unfreeze_every": 3,
    "schedules": {"soft-target.weight": "linear:start=4:end=1"},
}
LAST = {
    "name": "last",
    "method": "fitnets:layer_map=1-1,soft-target",
    "share": 0.2,
    "learning_rate": 1e-4,
    "lr_multipliers": ["embeddings:0.5", "projections:3"],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe file with these phases."""

    def make(*phases: dict[str, Any], name: str = "recipe") -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"phases": list(phases)}, sort_keys=False))
        return file

    return make


def stage(view: Any, output: Path, file: Path, **fields: Any) -> TrainStudent:
    values: dict[str, Any] = {
        "view": (str(view.path),),
        "student": BERT,
        "recipe": str(file),
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "logging_steps": 1,
        "save_steps": 3,
        "weight_decay": 0.1,
        **fields,
    }
    return TrainStudent(**values)


def train(view: Any, output: Path, file: Path, **fields: Any) -> dict[str, Any]:
    return dict(execute(stage(view, output, file, **fields), StageContext()).summary)


def metrics_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


def losses_of(run: Path) -> list[dict[str, Any]]:
    names = ("step", "phase", "grad_norm", "learning_rate", "epoch")
    return [
        {name: value for name, value in entry.items() if name.startswith("loss") or name in names}
        for entry in metrics_of(run)["history"]
        if "loss" in entry
    ]


class Watched:
    """The forward passes of a training: a copy of every parameter before each, and what had a gradient."""

    def __init__(self, patched: pytest.MonkeyPatch, kill_at: int | None = None) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.with_gradient: list[set[str]] = []
        self.signals: list[set[str]] = []
        forward = Distillation.forward

        def watching(distillation: Distillation, **given: Any) -> Any:
            if len(self.before) == kill_at:
                raise Killed
            named = dict(distillation.named_parameters())
            self.before.append({name: value.detach().clone() for name, value in named.items()})
            self.with_gradient.append({name for name, value in named.items() if value.requires_grad})
            self.signals.append(set(given["signals"]))
            return forward(distillation, **given)

        patched.setattr(Distillation, "forward", watching)

    def moved(self, first: int, last: int) -> set[str]:
        """Parameters of the student that differ between two passes."""
        a, b = self.before[first], self.before[last]
        return {name for name in a if name.startswith("student.") and not torch.equal(a[name], b[name])}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(view: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watched, dict[str, Any]]:
    """A run of the three phases, what was seen of it, and its summary."""
    folder = tmp_path_factory.mktemp("phases")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"phases": [HINT, KD, LAST]}, sort_keys=False))
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched)
        summary = train(view, folder / "run", file)
    return folder / "run", watched, summary


def test_a_phase_trains_its_parts_alone_and_decays_no_other(undisturbed: tuple[Path, Watched, Any]) -> None:
    _, watched, _ = undisturbed
    assert len(watched.before) == 20
    parts = {name.split("encoder.")[-1].split(".attention")[0].split(".")[0] for name in watched.moved(0, 8)}
    assert parts == {"student", "layer"}
    moved = watched.moved(0, 8)
    assert any("word_embeddings" in name for name in moved) and any("layer.0." in name for name in moved)
    assert not [name for name in moved if "layer.1." in name or "classifier" in name or "pooler" in name]
    assert not [name for name in watched.with_gradient[0] if "layer.1." in name or "classifier" in name]
    assert any(name.startswith("projections.") for name in watched.with_gradient[0])


def test_parts_are_unfrozen_one_by_one(undisturbed: tuple[Path, Watched, Any]) -> None:
    _, watched, _ = undisturbed
    # Steps 8 to 15 are the second phase: the head for 3 steps, then with layer 2, then with layer 1.
    head = watched.moved(8, 11)
    assert head and all("classifier" in name or "pooler" in name for name in head)
    second = watched.moved(11, 14)
    assert any("layer.1." in name for name in second) and not any("layer.0." in name for name in second)
    assert any("layer.0." in name for name in watched.moved(14, 15))
    assert not any("embeddings" in name for name in watched.moved(8, 15))
    # The last phase trains everything again.
    assert any("embeddings" in name for name in watched.moved(16, 19))


def test_a_phase_reads_its_own_signals_alone(undisturbed: tuple[Path, Watched, Any]) -> None:
    _, watched, _ = undisturbed
    assert watched.signals[0] == {"hidden.tok@1"} and watched.signals[8] == {"logits"}
    assert watched.signals[16] == {"hidden.tok@1", "logits"}


def test_a_projection_waits_for_the_next_phase_with_its_method(undisturbed: tuple[Path, Watched, Any]) -> None:
    run, watched, _ = undisturbed
    name = "projections.0.1-1.weight"
    assert name not in watched.before[8]
    kept = load_file(run / "checkpoints" / "2-kd" / "phase.safetensors")["projections.fitnets/1-1.weight"]
    assert torch.equal(watched.before[16][name], kept)
    assert not torch.equal(watched.before[7][name], watched.before[0][name])
    assert not [key for key in load_file(run / "model.safetensors") if "projection" in key]


def test_scheduled_weights_are_those_of_the_step(undisturbed: tuple[Path, Watched, Any]) -> None:
    run, _, _ = undisturbed
    log = losses_of(run)
    assert [entry["step"] for entry in log] == [*range(1, 21)]
    assert [entry["phase"] for entry in log] == ["hint"] * 8 + ["kd"] * 8 + ["last"] * 4
    for step, entry in enumerate(log[8:16]):
        expected = (4 - 3 * step / 7) * entry["loss/soft-target"] + entry["loss/hard"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_says_what_came_of_every_phase(undisturbed: tuple[Path, Watched, Any], view: Any) -> None:
    run, _, summary = undisturbed
    assert summary["steps"] == 20 and summary["role"] == "distilled"
    assert {name: facts["steps"] for name, facts in summary["phases"].items()} == {"hint": 8, "kd": 8, "last": 4}
    assert summary["method"] == (
        "fitnets:1:layer_map=1-1 > soft-target:4:temperature=3,hard:1 > fitnets:1:layer_map=1-1,soft-target:1"
    )
    phases = metrics_of(run)["phases"]
    assert [facts["trainable"] for facts in phases] == [["embeddings", "layers<=1", "projections"], "all", "all"]
    assert [facts["learning_rate"] for facts in phases] == [2e-4, 2e-4, 1e-4]
    manifest = open_artifact(run).manifest
    assert manifest["content"]["budget"]["max_steps"] == 20
    assert manifest["content"]["budget"]["learning_rate"] == [2e-4, 2e-4, 1e-4]
    assert manifest["identity"]["config"]["recipe"]["1 hint"]["trainable"] == ["embeddings", "layers<=1", "projections"]
    assert kd.load_student(run)(view.texts[:2]).shape == (2, 3)


@pytest.mark.parametrize("kill_at", [2, 5, 8, 12, 16, 18])
def test_a_killed_run_goes_on_in_its_phase_bit_for_bit(
    view: Any,
    undisturbed: tuple[Path, Watched, Any],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
) -> None:
    """Before the first checkpoint, within each phase, and in the first step after each border."""
    run, file = tmp_path / "run", recipe(HINT, KD, LAST)
    with monkeypatch.context() as patched:
        Watched(patched, kill_at)
        with pytest.raises(Killed):
            train(view, run, file)
    assert not (run / "manifest.json").exists()
    with monkeypatch.context() as patched:
        again = Watched(patched)
        train(view, run, file)
    begun = max(start for start in (0, 8, 16) if start <= kill_at)
    assert len(again.before) == 20 - begun - (kill_at - begun) // 3 * 3
    first, *_ = undisturbed
    assert (run / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert losses_of(run) == losses_of(first)


def test_a_kill_between_the_files_of_a_border_costs_no_phase(
    view: Any,
    undisturbed: tuple[Path, Watched, Any],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kd.stages.train_student import phases

    run, file = tmp_path / "run", recipe(HINT, KD, LAST)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(phases, "atomic_write_bytes", killed)
        with pytest.raises(Killed):
            train(view, run, file)
    assert (run / "checkpoints" / "1-hint" / "checkpoint-8").is_dir()
    with monkeypatch.context() as patched:
        again = Watched(patched)
        train(view, run, file)
    assert len(again.before) == 12
    assert (run / "model.safetensors").read_bytes() == (undisturbed[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [7, 10])
def test_an_interrupt_saves_where_it_came_in_a_phase_or_at_its_end(
    view: Any,
    undisturbed: tuple[Path, Watched, Any],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    run, file = tmp_path / "run", recipe(HINT, KD, LAST)
    forward, seen = Distillation.forward, 0

    def interrupting(distillation: Distillation, **given: Any) -> Any:
        nonlocal seen
        if seen == step:
            os.kill(os.getpid(), signal.SIGINT)
        seen += 1
        return forward(distillation, **given)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "forward", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(view, run, file)
    assert seen == step + 1 and (run / "checkpoints" / "1-hint" / "phase.json").exists()
    train(view, run, file)
    assert (run / "model.safetensors").read_bytes() == (undisturbed[0] / "model.safetensors").read_bytes()


def test_the_resolved_configuration_and_recipe_train_the_same_student_again(
    view: Any, undisturbed: tuple[Path, Watched, Any], tmp_path: Path
) -> None:
    run, *_ = undisturbed
    config = read_config(TrainStudent, run / "resolved_config.yaml")
    assert config["recipe"] == str(run / "recipe.yaml")
    execute(build_stage(TrainStudent, {**config, "output_dir": str(tmp_path / "again")}), StageContext())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_recipe_is_known_by_what_it_says_and_not_by_where_it_is(
    view: Any, undisturbed: tuple[Path, Watched, Any], recipe: Callable[..., Path]
) -> None:
    run, *_ = undisturbed
    outcome = execute(stage(view, run, recipe(HINT, KD, LAST, name="moved")), StageContext())
    assert outcome.skipped
    with pytest.raises(RefusedError, match=r"recipe\.3 last\.learning_rate: 0\.0001 → 0\.0002"):
        train(view, run, recipe(HINT, KD, {**LAST, "learning_rate": 2e-4}))


def test_a_baseline_has_the_steps_of_all_phases(view: Any, recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe(
        {"name": "a", "method": "soft-target", "max_steps": 3}, {"name": "b", "method": "hard", "num_train_epochs": 0.2}
    )
    summary = train(view, tmp_path / "run", file, max_steps=None, baseline=True)
    assert summary["role"] == "baseline" and summary["method"] == "hard:1" and summary["steps"] == 6
    assert "phases" not in summary
    rates = []
    for name, fields in (("run", {}), ("distilled", {"baseline": False})):
        train(view, tmp_path / name, file, **{"max_steps": None, "baseline": True, **fields})
        rates.append(open_artifact(tmp_path / name).content["budget"]["learning_rate"])
    assert rates == [2e-4, 2e-4]
    config = read_config(TrainStudent, tmp_path / "run" / "resolved_config.yaml")
    assert config["max_steps"] == 6 and config["recipe"] is None


def test_a_phase_on_gold_labels_alone_trains_on_rows_that_have_one(
    view: Any, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    phases = ({"name": name, "method": name, "share": 0.5} for name in ("soft-target", "hard"))
    train(view, tmp_path / "run", recipe(*phases), max_steps=4)
    assert [facts["rows"] for facts in metrics_of(tmp_path / "run")["phases"]] == [120, 90]


def test_phases_go_on_with_other_epochs_of_the_same_rows(
    view: Any, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.stages.train_student.rows import Rows

    seen: list[tuple[int, ...]] = []
    batch = Rows.batch
    monkeypatch.setattr(Rows, "batch", lambda rows, index: seen.append(tuple(index.tolist())) or batch(rows, index))
    phases = ({"name": name, "method": "soft-target", "share": 0.5} for name in "ab")
    train(view, tmp_path / "run", recipe(*phases), max_steps=30, dataloader_num_workers=0)
    assert len(seen) == 30 and {row for rows in seen[:15] for row in rows} == {*range(120)}
    assert {row for rows in seen[15:] for row in rows} == {*range(120)} and seen[:15] != seen[15:]


def test_only_the_last_phase_is_judged_and_picks_its_best_step_unless_a_phase_asks_for_it(
    view: Any, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    file = recipe(
        {**HINT, "share": 0.4},
        {"name": "kd", "method": "soft-target", "share": 0.4, "load_best_model_at_end": True},
        {**LAST, "share": 0.2},
    )
    train(view, run, file, validation_fraction=0.3, eval_steps=2, save_steps=None)
    found = metrics_of(run)
    judged = [(entry["phase"], entry["step"]) for entry in found["history"] if "eval_accuracy" in entry]
    assert judged == [("kd", 10), ("kd", 12), ("kd", 14), ("kd", 16), ("last", 18), ("last", 20)]
    assert [facts["best_step"] is not None for facts in found["phases"]] == [False, True, True]


def test_progress_names_the_phase_and_the_estimate_covers_all(
    view: Any, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    tasks: list[tuple[str, Any]] = []
    estimates: list[tuple[str, Any]] = []

    class Recording(NullProgress):
        def task(self, name: str, *, total: float | None = None, unit: str = "rows", initial: float = 0) -> Any:
            tasks.append((name, total))
            return super().task(name)

        def estimate(self, text: str, **fields: Any) -> None:
            estimates.append((text, fields["steps"]))

    execute(stage(view, tmp_path / "run", recipe(HINT, KD, LAST)), StageContext(progress=Recording()))
    assert tasks == [("phase 1/3 hint", 8), ("phase 2/3 kd", 8), ("phase 3/3 last", 4)]
    assert estimates[0][1] == 20 and "20 steps in 3 phases (hint 8, kd 8, last 4)" in estimates[0][0]


def test_a_bilstm_goes_through_phases_too(view: Any, recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe(
        {"name": "hint", "method": "fitnets:layer_map=1-2:at=mean", "share": 0.5},
        {"name": "kd", "method": "soft-target", "share": 0.5, "unfreeze_every": 0.3},
    )
    train(view, tmp_path / "run", file, student="bilstm:hidden_size=6:head_size=8", max_steps=6)
    assert kd.load_student(tmp_path / "run")(view.texts[:2]).shape == (2, 3)


CONVERGING = {"name": "a", "method": "soft-target", "share": 0.5, "until": "loss:every=2:patience=2:improvement=0.9"}


def test_a_phase_that_has_converged_ends_and_the_next_one_begins_also_after_a_kill_and_an_interrupt(
    view: Any, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No window of two steps is a tenth of the first: the third one ends it. Checkpoints are of steps 3 and 6."""
    file = recipe(CONVERGING, {"name": "b", "method": "hard", "share": 0.5})
    train(view, tmp_path / "whole", file)
    phases = metrics_of(tmp_path / "whole")["phases"]
    assert [(facts["steps"], facts["max_steps"], facts.get("converged_at")) for facts in phases] == [
        (6, 10, 6),
        (10, 10, None),
    ]
    assert yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())["phases"][0]["until"] == CONVERGING["until"]
    forward, seen = Distillation.forward, 0

    def disturbed(how: Callable[[], None], at: int) -> Any:
        def watching(distillation: Distillation, **given: Any) -> Any:
            nonlocal seen
            if seen == at:
                how()
            seen += 1
            return forward(distillation, **given)

        return watching

    def kill() -> None:
        raise Killed

    # In the window that is half done at the checkpoint; and in the very step that ends the phase.
    for name, how, at, error, left in (
        ("killed", kill, 5, Killed, 13),
        ("interrupted", lambda: os.kill(os.getpid(), signal.SIGINT), 5, KeyboardInterrupt, 10),
    ):
        seen = 0
        with monkeypatch.context() as patched:
            patched.setattr(Distillation, "forward", disturbed(how, at))
            with pytest.raises(error):
                train(view, tmp_path / name, file)
        with monkeypatch.context() as patched:
            again = Watched(patched)
            train(view, tmp_path / name, file)
        assert len(again.before) == left
        weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", name)]
        assert weights[0] == weights[1]
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "whole")


def test_a_phase_may_be_ended_by_its_evaluations(view: Any, recipe: Callable[..., Path], tmp_path: Path) -> None:
    first = {"name": "a", "method": "soft-target", "share": 0.6, "learning_rate": 1e-12}
    judged = {**first, "load_best_model_at_end": True, "early_stopping_patience": 2}
    last = {"name": "b", "method": "soft-target", "share": 0.4}
    train(view, tmp_path / "run", recipe(judged, last), validation_fraction=0.3, eval_steps=2, save_steps=None)
    assert [facts["steps"] for facts in metrics_of(tmp_path / "run")["phases"]] == [6, 8]
    with pytest.raises(UsageError, match=r"(?s)phase 'a' is not evaluated.*until: loss"):
        train(view, tmp_path / "other", recipe({**first, "early_stopping_patience": 2}, last), validation_fraction=0.3)
