"""Threads of a process and of several: no more in all than there are cores, in every library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd.pipeline import threads
from kd.pipeline.threads import COMPUTE, available_cores, keep_to_quota, thread_environment, threads_per_process


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of eight cores, and the folder where its quotas would be."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    monkeypatch.setattr(threads, "QUOTAS", tmp_path)
    for name in COMPUTE:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_cores_are_shared_out_and_never_fewer_than_one() -> None:
    assert [threads_per_process(processes) for processes in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


def test_what_the_environment_asks_for_is_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_per_process(1) == 2 and threads_per_process(8) == 1
    assert thread_environment(2)["OMP_NUM_THREADS"] == "2" and thread_environment(2)["MKL_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads_per_process(2) == 4


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "broken"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_quota_counts_like_cores(eight_cores: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (eight_cores / name).parent.mkdir(exist_ok=True)
        (eight_cores / name).write_text(text)
    assert available_cores() == cores
    assert thread_environment(2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert keep_to_quota({}) == ({} if cores == 8 else dict.fromkeys(COMPUTE, str(cores)))


def test_a_process_that_is_told_already_keeps_what_it_was_told(eight_cores: Path) -> None:
    (eight_cores / "cpu.max").write_text("200000 100000")
    assert "OMP_NUM_THREADS" not in keep_to_quota({"OMP_NUM_THREADS": "5"})


def test_the_libraries_read_these_variables() -> None:
    script = (
        "import json, torch, pyarrow, zarr\n"
        "print(json.dumps([torch.get_num_threads(), pyarrow.cpu_count(), "
        "zarr.config.get('threading.max_workers'), zarr.config.get('async.concurrency')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | thread_environment(8),
        text=True,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == [1, 1, 1, 4]
