"""Faults in the files of a store, drawn at random: what is done to which file, and who must be named for it.

A fault says what some files hold instead of what they held. It is put in, looked for and taken out again on one copy of
a store, so that ten thousand of them cost as much as ten thousand verifications of what they touch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FLIP, TRUNCATE, EXTEND, SWAP, DELETE, STALE, EDIT = (
    "bit flip", "truncation", "extension", "swapped files", "deleted file", "stale temporary", "edited manifest",
)  # fmt: skip
KINDS = {FLIP: 40, TRUNCATE: 15, EXTEND: 8, SWAP: 12, DELETE: 8, STALE: 5, EDIT: 12}
"""Kinds of faults and how often each is drawn, in percent."""


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong.

    Attributes:
        kind: one of `KINDS`.
        files: name → what it holds now; None is gone.
        named: (shard, signal, file) that must be named for it, one of each list; none when nothing may be.
        shard: whose files were touched; None for those of the whole store.
        unread: signals of that shard which may instead be refused when they are read.
    """

    kind: str
    files: Mapping[str, bytes | None]
    named: tuple[tuple[int | None, str | None, str], ...]
    shard: int | None = None
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.files)}"


def place_of(name: str) -> tuple[int | None, str | None, str]:
    """(shard, signal, file) that must be named when a file is damaged."""
    if match := re.fullmatch(r"(.+)/c/([0-9]+)(?:/0)*", name):
        array, _, layer = match[1].partition("/")
        return int(match[2]), f"{array}@{int(layer)}" if layer else array, name
    if match := re.fullmatch(r"index/([0-9]{8})\.parquet", name):
        return int(match[1]), "index", name
    if match := re.fullmatch(r"commits/([0-9]{8})\..*", name):
        return int(match[1]), "record", name
    if name.startswith("commits/"):
        return None, "record", name
    if match := re.fullmatch(r"(sidecars|views)/([^/]+?)(?:\.json|/.*)?", name):
        return None, f"{match[1][:-1]} {match[2]}", name
    folder = name.rpartition("/")[0]
    array, _, layer = folder.partition("/")
    return None, (f"{array}@{int(layer)}" if layer else array) or None, name


@dataclass
class Patient:
    """A store that faults are put into.

    Attributes:
        root: its folder.
        files: what every file holds, by name.
    """

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and name != ".lock" and not name.startswith(".staging/"):
                self.files[name] = path.read_bytes()

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """The store with a fault in it; as it was again afterwards, whatever was written meanwhile."""
        for name, data in fault.files.items():
            self._put(name, data)
        try:
            yield
        finally:
            for name in fault.files:
                self._put(name, self.files.get(name))

    def restore(self) -> None:
        """Everything as it was."""
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and name != ".lock" and name not in self.files:
                path.unlink()
        for name, data in self.files.items():
            if not (self.root / name).exists() or (self.root / name).read_bytes() != data:
                self._put(name, data)

    def is_as_it_was(self) -> bool:
        """Whether every file holds what it held, and none was added."""
        now = Patient(self.root).files
        return now == self.files

    def _put(self, name: str, data: bytes | None) -> None:
        path = self.root / name
        if data is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    # --- drawing -------------------------------------------------------------------------------------------------

    def draw(self, random: Random) -> Fault:
        """One fault; another one each time."""
        while True:
            kind = random.choices([*KINDS], [*KINDS.values()])[0]
            fault = _DRAW[kind](self, random)
            if fault is not None:
                return fault

    def pick(self, random: Random) -> str:
        """A file: as often a shard file as any other, so that large and many are not all there is."""
        shard_files = [name for name in self.files if "/c/" in name]
        others = [name for name in self.files if "/c/" not in name]
        return random.choice(shard_files if random.random() < 0.5 else others)


def _changed(kind: str, name: str, data: bytes | None) -> Fault:
    return Fault(kind, {name: data}, (place_of(name),), place_of(name)[0])


def _flip(patient: Patient, random: Random) -> Fault:
    name = patient.pick(random)
    data = bytearray(patient.files[name])
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return _changed(FLIP, name, bytes(data))


def _truncate(patient: Patient, random: Random) -> Fault:
    name = patient.pick(random)
    data = patient.files[name]
    return _changed(TRUNCATE, name, data[: random.choice([0, len(data) - 1, random.randrange(len(data))])])


def _extend(patient: Patient, random: Random) -> Fault:
    name = patient.pick(random)
    return _changed(EXTEND, name, patient.files[name] + bytes([random.randrange(33, 256), *random.randbytes(7)]))


def _swap(patient: Patient, random: Random) -> Fault | None:
    """Two files in each other's places: of two shards, of two signals, of two records, of two sidecars."""
    one = patient.pick(random)
    folder, ending = one.split("/")[0], one.rpartition(".")[2]
    alike = [
        other
        for other, data in patient.files.items()
        if data != patient.files[one]
        and (other.split("/")[0] == folder or ("/c/" in one and "/c/" in other))
        and (other.rpartition(".")[2] == ending or "/c/" in other)
    ]
    if "/c/" not in one and folder not in ("index", "commits", "sidecars"):
        alike = [other for other in patient.files if other.endswith("zarr.json") and other != one]
        alike = [other for other in alike if patient.files[other] != patient.files[one]]
        if not one.endswith("zarr.json"):
            return None
    if not alike:
        return None
    other = random.choice(alike)
    both = {one: patient.files[other], other: patient.files[one]}
    shard = place_of(one)[0]
    # What a sidecar holds is said by its record alone.
    named = [name for name in both if name.endswith("/record.json") or place_of(name)[1] != "sidecar " + _sidecar(both)]
    return Fault(SWAP, both, tuple(map(place_of, named)), shard if shard == place_of(other)[0] else -1)


def _sidecar(names: Iterable[str]) -> str:
    """The sidecar whose record is among these files."""
    return next((name.split("/")[1] for name in names if name.endswith("/record.json")), "")


def _delete(patient: Patient, random: Random) -> Fault | None:
    name = patient.pick(random)
    if name.startswith("views/"):
        return None  # that a view was once made is written nowhere else
    if not name.startswith("commits/"):
        return _changed(DELETE, name, None)
    if name.endswith(".parquet"):
        # The allocations in it are missed; so are the signals of its shards, which then have no record.
        shards = {int(found) for found in re.findall(rb"([0-9]{8})\.[0-9a-f]{32}\.json", patient.files[name])}
        return Fault(DELETE, {name: None}, tuple((shard, "record", "commits") for shard in sorted(shards)), -1)
    content = json.loads(patient.files[name])
    if "index" in content:
        return Fault(DELETE, {name: None}, ((content["shard"], "record", "commits"),), content["shard"])
    unread = tuple(str(place_of(item["file"])[1]) for item in content["arrays"])
    return Fault(DELETE, {name: None}, (), content["shard"], unread)


def _stale(patient: Patient, random: Random) -> Fault:
    """What a process leaves that is killed at the wrong moment: none of it is damage."""
    data = random.randbytes(random.randrange(1, 4000))
    name = random.choice(
        [
            ".staging/logits~c~0~0", ".staging/commits~00000000.json", ".staging/sidecars/head/tensors.safetensors",
            "logits/c/99/0", "hidden.tok/02/c/99/0", "token_ids/c/99", "index/00000099.parquet",
        ]
    )  # fmt: skip
    return Fault(STALE, {name: data}, (), None)


def _edit(patient: Patient, random: Random) -> Fault | None:
    """A manifest whose content was changed by somebody who knew its format."""
    name = random.choice([name for name in patient.files if "/c/" not in name])
    data = patient.files[name]
    if name.startswith("index/"):
        table = pq.read_table(pa.BufferReader(data))
        order = [*range(len(table))]
        random.shuffle(order)
        column = random.choice(["row_key", "num_tokens", "token_start", "row_slot"])
        position = table.column_names.index(column)
        edited = table.set_column(position, table.schema.field(position), table.column(column).take(pa.array(order)))
        buffer = io.BytesIO()
        pq.write_table(edited, buffer, compression="none", use_dictionary=False, write_statistics=False)
        return _changed(EDIT, name, buffer.getvalue()) if buffer.getvalue() != data else None
    if not name.endswith(".json"):
        return None
    content = json.loads(data)
    if name.endswith("zarr.json"):
        if content["node_type"] == "group":
            content["node_type"] = "array"
        else:
            edits: list[Callable[[], Any]] = [
                lambda: content.update(data_type="int64"),
                lambda: content.update(fill_value=0),
                lambda: content["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 7),
                lambda: content.update(codecs=content["codecs"] * 2),
                lambda: content["attributes"]["kd"].update(encoding="other"),
                lambda: content.update(dimension_names=["x"] * len(content["shape"])),
                lambda: content.update(shape=[content["shape"][0] // 2, *content["shape"][1:]]),
            ]
            random.choice(edits)()
        return _changed(EDIT, name, json.dumps(content, indent=2).encode())
    holder, key = random.choice([*_leaves(content)])
    holder[key] = _other(holder[key], random)
    if name.startswith("commits/"):
        return _edited_record(name, content, random)
    return _changed(EDIT, name, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _edited_record(name: str, content: dict[str, Any], random: Random) -> Fault:
    edited = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    shard = place_of(name)[0]
    if random.random() < 0.5:
        return _changed(EDIT, name, edited)
    # With the name that fits it: it is a record like any other, and must fall by what it says.
    renamed = f"commits/{shard:08d}.{hashlib.blake2b(edited, digest_size=16).hexdigest()}.json"
    return Fault(EDIT, {name: None, renamed: edited}, ((shard, None, ""),), -1)


def _leaves(content: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield content, key


def _other(value: Any, random: Random) -> Any:
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int | float):
        return value + random.choice([1, -1, 8])
    digits = "0123456789abcdef"
    if re.fullmatch(r"[0-9a-f]{32,64}", value):
        place = random.randrange(len(value))
        return value[:place] + random.choice(digits.replace(value[place], "")) + value[place + 1 :]
    return random.choice([value + "x", value[:-1], ""]) if value else "x"


_DRAW: Mapping[str, Callable[[Patient, Random], Fault | None]] = {
    FLIP: _flip, TRUNCATE: _truncate, EXTEND: _extend, SWAP: _swap, DELETE: _delete, STALE: _stale, EDIT: _edit,
}  # fmt: skip
