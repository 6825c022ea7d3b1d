"""Teachers of token tasks: trained on the first piece of every word, scored by entity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import open_artifact
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.ragged import Ragged
from kd.pipeline.stage import StageContext, execute
from kd.stages.corpus import DatasetSource, load_corpus
from kd.stages.evaluate import Evaluate
from kd.stages.predict import load_predictor
from kd.stages.text_rows import NOT_SCORED, TextRows
from kd.stages.train_teacher import TrainTeacher

NAMES = ("B-WHAT", "B-WHO", "I-WHAT", "I-WHO", "O")


def stage(tiny_teacher: Path, data: Path, output_dir: Path, **fields: Any) -> TrainTeacher:
    values = {
        "model": str(tiny_teacher),
        "dataset": str(data / "train.jsonl"),
        "text_column": "words",
        "label_column": "tags",
        "output_dir": str(output_dir),
        "max_steps": 120,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "freeze_embeddings": False,
        "bf16": False,
    }
    return TrainTeacher(**(values | fields))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tagged: Path) -> tuple[Path, dict[str, Any]]:
    """A teacher folder and the summary of its training."""
    folder = tmp_path_factory.mktemp("token") / "teacher"
    made = stage(tiny_teacher, tagged, folder, eval_dataset=str(tagged / "test.jsonl"), eval_steps=60)
    return folder, dict(execute(made, StageContext()).summary)


def test_a_teacher_of_words_learns_entities_and_opens_in_transformers(teacher: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForTokenClassification

    folder, summary = teacher
    assert (*summary["metrics"],) == ("f1", "precision", "recall", "accuracy")
    assert summary["metrics"]["f1"] > 0.7
    assert summary["training"]["head"] == "random"
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert tuple(model.config.id2label.values()) == NAMES
    content = open_artifact(folder, kind="teacher").content
    assert (content["task"], tuple(content["label_names"])) == ("token", NAMES)
    card = (folder / "README.md").read_text()
    assert "token-classification" in card and "| f1 |" in card


def test_evaluate_scores_it_by_entity_and_writes_a_tag_per_word(
    teacher: tuple[Path, dict[str, Any]], tagged: Path, tmp_path: Path
) -> None:
    folder, trained = teacher
    test, file = str(tagged / "test.jsonl"), tmp_path / "p.parquet"
    scored = Evaluate(model=str(folder), dataset=test, teacher=str(folder), predictions=str(file))
    summary = scored.run(StageContext()).summary
    assert summary["metrics"] == trained["metrics"] == summary["teacher_metrics"]
    assert (summary["main_metric"], summary["agreement"], summary["words_not_seen"]) == ("f1", 1.0, 0)
    assert "f1 " in scored.report(summary)
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        words = row["text_a"].split(" ")
        assert len(row["label"]) == len(row["predicted"]) == len(row["logits"]) == len(words)
        assert [NAMES[int(np.argmax(logits))] for logits in row["logits"]] == row["predicted"]
    accuracy = np.mean([a == b for row in rows for a, b in zip(row["label"], row["predicted"], strict=True)])
    assert accuracy == pytest.approx(summary["metrics"]["accuracy"])


def test_words_beyond_the_cut_are_nothing(teacher: tuple[Path, dict[str, Any]], tagged: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    cut = Evaluate(model=str(teacher[0]), dataset=str(tagged / "test.jsonl"), max_length=4, predictions=str(file))
    summary = cut.run(StageContext()).summary
    assert summary["words_not_seen"] == summary["words"] - 2 * summary["rows"]
    assert summary["metrics"]["recall"] < 0.5
    assert "words were cut" in cut.report(summary)
    assert all(row["predicted"][2] is None and row["logits"][2] is None for row in pq.read_table(file).to_pylist())


def test_logits_of_words_equal_plain_transformers(teacher: tuple[Path, dict[str, Any]], sentences: list[str]) -> None:
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    texts = [text.replace(",", " , and").replace("  ", " ") for text in sentences[:9]] + ["unseen words zz"]
    tokenizer = AutoTokenizer.from_pretrained(teacher[0])
    plain = AutoModelForTokenClassification.from_pretrained(teacher[0]).eval()
    expected = []
    for text in texts:
        encoded = tokenizer([text.split(" ")], is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            logits_TC = plain(**encoded).logits[0]
        word_ids = encoded.word_ids(0)
        expected += [logits_TC[word_ids.index(word)].numpy() for word in range(len(text.split(" ")))]
    found = load_predictor(teacher[0]).predict(texts, batch_size=3)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)


def test_the_tag_of_a_word_is_at_its_first_piece_alone(tiny_teacher: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    rows = TextRows(
        tokenizer, ["film zz \x07 book", "a dog"], None, Ragged.from_rows([[1, 2, 3, 4], [5, 6]], "int64"), "token", 64
    )
    batch = rows.collate([rows[0], rows[1]])
    none = NOT_SCORED
    # [CLS] film z ##z book [SEP]: what is no word has no piece.
    assert batch["labels"].tolist() == [[none, 1, 2, none, 4, none, none, none], [none, 5, 6, *[none] * 5]]
    assert batch["input_ids"].shape == batch["labels"].shape


def test_rows_keep_all_their_tags_or_none(tiny_teacher: Path, tagged: Path, tmp_path: Path) -> None:
    few = stage(tiny_teacher, tagged, tmp_path / "t", labels_total=10).training_corpus()
    whole = load_corpus(DatasetSource(dataset=str(tagged / "train.jsonl"), text_column="words", label_column="tags"))
    assert len(few) == 10
    assert set(few.table["tags"].to_pylist()[0]) <= {0, 1, 2, 3, 4}
    assert few.info.label_names == whole.info.label_names


def test_what_cannot_work_is_refused(tiny_teacher: Path, tagged: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--head fitted is fitted to one label per text"):
        stage(tiny_teacher, tagged, tmp_path / "t", head="fitted").training_corpus()
    with pytest.raises(UsageError, match="--labels-per-class needs one class per row"):
        stage(tiny_teacher, tagged, tmp_path / "t", labels_per_class=1).training_corpus()
    (tmp_path / "train.jsonl").write_text(json.dumps({"words": ["a", "b"], "tags": ["O", "O"]}))
    with pytest.raises(RefusedError, match=r"all 1 labelled rows of .* have the label 'O'"):
        stage(tiny_teacher, tmp_path, tmp_path / "t").training_corpus()
