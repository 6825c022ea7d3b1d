"""The cache of remote files: checked, bounded, shared by threads and processes, and what is held stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from kd.pipeline.errors import UsageError, VerificationError
from kd.pipeline.store.files import Blob
from kd.pipeline.store.shard_cache import ShardCache, cache_bytes


def content(number: int, size: int = 100) -> bytes:
    return bytes([number]) * size


def blob(number: int, size: int = 100) -> Blob:
    return Blob(f"file-{number}", size, xxhash.xxh3_128_hexdigest(content(number, size)))


class Remote:
    """Yields contents and counts how often it was asked."""

    def __init__(self) -> None:
        self.downloads: list[int] = []

    def download(self, number: int, size: int = 100) -> Callable[[], Iterator[bytes]]:
        def blocks() -> Iterator[bytes]:
            self.downloads.append(number)
            yield content(number, size)[:30]
            yield content(number, size)[30:]

        return blocks


@pytest.fixture
def remote() -> Remote:
    return Remote()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 350)


def copies(cache: ShardCache) -> int:
    return sum(name.endswith("-100") for name in os.listdir(cache.folder))


def fetch(cache: ShardCache, remote: Remote, number: int) -> str:
    path = cache.fetch(blob(number), remote.download(number))
    # Times of files are coarse on some disks; the order of use must not hang on that.
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    time.sleep(0.01)
    return path


def test_a_file_is_downloaded_once_and_by_its_checksum(cache: ShardCache, remote: Remote) -> None:
    path = fetch(cache, remote, 1)
    assert Path(path).read_bytes() == content(1)
    renamed = Blob("another/store/file", *blob(1)[1:])
    assert cache.fetch(renamed, remote.download(9)) == path and remote.downloads == [1]


@pytest.mark.parametrize("data", [b"\1" * 99, b"\1" * 101, b"\1" * 99 + b"\2", b""])
def test_what_is_not_as_recorded_is_refused_and_not_kept(cache: ShardCache, remote: Remote, data: bytes) -> None:
    with pytest.raises(VerificationError, match=r"^file-1(:| has)"):
        cache.fetch(blob(1), lambda: iter([data]))
    assert not cache.has(blob(1)) and copies(cache) == 0
    assert not [name for name in os.listdir(cache.folder) if name.endswith(".part")]
    fetch(cache, remote, 1)


def test_what_was_used_longest_ago_goes_first(cache: ShardCache, remote: Remote) -> None:
    for number in (1, 2, 3):
        fetch(cache, remote, number)
    fetch(cache, remote, 1)
    fetch(cache, remote, 4)
    assert [number for number in range(1, 5) if cache.has(blob(number))] == [1, 3, 4]
    assert copies(cache) == 3


def test_what_is_held_stays_and_more_than_fits_cannot_be_held(
    cache: ShardCache, remote: Remote, tmp_path: Path
) -> None:
    other = ShardCache(cache.folder, cache.limit)
    assert cache.hold([blob(1), blob(2)])
    assert not other.hold([blob(3), blob(4)]) and not cache.hold([blob(3), blob(4)])
    assert other.hold([blob(1), blob(3)]), "what both hold counts once"
    for number in (1, 2, 3, 4, 5, 6):
        fetch(other, remote, number)
    assert all(cache.has(blob(number)) for number in (1, 2, 3))
    assert copies(cache) == 4, "only what was fetched last comes on top of what is held"
    del other
    fetch(cache, remote, 7)
    assert cache.hold([blob(1), blob(2), blob(7)]), "what nobody holds any more can go"


HOLD = """
import sys
from pathlib import Path
from kd.pipeline.store.files import Blob
from kd.pipeline.store.shard_cache import ShardCache

cache = ShardCache(Path(sys.argv[1]), 350)
print(cache.hold([Blob("a", 100, sys.argv[2]), Blob("b", 200, sys.argv[3])]), flush=True)
sys.stdin.read()
"""


def test_what_a_process_holds_is_free_when_it_is_killed(cache: ShardCache, remote: Remote) -> None:
    hashes = [blob(1).xxh3_128, blob(2, 200).xxh3_128]
    command = [sys.executable, "-c", HOLD, str(cache.folder), *hashes]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        for number in (1, 3, 4, 5):
            fetch(cache, remote, number)
        assert cache.has(blob(1)) and not cache.hold([blob(4)])
    finally:
        holder.kill()
        holder.wait()
    assert cache.hold([blob(3), blob(4), blob(5)])
    for number in (3, 4, 5):
        fetch(cache, remote, number)
    assert not cache.has(blob(1))


def test_threads_and_processes_that_want_the_same_file_download_it_once(cache: ShardCache, remote: Remote) -> None:
    started = threading.Event()

    def slow() -> Iterator[bytes]:
        remote.downloads.append(1)
        started.set()
        time.sleep(0.2)
        yield content(1)

    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(cache.fetch(blob(1), slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert remote.downloads == [1] and len(set(paths)) == 1 and len(paths) == 4


def test_what_a_killed_download_left_goes_and_a_living_one_stays(cache: ShardCache, remote: Remote) -> None:
    fetch(cache, remote, 1)
    left = cache.folder / f"{'0' * 32}-100.part"
    left.write_bytes(b"half")
    fetch(cache, remote, 2)
    assert not left.exists()


@pytest.mark.parametrize("checksum", ["../../outside", "", "A" * 32, "0" * 31])
def test_a_checksum_that_is_none_leads_nowhere(cache: ShardCache, remote: Remote, checksum: str) -> None:
    with pytest.raises(VerificationError, match="is no checksum"):
        cache.fetch(Blob("file", 100, checksum), remote.download(1))
    assert remote.downloads == []


def test_the_limit_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KD_SHARD_CACHE_BYTES", raising=False)
    assert cache_bytes() == 20 << 30
    monkeypatch.setenv("KD_SHARD_CACHE_BYTES", "1.5GB")
    assert cache_bytes() == 1_500_000_000
    monkeypatch.setenv("KD_SHARD_CACHE_BYTES", "lots")
    with pytest.raises(UsageError, match="KD_SHARD_CACHE_BYTES"):
        cache_bytes()
