"""Label columns: from whatever a dataset holds to class indices, class sets or numbers; hiding labels."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.errors import RefusedError, UsageError, near_match
from .schema import NO_LABEL, label_field

if TYPE_CHECKING:
    from .corpus import Corpus


@dataclass(frozen=True)
class Labels:
    """Gold labels of a corpus, one per row.

    Attributes:
        task: what they are.
        values: int class index or None | sorted list of class indices or None | float or None | list of a tag index per
            word or None.
        names: class names in order; () for regression.
    """

    task: str
    values: list[Any]
    names: tuple[str, ...]

    @property
    def unnamed(self) -> bool:
        """Whether the classes have bare numbers for names."""
        return all(map(_is_integer, self.names))

    def to_arrow(self) -> pa.Array:
        """The column `label_gold`, `label_score`, `labels` or `tags` of the corpus schema."""
        if self.task == "regression":
            return pa.array(self.values, pa.float32())
        if self.task == "single-label":
            return pa.array(self.values, pa.int32())
        if self.task == "token":
            return pa.array(self.values, pa.list_(pa.int16()))
        rows: list[list[int] | None] = []
        for classes in self.values:
            if classes is None:
                rows.append(None)
                continue
            row = [0] * len(self.names)
            for index in classes:
                row[index] = 1
            rows.append(row)
        return pa.array(rows, pa.list_(pa.int8()))


def read_labels(
    column: pa.ChunkedArray,
    *,
    name: str,
    task: str | None,
    class_names: tuple[str, ...] | None = None,
    sibling: pa.ChunkedArray | None = None,
) -> Labels:
    """Labels from one column.

    Strings are class names, sorted (numerically where they are integers). Integers take their names from `class_names`
    (the ClassLabel feature of `datasets`), else from `sibling`, a column of names beside them, else they are their own
    names in numeric order. Lists are sets of classes, by name, by number, or as one 0 or 1 per class. Floats are
    scores. -1, null, NaN and "" mean that no label is published. A string column with task "multi-label" holds JSON
    lists or names separated by commas. Without a task, lists are "multi-label", numbers with a fraction (as numbers or
    as text) "regression", anything else "single-label".

    Raises:
        RefusedError: a type or value that cannot be such a label, with the first offending row.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    values = column.to_pylist()
    if pa.types.is_null(kind):
        return Labels(task or "single-label", values, ())
    if task is None:
        task = "multi-label" if is_list else _task_of(values, name, kind)
    if task == "multi-label":
        if not is_list and pa.types.is_string(kind):
            values = [_parse_set(value, name, row) for row, value in enumerate(values)]
        elif not is_list:
            raise RefusedError(
                f"label column {name!r} holds {kind}; task 'multi-label' needs lists of classes",
                fix="give a list column, JSON lists, names separated by commas, or several 0/1 columns (a,b,c)",
            )
        return _set_labels(values, name, class_names)
    if is_list:
        raise RefusedError(f"label column {name!r} holds lists; task {task!r} needs one value per row")
    if task == "regression":
        return Labels("regression", [_score(value, name, row) for row, value in enumerate(values)], ())
    return _class_labels(values, name, kind, class_names, None if sibling is None else sibling.to_pylist())


def _task_of(values: list[Any], name: str, kind: pa.DataType) -> str:
    """Class or score, of a column without lists: numbers with a fraction are scores."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        present = [value for value in values if value is not None and value.strip()]
        if not present or all(map(_is_integer, present)) or not all(map(_is_number, present)):
            return "single-label"
        numbers = [float(value) for value in present]
    elif pa.types.is_floating(kind):
        numbers = [value for value in values if value is not None and not math.isnan(value)]
    else:
        return "single-label"
    if all(number.is_integer() for number in numbers):
        raise RefusedError(
            f"label column {name!r} holds whole numbers as floats ({', '.join(map(str, numbers[:3]))}, ...)",
            details=["they may be classes (a table with missing values turns 0 and 1 into 0.0 and 1.0) or scores"],
            fix="say which: --task single-label or --task regression",
        )
    return "regression"


def read_indicator_columns(columns: Sequence[pa.ChunkedArray], names: Sequence[str]) -> Labels:
    """Multi-label rows from one column of 0 and 1 (or booleans) per class; the columns are the class names.

    A row with a null in any of them counts as unlabelled; so does a row of -1.
    """
    values: list[list[int] | None] = []
    for row, cells in enumerate(zip(*(column.to_pylist() for column in columns), strict=True)):
        if any(cell in (None, "", -1, "-1") or cell != cell for cell in cells):
            values.append(None)
            continue
        for name, cell in zip(names, cells, strict=True):
            if cell not in (0, 1, "0", "1"):
                raise RefusedError(f"label column {name!r} holds {cell!r} in row {row}; expected 0 or 1")
        values.append([index for index, cell in enumerate(cells) if int(cell)])
    return Labels("multi-label", values, tuple(names))


def _score(value: Any, name: str, row: int) -> float | None:
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = float(value)
        except ValueError:
            raise RefusedError(f"label column {name!r} holds {value!r} in row {row}; expected a number") from None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, (int, float)):
        raise RefusedError(f"label column {name!r} holds {value!r} in row {row}; expected a number")
    if not math.isfinite(value):
        raise RefusedError(f"label column {name!r} holds {value!r} in row {row}; expected a finite number")
    return float(value)


def _class_labels(
    values: list[Any], name: str, kind: pa.DataType, class_names: tuple[str, ...] | None, sibling: list[Any] | None
) -> Labels:
    if pa.types.is_floating(kind):
        for row, value in enumerate(values):
            if value is not None and not math.isnan(value) and not float(value).is_integer():
                raise RefusedError(
                    f"label column {name!r} holds {value!r} in row {row}; task 'single-label' needs classes",
                    fix="give --task regression",
                )
        values = [None if value is None or math.isnan(value) else int(value) for value in values]
    elif pa.types.is_boolean(kind):
        return Labels("single-label", [None if v is None else int(v) for v in values], ("False", "True"))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = [None if value is None or not value.strip() else value for value in values]
        names = tuple(sorted({value for value in values if value is not None}, key=numeric_first))
        if all(map(_is_whole_number, names)):
            values = [None if value is None else int(float(value)) for value in values]
        else:
            index = {n: i for i, n in enumerate(names)}
            return Labels("single-label", [None if v is None else index[v] for v in values], names)
    elif not pa.types.is_integer(kind):
        raise RefusedError(
            f"label column {name!r} holds {kind}", details=["expected names, integers, scores or lists of classes"]
        )
    values = [None if value == NO_LABEL else value for value in values]
    present = sorted({value for value in values if value is not None})
    if class_names is not None:
        for row, value in enumerate(values):
            if value is not None and not 0 <= value < len(class_names):
                raise RefusedError(
                    f"label column {name!r} holds {value} in row {row}; its feature names {len(class_names)} classes"
                )
        return Labels("single-label", values, class_names)
    if sibling is not None and (by_number := _names_beside(values, sibling)) is not None:
        # Numbers that no row shows keep their own place, so that the order is that of the dataset.
        numbers = range(present[-1] + 1) if present and present[0] >= 0 and present[-1] < 100_000 else present
        names = tuple(by_number.get(number, str(number)) for number in numbers)
        if len(set(names)) == len(names):
            index = {number: i for i, number in enumerate(numbers)}
            return Labels("single-label", [None if v is None else index[v] for v in values], names)
    index = {number: i for i, number in enumerate(present)}
    names = tuple(map(str, present))
    return Labels("single-label", [None if v is None else index[v] for v in values], names)


def _names_beside(values: list[Any], names: list[Any]) -> dict[int, str] | None:
    """Number to name, when each number has exactly one name beside it in all rows."""
    found: dict[int, str] = {}
    for value, name in zip(values, names, strict=True):
        if value is not None and (not isinstance(name, str) or found.setdefault(value, name) != name):
            return None
    return found if len(set(found.values())) == len(found) else None


def _parse_set(value: str | None, name: str, row: int) -> list[Any] | None:
    if value is None or not value.strip():
        return None
    if value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            raise RefusedError(f"label column {name!r} holds {value!r} in row {row}; expected a JSON list") from None
        return list(parsed)
    return [part.strip() for part in value.split(",") if part.strip()]


def _set_labels(values: list[Any], name: str, class_names: tuple[str, ...] | None) -> Labels:
    rows = [value for value in values if value is not None]
    items = {item for row in rows for item in row}
    if items and all(isinstance(item, str) for item in items):
        if class_names is not None:
            unknown = sorted(items - set(class_names))
            if unknown:
                raise RefusedError(f"label column {name!r} holds {unknown[0]!r}{near_match(unknown[0], class_names)}")
        names = class_names or tuple(sorted(items, key=numeric_first))
        index = {n: i for i, n in enumerate(names)}
        sets = [None if value is None else sorted({index[item] for item in value}) for value in values]
        return Labels("multi-label", sets, names)
    for row, value in enumerate(values):
        for item in value or ():
            if isinstance(item, str) or item is None or not float(item).is_integer() or item < 0:
                raise RefusedError(f"label column {name!r} holds {value!r} in row {row}; expected a list of classes")
    if _is_multi_hot(rows):
        width = len(rows[0])
        if class_names is not None and len(class_names) != width:
            raise RefusedError(
                f"label column {name!r} holds {width} values per row, and its feature names {len(class_names)} classes"
            )
        sets = [None if value is None else [i for i, item in enumerate(value) if item] for value in values]
        names = class_names or tuple(map(str, range(width)))
        return Labels("multi-label", sets, names)
    largest = int(max(items, default=-1))
    if class_names is not None and largest >= len(class_names):
        raise RefusedError(
            f"label column {name!r} holds class {largest}, and its feature names {len(class_names)} classes"
        )
    names = class_names or tuple(map(str, range(largest + 1)))
    sets = [None if value is None else sorted({int(item) for item in value}) for value in values]
    return Labels("multi-label", sets, names)


def _is_multi_hot(rows: list[list[Any]]) -> bool:
    """Whether lists are one 0 or 1 per class rather than class numbers: equal lengths, and no set of numbers fits."""
    if not rows or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return False
    if any(item not in (0, 1) for row in rows for item in row):
        return False
    return any(list(row) != [0, 1] for row in rows)


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isascii() and text.lstrip("-").isdigit()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_whole_number(text: str) -> bool:
    return _is_integer(text) or (re.fullmatch(r"-?\d+\.0*", text) is not None)


def numeric_first(text: str) -> tuple[int, int, str]:
    """A key that sorts names, integers before others and by their value."""
    return (0, int(text), text) if _is_integer(text) else (1, 0, text)


def match_labels(labels: Labels, label_names: tuple[str, ...], *, where: str) -> tuple[Labels, str]:
    """The labels as indices into `label_names`, and how they were matched: "name", "case" or "number".

    By name; else by name without regard to case; else by number, when one of the two sides has no names of its own
    (bare integers, or the `LABEL_0`, `LABEL_1` of an unconfigured checkpoint). Never by position of a name.

    Raises:
        RefusedError: a label that `label_names` does not hold.
    """
    if labels.names == label_names:
        return Labels(labels.task, labels.values, label_names), "name"
    used = _used_classes(labels)
    generic = label_names == tuple(f"LABEL_{i}" for i in range(len(label_names)))
    for how, to_key in (("name", str), ("case", str.casefold)):
        keys = {to_key(n): i for i, n in enumerate(label_names)}
        mapping = {i: keys.get(to_key(n)) for i, n in enumerate(labels.names)}
        if len(keys) == len(label_names) and all(mapping[i] is not None for i in used):
            return _renumbered(labels, mapping, label_names), how
    unknown = [labels.names[i] for i in sorted(used) if labels.names[i] not in label_names]
    if labels.unnamed or generic:
        numbers = {i: int(n) if labels.unnamed else i for i, n in enumerate(labels.names)}
        if all(0 <= numbers[i] < len(label_names) for i in used):
            return _renumbered(labels, numbers, label_names), "number"
        unknown = [labels.names[i] for i in sorted(used) if not 0 <= numbers[i] < len(label_names)]
    raise RefusedError(
        f"label {unknown[0]!r} of {where} is not one of the {len(label_names)} expected classes"
        + near_match(unknown[0], label_names[:50]),
        details=[
            f"expected: {_shortened(label_names)}",
            f"found:    {_shortened(labels.names)}",
            f"unknown:  {_shortened(unknown)}",
        ],
        fix="name the classes as the teacher does, or give the column that holds such names",
    )


def _used_classes(labels: Labels) -> set[int]:
    if labels.task == "single-label":
        return {value for value in labels.values if value is not None}
    return {index for value in labels.values if value is not None for index in value}


def _renumbered(labels: Labels, mapping: dict[int, int | None] | dict[int, int], names: tuple[str, ...]) -> Labels:
    values: list[Any]
    if labels.task == "single-label":
        values = [None if value is None else mapping[value] for value in labels.values]
    elif labels.task == "token":
        values = [None if value is None else [mapping[i] for i in value] for value in labels.values]
    else:
        values = [None if value is None else sorted(mapping[i] for i in value) for value in labels.values]
    return Labels(labels.task, values, names)


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def hide_labels(
    corpus: Corpus, *, labels_per_class: int | None = None, labels_total: int | None = None, label_seed: int = 0
) -> Corpus:
    """The corpus with only some of its gold labels; the other rows stay, unlabelled.

    A row's place in the queue is BLAKE2b(seed, example_id), so the choice follows from seed and texts alone: not from
    the order of the rows, and the same in every command that is given the same flags. Copies of one text (dup_index
    above 0) are chosen independently.

    Args:
        labels_per_class: keep this many of each class (all, where a class has fewer; counted as `classes_short`).
        labels_total: keep this many in all, whatever their classes; rows, each with all its tags, of a token task.
        label_seed: which ones.

    Raises:
        UsageError: both or a number below 1, or classes asked of a task that has none.
        RefusedError: there are no labels, or fewer than `labels_total`.
    """
    if labels_per_class is None and labels_total is None:
        return corpus
    if labels_per_class is not None and labels_total is not None:
        raise UsageError("--labels-per-class and --labels-total exclude each other", fix="give one of them")
    flag, wanted = (
        ("--labels-total", labels_total) if labels_total is not None else ("--labels-per-class", labels_per_class)
    )
    assert wanted is not None
    if wanted < 1:
        raise UsageError(f"{flag} is {wanted}; expected 1 or more")
    if labels_per_class is not None and corpus.info.task != "single-label":
        raise UsageError(
            f"--labels-per-class needs one class per row; the task is {corpus.info.task!r}", fix="give --labels-total"
        )
    has_gold = corpus.has_gold
    num_labelled = int(has_gold.sum())
    if num_labelled == 0:
        raise RefusedError(f"{flag} {wanted}: the corpus has no labels", fix="give --label-column")
    if labels_total is not None and labels_total > num_labelled:
        raise RefusedError(f"--labels-total {labels_total}: the corpus has {num_labelled} labelled rows")

    rows = np.flatnonzero(has_gold)
    places = _queue(corpus.table["example_id"], rows, label_seed)
    order = rows[np.argsort(places)]
    counts: dict[str, int] = {}
    if labels_per_class is None:
        kept = order[:wanted]
    else:
        labels, _ = corpus.labels()
        taken: Counter[int] = Counter()
        chosen = []
        for row in order:
            label = int(labels[row])
            if taken[label] < wanted:
                taken[label] += 1
                chosen.append(row)
        kept = np.array(chosen, dtype=np.int64)
        counts["classes_short"] = sum(taken[label] < wanted for label in range(len(corpus.info.label_names)))
    keep = np.zeros(len(corpus), dtype=bool)
    keep[kept] = True
    counts = {
        "labelled": len(kept),
        "unlabelled": len(corpus) - len(kept),
        "labels_hidden": num_labelled - len(kept),
        **counts,
    }
    name = label_field(corpus.info.task)
    table = corpus.table
    column = table[name].combine_chunks()
    hidden = pc.if_else(pa.array(keep), column, pa.scalar(None, column.type))
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), hidden)
    index = table.schema.get_field_index("has_gold")
    table = table.set_column(index, table.schema.field("has_gold"), pa.array(keep))
    return corpus.replaced(table=table, counts={**corpus.counts, **counts})


def _queue(example_ids: pa.ChunkedArray, rows: np.ndarray, seed: int) -> np.ndarray:
    """uint64 per row: its place, from seed and id alone."""
    ids = example_ids.combine_chunks().take(pa.array(rows)).to_pylist()
    return np.array([queue_place(i, seed, b"kd-labels-1") for i in ids], np.uint64)


def queue_place(example_id: bytes, seed: int, purpose: bytes) -> int:
    """A 64-bit number from an id, a seed and what it is for: whoever has the smallest is chosen first."""
    return int.from_bytes(blake2b(b"%s\x1f%d\x1f%s" % (purpose, seed, example_id), digest_size=8).digest(), "little")
