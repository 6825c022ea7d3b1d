"""Fine-tuning an encoder into a teacher: defaults that follow the number of labels, a fitted head, the Trainer.

Dimension key: N labelled rows, C classes, T tokens, H features that the last linear layer reads.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    SchedulerType,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from ..pipeline.artifact import atomic_write_bytes
from ..pipeline.errors import RefusedError
from ..pipeline.ragged import Ragged
from ..pipeline.stage import StageContext, StageResult
from .evaluate import with_gold
from .metrics import LOWER_IS_BETTER, check_metric, main_metric, task_metrics
from .optimizers import OptimizerTrainer
from .predict import load_predictor, longest_input
from .shuffled_batches import length_grouped_batches
from .teacher_head import HEAD_ROWS, start_head
from .text_rows import NOT_SCORED, TextRows
from .training_options import CHECKPOINTS, attach_progress, resumable_checkpoint

if TYPE_CHECKING:
    from .corpus import Corpus, CorpusInfo
    from .train_teacher import TrainTeacher

PROBLEM_TYPE = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
START = f"{CHECKPOINTS}/start.json"
"""What the head started from: a resumed run must not decide it again."""
LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks)\.(\d+)\.")


def train_teacher(stage: TrainTeacher, context: StageContext) -> StageResult:
    """Train as the stage says and write the teacher into its `output_dir`."""
    output_dir = Path(stage.output_dir)
    train = stage.training_corpus()
    info = train.info
    evaluation = stage.evaluation_corpus(train) if stage.eval_dataset is not None else None
    labels = gold(train)
    _warn_of_absent_classes(train, context)

    set_seed(stage.seed)
    source = stage.model_source()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model, has_trained_head = load_encoder(source, info.task, info.label_names)
    max_length = stage.max_length or min(DEFAULT_LENGTH, longest_input(model.config, tokenizer))
    rows = TextRows(tokenizer, *train.texts(), labels, info.task, max_length)
    freeze_embeddings = stage.freeze_embeddings if stage.freeze_embeddings is not None else len(rows) < FEW_ROWS
    freeze(model, embeddings=freeze_embeddings, encoder=stage.freeze_encoder)
    checkpoint = resumable_checkpoint(stage, output_dir)
    with_bf16 = stage.bf16 if stage.bf16 is not None else not stage.fp16 and has_fast_bf16(stage.use_cpu)

    def transfer_rows() -> TextRows:
        texts = stage.transfer_texts(HEAD_ROWS)
        return TextRows(tokenizer, *texts.texts(), np.zeros(len(texts)), info.task, max_length)

    started = output_dir / START
    if checkpoint is not None and started.exists():
        head = json.loads(started.read_bytes())["head"]
    elif has_trained_head and stage.head in ("auto", "random"):
        head = "kept"
        if stage.head == "random":
            context.progress.warn("--head random: the checkpoint's head was trained for these very labels, and is kept")
    elif stage.head == "random" or info.task == "token":
        head = "random"
    else:
        wanted = stage.head
        if wanted == "auto" and (len(rows) >= FEW_ROWS or stage.freeze_encoder):
            wanted = "fitted"
        model.to("cuda" if torch.cuda.is_available() and not stage.use_cpu else "cpu")  # type: ignore[arg-type]
        head = start_head(
            model,
            rows,
            info.task,
            transfer_rows,
            head=wanted,
            learning_rate=2 * encoder_rate(model.config.hidden_size),
            bf16=with_bf16,
            seed=stage.seed,
            progress=context.progress,
        )
    atomic_write_bytes(started, json.dumps({"head": head}).encode())
    held_out = None
    if evaluation is not None:
        held_out = TextRows(tokenizer, *evaluation.texts(), gold(evaluation), info.task, max_length)

    defaults = default_arguments(len(rows), model.config.hidden_size, aligned=head == "aligned")
    names = info.label_names
    metric = check_metric(stage.metric_for_best_model or main_metric(info.task, names), info.task, len(names), names)
    arguments = stage.training_arguments(
        output_dir=output_dir / CHECKPOINTS,
        has_eval=held_out is not None,
        metric_for_best_model=metric,
        greater_is_better=metric not in LOWER_IS_BETTER,
        remove_unused_columns=False,
        label_names=["labels"],
        bf16=with_bf16,
        **defaults,
    )
    head_learning_rate = stage.head_learning_rate or HEAD_FACTOR * arguments.learning_rate
    resolved = {
        "learning_rate": arguments.learning_rate,
        "head_learning_rate": head_learning_rate,
        "num_train_epochs": arguments.num_train_epochs,
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "warmup_steps": arguments.warmup_steps,
        "weight_decay": arguments.weight_decay,
        "lr_scheduler_type": SchedulerType(arguments.lr_scheduler_type).value,
        "bf16": arguments.bf16,
        "freeze_embeddings": freeze_embeddings,
        "head": head,
    }
    context.progress.info(
        f"train-teacher: {len(rows)} labelled rows; " + ", ".join(f"{k}={_short(v)}" for k, v in resolved.items()),
        **resolved,
    )

    trainer = TeacherTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=rows.collate,
        processing_class=tokenizer,
        compute_metrics=lambda found: scores(found.predictions, found.label_ids, info),
        callbacks=[EarlyStoppingCallback(stage.early_stopping_patience)] if stage.early_stopping_patience else None,
        head_learning_rate=head_learning_rate,
        layer_decay=stage.layer_learning_rate_decay or 1.0,
    )
    attach_progress(trainer, context.progress)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise RefusedError(
            f"training diverged: weights are not finite after {trainer.state.global_step} steps",
            fix=f"give a --learning-rate below {arguments.learning_rate:g}",
        )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)

    metrics: dict[str, float] = {}
    if evaluation is not None:
        # Scored as `kd evaluate` does, from the saved folder and in float32.
        saved = load_predictor(output_dir, device=str(arguments.device), max_length=max_length, finished=False)
        logits_NC = saved.predict(*evaluation.texts(), progress=context.progress)
        metrics = task_metrics(info.task, *with_gold(evaluation, logits_NC), names)
    state = trainer.state
    figures = {
        "rows": len(rows),
        "task": info.task,
        "classes": len(info.label_names),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "train_loss": _last_loss(state.log_history),
        "eval_rows": None if evaluation is None else len(evaluation),
        "metrics": metrics,
    }
    atomic_write_bytes(
        output_dir / "metrics.json",
        json.dumps({**figures, "training": resolved, "history": state.log_history}, indent=2).encode(),
    )
    card = model_card(stage, train, figures, resolved)
    atomic_write_bytes(output_dir / "README.md", card.encode())
    shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)
    content = {
        "task": info.task,
        "label_names": list(info.label_names),
        "columns": {
            "text_column": info.text_column,
            "text_pair_column": info.text_pair_column,
            "label_column": info.label_column,
        },
        "max_length": max_length,
        "seed": stage.seed,
        "steps": state.global_step,
        "labelled_rows": len(rows),
        "labels_per_class": stage.labels_per_class,
        "labels_total": stage.labels_total,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "metrics": metrics,
        "training": resolved,
    }
    return StageResult(summary={**figures, "training": resolved}, content=content)


# --- defaults ----------------------------------------------------------------------------------------------------

DEFAULT_LENGTH = 128
"""Tokens an input is cut to."""
FEW_ROWS = 5_000
"""Below this many labelled rows the word table stays as it is: most words occur in no labelled row."""
HEAD_FACTOR = 10.0
"""Learning rate of the head over that of the encoder."""


def default_arguments(num_rows: int, hidden_size: int, *, aligned: bool) -> dict[str, Any]:
    """`TrainingArguments` for a set of this size and an encoder of this width.

    Few rows need many passes; many rows need two. An aligned encoder starts close to where it ends: two thirds of the
    passes at half the rate.
    """
    batch_size = 16 if num_rows < FEW_ROWS else 32
    steps_per_epoch = math.ceil(num_rows / batch_size)
    epochs = min(max(12.0 * (1000.0 / num_rows) ** 0.45, 2.0), 12.0)
    epochs = max(epochs, min(300 / steps_per_epoch, 100.0))
    return {
        "num_train_epochs": float(round(epochs * (2 / 3 if aligned else 1))),
        "learning_rate": encoder_rate(hidden_size) * (0.5 if aligned else 1),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
    }


def encoder_rate(hidden_size: int) -> float:
    """Peak learning rate of an encoder of this width: narrow ones take a higher one (1e-4 for 384, 2.5e-5 for 768)."""
    return min(2.5e-5 * (768 / hidden_size) ** 2, 5e-4)


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether bfloat16 arithmetic is native where training will run: three times as fast as float32."""
    if torch.cuda.is_available() and not use_cpu:
        return bool(torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available() and not use_cpu:
        return False
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# --- model and data ----------------------------------------------------------------------------------------------


def load_encoder(source: str, task: str, label_names: Sequence[str]) -> tuple[PreTrainedModel, bool]:
    """A classifier over the checkpoint's encoder, and whether its head was trained for these very labels.

    Raises:
        RefusedError: the checkpoint lacks tensors of the encoder itself.
    """
    names = list(label_names) if task != "regression" else ["score"]
    auto = AutoModelForTokenClassification if task == "token" else AutoModelForSequenceClassification
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        model, report = auto.from_pretrained(
            source,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            **({} if task == "token" else {"problem_type": PROBLEM_TYPE[task]}),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"model {source} cannot be opened as a classifier", details=[str(error).splitlines()[0][:300]]
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    prefix = model.base_model_prefix + "."
    inside = sorted(name for name in missing if name.startswith(prefix) and "pooler" not in name)
    if inside:
        raise RefusedError(
            f"model {source} lacks {len(inside)} tensors of its encoder, which would be random",
            details=inside[:8],
            fix="give a pretrained checkpoint",
        )
    return model, not missing and _names_in(source) == names


def _names_in(source: str) -> list[str]:
    from transformers import AutoConfig

    names = {
        int(index): str(name)
        for index, name in AutoConfig.from_pretrained(source, trust_remote_code=False).id2label.items()
    }
    return [names[index] for index in sorted(names)]


def freeze(model: PreTrainedModel, *, embeddings: bool, encoder: bool) -> None:
    """Keep the table of word embeddings, or everything below the head, as it is."""
    if encoder:
        for name, parameter in model.base_model.named_parameters():
            parameter.requires_grad_("pooler" in name)
    if embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)


def gold(corpus: Corpus) -> np.ndarray | Ragged:
    """The gold labels of a corpus, as `TextRows` takes them."""
    return corpus.tags()[0] if corpus.info.task == "token" else corpus.labels()[0]


def scores(logits: np.ndarray, labels: np.ndarray, info: CorpusInfo) -> dict[str, float]:
    """`task_metrics` of what a `Trainer` predicted.

    Args:
        logits: [N, C]; [N, T, C] of a token task.
        labels: [N] or [N, C]; [N, T] of a token task, `NOT_SCORED` where no word begins.
        info: what the labels mean.
    """
    if info.task != "token":
        return task_metrics(info.task, logits, labels)
    is_first_NT = labels != NOT_SCORED
    tags = Ragged.from_lengths(labels[is_first_NT], is_first_NT.sum(axis=1))
    return task_metrics(info.task, logits[is_first_NT], tags, info.label_names)


def _warn_of_absent_classes(train: Corpus, context: StageContext) -> None:
    if train.info.task not in ("single-label", "token"):
        return
    seen = Counter(train.tags()[0].values.tolist() if train.info.task == "token" else train.labels()[0].tolist())
    where = "word" if train.info.task == "token" else "row"
    absent = [name for index, name in enumerate(train.info.label_names) if not seen[index]]
    if absent:
        context.progress.warn(
            f"{len(absent)} of {len(train.info.label_names)} classes have no labelled {where} and will not be learned: "
            + ", ".join(absent[:5])
        )


# --- the Trainer -------------------------------------------------------------------------------------------------


class LengthGroupedSampler(Sampler[int]):
    """The rows of `length_grouped_batches`; the Trainer says which epoch it is, so a resumed run reads the same."""

    def __init__(self, lengths: np.ndarray, *, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader at the start of each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        for batch in length_grouped_batches(
            self._lengths, batch_size=self._batch_size, seed=self._seed, epoch=self._epoch
        ):
            yield from batch.tolist()


class TeacherTrainer(OptimizerTrainer):
    """`Trainer` with length-grouped batches and a learning rate per depth."""

    def __init__(self, *, head_learning_rate: float, layer_decay: float, **kwargs: Any) -> None:
        self._head_learning_rate = head_learning_rate
        self._layer_decay = layer_decay
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.train_dataset
        assert isinstance(rows, TextRows)
        return LengthGroupedSampler(rows.lengths, batch_size=self._train_batch_size, seed=self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimiser with one group per learning rate and weight decay."""
        if self.optimizer is None:
            assert isinstance(self.model, PreTrainedModel)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, rate in learning_rates(
                self.model,
                rate=self.args.learning_rate,
                head_rate=self._head_learning_rate,
                layer_decay=self._layer_decay,
            ).items():
                key = (rate, self.args.weight_decay if name in decayed else 0.0)
                groups.setdefault(key, []).append(self.model.get_parameter(name))
            optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
                **keywords,
            )
        return self.optimizer


def learning_rates(model: PreTrainedModel, *, rate: float, head_rate: float, layer_decay: float) -> dict[str, float]:
    """Learning rate per trainable parameter: the head's (pooler included), then falling layer by layer.

    The top layer has `rate`; each layer below has `layer_decay` times the one above, the embeddings come last.
    """
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    layers = [int(found[1]) for name, _ in model.named_parameters() if (found := LAYER.search("." + name))]
    num_layers = max(layers, default=-1) + 1
    rates = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = LAYER.search("." + name)
        if id(parameter) not in inside or "pooler" in name:
            rates[name] = head_rate
        elif found:
            rates[name] = rate * layer_decay ** (num_layers - 1 - int(found[1]))
        elif "embed" in name:
            rates[name] = rate * layer_decay**num_layers
        else:  # a last norm above the layers
            rates[name] = rate
    return rates


# --- what is written ---------------------------------------------------------------------------------------------


def model_card(stage: TrainTeacher, train: Corpus, figures: Mapping[str, Any], resolved: Mapping[str, Any]) -> str:
    """README.md of the teacher: metadata that the hub reads, then figures for people."""
    import yaml

    base = "sentence-transformers/all-MiniLM-L6-v2" if stage.model == "minilm" else stage.model
    local = Path(stage.model).expanduser().exists()
    data = Path(stage.corpus or stage.dataset or "").name
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "token-classification" if train.info.task == "token" else "text-classification",
        "tags": ["knowledge-distillation", "kd-teacher"],
        **({} if local else {"base_model": base}),
    }
    names = train.info.label_names
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# Teacher: {Path(base).name if local else base} fine-tuned on {data}",
        "",
        f"Made by `kd train-teacher` from {figures['rows']} labelled rows. Task: {train.info.task}"
        + (f", {len(names)} classes." if names else "."),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in figures["metrics"].items()),
        "",
        "Training: " + ", ".join(f"{name} {_short(value)}" for name, value in resolved.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _last_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    return next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
