from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import RefusedError
from kd.stages.predict import load_predictor


def test_logits_come_in_the_order_of_the_texts_whatever_the_batches(tiny_teacher: Path, sentences: list[str]) -> None:
    model = load_predictor(tiny_teacher)
    whole = model.predict(sentences[:50], batch_size=50)
    one_by_one = np.concatenate([model.predict([text]) for text in sentences[:50]])
    np.testing.assert_allclose(whole, one_by_one, atol=1e-5)
    np.testing.assert_allclose(model.predict(sentences[:50], batch_size=7), whole, atol=1e-5)


def test_predictions_equal_plain_transformers(tiny_teacher: Path, sentences: list[str]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_teacher).eval()
    with torch.inference_mode():
        expected = plain(**tokenizer(sentences[:8], sentences[8:16], padding=True, return_tensors="pt")).logits.numpy()
    found = load_predictor(tiny_teacher).predict(sentences[:8], sentences[8:16])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_texts_give_no_logits(tiny_teacher: Path) -> None:
    assert load_predictor(tiny_teacher).predict(["one"])[:0].shape == (0, 3)


def test_inputs_are_cut_where_the_manifest_says_that_training_cut_them(make_run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    model = load_predictor(run)
    assert model.max_length == 48
    assert load_predictor(run, max_length=16).max_length == 16
    long = " ".join(["cat"] * 100)
    assert model.predict([long]).shape == (1, 3)


def test_parameters_and_bytes_are_those_of_the_model(tiny_teacher: Path) -> None:
    model = load_predictor(tiny_teacher)
    config = model.model.config
    tables = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * config.hidden_size
    assert model.num_embedding_parameters == tables
    assert model.num_parameters > tables
    assert model.num_bytes == (tiny_teacher / "model.safetensors").stat().st_size


def test_columns_are_matched_by_name(make_model, tmp_path: Path, sentences: list[str]) -> None:
    plain = load_predictor(make_model(tmp_path / "plain"))
    turned = load_predictor(make_model(tmp_path / "turned", names=("positive", "negative", "neutral")))
    order = turned.columns_of(plain.label_names, of="plain")
    assert order is not None
    found = turned.predict(sentences[:9])[:, order]
    np.testing.assert_allclose(found, plain.predict(sentences[:9]), atol=1e-5)
    assert plain.columns_of(plain.label_names, of="itself") is None


def test_other_labels_are_refused_by_name(tiny_teacher: Path) -> None:
    with pytest.raises(RefusedError, match="do not have the same labels") as raised:
        load_predictor(tiny_teacher).columns_of(("negative", "neutral", "great"), of="student")
    assert "only in student: 'great'" in str(raised.value)
    assert "'positive'" in str(raised.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is not a folder"):
        load_predictor(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match=r"no config\.json"):
        load_predictor(tmp_path)
    write_manifest(tmp_path, {"kind": "view", "fingerprint": "0", "content": {}})
    with pytest.raises(RefusedError, match="is a view, not a model"):
        load_predictor(tmp_path)


def test_an_unfinished_run_is_refused(make_model, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "run")
    (folder / "unfinished.json").write_text("{}")
    with pytest.raises(RefusedError, match="not finished"):
        load_predictor(folder)
    assert load_predictor(folder, finished=False).task == "single-label"


def test_a_model_without_its_head_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_teacher)
    model.bert.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="lacks 2 tensors"):
        load_predictor(tmp_path)


def test_one_output_without_a_problem_type_is_a_regression(make_model, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = make_model(tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, problem_type=None, ignore_mismatched_sizes=True
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("problem_type", None)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_predictor(folder)
    assert (model.task, model.label_names) == ("regression", ())
    assert model.predict(["the cat"]).shape == (1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.safetensors": lambda data: data[: len(data) // 2]}, "cannot be opened"),
        ({"model.safetensors": lambda data: b""}, "cannot be opened"),
        ({"config.json": lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": 64')}, "cannot be opened"),
        (
            {"config.json": lambda data: data.replace(b"single_label_classification", b"nope")},
            "cannot be opened|'nope'",
        ),
        (
            {"config.json": lambda data: data.replace(b'"1": "neutral"', b'"7": "neutral"')},
            "names 3 of 3 labels|opened",
        ),
        ({"config.json": lambda data: b"\xff" + data}, "cannot be opened"),
        ({"tokenizer.json": lambda data: data[:100]}, "cannot be opened"),
    ],
)
def test_a_folder_that_is_half_there_or_was_edited_is_refused(
    make_model: Callable[..., Path], tmp_path: Path, change: dict[str, Callable[[bytes], bytes]], words: str
) -> None:
    folder = make_model(tmp_path / "model")
    for name, changed in change.items():
        before = (folder / name).read_bytes()
        assert changed(before) != before
        (folder / name).write_bytes(changed(before))
    with pytest.raises(RefusedError, match=words):
        load_predictor(folder)
