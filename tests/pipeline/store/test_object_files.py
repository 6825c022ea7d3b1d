"""Stores on object stores, here fsspec's memory: what local ones hold, written without renames or file locks."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kd.pipeline.errors import IncompleteError, KdError, RefusedError, VerificationError
from kd.pipeline.store import TeacherStore, create_or_open, open_store, require_room
from kd.pipeline.store.files import open_files
from kd.pipeline.store.lease import Lease
from kd.pipeline.store.object_files import ObjectFiles

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}/store"
    with contextlib.suppress(FileNotFoundError):
        MEMORY.rm(f"/{name}", recursive=True)


@pytest.fixture
def captured(url: str, identity: Any, tools: Any) -> TeacherStore:
    store = create_or_open(url, identity, tools.layout)
    store.allocate(*tools.make_rows(30))
    tools.capture(store)
    store.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32)})
    return store


def key(store: TeacherStore, name: str) -> str:
    return store.url.removeprefix("memory:/") + f"/{name}"


def test_it_holds_the_same_bytes_as_a_local_store(
    captured: TeacherStore, make_store: Callable[..., Any], tools: Any
) -> None:
    local, *_ = make_store()
    local.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32)})
    assert captured.digest() == local.digest()
    remote = {name: captured.files.read(name) for name in captured.files.walk() if not name.startswith("claims/")}
    assert remote == {name: data for name, data in tools.tree(Path(local.url)).items() if name != ".lock"}
    assert captured.verify().ok and captured.verify().unrecorded == ()
    assert captured.files.list("claims") == [captured.files.list("claims")[0]], "claims of shards leave nothing"


def test_rows_are_gathered_from_mapped_copies_as_from_a_local_store(
    captured: TeacherStore, make_store: Callable[..., Any], tools: Any
) -> None:
    local, _, _, rows = make_store()
    reader, expected = captured.reader(rows=rows[:5]), local.reader()
    for signal in ("logits", "hidden.cls@2"):
        assert np.array_equal(reader.gather(signal, rows), expected.gather(signal, rows))
    for chosen in (rows[:5], rows[::-1]):
        values, lengths = reader.gather_tokens("hidden.tok@1", chosen)
        assert np.array_equal(values, expected.gather_tokens("hidden.tok@1", chosen)[0])
        assert np.array_equal(lengths, expected.lengths(chosen))
    array = reader._arrays["hidden.tok/01"]
    assert array.map is not None and array.mapped.tolist() == [True, False, False, False]
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(again.gather("logits", rows), expected.gather("logits", rows)) and again.shards == {0}


def test_arrays_that_do_not_fit_the_cache_are_read_shard_by_shard(
    captured: TeacherStore, tools: Any, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    expected, _ = captured.reader().gather_tokens("hidden.tok@2", range(24))
    size = captured.catalogue().files["hidden.tok/02"][0].bytes
    monkeypatch.setenv("KD_SHARD_CACHE_BYTES", str(3 * size))
    monkeypatch.setenv("KD_CACHE_HOME", str(own_cache / "small"))
    reader = open_store(captured.url).reader()
    values, _ = reader.gather_tokens("hidden.tok@2", range(24))
    assert np.array_equal(values, expected)
    assert reader._arrays["hidden.tok/02"].map is None
    kept = sum(path.stat().st_size for path in (own_cache / "small").rglob("*-*") if path.is_file())
    assert 0 < kept <= 3 * size


def test_a_cached_shard_is_not_asked_for_again(captured: TeacherStore, monkeypatch: pytest.MonkeyPatch) -> None:
    captured.reader().gather("logits", range(24))
    asked: list[str] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *args: Any, **kwargs: Any) -> bytes:
        asked.append(path)
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    open_store(captured.url).reader().gather("logits", range(24))
    assert asked and not [path for path in asked if "/c/" in path or "/index/" in path]


@pytest.mark.parametrize("change", ["flip", "cut", "delete"])
@pytest.mark.parametrize("name", ["logits/c/2/0", "index/00000001.parquet", "token_ids/c/0"])
def test_damage_to_an_object_is_found_at_read_and_by_verify(
    captured: TeacherStore, name: str, change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    captured.reader().gather("logits", range(24))  # copies of the sound objects hide nothing from verify
    data = bytearray(MEMORY.cat_file(key(captured, name)))
    data[len(data) // 2] ^= 1
    if change == "delete":
        MEMORY.rm_file(key(captured, name))
    else:
        MEMORY.pipe_file(key(captured, name), bytes(data if change == "flip" else data[:-1]))
    assert [problem.file for problem in captured.verify().problems] == [name]
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "fresh"))
    store = open_store(captured.url)
    with pytest.raises(VerificationError, match=name.replace(".", "\\.")):
        store.reader().gather("logits", range(24))
        store.read_tokens(0)


def test_a_writer_that_was_killed_leaves_nothing_that_counts(
    url: str, identity: Any, tools: Any, make_store: Callable[..., Any]
) -> None:
    """Objects stand under their names before they are recorded; the next writer replaces what is not its own."""
    store = create_or_open(url, identity, tools.layout)
    store.allocate(*tools.make_rows(30))
    store.declare(tools.specs)
    before = store.digest()
    MEMORY.pipe_file(key(store, "logits/c/0/0"), b"half of it")
    MEMORY.pipe_file(key(store, "sidecars/embeddings/tensors.safetensors"), b"half of it")
    assert store.digest() == before and not store.has_sidecar("embeddings")
    assert store.verify().ok and store.verify().unrecorded == ("logits/c/0/0",)
    tools.capture(store)
    store.put_sidecar("embeddings", {"word": np.arange(3, dtype=np.float32)})
    assert store.verify().ok and store.sidecar("embeddings")["word"].tolist() == [0.0, 1.0, 2.0]
    local, *_ = make_store()
    local.put_sidecar("embeddings", {"word": np.arange(3, dtype=np.float32)})
    assert store.digest() == local.digest()


def test_an_object_that_another_writer_replaced_is_put_back_before_it_is_recorded(
    url: str, identity: Any, tools: Any
) -> None:
    files = create_or_open(url, identity, tools.layout).files
    with files.stage("logits/c/0/0", [b"ours"]) as staged:
        MEMORY.pipe_file(url.removeprefix("memory:/") + "/logits/c/0/0", b"theirs")
        with files.lock():
            staged.publish()
    assert files.read("logits/c/0/0") == b"ours"
    with files.stage("logits/c/0/0", [b"ou", b"rs"]) as equal, files.lock():
        MEMORY.rm_file(url.removeprefix("memory:/") + "/logits/c/0/0")
        equal.publish()
    assert files.read("logits/c/0/0") == b"ours"


def test_of_two_writers_of_a_shard_the_first_commit_stands(url: str, identity: Any, tools: Any) -> None:
    store = create_or_open(url, identity, tools.layout)
    store.allocate(*tools.make_rows(30))
    store.declare(tools.specs)
    spec = tools.specs[0]
    writers = [store.writer(0, [spec]) for _ in range(2)]
    slots = np.arange(len(store.read_tokens(0).rows))
    for number, writer in enumerate(writers):
        writer.put_rows(spec.signal, slots, np.full((len(slots), 3), number, dtype=np.float32))
    assert writers[1].commit() is not None
    assert writers[0].commit() is None
    assert (store.reader().gather("logits", slots) == 1).all() and store.verify().ok


def test_threads_that_write_at_once_lose_nothing(url: str, identity: Any, tools: Any) -> None:
    store = create_or_open(url, identity, tools.layout)
    ids, segments = tools.make_rows(32)
    failed: list[BaseException] = []

    def work(part: int) -> None:
        try:
            mine = open_store(url)
            shards = mine.allocate(ids.slice(8 * part, 8 * part + 16), segments.slice(8 * part, 8 * part + 16)).shards
            tools.capture(mine, shards=shards)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert sum(record.rows for record in store.catalogue().allocations) == 32
    assert not store.missing(tools.specs) and store.verify().ok


def test_a_lost_lease_refuses_to_commit(url: str, identity: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer is held up under the lock until another has taken it; then it must not go on."""
    monkeypatch.setenv("KD_LEASE_SECONDS", "0.4")
    store = create_or_open(url, identity, tools.layout)
    store.allocate(*tools.make_rows(8))
    store.declare(tools.specs)
    spec = tools.specs[0]
    writer = store.writer(0, [spec])
    slots = np.arange(8)
    writer.put_rows(spec.signal, slots, np.zeros((8, 3), dtype=np.float32))
    monkeypatch.setattr(Lease, "renew", lambda self: True)  # as when a machine sleeps
    files, other = store.files, open_files(url)
    original = ObjectFiles.create

    def held_up(self: Any, name: str, data: bytes) -> bool:
        if self is files and name.startswith("commits/"):
            deadline = time.monotonic() + 10
            while (lease := other._take("lock")) is None:  # type: ignore[attr-defined]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            lease.release()
        return original(self, name, data)

    monkeypatch.setattr(ObjectFiles, "create", held_up)
    with pytest.raises(IncompleteError, match="ran out before the work under it was done") as caught:
        writer.commit()
    assert "run the same command again" in str(caught.value)
    assert len(store.shard_records(0)) == 1 and store.missing([spec]) == {0: (spec,)}


def test_a_claim_of_a_dead_writer_runs_out(captured: TeacherStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_LEASE_SECONDS", "0.3")
    first, second = open_store(captured.url), open_store(captured.url)
    claim = first.claim(0)
    assert claim is not None and second.claim(0) is None and second.claim(1) is not None
    monkeypatch.setattr(Lease, "renew", lambda self: False)
    deadline = time.monotonic() + 10
    while (taken := second.claim(0)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    claim.release()
    assert first.claim(0) is None, "who lost a claim does not end that of another"
    taken.release()
    assert first.claim(0) is not None


def test_a_worker_that_opens_the_store_for_every_shard_sees_how_long_a_claim_stands_still(
    captured: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_LEASE_SECONDS", "0.3")
    monkeypatch.setattr(Lease, "renew", lambda self: False)
    dead = open_store(captured.url).claim(0)
    assert dead is not None
    sent = pickle.dumps(captured)
    deadline = time.monotonic() + 10
    while (taken := pickle.loads(sent).claim(0)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    taken.release()


class Overwriting(MemoryFileSystem):
    """A file system that lets a file be created twice, as many S3 look-alikes did."""

    protocol = "kd-overwriting"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in its base
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite")


class ReadOnly(MemoryFileSystem):
    protocol = "kd-read-only"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("filesystem", "why"), [(Overwriting, "can be created once more"), (ReadOnly, "cannot create a file exclusively")]
)
def test_a_file_system_without_exclusive_creation_is_refused_and_told_what_it_lacks(
    filesystem: Any, why: str, identity: Any
) -> None:
    fsspec.register_implementation(filesystem.protocol, filesystem, clobber=True)
    with pytest.raises(RefusedError, match="cannot hold a store") as caught:
        create_or_open(f"{filesystem.protocol}://bucket/store", identity)
    assert why in str(caught.value) and "If-None-Match" in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, identity: Any) -> None:
    def url_to_fs(url: str, **kwargs: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    for scheme, extra in (("s3", "s3"), ("gs", "gcs")):
        with pytest.raises(RefusedError, match="not installed") as caught:
            create_or_open(f"{scheme}://bucket/store", identity)
        assert caught.value.fix == f'pip install "kd-pipeline[{extra}]"'


def test_an_unknown_scheme_is_refused(identity: Any) -> None:
    with pytest.raises(RefusedError, match="no URL that a store can be at"):
        create_or_open("gopher://host/store", identity)


def test_a_failing_network_is_one_sentence_that_names_the_object_and_the_shard(
    captured: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EndpointConnectionError(Exception):
        """As botocore's, which is no OSError."""

    def down(self: Any, path: str, *args: Any, **kwargs: Any) -> bytes:
        if "/logits/c/" in path:
            raise EndpointConnectionError("Could not connect to the endpoint URL")
        return original(self, path, *args, **kwargs)

    original = MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", down)
    with pytest.raises(KdError, match=r"logits, shard 0: memory://.*/logits/c/0/0 cannot be reached") as caught:
        captured.reader().gather("logits", range(8))
    assert not isinstance(caught.value, VerificationError)
    assert "Could not connect" in str(caught.value) and "same command again" in str(caught.value)


def test_denied_access_names_the_credentials(captured: TeacherStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", denied)
    with pytest.raises(RefusedError, match="access denied") as caught:
        open_store(captured.url)
    assert "AWS_" in str(caught.value)


def test_sizes_are_checked_before_anything_is_believed(captured: TeacherStore) -> None:
    MEMORY.pipe_file(key(captured, "zarr.json"), b" " * 100)
    with pytest.raises(VerificationError, match="more than 99 bytes"):
        captured.files.read("zarr.json", limit=99)
    assert captured.files.read("zarr.json", limit=100) == b" " * 100
    for name in ("", "../up", "a//b", "/etc/passwd", "a/../../b"):
        with pytest.raises(RefusedError, match="not the name of a file inside a store"):
            captured.files.path(name)


def test_tokenizers_and_the_like_are_copied_to_a_folder(captured: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.json").write_text("{}")
    (tmp_path / "in" / "deep" / "b.txt").write_text("b")
    captured.put_file_sidecar("tokenizer", tmp_path / "in")
    folder = captured.sidecar_folder("tokenizer")
    assert (folder / "a.json").read_text() == "{}" and (folder / "deep" / "b.txt").read_text() == "b"
    assert captured.sidecar_folder("tokenizer") == folder
    MEMORY.pipe_file(key(captured, "sidecars/tokenizer/a.json"), b"[]")
    with pytest.raises(VerificationError, match="tokenizer"):
        captured.sidecar_folder("tokenizer")


def test_a_place_with_other_things_in_it_and_an_empty_one_are_told_apart(url: str, identity: Any) -> None:
    with pytest.raises(RefusedError, match="does not exist"):
        open_store(url)
    MEMORY.pipe_file(url.removeprefix("memory:/") + "/notes.txt", b"mine")
    with pytest.raises(RefusedError, match=r"has no store\.json"):
        open_store(url)
    with pytest.raises(RefusedError, match="exists and is not a store"):
        create_or_open(url, identity)


def test_only_a_budget_limits_an_object_store(url: str) -> None:
    require_room(1 << 60, url=url)
    require_room(100, url=url, max_bytes=100)
    with pytest.raises(RefusedError, match="--max-bytes: 100 B"):
        require_room(101, url=url, max_bytes=100)


def test_compaction_and_repair_work_through_the_same_interface(captured: TeacherStore) -> None:
    before, records = captured.digest(), len(captured.files.list("commits"))
    captured.compact()
    assert len(captured.files.list("commits")) < records and open_store(captured.url).digest() == before
    assert captured.verify().ok
