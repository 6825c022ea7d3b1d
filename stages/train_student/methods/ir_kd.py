"""IR-KD: attention distributions and sentence directions, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import map_per_pair, project, require_same_heads
from .layer_maps import layer_pairs


@methods.register("ir-kd")
@dataclass(frozen=True, kw_only=True)
class IrKd(Method):
    """Match attention distributions and the direction of sentence vectors, block by block.

    L = sum_m [ mean_b mean_{a, t} KL(P_teacher[g(m), a, t] || P_student[m, a, t]) + mean_b (1 - cos(h_teacher[b, g(m)],
    W_m h_student[b, m])) ], P being softmax over an example's true tokens of the raw scores, a heads, t true tokens, h
    the [CLS] states. The paper trains block by block, bottom up, and on logits only after that.

    `attention`, `cosine`: which of the two take part; without attention any student fits. `layer_map`: `skip`, `last`
    or pairs of blocks `1-2+2-4` (student-teacher). `reduction` (of attention): `kd` as above, `token` is one mean over
    all true tokens of the batch.

    Signals: `attention.score` and `hidden.cls` at g(m). Student outputs: `score`, `sentence` at m. Projections: one
    linear map per pair whose widths differ.
    """

    source = "Aguilar et al., Knowledge Distillation from Internal Representations, arXiv 1910.03723"
    lesser = ("attention=false",)
    layer_map: str = "skip"
    attention: bool = True
    cosine: bool = True
    reduction: Literal["kd", "token"] = "kd"

    def __post_init__(self) -> None:
        if not (self.attention or self.cosine):
            raise UsageError("method 'ir-kd' is left with nothing to compare", fix="keep attention or cosine")

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return layer_pairs(self.layer_map, shapes, first=1, where="option 'layer_map' of method 'ir-kd'")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        if self.attention:
            require_same_heads(shapes, "ir-kd", fix="ir-kd:attention=false, or the student's heads as the teacher's")
        kinds = [
            *(["attention.score"] if self.attention else []),
            *(["hidden.cls"] if self.cosine else []),
        ]
        return tuple(dict.fromkeys(Signal(kind, layer) for kind in kinds for _, layer in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        kinds = [*(["score"] if self.attention else []), *(["sentence"] if self.cosine else [])]
        return tuple(dict.fromkeys(f"{kind}@{layer}" for kind in kinds for layer, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        pairs = self._pairs(shapes) if self.cosine else ()
        return map_per_pair(pairs, shapes.sentence_widths, shapes, bias=False)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        terms = {}
        for own, other in self._pairs(shapes):
            if self.attention:
                terms[f"ir-kd.attention.{own}-{other}"] = losses.attention_kl(
                    student.score(own),
                    targets[Signal("attention.score", other)],
                    student.mask_BT,
                    pooling=self.reduction,
                )
            if self.cosine:
                terms[f"ir-kd.cosine.{own}-{other}"] = losses.vector_cosine(
                    project(projections, f"{own}-{other}", student.sentence(own)), targets[Signal("hidden.cls", other)]
                )
        return terms
