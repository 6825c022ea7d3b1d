"""Soft targets: match the teacher's softened distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from .base import OF_WORDS, Method, Shapes, StudentOutputs, Targets, methods

LOGITS, OF_MASKED = Signal("logits"), Signal("mlm.logits")


@methods.register("soft-target")
@dataclass(frozen=True, kw_only=True)
class SoftTarget(Method):
    """KL from the teacher's to the student's softened distribution, times temperature squared.

    L = T^2 mean_b KL(softmax(z_teacher / T) || softmax(z_student / T)). Multi-label: the same for each label's
    Bernoulli, mean over labels. Regression has no distribution: mean squared error of the scores, whatever T.

    `squared=false` leaves T^2 out, as some codes do: the gradient then falls with T^2 and the weight has to make up
    for it. `flsw` above 0 gives each example of a batch a temperature of its own, lower where the student is further
    off: T + flsw (mean(w) - w_b) with w_b = (1 - cos(z_student, z_teacher))^flsw_gamma (Wen et al., arXiv 1911.07471).

    Of masked text the student is a masked LM, and the distributions are those over the vocabulary at the masked tokens
    alone (`restrict_ce_to_mask` of DistilBERT's code, which by default takes all tokens): the mean over an example's,
    then over examples; `reduction=token` is one mean over all of the batch, as that code has it. Of a token task the
    distributions are those of every word, at its first piece: one mean over all words of the batch.

    Signals: `logits`, `mlm.logits` of masked text, `logits.tok` of a token task. Student outputs: `logits`.
    Projections: none.
    """

    source = "Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531"
    temperature: float = 2.0
    squared: bool = True
    flsw: float = 0.0
    flsw_gamma: float = 1.0
    reduction: Literal["kd", "token"] = "kd"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"option 'temperature' of method 'soft-target' is {self.temperature:g}; expected above 0")
        for name in ("flsw", "flsw_gamma"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(
                    f"option {name!r} of method 'soft-target' is {getattr(self, name):g}; expected 0 or more"
                )
        if self.flsw and not self.squared:
            raise UsageError(
                "options 'flsw' and 'squared=false' of method 'soft-target' exclude each other: with temperatures of "
                "their own, examples are on one scale only through the square"
            )

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        if self.flsw and shapes.task != "single-label":
            raise UsageError(f"option 'flsw' of method 'soft-target' is for one label of several, not {shapes.task}")
        return ({"masked-lm": OF_MASKED, "token": OF_WORDS}.get(shapes.task, LOGITS),)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        if shapes.task == "regression":
            return {"soft-target": losses.logit_mse(student.logits_BC, targets[LOGITS], reduction="mean_all")}
        if shapes.task in ("masked-lm", "token"):
            (signal,) = self.signals(shapes)
            values_P = losses.soft_target_kls(student.logits_BC, targets[signal], temperature=self.temperature)
            value = losses.over_masked(
                values_P, student.masked_BM, "token" if shapes.task == "token" else self.reduction
            )
            return {"soft-target": value if self.squared else value / self.temperature**2}
        if self.flsw:
            student_BC, teacher_BC = student.logits_BC, targets[LOGITS]
            temperature_B = losses.flsw_temperatures(
                student_BC, teacher_BC, base=self.temperature, beta=self.flsw, gamma=self.flsw_gamma
            )
            return {"soft-target": losses.soft_target_kl(student_BC, teacher_BC, temperature=temperature_B)}
        distance = losses.bernoulli_kl if shapes.task == "multi-label" else losses.soft_target_kl
        value = distance(student.logits_BC, targets[LOGITS], temperature=self.temperature)
        return {"soft-target": value if self.squared else value / self.temperature**2}
