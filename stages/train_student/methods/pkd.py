"""Patient knowledge distillation: match sentence vectors of intermediate layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, Unfit, methods
from .fit import hidden_signals, one_map, one_width, project, state_reads
from .layer_maps import layer_pairs


@methods.register("pkd")
@dataclass(frozen=True, kw_only=True)
class Pkd(Method):
    """Match the student's sentence vectors of its lower layers with the teacher's [CLS] states.

    L = mean_b sum_m || u(W h_student[b, m]) - u(h_teacher[b, g(m)]) ||^2 with u(x) = x / ||x||, over the student's
    blocks m = 1..M-1: the last one is supervised through logits. W is one linear map shared by all layers, and only
    there when widths differ. A BiLSTM's "[CLS]" is what it pools from a layer.

    `layer_map`: `skip` (every L / M-th teacher block), `last` (the top ones) or pairs `1-4+2-8` (student-teacher).
    `reduction`: `kd` as above; `official` divides by the number of layers and the width, as the published code does,
    so its weights (10 to 1000) can be used.

    Signals: `hidden.cls` at g(m). Student outputs: sentence vectors at m. Projections: `linear`, if widths differ.
    """

    source = "Sun et al., Patient Knowledge Distillation for BERT Model Compression, arXiv 1908.09355"
    layer_map: str = "skip"
    normalize: bool = True
    reduction: Literal["kd", "official"] = "kd"

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        pairs = layer_pairs(self.layer_map, shapes, with_last=False, where="option 'layer_map' of method 'pkd'")
        if not pairs:
            raise Unfit(
                f"method 'pkd' with layer_map={self.layer_map} leaves out the student's last layer, "
                "and it has no other",
                fix=f"use a deeper student, or name a pair: pkd:layer_map=1-{shapes.teacher_layers} (student-teacher)",
            )
        one_width((shapes.sentence_widths[student] for student, _ in pairs), "pkd")
        return pairs

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return hidden_signals("cls", (teacher for _, teacher in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads("cls", (student for student, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        return one_map(shapes.sentence_widths[self._pairs(shapes)[0][0]], shapes, bias=False)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        pairs = self._pairs(shapes)
        terms = {}
        for student_layer, teacher_layer in pairs:
            distance = losses.vector_distance(
                project(projections, "linear", student.sentence(student_layer)),
                targets[Signal("hidden.cls", teacher_layer)],
                normalize=self.normalize,
                reduction="sum" if self.reduction == "kd" else "mean",
            )
            if self.reduction == "official":
                distance = distance / len(pairs)
            terms[f"pkd.{student_layer}-{teacher_layer}"] = distance
        return terms
