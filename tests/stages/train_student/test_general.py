"""General distillation: a student of text without labels, which opens with transformers and is fine-tuned on a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import kd
from kd.pipeline.errors import KdError, RefusedError
from kd.pipeline.stage import StageContext, execute
from kd.stages.train_student import TrainStudent

TRIPLE = ("soft-target:5:temperature=2", "hard:2", "distilbert:1")
STUDENT = "bert:num_layers=1:hidden_size=16:heads=4"


@pytest.fixture(scope="module")
def capture(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[str], write_rows: Callable[..., Path]
) -> Callable[..., Path]:
    """`capture(teacher, **options)`: a view of sixty texts without labels; the same one when asked again."""
    folder = tmp_path_factory.mktemp("general")
    texts = write_rows(folder / "text.csv", ["text"], [[text] for text in sentences[:60]])
    made: dict[str, Path] = {}

    def make(teacher: Path, **options: Any) -> Path:
        name = json.dumps([str(teacher), options], sort_keys=True)
        if name not in made:
            place = folder / str(len(made))
            kd.cache_teacher(
                teacher=str(teacher), dataset=str(texts), text_column="text", store=str(place / "store"),
                max_length=64, output_dir=str(place / "view"), **options,
            )  # fmt: skip
            made[name] = place / "view"
        return made[name]

    return make


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """The tiny teacher without its head, as sentence encoders come."""
    folder = tmp_path_factory.mktemp("encoder")
    AutoModel.from_pretrained(tiny_teacher).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


def train(folder: Path, view: Path, *method: str, **options: Any) -> Any:
    given = {"student": STUDENT, "max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, **options}
    views = (str(view), *map(str, given.pop("others", ())))
    return execute(TrainStudent(view=views, method=method, output_dir=str(folder), **given), StageContext())


def opened(auto: Any, folder: Path) -> Any:
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def losses(folder: Path, name: str = "loss") -> list[float]:
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [entry[name] for entry in history if name in entry]


def test_a_masked_lm_student_learns_its_words_and_opens_as_one(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    view = capture(masked_lm, mask_share=0.15, for_=("distilbert",))
    train(tmp_path / "run", view, *TRIPLE, max_steps=60, learning_rate=5e-3)
    found = losses(tmp_path / "run", "loss/hard")
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])
    assert {"loss/soft-target", "loss/distilbert.1-2"} <= {
        name for entry in json.loads((tmp_path / "run/metrics.json").read_text())["history"] for name in entry
    }
    model = opened(AutoModelForMaskedLM, tmp_path / "run")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    inputs = tokenizer("the cat [MASK] the book", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 7, len(tokenizer))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "fill-mask" in card and "AutoModelForMaskedLM" in card and "load_student" not in card


def test_baseline_is_the_masked_lm_without_a_teacher(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    view = capture(masked_lm, mask_share=0.15, for_=("distilbert",))
    outcome = train(tmp_path / "run", view, *TRIPLE, baseline=True)
    assert outcome.summary["role"] == "baseline" and outcome.summary["rows_with_gold"] == 60
    opened(AutoModelForMaskedLM, tmp_path / "run")


def test_states_of_masked_tokens_alone_train_the_same_soft_targets(
    capture: Any, masked_lm: Path, tmp_path: Path
) -> None:
    """From all token states, from those of masked tokens, and from stored logits: one student."""
    kept = {
        "tokens": {"signals": "hidden.tok@2:float32", "sidecars": ("embeddings", "head")},
        "masked": {"signals": "mlm.hidden:float32", "sidecars": ("embeddings", "head")},
        "logits": {"signals": "mlm.logits:float32"},
    }
    found = {}
    for name, options in kept.items():
        train(tmp_path / name, capture(masked_lm, mask_share=0.15, **options), "soft-target", "hard")
        found[name] = losses(tmp_path / name)
    assert len(found["logits"]) == 6
    assert found["tokens"] == found["masked"] == pytest.approx(found["logits"], rel=1e-5)


def test_an_interrupted_training_goes_on_to_the_same_student(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    """Checkpoints hold a tied head once."""
    view = capture(masked_lm, mask_share=0.15, for_=("distilbert",))
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    train(tmp_path / "whole", view, *TRIPLE, **options)
    checkpoint = next((tmp_path / "whole").rglob("checkpoint-3"))
    train(tmp_path / "resumed", view, *TRIPLE, **options, resume_from_checkpoint=str(checkpoint))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert one == two


def test_a_recipe_of_two_phases_over_masked_text(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    view = capture(masked_lm, mask_share=0.15, for_=("distilbert",))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "phases:\n  - {name: states, method: distilbert, share: 0.5}\n  - {name: words, method: 'hard', share: 0.5}\n"
    )
    stage = TrainStudent(
        view=(str(view),), student=STUDENT, recipe=str(recipe), max_steps=4, output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
    )  # fmt: skip
    execute(stage, StageContext())
    opened(AutoModelForMaskedLM, tmp_path / "run")


def test_rounds_of_masks_are_views_that_are_trained_on_together(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    views = [capture(masked_lm, mask_share=0.15, mask_seed=seed, for_=("distilbert",)) for seed in (0, 1)]
    outcome = train(tmp_path / "run", views[0], *TRIPLE, others=views[1:])
    assert outcome.summary["rows"] == 120
    other = capture(masked_lm, mask_share=0.3, for_=("distilbert",))
    with pytest.raises(RefusedError, match="masked differently"):
        train(tmp_path / "other", views[0], *TRIPLE, others=[other])


@pytest.mark.parametrize("method", ["tinybert", "minilm", "minilmv2"])
def test_an_encoder_without_a_head_teaches_an_encoder_without_a_head(
    method: str, capture: Any, encoder: Path, tmp_path: Path
) -> None:
    view = capture(encoder, for_=("tinybert", "minilm", "minilmv2"), student_layers=1)
    train(tmp_path / "run", view, method)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    model = opened(AutoModel, tmp_path / "run")
    assert model(torch.tensor([[2, 10, 3]])).last_hidden_state.shape == (1, 3, 16)
    assert "feature-extraction" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["masked-lm", "encoder"])
def test_a_mobilebert_learns_from_text_without_labels(
    kind: str, capture: Any, masked_lm: Path, encoder: Path, tmp_path: Path
) -> None:
    student = "mobilebert:num_layers=2:bottleneck_size=16:embedding_size=16:num_ffn=1"
    if kind == "masked-lm":
        train(tmp_path / "run", capture(masked_lm, mask_share=0.15, for_=("distilbert",)), *TRIPLE, student=student)
        opened(AutoModelForMaskedLM, tmp_path / "run")
    else:
        view = capture(encoder, for_=("tinybert", "minilm", "minilmv2"), student_layers=1)
        train(tmp_path / "run", view, "minilmv2:heads=4", student=student)
        opened(AutoModel, tmp_path / "run")


@pytest.mark.parametrize("kind", ["masked-lm", "encoder"])
def test_a_general_student_is_the_start_of_one_for_a_task(
    kind: str, capture: Any, masked_lm: Path, encoder: Path, tiny_teacher: Path, topics: Path, tmp_path: Path
) -> None:
    if kind == "masked-lm":
        train(tmp_path / "general", capture(masked_lm, mask_share=0.15, for_=("distilbert",)), *TRIPLE)
    else:
        view = capture(encoder, for_=("tinybert", "minilm", "minilmv2"), student_layers=1)
        train(tmp_path / "general", view, "minilmv2")
    kd.cache_teacher(
        teacher=str(encoder), dataset=str(topics / "train.csv"), text_column="text", label_column="label",
        signals="hidden.cls@2", store=str(tmp_path / "store"), output_dir=str(tmp_path / "view"),
    )  # fmt: skip
    run = tmp_path / "task"
    train(run, tmp_path / "view", "hard", student=str(tmp_path / "general"))
    start = json.loads((run / "metrics.json").read_text())["start"]
    assert all(name.startswith(("classifier.", "bert.pooler.")) for name in start["tensors_made_anew"])
    student = kd.load_student(run)
    assert student(["the cat likes the book"]).shape == (1, 2)
    general = dict(AutoModel.from_pretrained(tmp_path / "general").named_parameters())
    trained = dict(student.model.bert.named_parameters())
    moved = {n: (trained[n] - general[n]).abs().max().item() for n in trained if not n.startswith("pooler")}
    assert max(moved.values()) < 0.05, "it did not start from the general student"


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("soft-target", {}, "neither labels nor masked tokens"),
        ("hard", {}, "neither labels nor masked tokens"),
        ("minilmv2", {"validation_fraction": 0.2}, "nothing to evaluate"),
        ("fitnets", {"student": "bilstm"}, "made for a task"),
    ],
)
def test_what_an_encoder_without_a_head_cannot_teach_is_refused(
    method: str, options: dict[str, Any], words: str, capture: Any, encoder: Path, tmp_path: Path
) -> None:
    view = capture(encoder, for_=("tinybert", "minilm", "minilmv2"), student_layers=1)
    with pytest.raises(KdError, match=words):
        train(tmp_path / "run", view, method, **options)


def test_one_prediction_per_example_is_refused_over_masked_text(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    view = capture(masked_lm, mask_share=0.15, for_=("distilbert",))
    with pytest.raises(RefusedError, match="one prediction per example"):
        train(tmp_path / "run", view, "logit-mse")


def test_a_general_student_is_not_loaded_as_a_classifier(capture: Any, masked_lm: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", capture(masked_lm, mask_share=0.15, for_=("distilbert",)), *TRIPLE, max_steps=1)
    with pytest.raises(RefusedError, match="for no task"):
        kd.load_student(tmp_path / "run")
