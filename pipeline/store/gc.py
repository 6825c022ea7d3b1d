"""Garbage collection: what no standing view needs, and what killed processes left, goes; all else stays.

Rows (token ids and index) are for good. A shard's signals go in an order that a kill at any moment leaves sound: a
record of what stays, then the records it replaces, then the files that no record names any more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import kd_version, open_artifact
from ..errors import RefusedError, VerificationError
from .compact import compact_records
from .files import STAGING
from .layout import INDEX, array_label, index_file, parse_shard_file
from .records import Catalogue, FileRecord, Problem, Record, RecordReader, build_catalogue, live_files, require_none
from .register import RegisteredView, enter_view, lost_shards, place_of, read_views, to_ranges
from .repair_records import allocation_on_disk
from .signal import ARRAY_NAMES, Signal
from .store import TeacherStore
from .verify import unrecorded_files
from .view import read_rows

_INDEX_FILE = re.compile(rf"{INDEX}/[0-9]{{8}}\.parquet")


@dataclass(frozen=True)
class Garbage:
    """What no standing view needs.

    Attributes:
        kept: folders of the views that stand.
        gone: views whose folders are not there any more, by fingerprint: the place that was entered last.
        files: shard files of signals that go.
        leftovers: (name, bytes) of files that a killed process left and no record names.
        unrecorded: shard files without a record of signals that a standing view needs; they stay: the next capture or
            repair replaces them.
        foreign: files that kd did not write; they stay.
    """

    kept: tuple[str, ...] = ()
    gone: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    leftovers: tuple[tuple[str, int], ...] = ()
    unrecorded: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all that goes."""
        return sum(file.bytes for file in self.files) + sum(size for _, size in self.leftovers)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        signals: dict[str, Any] = {}
        for label in sorted({array_label(file.spec.path) for file in self.files}):
            mine = [file for file in self.files if array_label(file.spec.path) == label]
            signals[label] = {
                "shards": to_ranges(sorted({file.shard for file in mine})),
                "bytes": sum(file.bytes for file in mine),
            }
        return {
            "bytes": self.bytes,
            "files": len(self.files) + len(self.leftovers),
            "signals": signals,
            "leftovers": [name for name, _ in self.leftovers],
            "unrecorded": [*self.unrecorded],
            "foreign": [*self.foreign],
            "views_kept": [*self.kept],
            "views_gone": [*self.gone.values()],
        }


def collect_garbage(
    store: TeacherStore, *, keep_views: Sequence[str | os.PathLike[str]] = (), delete: bool = False
) -> Garbage:
    """Find what no standing view of a store needs, and take it away if asked to.

    Processes that have a file mapped keep what they map. Captures go on: each entered its view first.

    Args:
        keep_views: folders of views that the register does not know, or knows elsewhere. They are entered into it.
        delete: whether to take it away.

    Raises:
        RefusedError: a folder of `keep_views` is no view of this store; or everything would go.
        VerificationError: the records or the register are damaged.
    """
    kept = [_view_at(store, folder) for folder in keep_views]
    files = store.files
    with files.lock():
        reader = RecordReader(files, store.store_digest, store.layout)
        records, problems = reader.read()
        catalogue, contradictions = build_catalogue(records)
        views, damaged = read_views(files, store.store_digest)
        problems += [*contradictions, *damaged, *lost_shards(views, catalogue.num_shards)]
        require_none([*problems, *_lost_rows(store, catalogue)], store.url)
        for view in kept:
            if max(view.shards, default=-1) >= catalogue.num_shards:
                raise RefusedError(
                    f"view {view.places[0][0]} has rows in shard {max(view.shards)}, and store {store.url} has "
                    f"{catalogue.num_shards} shards",
                    fix="give views of this store, not of one that began as its copy",
                )
        garbage = _find(store, catalogue, [*views, *kept])
        if not delete:
            return garbage
        if garbage.files and not garbage.kept:
            raise RefusedError(
                f"no view of store {store.url} is left: all its signals would go, {garbage.bytes} bytes",
                details=[f"gone: {place}" for place in garbage.gone.values()] or ["no view was ever entered"],
                fix="name a view that is elsewhere with --keep-view; or delete the store's folder yourself",
            )
        # First what needs no room: the disk may be full, and that be why.
        files.remove(*(name for name, _ in garbage.leftovers))
        for view in kept:
            enter_view(files, store.store_digest, view)
        _drop(store, reader, catalogue, garbage.files)
        files.remove(*(f"views/{fingerprint}.json" for fingerprint in garbage.gone))
        files.sweep()
    return garbage


def _view_at(store: TeacherStore, folder: str | os.PathLike[str]) -> RegisteredView:
    artifact = open_artifact(Path(folder), kind="view")
    content = artifact.content
    if content.get("store_digest") != store.store_digest:
        raise RefusedError(
            f"view {folder} was not made of store {store.url}",
            details=[f"it was made of the store at {content.get('store')}, relative to its folder"],
            fix="give views of this store, or leave --keep-view out",
        )
    try:
        signals = tuple(str(Signal.parse(signal)) for signal in content["signals"])
        corpus = content["corpus"]
        name, print_ = str(corpus.get("name", "")), str(corpus.get("fingerprint", ""))
        rows = read_rows(Path(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"the manifest of view {folder} is damaged: {error!r}") from None
    shards = tuple(np.unique(rows // store.layout.rows_per_shard).tolist())
    return RegisteredView(
        artifact.fingerprint, (place_of(store.files, folder),), {"name": name, "fingerprint": print_}, signals,
        len(rows), shards, kd_version(),
    )  # fmt: skip


def _find(store: TeacherStore, catalogue: Catalogue, views: Iterable[RegisteredView]) -> Garbage:
    needed: dict[tuple[str, int | None], npt.NDArray[np.bool_]] = {}
    standing: dict[str, str] = {}
    gone: dict[str, str] = {}
    for view in views:
        place = view.found(store.files)
        if place is None:
            gone[view.fingerprint] = view.places[0][0]
            continue
        standing[view.fingerprint] = place
        shards = [shard for shard in view.shards if shard < catalogue.num_shards]
        for text in view.signals:
            signal = Signal.parse(text)
            # Whatever encoding the view was made with: its students may read another.
            mask = needed.setdefault((signal.name, signal.layer), np.zeros(catalogue.num_shards, dtype=bool))
            mask[shards] = True
    inputs = {spec.path for spec in store.layout.input_specs}
    nobody = np.zeros(catalogue.num_shards, dtype=bool)
    unneeded = []
    for path in sorted(catalogue.files.keys() - inputs):
        signal = catalogue.specs[path].signal
        mask = needed.get((signal.name, signal.layer), nobody)
        unneeded += [file for shard, file in sorted(catalogue.files[path].items()) if not mask[shard]]
    ours, unrecorded, foreign = [], [], []
    for name in unrecorded_files(store, catalogue.records):
        if name.startswith(f"{STAGING}/"):
            continue  # may belong to a living process; swept by what no one holds
        array = parse_shard_file(name)
        if array is not None and _needs(needed, *array):
            unrecorded.append(name)
        elif array is not None or _INDEX_FILE.fullmatch(name):
            ours.append((name, store.files.size(name)))
        else:
            foreign.append(name)
    return Garbage(
        tuple(standing.values()),
        {print_: place for print_, place in gone.items() if print_ not in standing},
        tuple(unneeded),
        tuple(ours),
        tuple(unrecorded),
        tuple(foreign),
    )


def _needs(needed: Mapping[tuple[str, int | None], npt.NDArray[np.bool_]], path: str, shard: int) -> bool:
    """Whether a standing view needs the signal of an array in a shard."""
    name, _, layer = path.partition("/")
    signal = ARRAY_NAMES[name][0] if name in ARRAY_NAMES else name
    mask = needed.get((signal, int(layer) if layer else None))
    return mask is not None and shard < len(mask) and bool(mask[shard])


def _lost_rows(store: TeacherStore, catalogue: Catalogue) -> list[Problem]:
    """Rows on disk that are whole and have no record: it was lost, or a process was killed just before it wrote it."""
    what = "no record names its rows, which are whole"
    shards = [int(name[:8]) for name in store.files.list(INDEX) if _INDEX_FILE.fullmatch(f"{INDEX}/{name}")]
    return [
        Problem(shard, "record", index_file(shard), what)
        for shard in shards
        if shard >= catalogue.num_shards and allocation_on_disk(store, shard) is not None
    ]


def _drop(store: TeacherStore, reader: RecordReader, catalogue: Catalogue, files: Sequence[FileRecord]) -> None:
    """Take shard files away: a record of what stays first, the files themselves last. Hold the lock."""
    going: dict[int, set[str]] = {}
    for file in files:
        going.setdefault(file.shard, set()).add(file.spec.path)
    by_shard: dict[int, list[Record]] = {shard: [] for shard in going}
    for record in catalogue.records:
        if record.shard in by_shard and record.index is None:
            by_shard[record.shard].append(record)
    ended: list[Record] = []
    for shard, records in by_shard.items():
        replaced, new = _replacement(records, going[shard])
        if new is not None:
            store.files.create(new.file, new.encode())
        ended += replaced
    while ended:
        # A record that supersedes another goes after it: alone, the other would hold again.
        names = {record.digest for record in ended}
        first = [record for record in ended if not names.intersection(record.supersedes)] or ended
        compact_records(store.files, reader, drop={record.file.rpartition("/")[2] for record in first})
        ended = [record for record in ended if record not in first]
    store.files.remove(*(file.file for file in files))


def _replacement(records: Sequence[Record], going: set[str]) -> tuple[list[Record], Record | None]:
    """The records of a shard that end, and the one that says what stays of them; None when nothing does."""
    related = {digest for record in records for digest in record.supersedes}
    ended = [
        record
        for record in records
        if any(file.spec.path in going for file in record.files)
        # Those that supersede one another are only right together.
        or (related and (record.supersedes or record.digest in related))
    ]
    live = {file.spec.path: file for record, file in live_files(records) if record in ended}
    stays = tuple(file for path, file in sorted(live.items()) if path not in going)
    if not stays:
        return ended, None
    old = ended[0]
    return ended, Record(
        old.store, old.shard, old.rows, old.tokens, stays, allocation=old.allocation, pairs=old.pairs,
        supersedes=tuple(sorted(record.digest for record in ended)) if related else (),
    )  # fmt: skip
