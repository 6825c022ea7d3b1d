"""RAIL-KD: pooled states of teacher layers that are drawn anew every epoch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from .base import Method, Shapes, StudentOutputs, Targets, Unfit, methods
from .fit import hidden_signals, one_width, project, state_reads, widths_at


@methods.register("rail-kd")
@dataclass(frozen=True, kw_only=True)
class RailKd(Method):
    """Match pooled states with those of teacher layers drawn at random for every epoch.

    Each epoch draws M-1 of the teacher's blocks 1..L-1 without replacement and pairs them in rising order with the
    student's blocks 1..M-1: l_1 < l_2 < ... With hbar the mean over an example's true tokens and u(x) = x / ||x||,
    `form=layers`: L = mean_b sum_m || u(W_t hbar_teacher[b, l_m]) - u(W_s hbar_student[b, m]) ||^2;
    `form=joined`: one distance between the pooled states of all drawn layers side by side, one map per model.

    The draw follows from the run's seed and the epoch alone: the same on all ranks and after a resume. Both maps are
    trained, so train with soft targets beside it: alone they may agree on a constant direction.

    `size`: width of the maps' output. `embedding`, `final`: whether layer 0, and the last blocks, take part on both
    sides. `at`: `mean`, or `cls` for sentence vectors.

    Signals: `hidden.mean` (or `hidden.cls`) of every layer that can be drawn. Student outputs: `mean` (or `sentence`)
    of its own. Projections: `student`, `teacher`, always.
    """

    source = "Haidar et al., RAIL-KD: RAndom Intermediate Layer Mapping, arXiv 2109.10164"
    form: Literal["layers", "joined"] = "layers"
    size: int = 128
    embedding: bool = False
    final: bool = False
    at: Literal["mean", "cls"] = "mean"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"option 'size' of method 'rail-kd' is {self.size}; expected 1 or more")

    def _layers(self, num_layers: int) -> range:
        return range(0 if self.embedding else 1, num_layers + 1 if self.final else num_layers)

    def _student_layers(self, shapes: Shapes) -> range:
        layers = self._layers(shapes.student_layers)
        candidates = self._layers(shapes.teacher_layers)
        if not layers:
            raise Unfit(
                "method 'rail-kd' leaves out the student's last layer, and it has no other",
                fix="rail-kd:final=true, or a deeper student",
            )
        if len(layers) > len(candidates):
            raise Unfit(
                f"method 'rail-kd' draws a teacher layer for each of {len(layers)} student layers, and the teacher has "
                f"{len(candidates)} to draw from",
                fix="a student with fewer layers than its teacher",
            )
        one_width((widths_at(self.at, shapes)[layer] for layer in layers), "rail-kd")
        return layers

    def draw(self, seed: int, epoch: int, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        """Pairs (student layer, teacher layer) of an epoch, both rising."""
        layers = self._student_layers(shapes)
        # Not from torch's generator: that depends on what ran before, and on the rank.
        drawn = random.Random(f"rail-kd {seed} {epoch}").sample(self._layers(shapes.teacher_layers), len(layers))
        return tuple(zip(layers, sorted(drawn), strict=True))

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        self._student_layers(shapes)
        return hidden_signals(self.at, self._layers(shapes.teacher_layers))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads(self.at, self._student_layers(shapes))

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        layers = self._student_layers(shapes)
        copies = len(layers) if self.form == "joined" else 1
        width = widths_at(self.at, shapes)[layers[0]]
        return nn.ModuleDict(
            {
                "student": nn.Linear(copies * width, self.size, bias=False),
                "teacher": nn.Linear(copies * shapes.teacher_width, self.size, bias=False),
            }
        )

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        own, others = [], []
        for student_layer, teacher_layer in self.draw(targets.seed, targets.epoch, shapes):
            own.append(student.states(self.at, student_layer))
            others.append(targets[Signal(f"hidden.{self.at}", teacher_layer)].detach())
        if self.form == "joined":
            own, others = [losses.joined(own, normalize=False)], [losses.joined(others, normalize=False)]
        distances = [
            losses.unit_distance(project(projections, "student", mine), project(projections, "teacher", theirs))
            for mine, theirs in zip(own, others, strict=True)
        ]
        if self.form == "joined":
            return {"rail-kd": distances[0]}
        return {f"rail-kd.{layer}": d for layer, d in zip(self._student_layers(shapes), distances, strict=True)}
