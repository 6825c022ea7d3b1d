"""The register of views: whose rows a store holds, so that nothing that is still needed is ever collected.

`views/<fingerprint>.json` names one view: its corpus, signals and shards, and where its folders are. A view is entered
before its first shard is captured, and stands for as long as one of those folders does.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import read_manifest
from ..errors import KdError, VerificationError
from ..fingerprint import fingerprint as fingerprint_of
from .files import StoreFiles
from .layout import COMMITS, MAX_SHARDS, VIEWS
from .records import Problem

FORMAT = 1
VIEW_NAME = re.compile(r"([0-9a-f]{32})\.json")
MAX_VIEW_BYTES = 1 << 24
MAX_SHARDS_OF_VIEW = 1 << 20
UNFINISHED = "unfinished.json"


@dataclass(frozen=True)
class RegisteredView:
    """One view of a store.

    Attributes:
        fingerprint: of the view.
        places: its folders, the newest first: (as it was given, made absolute; relative to the store).
        corpus: name and fingerprint.
        signals: what was captured for it, as written.
        num_rows: examples.
        shards: that hold its rows, ascending.
        kd_version: of the kd that entered it.
    """

    fingerprint: str
    places: tuple[tuple[str, str], ...]
    corpus: Mapping[str, str]
    signals: tuple[str, ...]
    num_rows: int
    shards: tuple[int, ...]
    kd_version: str = "unknown"

    @property
    def file(self) -> str:
        """Path inside the store."""
        return f"{VIEWS}/{self.fingerprint}.json"

    def encode(self, store: str) -> bytes:
        """The bytes of its file; `store` is the digest of identity and layout."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "store": store,
            "fingerprint": self.fingerprint,
            "places": [{"path": path, "relative": relative} for path, relative in self.places],
            "corpus": dict(self.corpus),
            "signals": list(self.signals),
            "num_rows": self.num_rows,
            "shards": to_ranges(self.shards),
            "kd_version": self.kd_version,
        }
        content["digest"] = fingerprint_of(content)
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def found(self, files: StoreFiles) -> str | None:
        """The first of its folders that still holds it, finished or being made; None when it is gone."""
        for path, relative in self.places:
            beside = "" if "://" in files.address else os.path.normpath(os.path.join(files.address, relative))
            for folder in dict.fromkeys((path, beside)):
                if folder and holds_view(folder, self.fingerprint):
                    return folder
        return None


def holds_view(folder: str | os.PathLike[str], fingerprint: str) -> bool:
    """Whether a folder holds that view, finished, being made, or set aside while another takes its place."""
    path = Path(folder)
    for candidate in (path, path.with_name(path.name + ".replaced")):
        try:
            manifest = read_manifest(candidate)
        except (KdError, OSError, ValueError):  # ValueError: a path with a zero byte
            continue
        if manifest is not None:
            if manifest["fingerprint"] == fingerprint:
                return True
            continue
        try:
            identity = json.loads((candidate / UNFINISHED).read_bytes())["identity"]
            if fingerprint_of(identity) == fingerprint:
                return True
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return False


def enter_view(files: StoreFiles, store: str, view: RegisteredView) -> None:
    """Enter a view, or one more place of a view that is there; folders that are gone are left out. Hold the lock."""
    known: tuple[tuple[str, str], ...] = ()
    try:
        old = _decode(files.read(view.file, limit=MAX_VIEW_BYTES), name=view.file.rpartition("/")[2], store=store)
    except (FileNotFoundError, ValueError, VerificationError):
        pass
    else:
        mine = {path for path, _ in view.places}
        known = tuple(
            place
            for place in old.places
            if place[0] not in mine
            and RegisteredView(old.fingerprint, (place,), {}, (), 0, ()).found(files) is not None
        )
        view = RegisteredView(
            view.fingerprint, (*view.places, *known), view.corpus, view.signals, view.num_rows, view.shards,
            view.kd_version,
        )  # fmt: skip
        if view == old:
            return
    files.write(view.file, [view.encode(store)])


def place_of(files: StoreFiles, folder: str | os.PathLike[str]) -> tuple[str, str]:
    """(absolute, relative to the store) of a view's folder."""
    text = os.fspath(folder)
    if "://" in text or "://" in files.address:
        return text if "://" in text else os.path.abspath(text), ""
    path = os.path.abspath(text)
    return path, os.path.relpath(path, files.address)


def read_views(files: StoreFiles, store: str) -> tuple[list[RegisteredView], list[Problem]]:
    """All registered views, and what is wrong with entries that are none."""
    views, problems = [], []
    for name in files.list(VIEWS):
        try:
            views.append(_decode(files.read(f"{VIEWS}/{name}", limit=MAX_VIEW_BYTES), name=name, store=store))
        except (ValueError, OSError, VerificationError) as error:
            what = error.what if isinstance(error, KdError) else str(error)
            problems.append(Problem(None, f"view {name.partition('.')[0]}", f"{VIEWS}/{name}", what))
    return views, problems


def lost_shards(views: Iterable[RegisteredView], num_shards: int) -> list[Problem]:
    """Shards from `num_shards` on that hold rows of a view: it was entered after their records, which are gone."""
    lost = sorted({shard for view in views for shard in view.shards if shard >= num_shards})
    what = "the record of its allocation is missing, and a view has rows in it"
    return [Problem(shard, "record", COMMITS, what) for shard in lost[:1000]]


def _decode(data: bytes, *, name: str, store: str) -> RegisteredView:
    match = VIEW_NAME.fullmatch(name)
    if match is None:
        raise ValueError("the name is not that of a view")
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        if fingerprint_of(content) != digest:
            raise ValueError("it was edited or damaged")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}; this kd reads {FORMAT}")
        if content["store"] != store:
            raise ValueError("it belongs to another store")
        if content["fingerprint"] != match[1]:
            raise ValueError("it names another view than its file")
        view = RegisteredView(
            match[1],
            tuple((_text(place["path"]), _text(place["relative"])) for place in content["places"]),
            {_text(key): _text(value) for key, value in content["corpus"].items()},
            tuple(_text(signal) for signal in content["signals"]),
            int(content["num_rows"]),
            from_ranges(content["shards"]),
            _text(content["kd_version"]),
        )
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"it does not describe a view: {error!r}") from None
    if not view.places:
        raise ValueError("it has no place")
    if view.encode(store) != data:
        raise ValueError("it is not written as kd writes it: it was edited or damaged")
    return view


def is_view(data: bytes, *, name: str, store: str) -> bool:
    """Whether these are the bytes of the entry with that file name."""
    try:
        _decode(data, name=name, store=store)
    except ValueError:
        return False
    return True


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def to_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as [first, last] pairs.

    >>> to_ranges([0, 1, 2, 7])
    [[0, 2], [7, 7]]
    """
    ranges: list[list[int]] = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0]):
        members = [number for _, number in group]
        ranges.append([members[0], members[-1]])
    return ranges


def from_ranges(ranges: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The numbers of [first, last] pairs; ValueError unless they ascend and are shard numbers."""
    numbers: list[int] = []
    least = 0
    for first, last in ranges:
        if type(first) is not int or type(last) is not int or not least <= first <= last < MAX_SHARDS:
            raise ValueError(f"{[first, last]!r} is no range of shards")
        if len(numbers) + last - first > MAX_SHARDS_OF_VIEW:
            raise ValueError("it names more shards than a store can be asked for")
        numbers += range(first, last + 1)
        least = last + 1
    return tuple(numbers)


def format_ranges(numbers: Iterable[int], most: int = 8) -> str:
    """For people.

    >>> format_ranges([0, 1, 2, 7])
    '0-2, 7'
    """
    ranges = to_ranges(numbers)
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    return ", ".join(texts) + (", ..." if len(ranges) > most else "")
