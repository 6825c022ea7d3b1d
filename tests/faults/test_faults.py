"""Ten thousand faults in a store: every one is found and named, and what is repaired is what it was."""

from __future__ import annotations

import csv
import functools
import importlib.util
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from kd.pipeline.errors import KdError, RefusedError
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import Signal, open_store, verify_store
from kd.stages.cache_teacher import CacheTeacher, capture, runner
from kd.stages.cache_teacher import teacher as teachers
from kd.stages.store.repair import RepairStore

_spec = importlib.util.spec_from_file_location("inject", Path(__file__).with_name("inject.py"))
assert _spec is not None and _spec.loader is not None
inject = importlib.util.module_from_spec(_spec)
sys.modules["inject"] = inject  # dataclasses look their module up
_spec.loader.exec_module(inject)

ROWS = 16


@pytest.fixture(scope="module")
def one_teacher(tiny_teacher: Path) -> Iterator[Path]:
    """The tiny teacher, read and loaded once for all repairs of this module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(teachers, "describe_teacher", functools.lru_cache(teachers.describe_teacher))
    patch.setattr(teachers.Teacher, "unload", lambda self: None)
    patch.setattr(capture, "forget_teachers", lambda: None)
    patch.setattr(teachers, "tokenizer_identity", functools.lru_cache(teachers.tokenizer_identity))
    yield tiny_teacher
    patch.undo()
    capture.forget_teachers()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, one_teacher: Path, sentences: list[str]) -> Any:
    """A store of four shards, six signals on all axes, sidecars and views; half of its records are compacted."""
    folder = tmp_path_factory.mktemp("patient")

    def run(rows: int, signals: str) -> None:
        texts = folder / f"{rows}.csv"
        with texts.open("w", newline="") as stream:
            csv.writer(stream).writerows([["text"], *([text] for text in sentences[:rows])])
        stage = CacheTeacher(
            teacher=str(one_teacher),
            dataset=str(texts),
            text_column="text",
            store=str(folder / "store"),
            signals=signals,
            sidecars=("embeddings", "head"),
            rows_per_shard=ROWS,
            max_length=48,
            output_dir=str(folder / f"view-{rows}-{len(signals)}"),
        )
        execute(stage, StageContext())

    run(2 * ROWS, "logits,hidden.cls@1,hidden.tok@2")
    open_store(str(folder / "store")).compact()
    run(3 * ROWS + 8, "logits,hidden.cls@1,hidden.tok@2")
    run(3 * ROWS + 8, "hidden.mean@1,attention.score@1,attention.qkv@2")
    shutil.rmtree(folder / "store" / ".staging", ignore_errors=True)
    made = inject.Patient(folder / "store")
    assert verify_store(str(folder / "store")).ok and len(made.files) > 40
    return made


def missed(patient: Any, fault: Any) -> str | None:
    """What is wrong with what was said about a fault; None when it was found and named, or is none and was let be."""
    shards = None if fault.shard == -1 else () if fault.shard is None else (fault.shard,)
    try:
        report = verify_store(str(patient.root), shards=shards)
    except KdError as error:
        return None if "store.json" in fault.files else f"{fault}: refused: {error.what}"
    if fault.kind == inject.STALE:
        return f"{fault}: called damage: {report.problems[0]}" if report.problems else None
    found = {(problem.shard, problem.signal, problem.file) for problem in report.problems}
    if fault.unread:
        return _read_without_refusal(patient, fault)
    for shard, signal, file in fault.named:
        if not any(shard == other[0] and (signal in (None, other[1])) and (file in ("", other[2])) for other in found):
            return f"{fault}: {(shard, signal, file)} was not named, but {sorted(found, key=str)}"
    return None


def _read_without_refusal(patient: Any, fault: Any) -> str | None:
    """A shard whose record is gone counts as not captured: its rows are refused by signal and shard."""
    reader = open_store(str(patient.root)).reader()
    row = fault.shard * reader.layout.rows_per_shard
    for signal in fault.unread:
        try:
            gather = {"example": reader.gather, "token": reader.gather_tokens, "pair": reader.gather_pairs}
            gather[Signal.parse(signal).kind.axis](signal, [row])
        except RefusedError as refused:
            if signal in refused.what and (f"shard {fault.shard})" in refused.what or "holds no" in refused.what):
                continue
            return f"{fault}: {signal}: {refused.what}"
        return f"{fault}: {signal} was read"
    return None


def find(patient: Any, count: int, seed: int) -> Counter[str]:
    """Put faults in one by one; how many of each kind were found (stale temporaries: let be)."""
    random, kinds, wrong = Random(seed), Counter[str](), []
    for _ in range(count):
        fault = patient.draw(random)
        with patient.with_fault(fault):
            wrong += [said] if (said := missed(patient, fault)) is not None else []
        kinds[fault.kind] += 1
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:20])
    assert verify_store(str(patient.root)).ok and patient.is_as_it_was()
    return kinds


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    original = runner.Runner._forward

    def forward(self: Any, token_ids: Any, segment_ids: Any, slots: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(slots))
        return original(self, token_ids, segment_ids, slots, *args, **kwargs)

    monkeypatch.setattr(runner.Runner, "_forward", forward)
    return seen


def repair(patient: Any, teacher: Path, count: int, seed: int, rows_run: list[int]) -> Counter[str]:
    """Put faults in one by one and repair each: to the exact digest, with nothing run but the damaged rows."""
    random, kinds = Random(seed), Counter[str]()
    digest = open_store(str(patient.root)).digest()
    texts = patient.root.parent / f"{3 * ROWS + 8}.csv"
    lengths = {shard: len(open_store(str(patient.root)).read_tokens(shard).rows) for shard in range(4)}
    while kinds.total() < count:
        fault = patient.draw(random)
        if any(name.startswith("views/") for name in fault.files) or fault.kind == inject.STALE:
            continue
        rows_run.clear()
        with patient.with_fault(fault):
            stage = RepairStore(
                store=str(patient.root), teacher=str(teacher), device="cpu", dataset=str(texts), text_column="text"
            )
            outcome = execute(stage, StageContext())
            lost = None if outcome.failure is None else outcome.failure.details
            assert lost is None or _cannot_be_proven(fault), f"{fault}: {lost}"
            if lost is None:
                assert open_store(str(patient.root)).digest() == digest, str(fault)
                assert verify_store(str(patient.root)).ok, str(fault)
                shards = {inject.place_of(name)[0] for name in fault.files} | {fault.shard}
                assert sum(rows_run) <= sum(rows for shard, rows in lengths.items() if shard in shards), str(fault)
                kinds[fault.kind] += 1
        patient.restore()
    return kinds


def _cannot_be_proven(fault: Any) -> bool:
    """An edited record under its new name: what it said before is written nowhere."""
    return fault.kind == inject.EDIT and len(fault.files) == 2


def test_some_faults_are_found_and_named(patient: Any) -> None:
    find(patient, 150, seed=1)


def test_some_faults_are_repaired_to_the_exact_digest(patient: Any, one_teacher: Path, rows_run: list[int]) -> None:
    repair(patient, one_teacher, 12, 2, rows_run)


@pytest.mark.faults
def test_ten_thousand_faults_are_found_and_named(patient: Any, figures: Callable[..., None]) -> None:
    started = time.perf_counter()
    kinds = find(patient, 10_000, seed=3)
    figures(
        "injected faults",
        faults=kinds.total(),
        kinds=dict(kinds),
        found_and_named=kinds.total() - kinds[inject.STALE],
        let_be=kinds[inject.STALE],
        seconds=round(time.perf_counter() - started, 1),
    )


@pytest.mark.faults
def test_two_hundred_faults_are_repaired_to_the_exact_digest(
    patient: Any, one_teacher: Path, rows_run: list[int], figures: Callable[..., None]
) -> None:
    started = time.perf_counter()
    kinds = repair(patient, one_teacher, 200, 4, rows_run)
    figures(
        "repaired faults",
        repaired_to_the_exact_digest=kinds.total(),
        kinds=dict(kinds),
        seconds=round(time.perf_counter() - started, 1),
    )
