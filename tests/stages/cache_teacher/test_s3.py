"""A store on S3 from end to end: captured by two workers, killed, finished, verified, and trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import kd
from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import open_store, open_view
from kd.pipeline.store.files import open_files
from kd.stages.store.inspect import InspectStore
from kd.stages.store.verify import VerifyStore

LICENSE = Path(__file__).parents[3] / "LICENSE"
SIGNALS = "logits,hidden.cls@all,hidden.tok@1"


@pytest.fixture
def real_text() -> list[str]:
    """Lines of the licence: English prose that nobody wrote for a test."""
    lines = dict.fromkeys(" ".join(line.split()) for line in LICENSE.read_text().splitlines())
    return [line for line in lines if len(line.split()) > 3][:80]


def test_a_dry_run_and_a_budget_on_s3(bench: Any, sentences: list[str], s3_url: str) -> None:
    corpus = bench.corpus(sentences[:40])
    planned = bench.capture(corpus, store=s3_url, dry_run=True)
    assert planned.summary["rows_to_compute"] == 40 and planned.summary["free_bytes"] is None
    assert "free)" not in bench.stage(corpus, store=s3_url, dry_run=True).report(planned.summary)
    with pytest.raises(RefusedError, match="--max-bytes: 100 B"):
        bench.capture(corpus, store=s3_url, max_bytes="100B")
    with pytest.raises(RefusedError, match="does not exist"):
        open_store(s3_url)


def test_a_view_names_its_store_by_url_and_is_made_once(bench: Any, sentences: list[str], s3_url: str) -> None:
    corpus = bench.corpus(sentences[:40])
    first = bench.capture(corpus, store=s3_url, sidecars=("none",))
    assert first.summary["rows_computed"] == 40
    assert any("is not known: nothing limits this capture" in text for text in bench.said)
    assert json.loads((bench.folder / "view" / "manifest.json").read_text())["content"]["store"] == s3_url
    assert open_view(bench.folder / "view").store.url == s3_url
    assert bench.capture(corpus, store=f"{s3_url}/", sidecars=("none",)).skipped
    bench.capture(corpus, store=str(bench.folder / "local"), sidecars=("none",), output_dir=str(bench.folder / "v2"))
    assert open_store(s3_url).digest() == open_store(bench.folder / "local").digest()


@pytest.mark.slow
def test_two_workers_one_killed_then_a_rerun_and_a_student(
    bench: Any, real_text: list[str], s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed worker leaves a claim that runs out; the other one, and the one in its place, do all the work."""
    corpus = bench.corpus(real_text)
    options = {"signals": SIGNALS, "rows_per_shard": 10, "tokens_per_shard": 640}
    bench.capture(corpus, store=str(tmp_path / "local"), output_dir=str(tmp_path / "local-view"), **options)
    local = open_store(tmp_path / "local")
    shards = local.catalogue().num_shards
    assert shards == 8

    monkeypatch.setenv("KD_LEASE_SECONDS", "5")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    words: dict[str, Any] = {"teacher": bench.teacher, "dataset": corpus, "text-column": "text", "max-length": 64}
    words |= {"label-column": "label", "store": s3_url, "output-dir": tmp_path / "view", "workers": 2}
    words |= {name.replace("_", "-"): value for name, value in options.items()}
    command = [sys.executable, "-m", "kd", "cache-teacher", "--json"]
    command += [text for name, value in words.items() for text in (f"--{name}", str(value))]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True)
    deadline = time.monotonic() + 400

    files = open_files(s3_url)
    while len(files.list("commits")) <= shards or not any("shard" in name for name in files.list("claims")):
        assert process.poll() is None, (tmp_path / "said").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in str(child.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    result, _ = process.communicate(timeout=400)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-3000:]
    assert json.loads(result)["store_digest"] == local.digest()

    again = bench.capture(corpus, store=s3_url, output_dir=str(tmp_path / "view"), **options)
    assert again.skipped
    verified = execute(VerifyStore(store=s3_url), StageContext())
    assert verified.failure is None and verified.summary["ok"]
    inspected = execute(InspectStore(store=s3_url), StageContext()).summary
    assert inspected["digest"] == local.digest() and inspected["rows"] == len(real_text)

    kd.train_student(
        view=str(tmp_path / "view"),
        student="bert:num_layers=1",
        method="soft-target,pkd:0.1:layer_map=1-1",
        output_dir=str(tmp_path / "run"),
        num_train_epochs=1,
    )
    assert (tmp_path / "run" / "manifest.json").exists()
