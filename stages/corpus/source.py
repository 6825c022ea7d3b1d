"""Where a corpus comes from: a dataset by name or path, the split, and the columns to read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...pipeline.errors import UsageError, near_match

TASKS = ("single-label", "multi-label", "regression", "token")
"""What a label is: one class, a set of classes, a number, a tag for every word."""

_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]\[]*\])?"
_SPLIT = re.compile(rf"{_PART}(?:\+{_PART})*")
_SLICE = re.compile(r"(?P<name>[^\[]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A dataset and which of its columns matter.

    Attributes:
        dataset: `D` or `D:split`. `D` is a csv, tsv, jsonl, json, parquet or arrow file, a local dataset folder, or a
            hub id (`name`, `owner/name`, `owner/name/configuration`). A split may carry a slice as in `datasets`
            (`train[:1000]`, `train[10%:]`) and splits may be joined (`train+validation`).
        text_column: the text, or the first text of a pair; a list of words for a token task.
        text_pair_column: the second text of a pair.
        label_column: the gold label; several columns of 0 and 1 separated by commas make a multi-label task, and a list
            of tags beside a list of words a token task.
        task: one of `TASKS`; worked out from the columns when not given.
    """

    dataset: str
    text_column: str
    text_pair_column: str | None = None
    label_column: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if not self.dataset:
            raise UsageError("--dataset is empty", fix="give a file, a dataset folder or a hub id")
        if not self.text_column:
            raise UsageError("--text-column is empty", fix="name the column that holds the text")
        if self.task is not None and self.task not in TASKS:
            raise UsageError(f"task {self.task!r} does not exist{near_match(self.task, TASKS)}")
        if self.text_pair_column == self.text_column:
            raise UsageError(f"--text-column and --text-pair-column are both {self.text_column!r}")
        if self.task == "token" and self.text_pair_column is not None:
            raise UsageError(
                f"--text-pair-column {self.text_pair_column!r}: a token task has one text per row",
                fix="leave it out, or give another --task",
            )
        if self.label_column is not None and self.label_column in (self.text_column, self.text_pair_column):
            raise UsageError(f"--label-column {self.label_column!r} is also a text column")

    def located(self) -> tuple[str, str | None]:
        """`(D, split)`; the split is None when `dataset` does not name one.

        >>> DatasetSource(dataset="data/sst2:train[:100]", text_column="sentence").located()
        ('data/sst2', 'train[:100]')
        >>> DatasetSource(dataset="s3://bucket/reviews.csv", text_column="text").located()
        ('s3://bucket/reviews.csv', None)
        """
        if Path(self.dataset).exists():
            return self.dataset, None
        for match in re.finditer(":", self.dataset):
            name, split = self.dataset[: match.start()], self.dataset[match.end() :]
            if name and _SPLIT.fullmatch(split):
                return name, split
        return self.dataset, None


@dataclass(frozen=True)
class SplitPart:
    """One named split and the slice of it, as given: integers, percentages (ending in "%") or None."""

    name: str
    start: str | None = None
    stop: str | None = None

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """First row and the row after the last, within 0 and num_rows; percentages round to the nearest row."""

        def position(text: str | None, default: int) -> int:
            if text is None:
                return default
            value = round(int(text[:-1]) * num_rows / 100) if text.endswith("%") else int(text)
            return min(max(value + num_rows if value < 0 else value, 0), num_rows)

        start = position(self.start, 0)
        return start, max(start, position(self.stop, num_rows))


def parse_split(split: str) -> list[SplitPart]:
    """The parts of a split expression.

    >>> parse_split("train[:10%]+validation")
    [SplitPart(name='train', start=None, stop='10%'), SplitPart(name='validation', start=None, stop=None)]
    """
    parts = []
    for text in split.split("+"):
        match = _SLICE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"split {text!r} is not understood", fix="write it as train, train[:1000], train[10%:] or a+b"
            )
        parts.append(SplitPart(match["name"], match["start"], match["stop"]))
    return parts
