"""Kills processes that write a store, reruns them, and compares every byte. Run by test_kill.py on its own:

    python kill_runs.py every-step FOLDER FIRST STRIDE    a kill before every STRIDE-th file operation
    python kill_runs.py compaction FOLDER FIRST STRIDE    the same while records are compacted
    python kill_runs.py collection FOLDER FIRST STRIDE    the same while garbage is collected
    python kill_runs.py merging FOLDER FIRST STRIDE       the same while stores are merged
    python kill_runs.py two-writers FOLDER ROUNDS SEED    two writers of one store, each killed at a random moment

A fresh process forks cheaply and safely: nothing here starts threads.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from conftest import SPECS, capture, make_rows, tree

from kd.pipeline.artifact import write_manifest
from kd.pipeline.store import StoreIdentity, StoreLayout, create_or_open, open_store
from kd.pipeline.store.gc import collect_garbage
from kd.pipeline.store.merge import merge_stores

IDENTITY = StoreIdentity(teacher={"digest": "t"}, tokenizer={"digest": "k"}, capture={"max_length": 128})
LAYOUT = StoreLayout(rows_per_shard=4, tokens_per_shard=32, chunk_bytes=32)
STEPS = ("open", "write", "fsync", "rename", "link", "unlink", "mkdir", "ftruncate", "close")


def work(folder: Path) -> None:
    """Two overlapping corpora, the second with one more signal, and a sidecar."""
    ids, segments = make_rows(9)
    store = create_or_open(folder, IDENTITY, LAYOUT)
    first = store.allocate(ids.slice(0, 5), segments.slice(0, 5))
    capture(store, SPECS[:1], first.shards)
    store.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32)})
    second = store.allocate(ids, segments)
    capture(store, [SPECS[0], SPECS[3]], second.shards)


def compact(folder: Path) -> None:
    """A few records in a compacted file, the others loose, and all of them into one."""
    create_or_open(folder, IDENTITY).compact()


def fork(run: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def wait(child: int) -> bool:
    """Whether the child ended by itself; it may not have failed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return True


def work_until(step: int, folder: Path, work: Callable[[Path], None] = work) -> None:
    """Do the work, killed before file operation number `step`; of a write, half is done."""
    count = 0

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == step:
                if name == "write":
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    work(folder)


def every_step(top: Path, first: int, stride: int) -> None:
    os.fsync = lambda descriptor: None  # no power is cut here
    work(top / "reference")
    expected, digest = tree(top / "reference"), open_store(top / "reference").digest()
    step, kills = first, 0
    while True:
        folder = top / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        if wait(fork(partial(work_until, step, folder))):
            break
        if (folder / "store.json").exists():
            check_sound(folder, step)
        work(folder)
        require_equal(folder, expected, digest, f"killed before step {step}")
        step, kills = step + stride, kills + 1
    assert kills * stride > 300, "so few file operations cannot be all of them"
    print(f"{kills} kills, {step} steps")


def compaction(top: Path, first: int, stride: int) -> None:
    os.fsync = lambda descriptor: None
    ids, segments = make_rows(9)
    begun = create_or_open(top / "begun", IDENTITY, LAYOUT)
    capture(begun, SPECS[:1], begun.allocate(ids.slice(0, 5), segments.slice(0, 5)).shards)
    compact(top / "begun")
    work(top / "begun")
    shutil.copytree(top / "begun", top / "reference")
    compact(top / "reference")
    expected, digest = tree(top / "reference"), open_store(top / "begun").digest()
    step, kills = first, 0
    while True:
        folder = top / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(top / "begun", folder)
        if wait(fork(partial(work_until, step, folder, compact))):
            break
        found = open_store(folder)
        assert found.digest() == digest, f"killed before step {step}"
        assert found.verify().ok, f"killed before step {step}: {found.verify().problems}"
        compact(folder)
        require_equal(folder, expected, digest, f"compaction killed before step {step}")
        step, kills = step + stride, kills + 1
    assert kills * stride > 20, "so few file operations cannot be all of them"
    print(f"{kills} kills, {step} steps")


def collect(folder: Path) -> None:
    """Signals that one of two views needs stay, the others go."""
    collect_garbage(open_store(folder), delete=True)


def collection(top: Path, first: int, stride: int) -> None:
    os.fsync = lambda descriptor: None
    begun = create_or_open(top / "begun", IDENTITY, LAYOUT)
    shards = begun.allocate(*make_rows(12)).shards
    capture(begun, SPECS[:2], shards[:-1])
    compact(top / "begun")
    capture(begun, SPECS, shards)
    write_manifest(top / "view", {"kind": "view", "fingerprint": "a" * 32})
    for letter, name, signals, of in (("a", "view", SPECS[1:3], shards[:2]), ("b", "gone", SPECS, shards)):
        begun.enter_view(letter * 32, top / name, corpus={}, signals=signals, num_rows=3, shards=of)
    begun.files.write("logits/c/77/0", [b"left by a killed process"])
    shutil.copytree(top / "begun", top / "reference")
    collect(top / "reference")
    reference = open_store(top / "reference")
    expected, digest = tree(top / "reference"), reference.digest()
    assert reference.verify().ok and not reference.verify().unrecorded
    step, kills = first, 0
    while True:
        folder = top / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(top / "begun", folder)
        if wait(fork(partial(work_until, step, folder, collect))):
            break
        report = open_store(folder).verify()
        assert report.ok, f"collection killed before step {step}: {report.problems}"
        collect(folder)
        assert open_store(folder).digest() == digest, f"collection killed before step {step}"
        assert not (report := open_store(folder).verify()).unrecorded and report.ok
        found = {name: data for name, data in tree(folder).items() if not name.startswith("commits/")}
        differ = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
        assert all(name.startswith("commits/") for name in differ), f"killed before step {step}: {differ}"
        step, kills = step + stride, kills + 1
    assert kills * stride > 20, "so few file operations cannot be all of them"
    print(f"{kills} kills, {step} steps")


def merge(folder: Path) -> None:
    """Two stores that overlap, into one that knows some rows of each and lacks a signal of its own."""
    sources = [open_store(folder.parent / name) for name in ("first", "second")]
    merge_stores(create_or_open(folder, IDENTITY, LAYOUT), sources)


def merging(top: Path, first: int, stride: int) -> None:
    os.fsync = lambda descriptor: None
    ids, segments = make_rows(22)
    for name, some, specs in (
        ("first", range(12), SPECS[:2]), ("second", range(9, 22), SPECS[:3]), ("begun", [0, 1, 20, 21], SPECS[2:3])
    ):  # fmt: skip
        store = create_or_open(top / name, IDENTITY, LAYOUT)
        capture(store, specs, store.allocate(ids.take([*some]), segments.take([*some])).shards)
    sources = tree(top / "first") | tree(top / "second")
    shutil.copytree(top / "begun", top / "reference")
    merge(top / "reference")
    expected, digest = tree(top / "reference"), open_store(top / "reference").digest()
    step, kills = first, 0
    while True:
        folder = top / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(top / "begun", folder)
        if wait(fork(partial(work_until, step, folder, merge))):
            break
        check_sound(folder, step)
        merge(folder)
        require_equal(folder, expected, digest, f"merge killed before step {step}")
        step, kills = step + stride, kills + 1
    assert kills * stride > 100, "so few file operations cannot be all of them"
    assert tree(top / "first") | tree(top / "second") == sources, "a source was changed"
    print(f"{kills} kills, {step} steps")


def check_sound(folder: Path, step: int) -> None:
    """Between kill and rerun: what is committed is right, what is not is refused."""
    report = open_store(folder).verify()
    # Arrays that a kill left undeclared or too short are made whole by the next writer.
    damage = [problem for problem in report.problems if not problem.file.endswith("zarr.json")]
    assert not damage, f"after a kill before step {step}: {damage}"


def require_equal(folder: Path, expected: dict[str, bytes], digest: str, when: str) -> None:
    found = tree(folder)
    differ = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    assert not differ, f"{when}: {differ} differ from an undisturbed run"
    assert open_store(folder).digest() == digest, when


def two_writers(top: Path, rounds: int, seed: int) -> None:
    os.fsync = lambda descriptor: None
    work(top / "reference")
    expected, digest = tree(top / "reference"), open_store(top / "reference").digest()
    started = time.perf_counter()
    work(top / "timed")
    duration = time.perf_counter() - started
    rng, killed = random.Random(seed), 0
    for round_ in range(rounds):
        folder = top / f"round{round_}"
        for _ in range(rng.choice([1, 2, 3])):
            children = [fork(partial(work, folder)) for _ in range(2)]
            for child in children:
                time.sleep(rng.random() * duration)
                os.kill(child, signal.SIGKILL)
            killed += sum(not wait(child) for child in children)
        work(folder)
        require_equal(folder, expected, digest, f"round {round_}")
        shutil.rmtree(folder)
    assert killed > rounds / 2, "the kills came too late to mean anything"
    print(f"{killed} kills in {rounds} rounds")


if __name__ == "__main__":
    mode, folder, *numbers = sys.argv[1:]
    modes = {
        "every-step": every_step,
        "compaction": compaction,
        "collection": collection,
        "merging": merging,
        "two-writers": two_writers,
    }
    modes[mode](Path(folder), *map(int, numbers))
