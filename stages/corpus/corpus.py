"""A corpus: one table of examples, and what its labels mean."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from ...pipeline.artifact import open_artifact
from ...pipeline.errors import RefusedError, near_match
from ...pipeline.fingerprint import canonical_json, differing_fields
from ...pipeline.ragged import Ragged
from .files import RawTable, read_raw
from .labels import Labels, match_labels, queue_place, read_indicator_columns, read_labels
from .schema import EDITS_FIELD, NO_LABEL, CorpusInfo, example_id, example_ids, label_field, normalised, schema
from .source import DatasetSource
from .tokens import holds_words, read_tags, read_words

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
        return int(self.table.num_rows)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex: hash of the rows (texts, labels, origin) and what they mean; the order of the rows does not count."""
        return combined_digest([row_digests(self.table, self.info)], self.info)

    def texts(self, rows: slice = slice(None)) -> tuple[list[str], list[str] | None]:
        """The texts of some rows, or of all, in row order; the second list is None for single texts."""
        table = self.table.select(["text_a", "text_b"])[rows]
        return table["text_a"].to_pylist(), table["text_b"].to_pylist() if self.info.is_pair else None

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """`(labels, has_gold)` in row order, of any task but "token", whose labels are `tags`.

        labels: int64 [N] class index, float32 [N] score, or float32 [N, C] of 0 and 1, by task; where a row has no
        gold label they hold -1, 0 and zeros. has_gold: bool [N].
        """
        assert self.info.task != "token", "tags() has the labels of a token task"
        has_gold = self.has_gold
        column = self.table[label_field(self.info.task)].combine_chunks()
        if self.info.task == "single-label":
            return pc.fill_null(column, NO_LABEL).to_numpy(zero_copy_only=False).astype(np.int64), has_gold
        if self.info.task == "regression":
            return pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False), has_gold
        labels = np.zeros((len(self), len(self.info.label_names)), dtype=np.float32)
        values = column.drop_null().flatten().to_numpy()
        labels[has_gold] = values.reshape(-1, len(self.info.label_names))
        return labels, has_gold

    def tags(self) -> tuple[Ragged, np.ndarray]:
        """`(tags, has_gold)` of a token task, in row order.

        tags: int64, for every example the index of the tag of each of its words `text_a.split(" ")`; -1 for every word
        of an example that has no gold. has_gold: bool [N].
        """
        assert self.info.task == "token", self.info.task
        has_gold, lengths = self.has_gold, self.num_words
        tags = np.full(lengths.sum(), NO_LABEL, np.int64)
        tags[np.repeat(has_gold, lengths)] = self.table["tags"].combine_chunks().flatten().to_numpy()
        return Ragged.from_lengths(tags, lengths), has_gold

    @property
    def has_gold(self) -> np.ndarray:
        """bool [N]: which examples have a gold label."""
        return self.table["has_gold"].to_numpy()  # type: ignore[no-any-return]

    @property
    def num_words(self) -> np.ndarray:
        """int64 [N]: the words of every example of a token task."""
        assert self.info.task == "token", self.info.task
        spaces: np.ndarray = pc.count_substring(self.table["text_a"], " ").to_numpy().astype(np.int64)
        return spaces + 1

    def replaced(self, **changes: Any) -> Corpus:
        """The corpus with another table, info or counts."""
        return dataclasses.replace(self, **changes)

    def with_label_names(self, label_names: Sequence[str], *, task: str | None = None) -> Corpus:
        """The corpus with its gold labels as indices into `label_names`, matched by name (see `match_labels`).

        No names leave those of the corpus.
        Unlabelled corpora take any names and any task; "token" alone needs words.

        Raises:
            RefusedError: a gold label that is not among the names, or another task.
        """
        names = tuple(label_names)
        task = task or self.info.task
        if task == "token" != self.info.task:
            raise RefusedError(
                f"the text is no list of words, which task 'token' needs; its task is {self.info.task!r}",
                details={"text column": self.info.text_column},
                fix="give a --text-column that holds a list of words per row",
            )
        if not self.table["has_gold"].combine_chunks().true_count:
            labels = Labels(task, [None] * len(self), names if task != "regression" else ())
            return _with_labels(self, labels)
        if task != self.info.task:
            raise RefusedError(
                f"the labels are {self.info.task!r}, where {task!r} is expected",
                details={"label column": self.info.label_column or "(none)"},
                fix=f"give --task {task} if the column can be read so, or another --label-column",
            )
        if task == "regression" or not names or names == self.info.label_names:
            return self
        given = self.table[label_field(task)].to_pylist()
        if task == "multi-label":
            given = [None if row is None else [index for index, item in enumerate(row) if item] for row in given]
        labels = Labels(task, given, self.info.label_names)
        matched, how = match_labels(labels, names, where=f"column {self.info.label_column!r}")
        corpus = _with_labels(self, matched)
        return corpus.replaced(counts={**corpus.counts, "labels_matched_by": how})


def row_digests(table: pa.Table, info: CorpusInfo) -> np.ndarray:
    """S16 [N]: a hash per row of its texts, label and origin."""
    columns = [table[name].to_pylist() for name in (*_IDENTITY_COLUMNS, label_field(info.task))]
    return np.array([xxhash.xxh3_128_digest(repr(row).encode()) for row in zip(*columns, strict=True)], dtype="S16")


def combined_digest(digests: Sequence[np.ndarray], info: CorpusInfo) -> str:
    """32 hex: a hash of rows, given their `row_digests` in any order, and of what they mean."""
    meaning = {"task": info.task, "label_names": info.label_names, "is_pair": info.is_pair}
    rows = np.sort(np.concatenate([*digests, np.empty(0, dtype="S16")]))
    return blake2b(canonical_json(meaning) + rows.tobytes(), digest_size=16).hexdigest()


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
    - `empty_dropped`: rows whose text (or one text of the pair) is null or white space, or has no words; they are
      dropped.
    - `duplicates`: rows whose texts occurred before; they are kept, as examples of their own.
    - `conflicting_labels`: rows whose texts also occur with another gold label; they are kept.
    - `labelled`, `unlabelled`: rows with and without a gold label (null, "" or -1).
    - `labels_matched_by`: "name", "case" or "number", when `label_names` were given.

    Args:
        source: dataset and columns.
        split_default: the split to read when the source names none and has several.
        label_names: the classes in the order to number them in, such as a teacher's; labels are matched by name.
            None or empty: those of the dataset.
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
    has_words = source.task == "token" or (source.task is None and holds_words(raw.table[source.text_column].type))
    if has_words and source.text_pair_column is not None:
        raise RefusedError(
            f"column {source.text_column!r} of dataset {where} holds words, and a token task has one text per row",
            fix="leave --text-pair-column out, or join the words",
        )
    texts_a = (_words if has_words else _text)(raw.table, source.text_column, where)
    texts_b = _text(raw.table, source.text_pair_column, where) if source.text_pair_column is not None else None
    if has_words:
        labels = _tags(source, raw, label_columns, texts_a, where)
    else:
        labels = _labels(source, raw, label_columns, sibling, where)
    counts: dict[str, Any] = {"rows_read": raw.table.num_rows}
    if label_names and labels.task != "regression":
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
    if any(dup_index):
        ids = _numbered_by_label(ids, texts_a, texts_b, splits, labels)
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


def _numbered_by_label(
    ids: list[bytes], texts_a: list[str], texts_b: list[str] | None, splits: list[str], labels: Labels
) -> list[bytes]:
    """The ids, those of equal texts dealt out by split and label: which copy has which label does not hang on order."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row, text in enumerate(texts_a):
        key = (normalised(text), "" if texts_b is None else normalised(texts_b[row]))
        groups.setdefault(key, []).append(row)
    numbered = [*ids]
    for rows in groups.values():
        if len(rows) > 1:
            for row, other in zip(
                sorted(rows, key=lambda row: (splits[row], repr(labels.values[row]))), rows, strict=True
            ):
                numbered[row] = ids[other]
    return numbered


def sorted_by_id(table: pa.Table) -> pa.Table:
    """The rows in the order of their `example_id`: the same table, whatever order they came in."""
    ids = np.array(table["example_id"].to_pylist(), dtype="S16")
    return table.take(pa.array(np.argsort(ids, kind="stable")))


def join_unlabelled(
    corpus: Corpus,
    others: Sequence[Corpus],
    *,
    keys_of: Callable[[Sequence[str], Sequence[str] | None], list[bytes]] | None = None,
    forbidden: Collection[bytes] = (),
    most: int | None = None,
    seed: int = 0,
    lines: bool = False,
) -> Corpus:
    """The corpus followed by the texts of others, without their labels.

    A text that is there already, in the corpus or an earlier one of the others, is left out: it would add nothing but
    weight. Counts `transfer_rows` joined, and left out `transfer_known`, `transfer_leaks` and `transfer_not_sampled`.

    Args:
        corpus: what comes first.
        others: unlabelled, or labelled and taken without.
        keys_of: what texts are compared by; their `example_id` when not given.
        forbidden: keys of texts that must not be joined.
        most: join so many at most; which follows from the seed and the texts, not from their order.
        seed: which ones.
        lines: every line of the others is a text.

    Raises:
        RefusedError: single texts joined to pairs, or the other way round; lines of words.
    """
    if not others:
        return corpus
    if lines and corpus.info.task == "token":
        raise RefusedError("lists of words have no lines", fix="leave --transfer-lines out")
    keys_of = keys_of or _ids_of
    known = set(keys_of(*corpus.texts()))
    counts: Counter[str] = Counter()
    rows: list[tuple[str, str | None, str]] = []
    for other in others:
        if (other.info.task == "token") != (corpus.info.task == "token"):
            raise RefusedError(
                "transfer text must be lists of words where the dataset's is, and only there",
                details=[f"dataset: task {corpus.info.task!r}; transfer text: task {other.info.task!r}"],
                fix="give a --transfer-text-column that holds what --text-column does",
            )
        if other.info.is_pair != corpus.info.is_pair:
            raise RefusedError(
                "transfer text must have as many texts per row as the dataset", fix="give --transfer-text-pair-column"
            )
        texts_a, texts_b = other.texts()
        if lines:
            texts_a = [line.strip() for text in texts_a for line in text.splitlines() if line.strip()]
        source = other.table["source"][0].as_py()
        for row, key in enumerate(keys_of(texts_a, texts_b)):
            if key in forbidden or key in known:
                counts["transfer_leaks" if key in forbidden else "transfer_known"] += 1
            else:
                known.add(key)
                rows.append((texts_a[row], None if texts_b is None else texts_b[row], source))
    if most is not None and most < len(rows):
        counts["transfer_not_sampled"] = len(rows) - most
        places = {id(row): queue_place(example_id(*row[:2]), seed, b"kd-transfer-1") for row in rows}
        rows = sorted(rows, key=lambda row: places[id(row)])[:most]
    tables = [corpus.table]
    for source in dict.fromkeys(row[2] for row in rows):
        chosen = [row for row in rows if row[2] == source]
        joined = build_corpus(
            [text_a for text_a, _, _ in chosen],
            [text_b or "" for _, text_b, _ in chosen] if corpus.info.is_pair else None,
            Labels(corpus.info.task, [None] * len(chosen), corpus.info.label_names),
            splits=[corpus.table["split"][0].as_py()] * len(chosen),
            source=source,
            info=corpus.info,
            counts={},
        )
        tables.append(joined.table)
    figures = {name: counts[name] for name in ("transfer_known", "transfer_leaks", "transfer_not_sampled")}
    return corpus.replaced(
        table=pa.concat_tables(tables).unify_dictionaries(),
        counts={
            **corpus.counts,
            "rows": len(corpus) + len(rows),
            "unlabelled": corpus.counts["unlabelled"] + len(rows),
            "transfer_rows": len(rows),
            **figures,
        },
    )


def _ids_of(texts_a: Sequence[str], texts_b: Sequence[str] | None = None) -> list[bytes]:
    return [example_id(text, None if texts_b is None else texts_b[row]) for row, text in enumerate(texts_a)]


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


def _tags(
    source: DatasetSource, raw: RawTable, label_columns: list[str], texts: list[str | None], where: str
) -> Labels:
    if not label_columns:
        return Labels("token", [None] * len(texts), ())
    if len(label_columns) > 1:
        raise RefusedError(f"--label-column names {len(label_columns)} columns; task 'token' has one")
    [column] = label_columns
    return read_tags(raw.table[column], texts, name=column, where=where, class_names=raw.class_names.get(column))


def _words(table: pa.Table, column: str, where: str) -> list[str | None]:
    values = table[column]
    if holds_words(values.type) or pa.types.is_null(values.type):
        return read_words(values, name=column, where=where)
    raise RefusedError(
        f"column {column!r} of dataset {where} holds {values.type}; task 'token' needs a list of words in every row",
        details=[f"first value: {str(values[0].as_py())[:60]!r}"] if len(values) else (),
        fix="give a list column of a Parquet, Arrow or JSON lines file (CSV and TSV hold no lists)",
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
        hint = "join the words first, or give --task token where every word has a tag"
    raise RefusedError(
        f"column {column!r} of dataset {where} holds {kind}, not text",
        details=[f"first value: {str(values[0].as_py())[:60]!r}"] if len(values) else (),
        fix=hint or "give the column that holds text as --text-column",
    )


# On disk ---------------------------------------------------------------------------------------------------------


def write_corpus(corpus: Corpus, path: Path | str) -> dict[str, Any]:
    """Write a corpus so that `datasets.load_dataset(path)` opens it; see `write_tables`."""
    return write_tables([corpus.table], path, info=corpus.info, counts=corpus.counts, num_rows=_rows_per_split(corpus))


def write_tables(
    tables: Iterable[pa.Table],
    path: Path | str,
    *,
    info: CorpusInfo,
    num_rows: Mapping[str, int],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write tables one after the other as one corpus, and return what its manifest must hold as `content`.

    Writes `data/<split>-00000-of-0000N.parquet` and `README.md`, the layout that `datasets.load_dataset(path)` opens.
    Without its manifest, which the stage writes last, `open_corpus` does not take the folder.

    Args:
        tables: rows in the schema of `schema(info.task)`; one is held at a time.
        path: the folder.
        info: what the rows mean.
        num_rows: how many rows of each split the tables will have.
        counts: how rows were treated.
    """
    folder = Path(path)
    data = folder / DATA_FOLDER
    data.mkdir(parents=True, exist_ok=True)
    for old in data.glob("*.parquet"):
        old.unlink()
    digests = []
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(_SplitWriter(data, split, rows)) for split, rows in num_rows.items()}
        for table in tables:
            digests.append(row_digests(table, info))
            for split, writer in writers.items():
                writer.write(table if len(writers) == 1 else table.filter(pc.equal(table["split"], split)))
    (folder / "README.md").write_text(_card(info, num_rows), encoding="utf-8")
    return {
        "info": info.to_json(),
        "corpus_fingerprint": combined_digest(digests, info),
        "num_rows": sum(num_rows.values()),
        "files": [_file_record(folder, file) for file in sorted(data.glob("*.parquet"))],
        "counts": dict(counts),
    }


def open_corpus(path: Path | str, *, edits: bool = False) -> Corpus:
    """The corpus in an artifact folder.

    Args:
        edits: with the column `aug_edits` (see `schema.schema`), which is for audits: nothing else reads it.

    Raises:
        RefusedError: not a finished corpus, its files are not those that were written, or it has no edits.
    """
    artifact = open_artifact(path, kind="corpus")
    content, again = artifact.content, "make the corpus again: kd augment ... --overwrite"
    files, counts = content.get("files"), content.get("counts")
    if not (
        isinstance(files, list)
        and all(isinstance(record, dict) and isinstance(record.get("file"), str) for record in files)
        and isinstance(counts, dict)
        and isinstance(content.get("corpus_fingerprint"), str)
    ):
        raise RefusedError(f"the manifest of corpus {artifact.path} was edited or damaged", fix=again)
    for record in files:
        file = artifact.path / record["file"]
        found = _file_record(artifact.path, file) if file.is_file() else None
        if found != record:
            raise RefusedError(
                f"{file} is {'missing' if found is None else 'not the file that was written'}",
                details=[] if found is None else differing_fields(record, found),
                fix=again,
            )
    info = CorpusInfo.from_json(content.get("info"))
    wanted, paths = schema(info.task, edits=edits), [artifact.path / record["file"] for record in files]
    if edits and not all(EDITS_FIELD.name in pq.read_schema(path).names for path in paths):
        raise RefusedError(f"corpus {artifact.path} does not say what was changed where", fix="kd augment --keep-edits")
    tables = [pq.read_table(path, schema=wanted) for path in paths]
    table = pa.concat_tables(tables) if tables else wanted.empty_table()
    if len(table) != content.get("num_rows"):
        raise RefusedError(
            f"corpus {artifact.path} has {len(table)} rows, its manifest says {content.get('num_rows')!r}", fix=again
        )
    corpus = Corpus(table.unify_dictionaries(), info, counts)
    # The files are those of the manifest, so its digest of the rows is theirs.
    corpus.__dict__["fingerprint"] = content["corpus_fingerprint"]
    return corpus


class _SplitWriter(contextlib.AbstractContextManager["_SplitWriter"]):
    """Writes the rows of one split into files of `ROWS_PER_FILE`, named with their number in all."""

    def __init__(self, data: Path, split: str, num_rows: int) -> None:
        self._data = data
        self._split = split
        self._num_files = max(1, -(-num_rows // ROWS_PER_FILE))
        self._expected = num_rows
        self._written = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        while table.num_rows:
            place = self._written % ROWS_PER_FILE
            if place == 0:
                self._close()
                name = f"{self._split}-{self._written // ROWS_PER_FILE:05d}-of-{self._num_files:05d}.parquet"
                self._writer = pq.ParquetWriter(self._data / name, table.schema, compression="zstd")
            part = table.slice(0, ROWS_PER_FILE - place)
            assert self._writer is not None
            self._writer.write_table(part, row_group_size=100_000)
            self._written += part.num_rows
            table = table.slice(part.num_rows)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        assert kind is not None or self._written == self._expected, (self._split, self._written, self._expected)


def _rows_per_split(corpus: Corpus) -> dict[str, int]:
    counts = Counter(corpus.table["split"].to_pylist())
    return {name: counts[name] for name in dict.fromkeys(corpus.table["split"].to_pylist())}


def _file_record(folder: Path, file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {
        "file": file.relative_to(folder).as_posix(),
        "bytes": file.stat().st_size,
        "xxh3_128": digest.hexdigest(),
    }


def _card(info: CorpusInfo, num_rows: Mapping[str, int]) -> str:
    files = "\n".join(f"  - split: {name}\n    path: {DATA_FOLDER}/{name}-*.parquet" for name in num_rows)
    rows = ", ".join(f"{number} {name}" for name, number in num_rows.items())
    names = ", ".join(info.label_names) or "none"
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n# Corpus\n\n"
        f"Made by `kd`. Rows: {rows}. Task: {info.task}. Classes, in order: {names}.\n\n"
        "Every row has an `example_id`. Variants name the example they were made from in `parent_id` and carry no "
        "gold label.\n"
    )
