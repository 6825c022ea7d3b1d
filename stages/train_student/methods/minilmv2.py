"""MiniLMv2: relations between the queries, the keys and the values of one block."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .base import Method, Shapes, StudentOutputs, Targets, Unfit, methods
from .fit import require_attention
from .layer_maps import layer_pairs
from .relations import PARTS, relation_terms


@methods.register("minilmv2")
@dataclass(frozen=True, kw_only=True)
class MiniLmV2(Method):
    """Match how tokens relate to each other in one block: queries to queries, keys to keys, values to values.

    L = sum over relations X-Y of mean_b mean_{r, t} KL(R_teacher[r, t] || R_student[r, t]) over true tokens t, with
    R[r] = softmax(X_r Y_r' / sqrt(d / A)): the features of all heads side by side are cut anew into A relation heads,
    so the student may have any width and any number of heads. No projection, no logits, no labels.

    `heads`: A, which must divide both widths (the paper takes 48 for base-size models); 0 takes the teacher's number of
    heads, or the largest number below it that divides both. `relations`: pairs of q, k and v. `layer_map`: `final`, or
    one pair of blocks like `6-21` (student-teacher; the paper takes the 21st of a 24-layer teacher). `reduction`: `kd`
    as above, `token` is one mean over all true tokens of the batch. Blocks above the one that is matched are trained by
    nothing here.

    A student without attention can match value relations with its output states in their place, `relations=v-v`: not
    in the paper, for a BiLSTM.

    Signals: `attention.qkv` of the teacher's block. Student outputs: `qkv` of its block (`relations=v-v` of a student
    without attention: `token`). Projections: none.
    """

    source = "Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, arXiv 2012.15828"
    lesser = ("relations=v-v",)
    heads: int = 0
    relations: str = "q-q+k-k+v-v"
    layer_map: str = "final"
    reduction: Literal["kd", "token"] = "kd"

    def __post_init__(self) -> None:
        if self.heads < 0:
            raise UsageError(f"option 'heads' of method 'minilmv2' is {self.heads}; expected 0 or more")
        self._relations()

    def _relations(self) -> tuple[tuple[str, str], ...]:
        found = []
        for piece in self.relations.split("+"):
            first, _, second = piece.partition("-")
            if first not in PARTS or second not in PARTS:
                raise UsageError(
                    f"option 'relations' of method 'minilmv2' is {self.relations!r}; expected pairs of q, k and v",
                    fix="relations=q-q+k-k+v-v",
                )
            found.append((first, second))
        if len({*found}) < len(found):
            raise UsageError(f"option 'relations' of method 'minilmv2' is {self.relations!r}, which names a pair twice")
        return tuple(found)

    def _pair(self, shapes: Shapes) -> tuple[int, int]:
        pairs = layer_pairs(self.layer_map, shapes, first=1, where="option 'layer_map' of method 'minilmv2'")
        if len(pairs) != 1:
            raise UsageError(f"method 'minilmv2' matches one block, and layer_map={self.layer_map} names {len(pairs)}")
        return pairs[0]

    def _adapts_states(self, shapes: Shapes) -> bool:
        return not shapes.student_heads and {*self._relations()} == {("v", "v")}

    def _heads(self, shapes: Shapes) -> int:
        if not self._adapts_states(shapes):
            require_attention(shapes, "minilmv2", fix="for a student without attention: minilmv2:relations=v-v")
        student_layer, _ = self._pair(shapes)
        width = shapes.token_widths[student_layer] if self._adapts_states(shapes) else shapes.attention_width
        common = gcd(width, shapes.teacher_width)
        if not self.heads:
            return max(count for count in range(1, max(shapes.teacher_heads, 1) + 1) if common % count == 0)
        if common % self.heads:
            raise Unfit(
                f"option 'heads' of method 'minilmv2' is {self.heads}, which does not divide the widths {width} of the "
                f"student's and {shapes.teacher_width} of the teacher's vectors",
                fix="heads=" + " or ".join(str(count) for count in range(1, 65) if common % count == 0),
            )
        return self.heads

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        self._heads(shapes)
        return (Signal("attention.qkv", self._pair(shapes)[1]),)

    def takes_scores(self) -> bool:
        return any({first, second} == {"q", "k"} for first, second in self._relations())

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        kind = "token" if self._adapts_states(shapes) else "qkv"
        return (f"{kind}@{self._pair(shapes)[0]}",)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        student_layer, teacher_layer = self._pair(shapes)
        if self._adapts_states(shapes):
            own_BT3D = torch.stack([student.token(student_layer)] * len(PARTS), dim=2)
        else:
            own_BT3D = student.qkv(student_layer)
        terms = relation_terms(
            own_BT3D,
            targets[Signal("attention.qkv", teacher_layer)],
            student.mask_BT,
            self._relations(),
            heads=self._heads(shapes),
            pooling=self.reduction,
        )
        return {f"minilmv2.{name}": value for name, value in terms.items()}
