"""Verification: read everything, compare it with what the records say, and name what differs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from ..errors import VerificationError
from .files import LOCK_FILE, StoreFiles
from .index import read_index
from .layout import GROUP_FILE, SIDECARS, STORE_FILE, group_metadata, index_file
from .records import FileRecord, Problem, Record, RecordReader, build_catalogue
from .sidecar import list_sidecars, read_record, verify_sidecar
from .signal import ArraySpec
from .store import TeacherStore, open_store


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
                fix="restore the named files from a copy, or delete the named records and run kd cache-teacher again",
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


def verify_store(url: str, *, map_shards: Callable[..., Iterable[Any]] = map) -> VerifyReport:
    """Verify the store at `url`.

    Args:
        map_shards: how `verify_shard` is mapped over (url, shard); `map`, or an executor's.

    Raises:
        RefusedError: no store there.
        VerificationError: store.json itself is damaged.
    """
    store = open_store(url)
    reader = RecordReader(store.files, store.store_digest, store.layout)
    records, problems = reader.read()
    catalogue, contradictions = build_catalogue(records)
    problems += contradictions
    num_files, num_bytes = 1 + len(records), 0
    shards = sorted({record.shard for record in records})
    for found, files, size in map_shards(verify_shard, [url] * len(shards), shards):
        problems += found
        num_files += files
        num_bytes += size
    problems += _verify_arrays(store, catalogue.specs.values(), catalogue.num_shards)
    problems += _verify_groups(store, catalogue.specs.values())
    for name in list_sidecars(store.files):
        try:
            sidecar = read_record(store.files, store.store_digest, name)
        except VerificationError as error:
            problems.append(Problem(None, f"sidecar {name}", f"sidecars/{name}/record.json", error.what))
            continue
        problems += verify_sidecar(store.files, sidecar)
        num_files += 1 + len(sidecar.files)
        num_bytes += sum(size for size, _ in sidecar.files.values())
    named = {record.file for record in records} | {problem.file for problem in problems}
    named |= {file.file for record in records for file in record.files}
    named |= {index_file(record.shard) for record in catalogue.allocations}
    unrecorded = sorted(
        name
        for name in store.files.walk()
        if name not in named
        and not name.startswith(f"{SIDECARS}/")
        and os.path.basename(name) not in (STORE_FILE, LOCK_FILE, GROUP_FILE)
    )
    return VerifyReport(store.url, num_files, num_bytes, tuple(problems), tuple(unrecorded))


def verify_shard(url: str, shard: int) -> tuple[list[Problem], int, int]:
    """(problems, files, bytes) of one shard: every checksum, the index against its columns, row keys against ids."""
    store = open_store(url)
    records, _ = RecordReader(store.files, store.store_digest, store.layout).read(shard=shard)
    problems: list[Problem] = []
    num_files, num_bytes = 0, 0
    for record in records:
        intact = True
        if record.index is not None:
            num_files, num_bytes = num_files + 1, num_bytes + record.index.bytes
            try:
                read_index(store.files, record)
            except VerificationError as error:
                intact = False
                problems.append(Problem(shard, "index", index_file(shard), error.what))
        for file in record.files:
            num_files, num_bytes = num_files + 1, num_bytes + file.bytes
            what = _compare_file(store.files, file)
            if what is not None:
                intact = False
                problems.append(Problem(shard, str(file.spec.signal), file.file, what))
        if record.index is not None and intact:
            problems += _verify_keys(store, record)
    return problems, num_files, num_bytes


def _compare_file(files: StoreFiles, file: FileRecord) -> str | None:
    try:
        size = files.size(file.file)
        if size != file.bytes:
            return f"it has {size} bytes, its record says {file.bytes}"
        digest = xxhash.xxh3_128()
        for block in files.blocks(file.file):
            digest.update(block)
    except FileNotFoundError:
        return "it is missing"
    except VerificationError as error:
        return error.what
    return None if digest.hexdigest() == file.xxh3_128 else "its bytes do not have the recorded checksum"


def _verify_keys(store: TeacherStore, record: Record) -> list[Problem]:
    try:
        store.read_tokens(record.shard)
    except VerificationError as error:
        return [Problem(record.shard, "token_ids", record.file, error.what)]
    return []


def _verify_arrays(store: TeacherStore, specs: Iterable[ArraySpec], num_shards: int) -> list[Problem]:
    """zarr.json of every array with a committed shard: what other software would read with."""
    problems = []
    for spec in specs:
        name = f"{spec.path}/{GROUP_FILE}"
        try:
            found = json.loads(store.files.read(name))
            declared = found["shape"][0]
            wanted = store.layout.array_metadata(spec, num_shards)
            wanted["shape"][0] = max(declared, wanted["shape"][0])
            if found == wanted and declared % store.layout.capacity(spec.axis) == 0:
                continue
            what = "it does not describe the array as kd declared it"
        except FileNotFoundError:
            what = "it is missing"
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, VerificationError) as error:
            what = f"it does not describe an array: {error}"
        problems.append(Problem(None, str(spec.signal), name, what))
    return problems


def _verify_groups(store: TeacherStore, specs: Iterable[ArraySpec]) -> list[Problem]:
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
