"""Running one training: rows, student, budget, `Trainer`, export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged
from ...pipeline.stage import StageContext, StageResult
from ...pipeline.store.scratch import blocks, column
from ...pipeline.store.signal import Signal
from ..cache_teacher.teacher import max_positions
from ..cache_teacher.tokenize import encode_rows
from ..corpus.corpus import Corpus
from ..corpus.schema import NO_LABEL
from ..derivation import derivation_of
from ..metrics import agreement, task_metrics
from ..training_options import attach_progress
from .convergence import had_ended
from .export import RECIPE, Report, export_run
from .multipliers import idle
from .order import BatchOrder
from .phases import CarriedProjections, PhaseCallback, facts_of, finish, phase_folder, reached, restore, training_only
from .preparation import AGREEMENT, Preparation
from .ranks import TrainingRanks
from .recipe import OPTIONS, Phase
from .rows import Rows, StoredTokens, StoreRows, TokensInMemory, TokenSource, Words
from .seen_rows import SeenRows
from .trainer import Distillation, Metrics, StopAtSignal, StudentTrainer

SEEN_SHARE = 0.8
"""A table of which training sees more than this share of the rows is trained whole."""


@dataclass(frozen=True)
class Data:
    """Rows to train and to evaluate on.

    Attributes:
        rows: all rows of the views, with the signals of all phases.
        train: ints, rising: those that some phase trains on.
        gold: ints, rising: those of them that a phase on gold labels alone trains on.
        evaluation: rows to evaluate on, or None.
        teacher_logits: float32 [E, C] of the evaluation rows, or None where the teacher may not judge.
    """

    rows: Rows
    train: np.ndarray
    gold: np.ndarray
    evaluation: Rows | None
    teacher_logits: np.ndarray | None

    def train_in(self, phase: Phase) -> np.ndarray:
        """ints, rising: the rows that a phase trains on.

        Gold labels are all that some learn from: rows without one would only make their batches smaller.
        """
        return self.gold if phase.gold_alone else self.train


def train_student(prepared: Preparation, context: StageContext, ranks: TrainingRanks | None = None) -> StageResult:
    """Train as prepared, phase after phase, and write the run folder.

    Args:
        ranks: the processes that train together; None is this one alone. All of them call this, rank 0 writes.

    Raises:
        RefusedError: training diverged, a resumed checkpoint is of another configuration, or this rank reads other
            files than rank 0.
        KeyboardInterrupt: interrupted; a checkpoint of the last finished step was written.
    """
    stage = prepared.stage
    place = reached(stage.output_dir, prepared.phases)
    checkpoint = Path(stage.resume_from_checkpoint) if stage.resume_from_checkpoint is not None else place.checkpoint
    if ranks is not None:
        found = [*place.folders, checkpoint]
        ranks.require_alike({"inputs": prepared.fingerprints, "checkpoint": ", ".join(map(str, found))})
    started = time.perf_counter()
    tokenizer = prepared.student.make_tokenizer(
        prepared.start, prepared.teacher, lambda: _texts(prepared), whole_words=prepared.task.kind == "token"
    )
    set_seed(stage.seed)
    build = prepared.student.build(prepared.start, prepared.teacher, prepared.task, tokenizer)
    data = make_data(prepared, tokenizer, build.model)
    _limit_to_seen_rows(build.model, data)
    context.progress.estimate(_announcement(prepared, data, build.model), steps=sum(prepared.steps))

    carried = restore(place.folders[-1], build.model) if place.folders else CarriedProjections()
    done = [facts_of(folder) for folder in place.folders]
    if done:
        context.progress.info(f"training: phases already done: {', '.join(facts['name'] for facts in done)}")
    for number in range(len(done), len(prepared.phases)):
        if number:
            # A phase draws the same however often what is before it was interrupted.
            set_seed(stage.seed + number)
        trainer = make_trainer(prepared, build.model, data, checkpoint, number=number, carried=carried)
        train_loss, stopped = _train(prepared, trainer, context, number, checkpoint)
        checkpoint = None
        facts = _phase_facts(prepared, trainer, data, number, train_loss)
        done.append(facts)
        if number + 1 < len(prepared.phases):
            carried.take(trainer.distillation, prepared.phases[number], prepared.phases[number + 1 :])
            if trainer.is_world_process_zero():
                finish(phase_folder(stage.output_dir, prepared.phases, number), trainer.student, carried, facts)
            if stopped:
                raise KeyboardInterrupt
    metrics = _final_metrics(trainer, data)
    student = whole(trainer.student)
    report = _report(prepared, data, trainer, metrics, build.start, done)
    report.training["unknown_tokens"] = _unknown_share(tokenizer, data)
    report.training["seconds"] = round(time.perf_counter() - started, 3)
    if trainer.is_world_process_zero():
        export_run(stage.output_dir, student, tokenizer, report)
    return StageResult(summary=report.summary(), content=report.content())


def _train(
    prepared: Preparation, trainer: StudentTrainer, context: StageContext, number: int, checkpoint: Path | None
) -> tuple[float, bool]:
    """Train one phase to its end: its mean loss, and whether an interrupt came in its last step.

    Raises:
        KeyboardInterrupt: it came before.
    """
    phase, count = prepared.phases[number], len(prepared.phases)
    name = "training" if count == 1 else f"phase {number + 1}/{count} {phase.name}"
    attach_progress(trainer, context.progress, name)
    distillation = trainer.distillation
    idling = idle(phase.multipliers, (parameter for parameter, _ in distillation.named_parameters()))
    if idling and count == 1:
        context.progress.warn(f"--lr-multipliers {', '.join(map(str, idling))}: nothing of that is trained here")
    with training_only(distillation, phase.trainable), _stopping_at_interrupt(trainer) as interrupt:
        trainer.add_callback(interrupt)
        trainer.add_callback(PhaseCallback(phase, distillation, prepared.shapes.student_layers))
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.convergence is not None and trainer.convergence.ended is not None:
        context.progress.info(f"{name}: converged at step {trainer.convergence.ended} of {prepared.steps[number]}")
    if interrupt.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    return float(result.training_loss), interrupt.stopped


# --- data --------------------------------------------------------------------------------------------------------


def make_data(prepared: Preparation, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Data:
    """The rows of a run, read from the views; nothing is gathered yet."""
    views = prepared.views
    stored = StoreRows([view.reader for view in views], [view.rows for view in views], prepared.maskings)
    of_words = prepared.task.kind == "token"
    pieces = prepared.first_pieces if of_words else None
    if prepared.student.reads_teacher_tokens(prepared.teacher):
        tokens: TokenSource = StoredTokens(stored)
    else:
        tokens, pieces = _tokenized(tokenizer, prepared.corpora, prepared)
    longest, limit = int(tokens.lengths.max(initial=0)), max_positions(model.config)
    if limit is not None and longest > limit:
        raise RefusedError(
            f"student {prepared.stage.student!r} takes {limit} tokens at most, and the longest row has {longest}",
            fix=f"another student, or cache the corpus again with --max-length {limit}",
        )
    with_segments = prepared.task.pair and _takes_segments(model, tokenizer)
    contrasts = any(term.method.num_negatives(prepared.shapes) for term in prepared.terms)
    rows = Rows(
        tokens=tokens,
        labels=prepared.labels,
        has_gold=prepared.has_gold,
        pad_token_id=tokenizer.pad_token_id or 0,
        with_segments=with_segments,
        stored=stored if prepared.signals else None,
        signals=prepared.sources(prepared.signals),
        row_signals=prepared.row_sources(prepared.signals),
        masks=stored if prepared.maskings else None,
        to_derive=prepared.derives,
        families=prepared.families.view(np.int64) if contrasts else None,
        words=None if pieces is None else Words(pieces, prepared.first_pieces, prepared.tags),
    )
    evaluation, teacher_logits = _evaluation(prepared, tokenizer, rows, stored)
    gold = _numbers(~prepared.held_out & prepared.has_gold)
    gold_alone = all(phase.gold_alone for phase in prepared.phases)
    train = gold if gold_alone else _numbers(~prepared.held_out)
    return Data(rows, train, gold, evaluation, teacher_logits)


def _numbers(chosen_N: np.ndarray) -> np.ndarray:
    """Where it is True: a column on disk where it is large."""
    found = (np.flatnonzero(chosen_N[part]) + part.start for part in blocks(len(chosen_N)))
    return column(found, np.int32 if len(chosen_N) < 1 << 31 else np.int64)


def _evaluation(
    prepared: Preparation, tokenizer: PreTrainedTokenizerBase, rows: Rows, stored: StoreRows
) -> tuple[Rows | None, np.ndarray | None]:
    if prepared.eval_corpus is not None:
        corpus = prepared.eval_corpus
        tokens, pieces = _tokenized(tokenizer, [corpus], prepared)
        words = None if pieces is None else Words(pieces, pieces, corpus.tags()[0])
        labels = np.full(len(corpus), NO_LABEL) if words is not None else corpus.labels()[0]
        return Rows(tokens, labels, corpus.has_gold, rows.pad_token_id, rows.with_segments, words=words), None
    held_out = np.flatnonzero(prepared.held_out & prepared.is_original)
    if not len(held_out):
        return None, None
    logits = None
    signal = prepared.logits
    judged = prepared.role == "distilled" and all(view.reader.has(signal, view.rows).all() for view in prepared.views)
    tokens, has_gold = _subset(rows.tokens, held_out), rows.has_gold[held_out]
    if rows.words is not None:
        words = rows.words.take(held_out)
        if judged:
            logits = _at_words(stored, signal, held_out, words.teacher)
        own = Words(words.student, words.student, words.tags)
        return Rows(tokens, rows.labels[held_out], has_gold, rows.pad_token_id, rows.with_segments, words=own), logits
    if judged:
        logits = stored.gather(signal, held_out).astype(np.float32)
    return Rows(tokens, rows.labels[held_out], has_gold, rows.pad_token_id, rows.with_segments), logits


def _at_words(stored: StoreRows, signal: Signal, index: np.ndarray, pieces: Ragged) -> np.ndarray:
    """float32 [W, C] the teacher's logits of some rows where their words begin; NaN of words that begin nowhere."""
    parts = []
    for rows in blocks(len(index), 1024):
        logits_BTC, _ = stored.gather_padded(signal, index[rows])
        part = pieces.slice(rows.start, rows.stop)
        logits_WC = logits_BTC[np.repeat(np.arange(len(part)), part.lengths), part.values].astype(np.float32)
        logits_WC[part.values < 0] = np.nan
        parts.append(logits_WC)
    return np.concatenate(parts)


def _subset(tokens: TokenSource, index: np.ndarray) -> TokensInMemory:
    ids, lengths, segments = tokens.gather(index, segments=True)
    assert segments is not None
    return TokensInMemory(Ragged.from_padded(ids, lengths), Ragged.from_padded(segments, lengths))


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, corpora: tuple[Corpus, ...] | list[Corpus], prepared: Preparation
) -> tuple[TokensInMemory, Ragged | None]:
    """The corpora in the student's tokens, cut where the teacher's input was cut; of a token task also which of them
    every word begins with."""
    longest = min(prepared.teacher.max_tokens, tokenizer.model_max_length)
    of_words = prepared.task.kind == "token"
    parts = [encode_rows(tokenizer, *corpus.texts(), longest, words=of_words) for corpus in corpora]
    tokens = TokensInMemory(
        Ragged.concatenate([part.token_ids for part in parts]), Ragged.concatenate([part.segment_ids for part in parts])
    )
    pieces = [part.first_pieces for part in parts if part.first_pieces is not None]
    return tokens, Ragged.concatenate(pieces) if pieces else None


def _texts(prepared: Preparation) -> list[str]:
    """Texts of the training rows, both sides of pairs, for students that learn their own vocabulary."""
    texts: list[str] = []
    start = 0
    for corpus in prepared.corpora:
        kept = np.flatnonzero(~prepared.held_out[start : start + len(corpus)])
        start += len(corpus)
        for side in filter(None, corpus.texts()):
            texts += [side[row] for row in kept.tolist()]
    return texts


def _takes_segments(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    import inspect

    known = inspect.signature(model.forward).parameters
    return "token_type_ids" in known and "token_type_ids" in tokenizer.model_input_names


# --- trainer -----------------------------------------------------------------------------------------------------


def make_trainer(
    prepared: Preparation,
    model: PreTrainedModel,
    data: Data,
    checkpoint: Path | None = None,
    *,
    number: int = 0,
    carried: CarriedProjections | None = None,
) -> StudentTrainer:
    """The `Trainer` of a phase.

    Args:
        number: of the phase, from 0.
        carried: projections that earlier phases hand on.
    """
    phase, student = prepared.phases[number], prepared.student
    stage = phase.stage(prepared.stage)
    evaluates = data.evaluation is not None and phase.selects
    selection = (
        {"metric_for_best_model": prepared.best_metric, "greater_is_better": prepared.best_is_greatest}
        if evaluates
        else {}
    )
    args = stage.training_arguments(
        output_dir=phase_folder(stage.output_dir, prepared.phases, number),
        has_eval=evaluates,
        **{
            "optim": "adamw_torch_fused",
            "per_device_eval_batch_size": 64,
            "dataloader_num_workers": 1,
            "remove_unused_columns": False,
            # Batches are found by step number, so an interrupted run need not read those it has done.
            "ignore_data_skip": True,
            # Losses that are not finite are refused, not smoothed over.
            "logging_nan_inf_filter": False,
            **student.training,
            **selection,
        },
    )
    # Several GPUs are for several ranks; one process uses one, not DataParallel, which knows nothing of the order.
    args._n_gpu = min(args.n_gpu, 1)
    args.max_steps = prepared.steps[number]
    first_step = 0
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        first_step = int(state["global_step"])
        if had_ended(state.get("stateful_callbacks", {})):
            args.max_steps = first_step
    if first_step >= args.max_steps:
        # Interrupted after its last step: what that epoch's end brings has been.
        args.eval_strategy, args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO

    rows = data.rows
    if len(prepared.phases) > 1:
        signals = phase.signals(prepared.shapes)
        rows = dataclasses.replace(
            rows,
            signals=prepared.sources(signals),
            row_signals=prepared.row_sources(signals),
            stored=rows.stored if signals else None,
        )
    _limit_to_seen_rows(model, data)
    derivation = derivation_of(prepared.views[0].store) if prepared.derives else None
    distillation = Distillation(model, student, phase.terms, prepared.shapes, derivation)
    if carried is not None:
        carried.give(distillation, phase)
    trainer = StudentTrainer(
        model=distillation,
        args=args,
        rows=rows,
        order=_phase_order(prepared, args, data, number),
        first_step=first_step,
        eval_rows=data.evaluation,
        score=None if data.evaluation is None else _scorer(prepared, data),
        multipliers=phase.multipliers,
    )
    if number:
        # The Trainer has set the seed of the run.
        set_seed(args.seed + number + args.process_index * len(prepared.phases))
    if stage.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(stage.early_stopping_patience))
    if phase.until is not None:
        trainer.add_callback(phase.until.callback(prepared.steps[number]))
    return trainer


def _phase_order(prepared: Preparation, args: TrainingArguments, data: Data, number: int) -> BatchOrder:
    """The order of a phase: it goes on with the epochs after those that earlier ones have begun."""
    orders = [_order(args, data.rows, data.train_in(phase)) for phase in prepared.phases[: number + 1]]
    begun = [math.ceil(steps / order.steps_per_epoch) for steps, order in zip(prepared.steps, orders, strict=False)]
    return dataclasses.replace(orders[number], first_epoch=sum(begun[:number]))


def _order(args: TrainingArguments, rows: Rows, index: np.ndarray) -> BatchOrder:
    lengths = rows.tokens.lengths
    return BatchOrder(
        rows=index,
        lengths=lengths if len(index) == len(lengths) else lengths[index],
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        num_ranks=args.world_size,
        rank=args.process_index,
        seed=args.seed,
    )


def _limit_to_seen_rows(model: PreTrainedModel, data: Data) -> None:
    """Train only those rows of the embedding table that training rows reach."""
    table = model.get_input_embeddings()
    if not isinstance(table, torch.nn.Embedding) or not table.weight.requires_grad:
        return
    if data.rows.masks is not None:
        return  # a masked LM is asked for every word, and its head may be this very table
    seen = data.rows.seen_tokens(data.train, table.num_embeddings)
    if len(seen) <= SEEN_SHARE * table.num_embeddings:
        model.set_input_embeddings(SeenRows(table, seen))


def whole(student: PreTrainedModel) -> PreTrainedModel:
    """The student with its full embedding table again, in evaluation mode on the CPU."""
    table = student.get_input_embeddings()
    if isinstance(table, SeenRows):
        student.set_input_embeddings(table.full())
    student.train(False)
    torch.nn.Module.to(student, "cpu")
    return student


def _scorer(prepared: Preparation, data: Data) -> Any:
    rows, kind, teacher = data.evaluation, prepared.task.kind, data.teacher_logits
    assert rows is not None
    gold, labels = rows.has_gold, rows.labels
    scored, labels_of_scored = gold, labels[gold] if rows.words is None else np.empty(0)
    if rows.words is not None:
        tags = rows.words.tags
        scored, labels_of_scored = np.repeat(gold, tags.lengths), tags.take(np.flatnonzero(gold))

    def score(logits_NC: np.ndarray) -> Metrics:
        found = task_metrics(kind, logits_NC[scored], labels_of_scored, prepared.task.label_names) if gold.any() else {}
        return found if teacher is None else {**found, AGREEMENT: agreement(kind, logits_NC, teacher)}

    return score


@contextlib.contextmanager
def _stopping_at_interrupt(trainer: StudentTrainer) -> Iterator[StopAtSignal]:
    """While it is open, the first Ctrl-C ends training after the current step; a second one ends it at once.

    With several ranks the second one is ignored: torchrun hands on the Ctrl-C that the terminal sent to all of them.
    """
    alone = trainer.args.world_size == 1
    callback = StopAtSignal() if alone else StopAtSignal(trainer.any_rank)
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        callback.stop()
        if alone:
            signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGINT, before)


# --- what came of it ---------------------------------------------------------------------------------------------


def _announcement(prepared: Preparation, data: Data, model: PreTrainedModel) -> str:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    phases = ""
    if len(prepared.phases) > 1:
        listed = zip(prepared.phases, prepared.steps, strict=True)
        phases = f" in {len(prepared.phases)} phases ({', '.join(f'{p.name} {steps}' for p, steps in listed)})"
    return (
        f"{prepared.role} {prepared.stage.student} from {prepared.start}: {sum(prepared.steps)} steps{phases} of "
        f"{prepared.rows_per_step} rows out of {len(data.train)}, {parameters / 1e6:.2f} M trainable parameters, "
        f"method {prepared.method}"
    )


def _phase_facts(
    prepared: Preparation, trainer: StudentTrainer, data: Data, number: int, train_loss: float
) -> dict[str, Any]:
    """What came of a phase, JSON-ready."""
    phase, state, clock, order = prepared.phases[number], trainer.state, trainer.clock, trainer.loader.order
    if not np.isfinite(train_loss):
        raise RefusedError(
            "training diverged: the mean loss is not finite",
            fix="lower --learning-rate, or clip with --max-grad-norm",
        )
    losses = [entry for entry in state.log_history if "loss" in entry]
    return {
        "name": phase.name,
        "method": phase.method,
        "steps": state.global_step,
        "max_steps": prepared.steps[number],
        **({} if trainer.convergence is None else {"converged_at": trainer.convergence.ended}),
        "epochs": round(state.global_step / order.steps_per_epoch, 3),
        "rows": len(data.train_in(phase)),
        "rows_per_step": order.rows_per_step,
        "learning_rate": trainer.args.learning_rate,
        **({"lr_multipliers": list(map(str, phase.multipliers))} if phase.multipliers else {}),
        "trainable": "all" if phase.trainable is None else [part.text for part in phase.trainable],
        "best_step": state.best_global_step or None,
        "train_loss": train_loss,
        "last_losses": {name: value for name, value in losses[-1].items() if name.startswith("loss")} if losses else {},
        "session": {"steps": clock.num_steps, "step_s": clock.step_s, "wait_s": trainer.loader.wait_s},
        "history": list(state.log_history),
    }


def _final_metrics(trainer: StudentTrainer, data: Data) -> Metrics:
    """Of the student as exported: the best checkpoint, where one was picked."""
    if data.evaluation is None:
        return {}
    logits = trainer.predict_logits(data.evaluation)
    assert trainer._score is not None
    return {name: round(value, 6) for name, value in trainer._score(logits).items()}


def _report(
    prepared: Preparation,
    data: Data,
    trainer: StudentTrainer,
    metrics: Metrics,
    start_facts: Any,
    phases: list[dict[str, Any]],
) -> Report:
    stage, last = prepared.stage, phases[-1]
    order = trainer.loader.order
    session = {name: sum(facts["session"][name] for facts in phases) for name in last["session"]}
    busy_s, wait_s = session["step_s"] + session["wait_s"], session["wait_s"]
    info = prepared.corpora[0].info
    return Report(
        role=prepared.role,
        student=stage.student,
        start=str(prepared.start),
        method=prepared.method,
        views={str(view.path): view.fingerprint for view in prepared.views},
        teacher=dict(prepared.teacher.store.identity.teacher),
        task=prepared.task.kind,
        label_names=prepared.task.label_names if prepared.task.kind != "regression" else (),
        columns={name: getattr(info, name) for name in ("text_column", "text_pair_column", "label_column")},
        max_length=prepared.teacher.max_tokens,
        seed=stage.seed,
        num_parameters=sum(p.numel() for p in trainer.student.parameters()),
        evaluated_on=stage.eval_dataset or ("held-out rows of the view" if data.evaluation is not None else None),
        metrics=metrics,
        start_facts=dict(start_facts),
        training={
            "steps": sum(facts["steps"] for facts in phases),
            "max_steps": sum(facts["max_steps"] for facts in phases),
            "epochs": round(sum(facts["epochs"] for facts in phases), 3),
            "rows": len(data.train),
            "rows_with_gold": int(data.rows.has_gold[data.train].sum()),
            "rows_per_step": order.rows_per_step,
            "ranks": order.num_ranks,
            "best_step": last["best_step"],
            "best_metric": prepared.best_metric if data.evaluation is not None else None,
            "train_loss": last["train_loss"],
            "steps_this_session": session["steps"],
            "step_ms": round(1e3 * busy_s / max(session["steps"], 1), 3),
            "rows_per_s": round(session["steps"] * order.rows_per_step / busy_s, 1) if busy_s else 0.0,
            "reader_wait_share": round(wait_s / busy_s, 5) if busy_s else 0.0,
        },
        phases=[
            {name: value for name, value in facts.items() if name not in ("session", "history")} for facts in phases
        ]
        if len(phases) > 1
        else [],
        recipe=_resolved_recipe(prepared, phases) if stage.recipe is not None and not stage.baseline else None,
        arguments=_resolved(prepared, trainer),
        history=_history(phases),
    )


def _history(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, steps counted over all phases."""
    if len(phases) == 1:
        return list(phases[0]["history"])
    entries, done = [], 0
    for facts in phases:
        entries += [{**entry, "phase": facts["name"], "step": entry["step"] + done} for entry in facts["history"]]
        done += facts["steps"]
    return entries


def _unknown_share(tokenizer: PreTrainedTokenizerBase, data: Data) -> float | None:
    """Share of the evaluation rows' tokens that the student's vocabulary does not have."""
    if data.evaluation is None or tokenizer.unk_token_id is None:
        return None
    assert isinstance(data.evaluation.tokens, TokensInMemory)
    return round(float((data.evaluation.tokens.token_ids.values == tokenizer.unk_token_id).mean()), 5)


def _resolved(prepared: Preparation, trainer: StudentTrainer) -> dict[str, Any]:
    """The stage's configuration with everything that was left open filled in; `--config` reads it."""
    stage = prepared.stage
    config = stage.config()
    # What phases may decide for themselves is filled in where they stand: in the recipe beside it.
    of_phases = {*OPTIONS, "num_train_epochs"} if stage.recipe is not None and not stage.baseline else set()
    for name in [name for name, value in config.items() if value is None and hasattr(trainer.args, name)]:
        if name not in of_phases:
            value = getattr(trainer.args, name)
            value = value.value if isinstance(value, Enum) else value
            config[name] = ",".join(value) or "none" if isinstance(value, list) else value
    config["init"] = str(prepared.start)
    if stage.recipe is None:
        config["method"] = [str(term) for term in prepared.terms]
    elif stage.baseline:
        config |= {"recipe": None, "max_steps": sum(prepared.steps)}
    else:
        config["recipe"] = str(Path(stage.output_dir) / RECIPE)
        config |= {"max_steps": None, "num_train_epochs": None}
    return config


def _resolved_recipe(prepared: Preparation, phases: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipe with one entry per phase, its steps and learning rate filled in."""
    entries = []
    for phase, facts in zip(prepared.phases, phases, strict=True):
        config = {name: value for name, value in phase.to_config().items() if name not in ("share", "num_train_epochs")}
        entries.append({**config, "max_steps": facts["max_steps"], "learning_rate": facts["learning_rate"]})
    return {"name": Path(str(prepared.stage.recipe)).stem, "phases": entries}
