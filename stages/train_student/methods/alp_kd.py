"""ALP-KD: every student layer matches a mix of teacher layers that it attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import hidden_signals, one_map, one_width, project, state_reads, widths_at
from .layer_maps import layer_groups


@methods.register("alp-kd")
@dataclass(frozen=True, kw_only=True)
class AlpKd(Method):
    """Match sentence vectors with a mix of the teacher's, weighed by how much the student's own looks like each.

    L = mean_b sum_m mean_d (s_m - sum_l a_ml h_teacher[l])^2 with s_m = W h_student[m] and a_m = softmax over l in A(m)
    of s_m . h_teacher[l]; embeddings are left out. W is one linear map for all layers, there where widths differ.

    `layer_map`: A(m) is `all` teacher blocks, `regular` buckets (the paper's ALP-NO), buckets that `overlap` by a layer
    (ALP-PO), or groups `1-1.2.3+2-4.5.6` (student-teachers). `scaled`: divide the products by sqrt(d). Products of
    BERT's [CLS] vectors are in the hundreds, so that unscaled weights are all but one zero; codes differ on this, as on
    `over_layers`: `sum` over m, or `mean`. `through_weights`: whether gradient goes through the weights, by which a
    student can also lower the loss by turning to another layer. `at`: `cls` sentence vectors, or `mean` over tokens.

    Signals: `hidden.cls` (or `hidden.mean`) of every layer in a group. Student outputs: `sentence` (or `mean`).
    Projections: `linear`, if widths differ.
    """

    source = "Passban et al., ALP-KD: Attention-Based Layer Projection for Knowledge Distillation, arXiv 2012.14022"
    layer_map: str = "all"
    scaled: bool = False
    through_weights: bool = True
    over_layers: Literal["sum", "mean"] = "sum"
    at: Literal["cls", "mean"] = "cls"

    def _groups(self, shapes: Shapes) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return layer_groups(self.layer_map, shapes, where="option 'layer_map' of method 'alp-kd'")

    def _width(self, shapes: Shapes) -> int:
        widths = widths_at(self.at, shapes)
        return one_width((widths[layer] for layer, _ in self._groups(shapes)), "alp-kd")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        self._width(shapes)
        return hidden_signals(self.at, sorted(layer for _, group in self._groups(shapes) for layer in group))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads(self.at, (layer for layer, _ in self._groups(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        return one_map(self._width(shapes), shapes)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        groups = self._groups(shapes)
        terms = {}
        for layer, group in groups:
            distance = losses.attended_mse(
                project(projections, "linear", student.states(self.at, layer)),
                torch.stack([targets[Signal(f"hidden.{self.at}", other)] for other in group], dim=1),
                scaled=self.scaled,
                through_weights=self.through_weights,
            )
            terms[f"alp-kd.{layer}"] = distance / len(groups) if self.over_layers == "mean" else distance
        return terms
