"""Commit records: the only proof that a shard holds something.

A record is a small JSON file whose name carries the digest of its bytes. The first record of a shard (its
allocation) names the row index and the token ids; each later one names shard files of signals and the allocation
they were computed for. What a record says is checked against the layout before anything is read or allocated.
Many records may stand together in a file of `compacted.py`; where one stands makes no difference.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import KdError, VerificationError
from ..fingerprint import canonical_json
from .compacted import COMPACTED_NAME, MAX_RECORD_BYTES, decode_compacted, digest_of
from .files import SMALL_FILE_BYTES, Buffer, StoreFiles
from .layout import COMMITS, MAX_SHARDS, RECORD_NAME, StoreLayout, index_file, record_file, shard_file
from .plan import ShardSize
from .signal import ENCODINGS, RAW, SEGMENT_IDS, TOKEN_IDS, ArraySpec, Signal

RECORD_FORMAT = 1
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
        pairs: number of pairs of tokens in the shard, of each row its tokens squared; 0 in a store without that axis.
    """

    store: str
    shard: int
    rows: int
    tokens: int
    files: tuple[FileRecord, ...]
    index: IndexRecord | None = None
    allocation: str | None = None
    supersedes: tuple[str, ...] = ()
    pairs: int = 0

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
        if self.pairs:
            content["pairs"] = self.pairs
        if self.supersedes:
            content["supersedes"] = sorted(self.supersedes)
        return canonical_json(content) + b"\n"

    @cached_property
    def digest(self) -> str:
        """32 hex; part of the file's name."""
        return digest_of(self.encode())

    @property
    def file(self) -> str:
        """Path of the record inside the store."""
        return record_file(self.shard, self.digest)

    @property
    def size(self) -> ShardSize:
        """How much of each axis the shard takes."""
        return ShardSize(self.rows, self.tokens, self.pairs)

    def entries(self, spec: ArraySpec) -> int:
        """Entries that the shard has on the axis of an array: rows, tokens or pairs of tokens."""
        return self.size.entries(spec.axis)


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
    record = _decode_canonical(data, int(match[1]), store, layout)
    if record is None:
        record = _decode_json(data, int(match[1]), store, layout)
    record.__dict__["digest"] = match[2]  # the cached property, which would encode the record to hash it again
    return record


# --- the quick way: records as kd writes them, a hundred times as many a second as through JSON --------------------

_NUMBER, _DIGEST, _TEXT = "(0|[1-9][0-9]{0,14})", "([0-9a-f]{32})", r'([^"\\{}]*)'
_CANONICAL = re.compile(
    rf'\{{(?:"allocation":"{_DIGEST}",)?"arrays":\[\{{(.+)\}}\],"format":{RECORD_FORMAT},'
    rf'(?:"index":\{{"bytes":{_NUMBER},"content":"{_DIGEST}","file":"{_TEXT}","xxh3_128":"{_DIGEST}"\}},)?'
    rf'(?:"pairs":{_NUMBER},)?"rows":{_NUMBER},"shard":{_NUMBER},"store":"{_DIGEST}","tokens":{_NUMBER}\}}\n'
)
_CANONICAL_ARRAY = re.compile(
    rf'"array":"{_TEXT}","bytes":{_NUMBER},"dtype":"{_TEXT}","encoding":"{_TEXT}","file":"{_TEXT}",'
    rf'"head":"{_DIGEST}","shape":\[((?:[1-9][0-9]{{0,8}},?)*)(?<!,)\],"xxh3_128":"{_DIGEST}"'
)


def _decode_canonical(data: bytes, shard: int, store: str, layout: StoreLayout) -> Record | None:
    """A record that is all as it should be; None for any other, which `_decode_json` has the words for."""
    match = _CANONICAL.fullmatch(data.decode("ascii", "replace"))
    if match is None:
        return None
    allocation, arrays, index_bytes, content, index_name, index_hash, pairs, rows, number, its_store, tokens = (
        match.groups()
    )
    num_rows, num_tokens, num_pairs = int(rows), int(tokens), int(pairs or 0)
    if (
        (allocation is None) == (content is None)
        or int(number) != shard
        or its_store != store
        or not 1 <= num_rows <= layout.rows_per_shard
        or not num_rows <= num_tokens <= layout.tokens_per_shard
        or not _least_pairs(num_tokens, layout) <= num_pairs <= layout.pairs_per_shard
        or (content is not None and index_name != index_file(shard))
    ):
        return None
    inputs = _input_arrays(layout)
    files, names, with_inputs, together = [], [], False, set[str]()
    for item in arrays.split("},{"):
        said = _CANONICAL_ARRAY.fullmatch(item)
        if said is None:
            return None
        array, size, dtype, encoding, name, head, shape, whole = said.groups()
        stored = _stored_as(array, dtype, encoding, shape)
        if stored is None or name != f"{stored.before}{shard}{stored.after}":
            return None
        file = object.__new__(FileRecord)  # frozen dataclasses fill their fields slowly
        file.__dict__.update(spec=stored.spec, shard=shard, bytes=int(size), xxh3_128=whole, head=head)
        files.append(file)
        names.append(name)
        with_inputs = with_inputs or array in _INPUT_PATHS
        together.update(stored.parts)
    if names != sorted(names) or (together and not together <= {file.spec.path for file in files}):
        return None
    if content is not None:
        if tuple(file.spec for file in files) != inputs:
            return None
        index = IndexRecord(int(index_bytes), index_hash, content)
        return Record(store, shard, num_rows, num_tokens, tuple(files), index, None, pairs=num_pairs)
    if with_inputs:
        return None
    return Record(store, shard, num_rows, num_tokens, tuple(files), None, allocation, pairs=num_pairs)


def _least_pairs(tokens: int, layout: StoreLayout) -> int:
    """Every token makes one with itself, in stores that have pairs."""
    return tokens if layout.pairs_per_shard else 0


class _StoredAs(NamedTuple):
    spec: ArraySpec
    before: str
    after: str
    """The name of a shard file is `before`, the shard's number, `after`."""
    parts: tuple[str, ...]
    """Arrays that a record names together or not at all; none where it is one."""


@lru_cache(maxsize=4096)
def _stored_as(array: str, dtype: str, encoding: str, shape: str) -> _StoredAs | None:
    """One array from what a record says about it; None when that is not right."""
    item = {
        "array": array,
        "dtype": dtype,
        "encoding": encoding,
        "shape": [int(size) for size in shape.split(",") if size],
    }
    try:
        spec = _decode_spec(item)
    except ValueError:
        return None
    before, _, after = shard_file(spec.path, len(spec.shape), 0).rpartition("/c/0")
    return _StoredAs(spec, f"{before}/c/", after, _parts(spec)) if spec.to_json() == item else None


_INPUT_PATHS = (TOKEN_IDS.name, SEGMENT_IDS.name)


@lru_cache(maxsize=64)
def _input_arrays(layout: StoreLayout) -> tuple[ArraySpec, ...]:
    """The arrays of an allocation: the very objects that `_stored_as` gives, so that comparing them costs nothing."""
    arrays = sorted(layout.input_specs, key=lambda spec: spec.path)
    stored = [_stored_as(spec.path, spec.dtype, spec.encoding, "") for spec in arrays]
    return tuple(array.spec for array in stored if array is not None)


# --- the slow way: any record, and what is wrong with it ----------------------------------------------------------


def _decode_json(data: bytes, its_shard: int, store: str, layout: StoreLayout) -> Record:
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
    if shard != its_shard:
        raise ValueError(f"it names shard {shard}, its file shard {its_shard}")
    rows = checked.number("rows", layout.rows_per_shard, least=1)
    tokens = checked.number("tokens", layout.tokens_per_shard, least=rows)
    pairs = 0
    if layout.pairs_per_shard or "pairs" in content:
        pairs = checked.number("pairs", layout.pairs_per_shard, least=_least_pairs(tokens, layout))
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
        if tuple(file.spec for file in files) != _input_arrays(layout):
            raise ValueError("the first record of a shard names token_ids and segment_ids, and nothing else")
    else:
        allocation = checked.digest("allocation")
        if any(file.spec in layout.input_specs for file in files):
            raise ValueError("only the first record of a shard names token_ids and segment_ids")
        supersedes = tuple(checked.digests("supersedes"))
        if not supersedes:
            _require_whole(files)
    record = Record(store, shard, rows, tokens, files, index, allocation, supersedes, pairs)
    if record.encode() != data:
        raise ValueError("it is not written as kd writes records")
    return record


def _decode_file(item: Any, shard: int) -> FileRecord:
    said = _Fields(item, "array")
    spec = _decode_spec(item)
    file = FileRecord(spec, shard, said.number("bytes", 1 << 50), said.digest("xxh3_128"), said.digest("head"))
    if said.text("file") != file.file:
        raise ValueError(f"{spec.label} of shard {shard} is {file.file}, got {said.text('file')!r}")
    return file


def _decode_spec(item: Any) -> ArraySpec:
    said = _Fields(item, "array")
    shape = item.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError(f"'shape' must be a list of numbers, got {shape!r}")
    try:
        return ArraySpec.at(said.text("array"), tuple(shape), said.text("dtype"), said.text("encoding"))
    except KdError as error:
        raise ValueError(error.what) from None


def _require_whole(files: Sequence[FileRecord]) -> None:
    """ValueError unless a record names all arrays of an encoding or none: one alone cannot be read."""
    named = {file.spec.path for file in files}
    for file in files:
        for path in _parts(file.spec):
            if path not in named:
                raise ValueError(f"it names {file.spec.path} without {path}")


def _parts(spec: ArraySpec) -> tuple[str, ...]:
    """Paths of all arrays of an encoding that has several."""
    parts = ENCODINGS[spec.encoding].parts if spec.encoding in ENCODINGS else ()
    return tuple(map(spec.sibling, parts)) if len(parts) > 1 else ()


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

    def stored(self, signal: Signal) -> list[tuple[ArraySpec, ...]]:
        """The encodings that at least one shard holds of a signal (or the one that it names), the most exact first.

        Each as its arrays, the one that stands for the signal first.
        """
        found: dict[str, list[ArraySpec]] = {}
        for spec in self.specs.values():
            if spec.signal == signal.bare and signal.encoding in (None, spec.encoding):
                found.setdefault(spec.encoding, []).append(spec)
        order = [*ENCODINGS, RAW]
        return [
            tuple(sorted(found[encoding], key=lambda spec: spec.part)) for encoding in sorted(found, key=order.index)
        ]

    def choice(self, stored: Sequence[tuple[ArraySpec, ...]]) -> npt.NDArray[np.int8]:
        """int8 [num_shards] which of these encodings to read each shard in: the first it holds, -1 for none."""
        choice = np.full(self.num_shards, -1, dtype=np.int8)
        for number in reversed(range(len(stored))):
            held = np.logical_and.reduce([self.present(spec) for spec in stored[number]])
            choice[held] = number
        return choice

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


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking a hundred thousand new objects, none in a cycle, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Gone(Exception):
    """A record that was listed and is not there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Compacted:
    """The records of one compacted file, by name."""

    records: Mapping[str, Record]

    @cached_property
    def _by_shard(self) -> Mapping[int, Mapping[str, Record]]:
        shards: dict[int, dict[str, Record]] = defaultdict(dict)
        for name, record in self.records.items():
            shards[record.shard][name] = record
        return shards

    def of_shard(self, shard: int) -> Mapping[str, Record]:
        """Those of one shard, by name."""
        return self._by_shard.get(shard, {})


_Key = tuple[str, str, StoreLayout]
_read_files: OrderedDict[_Key, Compacted] = OrderedDict()
"""Compacted files that this process read last: a worker opens the store once a shard, and decodes them once."""
_FILES_KEPT = 16


def _recently_read(key: _Key) -> Compacted | None:
    return _read_files.get(key)


def _keep_read(key: _Key, compacted: Compacted) -> None:
    _read_files[key] = compacted
    while len(_read_files) > _FILES_KEPT:
        _read_files.popitem(last=False)


def _problem(name: str, what: str) -> Problem:
    match = RECORD_NAME.fullmatch(name)
    return Problem(int(match[1]) if match else None, "record", f"{COMMITS}/{name}", what)


class RecordReader:
    """Reads the records of a store; keeps those it has read, since a record never changes.

    Args:
        files: of the store.
        store: digest of identity and layout.
        layout: of the store.
        fresh: read compacted records from disk even if this process has read them before: to verify them.
    """

    def __init__(self, files: StoreFiles, store: str, layout: StoreLayout, *, fresh: bool = False) -> None:
        self._files, self._store, self._layout, self._fresh = files, store, layout, fresh
        self._known: dict[str, Record] = {}
        self._compacted: dict[str, Compacted] = {}

    def read(self, *, shard: int | None = None) -> tuple[list[Record], list[Problem]]:
        """All records (or those of one shard) and what is wrong with the rest."""
        names = self._files.list(COMMITS)
        while True:
            try:
                return self._read(names, shard)
            except _Gone as gone:
                # Compacted since it was listed; what is still listed after that is a damage like any other.
                names = self._files.list(COMMITS)
                if gone.name in names:
                    return self._read(names, shard, gone.name)

    def _read(self, names: Sequence[str], shard: int | None, lost: str = "") -> tuple[list[Record], list[Problem]]:
        prefix = "" if shard is None else f"{shard:08d}."
        if shard is None:
            # Those that were compacted since are read again from where they are now, and kept there.
            self._known = {name: self._known[name] for name in names if name in self._known}
            self._compacted = {name: self._compacted[name] for name in names if name in self._compacted}
        self._read_new([name for name in names if name.startswith(prefix)])
        found: dict[str, Record] = {}
        problems = []
        for name in names:
            try:
                if COMPACTED_NAME.fullmatch(name):
                    compacted = self.compacted(name)
                    found.update(compacted.records if shard is None else compacted.of_shard(shard))
                elif name.startswith(prefix):
                    found[name] = self._read_one(name)
            except FileNotFoundError as error:
                if name != lost:
                    raise _Gone(name) from None
                problems.append(_problem(name, str(error)))
            except (ValueError, VerificationError, OSError) as error:
                problems.append(_problem(name, error.what if isinstance(error, KdError) else str(error)))
        return [*found.values()], problems

    def _read_new(self, names: Sequence[str]) -> None:
        """Read what is new all at once, for a remote store answers many requests in the time of one."""
        new = [name for name in names if name not in self._known and RECORD_NAME.fullmatch(name)]
        found = self._files.read_many([f"{COMMITS}/{name}" for name in new], limit=MAX_RECORD_BYTES)
        for name, data in zip(new, found, strict=True):
            # What is wrong with one is said where that one is asked for.
            with contextlib.suppress(ValueError):
                if isinstance(data, bytes):
                    self._known[name] = decode_record(data, name=name, store=self._store, layout=self._layout)

    def _read_one(self, name: str) -> Record:
        record = self._known.get(name)
        if record is None:
            if RECORD_NAME.fullmatch(name) is None:
                raise ValueError("the name is not that of a record")
            data = self._files.read(f"{COMMITS}/{name}", limit=MAX_RECORD_BYTES)
            record = decode_record(data, name=name, store=self._store, layout=self._layout)
            self._known[name] = record
        return record

    def compacted(self, name: str) -> Compacted:
        """The records in one compacted file, all of them checked.

        Raises:
            ValueError: says what is wrong with it.
            FileNotFoundError: it is not there.
        """
        compacted = self._compacted.get(name)
        if compacted is None:
            key = (name, self._store, self._layout)
            compacted = None if self._fresh else _recently_read(key)
            if compacted is None:
                data = self._files.read(f"{COMMITS}/{name}", limit=SMALL_FILE_BYTES)
                with _no_collection():
                    compacted = Compacted(
                        {
                            item: decode_record(record, name=item, store=self._store, layout=self._layout)
                            for item, record in decode_compacted(data, name=name).items()
                        }
                    )
                _keep_read(key, compacted)
            self._compacted[name] = compacted
        return compacted

    def catalogue(self) -> Catalogue:
        """Everything committed; VerificationError where the records contradict each other."""
        records, problems = self.read()
        with _no_collection():
            catalogue, contradictions = build_catalogue(records)
        require_none([*problems, *contradictions], self._files.url)
        return catalogue


def stores_named(files: StoreFiles) -> dict[str, int]:
    """Digests of stores that sound records name, with how many do: what store.json must have, were it lost."""
    named: Counter[str] = Counter()
    for name in files.list(COMMITS):
        try:
            data = files.read(f"{COMMITS}/{name}", limit=SMALL_FILE_BYTES)
            contents = decode_compacted(data, name=name) if COMPACTED_NAME.fullmatch(name) else {name: data}
            for item, record in contents.items():
                match = RECORD_NAME.fullmatch(item)
                if match is not None and digest_of(record) == match[2]:
                    named[str(json.loads(record)["store"])] += 1
        except (ValueError, KeyError, TypeError, VerificationError, OSError, RecursionError):
            continue
    return dict(named)


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
    # Records share their specs, and comparing two objects costs as much as all else here.
    places: dict[int, tuple[ArraySpec, dict[int, FileRecord]]] = {}
    for record in records:
        if record.shard >= complete:
            continue
        allocation = allocations[record.shard]
        if record.index is not None and record is not allocation:
            continue
        if record.index is None and (record.allocation != digests[record.shard] or record.size != allocation.size):
            problems.append(
                Problem(record.shard, "record", record.file, "made for another allocation of rows to this shard")
            )
            continue
        kept.append(record)
    live = [*live_files(kept)]
    specs.update(_usual_specs(live))
    for record, file in live:
        place = places.get(id(file.spec))
        if place is None:
            path = file.spec.path
            place = places[id(file.spec)] = specs[path], files.setdefault(path, {})
        spec, others = place
        if file.spec is not spec and file.spec != spec:
            problems.append(
                Problem(
                    file.shard, spec.label, record.file,
                    f"stored as {_said(file.spec)} here and as {_said(spec)} in other shards",
                )
            )  # fmt: skip
        elif (other := others.setdefault(file.shard, file)) is not file and other != file:
            problems.append(Problem(file.shard, spec.label, record.file, "two records name different contents"))
    return Catalogue(allocations, files, specs, tuple(kept)), problems


def _usual_specs(live: Iterable[tuple[Record, FileRecord]]) -> dict[str, ArraySpec]:
    """Of each array, the spec that most records name, by path: one that was edited is then the one that differs."""
    counts: dict[int, list[Any]] = {}
    for _, file in live:
        counts.setdefault(id(file.spec), [file.spec, 0])[1] += 1
    alike: dict[ArraySpec, int] = {}
    for spec, count in counts.values():
        alike[spec] = alike.get(spec, 0) + count
    usual: dict[str, ArraySpec] = {}
    for spec in sorted(alike, key=lambda spec: -alike[spec]):
        usual.setdefault(spec.path, spec)
    return usual


def _said(spec: ArraySpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
