"""Whole runs: what they write, that they resume bit for bit, and that every row meets its own signals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import kd
from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import StageContext, execute
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.trainer import Distillation, StudentTrainer

SMALL = "bilstm:hidden_size=6:head_size=8"


def stage(view: Any, output: Path, **fields: Any) -> TrainStudent:
    values: dict[str, Any] = {
        "view": (str(view.path),),
        "student": SMALL,
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1.0,
        "logging_steps": 1,
        **fields,
    }
    return TrainStudent(**values)


def train(view: Any, output: Path, **fields: Any) -> dict[str, Any]:
    return dict(execute(stage(view, output, **fields), StageContext()).summary)


def metrics_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


def losses_of(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if name.startswith("loss") or name in ("step", "grad_norm")}
        for entry in metrics_of(run)["history"]
        if "loss" in entry
    ]


def test_a_run_folder_holds_a_student_that_opens_by_itself(view: Any, eval_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(
        view,
        run,
        method=("soft-target:0.9:temperature=4", "hard:0.1"),
        eval_dataset=str(eval_file),
        num_train_epochs=2.0,
    )
    assert summary["role"] == "distilled" and summary["steps"] == 30 and summary["rows"] == 120
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.json", "manifest.json"} <= {
        entry.name for entry in run.iterdir()
    }
    content = json.loads((run / "manifest.json").read_text())["content"]
    assert content["method"] == "soft-target:0.9:temperature=4,hard:0.1"
    assert content["init"] == "embeddings" and content["label_names"] == ["negative", "neutral", "positive"]
    assert content["columns"]["text_column"] == "text" and content["max_length"] == 64

    student = kd.load_student(run)
    assert student.label_names == ["negative", "neutral", "positive"]
    assert student.model.get_input_embeddings().num_embeddings == student.tokenizer.vocab_size
    assert content["num_parameters"] == sum(p.numel() for p in student.model.parameters())
    again = metrics_of(run)["metrics"]
    logits = student([*map(str, __import__("pyarrow.parquet").parquet.read_table(eval_file)["text"].to_pylist())])
    assert np.mean(logits.argmax(1) == np.arange(30) % 3) == pytest.approx(again["accuracy"], abs=1e-6)

    log = losses_of(run)
    assert all({"loss", "loss/soft-target", "loss/hard"} <= set(entry) for entry in log) and len(log) == 30
    for entry in log:
        assert entry["loss"] == pytest.approx(0.9 * entry["loss/soft-target"] + 0.1 * entry["loss/hard"], rel=1e-5)
    training = metrics_of(run)["training"]
    assert 0 < training["reader_wait_share"] < 1 and training["rows_with_gold"] == 90


def test_the_resolved_configuration_trains_the_same_student_again(view: Any, tmp_path: Path) -> None:
    from kd.pipeline.config import build_stage, read_config

    train(view, tmp_path / "one", bf16=False)
    resolved = tmp_path / "one" / "resolved_config.yaml"
    config = yaml.safe_load(resolved.read_text())
    assert config["learning_rate"] == 2e-3 and config["init"] == "embeddings" and config["max_steps"] == 15
    again = build_stage(TrainStudent, {**read_config(TrainStudent, resolved), "output_dir": str(tmp_path / "two")})
    execute(again, StageContext())
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(view: Any, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        train(view, tmp_path / name, seed=seed)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


FULL = {
    "method": ("soft-target", "fitnets:0.1:layer_map=1-2", "hard:0.2"),
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2.0,
    "save_steps": 4,
    "save_total_limit": 20,
}


class Killed(Exception):
    pass


def dies_at(calls: int, monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """Let the forward pass of that number fail."""
    forward, seen = Distillation.forward, 0

    def counting(self: Distillation, *args: Any, **fields: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == calls:
            what()
        return forward(self, *args, **fields)

    monkeypatch.setattr(Distillation, "forward", counting)


def same_checkpoints(one: Path, two: Path) -> None:
    """Weights with projections, optimiser, schedule and random state of every checkpoint that both have are equal."""
    names = {path.name for path in (one / "checkpoints").glob("checkpoint-*")} & {
        path.name for path in (two / "checkpoints").glob("checkpoint-*")
    }
    assert names
    for name in names:
        ours, theirs = (load_file(run / "checkpoints" / name / "model.safetensors") for run in (one, two))
        assert any(key.startswith("projections.") for key in ours)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            a, b = (torch.load(run / "checkpoints" / name / file, weights_only=False) for run in (one, two))
            assert repr(a) == repr(b) or _equal(a, b), file


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def undisturbed(view: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(view, run, **FULL)
    return run


@pytest.mark.parametrize("calls", [3, 20, 43])
def test_a_killed_run_resumes_bit_for_bit(
    view: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """30 steps of 2 passes, a checkpoint every 4: killed before the first, in mid-epoch, and in the next epoch."""

    def kill() -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        dies_at(calls, patched, kill)
        with pytest.raises(Killed):
            train(view, run, **FULL)
    assert not (run / "manifest.json").exists()
    train(view, run, **FULL)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert losses_of(run) == losses_of(undisturbed)
    same_checkpoints(run, undisturbed)
    assert [entry.get("epoch") for entry in metrics_of(run)["history"]] == [
        entry.get("epoch") for entry in metrics_of(undisturbed)["history"]
    ]


def test_a_run_killed_after_its_last_step_trains_no_further(
    view: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.stages.train_student import training

    def kill(*_: Any) -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "export_run", kill)
        with pytest.raises(Killed):
            train(view, run, **FULL)
    assert (run / "checkpoints" / "checkpoint-30").is_dir()
    with monkeypatch.context() as patched:
        dies_at(1, patched, kill)
        train(view, run, **FULL)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert losses_of(run) == losses_of(undisturbed)


def test_the_export_holds_no_projection(undisturbed: Path) -> None:
    assert not [name for name in load_file(undisturbed / "model.safetensors") if "projection" in name]


def test_an_interrupt_saves_the_step_it_came_in_and_resumes(
    view: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        dies_at(19, patched, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(view, run, **FULL)
    assert signal.getsignal(signal.SIGINT) is before
    assert (run / "checkpoints" / "checkpoint-10").is_dir() and not (run / "manifest.json").exists()
    train(view, run, **FULL)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_an_interrupt_keeps_its_checkpoint_beside_the_best_one(
    view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a limit of one checkpoint, transformers ends training by deleting all but the best.
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        dies_at(19, patched, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(view, run, **{**FULL, "validation_fraction": 0.3, "eval_steps": 4, "save_total_limit": 1})
    assert (run / "checkpoints" / "checkpoint-10" / "trainer_state.json").exists()


def test_an_unfinished_checkpoint_is_passed_over(
    view: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        dies_at(20, patched, kill)
        with pytest.raises(Killed):
            train(view, run, **FULL)
    half = run / "checkpoints" / "checkpoint-9"
    shutil.copytree(run / "checkpoints" / "checkpoint-8", half)
    (half / "trainer_state.json").unlink()
    (half / "model.safetensors").write_bytes(b"half")
    train(view, run, **FULL)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("killed_at", [None, 11])
def test_with_shuffling_accumulation_and_resume_every_row_meets_its_own_teacher_row(
    view: Any,
    planted: Callable[..., np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int | None,
) -> None:
    forward, seen, rows_seen = Distillation.forward, 0, 0

    def checking(self: Distillation, inputs: Any, labels: Any, has_gold: Any, signals: Any) -> Any:
        nonlocal seen, rows_seen
        seen += 1
        if seen == killed_at:
            raise Killed
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            ids = inputs["input_ids"][row, :length].tolist()
            rows_seen += 1
            assert np.array_equal(signals["logits"][row], planted("logits", ids))
            assert np.array_equal(signals["hidden.tok@2"][row][:length], planted("hidden.tok@2", ids))
        return forward(self, inputs, labels, has_gold, signals)

    monkeypatch.setattr(Distillation, "forward", checking)
    run = tmp_path / "run"
    if killed_at is not None:
        with pytest.raises(Killed):
            train(view, run, **FULL)
        rows_seen = 0
    train(view, run, **FULL)
    assert rows_seen == (240 if killed_at is None else 240 - 4 * 8)


def test_gold_labels_stay_with_their_rows(view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from kd.pipeline.store import open_view

    tokenizer = AutoTokenizer.from_pretrained(str(open_view(view.path).store.sidecar_folder("tokenizer")))
    gold = {tuple(tokenizer(text)["input_ids"]): label for text, label in zip(view.texts, view.labels, strict=True)}
    names = ["negative", "neutral", "positive"]
    forward = Distillation.forward

    def checking(self: Distillation, inputs: Any, labels: Any, has_gold: Any, signals: Any) -> Any:
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            expected = gold[tuple(inputs["input_ids"][row, :length].tolist())]
            assert bool(has_gold[row]) == (expected is not None)
            assert expected is None or names[int(labels[row])] == expected
        return forward(self, inputs, labels, has_gold, signals)

    monkeypatch.setattr(Distillation, "forward", checking)
    train(view, tmp_path / "run", method=("soft-target", "hard"))


def test_a_baseline_has_the_same_start_and_budget_and_no_teacher_signal(
    view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: dict[str, Any] = {}
    seen: dict[str, list[Any]] = {"signals": [], "gold": [], "rows": []}
    forward = Distillation.forward

    def recording(self: Distillation, inputs: Any, labels: Any, has_gold: Any, signals: Any) -> Any:
        starts.setdefault(current, {name: value.clone() for name, value in self.student.state_dict().items()})
        if current == "baseline":
            seen["signals"].append(dict(signals))
            seen["gold"].append(bool(has_gold.all()))
            seen["rows"].append(len(labels))
        return forward(self, inputs, labels, has_gold, signals)

    monkeypatch.setattr(Distillation, "forward", recording)
    fields: dict[str, Any] = {"student": "bert:num_layers=1", "num_train_epochs": 2.0}
    summaries = {}
    for current, extra in (("distilled", {}), ("baseline", {"baseline": True})):
        summaries[current] = train(view, tmp_path / current, **fields, **extra)
    assert summaries["baseline"]["role"] == "baseline" and summaries["baseline"]["method"] == "hard:1"
    assert summaries["baseline"]["steps"] == summaries["distilled"]["steps"] == 30
    assert seen["signals"] == [{}] * 30 and all(seen["gold"]) and seen["rows"] == [8] * 30
    assert summaries["baseline"]["rows"] == 90
    for name, value in starts["distilled"].items():
        assert torch.equal(value, starts["baseline"][name]), name


def test_a_large_vocabulary_trains_alike_with_and_without_its_unseen_rows(
    view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.stages.train_student import training

    train(view, tmp_path / "reduced", max_steps=10)
    monkeypatch.setattr(training, "SEEN_SHARE", 0.0)
    train(view, tmp_path / "whole", max_steps=10)
    reduced, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("reduced", "whole"))
    for name, value in whole.items():
        torch.testing.assert_close(reduced[name], value, atol=2e-5, rtol=1e-4, msg=name)
    sizes = [
        next((tmp_path / name / "checkpoints").glob("checkpoint-*/model.safetensors")).stat().st_size
        for name in ("reduced", "whole")
    ]
    assert sizes[0] < sizes[1]


def test_evaluation_picks_the_best_checkpoint_and_stops_early(view: Any, eval_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        view,
        run,
        eval_dataset=str(eval_file),
        num_train_epochs=20.0,
        eval_steps=5,
        early_stopping_patience=2,
        metric_for_best_model="nll",
    )
    found = metrics_of(run)
    evaluations = [entry for entry in found["history"] if "eval_nll" in entry]
    best = min(evaluations, key=lambda entry: entry["eval_nll"])
    assert found["training"]["best_step"] == best["step"]
    assert found["training"]["steps"] == best["step"] + 10 < 300
    assert found["metrics"]["nll"] == pytest.approx(best["eval_nll"], abs=1e-5)


def test_held_out_rows_are_judged_by_gold_and_by_the_teacher(view: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(view, run, validation_fraction=0.3, num_train_epochs=2.0)
    found = metrics_of(run)
    assert {"accuracy", "agreement", "nll"} <= set(found["metrics"]) and summary["rows"] < 100
    assert summary["evaluated_on"] == "held-out rows of the view"
    alone = train(view, tmp_path / "baseline", validation_fraction=0.3, baseline=True)
    assert "agreement" not in alone and alone["steps"] == 10


def test_unlabelled_text_is_selected_by_agreement(
    plant: Callable[..., Any], sentences: list[str], tmp_path: Path
) -> None:
    unlabelled = plant(sentences[:80], signals="logits")
    run = tmp_path / "run"
    train(unlabelled, run, init="random", validation_fraction=0.25)
    assert set(metrics_of(run)["metrics"]) == {"agreement"}
    assert metrics_of(run)["training"]["best_metric"] == "agreement"


def test_several_views_train_together(
    plant: Callable[..., Any], view: Any, sentences: list[str], tmp_path: Path
) -> None:
    other = plant(sentences[130:170], ["positive"] * 40, teacher="two")
    run = tmp_path / "run"
    paths = (str(view.path), str(other.path))
    method = ("soft-target", "fitnets:layer_map=1-1")
    summary = dict(execute(dataclasses.replace(stage(view, run, method=method), view=paths), StageContext()).summary)
    assert summary["rows"] == 160 and summary["rows_with_gold"] == 130 and summary["steps"] == 20
    assert len(json.loads((run / "manifest.json").read_text())["content"]["view"]) == 2


@pytest.mark.parametrize(
    ("student", "method", "init"),
    [
        ("bilstm:hidden_size=6:units=words", "logit-mse,fitnets:at=mean:layer_map=1-2", None),
        ("bilstm:hidden_size=6:num_layers=2", "soft-target,pkd:0.1", "random"),
        ("bilstm:hidden_size=6:static=true", "soft-target", "embeddings"),
        ("bert", "soft-target,pkd:0.1,fitnets:0.1:layer_map=last", "layers:1+2"),
        ("bert:hidden_size=16:heads=2:num_layers=2", "pkd:layer_map=1-2,logit-mse", None),
        ("mobilebert:num_layers=2:bottleneck_size=16:embedding_size=16", "soft-target,fitnets:layer_map=2-2", None),
    ],
)
def test_every_student_trains_and_opens_again(
    view: Any, eval_file: Path, tmp_path: Path, student: str, method: str, init: str | None
) -> None:
    run = tmp_path / "run"
    train(view, run, student=student, method=(method,), init=init, eval_dataset=str(eval_file))
    loaded = kd.load_student(run)
    texts = view.texts[:3]
    assert loaded(texts).shape == (3, 3) and np.isfinite(loaded(texts)).all()
    if not student.startswith("bilstm"):
        from transformers import AutoModelForSequenceClassification

        plain = AutoModelForSequenceClassification.from_pretrained(run)
        assert type(plain) is type(loaded.model)


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"max_position_embeddings": 6}, True, "takes 6 tokens at most, and the longest row has"),
        ({}, False, "cannot be opened with AutoModelForSequenceClassification"),
        ({"model_type": "vit"}, True, "cannot be opened with AutoModelForSequenceClassification"),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_is_refused(
    view: Any, tiny_teacher: Path, tmp_path: Path, config: dict[str, Any], weights: bool, words: str
) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_teacher, student)
    known = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(known | config))
    if not weights:
        (student / "model.safetensors").write_bytes(b"half")
    with pytest.raises(RefusedError, match=words):
        train(view, tmp_path / "run", student=str(student))


def test_a_preset_trains_as_it_says(view: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    student = "bilstm:preset=tang:hidden_size=6:embedding_size=8"
    train(view, run, student=student, method=("logit-mse",), max_steps=3, per_device_train_batch_size=None)
    resolved = yaml.safe_load((run / "resolved_config.yaml").read_text())
    expected = {"optim": "adadelta", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    assert {name: resolved[name] for name in expected} == expected and resolved["per_device_train_batch_size"] == 50
    given = SimpleNamespace(optim="adadelta", learning_rate=1.0)
    assert StudentTrainer.get_optimizer_cls_and_kwargs(given) == (torch.optim.Adadelta, {"lr": 1.0, "rho": 0.95})
    loaded = kd.load_student(run)
    tables = [loaded.model.get_parameter(f"{name}.weight") for name in ("embeddings", "static_embeddings")]
    assert loaded.model.config.pooling == "last" and not torch.equal(*tables)
    texts = [view.texts[0] * 5, "the cat", view.texts[1], "a", view.texts[2] * 2]
    np.testing.assert_allclose(loaded(texts, batch_size=2), [loaded([text])[0] for text in texts], atol=1e-6)


def test_a_checkpoint_is_a_student_too(view: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(view, run, student=str(tiny_teacher), method=("soft-target", "fitnets:0.1"))
    assert metrics_of(run)["start"] == {"tensors_made_anew": []}
    again = train(view, tmp_path / "again", student=str(run))
    assert again["init"] == "checkpoint"


@pytest.mark.parametrize("student", [SMALL, "bert:num_layers=1"])
def test_pairs(plant: Callable[..., Any], sentences: list[str], tmp_path: Path, student: str) -> None:
    pairs = plant(sentences[:48], ["positive", "negative"] * 24, second=sentences[50:98])
    run = tmp_path / "run"
    train(pairs, run, student=student, init="random", method=("soft-target", "fitnets:0.1:layer_map=1-2", "hard:0.1"))
    loaded = kd.load_student(run)
    there, back = loaded(["the cat"], ["a dog"]), loaded(["a dog"], ["the cat"])
    assert there.shape == (1, 3) and not np.allclose(there, back)


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_other_tasks(plant: Callable[..., Any], sentences: list[str], tmp_path: Path, task: str) -> None:
    generator = np.random.default_rng(0)
    if task == "regression":
        labels: list[Any] = [float(x) if i % 3 else None for i, x in enumerate(generator.normal(size=60))]
    else:
        labels = [[name for name in ("a", "b") if generator.random() < 0.5] if i % 3 else None for i in range(60)]
    names = ("LABEL_0",) if task == "regression" else ("a", "b")
    rows = plant(sentences[:60], labels, task=task, label_names=names, signals="logits")
    run = tmp_path / "run"
    summary = train(
        rows, run, init="random", method=("soft-target", "logit-mse:0.1", "hard:0.5"), validation_fraction=0.3
    )
    assert ("pearson" if task == "regression" else "micro_f1") in summary
    assert kd.load_student(run)(["the cat"]).shape == (1, len(names))
    config = json.loads((run / "config.json").read_text())
    assert config["problem_type"] == {"regression": "regression", "multi-label": "multi_label_classification"}[task]


def test_a_diverging_run_is_refused_with_advice(view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Distillation.forward

    def broken(self: Distillation, *args: Any, **fields: Any) -> Any:
        outputs = forward(self, *args, **fields)
        return {**outputs, "loss": outputs["loss"] * float("nan")}

    monkeypatch.setattr(Distillation, "forward", broken)
    with pytest.raises(RefusedError, match="--learning-rate"):
        train(view, tmp_path / "run")


def test_an_interrupted_run_of_other_settings_is_not_continued(
    view: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        dies_at(20, patched, kill)
        with pytest.raises(Killed):
            train(view, run, **FULL)
    with pytest.raises(RefusedError, match="learning_rate"):
        train(view, run, **{**FULL, "learning_rate": 0.5})


def test_bfloat16_autocast_trains_and_exports_float32(view: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(view, run, bf16=True, method=("soft-target", "fitnets:0.1:layer_map=1-2"))
    assert all(value.dtype == torch.float32 for value in load_file(run / "model.safetensors").values())
