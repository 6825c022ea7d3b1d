"""Large buffers go to the disk past the page cache where the file system lets them, and the bytes are the same."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.store import files
from kd.pipeline.store.buffers import ALIGNMENT, SpareBuffers
from kd.pipeline.store.files import LocalFiles


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DIRECT_BYTES", 2 * ALIGNMENT)


def aligned(size: int) -> np.ndarray:
    values = SpareBuffers().take((size,), "uint8")
    values[:] = np.random.default_rng(size).integers(0, 256, size)
    return values


@pytest.mark.parametrize("size", [0, 1, 2 * ALIGNMENT - 1, 2 * ALIGNMENT, 2 * ALIGNMENT + 1, 9 * ALIGNMENT - 1])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("before", [b"", b"head", bytes(ALIGNMENT)], ids=len)
def test_the_bytes_are_those_of_the_parts(tmp_path: Path, size: int, shift: int, before: bytes) -> None:
    values = aligned(size + shift)[shift:]
    LocalFiles(str(tmp_path)).write("file", [before, values, b"tail"])
    assert (tmp_path / "file").read_bytes() == before + values.tobytes() + b"tail"


def written_directly(tmp_path: Path) -> int:
    values = aligned(9 * ALIGNMENT + 5)
    descriptor = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    try:
        written = files._write_directly(descriptor, memoryview(values))
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(descriptor)
    assert (tmp_path / "probe").read_bytes() == values.tobytes()[:written]
    return written


def test_all_whole_blocks_are_written_directly(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct writes")
    assert written_directly(tmp_path) == 9 * ALIGNMENT


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["fcntl", "write"])
def test_a_file_system_that_refuses_them_is_written_to_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    module = fcntl if call == "fcntl" else os
    original = getattr(module, call)

    def refuse(descriptor: int, *args: object) -> object:
        if call == "fcntl" and len(args) > 1 and int(str(args[1])) & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        if call == "write" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return original(descriptor, *args)

    monkeypatch.setattr(module, call, refuse)
    assert written_directly(tmp_path) == 0
    values = aligned(9 * ALIGNMENT + 5)
    LocalFiles(str(tmp_path)).write("file", [values, b"tail"])
    assert (tmp_path / "file").read_bytes() == values.tobytes() + b"tail"


def test_a_full_disk_is_no_such_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written_directly(tmp_path)
