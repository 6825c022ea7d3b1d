"""Compaction: many small records become few Parquet files, and not one is without a file at any moment.

The new file is written whole, fsynced and read back; only then the files go whose records it holds. A record that
stands in two files is one record, so a process killed in between leaves nothing to repair.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .compacted import COMPACTED_NAME, MAX_RECORD_SUM, MAX_RECORDS, compacted_file, decode_compacted, encode_compacted
from .files import StoreFiles
from .layout import COMMITS, RECORD_NAME
from .records import Problem, RecordReader

LOOSE_RECORDS = 512
"""Records in files of their own, above which a store compacts them by itself."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did.

    Attributes:
        records: in the files it wrote.
        written: files it wrote, inside the store.
        removed: files that held the same records before, or records that were to be dropped.
        problems: records that cannot be read; they stay where they are.
    """

    records: int = 0
    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"records": self.records, "files_before": len(self.removed), "files_after": len(self.written)}


def count_loose(files: StoreFiles) -> int:
    """Records that have a file of their own."""
    return sum(RECORD_NAME.fullmatch(name) is not None for name in files.list(COMMITS))


def compact_records(files: StoreFiles, reader: RecordReader, *, drop: Collection[str] = ()) -> Compaction:
    """Put all loose records, and those of compacted files that are not full, into compacted files. Hold the lock.

    Args:
        reader: of these files.
        drop: names of records that end: they go into no file, and from those where they are.
    """
    names = files.list(COMMITS)
    records, problems = reader.read()
    damaged = {problem.file for problem in problems}
    readable = [name for name in names if f"{COMMITS}/{name}" not in damaged]
    loose = {name for name in readable if RECORD_NAME.fullmatch(name)}
    whole = {name: reader.compacted(name).records.keys() for name in readable if COMPACTED_NAME.fullmatch(name)}
    sizes = {name: files.size(f"{COMMITS}/{name}") for name in whole}
    ended = set(drop)
    merged = {
        name
        for name, inside in whole.items()
        if (2 * sizes[name] < MAX_RECORD_SUM and 2 * len(inside) < MAX_RECORDS) or inside & ended
    }
    if not loose and len(merged) <= 1 and not any(whole[name] & ended for name in merged):
        return Compaction(problems=tuple(problems))
    taken = loose.union(*(whole[name] for name in merged)) - ended
    contents = {name: record.encode() for record in records if (name := record.file.rpartition("/")[2]) in taken}
    written = []
    for part in _parts(contents):
        data = encode_compacted(part)
        file = compacted_file(data)
        files.create(file, data)
        back = decode_compacted(files.read(file), name=file.rpartition("/")[2])
        assert back == part, f"{file} does not hold what was written into it"
        written.append(file)
    removed = sorted({f"{COMMITS}/{name}" for name in loose | merged} - {*written})
    files.remove(*removed)
    return Compaction(len(contents), tuple(written), tuple(removed), tuple(problems))


def _parts(contents: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    """The records in order of their names, in parts that each fit into one file."""
    part: dict[str, bytes] = {}
    size = 0
    for name in sorted(contents):
        length = len(contents[name])
        if part and (len(part) == MAX_RECORDS or size + length > MAX_RECORD_SUM):
            yield part
            part, size = {}, 0
        part[name] = contents[name]
        size += length
    if part:
        yield part
