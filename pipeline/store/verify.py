"""Verification: read everything, compare it with what the records say, and name what differs."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import KdError, RefusedError, VerificationError
from ..ragged import Ragged
from .files import LOCK_FILE, StoreFiles
from .index import read_index
from .keys import row_keys
from .layout import (
    CLAIMS,
    COMMITS,
    GROUP_FILE,
    SIDECARS,
    STORE_FILE,
    VIEWS,
    array_label,
    group_metadata,
    index_file,
    parse_shard_file,
)
from .reader import read_shard
from .records import FileRecord, Problem, Record, RecordReader, build_catalogue, hash_parts, live_files
from .register import lost_shards, read_views
from .sidecar import RECORD as SIDECAR_RECORD
from .sidecar import list_sidecars, read_record, verify_sidecar
from .signal import ArraySpec
from .store import TeacherStore, open_store, store_file_bytes


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        url: of the store.
        files: number of files read and compared.
        bytes: their size.
        problems: what is not as recorded; none when all is well.
        unrecorded: files that no record names: left by a killed process, or being written. They prove nothing and
            harm nothing; a rerun replaces them.
    """

    url: str
    files: int
    bytes: int
    problems: tuple[Problem, ...]
    unrecorded: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is as recorded."""
        return not self.problems

    def require_ok(self) -> None:
        """VerificationError listing the problems unless there are none."""
        if self.problems:
            more = [f"... and {len(self.problems) - 20} more"] if len(self.problems) > 20 else []
            raise VerificationError(
                f"store {self.url}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}",
                details=[*map(str, self.problems[:20]), *more],
                fix=f"kd store repair {self.url} --teacher TEACHER",
            )

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "url": self.url,
            "ok": self.ok,
            "files": self.files,
            "bytes": self.bytes,
            "problems": [vars(problem) for problem in self.problems],
            "unrecorded": [*self.unrecorded],
        }


def verify_store(
    url: str, *, shards: Collection[int] | None = None, map_shards: Callable[..., Iterable[Any]] = map
) -> VerifyReport:
    """Verify the store at `url`.

    Args:
        shards: whose files are read; None is all. Records, metadata and sidecars are always read.
        map_shards: how `verify_shard` is mapped over lists of its arguments; `map`, or an executor's.

    Raises:
        RefusedError: no store there.
        VerificationError: store.json itself is damaged.
    """
    store = open_store(url)
    # Before the records: a view that is entered meanwhile may be of shards that are added meanwhile.
    views, damaged = read_views(store.files, store.store_digest)
    reader = RecordReader(store.files, store.store_digest, store.layout, fresh=True)
    records, problems = reader.read()
    catalogue, contradictions = build_catalogue(records)
    problems += contradictions
    problems += lost_shards(views, 1 + max((record.shard for record in records), default=-1))
    problems += _verify_store_file(store)
    num_files, num_bytes = 1 + len(store.files.list(COMMITS)), 0
    chosen = sorted({record.shard for record in records if shards is None or record.shard in shards})
    run = uuid.uuid4().hex
    for found, files, size in map_shards(verify_shard, [url] * len(chosen), chosen, [run] * len(chosen)):
        problems += found
        num_files += files
        num_bytes += size
    problems += verify_arrays(store, catalogue.specs, catalogue.num_shards)
    problems += verify_groups(store, catalogue.specs.values())
    for name in list_sidecars(store.files):
        try:
            sidecar = read_record(store.files, store.store_digest, name)
        except (VerificationError, RefusedError) as error:
            problems.append(Problem(None, f"sidecar {name}", f"{SIDECARS}/{name}/{SIDECAR_RECORD}", error.what))
            continue
        problems += verify_sidecar(store.files, sidecar)
        num_files += 1 + len(sidecar.files)
        num_bytes += sum(size for size, _ in sidecar.files.values())
    problems += damaged
    num_files += len(views)
    unrecorded = unrecorded_files(store, records)
    problems = [_with_signals(problem, unrecorded) for problem in problems]
    named = {problem.file for problem in problems}
    return VerifyReport(
        store.url, num_files, num_bytes, tuple(problems), tuple(name for name in unrecorded if name not in named)
    )


def unrecorded_files(store: TeacherStore, records: Iterable[Record]) -> list[str]:
    """Files that neither a record nor the store's own layout names, sorted."""
    records = [*records]
    named = {f"{COMMITS}/{name}" for name in store.files.list(COMMITS)}
    named |= {file.file for record in records for file in record.files}
    named |= {index_file(record.shard) for record in records if record.index is not None}
    return sorted(
        name
        for name in store.files.walk()
        if name not in named
        and not name.startswith((f"{SIDECARS}/", f"{VIEWS}/", f"{CLAIMS}/"))
        and os.path.basename(name) not in (STORE_FILE, LOCK_FILE, GROUP_FILE)
    )


def _with_signals(problem: Problem, unrecorded: Sequence[str]) -> Problem:
    """A damaged record's problem with the signals that have no record now."""
    if problem.signal != "record" or problem.shard is None:
        return problem
    places = [found for name in unrecorded if (found := parse_shard_file(name)) is not None]
    lost = sorted(array_label(path) for path, shard in places if shard == problem.shard)
    if not lost:
        return problem
    return replace(problem, what=f"{problem.what}; without a record now: {', '.join(lost)}")


@lru_cache(maxsize=2)
def _opened(url: str, run: str) -> tuple[TeacherStore, Mapping[int, Sequence[Record]]]:
    """The store and its records by shard, read once per process and run."""
    store = open_store(url)
    records, _ = RecordReader(store.files, store.store_digest, store.layout).read()
    by_shard: dict[int, list[Record]] = {}
    for record in records:
        by_shard.setdefault(record.shard, []).append(record)
    return store, by_shard


def verify_shard(url: str, shard: int, run: str = "") -> tuple[list[Problem], int, int]:
    """(problems, files, bytes) of one shard: every checksum, the index against its columns, row keys against ids.

    Args:
        run: shards that are verified under the same name share what is read of the store; "" reads it again.
    """
    if run:
        store, by_shard = _opened(url, run)
        records = by_shard.get(shard, ())
    else:
        store = open_store(url)
        records, _ = RecordReader(store.files, store.store_digest, store.layout).read(shard=shard)
    problems: list[Problem] = []
    num_files, num_bytes = 0, 0
    for record in records:
        if record.index is not None:
            num_files, num_bytes = num_files + 1, num_bytes + record.index.bytes
            problems += _verify_rows(store, record)
    for record, file in live_files(records):
        num_files, num_bytes = num_files + 1, num_bytes + file.bytes
        if record.index is None and (what := compare_file(store.files, file)) is not None:
            problems.append(Problem(shard, file.spec.label, file.file, what))
    return problems, num_files, num_bytes


def compare_file(files: StoreFiles, file: FileRecord) -> str | None:
    """What is wrong with a shard file, in one pass over it; None when it is as recorded."""
    try:
        size = files.size(file.file)
        if size != file.bytes:
            return f"it has {size} bytes, its record says {file.bytes}"
        found = hash_parts(files.blocks(file.file))
    except FileNotFoundError:
        return "it is missing"
    except VerificationError as error:
        return error.what
    if found == (file.bytes, file.xxh3_128, file.head):
        return None
    return "its bytes do not have the recorded checksum"


def _verify_rows(store: TeacherStore, record: Record) -> list[Problem]:
    """Index and ids of a shard against its record, and the row keys in the one against the other."""
    problems = []
    try:
        keys, lengths = read_index(store.files, record, fresh=True)
    except VerificationError as error:
        problems.append(Problem(record.shard, "index", index_file(record.shard), error.what))
    rows = []
    for spec in store.layout.input_specs:
        (file,) = (file for file in record.files if file.spec == spec)
        try:
            rows.append(_read_ids(store, file, record.tokens))
        except VerificationError as error:
            problems.append(Problem(record.shard, spec.label, file.file, error.what))
    if problems:
        return problems
    differ = (row_keys(*(Ragged.from_lengths(values, lengths) for values in rows)) != keys).any(axis=1)
    if not differ.any():
        return []
    what = f"token ids and row keys do not belong together, in {int(differ.sum())} of {len(keys)} rows"
    return [Problem(record.shard, "token_ids", record.file, what)]


def _read_ids(store: TeacherStore, file: FileRecord, entries: int) -> npt.NDArray[Any]:
    """The entries of a whole shard file, compared with its record while they are in memory."""
    try:
        size = store.files.size(file.file)
        if size != file.bytes:
            raise VerificationError(f"it has {size} bytes, its record says {file.bytes}")
        data = store.files.read(file.file, limit=file.bytes)
    except FileNotFoundError:
        raise VerificationError("it is missing") from None
    if hash_parts([data]) != (file.bytes, file.xxh3_128, file.head):
        raise VerificationError("its bytes do not have the recorded checksum")
    if file.bytes != store.layout.file_bytes(file.spec, entries):
        return read_shard(store.files, store.layout, file, entries)
    return np.frombuffer(data, dtype=np.dtype(file.spec.dtype).newbyteorder("<"), count=entries)


def _verify_store_file(store: TeacherStore) -> list[Problem]:
    """store.json says what it should, or it would not have been opened; here, that nothing stands beside that."""
    if store.files.read(STORE_FILE) == store_file_bytes(store.identity, store.layout):
        return []
    return [Problem(None, None, STORE_FILE, "it is not written as kd writes it: it was edited or damaged")]


def verify_arrays(store: TeacherStore, specs: Mapping[str, ArraySpec], num_shards: int) -> list[Problem]:
    """zarr.json of every array: what other software would read with."""
    problems = []
    for path in sorted({*specs, *store.array_paths()}):
        name = f"{path}/{GROUP_FILE}"
        try:
            found = json.loads(store.files.read(name))
            spec = specs.get(path) or store.describes(path, found)
            declared = found["shape"][0]
            wanted = store.layout.array_metadata(spec, num_shards)
            wanted["shape"][0] = max(declared, wanted["shape"][0])
            if found == wanted and declared % store.layout.capacity(spec.axis) == 0:
                continue
            what = "it does not describe the array as kd declared it"
        except FileNotFoundError:
            if path not in specs:
                continue
            what = "it is missing"
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, KdError) as error:
            what = f"it does not describe an array: {error.what if isinstance(error, KdError) else error}"
        problems.append(Problem(None, array_label(path), name, what))
    return problems


def verify_groups(store: TeacherStore, specs: Iterable[ArraySpec]) -> list[Problem]:
    """zarr.json of the groups; attributes are anybody's."""
    problems = []
    for folder in sorted({"", *(os.path.dirname(spec.path) for spec in specs)}):
        name = f"{folder}/{GROUP_FILE}" if folder else GROUP_FILE
        try:
            found = json.loads(store.files.read(name))
            if {**found, "attributes": {}} == group_metadata():
                continue
            what = "it does not describe a group"
        except FileNotFoundError:
            what = "it is missing"
        except (ValueError, TypeError, RecursionError, VerificationError) as error:
            what = f"it does not describe a group: {error}"
        problems.append(Problem(None, folder or None, name, what))
    return problems
