"""Damaged and missing commit records: found again where a digest proves them, without a teacher.

A record's digest stands in its name, and an allocation's in every other record of its shard. So whatever gives bytes
with that digest is the record: the damaged bytes with one bit turned back, or the record that the files on disk make.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import KdError
from ..ragged import Ragged
from .compacted import COMPACTED_NAME, digest_of
from .files import SMALL_FILE_BYTES
from .index import decode_index, encode_index
from .keys import row_keys
from .layout import COMMITS, GROUP_FILE, RECORD_NAME, index_file, parse_shard_file, shard_file
from .records import FileRecord, Record, RecordReader, build_catalogue, decode_record, hash_parts
from .register import read_views
from .repair import Outcome, sound_records, undo_flip
from .signal import ArraySpec
from .store import TeacherStore
from .verify import unrecorded_files
from .writer import shard_parts

_RECORD_NAME = re.compile(rb"[0-9]{8}\.[0-9a-f]{32}\.json")
_RECORD_BYTES = re.compile(rb'\{"a(?:llocation|rrays)":[^\n]{1,1048576}\}\n')
MAX_SUBSETS = 1 << 10
"""Combinations of files that are tried for one lost record."""


@dataclass(frozen=True)
class _Lost:
    """A record whose name is known and whose bytes are not."""

    name: str
    shard: int
    digest: str
    data: bytes

    def fits(self, data: bytes) -> bool:
        return digest_of(data) == self.digest


def repair_records(store: TeacherStore, outcome: Outcome) -> tuple[str, ...]:
    """Restore the records that can be proven; hold the lock.

    Returns:
        Damaged signal records that nothing proves: once they are removed, what they named is computed again.
    """
    orphans = []
    for lost in _lost_records(store, outcome):
        found = _recovered(store, lost)
        if found is not None:
            store.files.write(f"{COMMITS}/{lost.name}", [found])
            outcome.restore(lost.shard, "record", f"{COMMITS}/{lost.name}", "its digest proves what it said")
        else:
            orphans.append(lost.name)
    _restore_allocations(store, outcome)
    _remove_foreign(store, outcome)
    records = sound_records(store)
    allocated = {record.shard for record in records if record.index is not None}
    left = []
    for name in orphans:
        file, shard = f"{COMMITS}/{name}", int(name[:8])
        if not store.files.exists(file) or _is_sound(store, name):
            continue
        if shard in allocated:
            left.append(file)
        else:
            outcome.lose(file, "nothing on disk gives the rows it named; restore it, or the index and ids, from a copy")
    return tuple(left)


def _is_sound(store: TeacherStore, name: str) -> bool:
    records = sound_records(store)
    return any(record.file == f"{COMMITS}/{name}" for record in records)


def _lost_records(store: TeacherStore, outcome: Outcome) -> Iterator[_Lost]:
    """What stands damaged in `commits/`; a damaged file of many records gives those that are whole."""
    for problem in RecordReader(store.files, store.store_digest, store.layout, fresh=True).read()[1]:
        name = os.path.basename(problem.file)
        try:
            data = store.files.read(problem.file, limit=SMALL_FILE_BYTES)
        except (KdError, OSError):
            data = b""
        if COMPACTED_NAME.fullmatch(name):
            yield from _taken_apart(store, name, data, outcome)
        elif match := RECORD_NAME.fullmatch(name):
            yield _Lost(name, int(match[1]), match[2], data)
        else:
            # Nothing that kd writes has such a name. What it may have been is asked of the other records.
            store.files.remove(problem.file)
            outcome.remove(None, "record", problem.file, "the name is not that of a record")


def _taken_apart(store: TeacherStore, name: str, data: bytes, outcome: Outcome) -> list[_Lost]:
    """Write the sound records of a damaged compacted file one by one; those that are not sound are lost."""
    names = sorted({match.decode() for match in _RECORD_NAME.findall(data)})
    by_digest = {digest_of(match): match for match in _RECORD_BYTES.findall(data)}
    lost = []
    for item in names:
        match = RECORD_NAME.fullmatch(item)
        assert match is not None
        found = by_digest.pop(match[2], None)
        try:
            if found is None:
                raise ValueError("not among them")
            decode_record(found, name=item, store=store.store_digest, layout=store.layout)
        except ValueError:
            lost.append(_Lost(item, int(match[1]), match[2], b""))
        else:
            store.files.create(f"{COMMITS}/{item}", found)
    for digest, found in by_digest.items():
        # Its own name is what was damaged: a record that the layout, the store and its own form agree with.
        shard = re.search(rb'"shard":([0-9]{1,8}),', found)
        item = f"{int(shard[1]) if shard else 0:08d}.{digest}.json"
        try:
            decode_record(found, name=item, store=store.store_digest, layout=store.layout)
        except ValueError:
            continue
        if _files_agree(store, found):
            store.files.create(f"{COMMITS}/{item}", found)
            lost = [other for other in lost if other.shard != int(item[:8])]
    store.files.remove(f"{COMMITS}/{name}")
    outcome.restore(None, "record", f"{COMMITS}/{name}", f"its {len(names) - len(lost)} sound records stand alone now")
    return lost


def _files_agree(store: TeacherStore, data: bytes) -> bool:
    """Whether every file that a record names has the size and checksum it says."""
    try:
        named = json.loads(data)["arrays"]
        return all(_hashed(store, item["file"]) == (item["bytes"], item["xxh3_128"], item["head"]) for item in named)
    except (KdError, OSError, ValueError, KeyError, TypeError):
        return False


def _hashed(store: TeacherStore, name: str) -> tuple[int, str, str] | None:
    try:
        return hash_parts(store.files.blocks(name))
    except (KdError, OSError):
        return None


# --- by digest ---------------------------------------------------------------------------------------------------


def _recovered(store: TeacherStore, lost: _Lost) -> bytes | None:
    """The bytes of a lost record; None when nothing has its digest."""
    found = undo_flip(lost.data, lost.fits)
    if found is not None:
        return found
    for record in (allocation_on_disk(store, lost.shard), *_signal_records(store, lost)):
        if record is not None and record.digest == lost.digest:
            return record.encode()
    return None


def allocation_on_disk(store: TeacherStore, shard: int) -> Record | None:
    """The allocation record that index and ids of a shard make; None unless they belong together, byte for byte."""
    layout = store.layout
    try:
        data = store.files.read(index_file(shard))
        keys, lengths = decode_index(data)
        tokens = int(lengths.sum())
        pairs = int((lengths**2).sum()) if layout.pairs_per_shard else 0
        if not 1 <= len(keys) <= layout.rows_per_shard or tokens > layout.tokens_per_shard:
            return None
        if pairs > layout.pairs_per_shard:
            return None
        rows, files = [], []
        for spec in layout.input_specs:
            name = shard_file(spec.path, 0, shard)
            rows.append(read_entries(store, spec, name, tokens))
            files.append(FileRecord(spec, shard, *hash_parts(store.files.blocks(name))))
            if hash_parts(shard_parts(layout, spec, rows[-1])) != (files[-1].bytes, files[-1].xxh3_128, files[-1].head):
                return None
    except (KdError, OSError, ValueError, pa.ArrowException):
        return None
    encoded, index = encode_index(keys, lengths, pairs=bool(pairs))
    if encoded != data or (row_keys(*(Ragged.from_lengths(values, lengths) for values in rows)) != keys).any():
        return None
    return Record(store.store_digest, shard, len(keys), tokens, tuple(files), index=index, pairs=pairs)


def _signal_records(store: TeacherStore, lost: _Lost) -> Iterator[Record]:
    """Records that the files of a shard which no record names could make, in combinations."""
    records = sound_records(store)
    allocation = next((r for r in records if r.index is not None and r.shard == lost.shard), None)
    if allocation is None:
        return
    files = [
        FileRecord(spec, lost.shard, *hashed)
        for spec in unrecorded_specs(store, records).get(lost.shard, ())
        if (hashed := _hashed(store, store.layout.shard_file(spec, lost.shard))) is not None
    ]
    for chosen in itertools.islice(_subsets(files), MAX_SUBSETS):
        yield Record(
            store.store_digest,
            lost.shard,
            allocation.rows,
            allocation.tokens,
            tuple(sorted(chosen, key=lambda file: file.file)),
            allocation=allocation.digest,
            pairs=allocation.pairs,
        )


def _subsets(files: Sequence[FileRecord]) -> Iterator[tuple[FileRecord, ...]]:
    """Those that are not empty, the largest first."""
    for size in range(len(files), 0, -1):
        yield from itertools.combinations(files, size)


def unrecorded_specs(store: TeacherStore, records: Iterable[Record]) -> dict[int, tuple[ArraySpec, ...]]:
    """Per shard that is allocated, the arrays whose shard file is there and has no record."""
    records = [*records]
    catalogue, _ = build_catalogue(records)
    known = {path: spec for path, spec in catalogue.specs.items() if spec not in store.layout.input_specs}
    allocated = {record.shard for record in records if record.index is not None}
    found: dict[int, list[ArraySpec]] = {}
    for name in unrecorded_files(store, records):
        place = parse_shard_file(name)
        if place is None or place[1] not in allocated:
            continue
        path, shard = place
        if path not in known:
            try:
                known[path] = store.describes(path, json.loads(store.files.read(f"{path}/{GROUP_FILE}")))
            except (KdError, OSError, ValueError, KeyError, TypeError):
                continue
        spec = known[path]
        if spec not in store.layout.input_specs and store.layout.shard_file(spec, shard) == name:
            found.setdefault(shard, []).append(spec)
    return {shard: tuple(specs) for shard, specs in found.items()}


# --- allocations and foreign records -----------------------------------------------------------------------------


def _restore_allocations(store: TeacherStore, outcome: Outcome) -> None:
    records = sound_records(store)
    there: dict[int, set[str]] = {}
    named: dict[int, set[str]] = {}
    for record in records:
        if record.allocation is None:
            there.setdefault(record.shard, set()).add(record.digest)
        else:
            named.setdefault(record.shard, set()).add(record.allocation)
    views = read_views(store.files, store.store_digest)[0]
    known = {*(record.shard for record in records), *(shard for view in views for shard in view.shards)}
    for shard in range(1 + max(known, default=-1)):
        wanted = named.get(shard, set())
        # One that no other record of the shard knows may have been edited: is the right one on disk?
        if shard in there and (not wanted or wanted & there[shard]):
            continue
        found = allocation_on_disk(store, shard)
        # Without any other record of the shard, index and ids that agree in every row key are proof enough.
        if found is not None and (found.digest in wanted or not wanted):
            store.files.create(found.file, found.encode())
            outcome.restore(shard, "record", found.file, "rebuilt from the index and the token ids")
        elif shard not in there:
            outcome.lose(
                f"{COMMITS}/{shard:08d}",
                f"the allocation of shard {shard} is lost, and index and token ids on disk do not give it: "
                "restore its record, or both of those, from a copy",
            )


def _remove_foreign(store: TeacherStore, outcome: Outcome) -> None:
    """Take away records for another allocation, where others of the shard show which allocation is the right one."""
    records = sound_records(store)
    for shard in sorted({record.shard for record in records}):
        mine = [record for record in records if record.shard == shard]
        allocations = [record for record in mine if record.index is not None]
        named = {record.allocation for record in mine if record.index is None}
        confirmed = [record for record in allocations if record.digest in named]
        if len(confirmed) != 1 or (len(allocations) == 1 and named == {confirmed[0].digest}):
            continue
        for record in mine:
            if record not in confirmed and record.allocation != confirmed[0].digest:
                if store.files.exists(record.file):
                    store.files.remove(record.file)
                    outcome.remove(shard, "record", record.file, "made for another allocation of rows to this shard")
                else:
                    outcome.lose(record.file, "it stands among compacted records and is for another allocation")


# --- small things ------------------------------------------------------------------------------------------------


def read_entries(store: TeacherStore, spec: ArraySpec, name: str, entries: int) -> npt.NDArray[Any]:
    """The first entries of a shard file that lie one after another, whatever its checksum; ValueError if too short."""
    data = store.files.read(name, limit=store.layout.file_bytes(spec, entries))
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if len(data) < entries * dtype.itemsize:
        raise ValueError(f"{name} holds fewer than {entries} entries")
    return np.frombuffer(data, dtype=dtype, count=entries)
