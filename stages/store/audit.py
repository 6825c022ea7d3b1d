"""`kd store audit`: the teacher asked again about a few rows, and its answers compared with what is stored."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import IncompleteError, KdError, UsageError, VerificationError
from ...pipeline.executor import ShardOutcome, check_execution, cluster_option, map_shards, workers_option
from ...pipeline.stage import Stage, StageContext, StageResult, option

if TYPE_CHECKING:
    import numpy.typing as npt

    from ...pipeline.store import ArraySpec, Signal, StoreReader, TeacherStore, View
    from ...pipeline.store.sequential import SequentialTest
    from ...pipeline.store.store import ShardRows
    from ..cache_teacher.capture import CaptureJob
    from ..cache_teacher.runner import Runner
    from ..cache_teacher.teacher import Teacher

    Array = npt.NDArray[Any]

ROUND = 8
"""Rows that are compared between two looks at the verdict, and that make one batch of another composition."""
NOISE_MARGIN = 10.0
"""Times the largest difference that the company in a batch makes."""
LEAST_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""Of the largest number of a signal, by compute dtype: what another kind of machine may differ by. Another row's values
differ by about as much as the numbers are large."""
SHARDS_KEPT = 4


@dataclass(frozen=True, kw_only=True)
class AuditStore(Stage):
    """Finds a store that was written wrongly, whose checksums fit."""

    command: ClassVar[str] = "store audit"
    on_interrupt: ClassVar[str] = "nothing was changed; the same command starts again"

    store: str = option(help="The store.", positional=True, metavar="STORE")
    teacher: str = option(help="The store's teacher.", metavar="PATH|ID")
    trust_remote_code: bool = option(False, help="Run Python code that comes with the checkpoint.")
    device: str | None = option(
        None, help="Where the teacher runs; cuda where there is one.", identity=False, metavar="DEVICE"
    )
    view: tuple[str, ...] = option(
        (), help="Views whose texts are tokenised again; those the store knows of.", metavar="VIEW"
    )
    max_rows: int = option(64, help="At most this many rows.", metavar="N")
    bad_share: float = option(
        0.05, help="The share of bad rows that must not be missed; 0.05 takes 59 rows.", metavar="SHARE"
    )
    seed: int = option(0, help="Which rows are drawn.", metavar="N")
    workers: int = workers_option()
    cluster: str | None = cluster_option()

    def __post_init__(self) -> None:
        check_execution(self.workers, self.cluster)
        if self.max_rows < 1:
            raise UsageError(f"--max-rows {self.max_rows}: at least one row is needed")
        if not 0.0001 <= self.bad_share <= 0.5:
            raise UsageError(f"--bad-share {self.bad_share}: a share is 0.0001 to 0.5")

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store import open_store
        from ...pipeline.store.sequential import SequentialTest
        from ..cache_teacher.capture import forget_teachers
        from ..cache_teacher.teacher import describe_teacher, require_teacher_of, resolve_device
        from .audit_sidecars import check_sidecars

        store = open_store(self.store)
        teacher = describe_teacher(self.teacher, trust_remote_code=self.trust_remote_code).as_captured(store)
        require_teacher_of(store, teacher)
        texts = SequentialTest(self.bad_share)
        checked = _check_texts(store, teacher, self._views(store), texts, self.max_rows, self.seed)
        audit = _Audit(store, SequentialTest(self.bad_share))
        try:
            compared, bad_sidecars = check_sidecars(store, teacher, device=resolve_device(self.device))
            died = self._compare(store, teacher, audit, context)
        finally:
            forget_teachers()
            teacher.unload()
        summary = {
            "url": store.url,
            "ok": not audit.bad and not checked.bad and not bad_sidecars,
            "verdict": _verdict(audit, checked, bad_sidecars),
            "rows": len(audit.seen),
            "rows_in_store": audit.num_rows,
            "bad_rows": audit.bad,
            "signals": {name: figures.to_json() for name, figures in sorted(audit.figures.items())},
            "texts": {"checked": checked.count, "by": checked.by, "bad": checked.bad},
            "sidecars": {"checked": compared, "bad": bad_sidecars},
            "confidence": 0.95,
            "bad_share": self.bad_share,
        }
        failure = _failure(store, summary)
        if failure is None and died:
            failure = IncompleteError("some rows could not be compared", details=died)
        return StageResult(summary=summary, failure=failure)

    def _compare(self, store: TeacherStore, teacher: Teacher, audit: _Audit, context: StageContext) -> list[str]:
        """Rounds of rows, until there are enough; why some could not be compared."""
        from ..cache_teacher.capture import job_for, worker_environments

        here = self.cluster == "none" or (self.workers == 1 and self.cluster is None)
        rounds = tuple(_rounds(store, self.max_rows, self.seed))
        capture = job_for(store, teacher, device=self.device)
        if not here:
            teacher.unload()  # workers load their own
        task = context.progress.task("auditing", total=min(self.max_rows, audit.test.rows_needed), unit="rows")
        died = []
        with closing(
            map_shards(
                CompareRows(capture, tuple(audit.specs), rounds),
                range(len(rounds)),
                # Unique to this run: a shared scheduler answers a known key with the old task's result.
                name=f"{store.digest()[:16]}-audit-{uuid.uuid4().hex[:8]}",
                workers=self.workers,
                cluster=self.cluster,
                worker_env=() if here else worker_environments(capture.device),
                on_advance=task.advance,
            )
        ) as outcomes:
            for outcome in _in_order(outcomes):
                if outcome.record is None:
                    died.append(f"rows {', '.join(map(str, rounds[outcome.shard]))}: {outcome.failure}")
                else:
                    audit.add(rounds[outcome.shard], outcome.record)
                if audit.test.verdict is not None:
                    break
        task.done()
        return died

    def _views(self, store: TeacherStore) -> list[View]:
        """The views given, or those that the store knows of and that are there."""
        from ...pipeline.store import open_view
        from ...pipeline.store.register import read_views

        if self.view:
            views = [open_view(path) for path in self.view]
            for view in views:
                if view.store.store_digest != store.store_digest:
                    raise UsageError(f"view {view.path} is of another store ({view.store.url})")
            return views
        found = []
        for registered in read_views(store.files, store.store_digest)[0]:
            folder = registered.found(store.files)
            if folder is not None:
                try:
                    found.append(open_view(folder))
                except KdError:
                    continue  # moved, or being made: its texts are somebody else's to check
        return found

    def report(self, summary: Mapping[str, Any]) -> str:
        lines = [
            f"store {summary['url']}: {summary['rows']} of {summary['rows_in_store']:,} rows compared: "
            f"{summary['verdict']}",
            f"  {'signal':<24} {'largest error':>14} {'mean':>10}   {'noise of batches':>16} {'mean':>10}",
        ]
        for name, said in summary["signals"].items():
            lines.append(
                f"  {name:<24} {said['error_max']:>14.3g} {said['error_mean']:>10.3g}   "
                f"{said['noise_max']:>16.3g} {said['noise_mean']:>10.3g}"
            )
            if "kl" in said:
                lines.append(
                    f"  {'':<24} KL {said['kl']:.3g} nats (noise {said['noise_kl']:.3g}), "
                    f"same label {said['same_label']:.1%} (noise {said['noise_same_label']:.1%})"
                )
        texts = summary["texts"]
        lines.append(f"  texts: {texts['checked']} {texts['by']}, {len(texts['bad'])} bad")
        sidecars = summary["sidecars"]
        lines.append(f"  sidecars: {', '.join(sidecars['checked']) or '(none)'}, {len(sidecars['bad'])} bad")
        return "\n".join(lines)


def _in_order(outcomes: Iterable[ShardOutcome[Any]]) -> Iterator[ShardOutcome[Any]]:
    """By number, so that the verdict does not depend on who was faster."""
    held: dict[int, ShardOutcome[Any]] = {}
    following = 0
    for outcome in outcomes:
        held[outcome.shard] = outcome
        while following in held:
            yield held.pop(following)
            following += 1


def _verdict(audit: _Audit, checked: _Checked, bad_sidecars: Sequence[str]) -> str:
    if audit.bad:
        return f"{len(audit.bad)} rows are not what the teacher says"
    if checked.bad or bad_sidecars:
        return "the tokenizer is another one" if checked.bad else "what it keeps of the teacher is not the teacher's"
    if len(audit.seen) == audit.num_rows:
        return "every row is what the teacher says"
    if audit.test.verdict:
        return f"at 95 % confidence, fewer than {audit.test.bad_share:.3g} of its rows are bad"
    bound = 1 - 0.05 ** (1 / max(1, len(audit.seen)))
    return f"none of these is bad; fewer than {bound:.2g} of all are, at 95 % confidence"


def _failure(store: TeacherStore, summary: Mapping[str, Any]) -> KdError | None:
    if summary["ok"]:
        return None
    lines = [
        f"row {bad['row']} (shard {bad['shard']}, slot {bad['slot']}): {bad['signal']} differs by {bad['error']:.3g}, "
        f"where {bad['tolerance']:.3g} can be explained"
        for bad in summary["bad_rows"][:20]
    ]
    lines += [f"{bad['what']}" for bad in summary["texts"]["bad"][:10]]
    lines += summary["sidecars"]["bad"][:10]
    return VerificationError(
        f"store {store.url} does not hold what its teacher says",
        details=lines,
        fix="capture the corpus again into a new store, and use that",
    )


# --- rows against the teacher ------------------------------------------------------------------------------------


def _rounds(store: TeacherStore, max_rows: int, seed: int) -> Iterator[list[int]]:
    """Row numbers, drawn from all rows that have a signal without putting any back, a few at a time."""
    import numpy as np

    catalogue, width = store.catalogue(), store.layout.rows_per_shard
    captured = {
        shard
        for path, files in catalogue.files.items()
        if catalogue.specs[path].signal.name in _kinds()
        for shard in files
    }
    shards = [record for record in catalogue.allocations if record.shard in captured]
    ends = np.cumsum([record.rows for record in shards], dtype=np.int64)
    if not len(ends):
        return
    drawn = np.random.default_rng(seed).choice(int(ends[-1]), size=min(max_rows, int(ends[-1])), replace=False)
    at = np.searchsorted(ends, drawn, side="right")
    numbers = np.array([record.shard for record in shards])[at] * width
    numbers += drawn - np.concatenate([[0], ends])[at]
    for start in range(0, len(numbers), ROUND):
        yield numbers[start : start + ROUND].tolist()


def _kinds() -> Sequence[str]:
    from ...pipeline.store import SIGNALS

    return [*SIGNALS]


@dataclass(frozen=True)
class Difference:
    """What was found about one signal of one row.

    Attributes:
        error, mean_error: stored against live, the largest and the mean difference.
        noise, mean_noise: live against live in other company.
        scale: the largest live number.
        encoding_error: the largest that the encoding of the live numbers makes.
        divergence: of logits, KL in nats from the live ones to those stored, and to those in other company.
        same_label: of logits, whether both of them have the live ones' largest.
    """

    error: float
    mean_error: float
    noise: float
    mean_noise: float
    scale: float
    encoding_error: float
    divergence: tuple[float, float] | None = None
    same_label: tuple[bool, bool] | None = None


@dataclass
class _Figures:
    """Of one signal in one encoding, over the rows looked at."""

    encoding: str
    found: list[Difference] = field(default_factory=list)

    def largest(self, name: str) -> float:
        return max((getattr(found, name) for found in self.found), default=0.0)

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "encoding": self.encoding,
            "rows": len(self.found),
            "error_max": self.largest("error"),
            "error_mean": _mean([found.mean_error for found in self.found]),
            "noise_max": self.largest("noise"),
            "noise_mean": _mean([found.mean_noise for found in self.found]),
            "encoding_error": self.largest("encoding_error"),
            "largest_number": self.largest("scale"),
        }
        divergences = [found.divergence for found in self.found if found.divergence is not None]
        same = [found.same_label for found in self.found if found.same_label is not None]
        if divergences:
            said["kl"], said["noise_kl"] = map(_mean, zip(*divergences, strict=True))
            said["same_label"], said["noise_same_label"] = map(_mean, zip(*same, strict=True))
        return said


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class _Audit:
    """What was found about the rows looked at so far, and which of them are bad."""

    def __init__(self, store: TeacherStore, test: SequentialTest) -> None:
        catalogue = store.catalogue()
        self.test = test
        self.num_rows = sum(record.rows for record in catalogue.allocations)
        self.specs: list[ArraySpec] = [
            spec for spec in catalogue.specs.values() if spec.signal.name in _kinds() and not spec.part
        ]
        self.figures = {spec.label: _Figures(spec.encoding) for spec in self.specs}
        self.seen: list[int] = []
        self.bad: list[dict[str, Any]] = []
        self._rows_per_shard = store.layout.rows_per_shard
        self._least_tolerance = LEAST_TOLERANCE[str(store.identity.capture["dtype"])]

    def add(self, rows: Sequence[int], differences: Sequence[Mapping[str, Difference]]) -> None:
        """A round of rows, each with what was found of its signals."""
        for found in differences:
            for label, difference in found.items():
                self.figures[label].found.append(difference)
        tolerances = {label: self._tolerance(figures) for label, figures in self.figures.items()}
        for row, found in zip(rows, differences, strict=True):
            shard, slot = divmod(row, self._rows_per_shard)
            wrong = [
                {
                    "row": row, "shard": shard, "slot": slot, "signal": label, "error": difference.error,
                    "tolerance": tolerances[label],
                }
                for label, difference in found.items()
                # Written so that a NaN is bad.
                if not difference.error <= tolerances[label]
            ]  # fmt: skip
            self.bad += wrong
            self.seen.append(row)
            self.test.add(bool(wrong))

    def _tolerance(self, figures: _Figures) -> float:
        explained = max(NOISE_MARGIN * figures.largest("noise"), self._least_tolerance * figures.largest("scale"))
        # Twice: noise moves a number across a step of its encoding.
        return explained + 2 * figures.largest("encoding_error")


@dataclass(frozen=True)
class CompareRows:
    """Runs rows of a store again, in the batches they were captured in and in others; a round of them is a job.

    In its own batch a row must come out as it is stored, but for its encoding and the machine. In other company its
    last bits move; how far is the noise that the teacher itself makes, on the same rows.

    Attributes:
        capture: the store and the teacher.
        specs: what is compared.
        rounds: row numbers.
    """

    capture: CaptureJob
    specs: tuple[ArraySpec, ...]
    rounds: tuple[Sequence[int], ...]

    def compute(self, number: int, advance: Callable[[int], None]) -> list[dict[str, Difference]]:
        """Of each row of a round, what was found of the signals that it has, by their labels."""
        rows = self.rounds[number]
        places = [divmod(row, self._store.layout.rows_per_shard) for row in rows]
        own, other = self._in_own_batches(places), self._in_another_batch(places)
        found = [
            {
                spec.label: self._difference(spec, row, own[at], other[at])
                for spec in self.specs
                if self._reader.has(spec.encoded, [row])[0]
            }
            for at, row in enumerate(rows)
        ]
        advance(len(rows))
        return found

    def finish(self, computed: list[dict[str, Difference]]) -> list[dict[str, Difference]]:
        """Nothing is written."""
        return computed

    @property
    def _store(self) -> TeacherStore:
        return self.capture.store

    @cached_property
    def _reader(self) -> StoreReader:
        return self._store.reader()

    @cached_property
    def _shards(self) -> OrderedDict[int, ShardRows]:
        return OrderedDict()

    @property
    def _runner(self) -> Runner:
        return self.capture.runner({spec.signal: "float32" for spec in self.specs})

    def _difference(
        self, spec: ArraySpec, row: int, own: Mapping[Signal, Array], other: Mapping[Signal, Array]
    ) -> Difference:
        import numpy as np

        from ...pipeline.store.codec import decode, encode

        stored = self._stored(spec, row).astype(np.float64)
        live, elsewhere = own[spec.signal], other[spec.signal]
        error, noise = np.abs(stored - live), np.abs(live - elsewhere)
        kept = decode(spec.encoding, encode(spec.encoding, live)).astype(np.float64)
        divergence = same_label = None
        problem_type = self._store.identity.capture.get("problem_type")
        if spec.signal.name == "logits" and problem_type == "single_label_classification" and stored.shape[-1] > 1:
            divergence = _divergence(live[0], stored[0]), _divergence(live[0], elsewhere[0])
            label = live[0].argmax()
            same_label = bool(label == stored[0].argmax()), bool(label == elsewhere[0].argmax())
        return Difference(
            error=float(error.max()),
            mean_error=float(error.mean()),
            noise=float(noise.max()),
            mean_noise=float(noise.mean()),
            scale=float(np.abs(live).max()),
            encoding_error=float(np.abs(kept - live).max()),
            divergence=divergence,
            same_label=same_label,
        )

    def _stored(self, spec: ArraySpec, row: int) -> Array:
        """[entries, ...] of one row, as a reader gives them."""
        if spec.axis == "example":
            return self._reader.gather(spec.encoded, [row])
        if spec.axis == "token":
            tokens, _ = self._reader.gather_tokens(spec.encoded, [row])
            return tokens.reshape(-1, *tokens.shape[2:])
        pairs, _ = self._reader.gather_pairs(spec.encoded, [row])
        return pairs.reshape(-1, *pairs.shape[3:])

    # --- running the teacher -------------------------------------------------------------------------------------

    def _in_own_batches(self, places: Sequence[tuple[int, int]]) -> list[Mapping[Signal, Array]]:
        """Per row, what the teacher says in the very batch in which the row was captured."""
        from ..cache_teacher.runner import plan_batches

        values: dict[tuple[int, int], Mapping[Signal, Array]] = {}
        for shard, slot in places:
            if (shard, slot) in values:
                continue
            rows = self._rows(shard)
            batches = plan_batches(rows.token_ids.lengths, self._store.layout.batch_tokens)
            batch = next(slots for slots in batches if (slots == slot).any())
            wanted = [other for other in places if other[0] == shard and (batch == other[1]).any()]
            values |= self._run(rows, batch, wanted)
        return [values[place] for place in places]

    def _in_another_batch(self, places: Sequence[tuple[int, int]]) -> list[Mapping[Signal, Array]]:
        """Per row, what the teacher says when these rows, of many shards, are one batch."""
        import numpy as np

        from ...pipeline.ragged import Ragged
        from ...pipeline.store.store import ShardRows

        parts = [(self._rows(shard), slot) for shard, slot in places]
        together = ShardRows(
            -1,
            np.arange(len(places)),
            Ragged.concatenate([rows.token_ids.take([slot]) for rows, slot in parts]),
            Ragged.concatenate([rows.segment_ids.take([slot]) for rows, slot in parts]),
        )
        found = self._run(together, np.arange(len(places)), [(-1, at) for at in range(len(places))])
        return [found[-1, at] for at in range(len(places))]

    def _run(
        self, rows: ShardRows, batch: Array, wanted: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], Mapping[Signal, Array]]:
        """One batch, and of it the rows wanted, by (shard, slot): entries [entries, ...] of each row alone."""
        from ...pipeline.ragged import offsets_of

        found: dict[tuple[int, int], dict[Signal, Array]] = {}
        for part in self._runner.run(rows.token_ids, rows.segment_ids, [batch]):
            lengths = rows.token_ids.lengths[part.slots]
            ends = {
                "example": offsets_of(lengths**0), "token": offsets_of(lengths), "pair": offsets_of(lengths**2)
            }  # fmt: skip
            for shard, slot in wanted:
                for at in (part.slots == slot).nonzero()[0].tolist():
                    found[shard, slot] = {
                        signal: values[int(ends[signal.kind.axis][at]) : int(ends[signal.kind.axis][at + 1])]
                        for signal, values in part.values.items()
                    }
        return dict(found)

    def _rows(self, shard: int) -> ShardRows:
        rows = self._shards.pop(shard, None) or self._store.read_tokens(shard)
        self._shards[shard] = rows
        while len(self._shards) > SHARDS_KEPT:
            self._shards.popitem(last=False)
        return rows


def _divergence(live: Array, other: Array) -> float:
    """KL(live || other) of two rows of logits, in nats."""
    import numpy as np

    first, second = (
        row - (row.max() + np.log(np.exp(row - row.max()).sum())) for row in (live.astype(np.float64), other)
    )
    return float((np.exp(first) * (first - second)).sum())


# --- texts against the tokenizer ---------------------------------------------------------------------------------


@dataclass
class _Checked:
    """How the token ids were compared with the tokenizer."""

    count: int
    by: str
    bad: list[dict[str, Any]]


def _check_texts(
    store: TeacherStore, teacher: Teacher, views: Sequence[View], test: SequentialTest, max_rows: int, seed: int
) -> _Checked:
    """Tokenise the texts of some examples again, and compare row keys with those of the store."""
    import numpy as np

    from ...pipeline.store import row_keys
    from ..cache_teacher.tokenize import encode

    ends = np.cumsum([len(view) for view in views], dtype=np.int64)
    if not len(ends) or not ends[-1]:
        return _check_round_trip(store, teacher, test, max_rows, seed)
    drawn = np.random.default_rng(seed).choice(int(ends[-1]), size=min(max_rows, int(ends[-1])), replace=False)
    longest = int(store.identity.capture["max_length"])
    reader, bad, count = store.reader(), [], 0
    for number, view in enumerate(views):
        at = drawn[np.searchsorted(ends, drawn, side="right") == number] - (ends[number] - len(view))
        if not len(at):
            continue
        examples = view.examples.take(at)
        second = examples["text_b"].to_pylist()
        texts_b = None if second[0] is None else second
        ids, segments = encode(teacher.tokenizer, examples["text_a"].to_pylist(), texts_b, longest)
        differ = (row_keys(ids, segments) != reader.row_keys(view.rows[at])).any(axis=1)
        for example, is_bad in zip(at.tolist(), differ.tolist(), strict=True):
            if test.verdict is not None:
                break
            test.add(is_bad)
            count += 1
            if is_bad:
                row = int(view.rows[example])
                bad.append(
                    {
                        "row": row,
                        "what": f"row {row}: the tokenizer reads the text of example {example} of view {view.path} "
                        "as other token ids than the store holds for it",
                    }
                )
    return _Checked(count, "texts of views tokenised again", bad)


def _check_round_trip(
    store: TeacherStore, teacher: Teacher, test: SequentialTest, max_rows: int, seed: int
) -> _Checked:
    """Without texts: token ids turned into text and back.

    Not every tokenizer gives back every row (unknown words, unusual spaces), but its own rows mostly come back, and
    those of another mostly do not.
    """
    tokenizer = teacher.tokenizer
    special, longest = set(tokenizer.all_special_ids), int(store.identity.capture["max_length"])
    empty = tokenizer("")["input_ids"]
    bad, count = [], 0
    for chosen in _rounds(store, max_rows, seed):
        for row in chosen:
            shard, slot = divmod(row, store.layout.rows_per_shard)
            ids = store.read_tokens(shard).token_ids[slot].tolist()
            if tokenizer.unk_token_id in ids or len(ids) >= longest:
                continue
            count += 1
            parts = _between(ids, special)
            texts = [tokenizer.decode(part) for part in parts]
            again = tokenizer(*texts)["input_ids"] if 1 <= len(texts) <= 2 else []
            if again != ids:
                framed = len(empty) < 2 or (ids[0], ids[-1]) == (empty[0], empty[-1])
                reason = (
                    "does not come back from text" if framed else "does not begin and end as the tokenizer's rows do"
                )
                bad.append({"row": row, "what": f"row {row} (shard {shard}, slot {slot}): {reason}"})
    if len(bad) * 2 <= count:
        bad = []
    return _Checked(count, "rows turned into text and back (no view of the store was found)", bad)


def _between(ids: Sequence[int], special: set[int]) -> list[list[int]]:
    """The runs of ids that are not special."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]
