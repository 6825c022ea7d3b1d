"""Shards mapped in this process and over real dask workers: order, refusals, deaths, clusters of others."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.executor import ShardOutcome, check_execution, map_shards, threads_per_process


@dataclass(frozen=True)
class Square:
    """Squares shard numbers; misbehaves on chosen ones."""

    folder: str
    poison: int = -1
    refused: int = -1
    broken: int = -1
    dies_once: int = -1
    slow_s: float = 0.0

    def compute(self, shard: int, advance: Callable[[int], None]) -> int:
        with open(os.path.join(self.folder, f"tries-{shard}"), "a") as file:
            file.write(f"{os.getpid()}\n")
        if self.slow_s:
            time.sleep(self.slow_s)
        if shard == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == self.dies_once and self.tries(shard) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == self.refused:
            raise RefusedError(f"shard {shard} is bad", details=["row 7"], fix="throw it away")
        if shard == self.broken:
            raise ZeroDivisionError("as it happens")
        advance(10)
        return shard * shard

    def finish(self, computed: int) -> dict[str, object]:
        return {"square": computed, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

    def tries(self, shard: int) -> int:
        file = Path(self.folder) / f"tries-{shard}"
        return len(file.read_text().splitlines()) if file.exists() else 0


def squares(outcomes: list[ShardOutcome[dict[str, object]]]) -> dict[int, object]:
    return {outcome.shard: outcome.record["square"] for outcome in outcomes if outcome.record is not None}


def test_in_this_process_shards_run_in_order_and_report_their_rows(tmp_path: Path) -> None:
    rows: list[int] = []
    outcomes = list(map_shards(Square(str(tmp_path)), [3, 1, 2], name="t", on_advance=rows.append))
    assert [(outcome.shard, outcome.record["square"]) for outcome in outcomes] == [(3, 9), (1, 1), (2, 4)]  # type: ignore[index]
    assert rows == [10, 10, 10]


def test_one_shard_is_written_while_the_next_is_computed() -> None:
    events: list[str] = []

    class Slow:
        def compute(self, shard: int, advance: Callable[[int], None]) -> int:
            events.append(f"compute {shard}")
            time.sleep(0.05)
            events.append(f"computed {shard}")
            return shard

        def finish(self, computed: int) -> int:
            time.sleep(0.01)
            events.append(f"written {computed}")
            return computed

    assert [outcome.record for outcome in map_shards(Slow(), [0, 1], name="t")] == [0, 1]
    assert events.index("compute 1") < events.index("written 0") < events.index("computed 1")


def test_a_refusal_in_this_process_comes_after_the_shards_before_it_are_written(tmp_path: Path) -> None:
    written: list[int] = []

    class Writes(Square):
        def finish(self, computed: int) -> dict[str, object]:
            written.append(computed)
            return super().finish(computed)

    with pytest.raises(RefusedError, match="shard 2 is bad"):
        list(map_shards(Writes(str(tmp_path), refused=2), [0, 1, 2, 3], name="t"))
    assert written == [0, 1]


def test_no_shards_start_no_cluster() -> None:
    assert list(map_shards(Square("/nonexistent"), [], name="t", workers=64)) == []


@pytest.mark.parametrize("cluster", ["lokal", "tcp:/x", "a b:c", "module:", ":function", "http://x:1"])
def test_a_malformed_cluster_lists_the_known_forms(cluster: str) -> None:
    with pytest.raises(UsageError, match=r"MODULE:FUNCTION"):
        check_execution(1, cluster)


def test_no_workers_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="at least one worker"):
        check_execution(0, None)


def test_threads_are_shared_out_and_never_fewer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1) == cores
    assert threads_per_process(cores * 2) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_per_process(1) == 1


def test_a_missing_scheduler_is_refused_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="no dask scheduler answers at file:"):
        list(map_shards(Square(str(tmp_path)), [1], name="t", cluster=f"file:{tmp_path}/none.json"))


def test_a_module_or_function_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no module 'kd_no_such_module'"):
        list(map_shards(Square(""), [1], name="t", cluster="kd_no_such_module:make"))
    with pytest.raises(UsageError, match="no function 'make_nothing'"):
        list(map_shards(Square(""), [1], name="t", cluster="os.path:make_nothing"))


def test_workers_give_the_same_records_from_other_processes(tmp_path: Path) -> None:
    rows: list[int] = []
    outcomes = list(map_shards(Square(str(tmp_path)), range(6), name="t", workers=2, on_advance=rows.append))
    assert squares(outcomes) == {shard: shard * shard for shard in range(6)}
    assert sum(rows) == 60
    assert all(outcome.record["pid"] != os.getpid() for outcome in outcomes)  # type: ignore[index]
    assert {outcome.record["threads"] for outcome in outcomes} == {str(threads_per_process(2))}  # type: ignore[index]


def test_a_poison_shard_is_set_aside_and_costs_no_other(tmp_path: Path) -> None:
    job = Square(str(tmp_path), poison=2)
    outcomes = list(map_shards(job, range(6), name="t", workers=2))
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    assert [outcome.shard for outcome in failed] == [2]
    assert "worker process died 3 times" in str(failed[0].failure)
    assert sorted(squares(outcomes)) == [0, 1, 3, 4, 5]
    assert job.tries(2) == 3


def test_a_shard_whose_worker_died_once_is_done_on_another(tmp_path: Path) -> None:
    job = Square(str(tmp_path), dies_once=1)
    outcomes = list(map_shards(job, range(4), name="t", workers=2))
    assert squares(outcomes) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert job.tries(1) == 2


def test_a_shard_that_raises_is_tried_again_then_named_with_its_error(tmp_path: Path) -> None:
    job = Square(str(tmp_path), broken=1)
    outcomes = list(map_shards(job, range(3), name="t", workers=2))
    assert {outcome.shard: outcome.failure for outcome in outcomes if outcome.failure} == {
        1: "ZeroDivisionError: as it happens"
    }
    assert job.tries(1) == 3


def test_a_refusal_on_a_worker_ends_the_run_and_is_not_tried_again(tmp_path: Path) -> None:
    job = Square(str(tmp_path), refused=0, slow_s=0.05)
    with pytest.raises(RefusedError, match="shard 0 is bad") as caught:
        list(map_shards(job, range(40), name="t", workers=2))
    assert caught.value.fix == "throw it away"
    assert job.tries(0) == 1
    assert job.tries(39) == 0


def test_every_worker_has_its_own_environment(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Device:
        def compute(self, shard: int, advance: Callable[[int], None]) -> str:
            time.sleep(0.3)
            return os.environ["CUDA_VISIBLE_DEVICES"]

        def finish(self, computed: str) -> str:
            return computed

    env = [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "9"}]
    seen = {outcome.record for outcome in map_shards(Device(), range(4), name="t", workers=2, worker_env=env)}
    assert seen == {"7", "9"}


def test_a_cluster_of_a_function_is_used_and_one_that_was_running_is_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_clusters.py").write_text(
        "import logging\n"
        "from distributed import LocalCluster\n"
        "made = []\n"
        "def make():\n"
        "    made.append(LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None,\n"
        "                             silence_logs=logging.CRITICAL))\n"
        "    return made[-1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    outcomes = list(map_shards(Square(str(tmp_path)), [2, 3], name="t", cluster="my_clusters:make"))
    assert squares(outcomes) == {2: 4, 3: 9}
    assert sys.modules["my_clusters"].made[0].status.name == "closed"

    running = sys.modules["my_clusters"].make()
    try:
        address = running.scheduler_address
        if address.startswith("inproc://"):
            pytest.skip("dask gave no TCP address")
        outcomes = list(map_shards(Square(str(tmp_path)), [4], name="t", cluster=address))
        assert squares(outcomes) == {4: 16}
        assert running.status.name == "running"
    finally:
        running.close()
