"""Plans: which rows go into which shard, what that costs, and whether there is room."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError, UsageError
from .layout import StoreLayout, group_metadata, metadata_bytes
from .scratch import release
from .signal import ArraySpec, Axis

INDEX_BYTES_PER_ROW = 28
"""A row key and three 32-bit numbers; four where the store has pairs of tokens."""


class ShardSize(NamedTuple):
    """How much of each axis a shard takes; pairs of tokens count in stores that have them."""

    rows: int
    tokens: int
    pairs: int = 0

    def entries(self, axis: Axis) -> int:
        """Slots it takes on an axis."""
        return {"example": self.rows, "token": self.tokens, "pair": self.pairs}[axis]


@dataclass(frozen=True)
class PlannedShard:
    """Rows `start` to `stop` (exclusive) of those to be placed, which share a shard.

    Attributes:
        tokens: their number of tokens together.
        pairs: their number of pairs of tokens together; 0 in a store without.
    """

    start: int
    stop: int
    tokens: int
    pairs: int = 0

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def size(self) -> ShardSize:
        """What they take of the axes."""
        return ShardSize(self.rows, self.tokens, self.pairs)


def plan_shards(lengths: npt.ArrayLike, layout: StoreLayout) -> list[PlannedShard]:
    """Pack rows, in order, into shards: a shard is closed when the next row would not fit.

    Args:
        lengths: [N] number of tokens of each row.

    Raises:
        RefusedError: a row without tokens, or longer than a shard.
    """
    lengths_N = np.asarray(lengths)
    shards, start = [], 0
    while start < len(lengths_N):
        # A shard has no more rows than this, so no more of them are in memory at once.
        window = lengths_N[start : start + layout.rows_per_shard].astype(np.int64)
        tokens, pairs = np.cumsum(window), np.cumsum(window**2 if layout.pairs_per_shard else np.zeros_like(window))
        fits = int(np.searchsorted(tokens, layout.tokens_per_shard, side="right"))
        fits = min(fits, int(np.searchsorted(pairs, layout.pairs_per_shard, side="right")))
        if not fits or window[:fits].min() < 1:
            _refuse_row(lengths_N, start + (int(np.argmin(window[:fits])) if fits else 0), layout)
        shards.append(PlannedShard(start, start + fits, int(tokens[fits - 1]), int(pairs[fits - 1])))
        start += fits
        release(lengths_N)
    return shards


def _refuse_row(lengths: npt.NDArray[np.integer], row: int, layout: StoreLayout) -> NoReturn:
    """Say what is wrong with a row, and of how many rows."""
    length = int(lengths[row])
    if length < 1:
        what, such = "has no tokens", lengths < 1
    elif length > layout.tokens_per_shard:
        what = f"is longer than a shard of {layout.tokens_per_shard} tokens"
        such = lengths > layout.tokens_per_shard
    else:
        what = f"has more pairs of tokens than a shard's {layout.pairs_per_shard}"
        such = lengths > math.isqrt(layout.pairs_per_shard)
    raise RefusedError(
        f"row {row} {what} ({length} tokens; {int(such.sum())} such rows)",
        fix="drop empty texts, lower --max-length, or create the store with more --tokens-per-shard "
        "(and --pairs-per-shard)",
    )


def plan_bytes(layout: StoreLayout, specs: Iterable[ArraySpec], shards: Iterable[ShardSize]) -> dict[str, int]:
    """Bytes of shard files per signal (and encoding, where it is not the first), exactly.

    Args:
        specs: the arrays to write.
        shards: sizes of those to be written.
    """
    sizes, planned = list(shards), dict[str, int]()
    for spec in specs:
        planned[spec.label] = planned.get(spec.label, 0) + sum(
            layout.file_bytes(spec, size.entries(spec.axis)) for size in sizes
        )
    return planned


@dataclass(frozen=True)
class Lacking:
    """A shard that is there, and what is to be added to it.

    Attributes:
        shard: its number.
        size: of it.
        specs: arrays it has no file of.
    """

    shard: int
    size: ShardSize
    specs: tuple[ArraySpec, ...]


def plan_files(
    layout: StoreLayout,
    specs: Sequence[ArraySpec],
    *,
    new: Sequence[ShardSize],
    lacking: Sequence[Lacking],
    declared: Collection[str],
    num_shards: int,
) -> dict[str, int]:
    """Bytes of all files that a capture adds to a store, but for store.json and sidecars.

    Args:
        specs: the arrays asked for.
        new: sizes of the shards to be added.
        lacking: shards that are there.
        declared: paths of the arrays that are declared.
        num_shards: that are there.

    Returns:
        Per signal (and encoding, where it is not the first), then "index", "records" and "metadata".
    """
    inputs = layout.input_specs
    planned = plan_bytes(layout, (*inputs, *specs), new)
    records = 0
    for item in lacking:
        for label, size in plan_bytes(layout, item.specs, [item.size]).items():
            planned[label] = planned.get(label, 0) + size
        records += _record_bytes(layout, item.shard, item.size, item.specs)
    for shard, size_ in enumerate(new, start=num_shards):
        records += _record_bytes(layout, shard, size_, inputs, _index_bytes(size_))
        records += _record_bytes(layout, shard, size_, specs) if specs else 0
    undeclared = {spec.path: spec for spec in (*inputs, *specs) if spec.path not in declared}
    metadata = sum(
        len(metadata_bytes(layout.array_metadata(spec, num_shards + len(new)))) for spec in undeclared.values()
    )
    known = {os.path.dirname(path) for path in declared}
    groups = {os.path.dirname(path) for path in undeclared} - known
    metadata += len(groups) * len(metadata_bytes(group_metadata()))
    planned["index"] = sum(map(_index_bytes, new))
    return planned | {"records": records, "metadata": metadata}


def _index_bytes(size: ShardSize) -> int:
    return _bytes_of_index(size.rows, bool(size.pairs))


@lru_cache(maxsize=1024)
def _bytes_of_index(rows: int, pairs: bool) -> int:
    """Of the Parquet file of a shard's index: its columns are plain, so that their values do not matter."""
    from .index import encode_index

    keys, lengths = np.zeros((rows, 2), dtype=np.uint64), np.ones(rows, dtype=np.int64)
    return len(encode_index(keys, lengths, pairs=pairs)[0])


def _record_bytes(
    layout: StoreLayout, shard: int, size: ShardSize, specs: Sequence[ArraySpec], index_bytes: int = 0
) -> int:
    """Of a commit record; an allocation's when there is an index."""
    from .records import FileRecord, IndexRecord, Record

    digest = "0" * 32
    files = tuple(
        FileRecord(spec, shard, layout.file_bytes(spec, size.entries(spec.axis)), digest, digest) for spec in specs
    )
    index = IndexRecord(index_bytes, digest, digest) if index_bytes else None
    allocation = None if index_bytes else digest
    return len(Record(digest, shard, size.rows, size.tokens, files, index, allocation, pairs=size.pairs).encode())


def require_room(needed: int | Mapping[str, int], *, url: str | os.PathLike[str], max_bytes: int | None = None) -> None:
    """Refuse a plan that is larger than `max_bytes` or than what is free on the disk of `url`.

    The room of an object store is not known: only `max_bytes` limits it.

    Args:
        needed: bytes, in all or per signal.

    Raises:
        RefusedError: with the largest signals, the budget and the free space.
    """
    parts = needed if isinstance(needed, Mapping) else {}
    total = sum(needed.values()) if isinstance(needed, Mapping) else needed
    free = free_bytes(url)
    limits = [] if free is None else [(free, "free on its disk")]
    limits += [] if max_bytes is None else [(max_bytes, "--max-bytes")]
    limit, name = min(limits, default=(total, ""))
    if total <= limit:
        return
    largest = sorted(parts.items(), key=lambda item: -item[1])[:5]
    raise RefusedError(
        f"capturing into {os.fspath(url)} needs {format_bytes(total)}; {name}: {format_bytes(limit)}",
        details=[f"{signal}: {format_bytes(size)}" for signal, size in largest],
        fix="ask for fewer signals or layers, a smaller corpus, or "
        + ("a disk with more room" if name != "--max-bytes" else "raise --max-bytes"),
    )


def free_bytes(url: str | os.PathLike[str]) -> int | None:
    """Bytes free for us on the disk that `url` is on or would be created on; None of an object store."""
    from .files import LocalFiles, open_files

    files = open_files(url)
    if not isinstance(files, LocalFiles):
        return None
    folder = files.address
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


_UNITS: Sequence[tuple[str, int]] = (
    ("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3),
    ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1),
)  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Bytes from `10GB`, `1.5 GiB` or a plain number.

    >>> parse_bytes("1.5KB"), parse_bytes(12)
    (1500, 12)
    """
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", str(text))
    units = {name.lower(): size for name, size in _UNITS} | {"": 1}
    if match is None or match[2].lower() not in units:
        raise UsageError(f"cannot read {text!r} as a size", fix="write it like 10GB, 500MB or 1.5GiB")
    return int(float(match[1]) * units[match[2].lower()])


def format_bytes(size: int) -> str:
    """For people, in powers of ten.

    >>> format_bytes(1_234_567)
    '1.23 MB'
    """
    for name, unit in _UNITS[:4]:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"
