"""TinyBERT: attention scores, hidden states and embeddings, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from ..losses.reduce import Pooling
from .base import Method, Shapes, StudentOutputs, Targets, methods
from .fit import hidden_signals, one_width, project, require_same_heads, state_reads
from .layer_maps import layer_pairs


@methods.register("tinybert")
@dataclass(frozen=True, kw_only=True)
class TinyBert(Method):
    """Match raw attention scores and hidden states block by block, and the embeddings.

    L = sum_m mean (A_student[m] - A_teacher[g(m)])^2 over heads and pairs of true tokens
      + sum_m mean (W h_student[m] + c - h_teacher[g(m)])^2 over true tokens and features, layer 0 (embeddings)
      included.
    A are scores before the softmax. W, c is one linear map for all layers, there where widths differ. The paper's
    prediction layer is `soft-target:temperature=1`, trained on its own after this.

    `attention`: `score` as in paper and code, `probability` compares after the softmax, `none` leaves it out (for a
    student without attention, or with other heads than the teacher's). `hidden`, `embedding`: which states take part.
    `always_project`: W also where widths agree, as the authors' code has it. `layer_map`: `skip`, `last` or pairs of
    blocks `1-3+2-6` (student-teacher). `reduction`: `kd` as above; `token` is one mean over all true tokens or pairs of
    the batch; `official` divides by all positions of the padded batch, as the authors' code does (which also compares
    the attention of padded rows: those are in no store, and count zero).

    Signals: `attention.score` and `hidden.tok` at g(m), `hidden.tok` at 0. Student outputs: `score`, `token` at m.
    Projections: `linear`, if widths differ.
    """

    source = "Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, arXiv 1909.10351"
    lesser = ("attention=none", "attention=none:embedding=false")
    layer_map: str = "skip"
    attention: Literal["score", "probability", "none"] = "score"
    hidden: bool = True
    embedding: bool = True
    always_project: bool = False
    reduction: Literal["kd", "token", "official"] = "kd"

    def __post_init__(self) -> None:
        if self.attention == "none" and not (self.hidden or self.embedding):
            raise UsageError(
                "method 'tinybert' is left with nothing to compare", fix="keep attention, hidden or embedding"
            )

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return layer_pairs(self.layer_map, shapes, first=1, where="option 'layer_map' of method 'tinybert'")

    def _state_pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return (*(((0, 0),) if self.embedding else ()), *(self._pairs(shapes) if self.hidden else ()))

    def _score_pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return self._pairs(shapes) if self.attention != "none" else ()

    def _width(self, shapes: Shapes) -> int:
        return one_width((shapes.token_widths[layer] for layer, _ in self._state_pairs(shapes)), "tinybert")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        if self.attention != "none":
            own = shapes.token_widths
            rest = "tinybert:attention=none" + (":embedding=false" if self.embedding and own[0] != own[-1] else "")
            require_same_heads(shapes, "tinybert", fix=f"{rest}, or the student's heads as the teacher's")
        if self._state_pairs(shapes):
            self._width(shapes)
        scores = dict.fromkeys(Signal("attention.score", teacher) for _, teacher in self._score_pairs(shapes))
        return (*scores, *hidden_signals("tok", (teacher for _, teacher in self._state_pairs(shapes))))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        scores = dict.fromkeys(f"score@{student}" for student, _ in self._score_pairs(shapes))
        return (*scores, *state_reads("tok", (student for student, _ in self._state_pairs(shapes))))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        if not self._state_pairs(shapes):
            return nn.ModuleDict()
        width = self._width(shapes)
        if width == shapes.teacher_width and not self.always_project:
            return nn.ModuleDict()
        return nn.ModuleDict({"linear": nn.Linear(width, shapes.teacher_width)})

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        pooling: Pooling = "padded" if self.reduction == "official" else self.reduction
        distance = losses.probability_mse if self.attention == "probability" else losses.score_mse
        terms = {}
        for own, other in self._score_pairs(shapes):
            terms[f"tinybert.attention.{own}-{other}"] = distance(
                student.score(own), targets[Signal("attention.score", other)], student.mask_BT, pooling=pooling
            )
        for own, other in self._state_pairs(shapes):
            terms[f"tinybert.hidden.{own}-{other}"] = losses.token_mse(
                project(projections, "linear", student.token(own)),
                targets[Signal("hidden.tok", other)],
                student.mask_BT,
                pooling=pooling,
            )
        return terms
