"""Two writers of one store, killed at random moments. Run by test_kills.py in a process of its own, or by hand:

    python kill_writers.py FOLDER KILLS SEED [careless]

The writers do what `kd cache-teacher` does with a store (its own job, claims and executor), with arithmetic in place of
the teacher's forward pass. A killed writer is started again at once. A round is a new store; which rows and signals
each writer has, and whether it compacts records on the way, follow from the seed. Prints one JSON object.

`careless` makes a store that writes its records in place, which has to be found out.

A fresh process forks cheaply and safely: nothing here starts threads but the writers.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "store"))
from conftest import PAIRS, SPECS, answer, make_rows

from kd.pipeline import executor
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import (
    ArraySpec,
    ShardWriter,
    Signal,
    StoreIdentity,
    StoreLayout,
    TeacherStore,
    create_or_open,
    open_store,
    row_keys,
)
from kd.pipeline.store.files import LocalFiles
from kd.stages.cache_teacher import capture
from kd.stages.cache_teacher.runner import SignalBatch

IDENTITY = StoreIdentity(teacher={"digest": "t"}, tokenizer={"digest": "k"}, capture={"max_length": 128})
LAYOUT = StoreLayout(rows_per_shard=8, tokens_per_shard=64, batch_tokens=32, chunk_bytes=64, pairs_per_shard=400)
KILLS_PER_ROUND = 25
PAUSE = time.sleep
WRITTEN = (*SPECS, *PAIRS)
SPECS_OF = {spec.signal: spec for spec in WRITTEN}
IDS, SEGMENTS = make_rows(320)


@dataclass(frozen=True)
class Work:
    """What one writer has to do: rows `first` to `stop` of the pool, some signals, and whether it compacts."""

    first: int
    stop: int
    specs: tuple[ArraySpec, ...]
    compacts: bool

    @property
    def rows(self) -> tuple[Ragged, Ragged]:
        return IDS.slice(self.first, self.stop), SEGMENTS.slice(self.first, self.stop)


def draw_work(rng: random.Random) -> tuple[Work, Work]:
    """The same rows, overlapping ones or others; signals in common or not."""
    first, second = rng.choice(
        [((0, 120), (0, 120)), ((0, 100), (60, 160)), ((0, 160), (40, 80)), ((0, 80), (80, 160))]
    )
    signals = [tuple(sorted(rng.sample(WRITTEN, rng.randint(1, 5)), key=WRITTEN.index)) for _ in range(2)]
    compacting = rng.choice([(False, False), (True, False), (True, True)])
    return Work(*first, signals[0], compacting[0]), Work(*second, signals[1], compacting[1])


# --- a writer ----------------------------------------------------------------------------------------------------


class StandIn:
    """In place of a loaded teacher and its runner."""

    num_halved = 0

    def runner(self, signals: Mapping[Signal, str]) -> StandIn:
        self.signals = signals
        return self

    def run(self, ids: Ragged, segments: Ragged, batches: Sequence[np.ndarray]) -> Iterator[SignalBatch]:
        for slots in batches:
            for _ in range(10):
                time.sleep(0.0003)
            rows = ids.take(slots), segments.take(slots)
            yield SignalBatch(slots, {signal: answer(SPECS_OF[signal], *rows) for signal in self.signals})


@dataclass(frozen=True)
class LoggedJob(capture.CaptureJob):
    """The job of `kd cache-teacher`, which says what it begins and what it has computed."""

    log: str = ""

    def fill(self, writer: ShardWriter, specs: Sequence[ArraySpec], advance: Callable[[int], None]) -> tuple[int, int]:
        self._say("begun", writer.shard, specs)
        done = super().fill(writer, specs, advance)
        self._say("computed", writer.shard, specs)
        return done

    def _say(self, what: str, shard: int, specs: Sequence[ArraySpec]) -> None:
        line = json.dumps([what, os.getpid(), shard, [spec.path for spec in specs]]).encode() + b"\n"
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line)
        os.close(descriptor)


class Phases:
    """What every writer is at, in memory that outlives it: one byte for each of its two threads, and a count of steps.

    A moment is a number of steps and not of seconds, so that it is as random on a busy machine as on an idle one.
    """

    NAMES = ("start", "open", "allocate", "declare", "sidecar", "compute", "commit", "compact", "wait")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4 + 16)
        self._steps = np.frombuffer(self._memory, np.uint64, 2, 4)

    def steps(self, writer: int) -> int:
        return int(self._steps[writer])

    def count_steps(self, writer: int) -> None:
        """Count file operations, and batches that the teacher runs."""

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._steps[writer] += 1
                return function(*args, **kwargs)

            return call

        for name in ("open", "read", "stat", "write", "fsync", "rename", "link", "unlink", "mkdir", "listdir", "close"):
            setattr(os, name, counted(getattr(os, name)))
        time.sleep = counted(time.sleep)  # type: ignore[assignment]

    def of(self, writer: int) -> str:
        main, writing = self._memory[2 * writer], self._memory[2 * writer + 1]
        if main == self.NAMES.index("compute") and writing:
            return "compute and commit"
        return self.NAMES[writing or main]

    def begin(self, writer: int) -> None:
        self._memory[2 * writer] = self._memory[2 * writer + 1] = 0
        self._steps[writer] = 0

    def watch(self, writer: int, owner: Any, name: str, phase: str, thread: int = 0) -> None:
        """Say so while `owner.name` runs."""
        function, place = getattr(owner, name), 2 * writer + thread

        def watched(*args: Any, **kwargs: Any) -> Any:
            before, self._memory[place] = self._memory[place], self.NAMES.index(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._memory[place] = before

        setattr(owner, name, watched)


def write(folder: Path, work: Work, log: Path) -> None:
    """What `kd cache-teacher` does with a store."""
    store = create_or_open(folder, IDENTITY, LAYOUT)
    allocation = store.allocate(*work.rows)
    store.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32)})
    store.declare(work.specs)
    missing = store.missing(work.specs, allocation.shards)
    job = LoggedJob(store, "stand-in", False, "t", "float32", "cpu", work.specs, str(log))
    capture._loaded[job.teacher_key] = StandIn()  # type: ignore[assignment]
    for number, outcome in enumerate(executor.map_shards(job, [*missing], name="kills")):
        assert outcome.failure is None, outcome
        if work.compacts and number % 4 == 3:
            store.compact()
    if work.compacts:
        store.compact()


def start(folder: Path, works: tuple[Work, Work], number: int, log: Path, phases: Phases) -> int:
    phases.begin(number)
    child = os.fork()
    if child:
        return child
    try:
        global create_or_open
        phases.count_steps(number)
        for name in ("allocate", "declare", "compact"):
            phases.watch(number, TeacherStore, name, name)
        phases.watch(number, TeacherStore, "put_sidecar", "sidecar")
        phases.watch(number, capture.CaptureJob, "fill", "compute")
        phases.watch(number, ShardWriter, "commit", "commit", thread=1)
        phases.watch(number, executor.time, "sleep", "wait")
        phases.watch(number, sys.modules[__name__], "create_or_open", "open")
        write(folder, works[number], log)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# --- the harness -------------------------------------------------------------------------------------------------


def ended(alive: dict[int, int], number: int, *, wait: bool) -> bool:
    """Whether a writer has ended by itself, and is therefore taken out; it may not have failed."""
    found, status = os.waitpid(alive[number], 0 if wait else os.WNOHANG)
    if found:
        del alive[number]
    assert not found or os.waitstatus_to_exitcode(status) == 0, "a writer failed"
    return bool(found)


def one_round(folder: Path, works: tuple[Work, Work], kills: int, rng: random.Random) -> tuple[Counter[str], list[int]]:
    """Phases in which writers were killed, and their process numbers."""
    log, phases, moments, victims = folder.with_suffix(".log"), Phases(), Counter[str](), []
    alive = {number: start(folder, works, number, log, phases) for number in range(2)}
    try:
        while alive and len(victims) < kills:
            number = rng.choice([*alive])
            # From a few steps on, soon after a start, to some shards.
            moment = phases.steps(number) + rng.randrange(rng.choice([30, 300, 1200]))
            while not (gone := ended(alive, number, wait=False)) and phases.steps(number) < moment:
                PAUSE(0.0002)
            if gone:
                continue
            victim = alive.pop(number)
            os.kill(victim, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
            assert code in (0, -signal.SIGKILL), "a writer failed"
            if code == 0:
                continue  # it was faster
            moments[phases.of(number)] += 1
            victims.append(victim)
            alive[number] = start(folder, works, number, log, phases)
        for number in [*alive]:
            ended(alive, number, wait=True)
    finally:
        for child in alive.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return moments, victims


def check(folder: Path, works: tuple[Work, Work]) -> None:
    """Nothing lost, nothing twice, nothing wrong, nothing left over, and the digest of an undisturbed run."""
    store = create_or_open(folder, IDENTITY, LAYOUT)
    staging = folder / ".staging"
    assert not (left := [*staging.iterdir()] if staging.exists() else []), f"left in staging: {left}"
    report = store.verify()
    assert not report.problems, report.problems
    catalogue, reader = store.catalogue(), store.reader()

    distinct = {bytes(key) for work in works for key in row_keys(*work.rows)}
    stored = [bytes(key) for shard in range(catalogue.num_shards) for key in row_keys(*tokens_of(store, shard))]
    assert len(stored) == len(set(stored)) and set(stored) == distinct, "rows are lost, there twice, or nobody's"

    expected: dict[int, set[ArraySpec]] = defaultdict(set)
    for work in works:
        ids, segments = work.rows
        rows = store.lookup(row_keys(ids, segments))
        assert (rows >= 0).all()
        for shard in np.unique(rows // LAYOUT.rows_per_shard).tolist():
            expected[shard].update(work.specs)
        for spec in work.specs:
            assert reader.has(spec.signal, rows).all(), f"{spec.signal}: rows without"
            if spec.axis == "example":
                found = reader.gather(spec.signal, rows)
            else:
                padded, lengths = (reader.gather_pairs if spec.axis == "pair" else reader.gather_tokens)(
                    spec.signal, rows
                )
                inside = np.arange(padded.shape[1]) < lengths[:, None]
                found = padded[inside if spec.axis == "token" else inside[:, :, None] & inside[:, None, :]]
            assert np.array_equal(found, answer(spec, ids, segments)), f"{spec.signal}: other values"
    held = {(path, shard) for path, files in catalogue.files.items() for shard in files}
    inputs = {(spec.path, shard) for spec in LAYOUT.input_specs for shard in range(catalogue.num_shards)}
    assert held - inputs == {(spec.path, shard) for shard, specs in expected.items() for spec in specs}

    # Whose rows came first is up to chance, with kills or without: the undisturbed run has them in the same order.
    calm = create_or_open(folder.with_suffix(".calm"), IDENTITY, LAYOUT)
    for shard in range(catalogue.num_shards):
        assert calm.allocate(*tokens_of(store, shard)).shards_new == (shard,)
    calm.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32)})
    calm.declare(sorted(set().union(*expected.values()), key=lambda spec: spec.path))
    for shard, specs in expected.items():
        writer = calm.writer(shard, [*specs])
        ids, segments = tokens_of(calm, shard)
        for spec in specs:
            writer.put(spec.signal, np.arange(len(ids)), answer(spec, ids, segments))
        writer.commit()
    assert open_store(folder).digest() == calm.digest(), "another digest than that of an undisturbed run"


def tokens_of(store: TeacherStore, shard: int) -> tuple[Ragged, Ragged]:
    rows = store.read_tokens(shard)
    return rows.token_ids, rows.segment_ids


def recomputed(log: Path, victims: Sequence[int]) -> tuple[list[int], list[int]]:
    """Per kill: shards that the writer had computed, and those it had begun as well, that were computed again."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    times = Counter((shard, path) for what, _, shard, paths in events if what == "computed" for path in paths)
    computed, begun = Counter[int](), Counter[int]()
    for position, (what, process, shard, paths) in enumerate(events):
        again = any(e[0] == "begun" and e[2] == shard and set(e[3]) & set(paths) for e in events[position + 1 :])
        if not again:
            continue
        assert process in victims, f"shard {shard} was computed again, and nobody who had it was killed"
        (computed if what == "computed" else begun)[process] += 1
    assert all(count for count in times.values())
    return [computed[victim] for victim in victims], [begun[victim] for victim in victims]


def harness(top: Path, kills: int, seed: int) -> dict[str, Any]:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # no power is cut here
    rng, started = random.Random(seed), time.perf_counter()
    moments, lost, touched, rounds, shards = Counter[str](), [], [], 0, 0
    while len(lost) < kills:
        works, folder = draw_work(rng), top / f"round{rounds}"
        found, victims = one_round(folder, works, min(KILLS_PER_ROUND, kills - len(lost)), rng)
        moments += found
        check(folder, works)
        again, begun = recomputed(folder.with_suffix(".log"), victims)
        lost, touched, rounds = lost + again, touched + begun, rounds + 1
        shards += open_store(folder).catalogue().num_shards
        for path in (folder, folder.with_suffix(".calm")):
            shutil.rmtree(path)
    return {
        "kills": len(lost),
        "moments": dict(moments.most_common()),
        "rounds": rounds,
        "shards": shards,
        "shards_recomputed": sum(lost),
        "most_recomputed_after_a_kill": max(lost),
        "most_begun_again_after_a_kill": max(touched),
        "seconds": round(time.perf_counter() - started, 1),
    }


def create_in_place(files: LocalFiles, name: str, data: bytes) -> bool:
    """What `LocalFiles.create` must not do: a file that is there before it is complete."""
    path = Path(files.path(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        file.write(data[: len(data) // 2])
        time.sleep(0.002)
        file.write(data[len(data) // 2 :])
    return True


if __name__ == "__main__":
    if "careless" in sys.argv:
        LocalFiles.create = create_in_place  # type: ignore[method-assign]
    print(json.dumps(harness(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
