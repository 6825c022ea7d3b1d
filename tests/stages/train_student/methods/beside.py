"""A student ready for single steps over a captured view, so that the store can be held against the live teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.stages.derivation import derivation_of
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.preparation import Preparation
from kd.stages.train_student.rows import Rows
from kd.stages.train_student.trainer import Distillation
from kd.stages.train_student.training import make_data


@dataclass(frozen=True)
class Ready:
    """A student that starts at random, without dropout, and the rows it learns from."""

    prepared: Preparation
    distillation: Distillation
    rows: Rows

    @classmethod
    def over(cls, view: Path, student: str, *methods: str) -> Ready:
        stage = TrainStudent(view=(str(view),), student=student, init="random", method=methods, output_dir="unused")
        prepared = stage.prepared
        torch.manual_seed(0)
        tokenizer = prepared.teacher.tokenizer
        model = prepared.student.build(prepared.start, prepared.teacher, prepared.task, tokenizer).model
        # Started at 0.02, its outputs would hardly depend on its input.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
        derivation = derivation_of(prepared.views[0].store) if prepared.derives else None
        distillation = Distillation(model, prepared.student, prepared.terms, prepared.shapes, derivation).eval()
        return cls(prepared, distillation, make_data(prepared, tokenizer, model).rows)

    def step(self, batch: Mapping[str, Any], **fields: Any) -> tuple[float, Tensor]:
        """Loss and the gradient of everything trained, as one vector."""
        self.distillation.zero_grad()
        loss = self.distillation(**{**batch, **fields})["loss"]
        loss.backward()
        parts = [p.grad.flatten() for p in self.distillation.parameters() if p.grad is not None]
        return loss.item(), torch.cat(parts).double()
