"""Entities of BIO tags: which there are, and how predictions of them are scored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.ragged import Ragged
from kd.stages.entities import BioTags, tag_metrics
from kd.stages.metrics import check_metric, decide, main_metric, metric, metric_names, task_metrics

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def numbered(*rows: str) -> Ragged:
    return Ragged.from_rows([[NAMES.index(tag) for tag in row.split()] for row in rows], "int64")


def spans_of(tags: Ragged) -> list[tuple[int, int, str]]:
    bio = BioTags.of(NAMES)
    assert bio is not None
    starts, ends, types = bio.spans(tags)
    return [(int(a), int(b), bio.types[kind]) for a, b, kind in zip(starts, ends, types, strict=True)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [(0, 2, "PER"), (3, 4, "LOC")]),
        ("B-PER B-PER", [(0, 1, "PER"), (1, 2, "PER")]),
        ("O I-PER I-PER", [(1, 3, "PER")]),  # conlleval: an I that follows nothing begins
        ("B-PER I-LOC I-LOC", [(0, 1, "PER"), (1, 3, "LOC")]),
        ("I-LOC B-LOC I-LOC", [(0, 1, "LOC"), (1, 3, "LOC")]),
    ],
)
def test_the_entities_of_a_row_by_hand(row: str, expected: list[tuple[int, int, str]]) -> None:
    assert spans_of(numbered(row)) == expected


def test_an_entity_ends_with_its_row() -> None:
    assert spans_of(numbered("O B-PER", "I-PER O")) == [(1, 2, "PER"), (2, 3, "PER")]


def spans_in_words(row: list[str]) -> set[tuple[int, int, str]]:
    """The entities of a row, one word after the other, as conlleval goes."""
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*row, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix in "BO" or name != kind):
            found.add((start, place, kind))
            kind = ""
        if prefix != "O" and not kind:
            start, kind = place, name
    return found


rows_of_tags = st.lists(st.lists(st.sampled_from(NAMES), max_size=7), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows_of_tags, st.randoms())
def test_entities_and_scores_are_those_of_a_loop_over_words(rows: list[list[str]], random: object) -> None:
    gold = Ragged.from_rows([[NAMES.index(tag) for tag in row] for row in rows], "int64")
    values = gold.values.copy()
    for place in range(0, len(values), 2):
        values[place] = random.randrange(len(NAMES))  # type: ignore[attr-defined]
    predicted = Ragged(values, gold.offsets)
    expected = [spans_in_words(row) for row in rows]
    others = [spans_in_words([NAMES[tag] for tag in row]) for row in predicted]
    for tags, wanted in ((gold, expected), (predicted, others)):
        in_rows = [(row, *span) for row, spans in enumerate(wanted) for span in sorted(spans)]
        assert spans_of(tags) == [(a + gold.offsets[row], b + gold.offsets[row], kind) for row, a, b, kind in in_rows]
    right = sum(len(a & b) for a, b in zip(expected, others, strict=True))
    found, there = sum(map(len, others)), sum(map(len, expected))
    if len(gold.values):
        scores = tag_metrics(predicted, gold, NAMES)
        assert scores["precision"] == (right / found if found else 0)
        assert scores["recall"] == (right / there if there else 0)
        assert scores["f1"] == pytest.approx(2 * right / (found + there) if found + there else 0)


def test_scores_by_hand() -> None:
    """Three entities, two predicted: one right, one with a wrong end."""
    gold = numbered("B-PER I-PER O B-LOC", "B-PER O")
    predicted = numbered("B-PER O O B-LOC", "O O")
    assert tag_metrics(predicted, gold, NAMES) == {"f1": 0.4, "precision": 0.5, "recall": 1 / 3, "accuracy": 4 / 6}


def test_tags_that_are_not_bio_are_scored_as_classes() -> None:
    gold = Ragged.from_rows([[0, 1, 1], [2]], "int64")
    predicted = Ragged.from_rows([[0, 1, 2], [-1]], "int64")
    assert tag_metrics(predicted, gold, ("DET", "NOUN", "VERB")) == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx((1 + 2 / 3 + 0) / 3),
    }


@pytest.mark.parametrize("names", [("DET", "NOUN"), ("O",), ("O", "B-PER", "L-PER"), ("0", "1")])
def test_other_names_are_no_bio(names: tuple[str, ...]) -> None:
    assert BioTags.of(names) is None
    assert main_metric("token", names) == "accuracy"


def test_well_formed_is_what_no_entity_begins_with_i() -> None:
    bio = BioTags.of(NAMES)
    assert bio is not None
    tags = numbered("B-PER I-PER O", "O I-PER", "B-PER I-LOC", "", "I-LOC")
    assert bio.well_formed(tags).tolist() == [True, False, False, True, False]


def test_words_without_logits_predict_nothing() -> None:
    logits_WC = np.eye(5)[[1, 2, 0]]
    logits_WC[1] = np.nan
    assert decide("token", logits_WC).tolist() == [1, -1, 0]
    gold = numbered("B-PER I-PER O")
    found = task_metrics("token", logits_WC, gold, NAMES)
    assert found == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": pytest.approx(2 / 3)}
    assert tuple(found) == metric_names("token", 5, NAMES)
    assert metric("accuracy", "token", logits_WC, gold, NAMES) == pytest.approx(2 / 3)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UsageError, match="'macro_f1' is not a metric of token tasks"):
        check_metric("macro_f1", "token", 5, NAMES)
    with pytest.raises(RefusedError, match="no labelled row"):
        task_metrics("token", np.empty((0, 5)), numbered(""), NAMES)
    with pytest.raises(RefusedError, match="not finite for 1 of 2 words"):
        task_metrics("token", np.array([[0.0, 1], [np.inf, 0]]), Ragged.from_rows([[0, 1]], "int64"), NAMES)
    with pytest.raises(RefusedError, match="tags reach from 0 to 4; the model has 2 classes"):
        task_metrics("token", np.zeros((2, 2)), Ragged.from_rows([[0, 4]], "int64"), NAMES)
