"""The Hugging Face `TrainingArguments` that the training commands take, under their own names.

Also what every training stage needs around a `transformers.Trainer`: resuming only what the same configuration left
behind, and progress. Nothing heavy is imported before a method runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipeline.errors import RefusedError, UsageError
from ..pipeline.stage import Progress, Stage, option

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

PANEL = "Training (Hugging Face TrainingArguments names)"
CHECKPOINTS = "checkpoints"
"""Folder under `output_dir` that holds the checkpoints of an unfinished run."""
ADADELTA = "adadelta"
"""An optimiser that transformers has no name for; `optimizers.py` makes it."""
_NOT_ARGUMENTS = {"early_stopping_patience", "resume_from_checkpoint"}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Stage):
    """Base of the stages that train. A field left at None is decided by the stage and printed as resolved."""

    learning_rate: float | None = option(None, help="Peak learning rate.", panel=PANEL)
    num_train_epochs: float | None = option(None, help="Passes over the training rows.", panel=PANEL)
    max_steps: int | None = option(None, help="Optimiser steps in all; overrides --num-train-epochs.", panel=PANEL)
    per_device_train_batch_size: int | None = option(None, help="Rows per device and forward pass.", panel=PANEL)
    per_device_eval_batch_size: int | None = option(
        None, help="Rows per device in evaluation.", identity=False, panel=PANEL
    )
    gradient_accumulation_steps: int | None = option(None, help="Forward passes per optimiser step.", panel=PANEL)
    warmup_steps: float | None = option(
        None, help="Steps of linear warm-up; below 1, their share of all steps.", panel=PANEL
    )
    weight_decay: float | None = option(None, help="Decoupled weight decay.", panel=PANEL)
    max_grad_norm: float | None = option(None, help="Clip the gradient's norm here; 0 never clips.", panel=PANEL)
    lr_scheduler_type: str | None = option(
        None, help="Learning-rate schedule: linear, cosine, constant, constant_with_warmup, ...", panel=PANEL
    )
    optim: str | None = option(
        None, help="Optimiser by its transformers name, such as adamw_torch, or adadelta.", panel=PANEL
    )
    adam_beta1: float | None = option(None, help="Adam's first decay rate.", panel=PANEL)
    adam_beta2: float | None = option(None, help="Adam's second decay rate.", panel=PANEL)
    adam_epsilon: float | None = option(None, help="Adam's epsilon.", panel=PANEL)
    eval_strategy: str | None = option(
        None, help="When to evaluate on --eval-dataset.", panel=PANEL, choices=("no", "steps", "epoch")
    )
    eval_steps: float | None = option(
        None, help="Evaluate every so many steps; below 1, a share of all steps.", panel=PANEL
    )
    save_strategy: str | None = option(
        None, help="When to write a checkpoint.", panel=PANEL, choices=("no", "steps", "epoch", "best")
    )
    save_steps: float | None = option(
        None, help="Write a checkpoint every so many steps; below 1, a share of all steps.", panel=PANEL
    )
    save_total_limit: int | None = option(None, help="Checkpoints to keep.", identity=False, panel=PANEL)
    load_best_model_at_end: bool | None = option(
        None, help="End with the best evaluated checkpoint; on by default with --eval-dataset.", panel=PANEL
    )
    metric_for_best_model: str | None = option(
        None, help="The metric that picks the checkpoint; the task's main metric by default.", panel=PANEL
    )
    early_stopping_patience: int | None = option(
        None, help="Stop after so many evaluations without a better one.", panel=PANEL
    )
    logging_steps: float | None = option(None, help="Log the loss every so many steps.", identity=False, panel=PANEL)
    report_to: str | None = option(
        None, help="Where transformers also logs: tensorboard, wandb, none, ...", identity=False, panel=PANEL
    )
    seed: int = option(42, help="Seed of initialisation, order and dropout.", panel=PANEL)
    bf16: bool | None = option(None, help="bfloat16 autocast.", panel=PANEL)
    fp16: bool | None = option(None, help="float16 autocast (GPU).", panel=PANEL)
    use_cpu: bool = option(False, help="Train on the CPU even where a GPU is there.", identity=False, panel=PANEL)
    dataloader_num_workers: int | None = option(
        None, help="Processes that load batches; 0 loads in the main one.", identity=False, panel=PANEL
    )
    torch_compile: bool | None = option(
        None, help="torch.compile the model (half a minute, needs a C++ compiler).", panel=PANEL
    )
    resume_from_checkpoint: str | None = option(
        None, help="Start from this checkpoint folder; an interrupted run resumes by itself.", panel=PANEL
    )

    def check_training_options(self, *, has_eval: bool) -> None:
        """Refuse values that cannot work, before anything loads. Call it from `inputs`.

        Args:
            has_eval: whether there are rows to evaluate on.

        Raises:
            UsageError: naming the option and its value.
        """
        positive = (
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_steps",
            "save_steps",
            "logging_steps",
            "save_total_limit",
            "early_stopping_patience",
            "adam_epsilon",
        )
        for name in positive:
            self._require(name, lambda value: value > 0, "above 0")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers"):
            self._require(name, lambda value: value >= 0, "0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(name, lambda value: 0 <= value < 1, "from 0 to below 1")
        if self.bf16 and self.fp16:
            raise UsageError("--bf16 and --fp16 exclude each other", fix="give one of them")
        if self.resume_from_checkpoint is not None and not _is_complete(Path(self.resume_from_checkpoint)):
            there = Path(self.resume_from_checkpoint).is_dir()
            raise RefusedError(
                f"--resume-from-checkpoint {self.resume_from_checkpoint}: "
                + ("not a complete checkpoint of a training" if there else "no such folder"),
                fix=f"give a folder {CHECKPOINTS}/checkpoint-N of the run",
            )
        if has_eval:
            return
        for name in (
            "eval_strategy",
            "eval_steps",
            "load_best_model_at_end",
            "metric_for_best_model",
            "early_stopping_patience",
        ):
            value = getattr(self, name)
            if value not in (None, False, "no"):
                raise UsageError(
                    f"{_flag(name)} {value} needs rows to evaluate on, and no --eval-dataset is given",
                    fix=f"add --eval-dataset, or leave {_flag(name)} out",
                )

    def _require(self, name: str, holds: Any, expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise UsageError(f"{_flag(name)} is {value}; expected a number {expected}")

    def training_arguments(self, *, output_dir: Path | str, has_eval: bool, **defaults: Any) -> TrainingArguments:
        """`TrainingArguments` from what the user gave, else the stage's `defaults`, else those below.

        With rows to evaluate on, a run is evaluated and saved ten times and ends with the best of these; without,
        it is saved ten times so that it can resume.

        Args:
            output_dir: where checkpoints go.
            has_eval: whether there are rows to evaluate on.
            defaults: any `TrainingArguments` by name, for what the user left open.

        Raises:
            UsageError: transformers refuses a value or a combination.
        """
        import torch
        from transformers import TrainingArguments
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(TrainingOptions)
            if f.name not in _NOT_ARGUMENTS and getattr(self, f.name) is not None
        }
        use_cpu = self.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        values: dict[str, Any] = {
            "disable_tqdm": True,
            "report_to": "none",
            "logging_steps": 0.02,
            "save_strategy": "steps",
            "save_steps": 0.1,
            "save_total_limit": 1,
            "dataloader_pin_memory": not use_cpu,
            # Without it a resumed run forgets how many evaluations early stopping has waited.
            "restore_callback_states_from_checkpoint": True,
            **defaults,
            **given,
            "use_cpu": use_cpu,
        }
        if has_eval:
            values.setdefault("eval_strategy", "steps")
            if values["eval_strategy"] == "steps":
                # A checkpoint is picked among evaluations, so each must be of an evaluated step.
                values.setdefault("eval_steps", given.get("save_steps", 0.1))
            values.setdefault("load_best_model_at_end", values["eval_strategy"] != "no")
            if values["load_best_model_at_end"] and "save_strategy" not in given:
                # transformers can only go back to an evaluation that was also saved.
                values["save_strategy"] = values["eval_strategy"]
                values["save_steps"] = given.get("save_steps", values.get("eval_steps", values["save_steps"]))
        if values.get("max_steps", -1) > 0:
            values.setdefault("num_train_epochs", 1.0)
        named = values.pop("optim", None)
        if named not in (None, ADADELTA):
            values["optim"] = named
        try:
            arguments = TrainingArguments(output_dir=str(output_dir), **values)
            # Refused here, and not after the model has been loaded.
            for reporter in get_reporting_integration_callbacks(arguments.report_to):  # type: ignore[no-untyped-call]
                reporter()
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"transformers refuses the training arguments: {error}") from None
        if named == ADADELTA:
            # It would be refused as an argument; whoever trains makes it by this name.
            arguments.optim = named
        return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resumable_checkpoint(stage: TrainingOptions, output_dir: Path | str) -> Path | None:
    """Where training starts: the checkpoint that was asked for, else the newest complete one left in `output_dir`.

    None starts afresh. What lies in `output_dir` is of this very configuration: `execute` sees to that.
    """
    if stage.resume_from_checkpoint is not None:
        return Path(stage.resume_from_checkpoint)
    return newest_checkpoint(Path(output_dir) / CHECKPOINTS)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint in a folder that has the most steps, or None."""
    complete = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    # trainer_state.json is the last file that transformers writes into a checkpoint.
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"]) > 0
    return False


def attach_progress(trainer: Trainer, progress: Progress, name: str = "training") -> None:
    """Report a `Trainer`'s steps, loss and evaluations to `progress` and keep transformers off stdout."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress_callback(progress, name))


def _progress_callback(progress: Progress, name: str) -> TrainerCallback:
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):
        task: Any = None
        reported = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                self.reported = state.global_step
                if state.global_step:
                    progress.info(f"{name}: resumed at step {state.global_step} of {state.max_steps}")
                self.task = progress.task(name, total=state.max_steps, unit="steps", initial=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.task is not None:
                self.task.advance(state.global_step - self.reported)
                self.reported = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.task is not None and logs and "loss" in logs:
                self.task.advance(0, loss=float(logs["loss"]))

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            if self.task is not None and metrics:
                shown = {
                    key.removeprefix("eval_"): round(float(value), 4)
                    for key, value in metrics.items()
                    if isinstance(value, float | int) and not key.endswith(("_runtime", "_per_second", "epoch"))
                }
                text = " ".join(f"{key}={value}" for key, value in shown.items())
                progress.info(f"{name}: step {state.global_step}: {text}", global_step=state.global_step, **shown)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.task is not None:
                self.task.done()

    return ProgressCallback()
