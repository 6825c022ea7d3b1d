"""A store may come from anywhere: nothing in it leads out of it, makes us allocate, or runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.fingerprint import canonical_json
from kd.pipeline.store import TeacherStore, create_or_open, files, open_store
from kd.pipeline.store.compacted import digest_of
from kd.pipeline.store.layout import record_file
from kd.pipeline.store.records import decode_record


@pytest.fixture
def store(make_store) -> TeacherStore:
    store, *_ = make_store(20)
    return store


def forge(store: TeacherStore, change, *, allocation: bool = False, shard: int = 0) -> tuple[str, bytes]:
    """A record with something changed, under a name that fits: (file name, bytes)."""
    record = next(r for r in store.shard_records(shard) if (r.index is not None) == allocation)
    content = json.loads(record.encode())
    change(content)
    data = canonical_json(content) + b"\n"
    number = content["shard"] if isinstance(content["shard"], int) else 0
    return Path(record_file(number, digest_of(data))).name, data


def set_at(*path, value):
    def change(content) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


CHANGES = [
    (set_at("arrays", 0, "file", value="../../../etc/passwd"), "got '../../../etc/passwd'"),
    (set_at("arrays", 0, "file", value="/etc/passwd"), "got '/etc/passwd'"),
    (set_at("arrays", 0, "array", value="../outside"), "no signal lives at"),
    (set_at("arrays", 0, "array", value="logits/../../x"), "no signal lives at"),
    (set_at("arrays", 0, "array", value="logits"), "is logits/c/0/0|entries of shape|got"),
    (set_at("arrays", 0, "shape", value=[1 << 60]), "entries of shape"),
    (set_at("arrays", 0, "shape", value=[-1]), "entries of shape"),
    (set_at("arrays", 0, "shape", value=[1.5]), "list of numbers"),
    (set_at("arrays", 0, "shape", value="3"), "list of numbers"),
    (set_at("arrays", 0, "dtype", value="object"), "cannot be stored as 'object'"),
    (set_at("arrays", 0, "encoding", value="pickle"), "unknown encoding"),
    (set_at("arrays", 0, "bytes", value=1 << 60), "'bytes' must be"),
    (set_at("arrays", 0, "bytes", value=-5), "'bytes' must be"),
    (set_at("arrays", 0, "bytes", value=True), "'bytes' must be"),
    (set_at("arrays", 0, "xxh3_128", value="../" * 10), "32 hex digits"),
    (set_at("arrays", 0, value=7), "must be an object"),
    (set_at("arrays", value=[]), "must be a list of shard files"),
    (set_at("rows", value=1 << 40), "'rows' must be 1 to 8"),
    (set_at("rows", value=0), "'rows' must be 1 to 8"),
    (set_at("tokens", value=65), "'tokens' must be"),
    (set_at("shard", value=10**9), "name is not that of a record|'shard' must be"),
    (set_at("shard", value="0"), "'shard' must be"),
    (set_at("format", value=2), "this kd reads 1"),
    (set_at("store", value="0" * 32), "belongs to another store"),
    (set_at("allocation", value="x"), "32 hex digits"),
    (set_at("extra", value=1), "not written as kd writes records"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_forged_record_is_refused_for_what_is_wrong_with_it(store: TeacherStore, change, words: str) -> None:
    name, data = forge(store, change)
    with pytest.raises(ValueError, match=words):
        decode_record(data, name=name, store=store.store_digest, layout=store.layout)
    Path(store.url, "commits", name).write_bytes(data)
    with pytest.raises(VerificationError, match="is damaged"):
        open_store(store.url).catalogue()
    assert not store.verify().ok


def test_a_forged_allocation_is_refused_for_what_is_wrong_with_it(store: TeacherStore) -> None:
    for change, words in [
        (set_at("index", "file", value="../../x.parquet"), r"got '\.\./\.\./x\.parquet'"),
        (set_at("index", "bytes", value=1 << 50), "'bytes' must be"),
        (set_at("arrays", value=[]), "must be a list"),
        (lambda content: content["arrays"].pop(), "names token_ids and segment_ids, and nothing else"),
    ]:
        name, data = forge(store, change, allocation=True)
        with pytest.raises(ValueError, match=words):
            decode_record(data, name=name, store=store.store_digest, layout=store.layout)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_bytes_that_are_no_record_are_refused(store: TeacherStore, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|must be|object"):
        decode_record(data, name=f"00000000.{digest_of(data)}.json", store=store.store_digest, layout=store.layout)


def test_a_shard_number_far_away_costs_no_memory(store: TeacherStore) -> None:
    def far(content) -> None:
        content["shard"] = 99_999_999
        for array in content["arrays"]:
            array["file"] = array["file"].replace("/c/0", "/c/99999999")

    name, data = forge(store, far)
    Path(store.url, "commits", name).write_bytes(data)
    with pytest.raises(VerificationError, match="allocation is missing"):
        open_store(store.url).catalogue()


def test_a_size_that_lies_is_noticed_before_anything_is_mapped(store: TeacherStore) -> None:
    """A record that names more rows than its files hold, itself well formed."""
    from dataclasses import replace

    allocation = next(r for r in store.shard_records(0) if r.index is not None)
    commit = next(r for r in store.shard_records(0) if r.index is None)
    for record in (allocation, commit):
        Path(store.url, record.file).unlink()
    more = replace(allocation, rows=allocation.rows - 1)
    store.files.create(more.file, more.encode())
    new = replace(commit, rows=more.rows, allocation=more.digest)
    store.files.create(new.file, new.encode())
    with pytest.raises(VerificationError, match=r"rows, its record says"):
        open_store(store.url).reader().gather("logits", [0])


def test_huge_small_files_are_refused_before_they_are_read(store: TeacherStore) -> None:
    def truncate_to(name: str, size: int) -> Path:
        path = Path(store.url, name)
        with open(path, "r+b") as file:
            file.truncate(size)  # sparse
        return path

    truncate_to(store.shard_records(0)[0].file, 1 << 40)
    with pytest.raises(VerificationError, match="at most 1048576 are expected"):
        open_store(store.url).catalogue()
    truncate_to("index/00000001.parquet", 1 << 40)
    assert any("its record says" in problem.what for problem in store.verify().problems)
    truncate_to("store.json", 1 << 40)
    with pytest.raises(VerificationError, match="at most 16777216 are expected"):
        open_store(store.url)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "a//b", "", ".", "..", "a/./b", "a\0b", "a\nb", ".hidden", "~root", "-rf"]
)
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="not the name of a file inside a store"):
        files.open_files(tmp_path).path(name)


@pytest.mark.parametrize("where", ["file", "folder", "store.json", "commits"])
def test_links_lead_nowhere(store: TeacherStore, tmp_path: Path, where: str) -> None:
    root = Path(store.url)
    link = {"file": root / "logits/c/0/0", "folder": root / "logits/c/0"}.get(where, root / where)
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match=r"a link that leads out of its place|damaged"):
        open_store(root).reader().gather("logits", [0])


@pytest.mark.parametrize("link", ["logits", "hidden.tok/02/c", "index", "commits", "sidecars", ".staging", ".lock"])
def test_nothing_is_written_through_a_link_that_leads_out(
    store: TeacherStore, tmp_path: Path, tools, link: str
) -> None:
    outside, place = tmp_path / "outside", Path(store.url, link)
    if place.is_dir():
        place.rename(outside)
    else:
        place.unlink(missing_ok=True)
        outside.mkdir() if link == "sidecars" else outside.write_text("mine")
    if outside.is_dir():
        (outside / "mine").write_text("mine")
    before = tools.tree(tmp_path / "outside") if outside.is_dir() else outside.read_text()
    place.symlink_to(outside)
    with pytest.raises((KdError, OSError)):
        again = create_or_open(store.url, store.identity)
        again.allocate(*tools.make_rows(12, seed=1))
        tools.capture(again)
        again.put_sidecar("embeddings", {"w": np.zeros(2, dtype=np.float32)})
    assert (tools.tree(tmp_path / "outside") if outside.is_dir() else outside.read_text()) == before


def test_a_store_may_itself_stand_behind_a_link(store: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.url)
    assert open_store(tmp_path / "link").verify().ok


@pytest.mark.parametrize("edit", ["[]", "null", "{}", "not json", '{"format": "kd-store", "version": 9}', "\x00"])
def test_a_store_json_that_is_none_is_refused_in_one_sentence(store: TeacherStore, edit: str) -> None:
    Path(store.url, "store.json").write_text(edit)
    with pytest.raises(KdError, match=r"store\.json is not a store description|format version 9"):
        open_store(store.url)


def test_no_module_of_the_store_can_unpickle() -> None:
    from kd.pipeline import store as package

    folder = Path(package.__file__).parent
    for path in folder.glob("*.py"):
        assert not re.search(r"\b(pickle|marshal|shelve|eval|exec|allow_pickle=True)\b\(?", path.read_text()), path
