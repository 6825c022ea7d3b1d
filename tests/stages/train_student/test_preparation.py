"""What is refused before anything trains, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import KdError, RefusedError, UsageError, VerificationError
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.preparation import _teacher_config
from kd.stages.train_student.students import TeacherFacts


def stage(view: Any, **fields: Any) -> TrainStudent:
    paths = tuple(str(v.path) for v in (view if isinstance(view, list) else [view]))
    values: dict[str, Any] = {"view": paths, "student": "bilstm:hidden_size=4", "output_dir": "unused", **fields}
    if isinstance(values.get("method"), str):
        values["method"] = (values["method"],)
    return TrainStudent(**values)


def refusal(view: Any, **fields: Any) -> str:
    with pytest.raises(KdError) as error:
        stage(view, **fields).inputs()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"dim": None}, "is not one"),
        ({"n_layers": 0}, "num_hidden_layers is 0"),
        ({"n_heads": "4"}, "is not one"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"model_type": ["distilbert"]}, "num_hidden_layers is None"),
    ],
)
def test_a_teacher_is_known_by_the_names_that_its_kind_gives_its_sizes(
    tmp_path: Path, changes: dict[str, Any], words: str | None
) -> None:
    from transformers import DistilBertConfig

    config = DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64).to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    view: Any = SimpleNamespace(store=SimpleNamespace(url="a store", sidecar_folder=lambda name: tmp_path))
    if words is not None:
        with pytest.raises(VerificationError, match=words):
            _teacher_config(view)
        return
    facts = TeacherFacts(view.store, _teacher_config(view))
    assert (facts.num_layers, facts.hidden_size, facts.num_heads, facts.vocab_size) == (2, 32, 4, 99)


def test_missing_signals_are_named_with_the_command_that_adds_them(
    plant: Callable[..., Any], sentences: list[str]
) -> None:
    bare = plant(
        sentences[:20],
        signals="logits,hidden.cls@2",
        sidecars={"embeddings": {"word_embeddings.weight": np.ones((200, 32), np.float32)}},
    )
    text = refusal(bare, method="soft-target,fitnets:layer_map=1-2", init="random")
    assert "method 'fitnets' needs signals" in text
    assert "hidden.tok@2: 20 of 20 rows lack it" in text
    assert "held: logits:float32, hidden.cls@2:float16" in text
    assert "kd cache-teacher" in text and "--signals logits:float32,hidden.cls@2:float16,hidden.tok@2" in text
    assert f"--store {bare.path.parent / 'store'}" in text
    assert "signals" not in stage(bare, method="soft-target", init="random").inputs()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "soft-targte"}, "did you mean 'soft-target'?"),
        ({"student": "bilsmt"}, "did you mean 'bilstm'?"),
        ({"init": "embedings"}, "did you mean 'embeddings'?"),
        ({"student": "bert", "init": "layers:9"}, "the teacher has layers 1 to 2"),
        ({"method": "fitnets:layer_map=1-3"}, "layer 3 of the teacher"),
        ({"method": "fitnets:layer_map=2-2"}, "layer 2 of the student"),
        ({"method": "pkd"}, "and it has no other"),
        ({"student": "bilstm:units=words", "method": "fitnets"}, "need a student that reads the teacher's tokens"),
        ({"student": "mobilebert", "fp16": True}, "overflows in float16"),
        ({"student": "bert", "method": "minilmv2", "torch_compile": True}, "leave --torch-compile out"),
        ({"student": "bert:heads=2", "method": "minilm"}, "fit student 'bert:heads=2' as they are: alp-kd, ckd"),
        ({"student": "bert:heads=2", "method": "minilm"}, "in part: ir-kd:attention=false, mobilebert:attention=0"),
        ({"early_stopping_patience": 2}, "needs rows to evaluate on"),
        ({"metric_for_best_model": "acuracy", "validation_fraction": 0.3}, "did you mean 'accuracy'?"),
        ({"metric_for_best_model": "agreement", "validation_fraction": 0.3, "baseline": True}, "without --baseline"),
        ({"validation_fraction": 0.0001}, "holds back 0 of 120 rows"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0"),
        ({"student": "some/where"}, "neither a student's name nor a checkpoint"),
        ({"init": "vectors:nowhere.txt", "student": "bilstm:units=words"}, "no such file"),
    ],
)
def test_what_cannot_work_is_refused_before_training(view: Any, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(view, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"view": ()}, "needs a view"),
        ({"view": ("a", "a")}, "names a view twice"),
        ({"validation_fraction": 1.0}, "expected 0 to below 1"),
        ({"validation_fraction": 0.1, "eval_dataset": "d"}, "exclude each other"),
    ],
)
def test_a_contradictory_stage_is_refused_without_touching_the_disk(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        TrainStudent(**{"view": ("v",), "output_dir": "o", **fields})
    assert words in str(error.value)


def test_a_path_that_is_no_view_is_refused(tmp_path: Path, view: Any) -> None:
    with pytest.raises(RefusedError, match="does not exist"):
        TrainStudent(view=(str(tmp_path / "none"),), output_dir="o").inputs()


def test_a_baseline_needs_no_signal_but_gold_labels(plant: Callable[..., Any], sentences: list[str]) -> None:
    labelled = plant(sentences[:12], ["neutral"] * 12, signals="hidden.cls@0")
    assert "view" in stage(labelled, baseline=True, init="random").inputs()
    unlabelled = plant(sentences[:12], signals="logits")
    assert "--baseline needs gold labels" in refusal(unlabelled, baseline=True, init="random")
    assert "method 'hard' needs gold labels" in refusal(unlabelled, method="soft-target,hard:0.1", init="random")


def test_evaluation_labels_are_matched_by_name(view: Any, tmp_path: Path, sentences: list[str]) -> None:
    file = tmp_path / "eval.parquet"
    pq.write_table(pa.table({"text": sentences[:3], "label": ["positive", "positive", "negative"]}), file)
    prepared = stage(view, eval_dataset=str(file)).prepared
    assert prepared.eval_corpus is not None
    assert prepared.eval_corpus.labels()[0].tolist() == [2, 2, 0]
    pq.write_table(pa.table({"text": sentences[:3], "label": ["positive", "great", "negative"]}), file)
    assert "great" in refusal(view, eval_dataset=str(file))
    pq.write_table(pa.table({"text": sentences[:3], "label": pa.array([None] * 3, pa.string())}), file)
    assert "no labelled row" in refusal(view, eval_dataset=str(file))


def test_fingerprints_follow_the_inputs(
    view: Any, eval_file: Path, plant: Callable[..., Any], sentences: list[str], tmp_path: Path
) -> None:
    alone = stage(view).inputs()
    assert set(alone) == {"view"}
    assert set(stage(view, eval_dataset=str(eval_file)).inputs()) == {"view", "eval_dataset"}
    other = plant(sentences[100:130], teacher="two")
    both = stage([view, other], init="random").inputs()
    assert both["view"] not in (alone["view"], stage([other, view], init="random").inputs()["view"])
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("cat 1 2\n")
    fields = {"student": "bilstm:units=words", "init": f"vectors:{vectors}"}
    first = stage(view, **fields).inputs()
    vectors.write_text("cat 1 3\n")
    assert stage(view, **fields).inputs()["init"] != first["init"]


def test_views_that_do_not_belong_together_are_refused(
    plant: Callable[..., Any], view: Any, sentences: list[str]
) -> None:
    other_names = plant(sentences[:8], label_names=("negative", "positive"))
    assert "label names" in refusal([view, other_names])
    pairs = plant(sentences[:8], second=sentences[8:16])
    assert "text pairs: False and True" in refusal([view, pairs])


def test_held_out_rows_keep_variants_with_their_original(plant: Callable[..., Any], sentences: list[str]) -> None:
    parents = [None if i < 50 else i % 50 for i in range(150)]
    family = plant(sentences[:150], parents=parents, signals="logits")
    prepared = stage(family, validation_fraction=0.3, init="random").prepared
    held = prepared.held_out
    assert np.array_equal(held[:50], held[50:100]) and np.array_equal(held[:50], held[100:])
    assert 5 <= held[:50].sum() <= 25
    assert prepared.is_original.tolist() == [i < 50 for i in range(150)]
    other = stage(family, validation_fraction=0.3, init="random", seed=7).prepared.held_out
    assert not np.array_equal(held, other)
    more = stage(family, validation_fraction=0.5, init="random").prepared.held_out
    assert (more | ~held).all(), "a greater share keeps what a smaller one held back"


def test_the_metric_that_picks_is_gold_where_there_is_gold(
    plant: Callable[..., Any], view: Any, sentences: list[str], eval_file: Path
) -> None:
    assert stage(view, eval_dataset=str(eval_file)).prepared.best_metric == "accuracy"
    assert stage(view, validation_fraction=0.3).prepared.best_metric == "accuracy"
    unlabelled = plant(sentences[:60], signals="logits")
    prepared = stage(unlabelled, validation_fraction=0.3, init="random").prepared
    assert prepared.best_metric == "agreement" and prepared.best_is_greatest
    assert not stage(view, validation_fraction=0.3, metric_for_best_model="nll").prepared.best_is_greatest


def test_a_student_with_its_own_tokenizer_is_recognised(view: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    same = stage(view, student=str(tiny_teacher), method="fitnets:layer_map=1-1").prepared
    assert same.student.reads_teacher_tokens(same.teacher)
    from transformers import AutoTokenizer

    changed = tmp_path / "changed"
    import shutil

    shutil.copytree(tiny_teacher, changed)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_teacher))
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(changed)
    other = stage(view, student=str(changed), method="soft-target").prepared
    assert not other.student.reads_teacher_tokens(other.teacher)
    assert "reads the teacher's tokens" in refusal(view, student=str(changed), method="fitnets:layer_map=1-1")
