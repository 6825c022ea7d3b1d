"""SIGKILL at random moments over two concurrent writers of one store: nothing lost, nothing twice, the same digest."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.store import open_store

SCRIPT = Path(__file__).with_name("kill_writers.py")
SEED = int(os.environ.get("KD_FAULTS_SEED", "0"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, kills: int, *how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), str(kills), str(SEED), *how]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)


def kill_writers(folder: Path, kills: int) -> dict[str, Any]:
    done = run(folder, kills)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["kills"] == kills
    # One is being written while the next is computed; with one of them both may be complete.
    assert found["shards_recomputed"] <= kills and found["most_begun_again_after_a_kill"] <= 2
    return found


@pytest.mark.slow
def test_two_writers_killed_ten_times(tmp_path: Path) -> None:
    kill_writers(tmp_path, 10)


@pytest.mark.faults
def test_two_writers_killed_five_hundred_times(tmp_path: Path, figures: Callable[..., None]) -> None:
    found = kill_writers(tmp_path, 500)
    figures("kills of two writers", seed=SEED, **found)
    assert {"open", "allocate", "compute", "commit", "compact", "wait"} <= found["moments"].keys()


@pytest.mark.faults
def test_a_store_that_writes_records_in_place_is_found_out(tmp_path: Path) -> None:
    """The harness can fail."""
    done = run(tmp_path, 500, "careless")
    assert done.returncode != 0 and "AssertionError" in done.stderr


@pytest.mark.faults
def test_two_real_commands_killed_and_run_again(
    sentences: list[str], tiny_teacher: Path, tmp_path: Path, figures: Callable[..., None]
) -> None:
    """`kd cache-teacher` twice at once on one store: overlapping corpora, signals in common and not."""
    started = time.monotonic()
    corpora = {
        "first": (sentences[:120], "logits,hidden.cls@all"),
        "second": (sentences[60:180], "logits,hidden.tok@1"),
    }
    for name, (texts, _) in corpora.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["text"], *([text] for text in texts)])

    def start(name: str, store: Path) -> subprocess.Popen[str]:
        options: list[object] = [
            "--teacher",
            tiny_teacher,
            "--dataset",
            tmp_path / f"{name}.csv",
            "--text-column",
            "text",
        ]
        options += ["--store", store, "--signals", corpora[name][1], "--output-dir", f"{store}-{name}"]
        options += ["--max-length", "64", "--rows-per-shard", "4"]
        return subprocess.Popen(
            [sys.executable, "-m", "kd", "cache-teacher", "--json", "--quiet", *map(str, options)],
            env={**ENVIRONMENT, "KD_CACHE_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return dict(json.loads(out))

    calm = tmp_path / "calm"
    wanted = [result(start(name, calm))["store_digest"] for name in corpora][-1]
    records = len(list((calm / "commits").iterdir()))

    store, rng, kills = tmp_path / "store", random.Random(SEED), 0
    # The first corpus finds its place first, as in the undisturbed run; from there on nobody waits for anybody.
    first = start("first", store)
    while len(list((store / "commits").glob("*"))) < 30:
        assert first.poll() is None
        time.sleep(0.002)
    first.kill()
    first.wait()
    kills += 1
    for moment in sorted(rng.sample(range(31, records - 4), 3)):
        processes = [start(name, store) for name in corpora]
        while len(list((store / "commits").iterdir())) < moment and any(p.poll() is None for p in processes):
            time.sleep(0.002)
        for process in processes:
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
    found = [result(process) for process in [start(name, store) for name in corpora]]
    assert open_store(store).digest() == wanted
    assert not open_store(store).verify().problems
    assert not [*(store / ".staging").iterdir()]
    assert [entry["rows"] for entry in found] == [120, 120]
    figures(
        "kills of two commands",
        seed=SEED,
        kills=kills,
        shards=open_store(store).catalogue().num_shards,
        seconds=round(time.monotonic() - started, 1),
    )
