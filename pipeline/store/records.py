"""Commit records: the only proof that a shard holds something.

A record is a small JSON file whose name carries the digest of its bytes. The first record of a shard (its
allocation) names the row index and the token ids; each later one names shard files of signals and the allocation
they were computed for. What a record says is checked against the layout before anything is read or allocated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import KdError, VerificationError
from ..fingerprint import canonical_json
from .files import Buffer, StoreFiles
from .layout import COMMITS, MAX_SHARDS, RECORD_NAME, StoreLayout, index_file, record_file, shard_file
from .signal import ArraySpec, Signal

RECORD_FORMAT = 1
MAX_RECORD_BYTES = 1 << 20
HEAD_BYTES = 4096
"""A reader hashes this much of a shard file before it maps it: enough to notice a file in another's place."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as a record says.

    Attributes:
        shard: which, None where it concerns the whole store.
        signal: which ("token_ids" and "index" included), None where it concerns no single one.
        file: path inside the store.
        what: one sentence.
    """

    shard: int | None
    signal: str | None
    file: str
    what: str

    def __str__(self) -> str:
        place = [] if self.shard is None else [f"shard {self.shard}"]
        if self.signal is not None:
            place.append(self.signal)
        return f"{', '.join(place) or 'store'}: {self.what} ({self.file})"


@dataclass(frozen=True)
class FileRecord:
    """One shard file of one array, as recorded when it was written.

    Attributes:
        spec: of the array.
        shard: which.
        bytes: size of the file.
        xxh3_128: hash of the file, 32 hex.
        head: hash of its first 4096 bytes, 32 hex.
    """

    spec: ArraySpec
    shard: int
    bytes: int
    xxh3_128: str
    head: str

    @property
    def file(self) -> str:
        """Path inside the store."""
        return shard_file(self.spec.path, len(self.spec.shape), self.shard)

    def to_json(self) -> dict[str, Any]:
        """As in a record."""
        return {
            **self.spec.to_json(),
            "file": self.file,
            "bytes": self.bytes,
            "xxh3_128": self.xxh3_128,
            "head": self.head,
        }


@dataclass(frozen=True)
class IndexRecord:
    """The row index of a shard.

    Attributes:
        bytes: size of the Parquet file.
        xxh3_128: hash of the Parquet file.
        content: hash of what it says (row keys, then number of tokens as uint32): the same for any Parquet writer.
    """

    bytes: int
    xxh3_128: str
    content: str


@dataclass(frozen=True)
class Record:
    """One commit.

    Attributes:
        store: digest of identity and layout of the store it belongs to.
        shard: which.
        rows: number of rows in the shard.
        tokens: number of tokens in the shard.
        files: the shard files it proves.
        index: of the row index, in the shard's first record only.
        allocation: digest of the shard's first record, in all others.
        supersedes: digests of records that no longer hold for the arrays that this one names (see `live_files`).
    """

    store: str
    shard: int
    rows: int
    tokens: int
    files: tuple[FileRecord, ...]
    index: IndexRecord | None = None
    allocation: str | None = None
    supersedes: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The bytes of the record file: canonical JSON and a line feed."""
        content: dict[str, Any] = {
            "format": RECORD_FORMAT,
            "store": self.store,
            "shard": self.shard,
            "rows": self.rows,
            "tokens": self.tokens,
            "arrays": [file.to_json() for file in sorted(self.files, key=lambda file: file.file)],
        }
        if self.index is not None:
            content["index"] = {
                "file": index_file(self.shard),
                "bytes": self.index.bytes,
                "xxh3_128": self.index.xxh3_128,
                "content": self.index.content,
            }
        else:
            content["allocation"] = self.allocation
        if self.supersedes:
            content["supersedes"] = sorted(self.supersedes)
        return canonical_json(content) + b"\n"

    @property
    def digest(self) -> str:
        """32 hex; part of the file's name."""
        return digest_of(self.encode())

    @property
    def file(self) -> str:
        """Path of the record inside the store."""
        return record_file(self.shard, self.digest)

    def entries(self, spec: ArraySpec) -> int:
        """Entries that the shard has on the axis of an array: rows or tokens."""
        return self.rows if spec.axis == "example" else self.tokens


def digest_of(data: bytes) -> str:
    """BLAKE2b-128 of a record's bytes, 32 hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_parts(parts: Iterable[Buffer]) -> tuple[int, str, str]:
    """(bytes, xxh3_128 of all, xxh3_128 of the first 4096 bytes) of a file made of these parts, in one pass."""
    whole, head, left, size = xxhash.xxh3_128(), xxhash.xxh3_128(), HEAD_BYTES, 0
    for part in parts:
        view = memoryview(part).cast("B")
        whole.update(view)
        head.update(view[:left])
        left -= min(left, view.nbytes)
        size += view.nbytes
    return size, whole.hexdigest(), head.hexdigest()


def decode_record(data: bytes, *, name: str, store: str, layout: StoreLayout) -> Record:
    """A record from its bytes, everything in it checked.

    Args:
        name: of its file in `commits/`; shard and digest in it must fit.
        store: digest that the record must name.

    Raises:
        ValueError: says what is wrong with it.
    """
    match = RECORD_NAME.fullmatch(name)
    if match is None:
        raise ValueError("the name is not that of a record")
    if digest_of(data) != match[2]:
        raise ValueError("its bytes do not have the digest in its name: it was edited or damaged")
    try:
        content = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    checked = _Fields(content, "record")
    if checked.number("format", 1 << 16) != RECORD_FORMAT:
        raise ValueError(f"format {content['format']}; this kd reads {RECORD_FORMAT}")
    if checked.text("store") != store:
        raise ValueError(f"it belongs to another store ({content['store']}, this one is {store})")
    shard = checked.number("shard", MAX_SHARDS - 1)
    if shard != int(match[1]):
        raise ValueError(f"it names shard {shard}, its file shard {int(match[1])}")
    rows = checked.number("rows", layout.rows_per_shard, least=1)
    tokens = checked.number("tokens", layout.tokens_per_shard, least=rows)
    arrays = content.get("arrays")
    if not isinstance(arrays, list) or not arrays:
        raise ValueError("'arrays' must be a list of shard files")
    files = tuple(_decode_file(item, shard) for item in arrays)
    index, allocation = None, None
    supersedes: tuple[str, ...] = ()
    if "index" in content:
        said = _Fields(content["index"], "index")
        if said.text("file") != index_file(shard):
            raise ValueError(f"the index of shard {shard} is {index_file(shard)}, got {said.text('file')!r}")
        index = IndexRecord(said.number("bytes", 1 << 40), said.digest("xxh3_128"), said.digest("content"))
        if tuple(file.spec for file in files) != tuple(sorted(layout.input_specs, key=lambda spec: spec.path)):
            raise ValueError("the first record of a shard names token_ids and segment_ids, and nothing else")
    else:
        allocation = checked.digest("allocation")
        if any(file.spec in layout.input_specs for file in files):
            raise ValueError("only the first record of a shard names token_ids and segment_ids")
        supersedes = tuple(checked.digests("supersedes"))
    record = Record(store, shard, rows, tokens, files, index, allocation, supersedes)
    if record.encode() != data:
        raise ValueError("it is not written as kd writes records")
    return record


def _decode_file(item: Any, shard: int) -> FileRecord:
    said = _Fields(item, "array")
    shape = item.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError(f"'shape' must be a list of numbers, got {shape!r}")
    try:
        signal = Signal.from_path(said.text("array"))
        spec = ArraySpec(signal, tuple(shape), said.text("dtype"), said.text("encoding"))
    except KdError as error:
        raise ValueError(error.what) from None
    file = FileRecord(spec, shard, said.number("bytes", 1 << 50), said.digest("xxh3_128"), said.digest("head"))
    if said.text("file") != file.file:
        raise ValueError(f"{signal} of shard {shard} is {file.file}, got {said.text('file')!r}")
    return file


@dataclass(frozen=True)
class _Fields:
    """Checked access to a JSON object from disk."""

    content: Any
    noun: str

    def __post_init__(self) -> None:
        if not isinstance(self.content, dict):
            raise ValueError(f"{self.noun} must be an object")

    def number(self, name: str, most: int, *, least: int = 0) -> int:
        value = self.content.get(name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name!r} must be {least} to {most}, got {value!r}")
        return value

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name!r} must be text, got {value!r}")
        return value

    def digest(self, name: str) -> str:
        value = self.text(name)
        if not re.fullmatch(r"[0-9a-f]{32}", value):
            raise ValueError(f"{name!r} must be 32 hex digits, got {value!r}")
        return value

    def digests(self, name: str) -> list[str]:
        """A list of digests; none when the field is not there."""
        values = self.content.get(name, [])
        if not isinstance(values, list) or not all(
            isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) for value in values
        ):
            raise ValueError(f"{name!r} must be a list of digests of 32 hex digits, got {values!r}")
        return values


@dataclass(frozen=True)
class Catalogue:
    """What the records of a store say, at one moment.

    Attributes:
        allocations: the first record of every shard, by shard number.
        files: shard files by array path and shard; token_ids and segment_ids included.
        specs: of the arrays that have at least one committed shard, by path.
        records: all records.
    """

    allocations: tuple[Record, ...] = ()
    files: Mapping[str, Mapping[int, FileRecord]] = field(default_factory=dict)
    specs: Mapping[str, ArraySpec] = field(default_factory=dict)
    records: tuple[Record, ...] = ()

    @property
    def num_shards(self) -> int:
        """Shards are numbered 0 to num_shards - 1."""
        return len(self.allocations)

    def present(self, spec: ArraySpec) -> npt.NDArray[np.bool_]:
        """[num_shards] whether the shard has a committed file of this array."""
        mask = np.zeros(self.num_shards, dtype=bool)
        mask[list(self.files.get(spec.path, {}))] = True
        return mask

    def digest_entries(self) -> list[list[Any]]:
        """What the store's digest is over: contents, not how they were split into commits."""
        shards = [
            ["shard", r.shard, r.rows, r.tokens, r.index.content] for r in self.allocations if r.index is not None
        ]
        arrays = [
            ["array", path, shard, file.bytes, file.xxh3_128]
            for path in sorted(self.files)
            for shard, file in sorted(self.files[path].items())
        ]
        return shards + arrays


class RecordReader:
    """Reads the records of a store; keeps those it has read, since a record never changes.

    Args:
        files: of the store.
        store: digest of identity and layout.
        layout: of the store.
    """

    def __init__(self, files: StoreFiles, store: str, layout: StoreLayout) -> None:
        self._files, self._store, self._layout = files, store, layout
        self._known: dict[str, Record] = {}

    def read(self, *, shard: int | None = None) -> tuple[list[Record], list[Problem]]:
        """All records (or those of one shard) and what is wrong with the rest."""
        prefix = "" if shard is None else f"{shard:08d}."
        names = [name for name in self._files.list(COMMITS) if name.startswith(prefix)]
        records, problems = [], []
        for name in names:
            try:
                records.append(self._read_one(name))
            except (ValueError, VerificationError, OSError) as error:
                what = error.what if isinstance(error, KdError) else str(error)
                match = RECORD_NAME.fullmatch(name)
                problems.append(Problem(int(match[1]) if match else None, "record", f"{COMMITS}/{name}", what))
        return records, problems

    def _read_one(self, name: str) -> Record:
        record = self._known.get(name)
        if record is None:
            if RECORD_NAME.fullmatch(name) is None:
                raise ValueError("the name is not that of a record")
            data = self._files.read(f"{COMMITS}/{name}", limit=MAX_RECORD_BYTES)
            record = decode_record(data, name=name, store=self._store, layout=self._layout)
            self._known[name] = record
        return record

    def catalogue(self) -> Catalogue:
        """Everything committed; VerificationError where the records contradict each other."""
        records, problems = self.read()
        catalogue, contradictions = build_catalogue(records)
        require_none([*problems, *contradictions], self._files.url)
        return catalogue


def require_none(problems: Sequence[Problem], url: str) -> None:
    """Raise VerificationError when there are problems, listing the first few."""
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise VerificationError(
            f"store {url} is damaged",
            details=[*map(str, problems[:5]), *more],
            fix=f"see all damage with: kd store verify {url}",
        )


def live_files(records: Iterable[Record]) -> Iterator[tuple[Record, FileRecord]]:
    """Every shard file that is named, with the record that names it; those that another record supersedes are left out.

    A record supersedes others for the arrays that it names itself, and for no other: a signal that was computed
    anew on another kind of machine.
    """
    records = [*records]
    gone = {(old, file.spec.path) for record in records for old in record.supersedes for file in record.files}
    for record in records:
        for file in record.files:
            if not gone or (record.digest, file.spec.path) not in gone:
                yield record, file


def build_catalogue(records: Iterable[Record]) -> tuple[Catalogue, list[Problem]]:
    """Join records into a catalogue; what contradicts something is left out of it and listed."""
    records = sorted(records, key=lambda record: (record.shard, record.allocation is not None, record.digest))
    problems: list[Problem] = []
    first: dict[int, Record] = {}
    for record in records:
        if record.index is not None:
            if record.shard in first:
                problems.append(Problem(record.shard, "record", record.file, "a second allocation of this shard"))
            first.setdefault(record.shard, record)
    num_shards = 1 + max((record.shard for record in records), default=-1)
    for shard in range(num_shards):
        if shard not in first:
            problems.append(Problem(shard, "record", COMMITS, "the record of its allocation is missing"))
            if len(problems) > 1000:
                break
    complete = next((shard for shard in range(num_shards) if shard not in first), num_shards)
    allocations = tuple(first[shard] for shard in range(complete))
    digests = [record.digest for record in allocations]

    files: dict[str, dict[int, FileRecord]] = {}
    specs: dict[str, ArraySpec] = {}
    kept: list[Record] = []
    for record in records:
        if record.shard >= complete:
            continue
        allocation = allocations[record.shard]
        if record.index is not None and record is not allocation:
            continue
        if record.index is None and (
            record.allocation != digests[record.shard]
            or (record.rows, record.tokens) != (allocation.rows, allocation.tokens)
        ):
            problems.append(
                Problem(record.shard, "record", record.file, "made for another allocation of rows to this shard")
            )
            continue
        kept.append(record)
    for record, file in live_files(kept):
        spec = specs.setdefault(file.spec.path, file.spec)
        others = files.setdefault(file.spec.path, {})
        if file.spec != spec:
            problems.append(
                Problem(
                    file.shard, str(spec.signal), record.file,
                    f"stored as {_said(file.spec)} here and as {_said(spec)} in other shards",
                )
            )  # fmt: skip
        elif others.setdefault(file.shard, file) != file:
            problems.append(Problem(file.shard, str(spec.signal), record.file, "two records name different contents"))
    return Catalogue(allocations, files, specs, tuple(kept)), problems


def _said(spec: ArraySpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
