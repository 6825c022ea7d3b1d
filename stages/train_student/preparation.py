"""What a training run is made of, opened and checked before any weights load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...pipeline.artifact import open_artifact
from ...pipeline.errors import KdError, RefusedError, UsageError, VerificationError
from ...pipeline.fingerprint import fingerprint
from ...pipeline.ragged import Ragged
from ...pipeline.ranks import launched
from ...pipeline.store.lattice import sources_of
from ...pipeline.store.sidecar import list_sidecars
from ...pipeline.store.signal import Signal
from ...pipeline.store.view import View, open_view
from ..cache_teacher.choice import WITHOUT_SCORES
from ..corpus.corpus import Corpus, load_corpus
from ..corpus.schema import NO_LABEL, CorpusInfo
from ..corpus.source import DatasetSource
from ..masking import Masking
from ..metrics import LOWER_IS_BETTER, check_metric, main_metric, metric_names
from ..word_pieces import read_first_pieces
from .intermediate_matches import expand_matches, is_matches_file
from .methods import (
    OF_WORDS,
    Shapes,
    Term,
    Unfit,
    by_teacher_token,
    fitting_form,
    fitting_methods,
    methods,
    parse_methods,
)
from .methods.hard import Hard
from .multipliers import parse_multipliers
from .order import rows_per_step
from .recipe import Phase, num_steps, read_recipe
from .students import GENERAL, Start, Student, Task, TeacherFacts, parse_start, parse_student

if TYPE_CHECKING:
    from .stage import TrainStudent

AGREEMENT = "agreement"
"""Metric of held-out rows: share of decisions equal to the teacher's."""


TEACHER_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "hidden_size", "vocab_size"), (None, 1)),
    **dict.fromkeys(("num_attention_heads", "intermediate_size"), (1, 1)),
    **dict.fromkeys(("max_position_embeddings", "type_vocab_size"), (0, 0)),
}
"""What students are shaped after: (where a config is silent, the least). None: that of any text encoder is not."""
MAX_SIZE = 1 << 24
"""Of those; a store may be anybody's."""


@dataclass(frozen=True)
class Preparation:
    """Everything a run needs except weights.

    Attributes:
        stage: its configuration.
        views: opened, in the order given.
        corpora: the views' examples, gold labels numbered by `task.label_names`.
        teacher: facts from the first view's store.
        task: what is predicted.
        student, start: what is trained and from where.
        recipe: the phases asked for; one without a name where --method says what to learn from.
        phases: those that are trained; one on gold labels alone for a baseline.
        shapes: of both models.
        eval_corpus: labelled rows of --eval-dataset, or None.
    """

    stage: TrainStudent
    views: tuple[View, ...]
    corpora: tuple[Corpus, ...]
    teacher: TeacherFacts
    task: Task
    student: Student
    start: Start
    recipe: tuple[Phase, ...]
    phases: tuple[Phase, ...]
    shapes: Shapes
    eval_corpus: Corpus | None

    @property
    def terms(self) -> tuple[Term, ...]:
        """Methods and weights of all phases, one after another."""
        return tuple(term for phase in self.phases for term in phase.terms)

    @cached_property
    def signals(self) -> tuple[Signal, ...]:
        """Teacher signals that the methods need, each once."""
        return tuple(dict.fromkeys(signal for phase in self.phases for signal in phase.signals(self.shapes)))

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step, where all rows but those held back are trained on."""
        return self._rows_and_step[1]

    @cached_property
    def _rows_and_step(self) -> tuple[int, int]:
        stage = self.stage
        num_rows = int((~self.held_out).sum())
        batch_size = stage.per_device_train_batch_size or int(
            self.student.training.get("per_device_train_batch_size", 8)
        )
        return num_rows, rows_per_step(num_rows, batch_size, (stage.gradient_accumulation_steps or 1) * launched()[1])

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Optimiser steps of every phase that is trained.

        The budget is that of the distilled run: a baseline, which has fewer rows, passes over them more often.
        """
        stage = self.stage
        num_rows, of_step = self._rows_and_step
        # With fewer rows than slices of a step nothing can be trained; whoever orders them says so.
        steps_per_epoch = num_rows // max(of_step, 1)
        epochs = stage.num_train_epochs or float(self.student.training.get("num_train_epochs", 3.0))
        total = stage.max_steps or max(1, math.ceil(epochs * steps_per_epoch))
        steps = num_steps(self.recipe, total=total, steps_per_epoch=steps_per_epoch)
        return (sum(steps),) if stage.baseline else steps

    def sources_of(self, signal: Signal) -> tuple[Signal, ...] | None:
        """The stored signals that a signal is read or derived from, for every row; None where that is not possible."""
        return sources_of(signal, self._is_stored, self._sidecars, self.teacher.num_layers)

    def sources(self, signals: Iterable[Signal]) -> tuple[Signal, ...]:
        """What signals are read or derived from, each once."""
        return tuple(dict.fromkeys(source for signal in signals for source in self.sources_of(signal) or ()))

    def row_sources(self, signals: Iterable[Signal]) -> tuple[Signal, ...]:
        """The same of those with one entry per row."""
        return self.sources(signal for signal in signals if signal.kind.axis == "example")

    @property
    def derives(self) -> bool:
        """Whether some signal is not stored as it is."""
        return not set(self.signals) <= set(self.sources(self.signals))

    def _is_stored(self, signal: Signal) -> bool:
        if signal not in self._stored:
            self._stored[signal] = all(bool(view.reader.has(signal, view.rows).all()) for view in self.views)
        return self._stored[signal]

    @cached_property
    def _stored(self) -> dict[Signal, bool]:
        return {}

    @cached_property
    def _sidecars(self) -> frozenset[str]:
        """Those that all stores have; none where they are of several teachers, whose signals differ."""
        if len({str(view.store.identity.teacher["tensors"]) for view in self.views}) > 1:
            return frozenset()
        return frozenset.intersection(*(frozenset(list_sidecars(view.store.files)) for view in self.views))

    @cached_property
    def maskings(self) -> tuple[Masking, ...]:
        """How the rows of each view are masked; empty where they are not."""
        return tuple(filter(None, (Masking.from_capture(view.store.identity.capture) for view in self.views)))

    @property
    def role(self) -> str:
        """ "distilled", or "baseline" when no teacher signal is used."""
        return "distilled" if self.signals else "baseline"

    @property
    def method(self) -> str:
        """The methods as text, weights and options included; those of one phase after those of another."""
        return " > ".join(phase.method for phase in self.phases)

    @cached_property
    def has_gold(self) -> np.ndarray:
        """bool [N] over the rows of all views; of masked text, every row holds what is masked."""
        if self.task.kind == "masked-lm":
            return np.ones(sum(map(len, self.corpora)), bool)
        return np.concatenate([corpus.has_gold for corpus in self.corpora])

    @cached_property
    def labels(self) -> np.ndarray:
        """[N] or [N, C] over the rows of all views; of words -1, whatever they are read for: `tags` has theirs."""
        of_words = self.corpora[0].info.task == "token"
        none = (np.full(len(corpus), NO_LABEL, np.int64) for corpus in self.corpora)
        return np.concatenate([*none] if of_words else [corpus.labels()[0] for corpus in self.corpora])

    @cached_property
    def tags(self) -> Ragged:
        """int64 gold tags of the words of all rows, of a token task; -1 where there are none."""
        return Ragged.concatenate([corpus.tags()[0] for corpus in self.corpora])

    @cached_property
    def first_pieces(self) -> Ragged:
        """int16: which of the teacher's tokens each of these words begins with; below 0 where it has none."""
        return Ragged.concatenate([read_first_pieces(view) for view in self.views])

    @property
    def logits(self) -> Signal:
        """The teacher's own prediction."""
        return OF_WORDS if self.task.kind == "token" else Signal("logits")

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool [N]: rows kept back for evaluation, with all variants of the same text."""
        fraction = self.stage.validation_fraction
        if not fraction:
            return np.zeros(len(self.has_gold), bool)
        return _uniform(self.families, seed=self.stage.seed) < fraction

    @cached_property
    def families(self) -> np.ndarray:
        """uint64 [N]: alike for a text and all variants made from it."""
        return np.concatenate([_family_ids(corpus) for corpus in self.corpora])

    @cached_property
    def is_original(self) -> np.ndarray:
        """bool [N]: rows that no augmentation made."""
        return np.concatenate([corpus.table["parent_id"].is_null().to_numpy() for corpus in self.corpora])

    @property
    def best_metric(self) -> str:
        """The metric that picks the checkpoint."""
        given = self.stage.metric_for_best_model
        if given is not None:
            return given.removeprefix("eval_")
        judged_by_gold = self.eval_corpus is not None or bool((self.held_out & self.has_gold).any())
        return main_metric(self.task.kind, self.task.label_names) if judged_by_gold else AGREEMENT

    @property
    def best_is_greatest(self) -> bool:
        """Whether a greater value of that metric is better."""
        return self.best_metric not in LOWER_IS_BETTER

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the inputs, by field name of the stage."""
        views = [view.fingerprint for view in self.views]
        found = {"view": views[0] if len(views) == 1 else fingerprint(views)}
        if self.eval_corpus is not None:
            found["eval_dataset"] = self.eval_corpus.fingerprint
        matches = [Path(text).expanduser() for text in ",".join(self.stage.method).split(",") if is_matches_file(text)]
        if matches:
            found["method"] = _file_digest(matches)
        if self.start.kind == "vectors":
            found["init"] = _file_digest([Path(self.start.path).expanduser()])
        if self.student.name == "checkpoint" and Path(self.stage.student).expanduser().is_dir():
            found["student"] = _file_digest(sorted(Path(self.stage.student).expanduser().glob("*.*")))
        return found


def prepare(stage: TrainStudent) -> Preparation:
    """Open and check what the stage names.

    Raises:
        UsageError: an unknown student, method, option, start or metric.
        RefusedError: inputs that do not fit together; signals that a view does not hold, with the command that adds
            them; no gold label where one is needed.
    """
    wanted = parse_methods(expand_matches(stage.method)) if stage.recipe is None else None
    student = parse_student(stage.student)
    start = student.default_start() if stage.init is None else parse_start(stage.init)

    views = tuple(open_view(path) for path in stage.view)
    teacher = TeacherFacts(views[0].store, _teacher_config(views[0]))
    task, corpora = _task(views)
    if stage.fp16 and student.refuses_float16:
        raise UsageError(f"student {stage.student!r} overflows in float16", fix="use --bf16, or neither")
    student.check(start, teacher, task)
    token_widths, sentence_widths = student.widths(start, teacher, task)
    heads, attention_width = student.attention(start, teacher)
    shapes = Shapes(
        task=task.kind,
        num_labels=len(task.label_names),
        token_widths=token_widths,
        sentence_widths=sentence_widths,
        teacher_layers=teacher.num_layers,
        teacher_width=teacher.hidden_size,
        student_heads=heads,
        attention_width=attention_width,
        teacher_heads=teacher.num_heads,
    )
    reads_tokens = student.reads_teacher_tokens(teacher)
    multipliers = parse_multipliers(stage.lr_multipliers, num_layers=shapes.student_layers)
    with _naming_what_fits(shapes, stage.student, reads_tokens):
        if wanted:
            recipe: tuple[Phase, ...] = (Phase(terms=wanted, share=1.0, multipliers=multipliers),)
        else:
            recipe = read_recipe(str(stage.recipe), stage, shapes)
        needed = [signal for phase in recipe for signal in phase.signals(shapes)]
    on_gold = Phase(terms=(Term(1.0, Hard()),), share=1.0, multipliers=multipliers)
    phases = (on_gold,) if stage.baseline else recipe
    prepared = Preparation(
        stage=stage,
        views=views,
        corpora=corpora,
        teacher=teacher,
        task=task,
        student=student,
        start=start,
        recipe=recipe,
        phases=phases,
        shapes=shapes,
        eval_corpus=_eval_corpus(stage, corpora[0].info, task),
    )
    _check_general(prepared, needed, reads_tokens)
    _check_tokens(prepared, needed, reads_tokens)
    if task.kind == "token":
        _ = prepared.first_pieces  # refused before anything loads
    _check_scores(prepared)
    _check_compilation(prepared)
    _check_coverage(prepared)
    _check_gold(prepared)
    _check_selection(prepared)
    _ = prepared.steps
    return prepared


def _teacher_config(view: View) -> dict[str, object]:
    """The teacher's config, as its kind completes it; what that calls otherwise (`dim`) stands under both names."""
    from transformers import CONFIG_MAPPING

    file = view.store.sidecar_folder("config") / "config.json"
    try:
        config: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("model_type")
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            made = CONFIG_MAPPING[kind].from_dict(config)
            config = {name: getattr(made, name) for name in made.attribute_map} | made.to_dict()
        for name, (default, least) in TEACHER_SIZES.items():
            size = config.get(name, default)
            if type(size) is not int or not least <= size <= MAX_SIZE:
                raise ValueError(f"{name} is {size!r}")
    except Exception as error:  # whatever a kind says of values that are not its own
        raise VerificationError(
            f"the teacher's config.json that store {view.store.url} keeps is not one: {error}",
            fix="run kd cache-teacher with a new --store",
        ) from None
    return config


def _task(views: Sequence[View]) -> tuple[Task, tuple[Corpus, ...]]:
    """The task that all views share, and their examples with labels numbered the teacher's way."""
    infos = [CorpusInfo.from_json(dict(view.info)) for view in views]
    kind = _kind(views[0], infos[0])
    names = _label_names(views[0], infos[0])
    for view, info in zip(views[1:], infos[1:], strict=True):
        differing = {
            "task": (kind, _kind(view, info)),
            "text pairs": (infos[0].is_pair, info.is_pair),
            "label names": (names, _label_names(view, info)),
        }
        lines = [f"{what}: {first} and {second}" for what, (first, second) in differing.items() if first != second]
        if lines:
            raise RefusedError(f"views {views[0].path} and {view.path} cannot be trained on together", details=lines)
    corpora = []
    for view, info in zip(views, infos, strict=True):
        corpus = Corpus(view.examples, info)
        unnamed = kind in ("regression", *GENERAL)
        corpora.append(corpus if unnamed else corpus.with_label_names(names, task=kind))
    return Task(kind, names, infos[0].is_pair), tuple(corpora)


def _kind(view: View, info: CorpusInfo) -> str:
    """The task of a view: that of its corpus, or a general one where neither it nor the teacher names labels."""
    if "masking" in view.store.identity.capture:
        return "masked-lm"
    named = view.store.identity.capture.get("label_names") or info.label_names
    return info.task if named or info.task == "regression" else "encoder"


def _label_names(view: View, info: CorpusInfo) -> tuple[str, ...]:
    """Names of the logits: the teacher's, or the corpus' for a teacher without a head; none of a general task."""
    if info.task == "regression":
        return ("LABEL_0",)
    return tuple(view.store.identity.capture.get("label_names") or info.label_names)


def _eval_corpus(stage: TrainStudent, info: CorpusInfo, task: Task) -> Corpus | None:
    if stage.eval_dataset is None:
        return None
    label_column = stage.label_column or info.label_column
    if label_column is None:
        raise UsageError("--eval-dataset needs --label-column: the view's corpus had none")
    source = DatasetSource(
        dataset=stage.eval_dataset,
        text_column=stage.text_column or info.text_column,
        text_pair_column=stage.text_pair_column or info.text_pair_column,
        label_column=label_column,
        task=task.kind,
    )
    names = None if task.kind == "regression" else task.label_names
    corpus = load_corpus(source, split_default="validation", label_names=names)
    corpus = corpus.replaced(table=corpus.table.filter(corpus.table["has_gold"]))
    if not len(corpus):
        raise RefusedError(
            f"--eval-dataset {stage.eval_dataset} has no labelled row", fix="give a split whose labels are published"
        )
    return corpus


@contextlib.contextmanager
def _naming_what_fits(shapes: Shapes, student: str, reads_tokens: bool) -> Iterator[None]:
    """A method that does not fit the two models is refused with those that do."""
    try:
        yield
    except Unfit as error:
        fitting = ", ".join(fitting_methods(shapes, reads_teacher_tokens=reads_tokens))
        details = [*error.details, f"fit student {student!r} as they are: {fitting}"]
        lesser = [f"{name}:{form}" for name in methods if (form := fitting_form(name, shapes))]
        if lesser and reads_tokens:
            details.append(f"in part: {', '.join(lesser)}")
        raise Unfit(error.what, details=details, fix=error.fix) from None


def _check_general(prepared: Preparation, needed: Sequence[Signal], reads_tokens: bool) -> None:
    """Without labels there is nothing to evaluate by, and what reads a prediction needs masked text."""
    task, stage = prepared.task, prepared.stage
    if not task.is_general:
        return
    where = f"view {prepared.views[0].path}"
    if stage.has_eval:
        raise UsageError(
            f"{where} has no labels, so there is nothing to evaluate the student on",
            fix="leave --eval-dataset and --validation-fraction out; what fine-tunes the student evaluates it",
        )
    if task.kind == "encoder":
        reading = {t.method.name for t in prepared.terms if "logits" in t.method.reads(prepared.shapes)}
        if reading:
            raise RefusedError(
                f"method {' and '.join(map(repr, sorted(reading)))} reads a prediction, and {where} has neither labels "
                "nor masked tokens",
                fix="methods of hidden states and attention (tinybert, minilmv2), or capture with --mask-share",
            )
        return
    if not reads_tokens:
        raise RefusedError(f"the masked text of {where} is for a student that reads the teacher's tokens")
    if Signal("logits") in needed:
        names = {t.method.name for phase in prepared.recipe for t in phase.terms
                 if Signal("logits") in t.method.signals(prepared.shapes)}  # fmt: skip
        raise RefusedError(
            f"method {' and '.join(map(repr, sorted(names)))} compares one prediction per example, and {where} is of "
            "masked text",
            fix="soft-target, hard and distilbert, or methods of hidden states and attention",
        )
    if not all(masking.alike(prepared.maskings[0]) for masking in prepared.maskings):
        raise RefusedError(
            "the views are masked differently, by more than the seed",
            details=[f"{v.path}: {m.to_json()}" for v, m in zip(prepared.views, prepared.maskings, strict=True)],
        )


def _check_tokens(prepared: Preparation, needed: Sequence[Signal], reads_tokens: bool) -> None:
    """Token signals need a student that reads the teacher's tokens; several stores need one tokenizer and one shape."""
    teacher = prepared.teacher
    of_tokens = [str(signal) for signal in needed if by_teacher_token(signal)]
    if of_tokens and not reads_tokens:
        raise RefusedError(
            f"signals of every token ({', '.join(of_tokens)}) need a student that reads the teacher's tokens, and "
            f"{prepared.stage.student!r} has its own",
            details=[
                "fit any tokenizer: " + ", ".join(fitting_methods(prepared.shapes, reads_teacher_tokens=False)),
                "and methods with at=cls or at=mean, which read sentence vectors",
            ],
            fix="one of those, or a student with the teacher's tokenizer",
        )
    for view in prepared.views[1:]:
        if reads_tokens and view.store.identity.tokenizer != teacher.store.identity.tokenizer:
            raise RefusedError(
                f"views {prepared.views[0].path} and {view.path} were tokenised differently, and "
                f"{prepared.stage.student!r} reads the teacher's tokens",
                fix="train on one of them, or use --student bilstm:units=words",
            )
        config = _teacher_config(view)
        found = (config["num_hidden_layers"], config["hidden_size"])
        if any(signal.layer is not None for signal in needed) and found != (teacher.num_layers, teacher.hidden_size):
            raise RefusedError(
                f"views {prepared.views[0].path} and {view.path} have teachers of other shapes, and a method needs "
                "hidden states",
                details=[f"layers, width: {teacher.num_layers}, {teacher.hidden_size} and {found[0]}, {found[1]}"],
            )


def _check_scores(prepared: Preparation) -> None:
    """Queries and keys that a method takes for attention are known to give the teacher's."""
    taking = [term.method.name for phase in prepared.recipe for term in phase.terms if term.method.takes_scores()]
    for view in prepared.views:
        if taking and not view.store.has_sidecar("attention.proof"):
            raise RefusedError(
                f"method {taking[0]!r} compares attention, and no capture into store {view.store.url} has seen "
                "that its teacher's is query times key: it is not where positions are rotary or relative",
                fix=f"{WITHOUT_SCORES}; or run kd cache-teacher --for {taking[0]} on that store, which tries it",
            )


def _check_compilation(prepared: Preparation) -> None:
    """Attention is watched from Python, as the student runs: a compiled graph would not call the watch."""
    if not prepared.stage.torch_compile:
        return
    if prepared.task.kind == "masked-lm":
        raise UsageError("a compiled student does not cut its head to masked tokens", fix="leave --torch-compile out")
    terms = [term for phase in prepared.phases for term in phase.terms]
    watching = {
        term.method.name
        for term in terms
        if any(name.startswith(("score@", "qkv@")) for name in term.method.reads(prepared.shapes))
    }
    if watching:
        raise UsageError(
            f"method {' and '.join(repr(name) for name in sorted(watching))} reads the student's attention, which a "
            "compiled student does not show",
            fix="leave --torch-compile out",
        )


def _check_coverage(prepared: Preparation) -> None:
    """Every signal that the methods need is stored for every row of every view, or follows from what is."""
    lacking = [signal for signal in prepared.signals if prepared.sources_of(signal) is None]
    for view in prepared.views:
        reader = view.reader
        missing = [signal for signal in lacking if not reader.has(signal, view.rows).all()]
        if not missing:
            continue
        needed_by = {
            term.method.name for term in prepared.terms for s in term.method.signals(prepared.shapes) if s in missing
        }
        lines = [f"{s}: {int((~reader.has(s, view.rows)).sum())} of {len(view)} rows lack it" for s in missing]
        raise RefusedError(
            f"method {' and '.join(repr(name) for name in sorted(needed_by))} needs signals that view {view.path} "
            "does not hold, and that do not follow from what it does",
            details=[*lines, f"held: {', '.join(map(str, view.signals))}"],
            fix=_capture_command(view, missing),
        )


def _capture_command(view: View, missing: Sequence[Signal]) -> str:
    """The command that made the view, with the missing signals added."""
    signals = ",".join(map(str, dict.fromkeys([*view.signals, *missing])))
    try:
        from ...pipeline.config import command_line, parse_values
        from ..cache_teacher import CacheTeacher

        config = open_artifact(view.path, kind="view").manifest["config"]
        stage = CacheTeacher(**parse_values(CacheTeacher, {**config, "signals": signals}, named=str))
        return f"{shlex.join(command_line(stage))} --overwrite"
    except (KdError, KeyError, TypeError):
        return f"run kd cache-teacher again on the same corpus and store with --signals {signals}"


def _check_gold(prepared: Preparation) -> None:
    """A method on gold labels needs at least one in the training rows."""
    if not any(isinstance(term.method, Hard) for term in prepared.terms):
        return
    if not (prepared.has_gold & ~prepared.held_out).any():
        who = "--baseline" if prepared.stage.baseline else "method 'hard'"
        raise RefusedError(
            f"{who} needs gold labels, and no training row of {', '.join(prepared.stage.view)} has one",
            fix="leave it out, or cache a corpus with labels",
        )


def _check_selection(prepared: Preparation) -> None:
    """The metric that picks the checkpoint can be computed on the rows there are."""
    stage = prepared.stage
    task, names = prepared.task.kind, prepared.task.label_names
    if not stage.has_eval:
        return
    of_teacher = stage.validation_fraction > 0 and prepared.role == "distilled"
    if stage.validation_fraction:
        held_out = prepared.held_out & prepared.is_original
        if not held_out.any() or prepared.held_out.all():
            raise RefusedError(
                f"--validation-fraction {stage.validation_fraction:g} holds back {int(prepared.held_out.sum())} of "
                f"{len(held_out)} rows",
                fix="give another fraction, or --eval-dataset",
            )
        if not of_teacher and not (held_out & prepared.has_gold).any():
            raise RefusedError(
                "the rows held back have no gold label, and a baseline cannot be judged by the teacher",
                fix="give --eval-dataset, or a greater --validation-fraction",
            )
    if prepared.best_metric == AGREEMENT:
        if not of_teacher:
            raise UsageError(
                "--metric-for-best-model agreement compares with the teacher on rows held back",
                details=[f"metrics here: {', '.join(metric_names(task, len(names), names))}"],
                fix="use it with --validation-fraction and without --baseline",
            )
        logits = prepared.logits
        missing = [view for view in prepared.views if not view.reader.has(logits, view.rows).all()]
        if missing:
            raise RefusedError(
                f"the rows held back can only be judged by the teacher's logits, which view {missing[0].path} lacks",
                fix=_capture_command(missing[0], [logits]),
            )
        return
    check_metric(prepared.best_metric, task, len(names), names)


def _family_ids(corpus: Corpus) -> np.ndarray:
    """uint64 [N]: a hash of the original text that a row is, or was made from."""
    import pyarrow.compute as pc

    column = pc.coalesce(corpus.table["parent_id"], corpus.table["example_id"]).combine_chunks()
    raw = np.frombuffer(b"".join(column.to_pylist()), np.uint64)
    return raw.reshape(len(column), 2)[:, 0]


def _uniform(ids_N: np.ndarray, *, seed: int) -> np.ndarray:
    """float64 [N] from 0 to below 1, a hash of id and seed (the finaliser of splitmix64)."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        mixed = ids_N ^ np.frombuffer(digest, np.uint64)[0]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53)


def _file_digest(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name}:".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
