"""Running one training: rows, student, budget, `Trainer`, export."""

from __future__ import annotations

import contextlib
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

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import Ragged
from ...pipeline.stage import StageContext, StageResult
from ..cache_teacher.tokenize import encode
from ..corpus.corpus import Corpus
from ..metrics import agreement, task_metrics
from ..training_options import CHECKPOINTS, attach_progress, resumable_checkpoint
from .export import Report, export_run
from .methods.hard import Hard
from .order import BatchOrder
from .preparation import AGREEMENT, Preparation
from .ranks import TrainingRanks
from .rows import Rows, StoredTokens, StoreRows, TokensInMemory, TokenSource
from .seen_rows import SeenRows
from .trainer import Distillation, Metrics, StopAtSignal, StudentTrainer

SEEN_SHARE = 0.8
"""A table of which training sees more than this share of the rows is trained whole."""


@dataclass(frozen=True)
class Data:
    """Rows to train and to evaluate on.

    Attributes:
        rows: all rows of the views.
        train: ints, rising: those that are trained on.
        transfer: ints, rising: those that a distilled run of the same view trains on: they set the budget.
        evaluation: rows to evaluate on, or None.
        teacher_logits: float32 [E, C] of the evaluation rows, or None where the teacher may not judge.
    """

    rows: Rows
    train: np.ndarray
    transfer: np.ndarray
    evaluation: Rows | None
    teacher_logits: np.ndarray | None


def train_student(prepared: Preparation, context: StageContext, ranks: TrainingRanks | None = None) -> StageResult:
    """Train as prepared, and write the run folder.

    Args:
        ranks: the processes that train together; None is this one alone. All of them call this, rank 0 writes.

    Raises:
        RefusedError: training diverged, a resumed checkpoint is of another configuration, or this rank reads other
            files than rank 0.
        KeyboardInterrupt: interrupted; a checkpoint of the last finished step was written.
    """
    stage = prepared.stage
    checkpoint = resumable_checkpoint(stage, stage.output_dir)
    if ranks is not None:
        ranks.require_alike({"inputs": prepared.fingerprints, "checkpoint": str(checkpoint)})
    started = time.perf_counter()
    tokenizer = prepared.student.make_tokenizer(prepared.teacher, lambda: _texts(prepared))
    set_seed(stage.seed)
    build = prepared.student.build(prepared.start, prepared.teacher, prepared.task, tokenizer)
    data = make_data(prepared, tokenizer, build.model)
    trainer = make_trainer(prepared, build.model, data, checkpoint)
    context.progress.estimate(_announcement(prepared, data, trainer), steps=trainer.args.max_steps)
    attach_progress(trainer, context.progress, "training")

    with _stopping_at_interrupt(trainer) as interrupt:
        trainer.add_callback(interrupt)
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    metrics = _final_metrics(trainer, data)
    student = whole(trainer.student)
    report = _report(prepared, data, trainer, metrics, build.start, float(result.training_loss))
    report.training["unknown_tokens"] = _unknown_share(tokenizer, data)
    report.training["seconds"] = round(time.perf_counter() - started, 3)
    if trainer.is_world_process_zero():
        export_run(stage.output_dir, student, tokenizer, report)
    return StageResult(summary=report.summary(), content=report.content())


# --- data --------------------------------------------------------------------------------------------------------


def make_data(prepared: Preparation, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Data:
    """The rows of a run, read from the views; nothing is gathered yet."""
    views = prepared.views
    stored = StoreRows([view.reader for view in views], [view.rows for view in views])
    if prepared.student.reads_teacher_tokens(prepared.teacher):
        tokens: TokenSource = StoredTokens(stored)
    else:
        tokens = _tokenized(tokenizer, prepared.corpora, prepared)
    with_segments = prepared.task.pair and _takes_segments(model, tokenizer)
    rows = Rows(
        tokens=tokens,
        labels=prepared.labels,
        has_gold=prepared.has_gold,
        pad_token_id=tokenizer.pad_token_id or 0,
        with_segments=with_segments,
        stored=stored if prepared.signals else None,
        signals=prepared.signals,
    )
    is_transfer = ~prepared.held_out
    # Gold labels are all that such a run learns from: rows without one would only make its batches smaller.
    gold_alone = all(isinstance(term.method, Hard) for term in prepared.terms)
    is_train = is_transfer & prepared.has_gold if gold_alone else is_transfer
    evaluation, teacher_logits = _evaluation(prepared, tokenizer, rows, stored)
    transfer = _numbers(is_transfer)
    return Data(rows, _numbers(is_train) if gold_alone else transfer, transfer, evaluation, teacher_logits)


def _numbers(chosen_N: np.ndarray) -> np.ndarray:
    """Where it is True, in half the memory of int64 wherever that holds them."""
    return np.flatnonzero(chosen_N).astype(np.int32 if len(chosen_N) < 1 << 31 else np.int64)


def _evaluation(
    prepared: Preparation, tokenizer: PreTrainedTokenizerBase, rows: Rows, stored: StoreRows
) -> tuple[Rows | None, np.ndarray | None]:
    if prepared.eval_corpus is not None:
        tokens = _tokenized(tokenizer, [prepared.eval_corpus], prepared)
        labels, has_gold = prepared.eval_corpus.labels()
        return Rows(tokens, labels, has_gold, rows.pad_token_id, rows.with_segments), None
    held_out = np.flatnonzero(prepared.held_out & prepared.is_original)
    if not len(held_out):
        return None, None
    logits = None
    if prepared.role == "distilled" and all(view.reader.has("logits", view.rows).all() for view in prepared.views):
        from .methods.soft_target import LOGITS

        logits = stored.gather(LOGITS, held_out).astype(np.float32)
    tokens = _subset(rows.tokens, held_out)
    return Rows(tokens, rows.labels[held_out], rows.has_gold[held_out], rows.pad_token_id, rows.with_segments), logits


def _subset(tokens: TokenSource, index: np.ndarray) -> TokensInMemory:
    ids, lengths, segments = tokens.gather(index, segments=True)
    assert segments is not None
    return TokensInMemory(Ragged.from_padded(ids, lengths), Ragged.from_padded(segments, lengths))


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, corpora: tuple[Corpus, ...] | list[Corpus], prepared: Preparation
) -> TokensInMemory:
    """The corpora in the student's tokens, cut where the teacher's input was cut."""
    longest = min(prepared.teacher.max_tokens, tokenizer.model_max_length)
    parts = [encode(tokenizer, *corpus.texts(), longest) for corpus in corpora]
    return TokensInMemory(
        Ragged.concatenate([ids for ids, _ in parts]), Ragged.concatenate([segments for _, segments in parts])
    )


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
    prepared: Preparation, model: PreTrainedModel, data: Data, checkpoint: Path | None = None
) -> StudentTrainer:
    """The `Trainer` of a run, its number of steps settled.

    The budget is that of the distilled run: a baseline, which has fewer rows, passes over them more often.
    """
    stage, student = prepared.stage, prepared.student
    has_eval = data.evaluation is not None
    selection = (
        {"metric_for_best_model": prepared.best_metric, "greater_is_better": prepared.best_is_greatest}
        if has_eval
        else {}
    )
    args = stage.training_arguments(
        output_dir=Path(stage.output_dir) / CHECKPOINTS,
        has_eval=has_eval,
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
    order, transfer = (_order(args, data.rows, index) for index in (data.train, data.transfer))
    if args.max_steps <= 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * transfer.steps_per_epoch))
    first_step = 0
    if checkpoint is not None:
        first_step = int(json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"])

    _limit_to_seen_rows(model, data)
    distillation = Distillation(model, student, prepared.terms, prepared.shapes)
    trainer = StudentTrainer(
        model=distillation,
        args=args,
        rows=data.rows,
        order=order,
        first_step=first_step,
        eval_rows=data.evaluation,
        score=None if data.evaluation is None else _scorer(prepared, data),
    )
    if stage.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(stage.early_stopping_patience))
    return trainer


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

    def score(logits_NC: np.ndarray) -> Metrics:
        gold = rows.has_gold
        found = task_metrics(kind, logits_NC[gold], rows.labels[gold]) if gold.any() else {}
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


def _announcement(prepared: Preparation, data: Data, trainer: StudentTrainer) -> str:
    parameters = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    return (
        f"{prepared.role} {prepared.stage.student} from {prepared.start}: {trainer.args.max_steps} steps of "
        f"{trainer.loader.order.rows_per_step} rows out of {len(data.train)}, {parameters / 1e6:.2f} M trainable "
        f"parameters, method {prepared.method}"
    )


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
    train_loss: float,
) -> Report:
    stage, state, order = prepared.stage, trainer.state, trainer.loader.order
    clock, wait_s = trainer.clock, trainer.loader.wait_s
    busy_s = clock.step_s + wait_s
    if not np.isfinite(train_loss):
        raise RefusedError(
            "training diverged: the mean loss is not finite",
            fix="lower --learning-rate, or clip with --max-grad-norm",
        )
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
            "steps": state.global_step,
            "max_steps": state.max_steps,
            "epochs": round(state.global_step / order.steps_per_epoch, 3),
            "rows": len(data.train),
            "rows_with_gold": int(data.rows.has_gold[data.train].sum()),
            "rows_per_step": order.rows_per_step,
            "ranks": order.num_ranks,
            "best_step": state.best_global_step or None,
            "best_metric": prepared.best_metric if data.evaluation is not None else None,
            "train_loss": train_loss,
            "steps_this_session": clock.num_steps,
            "step_ms": round(1e3 * busy_s / max(clock.num_steps, 1), 3),
            "rows_per_s": round(clock.num_steps * order.rows_per_step / busy_s, 1) if busy_s else 0.0,
            "reader_wait_share": round(wait_s / busy_s, 5) if busy_s else 0.0,
        },
        arguments=_resolved(prepared, trainer),
        history=list(state.log_history),
    )


def _unknown_share(tokenizer: PreTrainedTokenizerBase, data: Data) -> float | None:
    """Share of the evaluation rows' tokens that the student's vocabulary does not have."""
    if data.evaluation is None or tokenizer.unk_token_id is None:
        return None
    assert isinstance(data.evaluation.tokens, TokensInMemory)
    return round(float((data.evaluation.tokens.token_ids.values == tokenizer.unk_token_id).mean()), 5)


def _resolved(prepared: Preparation, trainer: StudentTrainer) -> dict[str, Any]:
    """The stage's configuration with everything that was left open filled in; `--config` reads it."""
    config = prepared.stage.config()
    for name in [name for name, value in config.items() if value is None and hasattr(trainer.args, name)]:
        value = getattr(trainer.args, name)
        value = value.value if isinstance(value, Enum) else value
        config[name] = ",".join(value) or "none" if isinstance(value, list) else value
    return {**config, "init": str(prepared.start), "method": [str(term) for term in prepared.terms]}
