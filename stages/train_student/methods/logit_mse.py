"""Logit regression: match the teacher's raw logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from .base import OF_WORDS, Method, Shapes, StudentOutputs, Targets, methods

LOGITS = Signal("logits")


@methods.register("logit-mse")
@dataclass(frozen=True, kw_only=True)
class LogitMse(Method):
    """Squared distance between raw logits: what Tang et al. train a BiLSTM with.

    L = mean_b ||z_student - s z_teacher||^2, summed over classes (`sum_class`, as papers write it) or averaged over
    them (`mean_all`, C times smaller). The high-temperature limit of soft targets, but it also matches the constant
    that a softmax ignores. Any task: labels of a multi-label head and the score of a regression count as classes.

    `scale` is s: a recipe raises it from a fraction to 1, as Annealing-KD does (Jafari et al., arXiv 2104.07163).

    Of a token task b goes over all words of the batch, each at its first piece.

    Signals: `logits`, or `logits.tok` of a token task. Student outputs: `logits`. Projections: none.
    """

    source = "Tang et al., Distilling Task-Specific Knowledge from BERT into Simple Neural Networks, arXiv 1903.12136"
    reduction: Literal["sum_class", "mean_all"] = "mean_all"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"option 'scale' of method 'logit-mse' is {self.scale:g}; expected above 0")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return (OF_WORDS if shapes.task == "token" else LOGITS,)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        (signal,) = self.signals(shapes)
        # At 1 the product would change nothing but the type of stored half-precision logits.
        teacher_BC = targets[signal] if self.scale == 1.0 else targets[signal].float() * self.scale
        if shapes.task == "token":
            values_P = losses.logit_distances(student.logits_BC, teacher_BC, reduction=self.reduction)
            return {"logit-mse": losses.over_masked(values_P, student.masked_BM, "token")}
        return {"logit-mse": losses.logit_mse(student.logits_BC, teacher_BC, reduction=self.reduction)}
