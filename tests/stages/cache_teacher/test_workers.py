"""Capturing on dask workers: a shard that kills its workers, a worker that dies, and the bytes of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.errors import IncompleteError
from kd.pipeline.store import Signal, open_store
from kd.stages.cache_teacher import capture as capture_module
from kd.stages.cache_teacher.capture import CaptureJob

Files = Callable[[Path], dict[str, str]]


@dataclass(frozen=True)
class Deadly(CaptureJob):
    """Shard 0 always kills the process that takes it, shard 1 the first one."""

    def compute(self, shard: int, advance: Any) -> Any:
        marker = f"{self.store.url}-shard-1-was-tried"
        if shard == 0 or (shard == 1 and not os.path.exists(marker)):
            if shard == 1:
                open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(shard, advance)


@pytest.mark.slow
def test_dying_workers_cost_one_shard_and_the_rest_is_as_one_process_writes_it(
    bench: Any, sentences: list[str], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = bench.corpus(sentences)
    options = {"signals": "logits,hidden.tok@2", "rows_per_shard": 32}
    whole = bench.capture(corpus, store=str(bench.folder / "whole"), **options)

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "CaptureJob", Deadly)
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process: equal thread counts give equal bytes
        outcome = bench.capture(corpus, workers=2, output_dir=str(bench.folder / "v2"), **options)
    assert isinstance(outcome.failure, IncompleteError) and outcome.failure.exit_code == 5
    assert outcome.failure.details == ["shard 0: its worker process died 3 times"]
    assert outcome.summary["shards_failed"] == [0]
    assert not (bench.folder / "v2" / "manifest.json").exists()
    assert list(open_store(bench.store).missing([Signal("logits")])) == [0]

    again = bench.capture(corpus, output_dir=str(bench.folder / "v2"), **options)
    assert (again.summary["rows_computed"], again.summary["shards_computed"]) == (32, 1)
    assert again.summary["store_digest"] == whole.summary["store_digest"]
    assert files(bench.store) == files(bench.folder / "whole")
