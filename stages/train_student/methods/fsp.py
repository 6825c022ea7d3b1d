"""FSP: how features flow from one layer to a later one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, Unfit, methods
from .fit import hidden_signals, project, state_reads
from .layer_maps import layer_pairs


@methods.register("fsp")
@dataclass(frozen=True, kw_only=True)
class Fsp(Method):
    """Match the matrices of features that occur together at two layers: the "flow of the solution procedure".

    G_ij = 1/n sum_t h_i[t]' h_j[t] over an example's n true tokens; L = mean_b sum_(i, j) mean (G_teacher -
    G_student)^2 over the matrix. Where widths differ, one linear map per student layer stands before G.

    `layer_map`: points on the way up, in pairs student-teacher; neighbouring points make a matrix. `thirds` is the
    embeddings, one third, two thirds and the top of both (as many as the student has layers for), or write
    `0-0+2-6+3-12`. `proj_dim`: compare P' G P for a fixed random orthonormal P of that many columns instead (another
    objective, logged as `fsp_proj`); 0 compares G. `reduction`: `kd` as above, `frobenius` sums over the matrix, as the
    paper writes it. States of a transformer have a few features of great size, which lead G.

    Reported below plain soft targets wherever both were measured: offered, not recommended.

    Signals: `hidden.tok` at the points. Student outputs: `token` at its own. Projections: one linear map per student
    layer whose width differs, and `p` for `proj_dim`.
    """

    source = "Yim et al., A Gift from Knowledge Distillation, CVPR 2017"
    layer_map: str = "thirds"
    proj_dim: int = 0
    reduction: Literal["kd", "frobenius"] = "kd"

    def __post_init__(self) -> None:
        if self.proj_dim < 0:
            raise UsageError(f"option 'proj_dim' of method 'fsp' is {self.proj_dim}; expected 0 or more")

    def _points(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        if self.layer_map == "thirds":
            parts = min(3, shapes.student_layers, shapes.teacher_layers)
            return tuple(
                (round(part * shapes.student_layers / parts), round(part * shapes.teacher_layers / parts))
                for part in range(parts + 1)
            )
        points = layer_pairs(self.layer_map, shapes, where="option 'layer_map' of method 'fsp'")
        if len(points) < 2:
            raise UsageError(
                f"method 'fsp' needs two layers for a matrix, and layer_map={self.layer_map} names {len(points)}",
                fix="layer_map=thirds, or points like 0-0+2-6+3-12 (student-teacher)",
            )
        return points

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        if self.proj_dim > shapes.teacher_width:
            raise Unfit(
                f"option 'proj_dim' of method 'fsp' is {self.proj_dim}, and the teacher's width {shapes.teacher_width}",
                fix=f"at most {shapes.teacher_width}",
            )
        return hidden_signals("tok", (teacher for _, teacher in self._points(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads("tok", (student for student, _ in self._points(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        maps: dict[str, nn.Module] = {
            f"{layer}": nn.Linear(shapes.token_widths[layer], shapes.teacher_width)
            for layer in dict.fromkeys(student for student, _ in self._points(shapes))
            if shapes.token_widths[layer] != shapes.teacher_width
        }
        if self.proj_dim:
            maps["p"] = _FixedColumns(shapes.teacher_width, self.proj_dim)
        return nn.ModuleDict(maps)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        name = "fsp_proj" if self.proj_dim else "fsp"
        flows = []
        for own, other in self._points(shapes):
            pair = (project(projections, f"{own}", student.token(own)), targets[Signal("hidden.tok", other)].detach())
            flows.append([project(projections, "p", states) for states in pair])
        terms = {}
        for (low, high), (low_point, high_point) in zip(pairwise(flows), pairwise(self._points(shapes)), strict=True):
            own_BDE, other_BDE = (losses.flow_matrix(low[side], high[side], student.mask_BT) for side in (0, 1))
            places = f"{low_point[0]}.{high_point[0]}-{low_point[1]}.{high_point[1]}"
            terms[f"{name}.{places}"] = losses.flow_distance(
                own_BDE, other_BDE, reduction="mean" if self.reduction == "kd" else "sum"
            )
        return terms


class _FixedColumns(nn.Module):
    """Orthonormal columns [D, R], the same in every run: kept in checkpoints, never trained."""

    def __init__(self, width: int, columns: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        matrix_DR = torch.linalg.qr(torch.randn(width, columns, generator=generator, dtype=torch.float64))[0]
        self.register_buffer("matrix_DR", matrix_DR.float())

    def forward(self, states_BTD: Tensor) -> Tensor:
        matrix_DR = self.get_buffer("matrix_DR")
        dtype = torch.promote_types(states_BTD.dtype, matrix_DR.dtype)
        return states_BTD.to(dtype) @ matrix_DR.to(dtype)
