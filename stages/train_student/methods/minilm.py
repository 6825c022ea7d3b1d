"""MiniLM: attention and value relations of one block, usually the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import require_same_heads
from .layer_maps import layer_pairs
from .relations import relation_terms


@methods.register("minilm")
@dataclass(frozen=True, kw_only=True)
class MiniLm(Method):
    """Match the attention of one block, and how its values relate to each other.

    L = L_AT + L_VR, L_AT = mean_b mean_{a, t} KL(softmax(Q_a K_a' / sqrt(d_head))_teacher[t] || student[t]) and L_VR
    the same of softmax(V_a V_a' / sqrt(d_head)), over the A attention heads and an example's true tokens t; each
    model's own d_head. Both models need the same number of heads; widths and depths are free. No projection, logits or
    labels.

    `layer_map`: `final`, or one pair of blocks like `4-11` (student-teacher). `reduction`: `kd` as above, `token` is
    one mean over all true tokens of the batch. Blocks above the one that is matched, and all after its attention, are
    trained by nothing here.

    Signals: `attention.qkv` of the teacher's block. Student outputs: `qkv` of its block. Projections: none.
    """

    source = "Wang et al., MiniLM: Deep Self-Attention Distillation, arXiv 2002.10957"
    layer_map: str = "final"
    reduction: Literal["kd", "token"] = "kd"

    def _pair(self, shapes: Shapes) -> tuple[int, int]:
        pairs = layer_pairs(self.layer_map, shapes, first=1, where="option 'layer_map' of method 'minilm'")
        if len(pairs) != 1:
            raise UsageError(f"method 'minilm' matches one block, and layer_map={self.layer_map} names {len(pairs)}")
        return pairs[0]

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        other = "minilmv2 fits any number of heads" if shapes.student_heads else "minilmv2:relations=v-v"
        require_same_heads(shapes, "minilm", fix=other)
        return (Signal("attention.qkv", self._pair(shapes)[1]),)

    def takes_scores(self) -> bool:
        return True

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return (f"qkv@{self._pair(shapes)[0]}",)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        student_layer, teacher_layer = self._pair(shapes)
        terms = relation_terms(
            student.qkv(student_layer),
            targets[Signal("attention.qkv", teacher_layer)],
            student.mask_BT,
            (("q", "k"), ("v", "v")),
            heads=shapes.teacher_heads,
            pooling=self.reduction,
        )
        return {"minilm.attention": terms["q-k"], "minilm.values": terms["v-v"]}
