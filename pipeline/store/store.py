"""The teacher store: everything one teacher said under one capture spec. Grows, is shared, is never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..artifact import kd_version
from ..errors import RefusedError, UsageError, VerificationError
from ..fingerprint import fingerprint
from ..ragged import IntArray, Ragged
from . import sidecar
from .buffers import SpareBuffers
from .compact import LOOSE_RECORDS, Compaction, compact_records, count_loose
from .files import LOCK_FILE, STAGING, Claim, StoreFiles, open_files
from .identity import StoreIdentity
from .index import RowIndex, encode_index, read_index
from .inputs import InputRows, match_inputs, new_shards, plan_new, row_numbers, shards_of
from .keys import Keys, row_keys
from .lattice import derivable
from .layout import (
    CLAIMS,
    GROUP_FILE,
    MAX_SHARDS,
    STORE_FILE,
    STORE_FORMAT,
    STORE_VERSION,
    StoreLayout,
    group_metadata,
    index_file,
    metadata_bytes,
)
from .plan import PlannedShard, ShardSize
from .records import Catalogue, FileRecord, Record, RecordReader, hash_parts, require_none
from .register import RegisteredView, enter_view, lost_shards, place_of, read_views, to_ranges
from .signal import ARRAY_NAMES, SIGNALS, ArraySpec, Signal, place
from .writer import ShardWriter, shard_parts

if TYPE_CHECKING:
    from .reader import StoreReader
    from .verify import VerifyReport

MAX_METADATA_BYTES = 16 << 20
_BEFORE_CREATION = {LOCK_FILE, STAGING, CLAIMS}
"""What a folder may hold in which a store was about to be created when the process was killed."""


@dataclass(frozen=True)
class Allocation:
    """Where the rows of a corpus stand in a store.

    Attributes:
        rows: int64 [N] row number of each input; equal inputs share one.
        num_new: rows that were added.
        num_known: distinct inputs that were there before.
        shards_new: shards that were added.
        shards: all shards that hold one of the rows.
    """

    rows: IntArray
    num_new: int
    num_known: int
    shards_new: tuple[int, ...]
    shards: tuple[int, ...]

    @property
    def num_duplicates(self) -> int:
        """Inputs that equal an earlier one of the same corpus."""
        return len(self.rows) - self.num_new - self.num_known


@dataclass(frozen=True)
class AllocationPreview:
    """What `allocate_inputs` would do.

    Attributes:
        num_new: rows to be added.
        num_known: distinct inputs that are there.
        planned: the shards to be added.
        shards: shards that hold one of the known rows.
    """

    num_new: int
    num_known: int
    planned: tuple[PlannedShard, ...]
    shards: tuple[int, ...]

    @property
    def sizes(self) -> list[ShardSize]:
        """Of each shard to be added, as `plan_bytes` takes them."""
        return [shard.size for shard in self.planned]


def preview(inputs: InputRows, index: RowIndex | None = None) -> AllocationPreview:
    """What `TeacherStore.allocate_inputs` would do with these rows; without an index, in a store to be made."""
    stored = ((), 0) if index is None else (index.shards(), index.num_rows)
    matches = match_inputs(inputs, *stored)
    return AllocationPreview(
        num_new=matches.num_new,
        num_known=matches.num_known,
        planned=plan_new(inputs, matches),
        shards=shards_of(matches.places, inputs.layout.rows_per_shard),
    )


@dataclass(frozen=True)
class ShardRows:
    """What the teacher reads for one shard.

    Attributes:
        shard: which.
        rows: int64 [R] row numbers; slot i of the shard is row `rows[i]`.
        token_ids: R rows of ids, as stored.
        segment_ids: R rows of token types, uint8.
    """

    shard: int
    rows: IntArray
    token_ids: Ragged
    segment_ids: Ragged


def create_or_open(
    url: str | os.PathLike[str], identity: StoreIdentity, layout: StoreLayout | None = None
) -> TeacherStore:
    """The store at `url`, made when there is none.

    Args:
        identity: what a new store is for, or what an existing one must be for.
        layout: of a new store (None: the default); an existing one must have the same unless None.

    Raises:
        RefusedError: the store there has another identity or layout (each differing field is listed), or `url`
            is a folder with other things in it.
    """
    files = open_files(url)
    there = files.exists(STORE_FILE)
    if not there:
        foreign = not files.is_empty(besides=_BEFORE_CREATION)
        # Asked again: another process may have created the store since, and be writing into it.
        if foreign and not files.exists(STORE_FILE):
            raise RefusedError(
                f"{files.address} exists and is not a store (it has no {STORE_FILE})",
                fix="give another --store, or an empty folder",
            )
    files.probe()
    if not there:
        with files.lock():
            files.create(STORE_FILE, store_file_bytes(identity, layout or StoreLayout()))
    store = open_store(url, expect=identity)
    if layout is not None:
        store.layout.require_equal(layout, url=store.url)
    with files.lock():
        store.sweep()
        store.prepare()
        store._compact_if_many()
    return store


def store_file_bytes(identity: StoreIdentity, layout: StoreLayout) -> bytes:
    """store.json as it stands on disk."""
    content = {
        "format": STORE_FORMAT,
        "version": STORE_VERSION,
        "identity": identity.to_json(),
        "layout": layout.to_json(),
    }
    content["digest"] = fingerprint(content)
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def open_store(url: str | os.PathLike[str], *, expect: StoreIdentity | None = None) -> TeacherStore:
    """The store at `url`; writes nothing.

    Raises:
        RefusedError: no store there, written by a newer kd, or of another identity than `expect`.
        VerificationError: store.json was edited or damaged.
    """
    return _open(open_files(url), expect)


def _open(files: StoreFiles, expect: StoreIdentity | None) -> TeacherStore:
    url = files.url
    try:
        data = files.read(STORE_FILE, limit=MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        what = (
            f"has no {STORE_FILE}: it is not a store"
            if not files.is_empty() or os.path.isdir(files.address)
            else "does not exist"
        )
        raise RefusedError(f"store {url} {what}", fix="make one with kd cache-teacher --store PATH") from None
    try:
        content = json.loads(data)
        if content["format"] != STORE_FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {STORE_FORMAT!r}")
        if content["version"] != STORE_VERSION:
            raise RefusedError(
                f"store {url} has format version {content['version']}; this kd reads {STORE_VERSION}",
                fix="use the kd version that wrote it",
            )
        digest = content.pop("digest")
        if (found := fingerprint(content)) != digest:
            raise ValueError(f"its content has the digest {found}, it names {digest}: it was edited or damaged")
        identity = StoreIdentity(**content["identity"])
        layout = StoreLayout(**content["layout"])
    except (ValueError, KeyError, TypeError, UsageError, RecursionError) as error:
        said = f"the key {error} is missing" if isinstance(error, KeyError) else error
        raise VerificationError(
            f"{files.path(STORE_FILE)} is not a store description: {said}",
            fix="restore it from a copy; everything in the store was written for the original",
        ) from None
    if expect is not None:
        identity.require_equal(expect, url=files.url)
    return TeacherStore(files, identity, layout, str(digest))


class _Declared(NamedTuple):
    spec: ArraySpec
    num_shards: int
    """For how many shards the declared length suffices."""
    metadata: dict[str, Any]


class TeacherStore:
    """A store, opened. Make one with `create_or_open` or `open_store`.

    Everything is safe to call from several processes at once, and to be killed at.
    """

    def __init__(self, files: StoreFiles, identity: StoreIdentity, layout: StoreLayout, store_digest: str) -> None:
        self.files, self.identity, self.layout = files, identity, layout
        self.store_digest = store_digest
        """Of identity and layout; every record names it."""
        self._records = RecordReader(files, store_digest, layout)
        self.buffers = SpareBuffers()
        """Memory for the writers of this process."""

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.files.address, self.store_digest)

    @property
    def url(self) -> str:
        """Where it is, as given."""
        return self.files.url

    # -- what it holds ------------------------------------------------------------------------------------------

    def catalogue(self) -> Catalogue:
        """What is committed now. VerificationError when the records are damaged."""
        return self._records.catalogue()

    def shard_records(self, shard: int) -> list[Record]:
        """The records of one shard, now."""
        records, problems = self._records.read(shard=shard)
        require_none(problems, self.url)
        return records

    def index(self) -> RowIndex:
        """The rows, now."""
        return RowIndex(self.files, self.layout, self.catalogue().allocations)

    def lookup(self, keys: Keys) -> IntArray:
        """int64 [N] row number of each row key [N, 2], -1 where the store has no such row."""
        return self.index().lookup(keys)

    def missing(
        self, signals: Iterable[Signal | ArraySpec], shards: Iterable[int] | None = None
    ) -> dict[int, tuple[ArraySpec, ...]]:
        """What is still to be captured: per shard, the arrays it has no committed file of.

        Args:
            signals: specs, or signals that were declared.
            shards: to look at; None is all.

        Returns:
            Shards that lack something, ascending.
        """
        specs = [item if isinstance(item, ArraySpec) else self.spec(item) for item in signals]
        if shards is not None and len(one := [*set(shards)]) == 1 and (records := self.shard_records(one[0])):
            # A worker asks for the shard it is about to compute: all others need not be looked at again.
            held = {file.spec.path for record in records for file in record.files}
            lacking = tuple(spec for spec in specs if spec.path not in held)
            return {one[0]: lacking} if lacking else {}
        catalogue = self.catalogue()
        wanted = range(catalogue.num_shards) if shards is None else sorted(set(shards))
        missing = {}
        for shard in wanted:
            if not 0 <= shard < catalogue.num_shards:
                raise RefusedError(f"store {self.url} has shards 0 to {catalogue.num_shards - 1}, got {shard}")
            lacking = tuple(spec for spec in specs if shard not in catalogue.files.get(spec.path, {}))
            if lacking:
                missing[shard] = lacking
        return missing

    def shard_sizes(self, shards: Iterable[int]) -> list[ShardSize]:
        """Of each shard, as `plan_bytes` takes them."""
        allocations = self.catalogue().allocations
        return [allocations[shard].size for shard in shards]

    def digest(self) -> str:
        """32 hex over identity, layout, rows, arrays and tensor sidecars: what it holds, not how it came there."""
        sidecars = [
            [name, sorted(record.files.items())]
            for name in sidecar.list_sidecars(self.files)
            if (record := sidecar.read_record(self.files, self.store_digest, name)).kind == "tensors"
        ]
        return fingerprint([self.store_digest, self.catalogue().digest_entries(), sidecars])

    # -- records ------------------------------------------------------------------------------------------------

    def compact(self, *, only_if_many: bool = False) -> Compaction:
        """Put the commit records into few files. What the store holds, and its digest, stay as they are.

        Processes that have the store open go on: a record is known by its name, wherever it stands.

        Args:
            only_if_many: leave a few hundred records as they are.
        """
        if only_if_many and count_loose(self.files) <= LOOSE_RECORDS:
            return Compaction()
        with self.files.lock():
            return compact_records(self.files, self._records)

    def _compact_if_many(self) -> None:
        """The same while the lock is held."""
        if count_loose(self.files) > LOOSE_RECORDS:
            compact_records(self.files, self._records)

    # -- rows ---------------------------------------------------------------------------------------------------

    def preview(self, inputs: InputRows) -> AllocationPreview:
        """What `allocate_inputs` would do with these rows; writes nothing."""
        return preview(inputs, self.index())

    def allocate(self, token_ids: Ragged, segment_ids: Ragged | None = None) -> Allocation:
        """As `allocate_inputs`, of rows that are in memory.

        Args:
            token_ids: N rows of what the teacher reads, special tokens included.
            segment_ids: N rows of the same lengths; None is all zero.

        Raises:
            RefusedError: a row without tokens or longer than a shard, or an id that does not fit the store.
        """
        return self.allocate_inputs(InputRows.of(self.layout, token_ids, segment_ids))

    def allocate_inputs(self, inputs: InputRows) -> Allocation:
        """Give every row a place, for good: rows the store knows keep theirs, the others get new shards.

        New rows are packed in order. Their ids, segment ids and index are written at once, so a capture needs
        the store alone; killed on the way, the shards done are kept, and the same call packs the rest alike.

        Raises:
            RefusedError: a row without tokens or longer than a shard.
        """
        width = self.layout.rows_per_shard
        with self.files.lock():
            index = self.index()
            first_shard = len(index.allocations)
            self._require_records(first_shard)
            matches = match_inputs(inputs, index.shards(), index.num_rows)
            planned = plan_new(inputs, matches)
            self._grow(first_shard + len(planned))
            for shard, contents in enumerate(new_shards(inputs, matches, planned), start=first_shard):
                self._write_rows(shard, *contents)
            self._compact_if_many()
        rows = row_numbers(matches, planned, first_shard, width)
        return Allocation(
            rows=rows,
            num_new=matches.num_new,
            num_known=matches.num_known,
            shards_new=tuple(range(first_shard, first_shard + len(planned))),
            shards=shards_of(rows, width),
        )

    def adopt(self, shards: Sequence[ShardRows]) -> tuple[int | None, ...]:
        """Take over rows of a store of the same identity and layout, each of its shards as a shard of this one.

        Args:
            shards: as `read_tokens` of that store gives them.

        Returns:
            The numbers that the shards got, in order; None for one of which a row is here already.
        """
        keys = [row_keys(shard.token_ids, shard.segment_ids) for shard in shards]
        numbers: list[int | None] = []
        with self.files.lock():
            catalogue = self.catalogue()
            self._require_records(catalogue.num_shards)
            index = RowIndex(self.files, self.layout, catalogue.allocations)
            known = np.split(index.lookup(np.concatenate(keys)) >= 0, np.cumsum([len(k) for k in keys])[:-1])
            new = [number for number, there in enumerate(known) if not there.any()]
            self._grow(catalogue.num_shards + len(new))
            for number, shard in enumerate(shards):
                if number not in new:
                    numbers.append(None)
                    continue
                place = catalogue.num_shards + new.index(number)
                self._write_rows(place, keys[number], shard.token_ids, shard.segment_ids)
                numbers.append(place)
            self._compact_if_many()
        return tuple(numbers)

    def _require_records(self, num_shards: int) -> None:
        """VerificationError where a view has rows in shards without a record: new rows would take their places."""
        require_none(lost_shards(read_views(self.files, self.store_digest)[0], num_shards), self.url)

    def _write_rows(self, shard: int, keys: Keys, token_ids: Ragged, segment_ids: Ragged) -> None:
        ids_spec, segments_spec = self.layout.input_specs
        written = []
        for spec, values in ((ids_spec, token_ids.values), (segments_spec, segment_ids.values)):
            parts = shard_parts(self.layout, spec, values)
            file = FileRecord(spec, shard, *hash_parts(parts))
            self.files.write(file.file, parts)
            written.append(file)
        pairs = int((token_ids.lengths**2).sum()) if self.layout.pairs_per_shard else 0
        data, index = encode_index(keys, token_ids.lengths, pairs=bool(pairs))
        self.files.write(index_file(shard), [data])
        record = Record(
            self.store_digest, shard, len(keys), len(token_ids.values), tuple(written), index=index, pairs=pairs
        )
        self.files.create(record.file, record.encode())

    def read_tokens(self, shard: int) -> ShardRows:
        """What the teacher reads for a shard; every row is checked against its row key.

        Raises:
            VerificationError: damaged ids or index.
        """
        from .reader import read_shard

        record = self._allocation(shard)
        keys, lengths = read_index(self.files, record)
        by_path = {file.spec.path: file for file in record.files}
        ids, segments = (
            Ragged.from_lengths(read_shard(self.files, self.layout, by_path[spec.path], record.tokens), lengths)
            for spec in self.layout.input_specs
        )
        if not np.array_equal(row_keys(ids, segments), keys):
            raise VerificationError(
                f"shard {shard} of store {self.url}: token ids and row keys do not belong together",
                fix=f"see all damage with: kd store verify {self.url}",
            )
        return ShardRows(shard, np.arange(record.rows) + shard * self.layout.rows_per_shard, ids, segments)

    def _allocation(self, shard: int) -> Record:
        for record in self.shard_records(shard):
            if record.index is not None:
                return record
        raise RefusedError(f"store {self.url} has no shard {shard}")

    # -- signals ------------------------------------------------------------------------------------------------

    def declared(self) -> dict[str, ArraySpec]:
        """The arrays that were declared, by path; captured or not."""
        return {path: array.spec for path, array in self._array_metadata().items()}

    def spec(self, signal: Signal | str) -> ArraySpec:
        """The spec of the array that stands for a signal, in its first encoding or the one asked for.

        Raises:
            RefusedError: it was not declared.
        """
        signal = Signal.parse(signal) if isinstance(signal, str) else signal
        for spec in self.declared().values():
            asked = spec.plain if signal.encoding is None else spec.encoding == signal.encoding
            if spec.signal == signal.bare and not spec.part and asked:
                return spec
        raise RefusedError(f"store {self.url} holds no {signal}", fix=f"run kd cache-teacher with --signals {signal}")

    def declare(self, specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """Create the arrays that are not there yet.

        Returns:
            The specs as they are here: a second encoding of a signal stands beside the first, under its own name.

        Raises:
            RefusedError: a signal is there with entries of another shape.
        """
        with self.files.lock():
            there = self._array_metadata()
            declared = [array.spec for array in there.values()]
            specs = place(specs, declared)
            shapes = {spec.signal: spec.shape for spec in declared if not spec.part}
            for spec in specs:
                if not spec.part and shapes.get(spec.signal, spec.shape) != spec.shape:
                    raise RefusedError(
                        f"store {self.url} holds {spec.signal} with entries of shape {list(shapes[spec.signal])}, "
                        f"asked for {list(spec.shape)}",
                        fix="give another --store",
                    )
            num_shards = max([self.catalogue().num_shards, *(array.num_shards for array in there.values())])
            for spec in specs:
                if spec.path not in there:
                    self._declare(spec, num_shards)
            self._grow(num_shards)
        return specs

    def sweep(self) -> None:
        """Remove what killed processes left half written. Hold the lock."""
        self.files.sweep()

    def prepare(self) -> None:
        """Make groups and input arrays whole again after a kill. Hold the lock."""
        if not self.files.exists(GROUP_FILE):
            self.files.write(GROUP_FILE, [metadata_bytes(group_metadata())])
        num_shards = max(
            [self.catalogue().num_shards, *(array.num_shards for array in self._array_metadata().values())]
        )
        for spec in self.layout.input_specs:
            if not self.files.exists(f"{spec.path}/{GROUP_FILE}"):
                self._declare(spec, num_shards)
        self._grow(num_shards)

    def _declare(self, spec: ArraySpec, num_shards: int) -> None:
        group = os.path.dirname(spec.path)
        if group and not self.files.exists(f"{group}/{GROUP_FILE}"):
            self.files.write(f"{group}/{GROUP_FILE}", [metadata_bytes(group_metadata())])
        self.files.write(f"{spec.path}/{GROUP_FILE}", [metadata_bytes(self.layout.array_metadata(spec, num_shards))])

    def _grow(self, num_shards: int) -> None:
        """Declare every array long enough; all alike, since xarray opens no group whose lengths differ."""
        for spec, declared, metadata in self._array_metadata().values():
            if declared < num_shards:
                metadata["shape"][0] = num_shards * self.layout.capacity(spec.axis)
                self.files.write(f"{spec.path}/{GROUP_FILE}", [metadata_bytes(metadata)])

    def _array_metadata(self) -> dict[str, _Declared]:
        """What stands in the zarr.json of every declared array, by path."""
        arrays = {}
        for path in self.array_paths():
            try:
                metadata = json.loads(self.files.read(f"{path}/{GROUP_FILE}", limit=MAX_METADATA_BYTES))
                spec = self.describes(path, metadata)
                num_shards = metadata["shape"][0] // self.layout.capacity(spec.axis)
                if num_shards > MAX_SHARDS:
                    raise ValueError(f"it is declared for {num_shards} shards")
                arrays[path] = _Declared(spec, num_shards, metadata)
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, UsageError, RecursionError) as error:
                raise VerificationError(
                    f"{self.files.path(f'{path}/{GROUP_FILE}')} does not describe an array of kd: {error}",
                    fix=f"see all damage with: kd store verify {self.url}",
                ) from None
        return arrays

    def describes(self, path: str, metadata: Any) -> ArraySpec:
        """The spec of the array at `path` from its zarr.json; ValueError, KeyError, TypeError or UsageError if none."""
        length, *shape = metadata["shape"]
        if type(length) is not int or length < 0 or not all(type(size) is int for size in shape):
            raise ValueError(f"its shape is {metadata['shape']}")
        encoding = metadata["attributes"]["kd"]["encoding"]
        return ArraySpec.at(path, tuple(shape), metadata["data_type"], encoding)

    def array_paths(self) -> list[str]:
        """Where arrays stand or may stand: of signals and inputs without layers, and of every layer with a folder."""
        paths = []
        for folder in self.files.list(""):
            if folder not in ARRAY_NAMES:
                continue
            signal, _, _ = ARRAY_NAMES[folder]
            if signal in SIGNALS and SIGNALS[signal].per_layer:
                paths += [f"{folder}/{layer}" for layer in self.files.list(folder) if layer.isdecimal()]
            else:
                paths.append(folder)
        return paths

    def writer(self, shard: int, specs: Sequence[ArraySpec]) -> ShardWriter:
        """A writer of some signals of one shard. The arrays must have been declared.

        Raises:
            RefusedError: no such shard, or an array that was not declared like this.
        """
        declared = self._array_metadata()
        for spec in specs:
            array = declared.get(spec.path)
            if array is None or array.spec != spec or spec in self.layout.input_specs:
                raise RefusedError(f"{spec.signal} was not declared at {spec.path} as {spec.dtype} {list(spec.shape)}")
            if array.metadata != self.layout.array_metadata(spec, array.num_shards):
                raise RefusedError(
                    f"{spec.label} of store {self.url} was rewritten by other software; nothing can be added to it",
                    fix="give another --store, or restore its zarr.json and shard files from a copy",
                )
        record = self._allocation(shard)
        _, lengths = read_index(self.files, record)
        return ShardWriter(self, record, lengths, specs)

    def claim(self, shard: int) -> Claim | None:
        """Take the sole right to compute a shard; None while somebody who lives has it.

        It ends when it is released, and with its process. Look again at what is missing once it is taken.
        """
        return self.files.claim(f"{shard:08d}")

    # -- sidecars -----------------------------------------------------------------------------------------------

    def has_sidecar(self, name: str) -> bool:
        """Whether a sidecar of that name is there."""
        return name in sidecar.list_sidecars(self.files)

    def put_sidecar(
        self, name: str, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Keep teacher tensors. The same ones again: nothing happens; others: RefusedError."""
        sidecar.write_tensors(self.files, self.store_digest, name, tensors, metadata or {})

    def sidecar(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Tensors of a sidecar, checked; RefusedError when it is not there."""
        return sidecar.read_tensors(self.files, self.store_digest, name)

    def sidecar_metadata(self, name: str) -> dict[str, Any]:
        """What was said when the sidecar was put there."""
        return dict(sidecar.read_record(self.files, self.store_digest, name).metadata)

    def put_file_sidecar(
        self, name: str, folder: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the files of a folder (tokenizer, configuration). One that is there stays as it is."""
        sidecar.write_files(self.files, self.store_digest, name, folder, metadata or {})

    def sidecar_folder(self, name: str) -> Path:
        """Folder of a file sidecar, checked; RefusedError when it is not there."""
        return sidecar.open_folder(self.files, self.store_digest, name)

    # -- views --------------------------------------------------------------------------------------------------

    def views(self) -> list[RegisteredView]:
        """The views that were made of it; VerificationError when an entry is damaged."""
        views, problems = read_views(self.files, self.store_digest)
        require_none(problems, self.url)
        return views

    def enter_view(
        self,
        fingerprint: str,
        folder: str | os.PathLike[str],
        *,
        corpus: Mapping[str, str],
        signals: Sequence[Signal | ArraySpec],
        num_rows: int,
        shards: Iterable[int],
    ) -> None:
        """Enter a view into the register, so that `gc` leaves what it needs. Before anything is captured for it.

        Args:
            fingerprint: of the view.
            folder: where it is or will be.
            corpus: "name" and "fingerprint".
            signals: that it needs.
            num_rows: examples.
            shards: that hold its rows.
        """
        view = RegisteredView(
            fingerprint,
            (place_of(self.files, folder),),
            dict(corpus),
            tuple(dict.fromkeys(str(item.encoded if isinstance(item, ArraySpec) else item) for item in signals)),
            num_rows,
            tuple(sorted(set(shards))),
            kd_version(),
        )
        with self.files.lock():
            enter_view(self.files, self.store_digest, view)

    # -- reading ------------------------------------------------------------------------------------------------

    def reader(self, encodings: Mapping[Signal, str] | None = None, rows: IntArray | None = None) -> StoreReader:
        """A reader of what is committed now.

        Args:
            encodings: to read signals in that are asked for without one; of others, the most exact.
            rows: those that will be read; of a remote store, only their shards are copied to this machine ahead.
        """
        from .reader import StoreReader

        return StoreReader(self, encodings, None if rows is None else shards_of(rows, self.layout.rows_per_shard))

    def inspect(self) -> dict[str, Any]:
        """What the store holds, for people and `--json`."""
        catalogue = self.catalogue()
        sidecars = sidecar.list_sidecars(self.files)
        num_layers = self.identity.teacher.get("config", {}).get("num_hidden_layers", 0)
        signals: dict[str, dict[str, Any]] = {}
        declared = self.declared() | dict(catalogue.specs)
        for path, spec in sorted(declared.items(), key=lambda item: (item[1].part, item[0])):
            size = sum(file.bytes for file in catalogue.files.get(path, {}).values())
            if spec.part:
                # Absent where a writer was killed between the two declarations.
                signals.get(spec.label, {"bytes": 0})["bytes"] += size
                continue
            signals[spec.label] = {
                "axis": spec.axis,
                "dtype": spec.dtype,
                "encoding": spec.encoding,
                "shape": list(spec.shape),
                "shards": len(catalogue.files.get(path, {})),
                "bytes": size,
            }
        return {
            "url": self.url,
            "version": STORE_VERSION,
            "digest": self.digest(),
            "identity": self.identity.to_json(),
            "layout": self.layout.to_json(),
            "rows": sum(record.rows for record in catalogue.allocations),
            "tokens": sum(record.tokens for record in catalogue.allocations),
            "shards": catalogue.num_shards,
            "signals": signals,
            "incomplete": self._incomplete(catalogue),
            "derivable": derivable(
                catalogue.specs.values(), sidecars, num_layers, masked="masking" in self.identity.capture
            ),
            "views": self._inspect_views(),
            "sidecars": sidecars,
            "bytes": sum(signal["bytes"] for signal in signals.values()),
        }

    def _incomplete(self, catalogue: Catalogue) -> dict[str, list[list[int]]]:
        """Shards without a signal that others have, as ranges, by array."""
        lacking = {
            path: [shard for shard in range(catalogue.num_shards) if shard not in files]
            for path, files in sorted(catalogue.files.items())
        }
        return {path: to_ranges(shards) for path, shards in lacking.items() if shards}

    def _inspect_views(self) -> list[dict[str, Any]]:
        views, _ = read_views(self.files, self.store_digest)
        described = []
        for view in views:
            found = view.found(self.files)
            described.append(
                {
                    "fingerprint": view.fingerprint,
                    "corpus": view.corpus.get("name", ""),
                    "path": found or view.places[0][0],
                    "there": found is not None,
                    "rows": view.num_rows,
                    "signals": list(view.signals),
                    "shards": to_ranges(view.shards),
                }
            )
        return described

    def verify(self) -> VerifyReport:
        """Read everything and compare it with what the records say."""
        from .verify import verify_store

        return verify_store(self.url)


@lru_cache(maxsize=4)
def _files_at(address: str) -> StoreFiles:
    return open_files(address)


@lru_cache(maxsize=4)
def _records_at(address: str, store_digest: str, layout: StoreLayout) -> RecordReader:
    return RecordReader(_files_at(address), store_digest, layout)


def _reopen(address: str, store_digest: str) -> TeacherStore:
    """The store in another process, such as a dask worker, which opens it once a shard.

    What it learns from one shard to the next is kept: records, which never change, and since when the claims of others
    show no sign of life.
    """
    store = _open(_files_at(address), None)
    if store.store_digest != store_digest:
        raise RefusedError(f"the store at {address} is not the one that was there before")
    store._records = _records_at(address, store_digest, store.layout)
    return store
