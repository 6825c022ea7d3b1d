"""`kd store plan`: what signals and encodings would cost, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import RefusedError, UsageError
from ...pipeline.progress import duration, size
from ...pipeline.stage import Stage, StageContext, StageResult, option

if TYPE_CHECKING:
    from ...pipeline.ragged import Ragged
    from ...pipeline.store import Signal, StoreLayout, TeacherStore
    from ...pipeline.store.plan import ShardSize
    from ...pipeline.store.signal import Sizes
    from ..cache_teacher.teacher import Teacher

TEACHER, CORPUS, STORE = "Teacher", "Corpus", "Store"


@dataclass(frozen=True, kw_only=True)
class PlanStore(Stage):
    """Costs a list of signals in every encoding, for a store as it is, or for one that is to be made or to grow."""

    command: ClassVar[str] = "store plan"

    store: str | None = option(
        None, help="A store: what it lacks is counted. None: a new one.", positional=True, metavar="STORE"
    )
    signals: str = option("logits", help="As for kd cache-teacher: logits,hidden.tok@4+6:int8.", metavar="LIST")
    max_bytes: str | None = option(None, help="The budget; what is free on the disk.", metavar="SIZE")
    time: bool = option(True, help="Time a batch on the teacher.")

    teacher: str | None = option(None, help="Needed for a corpus, and for times.", panel=TEACHER, metavar="PATH|ID")
    trust_remote_code: bool = option(False, help="Run Python code that comes with the checkpoint.", panel=TEACHER)
    dtype: str = option(
        "float32", help="Compute dtype.", panel=TEACHER, choices=("float32", "bfloat16", "float16"), metavar="DTYPE"
    )
    max_length: int = option(128, help="Tokens per row; longer rows are cut.", panel=TEACHER, metavar="TOKENS")
    mask_share: float = option(0.0, help="As for kd cache-teacher: of masked texts.", panel=TEACHER, metavar="SHARE")
    mask_seed: int = option(0, help="As for kd cache-teacher.", panel=TEACHER)
    device: str | None = option(
        None, help="Where the teacher runs; cuda where there is one.", identity=False, panel=TEACHER, metavar="DEVICE"
    )

    corpus: str | None = option(
        None, help="Corpus made by kd augment. None: the rows of the store.", panel=CORPUS, metavar="CORPUS"
    )
    dataset: str | None = option(None, help="Or a dataset, with :split.", panel=CORPUS, metavar="D[:split]")
    text_column: str | None = option(None, help="Column of the text.", panel=CORPUS, metavar="COLUMN")
    text_pair_column: str | None = option(None, help="Column of the second text.", panel=CORPUS, metavar="COLUMN")

    sidecars: tuple[str, ...] = option(("embeddings",), help="As for kd cache-teacher.", panel=STORE, metavar="LIST")
    rows_per_shard: int | None = option(None, help="Of a new store.", panel=STORE, metavar="N")
    tokens_per_shard: int | None = option(None, help="Of a new store.", panel=STORE, metavar="N")
    pairs_per_shard: int | None = option(None, help="Of a new store.", panel=STORE, metavar="N")

    def __post_init__(self) -> None:
        if self.max_bytes is not None:
            from ...pipeline.store import parse_bytes

            parse_bytes(self.max_bytes)
        has_texts = self.corpus is not None or self.dataset is not None
        if has_texts and self.teacher is None:
            raise UsageError("texts are read with the teacher's tokenizer", fix="give --teacher too")
        if self.store is None and not has_texts:
            raise UsageError("nothing to plan for", fix="give a STORE, or --teacher with --corpus or --dataset")

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store.plan import free_bytes, parse_bytes

        work = self._with_texts(context) if self.corpus or self.dataset else self._store_alone()
        # An object store has no end that could be asked for.
        budget = free_bytes(self.store or ".") if self.max_bytes is None else parse_bytes(self.max_bytes)
        limit = 1 << 62 if budget is None else budget
        asked = work.cost(work.signals)
        rate = self._rate(work, asked, context)
        table = [work.cost(signals) | {"encoding": name} for name, signals in work.uniform().items()]
        best = _best(work, limit)
        for row in (asked, *table, *([best] if best else [])):
            row |= {"share": row["bytes"] / max(limit, 1), "fits": row["bytes"] <= limit}
            row["seconds"] = None if rate is None else round(row["tokens_to_compute"] / rate, 1)
        summary = {
            "store": self.store,
            "rows": work.num_rows,
            "rows_new": sum(size.rows for size in work.new),
            "budget_bytes": budget,
            "budget_is": "free on the disk" if self.max_bytes is None else "--max-bytes",
            "tokens_per_s": None if rate is None else round(rate, 1),
            "asked": asked,
            "table": table,
            "best": best,
        }
        return StageResult(summary=summary, finished=False)

    # --- what there is -------------------------------------------------------------------------------------------

    def _with_texts(self, context: StageContext) -> Work:
        """A corpus, into a store that is there or is to be made."""
        from ...pipeline.store.store import store_file_bytes
        from ..cache_teacher.sidecars import CONFIG, TOKENIZER, sidecar_bytes, sidecar_contents
        from ..cache_teacher.stage import CacheTeacher
        from ..cache_teacher.teacher import store_identity

        shared = {
            name: getattr(self, name)
            for name in (
                "teacher", "trust_remote_code", "dtype", "max_length", "mask_share", "mask_seed", "device", "corpus",
                "dataset", "text_column", "text_pair_column", "signals", "sidecars", "rows_per_shard",
                "tokens_per_shard", "pairs_per_shard",
            )
        }  # fmt: skip
        # The folder of no store: nothing is there, and nothing is written.
        place = self.store or str(Path("(no store)"))
        plan = CacheTeacher(**shared, store=place, output_dir="(no view)").plan(context)
        teacher = plan.teacher
        fixed = {f"sidecar {name}": size for name, size in sidecar_bytes(teacher, plan.sidecars).items()}
        if plan.store is None:
            identity = store_identity(teacher, max_length=self.max_length, dtype=self.dtype)
            fixed["store.json"] = len(store_file_bytes(identity, plan.layout))
        for name in (TOKENIZER, CONFIG):
            if plan.store is None or not plan.store.has_sidecar(name):
                contents = sidecar_contents(teacher, name)
                assert contents is not None
                fixed[f"sidecar {name}"] = sum(map(len, contents[1].values()))
        records = [name for name in fixed if name.startswith("sidecar ")]
        fixed["register of views"] = REGISTER_BYTES
        token_ids, segment_ids = plan.inputs.first_step()
        return Work(
            store=plan.store,
            layout=plan.layout,
            teacher=teacher,
            signals=plan.signals,
            sizes=teacher.sizes,
            new=plan.preview.sizes,
            shards=plan.preview.shards,
            fixed=fixed | {name: fixed[name] + SIDECAR_RECORD_BYTES for name in records},
            num_rows=plan.preview.num_new + plan.preview.num_known,
            token_ids=token_ids,
            segment_ids=segment_ids,
        )

    def _store_alone(self) -> Work:
        """All rows of a store."""
        from ...pipeline.store import open_store, parse_signals
        from ..cache_teacher.teacher import describe_teacher, require_teacher_of

        assert self.store is not None
        store = open_store(self.store)
        teacher = None
        if self.teacher is not None:
            teacher = describe_teacher(self.teacher, trust_remote_code=self.trust_remote_code).as_captured(store)
            require_teacher_of(store, teacher)
        shards = tuple(range(store.catalogue().num_shards))
        if not shards:
            raise RefusedError(f"store {self.store} holds no rows yet", fix="give --teacher and --corpus")
        num_layers, sizes = _facts(store)
        signals = parse_signals(self.signals, num_layers)
        _require_given(store, signals)
        rows = store.read_tokens(0)
        return Work(
            store=store,
            layout=store.layout,
            teacher=teacher,
            signals=signals,
            sizes=sizes,
            new=[],
            shards=shards,
            fixed={},
            num_rows=sum(shard.rows for shard in store.shard_sizes(shards)),
            token_ids=rows.token_ids,
            segment_ids=rows.segment_ids,
        )

    def _rate(self, work: Work, asked: Mapping[str, Any], context: StageContext) -> float | None:
        """Tokens per second of the teacher, measured on one batch; None without one."""
        from ..cache_teacher.capture import measure_rate
        from ..cache_teacher.teacher import resolve_device

        if work.teacher is None or not self.time or not any(row["tokens_to_compute"] for row in work.all_costs()):
            return None
        context.progress.info("timing one batch on the teacher")
        return measure_rate(
            work.teacher,
            work.token_ids,
            work.segment_ids,
            work.specs(work.signals),
            batch_tokens=work.layout.batch_tokens,
            dtype=self.dtype if work.store is None else str(work.store.identity.capture["dtype"]),
            device=resolve_device(self.device),
        )

    # --- for people ----------------------------------------------------------------------------------------------

    def report(self, summary: Mapping[str, Any]) -> str:
        asked, budget = summary["asked"], summary["budget_bytes"]
        lines = [
            f"plan for {summary['store'] or 'a new store'}: {summary['rows']:,} rows, "
            f"{summary['rows_new']:,} of them new; nothing was written",
            f"  asked for {asked['signals']}: {_line(asked)}",
        ]
        width = max(map(len, asked["bytes_by_part"]))
        lines += [f"    {name:<{width}}  {size(count):>9}" for name, count in asked["bytes_by_part"].items() if count]
        lines.append("  budget: none" if budget is None else f"  budget {size(budget)} ({summary['budget_is']})")
        head = ("encoding", "bytes", "share", "fits", "teacher", "largest error")
        rows = [
            (
                row["encoding"],
                size(row["bytes"]),
                f"{100 * row['share']:.1f} %",
                "yes" if row["fits"] else "no",
                _time(row),
                row["error"],
            )
            for row in summary["table"]
        ]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
        best = summary["best"]
        lines.append(
            "  nothing fits the budget: ask for fewer signals or layers"
            if best is None
            else f"  most exact that fits: --signals {best['signals']} ({_line(best)})"
        )
        return "\n".join(lines)


SIDECAR_RECORD_BYTES = 420
"""About what the record of a sidecar takes."""
REGISTER_BYTES = 700
"""About what the entry of a view takes."""


def _line(row: Mapping[str, Any]) -> str:
    return f"{size(row['bytes'])}, {_time(row)}"


def _time(row: Mapping[str, Any]) -> str:
    if not row["tokens_to_compute"]:
        return "not needed"
    return f"{row['rows_to_compute']:,} rows" + ("" if row["seconds"] is None else f", {duration(row['seconds'])}")


@dataclass(frozen=True)
class Work:
    """What a plan is made for.

    Attributes:
        store: None when it is to be made.
        layout: of the store.
        teacher: as it is captured; None where it was not given.
        signals: asked for, or chosen for what was.
        sizes: of the teacher.
        new: sizes of the shards to be added.
        shards: that are there and hold rows of it.
        fixed: bytes that do not depend on the signals, by what they are for.
        num_rows: distinct rows.
        token_ids, segment_ids: typical rows.
    """

    store: TeacherStore | None
    layout: StoreLayout
    teacher: Teacher | None
    signals: tuple[Signal, ...]
    sizes: Sizes
    new: Sequence[ShardSize]
    shards: tuple[int, ...]
    fixed: Mapping[str, int]
    num_rows: int
    token_ids: Ragged
    segment_ids: Ragged

    def specs(self, signals: Sequence[Signal]) -> tuple[Any, ...]:
        """The arrays of signals: as the store has them unless they name an encoding."""
        from ...pipeline.store import array_specs
        from ...pipeline.store.signal import place

        first = {spec.signal: spec.encoding for spec in self._declared.values() if spec.plain}
        wanted = [
            spec
            for signal in signals
            for spec in array_specs(
                replace(signal, encoding=signal.encoding or first.get(signal)), self.sizes.shape(signal)
            )
        ]
        return place(wanted, self._declared.values())

    def cost(self, signals: Sequence[Signal]) -> dict[str, Any]:
        """Bytes by what they are for, what the teacher has to read, and the largest error."""
        from ...pipeline.store.plan import Lacking, plan_files
        from ...pipeline.store.recode import recodable
        from ...pipeline.store.signal import ENCODINGS, format_signals

        specs = self.specs(signals)
        lacking: list[Lacking] = []
        to_compute = [*self.new]
        if self.store is not None:
            missing = self.store.missing(specs, self.shards)
            catalogue = self.store.catalogue()
            for (shard, arrays), its_size in zip(missing.items(), self.store.shard_sizes(missing), strict=True):
                lacking.append(Lacking(shard, its_size, arrays))
                if recodable(catalogue, shard, arrays).keys() != {spec.signal for spec in arrays}:
                    to_compute.append(its_size)
        parts = plan_files(
            self.layout,
            specs,
            new=self.new,
            lacking=lacking,
            declared=self._declared,
            num_shards=0 if self.store is None else self.store.catalogue().num_shards,
        )
        parts |= self.fixed
        encodings = [name for name in ENCODINGS if any(spec.encoding == name for spec in specs)]
        return {
            "signals": format_signals(dict.fromkeys(spec.encoded for spec in specs)),
            "bytes": sum(parts.values()),
            "bytes_by_part": parts,
            "rows_to_compute": sum(shard.rows for shard in to_compute),
            "tokens_to_compute": sum(shard.tokens for shard in to_compute),
            "error": "; ".join(ENCODINGS[name].error for name in encodings),
        }

    def uniform(self) -> dict[str, tuple[Signal, ...]]:
        """The signals with one encoding for all that name none, per encoding."""
        from ...pipeline.store.signal import ENCODINGS

        return {
            name: tuple(replace(signal, encoding=signal.encoding or name) for signal in self.signals)
            for name in ENCODINGS
        }

    def all_costs(self) -> list[dict[str, Any]]:
        """Of the signals as asked for, and of every row of the table."""
        return [self.cost(signals) for signals in (self.signals, *self.uniform().values())]

    @cached_property
    def _declared(self) -> Mapping[str, Any]:
        return {} if self.store is None else self.store.declared()


def _best(work: Work, budget: int) -> dict[str, Any] | None:
    """The most exact encodings that fit: all float32, then the dearest signal in the next encoding, and so on."""
    from ...pipeline.store.signal import ENCODINGS

    order = [*ENCODINGS]
    level = dict.fromkeys((signal.name for signal in work.signals if signal.encoding is None), 0)
    while True:
        signals = [
            signal if signal.encoding else replace(signal, encoding=order[level[signal.name]])
            for signal in work.signals
        ]
        cost = work.cost(signals)
        if cost["bytes"] <= budget:
            return cost
        open_ = [name for name in level if level[name] + 1 < len(order)]
        if not open_:
            return None
        by_name = {name: 0 for name in open_}
        for part, count in cost["bytes_by_part"].items():
            name = part.partition("@")[0].partition(":")[0]
            if name in by_name:
                by_name[name] += count
        level[max(open_, key=lambda name: by_name[name])] += 1


def _require_given(store: TeacherStore, signals: Sequence[Signal]) -> None:
    """RefusedError where the store's teacher does not give a signal."""
    head, masked = store.identity.teacher.get("head"), "masking" in store.identity.capture
    for signal in signals:
        if signal.name == "logits" and head in ("none", "masked-lm", "token-classification"):
            of_tokens = "--signals logits.tok" if head == "token-classification" else "ask for hidden states"
            raise RefusedError(
                f"the teacher of store {store.url} has no classification head, so it gives no logits",
                fix="--signals mlm.logits" if masked else of_tokens,
            )
        if signal.name == "logits.tok" and head != "token-classification":
            raise RefusedError(
                f"the teacher of store {store.url} has no head that classifies tokens, so it gives no {signal}",
                fix="ask for hidden states",
            )
        if "mask" in signal.kind.dims and not masked:
            raise RefusedError(
                f"{signal} is said of masked tokens, and the rows of store {store.url} are not masked",
                fix="plan for a new store: --mask-share 0.15, with a masked-LM teacher and texts",
            )


def _facts(store: TeacherStore) -> tuple[int, Sizes]:
    """(number of layers, sizes) of a store's teacher."""
    import json

    from ...pipeline.store.signal import Sizes

    config = json.loads((store.sidecar_folder("config") / "config.json").read_bytes())
    capture = store.identity.capture
    labels = 1 if capture.get("problem_type") == "regression" else len(capture.get("label_names") or ())
    heads = int(config.get("num_attention_heads", 0))
    masking = capture.get("masking")
    of_masks = (0, 0) if masking is None else (int(masking["slots"]), int(config["vocab_size"]))
    return int(config["num_hidden_layers"]), Sizes(max(1, labels), int(config["hidden_size"]), heads, *of_masks)
