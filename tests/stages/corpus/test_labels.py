"""Label columns of every kind, matching by name, and hiding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.stages.corpus import Corpus, DatasetSource, hide_labels, load_corpus


def corpus_of(folder: Path, label: list[Any] | pa.Array, **fields: Any) -> Corpus:
    """A corpus of as many distinct texts as there are labels; other columns by name."""
    columns = {name: fields.pop(name) for name in [*fields] if name.startswith("column_")}
    data = {"text": [f"text number {i}" for i in range(len(label))], "label": label}
    data |= {name.removeprefix("column_"): values for name, values in columns.items()}
    pq.write_table(pa.table(data), folder / "x.parquet")
    names = fields.pop("label_names", None)
    source = {"dataset": str(folder / "x.parquet"), "text_column": "text", "label_column": "label", **fields}
    return load_corpus(DatasetSource(**source), label_names=names)


@pytest.mark.parametrize(
    ("label", "names", "expected"),
    [
        (["pos", "neg", "pos"], ("neg", "pos"), [1, 0, 1]),
        (["10", "9", "-1"], ("9", "10"), [1, 0, -1]),
        (["5 stars", "10", "2"], ("2", "10", "5 stars"), [2, 1, 0]),
        ([3, 1, 2], ("1", "2", "3"), [2, 0, 1]),
        ([0, -1, 1], ("0", "1"), [0, -1, 1]),
        ([None, 7, 8], ("7", "8"), [-1, 0, 1]),
        (["a", None, "  "], ("a",), [0, -1, -1]),
        ([True, False, None], ("False", "True"), [1, 0, -1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
        ([None, None, None], (), [-1, -1, -1]),
    ],
)
def test_classes_get_names_and_numbers(tmp_path: Path, label: Any, names: tuple[str, ...], expected: list[int]) -> None:
    corpus = corpus_of(tmp_path, label)
    labels, has_gold = corpus.labels()
    assert (corpus.info.task, corpus.info.label_names) == ("single-label", names)
    assert (labels.tolist(), labels.dtype) == (expected, np.int64)
    assert has_gold.tolist() == [label >= 0 for label in expected]
    assert corpus.counts["unlabelled"] == expected.count(-1)


@pytest.mark.parametrize("column", ["label_name", "label_text"])
def test_names_beside_integers_are_their_names_in_the_order_of_the_integers(tmp_path: Path, column: str) -> None:
    corpus = corpus_of(tmp_path, [2, 0, 1, 0], **{f"column_{column}": ["ant", "zebra", "bee", "zebra"]})
    assert corpus.info.label_names == ("zebra", "bee", "ant")
    assert corpus.labels()[0].tolist() == [2, 0, 1, 0]


def test_a_name_column_that_contradicts_itself_is_not_used(tmp_path: Path) -> None:
    assert corpus_of(tmp_path, [0, 1, 0], column_label_name=["a", "b", "c"]).info.label_names == ("0", "1")
    assert corpus_of(tmp_path, [0, 1, 0], column_label_name=["a", "a", "a"]).info.label_names == ("0", "1")


def test_fractions_are_scores_and_whole_floats_ask(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [0.5, None, 4.25, float("nan")])
    labels, has_gold = corpus.labels()
    assert (corpus.info.task, corpus.info.label_names) == ("regression", ())
    assert (labels.tolist(), labels.dtype) == ([0.5, 0.0, 4.25, 0.0], np.float32)
    assert has_gold.tolist() == [True, False, True, False]
    with pytest.raises(RefusedError, match="--task single-label or --task regression"):
        corpus_of(tmp_path, [0.0, 1.0, None])
    assert corpus_of(tmp_path, [0.0, 1.0, None], task="single-label").labels()[0].tolist() == [0, 1, -1]
    assert corpus_of(tmp_path, [0.0, 1.0, None], task="regression").info.task == "regression"


def test_integers_and_text_can_be_scores_when_said_so(tmp_path: Path) -> None:
    assert corpus_of(tmp_path, [3, -1], task="regression").labels()[0].tolist() == [3.0, -1.0]
    assert corpus_of(tmp_path, ["3.5", "", "1e1"], task="regression").labels()[0].tolist() == [3.5, 0.0, 10.0]


@pytest.mark.parametrize(
    ("label", "columns"),
    [
        ([["y", "x"], [], None], {}),
        (["y,x", "[]", None], {"task": "multi-label"}),
        (['["x", "y"]', "[]", ""], {"task": "multi-label"}),
    ],
)
def test_sets_of_names_become_one_column_per_class(tmp_path: Path, label: list[Any], columns: dict[str, str]) -> None:
    corpus = corpus_of(tmp_path, label, **columns)
    labels, has_gold = corpus.labels()
    assert (corpus.info.task, corpus.info.label_names) == ("multi-label", ("x", "y"))
    assert (labels.tolist(), labels.dtype) == ([[1, 1], [0, 0], [0, 0]], np.float32)
    assert has_gold.tolist() == [True, True, False]


def test_an_empty_set_is_a_label_and_null_is_none(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["x"], [], None])
    assert (corpus.counts["labelled"], corpus.counts["unlabelled"]) == (2, 1)


def test_lists_of_numbers_are_class_numbers_or_one_value_per_class(tmp_path: Path) -> None:
    assert corpus_of(tmp_path, [[0, 2], [1]]).labels()[0].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert corpus_of(tmp_path, [[0, 1, 0], [1, 1, 0]]).labels()[0].tolist() == [[0, 1, 0], [1, 1, 0]]
    assert corpus_of(tmp_path, [[1.0, 0.0], [0.0, 1.0]]).labels()[0].tolist() == [[1, 0], [0, 1]]
    assert corpus_of(tmp_path, [[0, 1], [0, 1]]).labels()[0].tolist() == [[1, 1], [1, 1]]


def test_several_columns_of_0_and_1_are_several_labels(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [1, 0, None], column_toxic=[1, 0, 1], label_column="label,toxic")
    assert (corpus.info.task, corpus.info.label_names) == ("multi-label", ("label", "toxic"))
    assert corpus.labels()[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert corpus.counts["unlabelled"] == 1
    (tmp_path / "x.csv").write_text("text,a,b\nhello,1,0\nyou,,\n")
    source = DatasetSource(dataset=str(tmp_path / "x.csv"), text_column="text", label_column="a,b")
    assert load_corpus(source).labels()[0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("label", "fields", "message"),
    [
        ([0.5, 1.5], {"task": "single-label"}, "0.5 in row 0.*--task regression"),
        (["0.5", "high"], {"task": "regression"}, "'high' in row 1; expected a number"),
        ([0.5, float("inf")], {}, "expected a finite number"),
        ([1, 2], {"task": "multi-label"}, "needs lists of classes"),
        ([[1], [2]], {"task": "single-label"}, "holds lists"),
        ([[1], [-2]], {}, "expected a list of classes"),
        (["[1", "x"], {"task": "multi-label"}, "expected a JSON list"),
        ([b"x", b"y"], {}, "holds binary"),
        ([1, 2], {"column_toxic": [0, 2], "label_column": "label,toxic"}, "holds 2 in row [01]; expected 0 or 1"),
        ([1, 0], {"column_toxic": [0, 1], "label_column": "label,toxic", "task": "regression"}, "has one"),
        ([1, 0], {"column_toxic": [0, 1], "label_column": "label,toxik"}, r"no column 'toxik' \(did you mean 'toxic'"),
    ],
)
def test_a_label_that_cannot_be_read_says_what_and_where(
    tmp_path: Path, label: list[Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=f"(?s){message}"):
        corpus_of(tmp_path, label, **fields)


def test_a_class_that_its_feature_does_not_name_is_refused(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    table = pa.table({"text": ["x", "y"], "label": [0, 2]}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "x.parquet")
    source = DatasetSource(dataset=str(tmp_path / "x.parquet"), text_column="text", label_column="label")
    with pytest.raises(RefusedError, match="holds 2 in row 1; its feature names 2 classes"):
        load_corpus(source)


# Matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "names", "expected", "how"),
    [
        (["pos", "neg"], ("pos", "neg"), [0, 1], "name"),
        (["pos", "pos"], ("neutral", "pos"), [1, 1], "name"),
        (["pos", "neg"], ("NEG", "POS"), [1, 0], "case"),
        ([1, 0], ("neg", "pos"), [1, 0], "number"),
        (["pos", "neg"], ("LABEL_0", "LABEL_1"), [1, 0], "number"),
        ([2, 1], ("2", "1", "0"), [0, 1], "name"),
    ],
)
def test_labels_are_numbered_as_the_teacher_numbers_its_names(
    tmp_path: Path, label: list[Any], names: tuple[str, ...], expected: list[int], how: str
) -> None:
    at_once = corpus_of(tmp_path, label, label_names=names)
    afterwards = corpus_of(tmp_path, label).with_label_names(names)
    for corpus in (at_once, afterwards):
        assert corpus.info.label_names == names
        assert corpus.labels()[0].tolist() == expected
        assert corpus.counts["labels_matched_by"] == how
    assert at_once.fingerprint == afterwards.fingerprint


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        (["pos", "neutral"], ("neg", "pos"), "'neutral' .* is not one of the 2 expected classes"),
        (["pos", "negg"], ("neg", "pos"), r"\(did you mean 'neg'\?\)"),
        ([1, 2], ("neg", "pos"), "'2' .* is not one of"),
        (["a", "b", "c"], ("LABEL_0", "LABEL_1"), "'c' .* is not one of"),
        (["A", "c"], ("a", "A"), "'c' .* is not one of"),
    ],
)
def test_a_label_that_the_teacher_does_not_know_is_refused(
    tmp_path: Path, label: list[Any], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        corpus_of(tmp_path, label, label_names=names)


def test_sets_of_classes_are_renumbered_too(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["a", "c"], ["b"], None])
    assert corpus.with_label_names(("c", "b", "d", "a")).labels()[0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0] * 4]


def test_unlabelled_text_takes_any_names_and_task(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [None, -1])
    assert corpus.with_label_names(("a", "b")).info.label_names == ("a", "b")
    scores = corpus.with_label_names((), task="regression")
    assert (scores.info.task, scores.labels()[1].any()) == ("regression", False)
    assert scores.with_label_names(("x", "y"), task="multi-label").labels()[0].shape == (2, 2)


def test_labels_of_another_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="'single-label', where 'regression' is expected"):
        corpus_of(tmp_path, [0, 1]).with_label_names((), task="regression")


# Hiding ----------------------------------------------------------------------------------------------------------


def shuffled(corpus: Corpus, seed: int) -> Corpus:
    order = random.Random(seed).sample(range(len(corpus)), len(corpus))
    return corpus.replaced(table=corpus.table.take(pa.array(order)))


def kept(corpus: Corpus) -> set[bytes]:
    mask = corpus.labels()[1]
    return set(corpus.table.filter(pa.array(mask))["example_id"].to_pylist())


def test_so_many_labels_per_class_stay_and_no_row_goes(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [i % 3 for i in range(60)] + [-1] * 5)
    hidden = hide_labels(corpus, labels_per_class=4)
    labels, has_gold = hidden.labels()
    assert len(hidden) == 65
    assert np.bincount(labels[has_gold]).tolist() == [4, 4, 4]
    assert (labels[has_gold] == corpus.labels()[0][has_gold]).all()
    assert (labels[~has_gold] == -1).all()
    assert {name: hidden.counts[name] for name in ("labelled", "unlabelled", "labels_hidden", "classes_short")} == {
        "labelled": 12,
        "unlabelled": 53,
        "labels_hidden": 48,
        "classes_short": 0,
    }


def test_which_labels_stay_follows_from_seed_and_text_not_from_order_or_company(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [i % 2 for i in range(40)])
    for options in ({"labels_per_class": 3}, {"labels_total": 7}):
        chosen = kept(hide_labels(corpus, **options))
        assert kept(hide_labels(shuffled(corpus, 1), **options)) == chosen
        assert kept(hide_labels(corpus, **options, label_seed=1)) != chosen
    few = kept(hide_labels(corpus, labels_total=5))
    assert few < kept(hide_labels(corpus, labels_total=9))


def test_a_class_with_fewer_labels_keeps_them_and_is_counted(tmp_path: Path) -> None:
    hidden = hide_labels(corpus_of(tmp_path, [0] * 20 + [1] * 2), labels_per_class=5)
    assert np.bincount(hidden.labels()[0][hidden.labels()[1]]).tolist() == [5, 2]
    assert hidden.counts["classes_short"] == 1


def test_labels_of_any_task_can_be_hidden_in_all(tmp_path: Path) -> None:
    for label in ([0.5, 1.5, 2.5], [["a"], ["b"], []]):
        hidden = hide_labels(corpus_of(tmp_path, label), labels_total=2)
        assert hidden.labels()[1].sum() == 2


@pytest.mark.parametrize(
    ("label", "options", "error", "message"),
    [
        ([0, 1], {"labels_per_class": 1, "labels_total": 1}, UsageError, "exclude each other"),
        ([0, 1], {"labels_per_class": 0}, UsageError, "expected 1 or more"),
        ([0, 1], {"labels_total": 3}, RefusedError, "the corpus has 2 labelled rows"),
        ([None, -1], {"labels_total": 1}, RefusedError, "the corpus has no labels"),
        ([0.5, 1.5], {"labels_per_class": 1}, UsageError, "give --labels-total"),
    ],
)
def test_hiding_that_makes_no_sense_is_refused(
    tmp_path: Path, label: list[Any], options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hide_labels(corpus_of(tmp_path, label), **options)
