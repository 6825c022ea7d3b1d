"""A store on S3, as moto's server plays it: what `test_object_files.py` shows in memory holds over the wire."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.store import StoreLayout, TeacherStore, create_or_open, open_store
from kd.pipeline.store import object_files as object_files_module
from kd.pipeline.store.files import open_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small(tools: Any) -> StoreLayout:
    return StoreLayout(rows_per_shard=8, tokens_per_shard=64, chunk_bytes=64)


def fill(url: str, identity: Any, tools: Any, layout: StoreLayout) -> TeacherStore:
    store = create_or_open(url, identity, layout)
    store.allocate(*tools.make_rows(16))
    tools.capture(store, tools.specs[:3])
    return store


@pytest.mark.slow
def test_a_store_on_s3_equals_a_local_one_and_reads_like_it(
    s3_url: str, identity: Any, tools: Any, small: StoreLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, local = (fill(url, identity, tools, small) for url in (f"{s3_url}/", str(tmp_path / "local")))
    assert remote.digest() == local.digest() == open_store(s3_url).digest()
    assert remote.verify().ok and not remote.verify().unrecorded
    rows = np.arange(16)[::-1]
    reader, expected = open_store(s3_url).reader(), local.reader()
    assert np.array_equal(reader.gather("logits", rows), expected.gather("logits", rows))
    values, _ = reader.gather_tokens("hidden.tok@1", rows)
    assert np.array_equal(values, expected.gather_tokens("hidden.tok@1", rows)[0])
    array = next(iter(reader._arrays.values()))
    assert array.map is not None
    remote.compact()
    assert open_store(s3_url).digest() == local.digest()

    # Damage: a copy made before hides nothing, and a reader without one is told.
    filesystem, path = fsspec.core.url_to_fs(f"{s3_url}/logits/c/1/0")
    sound = filesystem.cat_file(path)
    for bad, what in ((sound[:-1], "bytes, its record says"), (bytes([sound[0] ^ 1]) + sound[1:], "checksum")):
        filesystem.pipe_file(path, bad)
        assert [problem.file for problem in remote.verify().problems] == ["logits/c/1/0"]
        monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / what))
        with pytest.raises(VerificationError, match=f"logits, shard 1: .*{what}"):
            open_store(s3_url).reader().gather("logits", rows)


def test_a_large_object_goes_in_parts_and_is_created_exclusively_too(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    files = open_files(s3_url)
    original = S3FileSystem._pipe_file

    async def in_parts(self: Any, path: str, data: bytes, chunksize: int = 0, **kwargs: Any) -> Any:
        return await original(self, path, data, chunksize=5 << 20, **kwargs)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", in_parts)
    monkeypatch.setattr(object_files_module, "BLOCK_BYTES", 4 << 20)
    data = np.random.default_rng(0).bytes(11 << 20)
    assert files.create("logits/c/0/0", data)
    assert not files.create("logits/c/0/0", bytes(11 << 20))
    assert b"".join(files.blocks("logits/c/0/0", 4 << 20)) == data


def test_a_bucket_that_is_not_there_is_refused(s3_server: str, identity: Any) -> None:
    with pytest.raises(RefusedError, match="make the bucket first"):
        create_or_open("s3://kd-no-such-bucket/store", identity)
    with pytest.raises(RefusedError, match="does not exist"):
        open_store("s3://kd-no-such-bucket/store")


def test_an_empty_object_is_damage_and_no_crash(s3_url: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(f"{s3_url}/store.json")
    filesystem.pipe_file(path, b"")
    with pytest.raises(VerificationError, match="not a store description"):
        open_store(s3_url)


@pytest.mark.slow
def test_a_server_that_is_gone_is_one_sentence(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from kd.pipeline.store import open_store; open_store(sys.argv[1])"
    environment = os.environ | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run([sys.executable, "-c", code, s3_url], env=environment, capture_output=True, text=True)
    assert "KdError: s3://" in done.stderr and "cannot be reached" in done.stderr, done.stderr[-3000:]
    assert "EndpointConnectionError" in done.stderr


CLAIM = """
import sys, time
from kd.pipeline.store import open_store
store = open_store(sys.argv[1])
lock = store.files.lock()
claim = store.claim(0)
if sys.argv[2] == "lock":
    lock.__enter__()
print("held" if claim else "refused", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_what_a_killed_process_holds_runs_out_and_what_a_living_one_holds_does_not(
    s3_url: str, identity: Any, tools: Any, small: StoreLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_LEASE_SECONDS", "4")
    store = create_or_open(s3_url, identity, small)
    store.allocate(*tools.make_rows(8))
    command = [sys.executable, "-c", CLAIM, s3_url, "lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            assert store.claim(0) is None
            time.sleep(0.1)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    tools.capture(store, tools.specs[:1])  # waits until the lock has run out
    until = time.monotonic() + 30.0
    while (claim := store.claim(0)) is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    claim.release()
    assert [name.partition(".")[0] for name in store.files.list("claims")] == ["lock"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import SPECS, capture, make_rows
from kd.pipeline.store import open_store

store = open_store(sys.argv[2])
part = int(sys.argv[3])
ids, segments = make_rows(24)
allocation = store.allocate(ids.slice(8 * part, 8 * part + 16), segments.slice(8 * part, 8 * part + 16))
capture(store, SPECS[: 2 + part], allocation.shards)
"""


@pytest.mark.slow
def test_two_processes_that_write_at_once_lose_and_double_nothing(
    s3_url: str, identity: Any, tools: Any, small: StoreLayout
) -> None:
    store = create_or_open(s3_url, identity, small)
    here = str(Path(__file__).parent)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, here, s3_url, str(part)], stderr=subprocess.PIPE, text=True)
        for part in range(2)
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said[-3000:]
    assert sum(record.rows for record in store.catalogue().allocations) == 24
    tools.capture(store)
    report = store.verify()
    assert report.ok and not report.unrecorded


@pytest.mark.slow
def test_errors_of_the_network_are_no_damage(
    s3_url: str, identity: Any, tools: Any, small: StoreLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` that cannot reach an object says so; it does not call the object damaged."""
    store = fill(s3_url, identity, tools, small)
    original: Callable[..., Any] = store.files.filesystem.cat_file  # type: ignore[attr-defined]

    def broken(path: str, *args: Any, **kwargs: Any) -> Any:
        if "/logits/c/" in path:
            raise TimeoutError("timed out")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(store.files.filesystem, "cat_file", broken)  # type: ignore[attr-defined]
    with pytest.raises(KdError, match="cannot be reached") as caught:
        store.verify()
    assert not isinstance(caught.value, VerificationError)
