"""Hidden-state regression (hints): match token states or sentence vectors through a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, layer_pairs, methods


@methods.register("hidden-mse")
@dataclass(frozen=True, kw_only=True)
class HiddenMse(Method):
    """Mean squared error between hidden states, the student's through a linear map when widths differ.

    L = sum over pairs (m, l) of mean_b mean_t mean_d (W_m h_student[b, t, m] - h_teacher[b, t, l])^2 over true tokens.
    The map stays linear: a stronger one would learn the teacher's states itself and leave the student as it is.

    `layer_map`: `skip`, `last` or pairs `1-2+2-4` (student-teacher). `at`: `tok` compares every token (the student must
    read the teacher's tokens), `cls` the sentence vectors, `mean` the means over tokens. `reduction` (for `tok`):
    `example` as above, `token` is one mean over all true tokens of the batch, so long examples weigh more.

    Signals: `hidden.tok`, `hidden.cls` or `hidden.mean` at the teacher layers. Student outputs: the same at its own
    layers. Projections: one linear map per pair whose widths differ.
    """

    source = "Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550, as one stage"
    layer_map: str = "skip"
    at: Literal["tok", "cls", "mean"] = "tok"
    reduction: Literal["example", "token"] = "example"

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return layer_pairs(self.layer_map, shapes, with_last=True, where="option 'layer_map' of method 'hidden-mse'")

    def _signal(self, teacher_layer: int) -> Signal:
        return Signal(f"hidden.{self.at}", teacher_layer)

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(self._signal(teacher) for _, teacher in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        kind = {"tok": "token", "cls": "sentence", "mean": "mean"}[self.at]
        return tuple(dict.fromkeys(f"{kind}@{student}" for student, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        widths = shapes.sentence_widths if self.at == "cls" else shapes.token_widths
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
            project = projections[pair] if pair in projections else nn.Identity()
            teacher = targets[self._signal(teacher_layer)]
            if self.at == "tok":
                terms[f"hidden-mse.{pair}"] = losses.token_mse(
                    project(student.token(student_layer)), teacher, student.mask_BT, reduction=self.reduction
                )
            else:
                vector_BD = student.sentence(student_layer) if self.at == "cls" else student.mean(student_layer)
                terms[f"hidden-mse.{pair}"] = losses.vector_distance(
                    project(vector_BD), teacher, normalize=False, reduction="mean"
                )
        return terms
