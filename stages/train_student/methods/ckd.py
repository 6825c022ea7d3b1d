"""CKD: every student layer matches several teacher layers side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.store.signal import Signal
from .. import losses
from ..losses.reduce import over_tokens
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import hidden_signals, project, state_reads, widths_at
from .layer_maps import layer_groups


@methods.register("ckd")
@dataclass(frozen=True, kw_only=True)
class Ckd(Method):
    """Match the states of several teacher layers together, side by side, with a linear map of one student layer.

    L = sum_m mean_b || u(c_m) - u(W_m h_student[b, m] + v_m) ||^2 with c_m the states of the teacher layers M(m) side
    by side, of width k d, and u(x) = x / ||x||. The paper and its code are of machine translation; this is its encoder
    side.

    `layer_map`: M(m) is `regular` blocks, blocks that `overlap` by a layer, `cross` (every second layer of those),
    `skip` (every M-th layer), or groups `1-1.3+2-4.6` (student-teachers), the paper's variants. `projection`: `student`
    maps the student's state up, as the code does; `teacher` maps c_m down to the student's width, as the paper writes:
    both are trained, so train with logits beside it. `normalize`: `joined` scales c_m to length 1, where layers of
    large norm lead; `layers` scales every layer first; `none` takes the mean squared error instead. `at`: `cls`
    sentence vectors, `mean` over tokens, or `tok` every token. `reduction`, for `tok`: `kd` a mean over an example's
    true tokens, `token` one over the batch's, `official` their sum, which the code's trainer divides by a number of
    target tokens.

    Signals: `hidden.cls`, `hidden.mean` or `hidden.tok` of all layers in groups. Student outputs: the same of its own.
    Projections: one linear map per group, always.
    """

    source = "Wu et al., Why Skip If You Can Combine: A Simple Knowledge Distillation Technique, arXiv 2010.03034"
    layer_map: str = "regular"
    at: Literal["cls", "mean", "tok"] = "cls"
    projection: Literal["student", "teacher"] = "student"
    normalize: Literal["joined", "layers", "none"] = "joined"
    reduction: Literal["kd", "token", "official"] = "kd"

    def _groups(self, shapes: Shapes) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return layer_groups(self.layer_map, shapes, where="option 'layer_map' of method 'ckd'")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        return hidden_signals(self.at, sorted(layer for _, group in self._groups(shapes) for layer in group))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads(self.at, (layer for layer, _ in self._groups(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        maps = {}
        for layer, group in self._groups(shapes):
            own, others = widths_at(self.at, shapes)[layer], len(group) * shapes.teacher_width
            maps[f"{layer}"] = nn.Linear(own, others) if self.projection == "student" else nn.Linear(others, own)
        return nn.ModuleDict(maps)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        terms = {}
        for layer, group in self._groups(shapes):
            own = student.states(self.at, layer)
            teacher = losses.joined(
                [targets[Signal(f"hidden.{self.at}", other)].detach() for other in group],
                normalize=self.normalize == "layers",
            )
            if self.projection == "student":
                own = project(projections, f"{layer}", own)
            else:
                teacher = project(projections, f"{layer}", teacher)
            terms[f"ckd.{layer}"] = self._distance(own, teacher, student.mask_BT)
        return terms

    def _distance(self, own: Tensor, teacher: Tensor, mask_BT: Tensor) -> Tensor:
        squares = losses.squared_distances(own, teacher, normalize=self.normalize != "none")
        if self.at != "tok":
            return squares.mean()
        if self.reduction == "official":
            return squares.masked_fill(~mask_BT, 0.0).sum()
        return over_tokens(squares, mask_BT, self.reduction)
