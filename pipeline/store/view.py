"""Views: the rows of one corpus inside a store. What `cache-teacher` hands to `train-student`.

A view is a folder with `examples.parquet`: all columns of the corpus, and for each example the row number and the
row key of its teacher outputs. The key is compared with the store's before anything is joined.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..artifact import atomic_writer, open_artifact
from ..errors import RefusedError, VerificationError
from ..ragged import IntArray
from .arrow import from_arrow, to_arrow
from .compacted import PARQUET_ERRORS
from .keys import Keys, key_hex, keys_from_arrow, keys_to_arrow
from .scratch import BLOCK_ROWS, column, passed, release
from .signal import ArraySpec, Signal
from .store import open_store

if TYPE_CHECKING:
    from .reader import StoreReader
    from .store import TeacherStore

EXAMPLES = "examples.parquet"
STORE_PROTOCOLS = ("file://", "s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://", "memory://")
"""Where a view may say that its store is; another URL has to be asked for by a person."""


@dataclass(frozen=True)
class View:
    """An opened view.

    Attributes:
        path: its folder.
        store: the store its rows are in, identity checked.
        rows: int64 [N] row number of each example in the store.
        info: what the corpus says of itself (task, label names, columns).
        content: the kind-specific part of the manifest.
        fingerprint: of the view.
    """

    path: Path
    store: TeacherStore
    rows: IntArray
    info: Mapping[str, Any]
    content: Mapping[str, Any] = field(repr=False)
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What was captured for it when it was made, each with its encoding."""
        return tuple(Signal.parse(signal) for signal in self.content["signals"])

    @property
    def encodings(self) -> dict[Signal, str]:
        """The encoding that its reader gives a signal in: the first that it was made with, whatever the store gains."""
        found: dict[Signal, str] = {}
        for signal in self.signals:
            if signal.encoding is not None:
                found.setdefault(signal.bare, signal.encoding)
        return found

    @cached_property
    def examples(self) -> pa.Table:
        """All columns of the corpus, then `row` int64 and `row_key` fixed_size_binary(16)."""
        return _read_examples(self.path, len(self))

    @cached_property
    def reader(self) -> StoreReader:
        """A reader of the store, as it was when this was first asked for, in the view's encodings."""
        return self.store.reader(self.encodings, self.rows)

    def check_coverage(self, signals: Iterable[Signal | str]) -> None:
        """Refuse unless every example has every signal.

        Raises:
            RefusedError: per signal, how many examples lack it and the first of their ids.
        """
        reader, lines, wanted = self.reader, [], []
        for signal in signals:
            missing = np.flatnonzero(~reader.has(signal, self.rows))
            if len(missing):
                wanted.append(str(signal))
                lines.append(
                    f"{signal}: {len(missing)} of {len(self)} examples lack it, first {self._ids(missing[:3])}"
                )
        if lines:
            raise RefusedError(
                f"view {self.path} does not cover what is needed",
                details=lines,
                fix=f"run kd cache-teacher again on the same corpus and store with --signals {','.join(wanted)}",
            )

    def _ids(self, examples: npt.NDArray[np.int64]) -> str:
        if "example_id" not in self.examples.column_names:
            return ", ".join(f"example {number}" for number in examples.tolist())
        values = self.examples.column("example_id").take(pa.array(examples)).to_pylist()
        return ", ".join(value.hex() if isinstance(value, bytes) else str(value) for value in values)


def _require_same_rows(reader: StoreReader, rows: IntArray, expected: Iterable[Keys], *, where: str) -> None:
    """Refuse when a row of the store is not the input that an example was joined to; `expected` comes in blocks."""
    first: tuple[int, Keys, Keys] | None = None
    start = num_bad = 0
    for keys in expected:
        found = reader.row_keys(rows[start : start + len(keys)])
        bad = np.flatnonzero((keys != found).any(axis=1))
        if len(bad) and first is None:
            first = start + int(bad[0]), keys[bad[:1]], found[bad[:1]]
        num_bad += len(bad)
        start += len(keys)
        # What was compared is not looked at again.
        reader.index.release()
        release(rows)
    if first is not None:
        example, key, other = first
        raise VerificationError(
            f"{where}: example {example} was joined to row {int(rows[example])} of {reader.files.url}, "
            f"which holds another input ({num_bad} of {len(rows)} examples)",
            details=[f"row key in the view: {key_hex(key, 0)}", f"in the store: {key_hex(other, 0)}"],
            fix="run kd cache-teacher again to make the view anew",
        )


def _open_examples(folder: Path, num_rows: int | None) -> pq.ParquetFile:
    """The file of the examples, whose numbers of rows agree with each other and with those of the manifest."""
    file = folder / EXAMPLES
    parquet = pq.ParquetFile(file)
    metadata = parquet.metadata
    num_rows = metadata.num_rows if num_rows is None else num_rows
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    if not num_rows == metadata.num_rows == sum(group.num_rows for group in groups):
        raise VerificationError(f"{file} has {metadata.num_rows} rows, the manifest says {num_rows}")
    # Every row has a key of its own but for duplicates; a file of a few bytes with a billion rows is none of ours.
    if num_rows > file.stat().st_size:
        raise VerificationError(f"{file} says it has {num_rows} rows in {file.stat().st_size} bytes")
    return parquet


def _unreadable(folder: Path, error: Exception) -> VerificationError:
    return VerificationError(
        f"{folder / EXAMPLES} cannot be read: {error}", fix="run kd cache-teacher again to make the view anew"
    )


def _read_examples(folder: Path, num_rows: int) -> pa.Table:
    try:
        return _open_examples(folder, num_rows).read()
    except (ValueError, *PARQUET_ERRORS) as error:
        raise _unreadable(folder, error) from None


def _read_column(folder: Path, name: str, dtype: pa.DataType, num_rows: int | None) -> Iterator[pa.Array]:
    """A column that kd adds to the examples, in blocks of rows."""
    try:
        parquet = _open_examples(folder, num_rows)
        if name not in parquet.schema_arrow.names or parquet.schema_arrow.field(name).type != dtype:
            raise VerificationError(f"{folder / EXAMPLES} lacks the column {name} ({dtype})")
        # Group by group: an iterator over several keeps what it has read of all of them.
        for group in range(parquet.num_row_groups):
            for batch in parquet.iter_batches(BLOCK_ROWS, row_groups=[group], columns=[name], use_threads=False):
                yield batch.column(0)
    except (ValueError, *PARQUET_ERRORS) as error:
        raise _unreadable(folder, error) from None


def read_rows(folder: Path, num_rows: int | None = None) -> IntArray:
    """int64 [N] row numbers of a view, without opening its store; VerificationError when they cannot be read."""
    parts = _read_column(folder, "row", pa.int64(), num_rows)
    rows: IntArray = column((from_arrow(part, np.int64) for part in parts), np.int64)
    for _, part in passed(rows):
        if part.min() < 0:
            raise VerificationError(f"{folder / EXAMPLES} names row {int(part.min())}")
    return rows


def write_view(
    path: str | os.PathLike[str],
    examples: pa.Table,
    rows: npt.ArrayLike,
    store: TeacherStore,
    signals: Sequence[Signal | ArraySpec],
    *,
    corpus: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `examples.parquet` and return the content for the manifest, which the stage writes last.

    Args:
        examples: N rows, all columns of the corpus.
        rows: int64 [N] where `store.allocate` put them.
        signals: what was captured for all of them; a spec names its encoding.
        corpus: what the corpus says of itself, and its fingerprint.
    """
    rows_N = np.asarray(rows, dtype=np.int64)
    if len(rows_N) != len(examples):
        raise RefusedError(f"view {path}: {len(examples)} examples, {len(rows_N)} rows")
    table = examples.drop_columns([name for name in ("row", "row_key") if name in examples.column_names])
    index, schema = store.reader().index, table.schema
    for added in (pa.field("row", pa.int64(), nullable=False), pa.field("row_key", pa.binary(16), nullable=False)):
        schema = schema.append(added)
    # Values that occur once are no gain from a dictionary.
    others = [name for name in schema.names if name not in ("row", "row_key", "example_id")]
    with atomic_writer(Path(path) / EXAMPLES) as file, pq.ParquetWriter(file, schema, use_dictionary=others) as writer:
        for part, rows in passed(rows_N):
            columns = [*table.slice(part.start, len(rows)).columns, to_arrow(rows), keys_to_arrow(index.row_keys(rows))]
            writer.write_table(pa.table(columns, schema=schema))
            index.release()
    return {
        "store": _address_from(Path(path), store),
        "store_identity": store.identity.digest,
        "store_digest": store.store_digest,
        "signals": [*dict.fromkeys(str(s.encoded if isinstance(s, ArraySpec) else s) for s in signals)],
        "corpus": dict(corpus or {}),
        "num_rows": len(rows_N),
    }


def _address_from(folder: Path, store: TeacherStore) -> str:
    """Where the store is, seen from a view: a relative path, so that both can be moved together, or a URL."""
    address = store.files.address
    return address if "://" in address else os.path.relpath(address, folder.resolve())


def _checked(content: Mapping[str, Any], folder: Path) -> tuple[str, str, int]:
    """(store, its identity, number of rows) of a manifest, every field of which is of its kind."""
    kinds = {"store": str, "store_identity": str, "signals": list, "corpus": dict, "num_rows": int}
    for name, kind in kinds.items():
        if name not in content:
            raise VerificationError(f"the manifest of view {folder} lacks {name!r}")
        if type(content[name]) is not kind:
            raise VerificationError(f"the manifest of view {folder}: {name} is {content[name]!r}")
    if not all(isinstance(signal, str) for signal in content["signals"]):
        raise VerificationError(f"the manifest of view {folder}: signals are {content['signals']!r}")
    where = content["store"]
    # Chained and unheard-of file systems could be made to fetch or run anything.
    if not where.isprintable() or "::" in where or ("://" in where and not where.startswith(STORE_PROTOCOLS)):
        raise VerificationError(f"the manifest of view {folder}: {where!r} is not where a store can be")
    return where, content["store_identity"], content["num_rows"]


def open_view(path: str | os.PathLike[str]) -> View:
    """Open a finished view and the store it points to.

    Raises:
        RefusedError: no view there, or its store is gone or another one.
        VerificationError: `examples.parquet` is not what the manifest says, or a row of the store is not the
            input that an example was joined to.
    """
    folder = Path(path)
    artifact = open_artifact(folder, kind="view")
    content = artifact.content
    where, identity, num_rows = _checked(content, folder)
    location = where if "://" in where else os.path.normpath(folder.resolve() / where)
    try:
        store = open_store(location)
    except RefusedError as error:
        raise RefusedError(
            f"view {folder} points to the store {location}, which cannot be opened",
            details=[error.what],
            fix="put the store back where it was relative to the view, or run kd cache-teacher again",
        ) from None
    if store.identity.digest != identity or store.store_digest != content.get("store_digest", store.store_digest):
        raise RefusedError(
            f"view {folder} was made for another store than the one at {location}",
            details=[f"store the view was made for: {identity}", f"store found: {store.identity.digest}"],
            fix="put the original store back, or run kd cache-teacher again",
        )
    rows = read_rows(folder, num_rows)
    corpus = content["corpus"]
    info = corpus.get("info", corpus)
    if not isinstance(info, dict):
        raise VerificationError(f"the manifest of view {folder}: info of the corpus is {info!r}")
    view = View(folder, store, rows, info, content, artifact.fingerprint)
    keys = _read_column(folder, "row_key", pa.binary(16), num_rows)
    _require_same_rows(view.reader, rows, map(keys_from_arrow, keys), where=f"view {folder}")
    return view
