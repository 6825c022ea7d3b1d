"""Training a student on Hugging Face's `Trainer`: the weighted loss, batches by step number, evaluation on whole sets.

Dimension key: B rows of a batch, T padded length, N rows, C classes or labels, M slots of a row for masked tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from ...pipeline.errors import RefusedError
from ...pipeline.ragged import ranges
from ..derivation import Derivation, taken_at, with_last_hidden_state
from ..optimizers import OptimizerTrainer
from .attention_watch import AttentionWatch, watch_attention
from .convergence import ConvergenceCallback
from .loader import BatchLoader, gather_ahead
from .methods.base import Shapes, Targets, Term
from .multipliers import FACTOR, Multiplier, regrouped
from .negatives import NegativeRows
from .order import BatchOrder
from .rows import Batch, Rows
from .students.base import Student

Metrics = dict[str, float]


class Distillation(nn.Module):
    """A student, the projections of its methods, and the weighted sum of their losses.

    Checkpoints hold all of it; the export is `student` alone.

    Args:
        student: the model.
        family: knows which of its outputs methods may watch.
        terms: methods and their weights.
        shapes: of both models.
        derivation: of signals that the batches do not hold; None where they hold all.

    Attributes:
        seed, epoch: of the run and the step, set by the trainer: what methods draw from. Epochs go on from phase to
            phase.
    """

    # Otherwise the Trainer takes the loss for a sum over tokens and does not divide it by the accumulated passes.
    accepts_loss_kwargs = False

    def __init__(
        self,
        student: PreTrainedModel,
        family: Student,
        terms: Sequence[Term],
        shapes: Shapes,
        derivation: Derivation | None = None,
    ) -> None:
        super().__init__()
        self._derivation = derivation
        self.student = student
        self.projections = nn.ModuleList(term.method.projections(shapes) for term in terms)
        self._family, self._terms, self._shapes = family, tuple(terms), shapes
        reads = {name.partition("@")[0] for term in terms for name in term.method.reads(shapes)}
        self._hidden = {"output_hidden_states": True} if reads & {"token", "sentence", "mean"} else {}
        self._attention: AttentionWatch | None = None
        if reads & {"score", "qkv"}:
            self._attention = watch_attention(
                student, heads=shapes.student_heads, width=shapes.attention_width, described=family.name
            )
        self.num_negatives = max((term.method.num_negatives(shapes) for term in terms), default=0)
        self.seed, self.epoch = 0, 0

    def set_terms(self, terms: Sequence[Term]) -> None:
        """Other weights, or other values of options that change no shape, for the same methods."""
        self._terms = tuple(terms)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        has_gold: Tensor,
        signals: Mapping[str, Tensor] | None = None,
        negatives: Mapping[str, Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """`loss` (scalar, weighted sum) and `terms` (scalars by name, each without its weight), for one batch.

        Args are what `Rows.batch` gives, and the signals of other rows.
        """
        of_words = self._shapes.task == "token"
        with self._attention or contextlib.nullcontext(), _head_at(self.student, None if of_words else positions):
            output = self.student(**inputs, **self._hidden)
        outputs = self._family.watch(output, inputs["attention_mask"].bool())
        if positions is not None:
            # A head on words is small: it is computed at every token, and read where words begin.
            logits = taken_at(outputs.logits_BC, positions) if of_words else outputs.logits_BC[0]
            outputs = dataclasses.replace(outputs, logits_BC=logits, positions_BM=positions)
        if self._attention is not None:
            outputs = dataclasses.replace(outputs, heads=self._attention.heads())
        signals, negatives = signals or {}, negatives or {}
        if self._derivation is not None:
            signals, negatives = self._derivation.of(signals), self._derivation.of(negatives)
        targets = Targets(signals, labels, has_gold, negatives, self.seed, self.epoch)
        terms: dict[str, Tensor] = {}
        loss = outputs.logits_BC.new_zeros((), dtype=torch.float32)
        # Losses are differences of numbers that are nearly equal: what the student computes in bfloat16 they do not.
        with torch.autocast(outputs.logits_BC.device.type, enabled=False):
            for number, (term, projections) in enumerate(zip(self._terms, self.projections, strict=True)):
                assert isinstance(projections, nn.ModuleDict)
                for name, value in term.method.loss(outputs, targets, projections, self._shapes).items():
                    loss = loss + term.weight * value
                    terms[name if name not in terms else f"{name}#{number + 1}"] = value.detach()
        return {"loss": loss, "terms": terms}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Each tensor once: what is tied, as a masked-LM head to the word table, stands under its first name."""
        found = super().state_dict(*args, **kwargs)
        for name in tied_names(self):
            found.pop(kwargs.get("prefix", "") + name, None)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `state_dict` gives it."""
        tied = {name: state_dict[first] for name, first in tied_names(self).items() if first in state_dict}
        return super().load_state_dict({**tied, **state_dict}, *args, **kwargs)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several → the first one."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


@contextlib.contextmanager
def _head_at(student: PreTrainedModel, positions_BM: Tensor | None) -> Iterator[None]:
    """Inside, a masked LM computes its head at some tokens alone: logits [1, P, V], row by row."""
    if positions_BM is None:
        yield
        return
    rows_P, slots_P = torch.nonzero(positions_BM >= 0, as_tuple=True)
    places_P = positions_BM[rows_P, slots_P]

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        return with_last_hidden_state(output, output[0][rows_P, places_P][None])

    hook = student.base_model.register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()


class StudentTrainer(OptimizerTrainer):
    """A `Trainer` over a `Distillation`.

    Args:
        rows: to train on.
        order: in which order.
        first_step: optimiser steps that an interrupted run has done.
        eval_rows: to evaluate on, or None.
        score: metrics from logits (see `predict_logits`) on the evaluation rows, in their order.
        multipliers: of the learning rate, by part.
        arguments: as those of `Trainer` (`model`, `args`, `callbacks`, ...).
    """

    def __init__(
        self,
        *,
        rows: Rows,
        order: BatchOrder,
        first_step: int = 0,
        eval_rows: Rows | None = None,
        score: Callable[[np.ndarray], Metrics] | None = None,
        multipliers: Sequence[Multiplier] = (),
        **arguments: Any,
    ) -> None:
        self._multipliers = tuple(multipliers)
        super().__init__(train_dataset=rows, eval_dataset=eval_rows, data_collator=_as_it_is, **arguments)
        threads = self.args.dataloader_num_workers
        pinned = self.args.device.type == "cuda" and self.args.dataloader_pin_memory
        last_step = self.args.max_steps if self.args.max_steps > 0 else None
        self.loader = BatchLoader(
            rows, order, first_step=first_step, last_step=last_step, threads=threads, pinned=pinned
        )
        self.clock = _Clock(order)
        self.add_callback(self.clock)
        self._score = score
        self._sums: dict[str, Tensor] = {}
        self._num_summed = 0
        self._side_group: Any = None
        distillation = self.distillation
        distillation.seed = order.seed
        self._negatives = NegativeRows(rows, order, distillation.num_negatives) if distillation.num_negatives else None
        if order.rank:
            # Rows of different ranks are dropped out differently; rank 0 draws what a process alone would.
            set_seed(self.args.seed + order.rank)

    # --- batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The loader; it is not prepared by accelerate, which would share its batches out again."""
        return self.loader

    def _prepare_input(self, data: Any) -> Any:
        if self.loader.pinned and isinstance(data, Tensor):
            # The copy follows the steps that the device still has to do; nobody waits for it.
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # --- learning rates ------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimiser, its parameters grouped by the multipliers of their learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self._multipliers:
            names = {id(parameter): name for name, parameter in self.distillation.named_parameters()}
            optimizer.param_groups[:] = regrouped(optimizer.param_groups, names, self._multipliers)
        return optimizer

    def _get_learning_rate(self) -> float:
        # That of the first group is shown, whose part may have a rate of its own.
        assert self.optimizer is not None
        return super()._get_learning_rate() / float(self.optimizer.param_groups[0].get(FACTOR, 1.0))

    # --- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss of a batch; its terms are kept for the log."""
        order = self.loader.order
        self.distillation.epoch = order.first_epoch + self.state.global_step // order.steps_per_epoch
        if self._negatives is not None:
            inputs = {**inputs, "negatives": self._negatives.drawn(self.state.global_step, self.args.device)}
        outputs = model(**inputs)
        for name, value in outputs["terms"].items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_summed += 1
        if (rule := self.convergence) is not None:
            watched = rule.watched(outputs["loss"], outputs["terms"])
            rule.see(self.accelerator.reduce(watched, "mean"))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last log.

        Raises:
            RefusedError: the loss is not a finite number any more.
        """
        if "loss" in logs and self._num_summed:
            logs |= {f"loss/{name}": value for name, value in self._mean_terms().items()}
            self._sums, self._num_summed = {}, 0
            broken = [name for name, value in logs.items() if name.startswith("loss") and not np.isfinite(value)]
            if broken:
                raise RefusedError(
                    f"training diverged: {', '.join(broken)} is not finite at step {self.state.global_step}",
                    fix="lower --learning-rate, or clip with --max-grad-norm",
                )
        super().log(logs, start_time)

    @property
    def convergence(self) -> ConvergenceCallback | None:
        """The rule that may end training before its last step."""
        # Looked for again: a resume puts another in its place.
        rules = (callback for callback in self.callback_handler.callbacks if isinstance(callback, ConvergenceCallback))
        return next(rules, None)

    def _mean_terms(self) -> dict[str, float]:
        """Mean of every loss term since the last log, over all ranks."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].float() for name in names]) / self._num_summed
        return dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))

    # --- ranks ---------------------------------------------------------------------------------------------------

    def any_rank(self, value: bool) -> bool:
        """Whether it is true on some rank; all call it."""
        if self.args.world_size == 1:
            return value
        if self._side_group is None:
            # gloo, so that on a GPU no step waits until the device is idle.
            self._side_group = torch.distributed.new_group(backend="gloo")
        flag = torch.tensor(int(value))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._side_group)
        return bool(flag)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # A checkpoint counts as complete with the file that rank 0 writes next: by then all ranks have written theirs.
        self.accelerator.wait_for_everyone()

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> Metrics:
        """Metrics of the student on all evaluation rows at once, in float32 whatever training runs in.

        All ranks get the same metrics, so that all come to the same decision.
        """
        assert self._score is not None and isinstance(self.eval_dataset, Rows)
        started = time.perf_counter()
        found = self._score(self.predict_logits(self.eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict_logits(self, rows: Rows) -> np.ndarray:
        """Logits of the student as `predict_logits` gives them; every rank computes its part and gets all."""
        order = self.loader.order
        logits_NC = predict_logits(
            self.student,
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
            part=(order.rank, order.num_ranks),
        )
        if order.num_ranks == 1:
            return logits_NC
        # A row is zero on every rank but one, so the sum is exact.
        whole_NC = self.accelerator.reduce(torch.from_numpy(logits_NC).to(self.args.device), "sum")
        return np.asarray(whole_NC.cpu().numpy())

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained, out of whatever wraps it."""
        return self.distillation.student

    @cached_property
    def distillation(self) -> Distillation:
        """It and its methods, out of whatever wraps them."""
        # Asked for in every step; to unwrap it, accelerate goes through all modules.
        distillation = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(distillation, Distillation)
        return distillation


def predict_logits(
    student: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """float32 [N, C] logits in row order, of a token task [W, C] word after word; rows are batched by length.

    A word that is not seen has NaN.

    Args:
        part: (which, of how many): of the batches, only every so manieth; rows of the others are zero.
    """
    was_training = student.training
    student.train(False)
    nn.Module.to(student, device)
    order = np.argsort(rows.tokens.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = batches[part[0] :: part[1]]
    words = rows.words
    num_logits = len(rows) if words is None else len(words.student.values)
    logits_NC = np.zeros((num_logits, int(student.config.num_labels or 0)), np.float32)
    pinned = torch.device(device).type == "cuda"
    found = []
    with torch.inference_mode():
        for batch in gather_ahead(rows, batches, pinned=pinned):
            inputs = {name: tensor.to(device, non_blocking=pinned) for name, tensor in batch["inputs"].items()}
            logits = student(**inputs).logits.float()
            found.append(logits if words is None else taken_at(logits, batch["positions"].to(logits.device)))
    if batches:
        places = np.concatenate(batches)
        if words is not None:
            starts, lengths = words.student.offsets[:-1][places], words.student.lengths[places]
            places = ranges(starts, lengths)
            places = places[words.seen[places]]
        # All at once: on a GPU, every copy back waits until the device is idle.
        logits_NC[places] = torch.cat(found).cpu().numpy()
    if words is not None:
        logits_NC[~words.seen] = np.nan
    student.train(was_training)
    return logits_NC


class _Clock(TrainerCallback):
    """Times the steps, and tells the epoch from the step alone, so that it survives a resume in mid-epoch."""

    def __init__(self, order: BatchOrder) -> None:
        self.step_s = 0.0
        self.num_steps = 0
        self._order = order
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_s += time.perf_counter() - self._started
        self.num_steps += 1
        state.epoch = state.global_step / self._order.steps_per_epoch


class StopAtSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `stop` has been called.

    Args:
        any_rank: makes of a rank's "stop" that of all, so that they end with the same step; None is a process alone.
    """

    def __init__(self, any_rank: Callable[[bool], bool] | None = None) -> None:
        self.stopped = False
        self._any_rank = any_rank

    def stop(self, *_: Any) -> None:
        """A signal handler."""
        self.stopped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_rank is not None:
            self.stopped = self._any_rank(self.stopped)
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
            # With a limit of one, transformers ends training by deleting all checkpoints but the best: this one too.
            if args.save_total_limit == 1:
                args.save_total_limit = 2


def _as_it_is(batch: Any) -> Any:
    return batch
