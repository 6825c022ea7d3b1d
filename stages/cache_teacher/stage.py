"""The stage behind `kd cache-teacher`: corpus and teacher in, rows of a store and a view of them out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.artifact import Artifact, atomic_write_bytes
from ...pipeline.errors import IncompleteError, KdError, RefusedError, UsageError
from ...pipeline.executor import ShardOutcome, check_execution, cluster_option, map_shards, workers_option
from ...pipeline.stage import Stage, StageContext, StageResult, option
from ..corpus.source import TASKS
from .choice import PROFILES, STATES
from .plan import Plan, plan_table, recoded_shards

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...pipeline.ragged import Ragged
    from ...pipeline.store import ArraySpec, InputRows, Signal, StoreIdentity, StoreLayout, TeacherStore
    from ..corpus import Corpus
    from ..train_student.methods import Term
    from .capture import CapturedShard, CaptureJob
    from .choice import Choice, Entries
    from .shortcuts import Shortcut
    from .teacher import Teacher
    from .variants import TeacherOnVariants

CPU_BATCH_TOKENS, BATCH_TOKENS = 2048, 8192

OF_TOKENS = "logits.tok"
"""What --signals logits is of a token classifier."""
MLM_LOGITS, MLM_BY_HEAD = "mlm.logits", "mlm.logits:head"
"""A masked LM's logits in whatever way is the least, and from its head or not at all."""

TEACHER, CORPUS, STORE, RUNNING = "Teacher", "Corpus", "Store", "Running"


@dataclass(frozen=True, kw_only=True)
class CacheTeacher(Stage):
    """Runs the teacher over the rows that the store does not hold yet, and makes the view of the corpus."""

    command: ClassVar[str] = "cache-teacher"
    kind: ClassVar[str] = "view"
    on_interrupt: ClassVar[str] = "finished shards are kept; the same command goes on with the rest"

    teacher: str = option(
        help="Teacher: a checkpoint folder or hub id; minilm is the packaged encoder.", panel=TEACHER, metavar="PATH|ID"
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the checkpoint.", identity=False, panel=TEACHER
    )
    dtype: str = option(
        "float32",
        help="Compute dtype; below float32 its effect on logits is measured.",
        panel=TEACHER,
        choices=("float32", "bfloat16", "float16"),
        metavar="DTYPE",
    )
    max_length: int = option(128, help="Tokens per row; longer rows are cut.", panel=TEACHER, metavar="TOKENS")
    device: str | None = option(
        None, help="Where the teacher runs; cuda where there is one.", identity=False, panel=TEACHER, metavar="DEVICE"
    )
    mask_share: float = option(
        0.0,
        help="Show a masked-LM teacher masked text, and keep what it says at this share of the tokens, such as 0.15.",
        panel=TEACHER,
        metavar="SHARE",
    )
    mask_seed: int = option(
        0, help="Which tokens: another one masks the same texts anew, in a store of its own.", panel=TEACHER
    )

    corpus: str | None = option(None, help="Corpus made by kd augment.", panel=CORPUS, metavar="CORPUS")
    dataset: str | None = option(
        None, help="Or a dataset: file, folder or hub id, with :split.", panel=CORPUS, metavar="D[:split]"
    )
    text_column: str | None = option(None, help="Column of the text.", panel=CORPUS, metavar="COLUMN")
    text_pair_column: str | None = option(None, help="Column of the second text.", panel=CORPUS, metavar="COLUMN")
    label_column: str | None = option(None, help="Column of the gold label.", panel=CORPUS, metavar="COLUMN")
    task: str | None = option(
        None,
        help="What the labels are, where the column does not settle it.",
        panel=CORPUS,
        choices=TASKS,
        metavar="TASK",
    )

    store: str = option(help="Store to grow; made when it is not there.", panel=STORE, metavar="STORE")
    signals: str = option(
        "logits",
        help="What to keep, such as logits,hidden.cls@all,hidden.tok@4+6:int8; with --mask-share, mlm.logits.",
        panel=STORE,
        metavar="LIST",
    )
    for_: tuple[str, ...] = option(
        (),
        help="Methods: also keep the least, in bytes, that all they need follows from (tinybert,minilmv2).",
        panel=STORE,
        metavar="METHODS",
    )
    student_layers: int | None = option(
        None, help="Of the student that --for is about; half the teacher's.", panel=STORE, metavar="N"
    )
    profile: str | None = option(
        None,
        help="Also keep a set of signals by name: " + ", ".join(PROFILES) + ".",
        panel=STORE,
        choices=tuple(PROFILES),
        metavar="NAME",
    )
    hidden_dtype: str | None = option(
        None,
        help="How hidden states are stored; float16, or as the store has them.",
        identity=False,
        panel=STORE,
        choices=("float16", "float32"),
        metavar="DTYPE",
    )
    sidecars: tuple[str, ...] = option(
        ("embeddings",),
        help="Teacher tensors to keep: embeddings, layers, head, attn_in@LAYERS (query, key and value maps), or none.",
        identity=False,
        panel=STORE,
        metavar="LIST",
    )
    max_bytes: str | None = option(
        None, help="Refuse a plan larger than this, such as 10GB.", identity=False, panel=STORE, metavar="SIZE"
    )
    batch_tokens: int | None = option(
        None,
        help="Padded tokens per batch, 2048 on a CPU and 8192 elsewhere; fixed in a new store.",
        identity=False,
        panel=STORE,
        metavar="N",
    )
    rows_per_shard: int | None = option(
        None, help="Rows per shard, 4096; fixed in a new store.", identity=False, panel=STORE, metavar="N"
    )
    tokens_per_shard: int | None = option(
        None, help="Tokens per shard, 131072; fixed in a new store.", identity=False, panel=STORE, metavar="N"
    )
    pairs_per_shard: int | None = option(
        None,
        help="Pairs of tokens per shard, 16777216 or those of one row; 0: no attention scores. Fixed in a new store.",
        identity=False,
        panel=STORE,
        metavar="N",
    )

    workers: int = workers_option(RUNNING)
    cluster: str | None = cluster_option(RUNNING)
    dry_run: bool = option(False, help="Print the plan, and write nothing.", identity=False, panel=RUNNING)
    output_dir: str = option(help="Where the view goes.", metavar="VIEW")

    def __post_init__(self) -> None:
        from .sidecars import parse_sidecars

        if (self.corpus is None) == (self.dataset is None):
            raise UsageError("give either --corpus or --dataset", fix="--corpus CORPUS, or --dataset D --text-column C")
        if self.dataset is not None and self.text_column is None:
            raise UsageError("--dataset needs --text-column", fix="name the column that holds the text")
        if self.corpus is not None:
            for name in ("text_column", "text_pair_column", "label_column", "task"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} goes with --dataset; a corpus knows its columns")
        if self.max_length < 1:
            raise UsageError(f"--max-length {self.max_length}: at least one token is needed")
        if not 0 <= self.mask_share < 1:
            raise UsageError(f"--mask-share is {self.mask_share:g}; expected a share of the tokens, such as 0.15")
        check_execution(self.workers, self.cluster)
        parse_sidecars(self.sidecars)
        if self.student_layers is not None and (self.student_layers < 1 or not self.for_):
            raise UsageError("--student-layers goes with --for, and is at least 1")
        self._max_bytes()

    # --- what it reads, checked from the cheapest to the dearest -------------------------------------------------

    def inputs(self) -> dict[str, str]:
        from ...pipeline.fingerprint import fingerprint
        from .teacher import resolve_device

        resolve_device(self.device)
        _ = self._asked, self._needed, self._sidecars  # refused by name before anything is read
        corpus = self._corpus
        identity = self._identity_of_store
        # What an option comes to, not how it was given: a length above the teacher's is the teacher's.
        return {
            "teacher": fingerprint(identity.teacher),
            "tokenizer": fingerprint(identity.tokenizer),
            "max_length": str(self._max_tokens),
            "corpus" if self.corpus is not None else "dataset": corpus.fingerprint,
            **({} if self.dataset is None else {"task": corpus.info.task}),
            **({} if self._chooses else {"signals": ",".join(self._encoded_signals)}),
            "store": identity.digest,
        }

    def _open_store(self) -> TeacherStore | None:
        """The store that is there; RefusedError, field by field, when it was captured from something else."""
        from ...pipeline.store import open_store
        from ...pipeline.store.files import open_files
        from ...pipeline.store.layout import STORE_FILE

        there = open_files(self.store).exists(STORE_FILE)
        return open_store(self.store, expect=self._identity_of_store) if there else None

    def outdated(self, artifact: Artifact) -> str | None:
        """A finished view is made again when its store is gone, moved, or lacks what was asked for."""
        from ...pipeline.store import open_view
        from .sidecars import missing_sidecars

        try:
            view = open_view(artifact.path)
            if not view.store.files.is_at(self.store):
                return f"its store is {view.store.url}, not {self.store}"
            # What was chosen stands in the view: to choose again would take the teacher.
            view.check_coverage(view.signals if self._chooses else self._signals)
            if artifact.fingerprint not in {entry.fingerprint for entry in view.store.views()}:
                return "the register of its store does not know it, so that its signals might be collected"
        except KdError as error:
            return error.what
        missing = missing_sidecars(view.store, self._sidecars)
        return f"its store lacks the sidecars {', '.join(missing)}" if missing else None

    @cached_property
    def _teacher(self) -> Teacher:
        from ..packaged import checkpoint_source
        from .teacher import describe_teacher

        source = checkpoint_source(self.teacher, option="--teacher")
        teacher = describe_teacher(source, trust_remote_code=self.trust_remote_code)
        if self.mask_share:
            return teacher.masked(share=self.mask_share, seed=self.mask_seed, max_length=self.max_length)
        return teacher

    @property
    def _chooses(self) -> bool:
        """Whether what is kept depends on the corpus and the teacher's numbers."""
        return bool(self.for_ or self.profile or self._vocabulary_logits)

    @cached_property
    def _vocabulary_logits(self) -> tuple[str, ...]:
        """What of --signals asks for a masked LM's logits in whatever way is the least."""
        if not self.mask_share:
            return ()
        items = [item.strip() for item in self.signals.split(",")]
        return ("logits",) if items == ["logits"] else tuple(i for i in items if i in (MLM_LOGITS, MLM_BY_HEAD))

    @property
    def _encoded_signals(self) -> list[str]:
        return [*dict.fromkeys(str(spec.encoded) for spec in self._specs(self._open_store()))]

    @cached_property
    def _signals(self) -> tuple[Signal, ...]:
        """What is stored: as asked for, then as chosen."""
        return tuple(dict.fromkeys((*self._asked, *self._choice.signals)))

    @cached_property
    def _sidecars(self) -> tuple[str, ...]:
        """The sidecars asked for by name."""
        from .choice import profile_needs
        from .sidecars import parse_sidecars

        of_profile = profile_needs(self.profile, self._teacher)[1] if self.profile else ()
        return parse_sidecars((*self.sidecars, *of_profile), self._teacher.num_layers)

    @cached_property
    def _terms(self) -> tuple[Term, ...]:
        from ..train_student.methods import parse_methods

        return parse_methods(self.for_)

    @cached_property
    def _needed(self) -> tuple[Signal, ...]:
        """What the methods of --for and the profile need."""
        from ...pipeline.store import Signal
        from .choice import needs_of, profile_needs, shapes_for

        needed: tuple[Signal, ...] = (Signal(MLM_LOGITS),) if self._vocabulary_logits else ()
        if self.for_:
            needed += needs_of(self._terms, shapes_for(self._teacher, self.student_layers))
        if self.profile:
            needed += profile_needs(self.profile, self._teacher)[0]
        self._require_head(needed)
        self._require_masks(needed)
        return tuple(dict.fromkeys(needed))

    @cached_property
    def _choice(self) -> Choice:
        """The smallest set that gives what is needed. Tries out, on a few rows, what follows from what."""
        from .choice import Choice, entries_of, require_true_scores_for, smallest
        from .sidecars import sidecar_bytes

        if not self._chooses:
            return Choice((), (), {})
        teacher = self._teacher
        of_attention = sorted(
            {s.layer for s in self._needed if s.name.startswith("attention.") and s.layer is not None}
        )
        maps = [f"attn_in@{layer}" for layer in of_attention]
        head = ["head"] if any(signal.name == MLM_LOGITS for signal in self._needed) else []
        tried = self._try(["embeddings", *maps, *head])
        if MLM_BY_HEAD in self._vocabulary_logits and not tried["head"].holds:
            raise RefusedError(
                f"{MLM_BY_HEAD} is asked for, and {tried['head']}",
                fix=f"--signals {MLM_LOGITS} stores the logits themselves",
            )
        scores = self._try_scores(of_attention)
        why = None if scores is None or scores.holds else scores.why
        require_true_scores_for(self._needed, self._terms if self.for_ else (), why)
        holding = [name for name, shortcut in tried.items() if shortcut.holds]
        sizes = sidecar_bytes(teacher, ("embeddings", *(name for name in holding if name in (*maps, *head))))
        store = self._known["store"]
        there = [] if store is None else [name for name in sizes if store.has_sidecar(name)]
        return smallest(
            self._needed,
            entries_of(self._known["sizes"]),
            teacher.sizes,
            teacher.num_layers,
            holds=holding.__contains__,
            sidecar_bytes=lambda name: 0 if name in there else sizes[name],
            kept=(*self._sidecars, *there),
            hidden_dtype=self.hidden_dtype,
            stored=self._held(store),
        )

    def _held(self, store: TeacherStore | None) -> Mapping[Signal, Entries]:
        """Entries of the corpus' rows that the store holds of each signal, as it would be stored now."""
        from .already_stored import already_stored

        if store is None:
            return {}
        held = already_stored(store, self._known["shards"])
        encodings = {spec.signal: spec.encoding for spec in store.declared().values() if spec.plain}
        asked = self.hidden_dtype
        return {
            signal: entries
            for signal, entries in held.items()
            if not signal.name.startswith("hidden.") or asked in (None, encodings[signal])
        }

    def _try(self, sidecars: Sequence[str]) -> dict[str, Shortcut]:
        """What follows from sidecars for this very teacher; each is tried once."""
        from .shortcuts import try_shortcuts
        from .teacher import resolve_device

        untried = [name for name in sidecars if name not in self._tried]
        if untried:
            token_ids, segment_ids = self._known["rows"]
            self._tried.update(
                try_shortcuts(
                    self._teacher, untried, token_ids, segment_ids,
                    dtype=self.dtype, device=resolve_device(self.device),
                )
            )  # fmt: skip
        return {name: self._tried[name] for name in sidecars if name in self._tried}

    @cached_property
    def _tried(self) -> dict[str, Shortcut]:
        return {}

    @cached_property
    def _known(self) -> dict[str, Any]:
        """From the moment that `plan` tokenised the corpus: `rows`, ids and segments of its first rows; `sizes`, how
        much the shards take that it stands in or will stand in; `store`, or None, and `shards`, those of it."""
        return {}

    @property
    def _proofs(self) -> list[str]:
        """Proofs of what was tried and held."""
        proofs = {"embeddings": "embeddings.proof", "head": "head.proof", "attention": "attention.proof"}
        if self._teacher.masking is not None:
            proofs["head"] = "mlm.proof"
        elif self._teacher.tags_tokens:
            proofs["head"] = "tokens.proof"
        return [proof for name, proof in proofs.items() if name in self._tried and self._tried[name].holds]

    def _chosen(self) -> dict[str, Any] | None:
        """The choice for people and `--json`; None where nothing was chosen."""
        from ...pipeline.store.signal import format_signals
        from .choice import possible_methods, shapes_for

        if not self._chooses:
            return None
        names = [term.method.name for term in self._terms] if self.for_ else []
        sidecars = [*dict.fromkeys((*self._sidecars, *self._choice.sidecars))]
        shapes = shapes_for(self._teacher, self.student_layers)
        return {
            "for": [
                *self.for_,
                *([f"profile {self.profile}"] if self.profile else []),
                *([MLM_LOGITS] if self._vocabulary_logits else []),
            ],
            "student_layers": shapes.student_layers,
            "signals": format_signals(self._signals),
            "sidecars": sidecars,
            "bytes": dict(self._choice.bytes_of),
            "already_stored": [name for name, size in self._choice.bytes_of.items() if not size],
            "derived": format_signals(s for s in self._needed if s not in self._signals),
            "also_possible": [*possible_methods(self._signals, [*sidecars, *self._proofs], shapes, besides=names)],
        }

    def _say_choice(self, progress: Any) -> None:
        from ...pipeline.store import format_bytes

        chosen = self._chosen()
        if chosen is None:
            return
        for name, shortcut in self._tried.items():
            needless = name == "embeddings" and shortcut.signal not in self._needed
            if not shortcut.holds and name != "attention" and not needless:
                progress.info(f"{shortcut}; it is stored instead")
            elif name == "head":
                progress.info(str(shortcut), error=shortcut.error)
        costs = ", ".join(f"{name} {format_bytes(size)}" for name, size in chosen["bytes"].items() if size)
        about = f", a student of {chosen['student_layers']} layers" if self.for_ else ""
        progress.info(f"for {', '.join(chosen['for'])}{about}: {costs or 'nothing to add'}", chosen=chosen)
        if chosen["already_stored"]:
            progress.info(f"counted as free, for the store has it: {', '.join(chosen['already_stored'])}")
        if chosen["derived"]:
            progress.info(f"derived when a student is trained: {chosen['derived']}")
        if chosen["also_possible"]:
            progress.info(f"also possible with what is kept: {', '.join(chosen['also_possible'])}")

    def _settle_shortcuts(self, plan: Plan, progress: Any) -> None:
        """Try what is to be derived from new sidecars and signals, before anything is written.

        Raises:
            RefusedError: maps were asked for from which this teacher's queries, keys and values do not follow.
        """
        tried = self._try(plan.sidecars)
        broken = [shortcut for shortcut in tried.values() if not shortcut.holds]
        maps = [shortcut for shortcut in broken if shortcut.sidecar.startswith("attn_in@")]
        if maps:
            raise RefusedError(
                f"teacher {self.teacher}: its queries, keys and values do not follow from the layer below",
                details=list(map(str, maps)),
                fix=f"keep them themselves: --signals {','.join(str(shortcut.signal) for shortcut in maps)}",
            )
        for shortcut in broken:
            progress.info(f"{shortcut}: where it is needed, store it")
        has_proof = plan.store is not None and plan.store.has_sidecar("attention.proof")
        layers = {spec.signal.layer for spec in plan.specs if spec.signal.name == "attention.qkv"}
        layers |= {shortcut.signal.layer for shortcut in tried.values() if shortcut.signal.name == "attention.qkv"}
        if layers and not has_proof:
            scores = self._try_scores(sorted(layer for layer in layers if layer is not None))
            if scores is not None and not scores.holds:
                progress.info(f"{scores}: scores cannot be derived")

    def _try_scores(self, layers: Sequence[int]) -> Shortcut | None:
        from .shortcuts import try_scores
        from .teacher import resolve_device

        if layers and "attention" not in self._tried:
            device = resolve_device(self.device)
            self._tried["attention"] = try_scores(self._teacher, layers, dtype=self.dtype, device=device)
        return self._tried.get("attention")

    @cached_property
    def _asked(self) -> tuple[Signal, ...]:
        """What --signals names; its default, logits, is not asked of a bare encoder when something else is."""
        from ...pipeline.store import parse_signals

        if self._chooses and not self._teacher.has_head and self.signals == "logits":
            return ()
        items = [item for item in self.signals.split(",") if item.strip() not in self._vocabulary_logits]
        signals = parse_signals(",".join(items), self._teacher.num_layers) if items else ()
        if self._teacher.tags_tokens:
            # The logits of a token classifier are one vector per token: a signal of their own.
            named = [replace(s, name=OF_TOKENS) if s.name == "logits" else s for s in signals]
            signals = tuple(dict.fromkeys(named))
        self._require_head(signals)
        self._require_masks(signals)
        return signals

    def _require_masks(self, signals: Sequence[Signal]) -> None:
        masked = [signal for signal in signals if "mask" in signal.kind.dims]
        if masked and self._teacher.masking is None:
            raise RefusedError(
                f"{', '.join(map(str, masked))}: what is said of masked tokens needs masked text",
                fix="--mask-share 0.15, with a masked-LM teacher",
            )

    def _require_head(self, signals: Sequence[Signal]) -> None:
        if not self._teacher.tags_tokens and any(signal.name == OF_TOKENS for signal in signals):
            raise RefusedError(
                f"teacher {self.teacher} has no head that classifies tokens, so it gives no {OF_TOKENS}",
                details={"architectures": ", ".join(self._teacher.config.architectures or ["(none)"])},
                fix="fine-tune one: kd train-teacher --task token --model ...",
            )
        if not self._teacher.has_head and any(signal.name == "logits" for signal in signals):
            raise RefusedError(
                f"teacher {self.teacher} has no classification head, so it gives no logits",
                details={"architectures": ", ".join(self._teacher.config.architectures or ["(none)"])},
                fix="fine-tune it first (kd train-teacher --model ...), or ask for hidden states only"
                if self._teacher.masking is None
                else f"a masked LM gives {MLM_LOGITS}",
            )

    @cached_property
    def _corpus(self) -> Corpus:
        """The corpus with its labels in the teacher's order."""
        from ..corpus import DatasetSource, load_corpus, open_corpus

        teacher = self._teacher
        names = teacher.label_names if teacher.task != "regression" else ()
        if self.corpus is not None:
            corpus = open_corpus(self.corpus)
        else:
            assert self.dataset is not None and self.text_column is not None
            if self.task is not None:
                self._require_kind(self.task)
            source = DatasetSource(
                dataset=self.dataset,
                text_column=self.text_column,
                text_pair_column=self.text_pair_column,
                label_column=self.label_column,
                task=self.task or teacher.task,
            )
            corpus = load_corpus(source, label_names=names or None)
        self._require_kind(corpus.info.task)
        return corpus.with_label_names(names, task=teacher.task) if teacher.has_head else corpus

    def _require_kind(self, task: str) -> None:
        """RefusedError where one of teacher and rows is of tokens and the other is not."""
        teacher = self._teacher
        if teacher.has_head and teacher.task != task and "token" in (teacher.task, task):
            raise RefusedError(
                f"teacher {self.teacher} is a {teacher.task} classifier, and the rows of {self.corpus or self.dataset} "
                f"are of a {task} task",
                fix="a teacher for tokens (kd train-teacher --task token), or an encoder without a head"
                if task == "token"
                else "rows of words: --task token, the text column a list of words",
            )

    @cached_property
    def _max_tokens(self) -> int:
        return min(self.max_length, self._teacher.max_tokens)

    @cached_property
    def _identity_of_store(self) -> StoreIdentity:
        from .teacher import store_identity

        return store_identity(self._teacher, max_length=self.max_length, dtype=self.dtype)

    def _max_bytes(self) -> int | None:
        from ...pipeline.store import parse_bytes

        return None if self.max_bytes is None else parse_bytes(self.max_bytes)

    # --- the work ------------------------------------------------------------------------------------------------

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store.plan import free_bytes

        plan = self.plan(context)
        if self.dry_run:
            return self._dry_run(plan, context)
        plan.require_room()
        if free_bytes(self.store) is None:
            context.progress.info(
                f"the room at {self.store} is not known: "
                + (
                    "nothing limits this capture (--max-bytes does)"
                    if plan.max_bytes is None
                    else "--max-bytes limits it"
                )
            )
        try:
            return self._capture(plan, context)
        finally:
            from .capture import forget_teachers

            forget_teachers()
            self._teacher.unload()

    def plan(self, context: StageContext) -> Plan:
        """Tokenise and look up: what is there, what is to be computed, what it costs. Writes nothing."""
        from ...pipeline.store.store import preview
        from .sidecars import missing_sidecars

        progress = context.progress
        teacher, corpus = self._teacher, self._corpus
        if corpus.counts.get("labels_matched_by") == "number":
            progress.warn(
                f"labels of {corpus.info.label_column!r} were matched to the teacher's by number, not by name"
            )
        if self._max_tokens < self.max_length:
            progress.info(f"rows are cut at {self._max_tokens} tokens, the most that the teacher takes")
        store = self._open_store()
        layout = self._layout(store, progress.warn)
        inputs, num_truncated, first_pieces = self._tokenise(layout, context)
        planned = preview(inputs, None if store is None else store.index())
        self._known.update(rows=inputs.first_step(), store=store, shards=planned.shards)
        self._known["sizes"] = [*planned.sizes, *([] if store is None else store.shard_sizes(planned.shards))]
        self._say_choice(progress)
        specs = self._specs(store)
        missing = {} if store is None else store.missing(specs, planned.shards)
        sidecars = tuple(dict.fromkeys((*self._sidecars, *self._choice.sidecars)))
        return Plan(
            url=self.store,
            store=store,
            layout=layout,
            inputs=inputs,
            num_truncated=num_truncated,
            preview=planned,
            signals=self._signals,
            specs=specs,
            missing=missing,
            missing_sizes=[] if store is None else store.shard_sizes(missing),
            recoded=frozenset() if store is None else recoded_shards(store, missing),
            sidecars=sidecars if store is None else missing_sidecars(store, sidecars),
            teacher=teacher,
            max_bytes=self._max_bytes(),
            first_pieces=first_pieces,
        )

    def _layout(self, store: TeacherStore | None, warn: Any) -> StoreLayout:
        from ...pipeline.store import StoreLayout
        from ...pipeline.store.layout import MAX_PAIRS, PAIRS_PER_SHARD
        from .teacher import resolve_device

        asked = {
            name: getattr(self, name)
            for name in ("batch_tokens", "rows_per_shard", "tokens_per_shard", "pairs_per_shard")
            if getattr(self, name) is not None
        }
        if store is None:
            # A CPU is fastest while a batch stays in its cache: 2048 took 15 % less time than 8192 (MiniLM).
            batch_tokens = CPU_BATCH_TOKENS if resolve_device(self.device) == "cpu" else BATCH_TOKENS
            pairs = max(PAIRS_PER_SHARD, self._max_tokens**2)
            sizes = {"batch_tokens": batch_tokens, "pairs_per_shard": pairs if pairs <= MAX_PAIRS else 0}
            layout = StoreLayout.for_vocabulary(self._teacher.vocab_size, **(sizes | asked))
            if layout.tokens_per_shard < self._max_tokens:
                raise UsageError(
                    f"--tokens-per-shard {layout.tokens_per_shard} does not hold a row of {self._max_tokens} tokens",
                    fix=f"give at least {self._max_tokens}",
                )
            if 0 < layout.pairs_per_shard < self._max_tokens**2:
                raise UsageError(
                    f"--pairs-per-shard {layout.pairs_per_shard} does not hold a row of {self._max_tokens} tokens",
                    fix=f"give at least {self._max_tokens**2}, or 0 for a store without attention scores",
                )
            return layout
        for name, value in asked.items():
            fixed = getattr(store.layout, name)
            if value != fixed:
                warn(f"--{name.replace('_', '-')} {value} is ignored: store {self.store} was made with {fixed}")
        return store.layout

    def _tokenise(self, layout: StoreLayout, context: StageContext) -> tuple[InputRows, int, Ragged | None]:
        """What the teacher will read, how many rows were cut, and of a token task where words begin; tokens of a few
        thousand rows are in memory at a time."""
        import numpy as np

        from ...pipeline.ragged import Ragged
        from ...pipeline.store import InputRows
        from ...pipeline.store.scratch import Appended
        from .tokenize import CHUNK_ROWS, encode_rows

        corpus, inputs, num_truncated = self._corpus, InputRows(layout), 0
        of_words = corpus.info.task == "token"
        pieces, words = Appended(np.int16), Appended(np.int64)
        task = context.progress.task("tokenising", total=len(corpus), unit="rows")
        for start in range(0, len(corpus), CHUNK_ROWS):
            texts_a, texts_b = corpus.texts(slice(start, start + CHUNK_ROWS))
            encoded = encode_rows(
                self._teacher.tokenizer,
                texts_a,
                texts_b,
                self._max_tokens,
                words=of_words,
                first_row=start,
                advance=task.advance,
            )
            if encoded.first_pieces is not None:
                pieces.append(encoded.first_pieces.values)
                words.append(encoded.first_pieces.lengths)
            highest = int(encoded.token_ids.values.max(initial=0))
            if highest >= self._teacher.vocab_size:
                raise RefusedError(
                    f"teacher {self.teacher}: its tokenizer gives token id {highest}, "
                    f"its model has {self._teacher.vocab_size} embeddings",
                    fix="put the tokenizer that the model was trained with into the folder",
                )
            inputs.add(encoded.token_ids, encoded.segment_ids)
            num_truncated += int(encoded.truncated.sum())
        task.done()
        found = Ragged.from_lengths(pieces.all(), words.all()) if of_words else None
        return inputs, num_truncated, found

    def _specs(self, store: TeacherStore | None) -> tuple[ArraySpec, ...]:
        """How each signal is stored: as the store has it, else as asked, else by default."""
        from ...pipeline.store import array_specs
        from ...pipeline.store.signal import place

        declared = () if store is None else tuple(store.declared().values())
        first = {spec.signal: spec.encoding for spec in declared if spec.plain}
        wanted: list[ArraySpec] = []
        for signal in self._signals:
            there, asked = first.get(signal), self.hidden_dtype if signal.name.startswith(STATES) else None
            if there is not None and asked not in (None, there):
                raise RefusedError(
                    f"store {self.store} holds {signal} as {there}, --hidden-dtype asks for {asked}",
                    fix=f"leave --hidden-dtype out, or name {signal}:{asked} to have both",
                )
            encoded = replace(signal, encoding=signal.encoding or there or asked)
            wanted += array_specs(encoded, self._teacher.sizes.shape(signal))
        return place(wanted, declared)

    def _capture(self, plan: Plan, context: StageContext) -> StageResult:
        from ...pipeline.store import create_or_open, write_view
        from ..word_pieces import COLUMN, digest, with_first_pieces
        from .capture import CaptureJob, keep_teacher
        from .sidecars import put_files, put_proof, put_sidecars
        from .teacher import resolve_device

        progress, teacher = context.progress, self._teacher
        self._settle_shortcuts(plan, progress)
        store = create_or_open(self.store, self._identity_of_store, plan.layout if plan.store is None else None)
        allocation = store.allocate_inputs(plan.inputs)
        specs = store.declare(plan.specs)
        # Before anything is captured: from here on `kd store gc` leaves what this view needs.
        store.enter_view(
            self.fingerprint_of(self.inputs()),
            self.output_dir,
            corpus={"name": self.corpus or self.dataset or "", "fingerprint": self._corpus.fingerprint},
            signals=specs,
            num_rows=len(self._corpus),
            shards=allocation.shards,
        )
        put_files(store, teacher)
        missing = store.missing(specs, allocation.shards)
        sizes = store.shard_sizes(missing)
        rows_to_compute = sum(shard.rows for shard in sizes)
        progress.info(
            f"{len(self._corpus)} rows: {allocation.num_new} new to the store, {allocation.num_known} known, "
            f"{allocation.num_duplicates} duplicates",
            rows=len(self._corpus),
            rows_new=allocation.num_new,
        )

        job = CaptureJob(
            store=store,
            teacher=str(teacher.folder) if Path(teacher.source).expanduser().is_dir() else teacher.source,
            trust_remote_code=self.trust_remote_code,
            tensors=teacher.tensor_digest,
            dtype=self.dtype,
            device=resolve_device(self.device),
            specs=specs,
        )
        # Before the sidecars they are about: a sidecar that is there is not looked at again.
        for name in self._proofs:
            put_proof(store, name)
        if plan.sidecars:
            put_sidecars(store, teacher.load("auto"), plan.sidecars)
        if missing and self._in_this_process:
            keep_teacher(job, teacher)
        else:
            teacher.unload()

        effect = self._dtype_effect(job, [shard for shard in sorted(missing) if shard not in plan.recoded], context)
        started = time.perf_counter()
        if missing:
            again = sum(its.rows for shard, its in zip(missing, sizes, strict=True) if shard in plan.recoded)
            progress.estimate(
                f"capturing {rows_to_compute} rows in {len(missing)} shards, {plan.bytes_text}"
                + (f"; {again} rows are encoded again from the store, without the teacher" if again else ""),
                rows=rows_to_compute,
                shards=len(missing),
                bytes=sum(plan.bytes_of.values()),
            )
            outcomes = self._map(job, sorted(missing), rows_to_compute, store, context)
        else:
            progress.info("the store holds everything that was asked for; the teacher does not run", rows_computed=0)
            outcomes = []
        seconds = time.perf_counter() - started
        store.compact(only_if_many=True)

        records = [outcome.record for outcome in outcomes if outcome.record is not None]
        rows_computed = sum(record.rows for record in records)
        if halved := sum(record.num_halved for record in records):
            progress.warn(f"{halved} batches did not fit into memory and were run in halves")
        summary = {
            "rows": len(self._corpus),
            "rows_new": allocation.num_new,
            "rows_known": allocation.num_known,
            "duplicates": allocation.num_duplicates,
            "truncated_rows": plan.num_truncated,
            "rows_computed": rows_computed,
            "rows_recoded": sum(record.rows_recoded for record in records),
            "shards_computed": sum(record.rows > 0 for record in records),
            "bytes_written": sum(record.bytes for record in records),
            "capture_seconds": round(seconds, 3),
            "rows_per_s": round(rows_computed / seconds, 1) if rows_computed else 0.0,
            "store_digest": store.digest(),
            **({} if effect is None else {"dtype_effect": effect}),
        }
        failed = [outcome for outcome in outcomes if outcome.failure is not None]
        if failed:
            return StageResult(summary | {"shards_failed": [o.shard for o in failed]}, failure=_incomplete(failed))
        lacking = store.missing(specs, allocation.shards)
        if lacking:
            return StageResult(
                summary | {"shards_failed": sorted(lacking)},
                failure=IncompleteError(
                    f"{len(lacking)} shards of {self.store} have no record of all signals after the capture",
                    details={"shards": ", ".join(map(str, sorted(lacking)[:10]))},
                    fix="run the same command again: only these are computed",
                ),
            )
        table, of_words = self._corpus.table, {}
        if plan.first_pieces is not None:
            table = with_first_pieces(table, plan.first_pieces)
            of_words = {COLUMN: digest(plan.first_pieces)}
        content = write_view(
            self.output_dir,
            table,
            allocation.rows,
            store,
            specs,
            corpus={
                "info": self._corpus.info.to_json(),
                "fingerprint": self._corpus.fingerprint,
                "counts": dict(self._corpus.counts),
            },
        )
        if (on_variants := self._teacher_on_variants(store, specs, allocation.rows)) is not None:
            from .variants import REPORT

            atomic_write_bytes(Path(self.output_dir) / REPORT, on_variants.text().encode())
            summary |= on_variants.summary()
            content["on_variants"] = on_variants.content()
        return StageResult(summary=summary, content=content | of_words)

    def _teacher_on_variants(
        self, store: TeacherStore, specs: Sequence[ArraySpec], rows: npt.NDArray[np.int64]
    ) -> TeacherOnVariants | None:
        """What the captured logits say of variants; None where there are no such logits, or no variants."""
        from .variants import TASKS, TeacherOnVariants

        corpus = self._corpus
        has_logits = any(spec.signal.name == "logits" for spec in specs) and corpus.info.task in TASKS
        if not has_logits or corpus.table["parent_id"].null_count == len(corpus):
            return None
        reader = store.reader(rows=rows)
        return TeacherOnVariants(corpus, lambda examples: reader.gather("logits", rows[examples]))

    def _dtype_effect(self, job: CaptureJob, shards: Sequence[int], context: StageContext) -> dict[str, Any] | None:
        """What the compute dtype does to logits, on some rows of the first shard that the teacher is to run over."""
        if self.dtype == "float32" or not self._teacher.has_head or not shards:
            return None
        from .capture import forget_teachers
        from .dtype_effect import describe_effect, measure_dtype_effect

        effect = measure_dtype_effect(job, self._teacher, shards[0])
        context.progress.info(describe_effect(effect), **effect)
        if not self._in_this_process:
            forget_teachers()  # workers load their own
        return effect

    @property
    def _in_this_process(self) -> bool:
        return self.cluster == "none" or (self.workers == 1 and self.cluster is None)

    def _map(
        self, job: Any, shards: Sequence[int], rows: int, store: TeacherStore, context: StageContext
    ) -> list[ShardOutcome[CapturedShard]]:
        from .capture import worker_environments

        task = context.progress.task("capturing", total=rows, unit="rows")
        outcomes = []
        for outcome in map_shards(
            job,
            shards,
            # Unique to this run: a shared scheduler answers a known key with the old task's result.
            name=f"{store.digest()[:16]}-capture-{uuid.uuid4().hex[:8]}",
            workers=self.workers,
            cluster=self.cluster,
            worker_env=() if self._in_this_process else worker_environments(job.device),
            on_advance=task.advance,
            on_wait=lambda waiting: context.progress.info(_waiting(waiting), shards=[*waiting]),
        ):
            outcomes.append(outcome)
            if outcome.failure is not None:
                context.progress.warn(f"shard {outcome.shard} was set aside: {outcome.failure}", shard=outcome.shard)
        task.done()
        return outcomes

    # --- dry run -------------------------------------------------------------------------------------------------

    def _dry_run(self, plan: Plan, context: StageContext) -> StageResult:
        from .capture import measure_rate
        from .teacher import resolve_device

        tokens_per_s = None
        if plan.shards_to_compute:
            context.progress.info("timing one batch on the teacher")
            tokens_per_s = measure_rate(
                self._teacher,
                *plan.typical_rows(),
                plan.specs,
                batch_tokens=plan.layout.batch_tokens,
                dtype=self.dtype,
                device=resolve_device(self.device),
            )
        summary = plan.figures(tokens_per_s) | {"chosen": self._chosen(), "dry_run": True}
        failure: KdError | None = None
        try:
            plan.require_room()
        except RefusedError as error:
            failure = error
        return StageResult(summary=summary, finished=False, failure=failure)

    def report(self, summary: Mapping[str, Any]) -> str | None:
        """The plan of a dry run as a table; a capture's figures in the common form."""
        if not summary.get("dry_run"):
            return None
        return plan_table(summary, store=self.store, max_tokens=self._max_tokens)


def _waiting(shards: Sequence[int]) -> str:
    named = ", ".join(map(str, shards[:10])) + (", ..." if len(shards) > 10 else "")
    noun = "shard" if len(shards) == 1 else "shards"
    return f"waiting for {len(shards)} {noun} that another process is computing: {named}"


def _incomplete(failed: Sequence[ShardOutcome[Any]]) -> IncompleteError:
    return IncompleteError(
        f"{len(failed)} shards failed; all others are done and kept",
        details=[f"shard {outcome.shard}: {outcome.failure}" for outcome in failed[:20]]
        + ([f"... and {len(failed) - 20} more"] if len(failed) > 20 else []),
        fix="run the same command again: it computes only what is missing (with --workers 1 to see the error itself)",
    )
