"""Merging: rows and signals of stores that were written elsewhere, copied into one store. No teacher runs.

A shard of which the target knows no row is copied as it is, its files byte for byte under a new shard number. Rows of
the others that are new are packed into shards of their own, and signals that the target lacks are put together row by
row. What is copied is compared with its checksum first. Killed anywhere and run again, a merge does the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError, VerificationError
from ..ragged import IntArray, Ragged, ranges
from . import sidecar
from .files import Buffer
from .index import read_index
from .keys import Keys, match_keys
from .layout import StoreLayout
from .reader import read_shard
from .records import FileRecord, hash_parts, require_none
from .register import lost_shards, read_views, to_ranges
from .signal import ArraySpec
from .store import TeacherStore
from .verify import compare_file, verify_shard
from .writer import commit_files, shard_parts

TOKENS_AT_ONCE = 1 << 24
"""Token ids that are held in memory while rows are copied."""


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        rows_new: rows that the target did not know, by source.
        rows_known: rows that it did.
        shards_copied: shards of which the target knew no row; copied as they were.
        shards_packed: shards of new rows from shards of which it knew some.
        files_copied: shard files of signals copied byte for byte.
        files_packed: shard files of signals put together row by row.
        bytes_written: of signals.
        incomplete: shards without a signal that others have, as ranges, by array.
    """

    rows_new: dict[str, int] = field(default_factory=dict)
    rows_known: dict[str, int] = field(default_factory=dict)
    shards_copied: int = 0
    shards_packed: int = 0
    files_copied: int = 0
    files_packed: int = 0
    bytes_written: int = 0
    incomplete: dict[str, list[list[int]]] = field(default_factory=dict)


class _Source:
    """A store that is merged, as it was when it was opened."""

    def __init__(self, store: TeacherStore) -> None:
        self.store = store
        views, _ = read_views(store.files, store.store_digest)
        self.catalogue = store.catalogue()
        require_none(lost_shards(views, self.catalogue.num_shards), store.url)
        self.by_content = {
            record.index.content: record.shard for record in self.catalogue.allocations if record.index is not None
        }
        self._held: tuple[FileRecord, npt.NDArray[Any]] | None = None

    @cached_property
    def rows(self) -> _Rows:
        """All of its rows."""
        return _Rows.of(self.store)

    def values(self, file: FileRecord) -> npt.NDArray[Any]:
        """All entries of a shard file, checked against its checksum; the last one asked for is kept."""
        if self._held is None or self._held[0] != file:
            what = compare_file(self.store.files, file)
            if what is not None:
                raise self.damaged(file, what)
            entries = self.catalogue.allocations[file.shard].entries(file.spec)
            self._held = file, read_shard(self.store.files, self.store.layout, file, entries)
        return self._held[1]

    def damaged(self, file: FileRecord, what: str) -> VerificationError:
        """The error for a file that is not as recorded."""
        return VerificationError(
            f"{file.spec.signal}, shard {file.shard} of source {self.store.url}: {file.file}: {what}",
            fix=f"kd store repair {self.store.url} --teacher TEACHER, and then the same command again",
        )


@dataclass(frozen=True)
class _Rows:
    """Rows of a store: key, shard, slot, first token, first pair of tokens and number of tokens of each."""

    keys: Keys
    shards: IntArray
    slots: IntArray
    starts: IntArray
    pair_starts: IntArray
    lengths: IntArray

    @classmethod
    def of(cls, store: TeacherStore) -> _Rows:
        empty = np.empty(0, dtype=np.int64)
        parts: list[tuple[Keys, IntArray, IntArray, IntArray, IntArray, IntArray]] = [
            (np.empty((0, 2), dtype=np.uint64), empty, empty, empty, empty, empty)
        ]
        for record in store.catalogue().allocations:
            keys, lengths = read_index(store.files, record)
            slots = np.arange(len(keys))
            starts, pairs = (np.cumsum(entries) - entries for entries in (lengths, lengths**2))
            parts.append((keys, np.full(len(keys), record.shard), slots, starts, pairs, lengths))
        keys_, shards, slots_, *others = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cls(keys_, shards, slots_, *others)


def merge_stores(
    target: TeacherStore, sources: Sequence[TeacherStore], *, advance: Callable[[str, int], None] = lambda *_: None
) -> Merged:
    """Copy what the sources hold and the target does not into the target; the sources are only read.

    Args:
        advance: called with what is done ("rows" or "shards") and how many.

    Raises:
        RefusedError: a source of another identity, layout or way to store a signal; nothing was written then.
        VerificationError: a source or the target is damaged.
    """
    for store in sources:
        require_alike(target, store)
    opened = [_Source(store) for store in sources]
    _require_same_arrays(target, opened)
    merged = Merged()
    for source in opened:
        _merge_sidecars(target, source.store)
        specs = [spec for path, spec in source.catalogue.specs.items() if path not in _input_paths(target.layout)]
        target.declare(specs)
    touched: set[int] = set()
    for source in opened:
        touched |= _merge_rows(target, source, merged, advance)
    touched |= _merge_signals(target, opened, merged, advance)
    target.compact(only_if_many=True)
    problems = [problem for shard in sorted(touched) for problem in verify_shard(target.url, shard)[0]]
    if problems:
        raise VerificationError(
            f"store {target.url} does not hold what was copied into it",
            details=[str(problem) for problem in problems[:5]],
            fix=f"see all damage with: kd store verify {target.url}",
        )
    catalogue = target.catalogue()
    for path, files in sorted(catalogue.files.items()):
        if lacking := [shard for shard in range(catalogue.num_shards) if shard not in files]:
            merged.incomplete[path] = to_ranges(lacking)
    return merged


def _input_paths(layout: StoreLayout) -> set[str]:
    return {spec.path for spec in layout.input_specs}


# --- what is refused -----------------------------------------------------------------------------------------------


def require_alike(target: TeacherStore, source: TeacherStore) -> None:
    """RefusedError, field by field, unless both are of one teacher, capture and layout, in two places."""
    if source.files.is_at(target.url):
        raise RefusedError(f"store {source.url} is source and target of the merge", fix="give other stores")
    for check in (
        lambda: source.identity.require_equal(target.identity, url=source.url),
        lambda: source.layout.require_equal(target.layout, url=source.url),
    ):
        try:
            check()
        except RefusedError as error:
            raise RefusedError(
                f"store {source.url} cannot be merged into {target.url}: they are not of one teacher, capture and "
                f"layout (source → target)",
                details=error.details,
                fix="merge it into a store of its own",
            ) from None


def _require_same_arrays(target: TeacherStore, sources: Sequence[_Source]) -> None:
    agreed = {path: (target.url, spec) for path, spec in target.declared().items()}
    lines = []
    for source in sources:
        for path, spec in sorted(source.catalogue.specs.items()):
            url, other = agreed.setdefault(path, (source.store.url, spec))
            if other != spec:
                lines.append(f"{path}: {_said(spec)} in {source.store.url}, {_said(other)} in {url}")
    if lines:
        raise RefusedError(
            f"signals are not stored alike in what is to be merged into {target.url}",
            details=lines,
            fix="merge them into a store of their own, or capture them again as the target has them",
        )


def _said(spec: ArraySpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


# --- rows ----------------------------------------------------------------------------------------------------------


def _merge_rows(target: TeacherStore, source: _Source, merged: Merged, advance: Callable[[str, int], None]) -> set[int]:
    """Give every row of a source its place in the target; the shards that were written."""
    unknown = match_keys(_Rows.of(target).keys, source.rows.keys) < 0
    merged.rows_new[source.store.url] = int(unknown.sum())
    merged.rows_known[source.store.url] = int((~unknown).sum())
    rows_in = np.bincount(source.rows.shards, minlength=source.catalogue.num_shards)
    new_in = np.bincount(source.rows.shards, weights=unknown, minlength=source.catalogue.num_shards)
    partly = np.flatnonzero((new_in > 0) & (new_in < rows_in)).tolist()
    written: set[int] = set()
    for batch in _batches(source, np.flatnonzero(new_in == rows_in).tolist()):
        adopted = target.adopt([source.store.read_tokens(shard) for shard in batch])
        # Another process may have given some of these rows their places since.
        partly += [shard for shard, new in zip(batch, adopted, strict=True) if new is None]
        written.update(shard for shard in adopted if shard is not None)
        merged.shards_copied += sum(shard is not None for shard in adopted)
        advance("rows", sum(source.catalogue.allocations[shard].rows for shard in batch))
    if partly:
        ids, segments = [], []
        for shard in partly:
            rows = source.store.read_tokens(shard)
            wanted = np.flatnonzero(unknown[source.rows.shards == shard])
            ids.append(rows.token_ids.take(wanted))
            segments.append(rows.segment_ids.take(wanted))
        # All at once, so that a merge that was killed here packs the rest as it would have.
        allocation = target.allocate(Ragged.concatenate(ids), Ragged.concatenate(segments))
        written.update(allocation.shards_new)
        merged.shards_packed += len(allocation.shards_new)
        advance("rows", int(new_in[partly].sum()))
    return written


def _batches(source: _Source, shards: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    tokens = 0
    for shard in shards:
        count = source.catalogue.allocations[shard].tokens
        if batch and tokens + count > TOKENS_AT_ONCE:
            yield batch
            batch, tokens = [], 0
        batch.append(shard)
        tokens += count
    if batch:
        yield batch


# --- signals -------------------------------------------------------------------------------------------------------


def _merge_signals(
    target: TeacherStore, sources: Sequence[_Source], merged: Merged, advance: Callable[[str, int], None]
) -> set[int]:
    """Give every shard of the target the signals that the sources have for all of its rows; the shards written to."""
    catalogue = target.catalogue()
    specs: dict[str, ArraySpec] = {}
    for source in sources:
        for path in source.catalogue.specs.keys() - _input_paths(target.layout):
            specs[path] = source.catalogue.specs[path]
    rows = _Rows.of(target)
    places = [match_keys(source.rows.keys, rows.keys) for source in sources]
    written = set()
    for allocation in catalogue.allocations:
        lacking = [path for path in sorted(specs) if allocation.shard not in catalogue.files.get(path, {})]
        assert allocation.index is not None
        copies = {path: found for path in lacking if (found := _whole(sources, allocation.index.content, path))}
        mine = slice(*np.searchsorted(rows.shards, [allocation.shard, allocation.shard + 1]))
        wanted = [specs[path] for path in lacking if path not in copies]
        packed = _packed(sources, [place[mine] for place in places], rows.lengths[mine], wanted)
        if copies or packed:
            with contextlib.ExitStack() as stack:
                staged = {}
                packed_at = {spec.path: (spec, values) for spec, values in packed.items()}
                # Sorted, so that two writers of the same files never hold one another's next.
                for path in sorted({*copies, *packed_at}):
                    file, parts = (
                        _copied(*copies[path], allocation.shard)
                        if path in copies
                        else _encoded(target.layout, *packed_at[path], allocation.shard)
                    )
                    staged[file] = stack.enter_context(target.files.stage(file.file, parts))
                record = commit_files(target, allocation, staged)
            if record is not None:
                written.add(allocation.shard)
                paths = {file.spec.path for file in record.files}
                merged.files_copied += len(paths & copies.keys())
                merged.files_packed += len(paths - copies.keys())
                merged.bytes_written += sum(file.bytes for file in record.files)
        advance("shards", 1)
    return written


def _whole(sources: Sequence[_Source], content: str, path: str) -> tuple[_Source, FileRecord] | None:
    """A source that has this very shard, and its file of an array."""
    for source in sources:
        shard = source.by_content.get(content)
        file = None if shard is None else source.catalogue.files.get(path, {}).get(shard)
        if file is not None:
            return source, file
    return None


def _copied(source: _Source, file: FileRecord, shard: int) -> tuple[FileRecord, list[Buffer]]:
    """A file of a source as the file of another shard: its record and its bytes, compared with their checksum."""
    try:
        size = source.store.files.size(file.file)
        if size != file.bytes:
            raise source.damaged(file, f"it has {size} bytes, its record says {file.bytes}")
        parts: list[Buffer] = [bytes(block) for block in source.store.files.blocks(file.file)]
    except FileNotFoundError:
        raise source.damaged(file, "it is missing") from None
    if hash_parts(parts) != (file.bytes, file.xxh3_128, file.head):
        raise source.damaged(file, "its bytes do not have the recorded checksum")
    return FileRecord(file.spec, shard, file.bytes, file.xxh3_128, file.head), parts


def _encoded(
    layout: StoreLayout, spec: ArraySpec, values: npt.NDArray[Any], shard: int
) -> tuple[FileRecord, list[Buffer]]:
    parts = shard_parts(layout, spec, values)
    return FileRecord(spec, shard, *hash_parts(parts)), parts


def _packed(
    sources: Sequence[_Source], places: Sequence[IntArray], lengths: IntArray, specs: Sequence[ArraySpec]
) -> dict[ArraySpec, npt.NDArray[Any]]:
    """Entries of a shard of the target, per array that the sources together have for all of its rows.

    Args:
        places: per source, of each row of the shard: its place among the source's rows, -1 where it has none.
        lengths: numbers of tokens of the rows.
    """
    found: dict[ArraySpec, npt.NDArray[Any]] = {}
    for spec in specs:
        held = [_held(source, spec.path, place) for source, place in zip(sources, places, strict=True)]
        if not np.logical_or.reduce(held).all():
            continue
        counts = {"example": np.ones_like(lengths), "token": lengths, "pair": lengths**2}[spec.axis]
        starts = np.cumsum(counts) - counts
        values = np.empty((int(counts.sum()), *spec.shape), dtype=np.dtype(spec.dtype).newbyteorder("<"))
        done = np.zeros(len(lengths), dtype=bool)
        for source, place, mine in zip(sources, places, held, strict=True):
            slots = np.flatnonzero(mine & ~done)
            rows = place[slots]
            for its_shard in np.unique(source.rows.shards[rows]).tolist():
                some = source.rows.shards[rows] == its_shard
                there = source.values(source.catalogue.files[spec.path][its_shard])
                its_starts = {
                    "example": source.rows.slots, "token": source.rows.starts, "pair": source.rows.pair_starts
                }[spec.axis]  # fmt: skip
                many = counts[slots[some]]
                values[ranges(starts[slots[some]], many)] = there[ranges(its_starts[rows[some]], many)]
            done[slots] = True
        found[spec] = values
    return found


def _held(source: _Source, path: str, place: IntArray) -> npt.NDArray[np.bool_]:
    """[N] whether a source has an array for each of N rows, by their places among its own (-1: not there)."""
    has = np.zeros(source.catalogue.num_shards + 1, dtype=bool)
    has[[*source.catalogue.files.get(path, {})]] = True
    shards = np.where(place >= 0, np.append(source.rows.shards, 0)[place], source.catalogue.num_shards)
    return has[shards]


# --- sidecars ------------------------------------------------------------------------------------------------------


def _merge_sidecars(target: TeacherStore, source: TeacherStore) -> None:
    for name in sidecar.list_sidecars(source.files):
        if not target.has_sidecar(name):
            sidecar.copy_sidecar(source.files, target.files, target.store_digest, name)
