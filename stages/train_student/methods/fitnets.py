"""FitNets hints: one layer of the student regresses one of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import hidden_signals, map_per_pair, project, state_reads, widths_at
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

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return hidden_signals(self.at, (teacher for _, teacher in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads(self.at, (student for student, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        return map_per_pair(self._pairs(shapes), widths_at(self.at, shapes), shapes)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        terms = {}
        for own, other in self._pairs(shapes):
            states = project(projections, f"{own}-{other}", student.states(self.at, own))
            teacher = targets[Signal(f"hidden.{self.at}", other)]
            terms[f"fitnets.{own}-{other}"] = self._distance(states, teacher, student.mask_BT)
        return terms

    def _distance(self, own: Tensor, teacher: Tensor, mask_BT: Tensor) -> Tensor:
        if self.at == "tok":
            if self.reduction == "official":
                return losses.half_squared_distance(own, teacher, mask_BT)
            return losses.token_mse(own, teacher, mask_BT, pooling=self.reduction)
        if self.reduction == "official":
            return 0.5 * losses.vector_distance(own, teacher, normalize=False, reduction="sum")
        return losses.vector_distance(own, teacher, normalize=False, reduction="mean")
