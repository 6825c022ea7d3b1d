"""FitNets hints: one layer of the student regresses one of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import project, widths_at
from .layer_maps import layer_pairs


@methods.register("fitnets")
@dataclass(frozen=True, kw_only=True)
class FitNets(Method):
    """Mean squared error between hidden states, the student's through a linear map where widths differ.

    L = sum over pairs (m, l) of mean_b mean_t mean_d (W_m h_student[b, t, m] + c_m - h_teacher[b, t, l])^2 over true
    tokens: the hint loss of section 2.3, tokens for pixels. The map stays linear: a stronger one would learn the
    teacher's states itself and leave the student as it is. A hint near the top leaves the student little freedom.

    `layer_map`: `middle` as in the paper, or `skip`, `last`, `final`, pairs `1-2+2-4` (student-teacher). `at`: `tok`
    compares every token (the student must read the teacher's tokens), `cls` the sentence vectors, `mean` the means over
    tokens. `reduction`, for `tok`: `kd` as above; `token` is one mean over all true tokens of the batch; `official` is
    half the squared distance, summed over tokens and features, as the authors' code has it.

    Signals: `hidden.tok`, `hidden.cls` or `hidden.mean` at the teacher layers. Student outputs: the same at its own
    layers. Projections: one linear map per pair whose widths differ.
    """

    source = "Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550"
    layer_map: str = "middle"
    at: Literal["tok", "cls", "mean"] = "tok"
    reduction: Literal["kd", "token", "official"] = "kd"

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return layer_pairs(self.layer_map, shapes, where="option 'layer_map' of method 'fitnets'")

    def _signal(self, teacher_layer: int) -> Signal:
        return Signal(f"hidden.{self.at}", teacher_layer)

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(self._signal(teacher) for _, teacher in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        kind = {"tok": "token", "cls": "sentence", "mean": "mean"}[self.at]
        return tuple(dict.fromkeys(f"{kind}@{student}" for student, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        widths = widths_at(self.at, shapes)
        return nn.ModuleDict(
            {
                f"{student}-{teacher}": nn.Linear(widths[student], shapes.teacher_width)
                for student, teacher in self._pairs(shapes)
                if widths[student] != shapes.teacher_width
            }
        )

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        terms = {}
        for student_layer, teacher_layer in self._pairs(shapes):
            pair = f"{student_layer}-{teacher_layer}"
            teacher = targets[self._signal(teacher_layer)]
            if self.at == "tok":
                states_BTD = project(projections, pair, student.token(student_layer))
                if self.reduction == "official":
                    distance = losses.half_squared_distance(states_BTD, teacher, student.mask_BT)
                else:
                    distance = losses.token_mse(states_BTD, teacher, student.mask_BT, pooling=self.reduction)
            else:
                vector_BD = project(projections, pair, student.sentence_or_mean(self.at, student_layer))
                distance = losses.vector_distance(
                    vector_BD,
                    teacher,
                    normalize=False,
                    reduction="sum" if self.reduction == "official" else "mean",
                )
                if self.reduction == "official":
                    distance = 0.5 * distance
            terms[f"fitnets.{pair}"] = distance
        return terms
