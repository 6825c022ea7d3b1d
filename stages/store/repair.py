"""`kd store repair`: what is damaged is restored, with the teacher run on the damaged rows only."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import IncompleteError, KdError, RefusedError, UsageError, VerificationError
from ...pipeline.executor import check_execution, cluster_option, map_shards, workers_option
from ...pipeline.stage import Stage, StageContext, StageResult, option
from .verify import verify_with

if TYPE_CHECKING:
    from ...pipeline.store import ArraySpec, Problem, ShardWriter, TeacherStore
    from ...pipeline.store.repair import Outcome, Replaced
    from ...pipeline.store.repair_rows import Inputs
    from ..cache_teacher.capture import CaptureJob
    from ..cache_teacher.teacher import Teacher

TEACHER, TEXTS, RUNNING = "Teacher", "Texts", "Running"


@dataclass(frozen=True, kw_only=True)
class RepairStore(Stage):
    """Restores what is damaged in a store; every byte it writes has the recorded checksum, or it says so."""

    command: ClassVar[str] = "store repair"
    on_interrupt: ClassVar[str] = "what was repaired stays; the same command goes on with the rest"

    store: str = option(help="The store.", positional=True, metavar="STORE")
    teacher: str | None = option(
        None,
        help="The store's teacher; without it, only what checksums alone prove is restored.",
        panel=TEACHER,
        metavar="PATH|ID",
    )
    trust_remote_code: bool = option(False, help="Run Python code that comes with the checkpoint.", panel=TEACHER)
    device: str | None = option(
        None, help="Where the teacher runs; cuda where there is one.", identity=False, panel=TEACHER, metavar="DEVICE"
    )
    accept_recomputed: bool = option(
        False,
        help="Where the teacher now gives other bytes than recorded (another machine), commit them in their place.",
        panel=TEACHER,
    )

    corpus: str | None = option(
        None, help="Corpus the store was captured from: restores lost token ids.", panel=TEXTS, metavar="CORPUS"
    )
    dataset: str | None = option(None, help="Or a dataset, with :split.", panel=TEXTS, metavar="D[:split]")
    text_column: str | None = option(None, help="Column of the text.", panel=TEXTS, metavar="COLUMN")
    text_pair_column: str | None = option(None, help="Column of the second text.", panel=TEXTS, metavar="COLUMN")

    workers: int = workers_option(RUNNING)
    cluster: str | None = cluster_option(RUNNING)
    dry_run: bool = option(False, help="Say what is damaged and what would be run, and write nothing.", panel=RUNNING)

    def __post_init__(self) -> None:
        check_execution(self.workers, self.cluster)
        if self.corpus is not None and self.dataset is not None:
            raise UsageError("give either --corpus or --dataset", fix="--corpus CORPUS, or --dataset D --text-column C")
        if (self.dataset is None) != (self.text_column is None):
            raise UsageError("--dataset and --text-column go together", fix="name both, or give --corpus")
        if (self.corpus or self.dataset) and self.teacher is None:
            raise UsageError("texts are read with the teacher's tokenizer", fix="give --teacher too")

    # --- what is there -------------------------------------------------------------------------------------------

    @cached_property
    def _teacher(self) -> Teacher | None:
        from ..cache_teacher.teacher import describe_teacher

        if self.teacher is None:
            return None
        return describe_teacher(self.teacher, trust_remote_code=self.trust_remote_code)

    def _open(self, outcome: Outcome) -> TeacherStore:
        """The store; one whose store.json is damaged or missing gets it back if that can be proven."""
        from ...pipeline.store import open_store
        from .store_file import restore_store_file

        try:
            return open_store(self.store)
        except (VerificationError, RefusedError) as error:
            damage = error
        restore_store_file(self.store, self._teacher, damage, outcome, write=not self.dry_run)
        if self.dry_run:
            raise damage
        return open_store(self.store)

    # --- the work ------------------------------------------------------------------------------------------------

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store.repair import Outcome
        from ..cache_teacher.capture import forget_teachers
        from ..cache_teacher.teacher import require_teacher_of

        outcome = Outcome()
        store = self._open(outcome)
        if self._teacher is not None:
            # From here on as the store was captured: over masked text, where its rows are.
            self.__dict__["_teacher"] = self._teacher.as_captured(store)
            require_teacher_of(store, self._teacher)
        report, died = verify_with(self.store, context, workers=self.workers, cluster=self.cluster)
        if died:
            raise IncompleteError(f"{len(died)} shards could not be checked, so nothing was repaired", details=died)
        if self.dry_run:
            return self._dry_run(store, report.problems)
        try:
            return self._repair(store, report.problems, outcome, context)
        finally:
            forget_teachers()
            if self._teacher is not None:
                self._teacher.unload()

    def _repair(
        self, store: TeacherStore, problems: Sequence[Problem], outcome: Outcome, context: StageContext
    ) -> StageResult:
        from ...pipeline.store.repair import repair_metadata, repair_views, sound_records
        from ...pipeline.store.repair_records import repair_records, unrecorded_specs
        from ...pipeline.store.repair_rows import repair_rows
        from ...pipeline.store.verify import verify_store

        inputs = self._inputs(context) if any(p.signal in _ROWS for p in problems) else None
        shards = {problem.shard for problem in problems if problem.shard is not None}
        with store.files.lock():
            store.sweep()
            for orphan in repair_records(store, outcome):
                if self._teacher is None:
                    outcome.lose(orphan, _NEEDS_TEACHER)
                else:
                    # What it named is found below as files without a record, and computed again.
                    store.files.remove(orphan)
                    outcome.remove(int(orphan.split("/")[1][:8]), "record", orphan, "nothing proves what it said")
            records = sound_records(store)
            allocations = [record for record in records if record.index is not None]
            repair_rows(store, allocations, shards, inputs, outcome)
            repair_metadata(store, records, outcome)
            repair_views(store, outcome)
            unrecorded = unrecorded_specs(store, records) if self._teacher is not None else {}
        self._repair_sidecars(store, problems, outcome)
        computed = self._repair_signals(store, shards, unrecorded, outcome, context)

        touched = sorted({*shards, *unrecorded})
        after = verify_store(self.store, shards=touched)
        summary = {
            "url": store.url,
            "ok": after.ok,
            "problems_found": len(problems),
            "restored": [vars(mended) for mended in outcome.restored],
            "removed": [vars(mended) for mended in outcome.removed],
            "rows_computed": sum(shard.rows for shard in computed),
            "shards_computed": len(computed),
            "differs": [file for shard in computed for file in shard.differs],
            "accepted": [file for shard in computed for file in shard.accepted],
            "problems": [vars(problem) for problem in after.problems],
            "lost": dict(outcome.lost),
            "store_digest": store.digest() if after.ok else None,
        }
        return StageResult(summary=summary, failure=_failure(self.store, after.problems, outcome))

    def _inputs(self, context: StageContext) -> Inputs | None:
        """The rows of the texts given."""
        from ...pipeline.store import open_store
        from ...pipeline.store.repair_rows import Inputs
        from ..cache_teacher.tokenize import encode_rows
        from ..corpus import DatasetSource, load_corpus, open_corpus

        if self.corpus is not None:
            corpus = open_corpus(self.corpus)
        elif self.dataset is not None:
            assert self.text_column is not None
            corpus = load_corpus(
                DatasetSource(
                    dataset=self.dataset, text_column=self.text_column, text_pair_column=self.text_pair_column
                )
            )
        else:
            return None
        assert self._teacher is not None
        texts_a, texts_b = corpus.texts()
        task = context.progress.task("tokenising", total=len(texts_a), unit="rows")
        longest = int(open_store(self.store).identity.capture["max_length"])
        encoded = encode_rows(self._teacher.tokenizer, texts_a, texts_b, longest, advance=task.advance)
        task.done()
        return Inputs.distinct(encoded.token_ids, encoded.segment_ids)

    def _repair_sidecars(self, store: TeacherStore, problems: Sequence[Problem], outcome: Outcome) -> None:
        from ...pipeline.store.sidecar import restore_sidecar
        from ..cache_teacher.sidecars import sidecar_contents

        for name in sorted(
            {p.signal.split(" ", 1)[1] for p in problems if p.signal and p.signal.startswith("sidecar ")}
        ):
            file = next(p.file for p in problems if p.signal == f"sidecar {name}")
            if self._teacher is None:
                outcome.lose(file, _NEEDS_TEACHER)
                continue
            made = sidecar_contents(self._teacher, name)
            if made is None:
                outcome.lose(file, f"kd does not know how to make a sidecar called {name!r}: restore it from a copy")
                continue
            restore_sidecar(store.files, store.store_digest, name, *made, outcome, accept=self.accept_recomputed)

    def _repair_signals(
        self,
        store: TeacherStore,
        shards: set[int],
        unrecorded: Mapping[int, tuple[ArraySpec, ...]],
        outcome: Outcome,
        context: StageContext,
    ) -> list[RepairedShard]:
        """Run the teacher on shards with damaged or unrecorded signals, and put its files in their places."""
        from ...pipeline.store.repair import damaged_files, has_sound_rows, sound_records
        from ..cache_teacher.capture import job_for, worker_environments

        records = sound_records(store)
        damaged = damaged_files(store, (record for record in records if record.shard in shards))
        for shard in sorted({*damaged, *unrecorded}):
            if self._teacher is None:
                reason = _NEEDS_TEACHER
            elif not has_sound_rows(store, shard):
                reason = "the token ids of its shard are lost, so the teacher cannot read them again"
            else:
                continue
            for file in damaged.pop(shard, ()):
                outcome.lose(file.file, reason)
            unrecorded = {other: specs for other, specs in unrecorded.items() if other != shard}
        if not damaged and not unrecorded:
            return []
        teacher = self._teacher
        assert teacher is not None
        capture = job_for(store, teacher, device=self.device)
        job = RepairJob(
            capture,
            {shard: tuple(file.spec for file in files) for shard, files in damaged.items()},
            unrecorded,
            self.accept_recomputed,
        )
        here = self.cluster == "none" or (self.workers == 1 and self.cluster is None)
        numbers = sorted({*damaged, *unrecorded})
        rows = sum(record.rows for record in records if record.index and record.shard in numbers)
        task = context.progress.task("repairing", total=rows, unit="rows")
        computed: list[RepairedShard] = []
        for done in map_shards(
            job,
            numbers,
            name=f"{store.store_digest[:16]}-repair-{uuid.uuid4().hex[:8]}",
            workers=self.workers,
            cluster=self.cluster,
            worker_env=() if here else worker_environments(capture.device),
            on_advance=task.advance,
        ):
            if done.record is None:
                for file in damaged.get(done.shard, ()):
                    outcome.lose(file.file, f"shard {done.shard} failed: {done.failure}")
                continue
            computed.append(done.record)
            for name, signal in done.record.restored:
                outcome.restore(done.shard, signal, name, "computed again; it has the recorded checksum")
            for name, signal in done.record.corrected:
                outcome.restore(
                    done.shard, signal, name, "file and teacher agree; a new record supersedes one that said otherwise"
                )
            for name in done.record.differs:
                outcome.lose(
                    name,
                    "computed again, it is not what was recorded: the store was captured on another kind of machine or "
                    "with other numbers of threads. Repair it there, or commit what this machine computes with "
                    "--accept-recomputed",
                )
        task.done()
        return computed

    # --- what it says --------------------------------------------------------------------------------------------

    def _dry_run(self, store: TeacherStore, problems: Sequence[Problem]) -> StageResult:
        from ...pipeline.store.layout import parse_shard_file
        from ...pipeline.store.repair import sound_records

        to_run = {p.shard for p in problems if parse_shard_file(p.file) and p.signal not in _ROWS}
        rows = sum(r.rows for r in sound_records(store) if r.index is not None and r.shard in to_run)
        summary = {
            "url": store.url,
            "dry_run": True,
            "ok": not problems,
            "problems": [vars(problem) for problem in problems],
            "rows_to_compute": rows,
            "shards_to_compute": len(to_run),
        }
        return StageResult(summary=summary, finished=False)

    def report(self, summary: Mapping[str, Any]) -> str:
        if summary.get("dry_run"):
            lines = [f"store {summary['url']}: {len(summary['problems'])} problems; nothing was written"]
            lines += [f"  {_place(problem)}: {problem['what']}" for problem in summary["problems"]]
            lines.append(
                f"  to run: {summary['rows_to_compute']} rows in {summary['shards_to_compute']} shards"
                + ("" if self.teacher else " (with --teacher)")
            )
            return "\n".join(lines)
        state = "as recorded" if summary["ok"] else f"{len(summary['problems'])} problems left"
        lines = [
            f"store {summary['url']}: {summary['problems_found']} problems found, "
            f"{len(summary['restored'])} files restored, {summary['rows_computed']} rows computed: {state}"
        ]
        lines += [f"  restored  {_place(mended)}: {mended['how']}" for mended in summary["restored"]]
        lines += [f"  accepted  {file}: as this machine computes it" for file in summary["accepted"]]
        lines += [f"  removed   {_place(mended)}: {mended['how']}" for mended in summary["removed"]]
        return "\n".join(lines)


_ROWS = ("index", "token_ids", "segment_ids")
_NEEDS_TEACHER = "the teacher makes it again: give --teacher"


def _place(entry: Mapping[str, Any]) -> str:
    shard = "" if entry["shard"] is None else f"shard {entry['shard']}, "
    return f"{shard}{entry['signal'] or 'store'} ({entry['file']})"


def _failure(url: str, problems: Sequence[Problem], outcome: Outcome) -> KdError | None:
    if not problems and not outcome.lost:
        return None
    files = {problem.file: problem.what for problem in problems}
    lines = [f"{file}: {outcome.lost.get(file, what)}" for file, what in files.items()]
    lines += [f"{file}: {why}" for file, why in outcome.lost.items() if file not in files]
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return VerificationError(
        f"store {url}: {len(lines)} files could not be repaired",
        details=[*lines[:20], *more],
        fix="do what stands behind each of them, and run the same command again: what was repaired stays",
    )


# --- one shard ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepairedShard:
    """What became of a shard that was computed again.

    Attributes:
        rows: that the teacher read.
        restored: (file, signal) with the recorded checksum, or without a record before.
        corrected: (file, signal) that were right, while a record was not.
        accepted: files with another checksum, committed all the same.
        differs: files with another checksum, left as they were.
    """

    rows: int
    restored: tuple[tuple[str, str], ...]
    corrected: tuple[tuple[str, str], ...]
    accepted: tuple[str, ...]
    differs: tuple[str, ...]


@dataclass(frozen=True)
class RepairJob:
    """Computes the damaged signals of a shard again, in any process.

    Attributes:
        capture: the store and the teacher.
        damaged: per shard, arrays whose recorded file is damaged.
        unrecorded: per shard, arrays whose record is lost.
        accept: whether files may replace others that they differ from.
    """

    capture: CaptureJob
    damaged: Mapping[int, tuple[ArraySpec, ...]]
    unrecorded: Mapping[int, tuple[ArraySpec, ...]]
    accept: bool

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[ShardWriter, int]:
        """Run the teacher over the rows of a shard."""
        specs = (*self.damaged.get(shard, ()), *self.unrecorded.get(shard, ()))
        writer = self.capture.store.writer(shard, specs)
        rows, _ = self.capture.fill(writer, specs, advance)
        return writer, rows

    def finish(self, computed: tuple[ShardWriter, int]) -> RepairedShard:
        """Replace what is damaged, and commit what has no record."""
        from ...pipeline.store.repair import replace_files

        writer, rows = computed
        damaged = [spec.path for spec in self.damaged.get(writer.shard, ())]
        replaced: Replaced = replace_files(self.capture.store, writer, damaged, accept_recomputed=self.accept)
        record = writer.commit() if self.unrecorded.get(writer.shard) else None
        committed = () if record is None else record.files
        return RepairedShard(
            rows,
            tuple((file.file, file.spec.label) for file in (*replaced.restored, *committed)),
            tuple((file.file, file.spec.label) for file in replaced.corrected),
            tuple(file.file for file in replaced.accepted),
            tuple(file.file for file in replaced.refused),
        )
