"""Students of words: each word meets the teacher's logits of its own first piece, or nothing; runs open and predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

import kd
from kd.pipeline.errors import KdError, UsageError, VerificationError
from kd.pipeline.stage import StageContext, execute
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.compare import Compare
from kd.stages.derivation import derivation_of
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.preparation import prepare
from kd.stages.train_student.trainer import Distillation, predict_logits
from kd.stages.train_student.training import make_data
from kd.stages.word_pieces import COLUMN

LENGTH = 12
SMALL = ("bert:num_layers=1:hidden_size=16:heads=2", "bilstm:hidden_size=4", "bilstm:hidden_size=4:units=words")


@pytest.fixture(scope="module")
def rows(tagged_rows: Any) -> list[tuple[list[str], list[str] | None]]:
    """Forty rows, the last ten without tags."""
    return [(words, None if row >= 30 else tags) for row, (words, tags) in enumerate(tagged_rows[:40])]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory, token_teacher: Path, write_tagged: Callable[..., Path]) -> Any:
    """`capture(rows, **options)`: the view of rows of words, all of one store."""
    folder = tmp_path_factory.mktemp("words")

    def make(rows: Any, name: str, **options: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KD_CACHE_HOME", str(folder / "cache"))
            given = {
                "teacher": str(token_teacher),
                "dataset": str(write_tagged(folder / f"{name}.parquet", rows)),
                "text_column": "words",
                "label_column": "tags",
                "store": str(folder / "store"),
                "output_dir": str(folder / name),
                "max_length": LENGTH,
                "signals": "logits,hidden.tok@0+1",
            }
            execute(CacheTeacher(**{**given, **options}), StageContext())
        return folder / name

    return make


@pytest.fixture(scope="module")
def view(capture: Any, rows: Any) -> Path:
    return capture(rows, "view")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory, tagged_rows: Any, write_tagged: Any) -> str:
    return str(write_tagged(tmp_path_factory.mktemp("eval") / "eval.parquet", tagged_rows[40:]))


def stage(view: Path, output: Path, **fields: Any) -> TrainStudent:
    values = {"student": SMALL[1], "per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1, **fields}
    return TrainStudent(view=(str(view),), output_dir=str(output), **values)


def ready(stage: TrainStudent) -> tuple[Any, Any, Any]:
    """(distillation in evaluation mode, rows, tokenizer) as a run has them before its first step."""
    prepared = prepare(stage)
    texts = [text for corpus in prepared.corpora for text in corpus.texts()[0]]
    tokenizer = prepared.student.make_tokenizer(prepared.start, prepared.teacher, lambda: texts, whole_words=True)
    torch.manual_seed(0)
    model = prepared.student.build(prepared.start, prepared.teacher, prepared.task, tokenizer).model
    data = make_data(prepared, tokenizer, model)
    return Distillation(model, prepared.student, prepared.terms, prepared.shapes).eval(), data.rows, tokenizer


def by_hand(folder: Path | None, model: Any, tokenizer: Any, words: list[str]) -> list[np.ndarray | None]:
    """float64 [C] logits of every word of a row alone at its first token, None where it has none.

    Args:
        folder: of the tokenizer that cuts words into pieces; None where every word is one token.
    """
    if folder is None:
        ids = [tokenizer.get_vocab().get(word.lower(), tokenizer.unk_token_id) for word in words][:LENGTH]
        first, inputs = [*range(len(ids))], {"input_ids": torch.tensor([ids])}
    else:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        found = encoded.word_ids(0)
        first = [found.index(word) if word in found else -1 for word in range(len(words))]
        inputs = {"input_ids": encoded["input_ids"]}
    with torch.inference_mode():
        logits = model(**inputs).logits[0].double().numpy()
    first += [-1] * (len(words) - len(first))
    return [None if place < 0 else logits[place] for place in first]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.mark.parametrize("student", SMALL)
def test_losses_are_those_of_the_live_teacher_word_by_word(
    view: Path, rows: Any, token_teacher: Path, tmp_path: Path, student: str
) -> None:
    method = ("soft-target:temperature=3", "logit-mse:reduction=sum_class", "hard")
    distillation, data, tokenizer = ready(stage(view, tmp_path / "run", student=student, method=method))
    pieces = AutoTokenizer.from_pretrained(token_teacher)
    teacher = AutoModelForTokenClassification.from_pretrained(token_teacher).eval()
    names = ["O", "B-THING", "I-THING"]
    own = None if "words" in student else token_teacher
    pairs, gold, unseen = [], [], 0
    for words, tags in rows:
        of_student = by_hand(own, distillation.student, tokenizer if own is None else pieces, words)
        of_teacher = by_hand(token_teacher, teacher, pieces, words)
        for word, (mine, its) in enumerate(zip(of_student, of_teacher, strict=True)):
            if mine is None or its is None:
                unseen += 1
                continue
            pairs.append((mine, its))
            gold.append(0.0 if tags is None else -log_softmax(mine)[names.index(tags[word])])
    student_PC, teacher_PC = (np.stack(side) for side in zip(*pairs, strict=True))
    soft_student, soft_teacher = log_softmax(student_PC / 3), log_softmax(teacher_PC / 3)
    expected = {
        "soft-target": 9 * (np.exp(soft_teacher) * (soft_teacher - soft_student)).sum(-1).mean(),
        "logit-mse": ((student_PC - teacher_PC) ** 2).sum(-1).mean(),
        "hard": np.mean(gold),
    }
    index = np.arange(len(rows))
    batch = data.batch(index)
    assert len(batch["labels"]) == len(pairs) and unseen > 5  # words that were cut have no target, nor have lost ones
    found = {name: value.item() for name, value in distillation(**batch)["terms"].items()}
    assert found == pytest.approx(expected, rel=1e-6)

    # Another order, and other padding, change nothing.
    turned = distillation(**data.batch(index[::-1].copy()))["terms"]
    alone = [
        (len(one["labels"]), distillation(**one)["terms"]) for one in (data.batch(index[i : i + 1]) for i in index)
    ]
    for name, value in found.items():
        assert turned[name].item() == pytest.approx(value, rel=1e-5)
        assert sum(count * terms[name].item() for count, terms in alone) / len(pairs) == pytest.approx(value, rel=1e-5)
    logits_WC = predict_logits(distillation.student, data, batch_size=7)
    assert np.isfinite(logits_WC).all(1).sum() >= len(pairs) and len(logits_WC) == sum(len(words) for words, _ in rows)


def test_a_row_none_of_whose_words_is_seen_costs_nothing(capture: Any, rows: Any, tmp_path: Path) -> None:
    odd = capture([*rows[:8], (["\u200b"], ["O"])], "odd")
    distillation, data, _ = ready(stage(odd, tmp_path / "run", method=("soft-target,logit-mse,hard",)))
    found = distillation(**data.batch(np.array([8])))
    assert found["loss"].item() == 0.0 and len(data.batch(np.array([8]))["labels"]) == 0


def test_states_and_a_head_stand_for_logits(capture: Any, view: Path, rows: Any, tmp_path: Path) -> None:
    states = {"signals": "hidden.tok@last:float32", "sidecars": ("embeddings", "head")}
    derived = capture(rows, "states", store=str(tmp_path / "store"), **states)
    found = []
    for place in (view, derived):
        prepared = prepare(stage(place, tmp_path / "run", method=("soft-target", "logit-mse")))
        torch.manual_seed(0)
        tokenizer = prepared.teacher.tokenizer
        model = prepared.student.build(prepared.start, prepared.teacher, prepared.task, tokenizer).model
        batch = make_data(prepared, tokenizer, model).rows.batch(np.arange(len(rows)))
        derivation = derivation_of(prepared.views[0].store) if prepared.derives else None
        distillation = Distillation(model, prepared.student, prepared.terms, prepared.shapes, derivation).eval()
        found.append({name: value.item() for name, value in distillation(**batch)["terms"].items()})
    assert prepared.derives and found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("student", "method"),
    [
        ("bert:num_layers=2:hidden_size=16:heads=2", "soft-target:0.9,hard:0.1,fitnets:0.1:layer_map=1-1"),
        ("bilstm:preset=tang:hidden_size=4:embedding_size=8", "logit-mse,hard:0.1"),
        ("mobilebert:num_layers=1:bottleneck_size=16:embedding_size=16:heads=2", "soft-target"),
    ],
)
def test_a_run_opens_and_tags_words(
    view: Path, tmp_path: Path, eval_file: str, student: str, method: str, capture: Any, rows: Any
) -> None:
    run = tmp_path / "run"
    given = stage(view, run, student=student, method=(method,), eval_dataset=eval_file)
    if "bilstm" in student:
        more = capture([*rows[5:12]], "more")
        given = stage(view, run, student=student, method=(method,), validation_fraction=0.3, init="embeddings")
        given = TrainStudent(**{**vars(given), "view": (str(view), str(more))})
    summary = execute(given, StageContext()).summary
    assert summary["role"] == "distilled" and {"f1", "precision", "recall", "accuracy"} <= {*summary}
    content = json.loads((run / "manifest.json").read_text())["content"]
    assert content["task"] == "token" and content["label_names"] == ["O", "B-THING", "I-THING"]
    assert "token-classification" in (run / "README.md").read_text()
    assert ("agreement" in summary) == ("bilstm" in student)

    if "bert" in student[:4]:
        # What came of it is a start for others, and reads the teacher's tokens too.
        again = stage(view, tmp_path / "again", student=str(run), method=("soft-target",), max_steps=1)
        assert execute(again, StageContext()).summary["steps"] == 1
    loaded = kd.load_student(run)
    lists = [words for words, _ in rows[:5]]
    tags = loaded.tags(lists)
    assert [len(row) for row in tags] == [len(row) for row in lists]
    assert {tag for row in tags for tag in row} <= {"O", "B-THING", "I-THING", None}
    from kd.stages.predict import load_predictor

    logits_WC = load_predictor(run).predict([" ".join(words) for words in lists])
    np.testing.assert_allclose(loaded(lists), logits_WC, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no list of words"):
        loaded(["a text"])


class Killed(Exception):
    pass


def test_a_killed_run_in_phases_resumes_bit_for_bit(
    view: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    phases = [
        {"name": "soft", "method": "soft-target", "max_steps": 3},
        {"name": "gold", "method": "hard", "max_steps": 3},
    ]
    recipe.write_text(json.dumps({"name": "two", "phases": phases}))
    fields = {"recipe": str(recipe), "max_steps": None, "save_steps": 2}
    execute(stage(view, tmp_path / "whole", **fields), StageContext())
    forward, calls = Distillation.forward, 0

    def dying(self: Distillation, *args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return forward(self, *args, **given)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "forward", dying)
        with pytest.raises(Killed):
            execute(stage(view, tmp_path / "killed", **fields), StageContext())
    execute(stage(view, tmp_path / "killed", **fields), StageContext())
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_runs_are_compared_by_entities(view: Path, eval_file: str, token_teacher: Path, tmp_path: Path) -> None:
    for name, fields in (("student", {"method": ("soft-target,hard",)}), ("baseline", {"baseline": True})):
        execute(stage(view, tmp_path / name, **fields), StageContext())
    summary = execute(
        Compare(
            runs=(str(tmp_path / "student"), str(tmp_path / "baseline")),
            teacher=str(token_teacher),
            dataset=eval_file,
            latency_texts=0,
            bootstrap_samples=100,
            output_dir=str(tmp_path / "report"),
        ),
        StageContext(),
    ).summary
    assert summary["main_metric"] == "f1" and summary["task"] == "token"
    baseline, distilled = summary["groups"]
    assert 0 <= distilled["agreement"] <= 1 and {*distilled["metrics"]} == {"f1", "precision", "recall", "accuracy"}
    gain = distilled["gain_over_start"]
    assert gain["mean"] == pytest.approx(distilled["metrics"]["f1"] - baseline["metrics"]["f1"])
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert "precision" in (tmp_path / "report" / "report.md").read_text()


def test_words_without_tags_train_an_encoder_as_other_texts_do(
    capture: Any, rows: Any, token_teacher: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(token_teacher).save_pretrained(bare)
    AutoTokenizer.from_pretrained(token_teacher).save_pretrained(bare)
    states = {"teacher": str(bare), "store": str(tmp_path / "store"), "signals": "hidden.tok@1", "label_column": None}
    untagged = capture([(words, None) for words, _ in rows[:12]], "untagged", task="token", **states)
    fields = {"student": "bert:num_layers=1:hidden_size=32:heads=4", "method": ("fitnets:layer_map=1-1",)}
    summary = execute(stage(untagged, tmp_path / "run", max_steps=1, **fields), StageContext()).summary
    assert summary["rows_with_gold"] == 0 and summary["role"] == "distilled"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"student": "bilstm:pooling=attention"}, "a token task pools nothing"),
        ({"method": ("soft-target:flsw=1",)}, "'flsw' of method 'soft-target' is for one label of several, not token"),
        ({"method": ("minilmv2",)}, "hard, .*logit-mse.*soft-target"),
        ({"student": SMALL[2], "method": ("fitnets",)}, "its own[^\0]*logit-mse[^\0]*soft-target"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    view: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(KdError, match=words):
        execute(stage(view, tmp_path / "run", **fields), StageContext())


def test_words_that_do_not_fit_their_corpus_are_refused_before_training(view: Path, tmp_path: Path) -> None:
    shutil.copytree(view.parent, tmp_path / "all")
    folder = tmp_path / "all" / view.name
    table = pq.read_table(folder / "examples.parquet")
    column = table[COLUMN].to_pylist()
    # As if two rows had been exchanged: what a join by position would do.
    column[0], column[1] = column[1], column[0]
    place = table.schema.get_field_index(COLUMN)
    pq.write_table(table.set_column(place, COLUMN, pa.array(column, pa.list_(pa.int16()))), folder / "examples.parquet")
    with pytest.raises(
        VerificationError, match=r"2 of 40 examples have words that cannot begin|is not the one that was"
    ):
        prepare(stage(folder, tmp_path / "run"))
