from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import execute
from kd.stages.evaluate import Evaluate

COLUMNS = {"text_column": "text", "label_column": "label"}


def evaluate(model: Path, dataset: Path, **fields: object) -> dict:
    return dict(execute(Evaluate(model=str(model), dataset=str(dataset), **{**COLUMNS, **fields})).summary)


def test_the_labels_that_a_model_gave_score_nine_of_ten(tiny_teacher, judged) -> None:
    summary = evaluate(tiny_teacher, judged)
    assert summary["metrics"]["accuracy"] == pytest.approx(0.9)
    assert summary["rows"] == 200
    assert summary["standard_error"] == pytest.approx((0.9 * 0.1 / 200) ** 0.5)
    assert next(iter(summary["metrics"])) == summary["main_metric"] == "accuracy"


def test_labels_are_matched_by_name_whatever_their_order_in_the_model(make_model, judged, tmp_path) -> None:
    turned = make_model(tmp_path / "turned", names=("positive", "negative", "neutral"))
    assert evaluate(turned, judged)["metrics"]["accuracy"] == pytest.approx(0.9)


def test_agreement_with_a_teacher_is_by_name_too(make_model, tiny_teacher, judged, tmp_path) -> None:
    turned = make_model(tmp_path / "turned", names=("neutral", "positive", "negative"))
    summary = evaluate(turned, judged, teacher=str(tiny_teacher))
    assert summary["agreement"] == 1.0
    assert summary["teacher_metrics"]["accuracy"] == pytest.approx(0.9)
    assert summary["teacher_metrics"]["nll"] == pytest.approx(summary["metrics"]["nll"], rel=1e-4)


def test_a_teacher_with_other_labels_is_refused(make_model, tiny_teacher, judged, tmp_path) -> None:
    import json

    other = make_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="do not have the same labels"):
        evaluate(tiny_teacher, judged, teacher=str(other))


def test_a_label_that_the_model_does_not_know_is_refused(tiny_teacher, write_rows, tmp_path) -> None:
    data = write_rows(tmp_path / "d.csv", ["text", "label"], [["the cat", "positve"], ["a dog", "negative"]])
    with pytest.raises(RefusedError, match="did you mean 'positive'"):
        evaluate(tiny_teacher, data)


def test_predictions_go_to_a_file_with_every_row_labelled_or_not(tiny_teacher, judged, write_rows, tmp_path) -> None:
    rows = list(csv.reader(judged.open()))[1:]
    data = write_rows(tmp_path / "d.csv", ["text", "label"], [[text, ""] for text, _ in rows[:3]] + rows[3:20])
    summary = evaluate(tiny_teacher, data, predictions=str(tmp_path / "out" / "p.parquet"))
    table = pq.read_table(tmp_path / "out" / "p.parquet")
    assert (summary["rows"], summary["unlabelled_rows"]) == (20, 3)
    assert table["label"].to_pylist()[:3] == [None, None, None]
    assert set(table["predicted"].to_pylist()) <= {"negative", "neutral", "positive"}
    assert len(table["logits"][0]) == 3
    right = [a == b for a, b in zip(table["label"].to_pylist()[3:], table["predicted"].to_pylist()[3:], strict=True)]
    assert sum(right) / len(right) == pytest.approx(summary["metrics"]["accuracy"])


def test_unlabelled_rows_alone_are_refused_unless_something_else_is_asked(
    tiny_teacher, write_rows, sentences, tmp_path
) -> None:
    data = write_rows(tmp_path / "d.csv", ["text"], [[text] for text in sentences[:5]])
    with pytest.raises(RefusedError, match="no labelled row"):
        evaluate(tiny_teacher, data, label_column=None)
    assert evaluate(tiny_teacher, data, label_column=None, teacher=str(tiny_teacher))["agreement"] == 1.0


def test_the_columns_of_a_run_need_not_be_given_and_others_do(make_run, tiny_teacher, judged, tmp_path) -> None:
    run = make_run(tmp_path / "run", noise=0.0)
    assert evaluate(run, judged, text_column=None, label_column=None)["metrics"]["accuracy"] == pytest.approx(0.9)
    with pytest.raises(UsageError, match="--text-column is needed"):
        evaluate(tiny_teacher, judged, text_column=None, label_column=None)


def test_another_metric_may_come_first_and_an_unknown_one_lists_near_matches(tiny_teacher, judged) -> None:
    summary = evaluate(tiny_teacher, judged, metric="macro_f1")
    assert next(iter(summary["metrics"])) == "macro_f1"
    with pytest.raises(UsageError, match="did you mean 'macro_f1'"):
        evaluate(tiny_teacher, judged, metric="macrof1")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 0}, "--batch-size is 0; expected 1 or more"),
        ({"max_length": -1}, "--max-length is -1; expected 3 or more"),
        ({"max_length": 9999}, "--max-length is 9999;.* takes 64 tokens at most"),
        ({"device": "cpuu"}, "unknown device 'cpuu'.*did you mean 'cpu'"),
    ],
)
def test_what_cannot_be_run_is_refused(tiny_teacher, judged, fields: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(tiny_teacher, judged, **fields)


def test_the_report_shows_model_and_teacher_side_by_side(tiny_teacher, judged) -> None:
    stage = Evaluate(model=str(tiny_teacher), dataset=str(judged), teacher=str(tiny_teacher), **COLUMNS)
    text = stage.report(execute(stage).summary)
    assert "accuracy" in text and "0.9000   0.9000" in text
    assert "agreement" in text


def test_a_diverged_model_is_refused_and_not_scored(make_model, judged, tmp_path) -> None:
    broken = make_model(tmp_path / "broken", noise=float("nan"))
    with pytest.raises(RefusedError, match="not finite for 200 of 200 rows"):
        evaluate(broken, judged)
