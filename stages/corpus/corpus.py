"""A corpus: one table of examples, and what its labels mean."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...pipeline.artifact import open_artifact
from ...pipeline.errors import RefusedError, near_match
from ...pipeline.fingerprint import canonical_json
from .files import RawTable, read_raw
from .labels import Labels, match_labels, read_indicator_columns, read_labels
from .schema import NO_LABEL, CorpusInfo, example_ids, label_field, schema
from .source import DatasetSource

DATA_FOLDER = "data"
ROWS_PER_FILE = 1_000_000
_IDENTITY_COLUMNS = ("example_id", "parent_id", "split", "text_a", "text_b", "aug_op", "aug_iter", "aug_side")


@dataclass(frozen=True)
class Corpus:
    """Examples in the schema of `schema.schema(info.task)`.

    Attributes:
        table: one row per example.
        info: what the labels mean.
        counts: how rows were treated when they were read (`load_corpus` says which counts there are).
    """

    table: pa.Table
    info: CorpusInfo
    counts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def fingerprint(self) -> str:
        """32 hex: hash of the rows (texts, labels, origin) and what they mean; the order of the rows does not count."""
        columns = [self.table[name].to_pylist() for name in _IDENTITY_COLUMNS]
        columns.append(self.table[label_field(self.info.task)].to_pylist())
        digests = sorted(blake2b(repr(row).encode(), digest_size=16).digest() for row in zip(*columns, strict=True))
        meaning = {"task": self.info.task, "label_names": self.info.label_names, "is_pair": self.info.is_pair}
        return blake2b(canonical_json(meaning) + b"".join(digests), digest_size=16).hexdigest()

    def texts(self) -> tuple[list[str], list[str] | None]:
        """The texts in row order; the second list is None for single texts."""
        second = self.table["text_b"].to_pylist() if self.info.is_pair else None
        return self.table["text_a"].to_pylist(), second

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """`(labels, has_gold)` in row order.

        labels: int64 [N] class index, float32 [N] score, or float32 [N, C] of 0 and 1, by task; where a row has no
        gold label they hold -1, 0 and zeros. has_gold: bool [N].
        """
        has_gold = self.table["has_gold"].to_numpy()
        column = self.table[label_field(self.info.task)].combine_chunks()
        if self.info.task == "single-label":
            return pc.fill_null(column, NO_LABEL).to_numpy(zero_copy_only=False).astype(np.int64), has_gold
        if self.info.task == "regression":
            return pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False), has_gold
        labels = np.zeros((len(self), len(self.info.label_names)), dtype=np.float32)
        values = column.drop_null().flatten().to_numpy()
        labels[has_gold] = values.reshape(-1, len(self.info.label_names))
        return labels, has_gold

    def replaced(self, **changes: Any) -> Corpus:
        """The corpus with another table, info or counts."""
        return dataclasses.replace(self, **changes)

    def with_label_names(self, label_names: Sequence[str], *, task: str | None = None) -> Corpus:
        """The corpus with its gold labels as indices into `label_names`, matched by name (see `match_labels`).

        Unlabelled corpora take any names and any task.

        Raises:
            RefusedError: a gold label that is not among the names, or another task.
        """
        names = tuple(label_names)
        task = task or self.info.task
        if not self.table["has_gold"].combine_chunks().true_count:
            labels = Labels(task, [None] * len(self), names if task != "regression" else ())
            return _with_labels(self, labels)
        if task != self.info.task:
            raise RefusedError(
                f"the labels are {self.info.task!r}, where {task!r} is expected",
                details={"label column": self.info.label_column or "(none)"},
                fix=f"give --task {task} if the column can be read so, or another --label-column",
            )
        if task == "regression" or names == self.info.label_names:
            return self
        values, has_gold = self.labels()
        rows = values if task == "single-label" else [np.flatnonzero(row) for row in values]
        given = [
            None if not known else int(row) if task == "single-label" else [int(i) for i in row]
            for row, known in zip(rows, has_gold, strict=True)
        ]
        unnamed = self.info.label_names == tuple(map(str, range(len(self.info.label_names))))
        labels = Labels(task, given, self.info.label_names, unnamed=unnamed)
        matched, how = match_labels(labels, names, where=f"column {self.info.label_column!r}")
        corpus = _with_labels(self, matched)
        return corpus.replaced(counts={**corpus.counts, "labels_matched_by": how})


def _with_labels(corpus: Corpus, labels: Labels) -> Corpus:
    table = corpus.table
    old = label_field(corpus.info.task)
    index = table.schema.get_field_index(old)
    table = table.set_column(index, pa.field(label_field(labels.task), labels.to_arrow().type), labels.to_arrow())
    table = table.select(schema(labels.task).names).cast(schema(labels.task))
    return corpus.replaced(
        table=table, info=dataclasses.replace(corpus.info, task=labels.task, label_names=labels.names)
    )


def load_corpus(
    source: DatasetSource,
    *,
    split_default: str = "train",
    label_names: Sequence[str] | None = None,
    allow_unlabelled: bool = True,
) -> Corpus:
    """Read a dataset into a corpus of originals, in the order of the source.

    How rows are treated, and what `counts` calls it:

    - `rows`: rows of the corpus; `rows_read`: rows of the source.
    - `empty_dropped`: rows whose text (or one text of the pair) is null or white space; they are dropped.
    - `duplicates`: rows whose texts occurred before; they are kept, as examples of their own.
    - `conflicting_labels`: rows whose texts also occur with another gold label; they are kept.
    - `labelled`, `unlabelled`: rows with and without a gold label (null, "" or -1).
    - `labels_matched_by`: "name", "case" or "number", when `label_names` were given.

    Args:
        source: dataset and columns.
        split_default: the split to read when the source names none and has several.
        label_names: the classes in the order to number them in, such as a teacher's; labels are matched by name.
        allow_unlabelled: whether rows without a gold label, or a source without a label column, are accepted.

    Raises:
        RefusedError: nothing there, a missing column, text that is not text, a label that cannot be read or is not
            among `label_names`, no rows left, or unlabelled rows where they are not allowed.
    """
    name, split = source.located()
    label_columns: list[str] = []
    sibling: list[str] = []

    def choose(names: Sequence[str]) -> list[str]:
        label_columns[:], sibling[:] = _label_columns(source, names, name)
        texts = [column for column in (source.text_column, source.text_pair_column) if column is not None]
        for column in texts:
            if column not in names:
                raise _missing_column(column, names, name)
        return [*texts, *label_columns, *sibling]

    raw = read_raw(name, split, choose, split_default=split_default)
    where = f"{name}:{split}" if split else name
    texts_a = _text(raw.table, source.text_column, where)
    texts_b = _text(raw.table, source.text_pair_column, where) if source.text_pair_column is not None else None
    labels = _labels(source, raw, label_columns, sibling, where)
    counts: dict[str, Any] = {"rows_read": raw.table.num_rows}
    if label_names is not None and labels.task != "regression":
        if all(value is None for value in labels.values):
            labels = Labels(labels.task, labels.values, tuple(label_names))
        else:
            labels, counts["labels_matched_by"] = match_labels(labels, tuple(label_names), where=where)

    keep = [
        row
        for row, text in enumerate(texts_a)
        if text is not None and text.strip() and (texts_b is None or (texts_b[row] or "").strip())
    ]
    counts["empty_dropped"] = len(texts_a) - len(keep)
    if not keep:
        raise RefusedError(
            f"dataset {where} has no rows with text in column {source.text_column!r}",
            details={"rows": len(texts_a), "empty": counts["empty_dropped"]},
        )
    splits = [part for part, rows in raw.split_names for _ in range(rows)]
    corpus = build_corpus(
        [texts_a[row] or "" for row in keep],
        None if texts_b is None else [texts_b[row] or "" for row in keep],
        Labels(labels.task, [labels.values[row] for row in keep], labels.names),
        splits=[splits[row] for row in keep],
        source=f"{raw.tag}:{split}" if split else raw.tag,
        info=CorpusInfo(
            task=labels.task,
            label_names=labels.names,
            text_column=source.text_column,
            text_pair_column=source.text_pair_column,
            label_column=source.label_column,
        ),
        counts=counts,
    )
    if not allow_unlabelled and corpus.counts["unlabelled"]:
        raise RefusedError(
            f"{corpus.counts['unlabelled']} of {len(corpus)} rows of {where} have no label, where all are needed",
            details={"label column": source.label_column or "(not given)"},
            fix="give --label-column, or a split whose labels are published",
        )
    return corpus


def build_corpus(
    texts_a: list[str],
    texts_b: list[str] | None,
    labels: Labels,
    *,
    splits: list[str],
    source: str,
    info: CorpusInfo,
    counts: dict[str, Any],
) -> Corpus:
    """A corpus of originals from texts and labels; counts duplicates and conflicting labels."""
    num_rows = len(texts_a)
    ids, dup_index = example_ids(texts_a, texts_b)
    has_gold = [value is not None for value in labels.values]
    wanted = schema(info.task)
    columns: dict[str, pa.Array] = {
        "example_id": pa.array(ids, pa.binary(16)),
        "task": pa.array([info.task] * num_rows),
        "split": pa.array(splits),
        "text_a": pa.array(texts_a, pa.string()),
        "text_b": pa.array(texts_b, pa.string()) if texts_b is not None else pa.nulls(num_rows, pa.string()),
        label_field(info.task): labels.to_arrow(),
        "has_gold": pa.array(has_gold, pa.bool_()),
        "aug_op": pa.array(["orig"] * num_rows),
        "source": pa.array([source] * num_rows),
    }
    arrays = [columns.get(f.name, pa.nulls(num_rows, f.type)).cast(f.type) for f in wanted]
    counts = {
        "rows": num_rows,
        **counts,
        "duplicates": sum(index > 0 for index in dup_index),
        "conflicting_labels": _conflicts(texts_a, texts_b, labels) if any(dup_index) else 0,
        "labelled": sum(has_gold),
        "unlabelled": num_rows - sum(has_gold),
    }
    return Corpus(pa.Table.from_arrays(arrays, schema=wanted), info, counts)


def _conflicts(texts_a: list[str], texts_b: list[str] | None, labels: Labels) -> int:
    """Labelled rows whose texts also occur with another gold label."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for row, value in enumerate(labels.values):
        if value is not None:
            key = (texts_a[row], texts_b[row] if texts_b is not None else "")
            groups.setdefault(key, Counter())[repr(value)] += 1
    return sum(group.total() for group in groups.values() if len(group) > 1)


def _missing_column(column: str, names: Sequence[str], where: str) -> RefusedError:
    return RefusedError(
        f"dataset {where} has no column {column!r}" + near_match(column, names),
        details=[f"columns: {', '.join(names)}"],
    )


def _label_columns(source: DatasetSource, names: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """The label columns, and the column of class names beside an integer one, if there is any."""
    column = source.label_column
    if column is None:
        return [], []
    if column in names:
        return [column], [n for n in (f"{column}_name", "label_name", f"{column}_text") if n in names and n != column][
            :1
        ]
    columns = [part.strip() for part in column.split(",")]
    for part in columns:
        if part not in names:
            raise _missing_column(part, names, where)
    return columns, []


def _labels(source: DatasetSource, raw: RawTable, label_columns: list[str], sibling: list[str], where: str) -> Labels:
    if not label_columns:
        return Labels(source.task or "single-label", [None] * raw.table.num_rows, ())
    if len(label_columns) > 1:
        if source.task not in (None, "multi-label"):
            raise RefusedError(f"--label-column names {len(label_columns)} columns; task {source.task!r} has one")
        return read_indicator_columns([raw.table[c] for c in label_columns], label_columns)
    return read_labels(
        raw.table[label_columns[0]],
        name=label_columns[0],
        task=source.task,
        class_names=raw.class_names.get(label_columns[0]),
        sibling=raw.table[sibling[0]] if sibling else None,
    )


def _text(table: pa.Table, column: str, where: str) -> list[str | None]:
    values = table[column]
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return values.to_pylist()  # type: ignore[no-any-return]
    hint = None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hint = "join the words first; token tasks are not supported yet"
    raise RefusedError(
        f"column {column!r} of dataset {where} holds {kind}, not text",
        details=[f"first value: {str(values[0].as_py())[:60]!r}"] if len(values) else (),
        fix=hint or "give the column that holds text as --text-column",
    )


# On disk ---------------------------------------------------------------------------------------------------------


def write_corpus(corpus: Corpus, path: Path | str) -> None:
    """Write `data/<split>-00000-of-0000N.parquet` and `README.md`, so that `datasets.load_dataset(path)` opens it.

    The manifest, without which `open_corpus` does not take it, is written by the stage (`corpus_content`).
    """
    folder = Path(path)
    data = folder / DATA_FOLDER
    data.mkdir(parents=True, exist_ok=True)
    for old in data.glob("*.parquet"):
        old.unlink()
    splits = corpus.table["split"]
    names = [name for name in dict.fromkeys(splits.to_pylist())]
    for name in names:
        rows = corpus.table if len(names) == 1 else corpus.table.filter(pc.equal(splits, name))
        num_files = max(1, -(-rows.num_rows // ROWS_PER_FILE))
        for index in range(num_files):
            file = data / f"{name}-{index:05d}-of-{num_files:05d}.parquet"
            part = rows.slice(index * ROWS_PER_FILE, ROWS_PER_FILE)
            pq.write_table(part, file, compression="zstd", row_group_size=min(ROWS_PER_FILE, 100_000))
    (folder / "README.md").write_text(_card(corpus, names), encoding="utf-8")


def corpus_content(corpus: Corpus) -> dict[str, Any]:
    """What a corpus adds to its manifest, and `open_corpus` reads."""
    return {
        "info": corpus.info.to_json(),
        "corpus_fingerprint": corpus.fingerprint,
        "num_rows": len(corpus),
        "counts": corpus.counts,
    }


def open_corpus(path: Path | str) -> Corpus:
    """The corpus in an artifact folder.

    Raises:
        RefusedError: not a finished corpus, or rows are missing.
    """
    artifact = open_artifact(path, kind="corpus")
    content = artifact.content
    files = sorted((artifact.path / DATA_FOLDER).glob("*.parquet"))
    info = CorpusInfo.from_json(content["info"])
    tables = [pq.read_table(file, schema=schema(info.task)) for file in files]
    table = pa.concat_tables(tables) if tables else schema(info.task).empty_table()
    if table.num_rows != content["num_rows"]:
        raise RefusedError(
            f"corpus {path} holds {table.num_rows} rows, and its manifest says {content['num_rows']}",
            fix="make it again: kd augment --overwrite",
        )
    return Corpus(table.unify_dictionaries(), info, dict(content.get("counts", {})))


def _card(corpus: Corpus, splits: list[str]) -> str:
    files = "\n".join(f"  - split: {name}\n    path: {DATA_FOLDER}/{name}-*.parquet" for name in splits)
    names = ", ".join(corpus.info.label_names) or "none"
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        f"{files}\n---\n# Corpus\n\nMade by `kd`. {len(corpus)} rows; task {corpus.info.task}; classes in order: {names}."
        "\n\nEvery row has an `example_id`; variants name the example they were made from in `parent_id`.\n"
    )
