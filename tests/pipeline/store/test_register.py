"""The register of views: what it says of a view and its folders, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import VerificationError
from kd.pipeline.store import Signal, TeacherStore
from kd.pipeline.store.register import VIEW_NAME, format_ranges, from_ranges, to_ranges

PRINT = "ab" * 16


def enter(store: TeacherStore, folder: Path, fingerprint: str = PRINT, shards=(0, 1, 3)) -> None:
    store.enter_view(
        fingerprint, folder, corpus={"name": "toy", "fingerprint": "c" * 32}, signals=[Signal("hidden.tok", 1)],
        num_rows=12, shards=shards,
    )  # fmt: skip


def finish(folder: Path, fingerprint: str = PRINT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, {"kind": "view", "fingerprint": fingerprint})


@pytest.fixture
def store(make_store) -> TeacherStore:
    store, *_ = make_store(30)
    return store


def test_a_view_is_entered_once_and_inspect_says_whether_its_folder_is_there(
    store: TeacherStore, tmp_path: Path, tools
) -> None:
    enter(store, tmp_path / "view")
    before = tools.tree(tmp_path / "store")
    enter(store, tmp_path / "view")
    assert tools.tree(tmp_path / "store") == before
    (said,) = store.inspect()["views"]
    assert said == {
        "fingerprint": PRINT, "corpus": "toy", "path": str(tmp_path / "view"), "there": False, "rows": 12,
        "signals": ["hidden.tok@1"], "shards": [[0, 1], [3, 3]],
    }  # fmt: skip
    finish(tmp_path / "view")
    assert store.inspect()["views"][0]["there"] is True
    finish(tmp_path / "view", "cd" * 16)  # made again with other settings
    assert store.inspect()["views"][0]["there"] is False
    assert store.verify().ok and not store.verify().unrecorded


def test_a_view_being_made_and_one_set_aside_are_there(store: TeacherStore, tmp_path: Path) -> None:
    from kd.pipeline.fingerprint import fingerprint

    identity = {"stage": "cache-teacher"}
    enter(store, tmp_path / "view", fingerprint(identity))
    (tmp_path / "view").mkdir()
    assert not store.inspect()["views"][0]["there"]
    (tmp_path / "view" / "unfinished.json").write_text(json.dumps({"identity": identity}))
    assert store.inspect()["views"][0]["there"]
    shutil.rmtree(tmp_path / "view")
    finish(tmp_path / "view.replaced", fingerprint(identity))
    assert store.inspect()["views"][0]["there"]


def test_a_view_that_moved_with_its_store_is_found(store: TeacherStore, tmp_path: Path) -> None:
    finish(tmp_path / "view")
    enter(store, tmp_path / "view")
    (tmp_path / "elsewhere").mkdir()
    for name in ("store", "view"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    from kd.pipeline.store import open_store

    (said,) = open_store(tmp_path / "elsewhere" / "store").inspect()["views"]
    assert said["there"] and Path(said["path"]) == tmp_path / "elsewhere" / "view"


def test_a_second_place_is_added_and_one_that_is_gone_is_left_out(store: TeacherStore, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        finish(tmp_path / name)
        enter(store, tmp_path / name)
        if name == "one":
            shutil.rmtree(tmp_path / name)
    (view,) = store.views()
    assert [Path(path).name for path, _ in view.places] == ["three", "two"]
    shutil.rmtree(tmp_path / "three")
    assert store.inspect()["views"][0]["there"]


@pytest.mark.parametrize("edit", ["num_rows", "digest", "garbage", "name", "blank", "huge"])
def test_a_damaged_entry_is_found(store: TeacherStore, tmp_path: Path, edit: str) -> None:
    enter(store, tmp_path / "view")
    path = Path(store.url, "views", f"{PRINT}.json")
    content = json.loads(path.read_bytes())
    if edit in ("num_rows", "digest"):
        path.write_text(json.dumps({**content, edit: 7 if edit == "num_rows" else "0" * 32}))
    elif edit == "garbage":
        path.write_bytes(b"\xff[")
    elif edit == "name":
        path.rename(path.with_name("cd" * 16 + ".json"))
    elif edit == "blank":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        with open(path, "r+b") as file:
            file.truncate(1 << 40)
    (problem,) = store.verify().problems
    assert problem.file.startswith("views/") and problem.signal is not None
    with pytest.raises(VerificationError, match="is damaged"):
        store.views()
    store.reader()  # what it holds can be read all the same


def test_ranges_there_and_back() -> None:
    numbers = (0, 1, 2, 5, 9, 10)
    assert from_ranges(to_ranges(numbers)) == numbers and to_ranges(()) == []
    assert format_ranges(range(0, 40, 2), most=2) == "0, 2, ..."
    for bad in ([[3, 1]], [[0, 2], [2, 3]], [[-1, 0]], [[0, 10**9]], [[0, True]], [[0, 99_999_999]]):
        with pytest.raises(ValueError, match=r"range of shards|more shards"):
            from_ranges(bad)
    assert VIEW_NAME.fullmatch("../x.json") is None
