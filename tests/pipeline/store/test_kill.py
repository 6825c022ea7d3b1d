"""Killed at any moment and run again, a store ends up with the bytes of a run that was never killed.

By hand, all of them: `python kill_runs.py every-step DIR 1 1`, and `python kill_runs.py two-writers DIR 250 0`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_runs.py")


def run(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kill_before_some_file_operations_changes_nothing(tmp_path: Path) -> None:
    run("every-step", tmp_path, 1, 43)


@pytest.mark.parametrize("upkeep", ["compaction", "collection", "merging"])
def test_a_kill_before_some_file_operations_of_upkeep_leaves_a_sound_store(tmp_path: Path, upkeep: str) -> None:
    run(upkeep, tmp_path, 3, 67 if upkeep == "merging" else 8)


@pytest.mark.slow
@pytest.mark.parametrize("upkeep", ["compaction", "collection", "merging"])
def test_a_kill_before_many_file_operations_of_upkeep_leaves_a_sound_store(tmp_path: Path, upkeep: str) -> None:
    run(upkeep, tmp_path, 1, 11 if upkeep == "merging" else 1)


@pytest.mark.slow
def test_a_kill_before_many_file_operations_changes_nothing(tmp_path: Path) -> None:
    run("every-step", tmp_path, 2, 10)


@pytest.mark.slow
def test_two_writers_killed_at_random_moments_change_nothing(tmp_path: Path) -> None:
    run("two-writers", tmp_path, 15, 0)
