"""DistilBERT: the direction of the last hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from ..losses.reduce import Pooling
from .base import Method, Shapes, StudentOutputs, Targets, Unfit, methods
from .fit import hidden_signals, map_per_pair, project, state_reads, widths_at
from .layer_maps import layer_pairs

OF_MASKED = Signal("mlm.hidden")


@methods.register("distilbert")
@dataclass(frozen=True, kw_only=True)
class DistilBert(Method):
    """Cosine distance between the last hidden states: the term that makes DistilBERT's loss of soft targets and labels.

    L = mean_b mean_t (1 - cos(W h_student[b, t, M], h_teacher[b, t, L])) over true tokens. The other two terms of the
    paper are methods of their own; its weights are `soft-target:5:temperature=2,hard:2,distilbert:1`. Over masked text
    those two are over the vocabulary at the masked tokens, and the three are the loss that DistilBERT is pretrained
    with.

    `at`: `tok` every token, as in the paper (the student must read the teacher's tokens), `mask` the masked ones alone,
    `cls` the sentence vectors, `mean` the means over tokens. `layer_map`: `final`, or pairs (student-teacher), `skip`,
    `last`, whose terms are summed. `reduction`, for `tok` and `mask`: `kd` as above; `token`, and `official` for the
    same, is one mean over all true tokens of the batch, as the authors' code has it.

    Signals: `hidden.tok`, `hidden.cls` or `hidden.mean` of the teacher's last layer, or `mlm.hidden`. Student outputs:
    the same of its own. Projections: one linear map per pair whose widths differ.
    """

    source = "Sanh et al., DistilBERT, a distilled version of BERT, arXiv 1910.01108"
    layer_map: str = "final"
    at: Literal["tok", "mask", "cls", "mean"] = "tok"
    reduction: Literal["kd", "token", "official"] = "kd"

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return layer_pairs(self.layer_map, shapes, where="option 'layer_map' of method 'distilbert'")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        if self.at == "mask":
            if shapes.task != "masked-lm":
                raise Unfit("option 'at=mask' of method 'distilbert' is for masked text", fix="distilbert:at=tok")
            if any(teacher != shapes.teacher_layers for _, teacher in self._pairs(shapes)):
                raise UsageError("option 'at=mask' of method 'distilbert' is for the teacher's last layer alone")
            return (OF_MASKED,)
        return hidden_signals(self.at, (teacher for _, teacher in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads("tok" if self.at == "mask" else self.at, (student for student, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        return map_per_pair(self._pairs(shapes), widths_at(self.at, shapes), shapes, bias=False)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        pooling: Pooling = "kd" if self.reduction == "kd" else "token"
        terms = {}
        for own, other in self._pairs(shapes):
            masked = self.at == "mask"
            teacher = targets[OF_MASKED if masked else Signal(f"hidden.{self.at}", other)]
            states = student.masked(own) if masked else student.states(self.at, own)
            states = project(projections, f"{own}-{other}", states)
            terms[f"distilbert.{own}-{other}"] = (
                losses.token_cosine(states, teacher, student.masked_BM if masked else student.mask_BT, pooling=pooling)
                if self.at in ("tok", "mask")
                else losses.vector_cosine(states, teacher)
            )
        return terms
