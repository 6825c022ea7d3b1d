"""Map one plain function over shards: in this process, or over dask workers. The only file that knows dask.

Arrays never travel: a worker gets a picklable job and a shard number, and returns a small record.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import resource_tracker
from typing import Any, Generic, Protocol, TypeVar

from .errors import KdError, RefusedError, UsageError, near_match
from .stage import option
from .threads import thread_environment

Computed = TypeVar("Computed")
Record = TypeVar("Record")
Made = TypeVar("Made", covariant=True)

ALLOWED_DEATHS = 2
"""How often a worker process may die on a shard before the shard is set aside: one more try than this."""
RETRIES = 2
"""How often a shard that raised is tried again on a dask worker."""
IN_FLIGHT = 20_000
"""Shards handed to the scheduler at once; it holds them until a worker is free."""
NO_WORKERS_S = 300
"""How long a worker of our own may take to start anew, and shards wait when there is none. Seconds are usual."""
CLOSE_S = 60
"""How long workers of our own may take to end; they are daemons, so that none outlives this process."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0
"""How long to wait before deferred shards are tried again; doubled while none of them gets on."""


@dataclass(frozen=True)
class Deferred:
    """What `ShardJob.compute` returns for a shard that somebody else is at: it is tried again after the others."""


class ShardJob(Protocol[Computed, Made]):
    """What is done with a shard, in two halves, so that one shard is written while the next is computed.

    On dask workers the job is pickled, and both halves run there.
    """

    def compute(self, shard: int, advance: Callable[[int], None]) -> Computed | Deferred:
        """Do the work; call `advance(rows)` as it goes."""

    def finish(self, computed: Computed) -> Made:
        """Write it, and return a small record. Runs in another thread."""


@dataclass(frozen=True)
class ShardOutcome(Generic[Record]):
    """How a shard ended: with a record, or set aside with a reason."""

    shard: int
    record: Record | None
    failure: str | None = None


def workers_option(panel: str | None = None) -> Any:
    """The field `workers: int` of a stage that maps shards."""
    return option(1, help="Processes on this machine.", identity=False, panel=panel, metavar="N")


def cluster_option(panel: str | None = None) -> Any:
    """The field `cluster: str | None` of a stage that maps shards."""
    return option(
        None,
        help="A dask cluster: local, tcp://HOST:PORT, file:SCHEDULER.json or MODULE:FUNCTION.",
        identity=False,
        panel=panel,
        metavar="CLUSTER",
    )


def check_execution(workers: int, cluster: str | None) -> None:
    """Refuse a malformed `--workers` or `--cluster` before any work.

    Raises:
        UsageError: fewer than one worker, or a cluster that is none of the known forms.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one worker is needed")
    if cluster is None or cluster in ("none", "local") or cluster.startswith(("tcp://", "tls://", "file:")):
        return
    module, _, function = cluster.partition(":")
    if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UsageError(
            f"--cluster {cluster!r} is not understood{near_match(cluster, ('none', 'local'))}",
            details=[
                "none                  this process",
                "local                 --workers processes on this machine",
                "tcp://HOST:PORT       a running dask scheduler",
                "file:SCHEDULER.json   the same, by its scheduler file",
                "MODULE:FUNCTION       a function that returns a dask cluster (SLURM, SSH, Kubernetes, ...)",
            ],
        )


def map_shards(
    job: ShardJob[Computed, Record],
    shards: Sequence[int],
    *,
    name: str,
    workers: int = 1,
    cluster: str | None = None,
    worker_env: Sequence[Mapping[str, str]] = (),
    on_advance: Callable[[int], None] = lambda rows: None,
    on_wait: Callable[[Sequence[int]], None] = lambda shards: None,
) -> Generator[ShardOutcome[Record], None, None]:
    """Run `job` on every shard and yield how each ended, as they end.

    In this process the shards run in order, and any exception ends the run; what was computed before is finished
    first. On dask a shard is tried again when it raises or its worker dies, and set aside when that does not help, so
    one bad shard never costs the others. A KdError is final everywhere: it ends the run. A shard that is deferred
    comes again after all others, until it is done.

    Args:
        job: what to do; picklable when `workers` or `cluster` ask for dask.
        shards: shard numbers.
        name: names the work among the tasks of a shared scheduler; hold the fingerprint of what is computed.
        workers: processes on this machine; 1 is this process.
        cluster: where else to run (see `check_execution`). A cluster that was running before is left running.
        worker_env: environment of each local worker process, taken in turn (one GPU each, say).
        on_advance: called with numbers of rows done, in this process.
        on_wait: called with the deferred shards that all is waiting for, whenever they change.
    """
    check_execution(workers, cluster)
    if not shards:
        return
    with contextlib.ExitStack() as stack:
        client = None
        if not ((cluster is None and workers == 1) or cluster == "none"):
            client = stack.enter_context(_client(workers, cluster, worker_env))
        left, wait_s = [*shards], 0.0
        for attempt in count():
            deferred: list[int] = []
            if client is None:
                yield from _map_here(job, left, deferred, on_advance)
            else:
                yield from _map_on_dask(client, job, left, deferred, f"{name}-{attempt}", on_advance)
            if not deferred:
                return
            deferred.sort()
            if wait_s and deferred == left:
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                on_wait(deferred)
                wait_s = FIRST_WAIT_S
            time.sleep(wait_s)
            left = deferred


def _map_here(
    job: ShardJob[Computed, Record], shards: Sequence[int], deferred: list[int], on_advance: Callable[[int], None]
) -> Iterator[ShardOutcome[Record]]:
    # Leaving the pool waits for the shard being written, so Ctrl-C loses only the one being computed.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kd-write") as writer:
        written: tuple[int, Future[Record]] | None = None
        for shard in shards:
            computed = job.compute(shard, on_advance)
            if isinstance(computed, Deferred):
                deferred.append(shard)
                continue
            if written is not None:
                yield ShardOutcome(written[0], written[1].result())
            written = (shard, writer.submit(job.finish, computed))
            del computed
        if written is not None:
            yield ShardOutcome(written[0], written[1].result())


# --- dask ----------------------------------------------------------------------------------------------------------


def _map_on_dask(
    client: Any,
    job: ShardJob[Computed, Record],
    shards: Sequence[int],
    deferred: list[int],
    name: str,
    on_advance: Callable[[int], None],
) -> Iterator[ShardOutcome[Record]]:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    waiting = iter(shards)
    shard_of: dict[str, int] = {}

    def submit(shard: int) -> Any:
        # No `workers=` or `resources=`: they bypass the scheduler's queue, and then a dying worker is held against
        # every shard that was already assigned to it.
        key = f"kd-{name}-{shard}"
        shard_of[key] = shard
        return client.submit(_run_shard, job, shard, key=key, retries=RETRIES, pure=False)

    running = as_completed([submit(shard) for shard in islice(waiting, IN_FLIGHT)])
    for future in running:
        shard = shard_of.pop(future.key)
        error = future.exception()
        if error is None:
            result: _Ran[Record] = future.result()
            if result.refused is not None:
                raise result.refused
            on_advance(result.rows)
            if result.deferred:
                deferred.append(shard)
            else:
                yield ShardOutcome(shard, result.record)
        elif isinstance(error, KilledWorker):
            yield ShardOutcome(shard, None, f"its worker process died {error.allowed_failures + 1} times")
        else:
            first_line = (str(error).splitlines() or [""])[0]
            yield ShardOutcome(shard, None, f"{type(error).__name__}: {first_line}"[:300])
        for more in islice(waiting, 1):
            running.add(submit(more))


@dataclass(frozen=True)
class _Ran(Generic[Record]):
    record: Record | None
    rows: int
    # Returned, not raised: dask would try a refusal again.
    refused: KdError | None = None
    deferred: bool = False


def _run_shard(job: ShardJob[Computed, Record], shard: int) -> _Ran[Record]:
    """Both halves of the job, on a worker."""
    rows = 0

    def advance(count: int) -> None:
        nonlocal rows
        rows += count

    try:
        computed = job.compute(shard, advance)
        if isinstance(computed, Deferred):
            return _Ran(None, rows, deferred=True)
        return _Ran(job.finish(computed), rows)
    except KdError as error:
        return _Ran(None, rows, error)


@contextlib.contextmanager
def _client(workers: int, cluster: str | None, worker_env: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    from distributed import Client

    if cluster is None or cluster == "local":
        with _local_cluster(workers, worker_env) as own, Client(own) as client:
            yield client
        return
    if cluster.startswith(("tcp://", "tls://", "file:")):
        try:
            client = Client(_address(cluster), timeout="30s")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RefusedError(
                f"no dask scheduler answers at {cluster}",
                details=[(str(error).splitlines() or [""])[0][:200]],
                fix="start one (dask scheduler), or use --workers N",
            ) from error
        with client:
            yield client
        return
    with _cluster_of(cluster) as made, Client(made) as client:
        yield client


def _address(cluster: str) -> str:
    if not cluster.startswith("file:"):
        return cluster
    # Read here: dask waits for a file that is not there until it comes.
    with open(cluster.removeprefix("file:"), encoding="utf-8") as file:
        return str(json.load(file)["address"])


def _cluster_of(name: str) -> Any:
    from importlib import import_module

    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--cluster {name}: there is no module {error.name!r}", fix="install it, or put it on PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"--cluster {name}: {module_name} has no function {function_name!r}")
    return function()


@contextlib.contextmanager
def _local_cluster(workers: int, worker_env: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    import logging

    import dask
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    common = thread_environment(workers)  # dask would give every worker one compute thread
    options = [
        {
            "nthreads": 1,
            "memory_limit": MEMORY_LIMIT // workers,
            "env": common | dict(worker_env[index % len(worker_env)] if worker_env else {}),
            "silence_logs": logging.CRITICAL,
        }
        for index in range(workers)
    ]
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    settings = {
        "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
        # One shard a worker: a death is then held against the shard that caused it and no other.
        "distributed.scheduler.worker-saturation": 1.0,
        # After 15 s dask would take a worker that died for lost and not let it come back: on a busy machine it needs
        # longer to start. And for workers that do not come back it would wait for ever.
        "distributed.deploy.lost-worker-timeout": f"{NO_WORKERS_S}s",
        "distributed.scheduler.no-workers-timeout": f"{NO_WORKERS_S}s",
        # Results are small records and the rest is the teacher: spilling and pausing could only stall.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
    }
    with dask.config.set(settings), contextlib.ExitStack() as stack:
        with _interrupts_held():
            cluster = SpecCluster(
                workers={index: {"cls": Nanny, "options": own} for index, own in enumerate(options)},
                scheduler={"cls": Scheduler, "options": scheduler},
                silence_logs=logging.CRITICAL,
            )
            stack.callback(_close, cluster)
        yield cluster


def _close(cluster: Any) -> None:
    # A worker that dies and starts anew just now can keep its nanny from ever ending.
    with contextlib.suppress(TimeoutError):
        cluster.close(timeout=CLOSE_S)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; threads and processes that begin in it never see it.

    A terminal sends it to workers too, which would each die with a traceback, as would dask over a cluster that is half
    begun. Whoever began them ends them.
    """
    # It is started with the first process otherwise, and lets interrupts through again in the thread that starts it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
