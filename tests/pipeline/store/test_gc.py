"""Garbage collection takes exactly what no standing view needs, and what is captured again is what went."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import RefusedError, VerificationError
from kd.pipeline.store import TeacherStore, open_store
from kd.pipeline.store.gc import collect_garbage
from kd.pipeline.store.records import FileRecord, Record

Enter = Callable[..., Path]


@pytest.fixture
def store(make_store) -> TeacherStore:
    store, *_ = make_store(40)
    assert store.catalogue().num_shards == 5
    return store


@pytest.fixture
def enter(store: TeacherStore, tmp_path: Path, tools) -> Enter:
    """`enter(name, specs, shards)`: a finished view, entered into the register."""

    def enter(name: str, specs, shards) -> Path:
        folder, fingerprint = tmp_path / name, f"{len(name):02x}{ord(name[0]):02x}" * 8
        store.enter_view(
            fingerprint,
            folder,
            corpus={"name": name},
            signals=[tools.specs[i] for i in specs],
            num_rows=1,
            shards=shards,
        )
        folder.mkdir()
        write_manifest(folder, {"kind": "view", "fingerprint": fingerprint})
        return folder

    return enter


def held(store: TeacherStore) -> dict[str, list[int]]:
    files = open_store(store.url).catalogue().files
    return {path: sorted(shards) for path, shards in files.items() if not path.endswith("_ids")}


def test_what_no_view_needs_is_listed_and_nothing_is_changed(
    store: TeacherStore, enter: Enter, tmp_path: Path, tools
) -> None:
    enter("mine", [0, 3], [0, 1])
    before = tools.tree(tmp_path)
    garbage = collect_garbage(store)
    assert tools.tree(tmp_path) == before
    said = garbage.to_json()
    assert said["signals"]["logits"]["shards"] == said["signals"]["hidden.tok@2"]["shards"] == [[2, 4]]
    assert said["signals"]["hidden.tok@1"]["shards"] == [[0, 4]]
    assert said["bytes"] == garbage.bytes == sum(file.bytes for file in garbage.files) > 0
    assert said["views_kept"] == [str(tmp_path / "mine")] and said["views_gone"] == []


@pytest.mark.parametrize("compacted", [False, True])
def test_it_goes_and_comes_back_when_it_is_captured_again(
    store: TeacherStore, enter: Enter, tools, compacted: bool
) -> None:
    enter("mine", [0], [0, 1])
    enter("other", [0, 3], [1, 2])
    digest, tokens = store.digest(), [store.read_tokens(shard).token_ids for shard in range(5)]
    if compacted:
        store.compact()
    collect_garbage(store, delete=True)
    assert held(store) == {"logits": [0, 1, 2], "hidden.tok/02": [1, 2]}
    report = open_store(store.url).verify()
    assert report.ok and not report.unrecorded
    assert not Path(store.url, "hidden.tok/01/c/0/0").exists()
    assert [open_store(store.url).read_tokens(shard).token_ids for shard in range(5)] == tokens
    assert collect_garbage(store, delete=True).files == ()
    assert tools.capture(open_store(store.url)) == 5
    assert open_store(store.url).digest() == digest and open_store(store.url).verify().ok


def test_a_view_whose_folder_is_gone_is_named_and_needs_nothing(
    store: TeacherStore, enter: Enter, tmp_path: Path
) -> None:
    enter("mine", [0], [0, 1, 2, 3, 4])
    shutil.rmtree(enter("other", [1, 2, 3], [0, 1, 2, 3, 4]))
    said = collect_garbage(store, delete=True)
    assert list(said.gone.values()) == [str(tmp_path / "other")]
    assert held(store) == {"logits": [0, 1, 2, 3, 4]}
    assert [view.corpus["name"] for view in store.views()] == ["mine"]


def test_nothing_is_deleted_when_no_view_is_left(store: TeacherStore, enter: Enter, tmp_path: Path, tools) -> None:
    with pytest.raises(RefusedError, match="no view was ever entered"):
        collect_garbage(store, delete=True)
    shutil.rmtree(enter("mine", [0], [0]))
    before = tools.tree(tmp_path)
    with pytest.raises(RefusedError, match="all its signals would go") as refused:
        collect_garbage(store, delete=True)
    assert str(tmp_path / "mine") in str(refused.value) and "--keep-view" in str(refused.value)
    assert tools.tree(tmp_path) == before


def test_a_reader_that_mapped_a_file_keeps_it(store: TeacherStore, enter: Enter) -> None:
    enter("mine", [0], [0])
    reader = store.reader()
    values = reader.gather_tokens("hidden.tok@1", np.arange(16))[0].copy()
    collect_garbage(store, delete=True)
    np.testing.assert_array_equal(reader.gather_tokens("hidden.tok@1", np.arange(16))[0], values)
    with pytest.raises(RefusedError, match="holds no hidden"):
        open_store(store.url).reader().gather_tokens("hidden.tok@1", [0])


def test_leftovers_go_and_files_of_others_stay(store: TeacherStore, enter: Enter) -> None:
    enter("mine", [0, 1, 2, 3], range(5))
    store.files.write("hidden.tok/01/c/99/0", [b"left by a killed process"])
    store.files.write("index/00000099.parquet", [b"left"])
    Path(store.url, "notes.txt").write_text("mine")
    with store.files.stage("logits/c/98/0", [b"slow"]) as staged:
        said = collect_garbage(store, delete=True)
        staged.publish()
    assert [name for name, _ in said.leftovers] == ["hidden.tok/01/c/99/0", "index/00000099.parquet"]
    assert said.bytes == len(b"left by a killed process") + len(b"left") and said.files == ()
    assert said.foreign == ("notes.txt",)
    assert Path(store.url, "notes.txt").exists() and Path(store.url, "logits/c/98/0").exists()


def test_records_that_supersede_one_another_end_in_an_order_that_is_always_sound(
    store: TeacherStore, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 0 was computed anew, to other bytes; then one of its signals goes."""
    (old,) = (record for record in store.shard_records(0) if record.index is None)
    files = {file.file: file for file in old.files}
    data = Path(store.url, "logits/c/0/0").read_bytes()
    changed = bytes([data[0] ^ 1]) + data[1:]
    Path(store.url, "logits/c/0/0").write_bytes(changed)
    from kd.pipeline.store.records import hash_parts

    again = FileRecord(files["logits/c/0/0"].spec, 0, *hash_parts([changed]))
    new: Record = replace(old, files=(again,), supersedes=(old.digest,))
    store.files.create(new.file, new.encode())
    assert store.verify().ok
    enter("mine", [0, 1], range(5))

    remove = type(store.files).remove

    def checked(files, *names: str) -> None:
        for name in names:
            remove(files, name)
            report = open_store(store.url).verify()
            assert report.ok, f"after {name} went: {report.problems}"

    monkeypatch.setattr(type(store.files), "remove", checked)
    collect_garbage(store, delete=True)
    assert held(store) == {"logits": [0, 1, 2, 3, 4], "hidden.cls/02": [0, 1, 2, 3, 4]}
    assert Path(store.url, "logits/c/0/0").read_bytes() == changed
    assert not open_store(store.url).verify().unrecorded


def test_a_damaged_register_or_record_stops_it(store: TeacherStore, enter: Enter, tmp_path: Path, tools) -> None:
    enter("mine", [0], [0])
    (entry,) = Path(store.url, "views").iterdir()
    data = entry.read_bytes()
    entry.write_bytes(data.replace(b'"num_rows": 1', b'"num_rows": 2'))
    before = tools.tree(tmp_path)
    with pytest.raises(VerificationError, match="edited or damaged"):
        collect_garbage(store, delete=True)
    assert tools.tree(tmp_path) == before


@pytest.mark.parametrize("how", ["compacted", "loose", "no view"])
def test_rows_whose_records_are_gone_are_damage_and_stop_whatever_would_write_over_them(
    store: TeacherStore, enter: Enter, tmp_path: Path, tools, how: str
) -> None:
    if how != "no view":
        enter("mine", range(4), range(5))
    if how == "loose":
        for record in store.shard_records(4):
            Path(store.url, record.file).unlink()
    else:
        store.compact()
        (compacted,) = Path(store.url, "commits").iterdir()
        compacted.unlink()
    before = tools.tree(tmp_path)
    with pytest.raises(VerificationError, match="is damaged") as refused:
        collect_garbage(open_store(store.url), delete=True)
    assert "shard 4, record" in str(refused.value)
    if how != "no view":
        assert "shard 4, record" in "".join(map(str, open_store(store.url).verify().problems))
        with pytest.raises(VerificationError, match="a view has rows in it"):
            open_store(store.url).allocate(*tools.make_rows(7, seed=3))
    assert tools.tree(tmp_path) == before


def test_a_file_that_a_view_needs_stays_when_its_record_is_gone(store: TeacherStore, enter: Enter) -> None:
    enter("mine", [0], range(5))
    (record,) = (record for record in store.shard_records(2) if record.index is None)
    Path(store.url, record.file).unlink()
    said = collect_garbage(open_store(store.url), delete=True)
    assert said.unrecorded == ("logits/c/2/0",) and Path(store.url, "logits/c/2/0").exists()
    assert "hidden.cls/02/c/2/0" in {name for name, _ in said.leftovers}


def test_a_view_of_a_store_that_began_as_a_copy_is_not_entered(store: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    pq.write_table(pa.table({"row": pa.array([0, 99 * 8], pa.int64())}), tmp_path / "twin/examples.parquet")
    content = {"store_digest": store.store_digest, "signals": ["logits"], "corpus": {}}
    write_manifest(tmp_path / "twin", {"kind": "view", "fingerprint": "ab" * 16, "content": content})
    with pytest.raises(RefusedError, match=r"rows in shard 99, and store .* has 5 shards"):
        collect_garbage(store, keep_views=[tmp_path / "twin"], delete=True)
    assert store.views() == []
