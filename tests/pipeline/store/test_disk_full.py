"""A full disk, wherever it is met: one clear error, a sound store, and the same bytes once there is room.

A real small file system where mounting is allowed; everywhere, a limit on the size of files, which makes the same calls
fail (EFBIG instead of ENOSPC).
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from kd.pipeline.artifact import atomic_write_bytes
from kd.pipeline.disk import disk_full, is_disk_full
from kd.pipeline.errors import IncompleteError, KdError
from kd.pipeline.stage import Stage, StageContext, StageResult, execute, option
from kd.pipeline.store import create_or_open, open_store
from kd.pipeline.store.scratch import Appended

Work = Callable[[Path], None]
WORDS = "no space left on the disk of "


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 1 MB; the test is skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if not done or done.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def room_of(disk: Path, size: int) -> Iterator[None]:
    """Only `size` bytes are free on a disk; more after the block."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(max(0, free - size)))
    try:
        yield
    finally:
        ballast.unlink()


@pytest.fixture
def work(identity, tools) -> Work:
    """What cache-teacher does, with two signals and a sidecar, then compaction."""

    def work(folder: Path) -> None:
        ids, segments = tools.make_rows(40)
        store = create_or_open(folder, identity, tools.layout)
        store.allocate(ids, segments)
        store.put_sidecar("embeddings", {"word": np.arange(600, dtype=np.float32)})
        tools.capture(store, [tools.specs[0], tools.specs[3]])
        store.enter_view("ab" * 16, "/view", corpus={}, signals=["logits"], num_rows=40, shards=range(5))
        store.compact()

    return work


def check(folder: Path, work: Work, tools, reference: Path, *, failed: BaseException) -> None:
    """The error is clear, what is there is sound, and with room again the work ends as it would have."""
    assert isinstance(failed, IncompleteError) and failed.exit_code == 5
    assert WORDS in failed.what and str(folder) in failed.what and "it resumes" in (failed.fix or "")
    assert not any((folder / ".staging").rglob("*~*"))
    if (folder / "store.json").exists():
        damage = [p for p in open_store(folder).verify().problems if not p.file.endswith("zarr.json")]
        assert not damage, damage
    work(folder)
    made, wanted = (
        {name: data for name, data in tools.tree(of).items() if not name.startswith("views/")}  # where the store is
        for of in (folder, reference)
    )
    assert made == wanted
    assert open_store(folder).digest() == open_store(reference).digest()


def test_a_capture_that_fills_a_disk_goes_on_once_there_is_room(
    small_disk: Path, tmp_path: Path, work: Work, tools
) -> None:
    work(tmp_path / "reference")
    failures = 0
    for pages in range(0, 60, 3):
        folder = small_disk / "store"
        with room_of(small_disk, 4096 * pages):
            try:
                work(folder)
            except KdError as error:
                failures += 1
                failed = error
            else:
                break
        check(folder, work, tools, tmp_path / "reference", failed=failed)
        shutil.rmtree(folder)
    assert failures > 10


@pytest.mark.parametrize("size", [0, 20, 300, 600, 1000, 2000])
def test_a_capture_whose_files_may_not_grow_goes_on_once_they_may(tmp_path: Path, work: Work, tools, size: int) -> None:
    work(tmp_path / "reference")
    with files_up_to(size), pytest.raises(IncompleteError) as failed:
        work(tmp_path / "store")
    check(tmp_path / "store", work, tools, tmp_path / "reference", failed=failed.value)


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_compaction_without_room_changes_nothing_and_is_done_later(
    tmp_path: Path, request: pytest.FixtureRequest, make_store, tools, way: str
) -> None:
    store, *_ = make_store(40)
    digest = store.digest()
    folder = tmp_path / "store"
    if way == "tmpfs":
        folder = request.getfixturevalue("small_disk") / "store"
        shutil.copytree(tmp_path / "store", folder)
    before = tools.tree(folder)
    full = room_of(folder.parent, 4096) if way == "tmpfs" else files_up_to(4096)
    with full, pytest.raises(IncompleteError, match=WORDS):
        open_store(folder).compact()
    assert tools.tree(folder) == before and open_store(folder).verify().ok
    open_store(folder).compact()
    assert len(os.listdir(folder / "commits")) == 1
    assert open_store(folder).digest() == digest and open_store(folder).verify().ok


def test_a_file_that_is_replaced_keeps_its_old_bytes(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "file", b"old")
    with files_up_to(10), pytest.raises(IncompleteError, match=WORDS):
        atomic_write_bytes(tmp_path / "file", bytes(100))
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@dataclass(frozen=True, kw_only=True)
class Filling(Stage):
    command: ClassVar[str] = "filling"
    kind: ClassVar[str] = "corpus"
    output_dir: str = option(help="Where.")
    name: str = option("x" * 200, help="Makes the marker large.")

    def run(self, context: StageContext) -> StageResult:
        Path(self.output_dir, "data").write_bytes(bytes(3000))
        return StageResult(summary={"done": True})


@pytest.mark.parametrize(("size", "where"), [(0, "marker"), (100, "marker"), (2000, "work"), (3000, "manifest")])
def test_a_stage_on_a_full_disk_leaves_no_half_artifact_and_goes_on(tmp_path: Path, size: int, where: str) -> None:
    stage = Filling(output_dir=str(tmp_path / "out"), name="x" * (3000 if where == "manifest" else 200))
    with files_up_to(size), pytest.raises(IncompleteError, match=WORDS):
        execute(stage)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert execute(stage).summary["done"] and (tmp_path / "out" / "manifest.json").exists()
    assert execute(stage).skipped


def test_what_counts_as_a_full_disk() -> None:
    import errno

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_disk_full(OSError(number, os.strerror(number)))
    assert is_disk_full(RuntimeError("I/O error: No space left on device"))
    assert is_disk_full(Exception("File too large (os error 27)"))  # as the tokenizers library says it
    assert not is_disk_full(PermissionError(errno.EACCES, "denied")) and not is_disk_full(ValueError("full"))
    said = disk_full("/data/store", OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert said.to_json() == {
        "type": "IncompleteError",
        "what": "no space left on the disk of /data/store",
        "details": ["the system says: Disk quota exceeded"],
        "fix": "free some and run the same command again: it resumes",
    }


def test_a_full_disk_of_temporary_files_is_named_and_not_that_of_the_output() -> None:
    planned = Appended(np.int64)
    with files_up_to(1024), pytest.raises(IncompleteError, match=rf"{tempfile.gettempdir()} \(TMPDIR\)"):
        planned.append(np.arange(1000))
