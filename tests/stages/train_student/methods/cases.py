"""The table of methods under test: a new one joins with its line in `CASES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kd.stages.train_student.methods import Method

from . import reference
from .worlds import make


@dataclass(frozen=True)
class Case:
    """One method under test.

    Attributes:
        spec: the method, with options.
        reference: its loss of one example in numpy.
        least: the loss of a student that equals its teacher; None where that is not known.
        identical: options under which the method compares layer m with layer m of a teacher of the same depth.
    """

    spec: str
    reference: Callable[..., float]
    least: float | None = 0.0
    identical: str = ""

    @property
    def method(self) -> Method:
        return make(self.spec)

    @property
    def name(self) -> str:
        return self.method.name


CASES = [
    Case("soft-target", reference.soft_target),
    Case("logit-mse", reference.logit_mse),
    Case("fitnets", reference.fitnets),
    Case("fsp", reference.fsp),
    Case("pkd", reference.pkd),
    Case("distilbert", reference.distilbert),
    Case("tinybert", reference.tinybert),
    Case("ir-kd", reference.ir_kd),
    Case("mobilebert", reference.mobilebert),
    Case("ckd", reference.ckd),
    Case("ckd:at=tok:layer_map=overlap", reference.ckd_tokens, identical="ckd:at=tok"),
    Case("alp-kd", reference.alp_kd, identical="alp-kd:layer_map=regular"),
    Case("codir:size=5", reference.codir, least=None),
    Case("rail-kd:size=5", reference.rail_kd),
    Case("minilm", reference.minilm),
    Case("minilmv2", reference.minilmv2),
]
