"""One shard: read its token ids from the store, run the teacher, write its signals. Runs in any process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pipeline.errors import RefusedError
from ...pipeline.executor import Deferred
from ...pipeline.fingerprint import differing_fields
from ...pipeline.ragged import Ragged
from ...pipeline.store import ArraySpec, Claim, ShardWriter, Signal, TeacherStore
from ...pipeline.store.recode import recode
from .identity import tensor_digest
from .teacher import Teacher, describe_teacher

if TYPE_CHECKING:
    from torch import nn

    from .runner import Runner

CALIBRATION_TOKENS = 4096


@dataclass(frozen=True)
class CapturedShard:
    """What became of a shard.

    Attributes:
        rows: that the teacher read.
        bytes: written.
        num_halved: batches that did not fit into memory.
        rows_recoded: of which everything was made from what the store held.
    """

    rows: int
    bytes: int
    num_halved: int
    rows_recoded: int = 0


@dataclass(frozen=True)
class ComputedShard:
    """A shard in memory, claimed until it is committed."""

    writer: ShardWriter
    claim: Claim
    rows: int
    num_halved: int


@dataclass(frozen=True)
class CaptureJob:
    """Captures any shard of a store; small and picklable, so that it can run in any process.

    Attributes:
        store: opened; a worker opens it again.
        teacher: folder or hub id.
        trust_remote_code: as when it was described.
        tensors: digest that the teacher's tensors must have.
        dtype: compute dtype.
        device: where to run.
        specs: the signals wanted; a shard that holds some of them gets the others.
    """

    store: TeacherStore
    teacher: str
    trust_remote_code: bool
    tensors: str
    dtype: str
    device: str
    specs: tuple[ArraySpec, ...]

    @property
    def teacher_key(self) -> tuple[str, str, str]:
        """What must be equal for two jobs to share a loaded teacher."""
        return self.tensors, self.dtype, self.device

    def compute(self, shard: int, advance: Callable[[int], None]) -> ComputedShard | Deferred | None:
        """Get what a shard lacks, from the store or the teacher.

        Returns:
            None when all is there, since another process was faster; Deferred while another one is at it.
        """
        claim = self.store.claim(shard)
        if claim is None:
            return Deferred()
        try:
            # Asked only now: whoever had the claim before may have committed the shard.
            lacking = self.store.missing(self.specs, [shard]).get(shard)
            if lacking is None:
                claim.release()
                return None
            writer = self.store.writer(shard, lacking)
            recoded = recode(self.store, writer, lacking)
            rest = [spec for spec in lacking if spec.signal not in recoded]
            rows, num_halved = self.fill(writer, rest, advance) if rest else (0, 0)
            if not rest:
                advance(writer.num_rows)
        except BaseException:
            claim.release()
            raise
        return ComputedShard(writer, claim, rows, num_halved)

    def fill(self, writer: ShardWriter, specs: Sequence[ArraySpec], advance: Callable[[int], None]) -> tuple[int, int]:
        """Run the teacher over the rows of a writer's shard: (rows, batches that did not fit into memory)."""
        from .runner import plan_batches

        runner = _loaded_teacher(self).runner(computed_dtypes(specs))
        halved_before = runner.num_halved
        rows = self.store.read_tokens(writer.shard)
        batches = plan_batches(rows.token_ids.lengths, self.store.layout.batch_tokens)
        for batch in runner.run(rows.token_ids, rows.segment_ids, batches):
            for signal, values in batch.values.items():
                writer.put(signal, batch.slots, values)
            advance(len(batch.slots))
        return len(rows.rows), runner.num_halved - halved_before

    def runner(self, signals: Mapping[Signal, str]) -> Runner:
        """The teacher of this process, giving these signals in these dtypes."""
        return _loaded_teacher(self).runner(signals)

    def finish(self, computed: ComputedShard | None) -> CapturedShard:
        """Commit the shard, and give its claim back."""
        if computed is None:
            return CapturedShard(rows=0, bytes=0, num_halved=0)
        with computed.claim:
            record = computed.writer.commit()
        written = 0 if record is None else sum(file.bytes for file in record.files)
        return CapturedShard(
            computed.rows, written, computed.num_halved, rows_recoded=0 if computed.rows else computed.writer.num_rows
        )


def job_for(
    store: TeacherStore, teacher: Teacher, *, device: str | None, specs: tuple[ArraySpec, ...] = ()
) -> CaptureJob:
    """The job that runs a store's own teacher as its capture did; the teacher is at hand in this process.

    Args:
        device: where to run; None is a GPU where there is one.
    """
    from .teacher import resolve_device

    job = CaptureJob(
        store=store,
        teacher=str(teacher.folder) if Path(teacher.source).expanduser().is_dir() else teacher.source,
        trust_remote_code=teacher.trust_remote_code,
        tensors=teacher.tensor_digest,
        dtype=str(store.identity.capture["dtype"]),
        device=resolve_device(device),
        specs=specs,
    )
    keep_teacher(job, teacher)
    return job


def computed_dtypes(specs: Iterable[ArraySpec]) -> dict[Signal, str]:
    """What the teacher has to give each signal in: float32 where an encoding starts from it, else float16."""
    dtypes: dict[Signal, str] = {}
    for spec in specs:
        if dtypes.get(spec.signal) != "float32":
            dtypes[spec.signal] = "float16" if spec.encoding == "float16" else "float32"
    return dtypes


# --- the teacher of this process ---------------------------------------------------------------------------------


class LoadedTeacher:
    """A teacher with its weights, and the runner for the signals asked last."""

    def __init__(self, teacher: Teacher, model: nn.Module, device: str) -> None:
        from .onednn import use_onednn

        if device == "cpu":
            use_onednn(model)
        self._teacher, self._model, self._device = teacher, model, device
        self._signals: Mapping[Any, str] = {}
        self._runner: Runner | None = None

    def runner(self, signals: Mapping[Any, str]) -> Runner:
        """A runner that gives exactly these signals; the same one again while they stay the same."""
        from .runner import Runner

        if self._runner is None or self._signals != signals:
            if self._runner is not None:
                self._runner.close()
            # The model's own first: classifiers that read the last token find it by this id.
            pad_token_id = getattr(self._model.config, "pad_token_id", None)
            if pad_token_id is None:
                pad_token_id = self._teacher.tokenizer.pad_token_id
            self._runner = Runner(
                self._model,
                signals,
                device=self._device,
                pad_token_id=pad_token_id if pad_token_id is not None else 0,
                masking=self._teacher.masking,
            )
            self._signals = dict(signals)
        return self._runner


_Key = tuple[str, str, str]
_described: dict[_Key, Teacher] = {}
_loaded: dict[_Key, LoadedTeacher] = {}
_loading = threading.Lock()


def keep_teacher(job: CaptureJob, teacher: Teacher) -> None:
    """Let this process capture with a teacher that is described already, and perhaps loaded."""
    with _loading:
        _described[job.teacher_key] = teacher


def forget_teachers() -> None:
    """Let go of the models that this process captured with."""
    with _loading:
        _described.clear()
        _loaded.clear()


def _loaded_teacher(job: CaptureJob) -> LoadedTeacher:
    """The teacher of this process, loaded when the first shard needs it."""
    key = job.teacher_key
    with _loading:
        if key not in _loaded:
            teacher = _described.get(key) or describe_teacher(
                job.teacher, trust_remote_code=job.trust_remote_code
            ).as_captured(job.store)
            # Of the weights that were just read: a digest remembered by file stat says nothing about a later change.
            tensors = tensor_digest(teacher.load("auto"))
            if tensors != job.tensors:
                raise RefusedError(
                    f"teacher {job.teacher} changed while it was captured",
                    details={"tensors at the start": job.tensors, "tensors now": tensors},
                    fix="put the original teacher back, and run the same command again",
                )
            changed = differing_fields(job.store.identity.to_json()["teacher"], teacher.identity(tensors))
            if changed:
                raise RefusedError(
                    f"teacher {job.teacher} changed while it was captured (at the start → now)",
                    details=changed,
                    fix="put the original teacher back, and run the same command again",
                )
            model = teacher.load(job.dtype)
            teacher.unload()
            _loaded[key] = LoadedTeacher(teacher, model, job.device)
        return _loaded[key]


def worker_environments(device: str) -> Sequence[Mapping[str, str]]:
    """Environments that give every local worker process its own GPU; nothing for other devices."""
    if device != "cuda":
        return ()
    import os

    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


# --- estimate ----------------------------------------------------------------------------------------------------


def measure_rate(
    teacher: Teacher,
    token_ids: Ragged,
    segment_ids: Ragged,
    specs: Iterable[ArraySpec],
    *,
    batch_tokens: int,
    dtype: str,
    device: str,
) -> float:
    """Tokens per second of the teacher, from one batch of typical rows of what is to be computed."""
    runner = LoadedTeacher(teacher, teacher.load(dtype), device).runner(computed_dtypes(specs))
    batch = typical_batch(token_ids, min(CALIBRATION_TOKENS, batch_tokens))
    best = float("inf")
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        list(runner.run(token_ids, segment_ids, [batch]))
        best = min(best, time.perf_counter() - started)
    runner.close()
    teacher.unload()
    return float(token_ids.lengths[batch].sum()) / best


def typical_batch(token_ids: Ragged, budget: int) -> np.ndarray:
    """Rows of about the median length, at most `budget` tokens and at least one row."""
    order = np.argsort(token_ids.lengths, kind="stable")
    median = int(token_ids.lengths[order[len(order) // 2]])
    count = min(len(order), max(1, budget // max(median, 1)))
    start = max(0, len(order) // 2 - count // 2)
    return order[start : start + count]
