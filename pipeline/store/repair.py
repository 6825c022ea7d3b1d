"""Repair: what is damaged is made again, what is not is left alone, and what cannot be proven is said to be lost.

Nothing here runs a teacher. Records come from the files they named, ids and index from each other, Zarr's metadata from
the layout; each only where a checksum or digest shows that it is what was there. Shard files of signals are replaced by
what somebody computed again, if that has the recorded checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..errors import KdError
from .layout import GROUP_FILE, array_label, group_metadata, metadata_bytes
from .records import FileRecord, Record, RecordReader, build_catalogue, live_files
from .register import is_view, read_views

if TYPE_CHECKING:
    from .store import TeacherStore
    from .writer import ShardWriter

MAX_FLIP_BYTES = 1 << 14
"""Every bit of a file up to this size is turned to see whether that was the damage: a second's work."""


@dataclass(frozen=True)
class Mended:
    """One file that a repair wrote or took away.

    Attributes:
        shard: which, None where it concerns the whole store.
        signal: which ("record", "index" and sidecars included), None where it concerns no single one.
        file: path inside the store.
        how: what was done, and by what right.
    """

    shard: int | None
    signal: str | None
    file: str
    how: str


@dataclass
class Outcome:
    """What a repair did so far.

    Attributes:
        restored: files that are what they were.
        removed: files that stood where nothing of this store belongs.
        lost: file → why it could not be restored, and what would restore it.
    """

    restored: list[Mended] = field(default_factory=list)
    removed: list[Mended] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)

    def restore(self, shard: int | None, signal: str | None, file: str, how: str) -> None:
        """Note a file that is what it was."""
        self.restored.append(Mended(shard, signal, file, how))

    def remove(self, shard: int | None, signal: str | None, file: str, why: str) -> None:
        """Note a file that was taken away."""
        self.removed.append(Mended(shard, signal, file, why))

    def lose(self, file: str, why: str) -> None:
        """Note a file that could not be restored."""
        self.lost[file] = why


def undo_flip(data: bytes, fits: Callable[[bytes], bool]) -> bytes | None:
    """`data` with the one bit turned back that makes it fit; None when no single bit does, or it is large."""
    if len(data) > MAX_FLIP_BYTES:
        return None
    tried = bytearray(data)
    for place in range(len(tried)):
        for bit in range(8):
            tried[place] ^= 1 << bit
            if fits(bytes(tried)):
                return bytes(tried)
            tried[place] ^= 1 << bit
    return None


def sound_records(store: TeacherStore) -> list[Record]:
    """The records that are what their names say, read from disk now."""
    return RecordReader(store.files, store.store_digest, store.layout, fresh=True).read()[0]


def damaged_files(store: TeacherStore, records: Iterable[Record]) -> dict[int, tuple[FileRecord, ...]]:
    """Per shard, the files of signals that are not what their records say."""
    from .verify import compare_file

    found: dict[int, list[FileRecord]] = {}
    for record, file in live_files(records):
        if record.index is None and compare_file(store.files, file) is not None:
            found.setdefault(file.shard, []).append(file)
    return {shard: tuple(files) for shard, files in found.items()}


def has_sound_rows(store: TeacherStore, shard: int) -> bool:
    """Whether the teacher can read the rows of a shard again."""
    try:
        store.read_tokens(shard)
    except KdError:
        return False
    return True


def repair_metadata(store: TeacherStore, records: Iterable[Record], outcome: Outcome) -> None:
    """Write each zarr.json that does not describe what the records say; hold the lock."""
    from .verify import verify_arrays, verify_groups

    catalogue, _ = build_catalogue(records)
    specs = {spec.path: spec for spec in store.layout.input_specs} | dict(catalogue.specs)
    arrays = verify_arrays(store, specs, catalogue.num_shards)
    damaged = {os.path.dirname(problem.file) for problem in arrays}
    # All arrays are declared equally long, at least as long as the shards there are.
    declared = [_declared(store, path) for path in store.array_paths() if path not in damaged]
    num_shards = max([catalogue.num_shards, *declared])
    for path in sorted(damaged):
        name = f"{path}/{GROUP_FILE}"
        if path in specs:
            store.files.write(name, [metadata_bytes(store.layout.array_metadata(specs[path], num_shards))])
            outcome.restore(None, array_label(path), name, "written from the layout and the records")
        else:
            # Nothing was captured for it, so nothing is known of it; the next capture declares it anew.
            store.files.remove(name)
            outcome.remove(None, array_label(path), name, "it described an array without a single shard, wrongly")
    for problem in verify_groups(store, specs.values()):
        store.files.write(problem.file, [metadata_bytes(group_metadata())])
        outcome.restore(None, problem.signal, problem.file, "a group has no content of its own")


def repair_views(store: TeacherStore, outcome: Outcome) -> None:
    """Restore damaged entries of the register of views, each of which holds its own digest; hold the lock."""
    for problem in read_views(store.files, store.store_digest)[1]:
        name = os.path.basename(problem.file)
        try:
            data = store.files.read(problem.file)
        except (KdError, OSError):
            data = b""
        found = undo_flip(data, partial(is_view, name=name, store=store.store_digest))
        if found is None:
            outcome.lose(
                problem.file,
                "run the kd cache-teacher command of that view again, which enters it anew; or delete the file, and "
                "kd store gc takes the view for gone",
            )
        else:
            store.files.write(problem.file, [found])
            outcome.restore(None, problem.signal, problem.file, "it has the digest that it names")


def _declared(store: TeacherStore, path: str) -> int:
    """For how many shards the array at `path` is declared; 0 where none is."""
    try:
        metadata = json.loads(store.files.read(f"{path}/{GROUP_FILE}"))
        return int(metadata["shape"][0]) // store.layout.capacity(store.describes(path, metadata).axis)
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Replaced:
    """What became of the shard files that were computed again.

    Attributes:
        restored: those that have the recorded checksum; they are in their places.
        corrected: those that stood in their places all the time, while a record said otherwise; one supersedes it now.
        accepted: those that have another one, and were committed by a record of their own.
        refused: those that have another one, and were not.
    """

    restored: tuple[FileRecord, ...]
    corrected: tuple[FileRecord, ...]
    accepted: tuple[FileRecord, ...]
    refused: tuple[FileRecord, ...]


def replace_files(
    store: TeacherStore, writer: ShardWriter, damaged: Iterable[str], *, accept_recomputed: bool = False
) -> Replaced:
    """Put shard files that were computed again in the place of damaged ones.

    Args:
        writer: holds all rows of the shard.
        damaged: paths of arrays whose file is to be replaced; each has a record.
        accept_recomputed: commit a file that differs from its record, by a record that supersedes that one for this
            array. The record comes first: killed before the file follows, the shard counts as damaged as before.
    """
    from .verify import compare_file

    wanted = {*damaged}
    restored, corrected, accepted, refused = [], [], [], []
    for file, parts in writer.encoded():
        if file.spec.path not in wanted:
            continue
        with store.files.lock():
            recorded = _recorded(store, file)
            wrong = [record for named, record in recorded.items() if named != file]
            stands = compare_file(store.files, file) is None
            if file not in recorded and not stands and not accept_recomputed:
                refused.append(file)
                continue
            if wrong:
                _supersede(store, file, wrong)
            if not stands:
                store.files.write(file.file, parts)
            if not wrong:
                restored.append(file)
            elif stands or file in recorded:
                # The teacher and what stands there, or another record, agree: no more can be asked of a record.
                corrected.append(file)
            else:
                accepted.append(file)
    return Replaced(tuple(restored), tuple(corrected), tuple(accepted), tuple(refused))


def _recorded(store: TeacherStore, file: FileRecord) -> Mapping[FileRecord, Record]:
    """What records say now about the array and shard of `file`, with the record that says it."""
    return {
        named: record
        for record, named in live_files(store.shard_records(file.shard))
        if named.spec.path == file.spec.path
    }


def _supersede(store: TeacherStore, file: FileRecord, wrong: Sequence[Record]) -> None:
    first = wrong[0]
    record = Record(
        first.store,
        first.shard,
        first.rows,
        first.tokens,
        (file,),
        allocation=first.allocation,
        supersedes=tuple(record.digest for record in wrong),
        pairs=first.pairs,
    )
    store.files.create(record.file, record.encode())
