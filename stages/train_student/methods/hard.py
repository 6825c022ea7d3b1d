"""Hard labels: the gold labels of the rows that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, methods


@methods.register("hard")
@dataclass(frozen=True, kw_only=True)
class Hard(Method):
    """The task's own loss on gold labels, on the rows that have one.

    L = 1/B sum over rows with gold of CE(y_b, softmax(z_student)); binary cross-entropy, mean over labels, for
    multi-label and squared error for regression. Temperature 1. A row without gold counts 0 in the mean, so the loss
    does not depend on how rows fall into batches.

    Of masked text the labels are the tokens that stood there: the masked-LM loss, a mean over an example's masked
    tokens, then over examples; `reduction=token` is one mean over all of the batch. Of a token task b goes over all
    words of the batch, each at its first piece; words without a gold tag count 0.

    Signals: none. Student outputs: `logits`. Projections: none.
    """

    source = "the task loss"
    reduction: Literal["kd", "token"] = "kd"

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return ()

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        assert targets.labels is not None and targets.has_gold_B is not None
        if shapes.task == "masked-lm":
            values_P = losses.token_cross_entropies(student.logits_BC, targets.labels)
            return {"hard": losses.over_masked(values_P, student.masked_BM, self.reduction)}
        if shapes.task == "token":
            gold_P = targets.has_gold_B
            values_P = losses.token_cross_entropies(student.logits_BC, targets.labels.masked_fill(~gold_P, 0))
            return {"hard": losses.over_masked(values_P.masked_fill(~gold_P, 0.0), student.masked_BM, "token")}
        distance = {
            "single-label": losses.gold_cross_entropy,
            "multi-label": losses.gold_binary_cross_entropy,
            "regression": losses.gold_squared_error,
        }[shapes.task]
        return {"hard": distance(student.logits_BC, targets.labels, targets.has_gold_B)}
