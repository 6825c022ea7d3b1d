"""Entities: spans of words that BIO tags mark. Pure functions of arrays. Dimension key: W words of all rows.

`B-X` begins an entity of type X, `I-X` goes on with it, `O` is outside of all (IOB2). As in conlleval and seqeval an
`I-X` that follows no `B-X` or `I-X` begins one too, so any sequence of tags says which entities there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..pipeline.ragged import Ragged

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

OUTSIDE = "O"
_BIO = re.compile(r"O|(?P<prefix>[BI])(?:-(?P<type>.+))?")


@dataclass(frozen=True, eq=False)
class BioTags:
    """What the tags of a task say, by number.

    Attributes:
        type_of: int64 [tags] number of the type; -1 for `O`.
        begins: bool [tags] whether the tag is a `B-X`.
        begin: int64 [types] number of the tag `B-X` of every type; -1 where there is none.
        inside: int64 [types] number of the tag `I-X`; -1 where there is none.
        types: their names.
        outside: number of the tag `O`; -1 where there is none.
    """

    type_of: IntArray
    begins: BoolArray
    begin: IntArray
    inside: IntArray
    types: tuple[str, ...]
    outside: int

    @classmethod
    def of(cls, names: Sequence[str]) -> BioTags | None:
        """From the names of the tags; None where one of them is not `O`, `B-X`, `I-X`, `B`, `I`, or all are `O`."""
        found = [_BIO.fullmatch(name) for name in names]
        if not all(found) or len(set(names)) < len(names):
            return None
        parts = [(match["prefix"], match["type"] or "") for match in found if match is not None]
        number = {part: tag for tag, part in enumerate(parts)}
        types = tuple(dict.fromkeys(kind for prefix, kind in parts if prefix))
        if not types:
            return None
        return cls(
            np.array([types.index(kind) if prefix else -1 for prefix, kind in parts], np.int64),
            np.array([prefix == "B" for prefix, _ in parts]),
            np.array([number.get(("B", kind), -1) for kind in types], np.int64),
            np.array([number.get(("I", kind), -1) for kind in types], np.int64),
            types,
            names.index(OUTSIDE) if OUTSIDE in names else -1,
        )

    def spans(self, tags: Ragged) -> tuple[IntArray, IntArray, IntArray]:
        """`(starts, ends, types)` of the entities of all rows, int64, in order: word `starts[i]` up to `ends[i]`.

        Args:
            tags: int64 numbers of tags; below 0 counts as `O`.
        """
        values = tags.values
        types_W = np.where(values < 0, -1, self.type_of[values])
        begins_W = (values >= 0) & self.begins[values]
        first_W = np.zeros(len(values) + 1, bool)
        first_W[tags.offsets] = True
        before_W = np.concatenate([[-1], types_W[:-1]])[: len(values)]
        starts_W = (types_W >= 0) & (begins_W | first_W[:-1] | (before_W != types_W))
        # What ends where: at the next word there is another beginning, nothing, or another row.
        goes_on_W = np.concatenate([(types_W >= 0) & ~starts_W, [False]])[1:]
        ends = np.flatnonzero((types_W >= 0) & ~goes_on_W) + 1
        starts = np.flatnonzero(starts_W)
        return starts, ends, types_W[starts]

    def well_formed(self, tags: Ragged) -> BoolArray:
        """bool [rows]: whether every `I-X` follows a `B-X` or `I-X`, and no tag is below 0."""
        starts, _, _ = self.spans(tags)
        bad = np.union1d(starts[~self.begins[tags.values[starts]]], np.flatnonzero(tags.values < 0))
        row_W = np.repeat(np.arange(len(tags)), tags.lengths)
        is_good: BoolArray = np.bincount(row_W[bad], minlength=len(tags)) == 0
        return is_good


def tag_metrics(predicted: Ragged, gold: Ragged, label_names: Sequence[str]) -> dict[str, float]:
    """What `tag_metric_names` lists: how well tags are predicted.

    Of BIO tags `f1`, `precision` and `recall` of entities, all types together (micro): right is an entity with the same
    first word, last word and type. Accuracy and macro F1 are of words.

    Args:
        predicted: int64 tags of the same words as `gold`; below 0 where none is predicted, which counts as `O`.
        gold: int64 tags.
        label_names: names of the tags.
    """
    assert np.array_equal(predicted.offsets, gold.offsets), "predictions of other words"
    bio = BioTags.of(label_names)
    if bio is None:
        scores = _class_f1(predicted.values, gold.values)
        return {"accuracy": float(np.mean(predicted.values == gold.values)), "macro_f1": float(np.mean(scores))}
    filled_W = np.where(predicted.values < 0, bio.outside, predicted.values)
    right, found, wanted = _counts(bio, Ragged(filled_W, predicted.offsets), gold)
    return {
        "f1": 2 * right / (found + wanted) if found + wanted else 0.0,
        "precision": right / found if found else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "accuracy": float(np.mean(filled_W == gold.values)),
    }


def tag_metric_names(label_names: Sequence[str]) -> tuple[str, ...]:
    """What `tag_metrics` gives, the main metric first.

    >>> tag_metric_names(["O", "B-PER", "I-PER"]), tag_metric_names(["NOUN", "VERB"])
    (('f1', 'precision', 'recall', 'accuracy'), ('accuracy', 'macro_f1'))
    """
    return ("f1", "precision", "recall", "accuracy") if BioTags.of(label_names) else ("accuracy", "macro_f1")


def _counts(bio: BioTags, predicted: Ragged, gold: Ragged) -> tuple[int, int, int]:
    """Entities that are right, predicted, and there."""
    ends_W = np.zeros((2, len(gold.values)), np.int64)
    types_W = np.full_like(ends_W, -1)
    numbers = []
    for side, tags in enumerate((predicted, gold)):
        starts, ends, types = bio.spans(tags)
        ends_W[side, starts], types_W[side, starts] = ends, types
        numbers.append(len(starts))
    right = (types_W[0] >= 0) & (types_W[0] == types_W[1]) & (ends_W[0] == ends_W[1])
    return int(right.sum()), numbers[0], numbers[1]


def _class_f1(predicted_W: IntArray, gold_W: IntArray) -> list[float]:
    """F1 of every tag that occurs."""
    scores = []
    for tag in np.union1d(predicted_W[predicted_W >= 0], gold_W):
        is_predicted, is_gold = predicted_W == tag, gold_W == tag
        scores.append(float(2 * (is_predicted & is_gold).sum() / (is_predicted.sum() + is_gold.sum())))
    return scores
