"""Shards mapped in this process and over real dask workers: order, refusals, deaths, clusters of others."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster

from kd.pipeline import executor
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.executor import (
    ALLOWED_DEATHS,
    Deferred,
    ShardOutcome,
    check_execution,
    map_shards,
)
from kd.pipeline.threads import thread_environment


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
        return {
            "square": computed,
            "pid": os.getpid(),
            "threads": {name: os.environ.get(name) for name in thread_environment(1)},
            "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "interrupts": signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        }

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


@dataclass(frozen=True)
class Shared(Square):
    """Shards 1 and 2 belong to somebody else until both were asked for three times; 2 is then done already."""

    def compute(self, shard: int, advance: Callable[[int], None]) -> int | Deferred:
        square = super().compute(shard, lambda rows: None)
        if shard in (1, 2) and min(self.tries(1), self.tries(2)) < 3:
            return Deferred()
        advance(10 if shard != 2 else 0)
        return square


def test_a_deferred_shard_comes_after_the_others_again_and_again_until_it_is_done(tmp_path: Path) -> None:
    rows: list[int] = []
    waits: list[list[int]] = []
    mapped = map_shards(
        Shared(str(tmp_path)), [1, 2, 3, 4], name="t", on_advance=rows.append, on_wait=lambda w: waits.append([*w])
    )
    assert [outcome.shard for outcome in mapped] == [3, 4, 2, 1]
    assert sorted(rows) == [0, 10, 10, 10]
    assert waits == [[1, 2], [1]], "what is waited for is said once, and again when it changes"


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


def test_a_missing_scheduler_is_refused_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="no dask scheduler answers at file:"):
        list(map_shards(Square(str(tmp_path)), [1], name="t", cluster=f"file:{tmp_path}/none.json"))


def test_a_module_or_function_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no module 'kd_no_such_module'"):
        list(map_shards(Square(""), [1], name="t", cluster="kd_no_such_module:make"))
    with pytest.raises(UsageError, match="no function 'make_nothing'"):
        list(map_shards(Square(""), [1], name="t", cluster="os.path:make_nothing"))


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a cluster of two worker processes that was running before."""
    settings = {
        "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.deploy.lost-worker-timeout": "300s",  # on a busy machine one that died is not back in 15 s
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
    ):
        yield cluster.scheduler_address
        assert cluster.status.name == "running", "a cluster that was running before is left running"


def test_bad_shards_on_a_cluster_are_set_aside_and_cost_no_other(tmp_path: Path, scheduler: str) -> None:
    job = Square(str(tmp_path), poison=2, dies_once=4, broken=5)
    rows: list[int] = []
    outcomes = list(map_shards(job, range(8), name="bad", cluster=scheduler, on_advance=rows.append))
    assert squares(outcomes) == {shard: shard * shard for shard in (0, 1, 3, 4, 6, 7)}
    assert {outcome.shard: outcome.failure for outcome in outcomes if outcome.failure} == {
        2: "its worker process died 3 times",
        5: "ZeroDivisionError: as it happens",
    }
    # A worker that dies takes finished records with it, so the others may be asked again too.
    assert job.tries(2) == 3 and job.tries(4) >= 2 and job.tries(5) >= 3
    assert sum(rows) == 60
    assert all(outcome.record["pid"] != os.getpid() for outcome in outcomes if outcome.record)


def test_deferred_shards_on_a_cluster_are_submitted_again_until_they_are_done(tmp_path: Path, scheduler: str) -> None:
    rows: list[int] = []
    waits: list[list[int]] = []
    outcomes = list(
        map_shards(
            Shared(str(tmp_path)),
            [4, 3, 2, 1],
            name="shared",
            cluster=scheduler,
            on_advance=rows.append,
            on_wait=lambda w: waits.append([*w]),
        )
    )
    assert sorted(outcome.shard for outcome in outcomes) == [1, 2, 3, 4] and squares(outcomes)[1] == 1
    assert waits[0] == [1, 2] and sum(rows) == 30


def test_a_refusal_on_a_cluster_ends_the_run_and_is_not_tried_again(tmp_path: Path, scheduler: str) -> None:
    job = Square(str(tmp_path), refused=0, slow_s=0.05)
    with pytest.raises(RefusedError, match="shard 0 is bad") as caught:
        list(map_shards(job, range(40), name="refused", cluster=scheduler))
    assert caught.value.fix == "throw it away"
    assert job.tries(0) == 1
    assert job.tries(39) == 0


def test_more_shards_than_are_handed_out_at_once_are_all_done(
    tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "IN_FLIGHT", 3)
    outcomes = list(map_shards(Square(str(tmp_path)), range(10), name="many", cluster=scheduler))
    assert squares(outcomes) == {shard: shard * shard for shard in range(10)}


def test_own_workers_have_their_share_of_threads_and_their_own_environment(tmp_path: Path) -> None:
    job = Square(str(tmp_path), slow_s=0.3)
    env = [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "9"}]
    outcomes = list(map_shards(job, range(4), name="own", workers=2, worker_env=env))
    records = [outcome.record for outcome in outcomes if outcome.record is not None]
    assert all(record["threads"] == thread_environment(2) for record in records)
    assert {record["device"] for record in records} == {"7", "9"}
    # Ctrl-C in a terminal goes to all processes: the one that began the workers ends them.
    assert not any(record["interrupts"] for record in records)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_shards_do_not_wait_for_ever_for_workers_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "NO_WORKERS_S", 1)
    job = Square(str(tmp_path))
    with executor._client(1, "local", ()) as client:
        client.cluster.scale(0)
        while client.scheduler_info()["workers"]:
            time.sleep(0.05)
        outcomes = list(executor._map_on_dask(client, job, [1, 2], [], "gone", lambda rows: None))
    assert {outcome.shard for outcome in outcomes} == {1, 2}
    assert all("without any running workers" in str(outcome.failure) for outcome in outcomes)


def test_a_cluster_made_by_a_function_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    outcomes = list(map_shards(Square(str(tmp_path)), [2, 3], name="made", cluster="my_clusters:make"))
    assert squares(outcomes) == {2: 4, 3: 9}
    assert sys.modules["my_clusters"].made[0].status.name == "closed"
