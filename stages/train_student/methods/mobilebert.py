"""MobileBERT: feature maps, their statistics and attention distributions, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from ..losses.reduce import Pooling
from .base import Method, Shapes, StudentOutputs, Targets, Unfit, methods
from .fit import one_map, one_width, project, require_same_heads
from .layer_maps import layer_pairs

WEIGHTS = ("feature", "mean", "variance", "attention")


@methods.register("mobilebert")
@dataclass(frozen=True, kw_only=True)
class MobileBertTransfer(Method):
    """Match block outputs (normalised, their means, their variances) and attention distributions, block by block.

    L = 1/|pairs| sum_m [ feature * MSE(LN(H_teacher), LN(H_student)) + mean * MSE(mean_d H_teacher, mean_d H_student)
      + variance * mean |var_d H_teacher - var_d H_student| + attention * mean KL(a_teacher || a_student) ],
    H being the token states of blocks m and g(m), LN without parameters, means over an example's true tokens (and
    heads). One linear map for all blocks stands before H_student where widths differ.

    For students made of transformer blocks. `feature`, `mean`, `variance`, `attention`: weights, those of the authors'
    code; 0 leaves a term out (`attention=0` for a student whose heads are not the teacher's). `normalize=false`
    compares H as it is: the feature map transfer of the paper with `mean=0:variance=0`. `layer_map`: `skip`, `last` or
    pairs of blocks `1-2+2-4` (student-teacher).
    `reduction`: `kd` as above; `token` is one mean over all true tokens of the batch; `official` divides by all
    positions of the padded batch and keeps the teacher's entropy in the attention term, as the authors' code does
    (which also compares padded positions: those are in no store, and count zero). That code compares every block's
    statistics with those of all teacher blocks at once, by a broadcast; here it is block with block.

    Signals: `hidden.tok` and `attention.score` at g(m). Student outputs: `token`, `score` at m. Projections: `linear`,
    if widths differ.
    """

    source = "Sun et al., MobileBERT: a Compact Task-Agnostic BERT, arXiv 2004.02984"
    lesser = ("attention=0",)
    layer_map: str = "skip"
    feature: float = 100.0
    mean: float = 5000.0
    variance: float = 5.0
    attention: float = 1.0
    normalize: bool = True
    reduction: Literal["kd", "token", "official"] = "kd"

    def __post_init__(self) -> None:
        for name in WEIGHTS:
            value = getattr(self, name)
            if not (value >= 0 and isfinite(value)):
                raise UsageError(f"option {name!r} of method 'mobilebert' is {value:g}; expected 0 or more")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise UsageError("method 'mobilebert' is left with nothing to compare", fix="give one weight above 0")

    @property
    def _reads_states(self) -> bool:
        return bool(self.feature or self.mean or self.variance)

    def _pairs(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        return layer_pairs(self.layer_map, shapes, first=1, where="option 'layer_map' of method 'mobilebert'")

    def _width(self, shapes: Shapes) -> int:
        return one_width((shapes.token_widths[layer] for layer, _ in self._pairs(shapes)), "mobilebert")

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        if not shapes.student_heads:
            raise Unfit(
                "method 'mobilebert' compares blocks of transformers, and the student has none",
                fix="fitnets:layer_map=skip, which compares token states",
            )
        if self.attention:
            require_same_heads(
                shapes, "mobilebert", fix="mobilebert:attention=0, or the student's heads as the teacher's"
            )
        if self._reads_states:
            self._width(shapes)
        kinds = [*(["hidden.tok"] if self._reads_states else []), *(["attention.score"] if self.attention else [])]
        return tuple(dict.fromkeys(Signal(kind, layer) for kind in kinds for _, layer in self._pairs(shapes)))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        kinds = [*(["token"] if self._reads_states else []), *(["score"] if self.attention else [])]
        return tuple(dict.fromkeys(f"{kind}@{layer}" for kind in kinds for layer, _ in self._pairs(shapes)))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        return one_map(self._width(shapes), shapes) if self._reads_states else nn.ModuleDict()

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        pairs = self._pairs(shapes)
        pooling: Pooling = "padded" if self.reduction == "official" else self.reduction
        by_weight = {
            "feature": losses.normalized_mse if self.normalize else losses.token_mse,
            "mean": losses.mean_mse,
            "variance": losses.variance_l1,
        }
        terms = {}
        for own, other in pairs:
            if self._reads_states:
                states_BTD = project(projections, "linear", student.token(own))
                for name, distance in by_weight.items():
                    if weight := getattr(self, name):
                        value = distance(
                            states_BTD, targets[Signal("hidden.tok", other)], student.mask_BT, pooling=pooling
                        )
                        terms[f"mobilebert.{name}.{own}-{other}"] = weight / len(pairs) * value
            if self.attention:
                value = losses.attention_kl(
                    student.score(own),
                    targets[Signal("attention.score", other)],
                    student.mask_BT,
                    pooling=pooling,
                    cross_entropy=self.reduction == "official",
                )
                terms[f"mobilebert.attention.{own}-{other}"] = self.attention / len(pairs) * value
        return terms
