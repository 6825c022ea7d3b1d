"""Several captures of one store at once: the union, no row computed twice, and each counts its own."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.errors import KdError
from kd.pipeline.store import open_store
from kd.stages.cache_teacher.capture import CaptureJob

WORD = "waiting for"


def test_a_claimed_shard_comes_last_and_waits_until_its_claim_is_free(
    bench: Any, sentences: list[str], forwards: list[int]
) -> None:
    corpus = bench.corpus(sentences[:96])
    bench.capture(corpus, signals="hidden.cls@1", rows_per_shard=32)
    forwards.clear()
    claim = open_store(bench.store).claim(0)
    assert claim is not None
    release = threading.Timer(1.0, claim.release)
    release.start()
    outcome = bench.capture(corpus, signals="logits", output_dir=str(bench.folder / "second"))
    assert not release.is_alive() and release.finished.is_set()
    assert outcome.summary["rows_computed"] == sum(forwards) == 96
    assert [text for text in bench.said if WORD in text] == ["waiting for 1 shard that another process is computing: 0"]


def test_what_the_other_committed_meanwhile_is_not_computed_again(
    bench: Any, sentences: list[str], forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another capture takes shard 1 while this one is at shard 0, and ends while this one waits for it."""
    corpus = bench.corpus(sentences[:96])
    jobs: list[CaptureJob] = []
    original = CaptureJob.compute
    computed = threading.Event()

    def rival() -> None:
        ours = original(jobs[0], 1, lambda rows: None)
        computed.set()
        time.sleep(0.7)
        jobs[0].finish(ours)

    def compute(self: CaptureJob, shard: int, advance: Any) -> Any:
        if not jobs:
            jobs.append(self)
            threading.Thread(target=rival).start()
            assert computed.wait(60)
        return original(self, shard, advance)

    monkeypatch.setattr(CaptureJob, "compute", compute)
    outcome = bench.capture(corpus, rows_per_shard=32, sidecars=("none",))
    assert outcome.failure is None
    assert outcome.summary["rows_computed"] == 64 and sum(forwards) == 96
    assert any(WORD in text for text in bench.said)


def test_a_capture_that_fails_gives_its_claims_back(
    bench: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise KdError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(CaptureJob, "fill", broken)
        with pytest.raises(KdError, match="no such thing"):
            bench.capture(bench.corpus(sentences))
    store = open_store(bench.store)
    claims = [store.claim(shard) for shard in range(4)]
    assert all(claims)


@pytest.mark.slow
def test_two_commands_with_overlapping_corpora_and_other_signals_end_with_the_union(
    bench: Any, sentences: list[str], tmp_path: Path, warm_python: str
) -> None:
    """Together they compute every row and signal exactly once."""
    corpora = [bench.corpus(sentences[:120], "one"), bench.corpus(sentences[40:], "two")]
    signals = ["logits,hidden.tok@1", "hidden.cls@1,logits"]
    base = ["--teacher", bench.teacher, "--text-column", "text", "--label-column", "label", "--rows-per-shard", 8]

    def command(number: int) -> list[str]:
        own = ["--dataset", corpora[number], "--signals", signals[number], "--output-dir", tmp_path / f"view{number}"]
        words = ["cache-teacher", *base, *own, "--store", bench.store, "--json"]
        return [warm_python, "-m", "kd", *map(str, words)]

    running = [
        subprocess.Popen(command(number), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    ended = [(process.communicate(timeout=200), process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0], [said[1][-2000:] for said, _ in ended]
    summaries = [json.loads(said[0]) for said, _ in ended]

    store = open_store(bench.store)
    sizes = dict(enumerate(store.shard_sizes(range(store.catalogue().num_shards))))
    assert sum(size.rows for size in sizes.values()) == 200, "a row stands in the index twice"
    report = store.verify()
    assert report.ok and not report.unrecorded
    arrays = [
        file for path, shards in store.catalogue().files.items() for file in shards.values() if "_ids" not in path
    ]
    assert sum(summary["bytes_written"] for summary in summaries) == sum(file.bytes for file in arrays)
    # A record is one pass of the teacher over its shard.
    passes = [record for record in store.catalogue().records if record.index is None]
    assert sum(summary["rows_computed"] for summary in summaries) == sum(record.rows for record in passes)
    assert sum(summary["shards_computed"] for summary in summaries) == len(passes)

    again = subprocess.run(command(1), capture_output=True, text=True)
    assert json.loads(again.stdout)["skipped"] is True
