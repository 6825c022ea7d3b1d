"""kill -9 of capturing processes at arbitrary moments, then a rerun: the bytes of an undisturbed run."""

from __future__ import annotations

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

from kd.pipeline.store import Signal, open_store

Files = Callable[[Path], dict[str, str]]
SIGNALS = "logits,hidden.cls@all,hidden.tok@1"

# Imports once, then forks a process per capture: what is killed is the work, not the start of Python.
DRIVER = """
import json, os, signal, sys, time

options = json.load(open(sys.argv[1]))
import torch
torch.set_num_threads(1)
import transformers.models.bert.modeling_bert
from kd.pipeline.stage import execute
from kd.stages.cache_teacher import CacheTeacher, capture, stage
from kd.pipeline.store import open_view

def start(output_dir):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            execute(CacheTeacher(**options, output_dir=output_dir))
            code = 0
        finally:
            os._exit(code)
    return child

for moment, wait_s in enumerate(json.loads(sys.argv[2])):
    # Every other time two processes write at once.
    children = [start(f"{sys.argv[3]}-{number}") for number in range(1 + moment % 2)]
    time.sleep(wait_s)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    commits = os.path.join(options["store"], "commits")
    print(len(os.listdir(commits)) if os.path.isdir(commits) else 0, flush=True)
"""


def arguments(bench: Any, corpus: str, **options: Any) -> dict[str, Any]:
    fields = {"rows_per_shard": 8, "max_length": 64, "signals": SIGNALS, "store": str(bench.store)} | options
    return {"teacher": str(bench.teacher), "dataset": corpus, "text_column": "text", "label_column": "label"} | fields


@pytest.mark.slow
def test_killed_at_twelve_moments_then_run_again_gives_the_same_bytes(
    bench: Any, sentences: list[str], files: Files, tmp_path: Path, warm_python: str
) -> None:
    corpus = bench.corpus(sentences)
    whole = {"rows_per_shard": 8, "signals": SIGNALS, "store": str(bench.folder / "whole")}
    started = time.perf_counter()
    undisturbed = bench.capture(corpus, **whole)
    seconds = time.perf_counter() - started

    rng = random.Random(7)
    waits = [rng.uniform(0.0, seconds * 0.4) for _ in range(12)]
    (tmp_path / "options.json").write_text(json.dumps(arguments(bench, corpus)))
    driver = subprocess.run(
        [warm_python, "-c", DRIVER, tmp_path / "options.json", json.dumps(waits), tmp_path / "killed"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert driver.returncode == 0, driver.stderr
    commits = [int(line) for line in driver.stdout.split()]
    assert commits == sorted(commits), "a record went away"

    missing = set() if commits[-1] == 0 else set(open_store(bench.store).missing(specs_of(bench), None))
    outcome = bench.capture(corpus, rows_per_shard=8, signals=SIGNALS, output_dir=str(tmp_path / "killed-0"))
    if commits[-1] >= 25:  # all rows had their place: only what no record held was computed
        assert outcome.summary["shards_computed"] == len(missing)
    assert outcome.summary["store_digest"] == undisturbed.summary["store_digest"]
    assert files(bench.store) == files(bench.folder / "whole")


def specs_of(bench: Any) -> list[Any]:
    declared = open_store(bench.folder / "whole").declared()
    return [spec for path, spec in declared.items() if path not in ("token_ids", "segment_ids")]


@pytest.mark.slow
def test_the_real_command_killed_amid_the_capture_then_run_again(
    bench: Any, sentences: list[str], files: Files, tmp_path: Path, warm_python: str
) -> None:
    corpus = bench.corpus(sentences)
    whole = {"rows_per_shard": 8, "signals": SIGNALS, "store": str(bench.folder / "whole")}
    undisturbed = bench.capture(corpus, **whole)
    options = arguments(bench, corpus, output_dir=str(tmp_path / "killed"))
    command = ["-m", "kd", "cache-teacher", "--json", "--quiet"]
    command += [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}

    commits = bench.store / "commits"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command], env=environment, **silent)
    deadline = time.monotonic() + 90
    while len(list(commits.glob("*.json"))) < 25 + 12:  # all shards have their rows, twelve their signals
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()

    store = open_store(bench.store)
    missing = store.missing([Signal("logits"), Signal("hidden.tok", 1)])
    assert 0 < len(missing) < 25
    finished = subprocess.run([warm_python, *command], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["shards_computed"] == len(missing)
    assert result["store_digest"] == undisturbed.summary["store_digest"]
    assert files(bench.store) == files(bench.folder / "whole")
