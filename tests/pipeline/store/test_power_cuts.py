"""What has a name is on the disk, and what a record names has one: a power cut at any moment leaves no record without.

No test here cuts the power. The calls that a file system answers for are logged, and their order is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.store import TeacherStore, create_or_open


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """("write" | "sync" | "name", path), in order; a name is given by a rename or a link."""
    log: list[tuple[str, str]] = []

    def logged(function: Callable[..., Any], verb: str, path_of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = str(path_of(*args))
            result = function(*args, **kwargs)
            log.append((verb, path))
            return result

        return call

    def opened(descriptor: int, *_: Any) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "write", logged(os.write, "write", opened))
    monkeypatch.setattr(os, "fsync", logged(lambda descriptor: None, "sync", opened))
    for name in ("rename", "link"):
        monkeypatch.setattr(os, name, logged(getattr(os, name), "name", lambda old, new: f"{old}\n{new}"))
    return log


def check(calls: list[tuple[str, str]]) -> list[str]:
    """The names given, in order, each proven to be on the disk when the next record got its own."""
    unsynced: set[str] = set()
    given: list[str] = []
    folders: set[str] = set()
    for verb, path in calls:
        if verb == "write":
            unsynced.add(path)
        elif verb == "sync":
            unsynced.discard(path)
            folders.discard(path)
        else:
            old, new = path.split("\n")
            assert old not in unsynced, f"{new} has its name before its bytes"
            if "/commits/" in new:
                assert not folders, f"{new} is there before the names in {folders}"
            folders.add(os.path.dirname(new))
            given.append(new)
    assert not unsynced and not folders
    return given


def test_records_come_last(tmp_path: Path, identity, tools, calls: list[tuple[str, str]]) -> None:
    store: TeacherStore = create_or_open(tmp_path / "s", identity, tools.layout)
    check(calls)
    calls.clear()
    store.allocate(*tools.make_rows(20))
    shards = store.catalogue().num_shards
    given = check(calls)
    assert [Path(name).parent.name == "commits" for name in given[-4:]] == [False] * 3 + [True]
    assert sum("/commits/" in name for name in given) == shards > 1
    calls.clear()
    tools.capture(store)
    given = check(calls)
    assert sum("/commits/" in name for name in given) == shards
    assert sum("/c/" in name for name in given) == shards * len(tools.specs)
    calls.clear()
    store.compact()
    assert len(check(calls)) == 1
