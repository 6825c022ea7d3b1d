"""CoDIR: tell the teacher's representation of an example from those of other examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from .. import losses
from ..losses.reduce import wide
from .base import FAMILY, Method, Shapes, StudentOutputs, Targets, methods
from .fit import hidden_signals, project, state_reads, widths_at

LOGITS = Signal("logits")


@methods.register("codir")
@dataclass(frozen=True, kw_only=True)
class CoDir(Method):
    """Contrast the student's sentence with the teacher's of the same row, against the teacher's of other rows.

    f is the states of several layers side by side, z = u(W f) its direction in `size` dimensions, one map per model.
    `form=infonce`: L = -mean_b log [ exp(z_s . z_0 / tau) / sum_k exp(z_s . z_k / tau) ], z_0 the teacher's own,
    z_1..z_K of other rows, as the paper writes. `form=nce` asks of each whether it is the row's own or noise, as the
    released code does in the direction from student to teacher; that code keeps maps of all rows in memory, which go
    stale. Here the raw vectors are in the store: `negatives` rows are drawn for every step, from seed and step, and
    mapped anew.

    `negatives_from`: `other_class` counts only rows that the teacher puts into another class (of a task with one label
    of several); `random` all. The row itself and variants of its text never count. `student_layers`: `all` blocks, or
    `1+3`; `teacher_layers`: `spread`, the first block of every L / M (1, 3, 5, ... for 12 to 6), `all`, or `1+3+5`.
    `at`: `cls` as in the released code, `mean` over tokens as in the paper. `temperature`: tau.

    Signals: `hidden.cls` or `hidden.mean` of those layers; `logits` for `other_class`. Student outputs: `sentence` or
    `mean`. Projections: `student`, `teacher`, always; with `nce` also the scale it fixes in the first step.
    """

    source = "Sun et al., Contrastive Distillation on Intermediate Representations, arXiv 2009.14167"
    form: Literal["infonce", "nce"] = "infonce"
    temperature: float = 0.07
    size: int = 128
    negatives: int = 100
    negatives_from: Literal["other_class", "random"] = "other_class"
    student_layers: str = "all"
    teacher_layers: str = "spread"
    at: Literal["cls", "mean"] = "cls"

    def __post_init__(self) -> None:
        for name in ("size", "negatives"):
            if getattr(self, name) < 1:
                raise UsageError(f"option {name!r} of method 'codir' is {getattr(self, name)}; expected 1 or more")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"option 'temperature' of method 'codir' is {self.temperature:g}; expected above 0")

    def _student_layers(self, shapes: Shapes) -> tuple[int, ...]:
        return _layers(self.student_layers, shapes.student_layers, "student_layers")

    def _teacher_layers(self, shapes: Shapes) -> tuple[int, ...]:
        if self.teacher_layers == "spread":
            ratio = shapes.teacher_layers / shapes.student_layers
            return tuple(dict.fromkeys(int(m * ratio) + 1 for m in range(shapes.student_layers)))
        return _layers(self.teacher_layers, shapes.teacher_layers, "teacher_layers")

    def _told_apart(self, shapes: Shapes) -> bool:
        return self.negatives_from == "other_class" and shapes.task == "single-label"

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        self._student_layers(shapes)
        states = hidden_signals(self.at, self._teacher_layers(shapes))
        return (*states, *((LOGITS,) if self._told_apart(shapes) else ()))

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        return state_reads(self.at, self._student_layers(shapes))

    def num_negatives(self, shapes: Shapes) -> int:
        return self.negatives

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        widths = widths_at(self.at, shapes)
        maps: dict[str, nn.Module] = {
            "student": nn.Linear(sum(widths[layer] for layer in self._student_layers(shapes)), self.size),
            "teacher": nn.Linear(len(self._teacher_layers(shapes)) * shapes.teacher_width, self.size),
        }
        if self.form == "nce":
            maps["scale"] = _Scale()
        return nn.ModuleDict(maps)

    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        own = losses.joined([student.states(self.at, m) for m in self._student_layers(shapes)], normalize=False)
        names = [str(Signal(f"hidden.{self.at}", layer)) for layer in self._teacher_layers(shapes)]
        positive, negative = (
            losses.joined([signals[name].detach() for name in names], normalize=False)
            for signals in (targets.signals, targets.negatives)
        )
        # Equal vectors are the same input: the row itself, wherever it stands in the store.
        usable_BK = (positive[:, None] != negative[None]).any(-1)
        if FAMILY in targets.signals:
            usable_BK &= targets.signals[FAMILY][:, None] != targets.negatives[FAMILY][None]
        if self._told_apart(shapes):
            classes_B, classes_K = (s[str(LOGITS)].argmax(-1) for s in (targets.signals, targets.negatives))
            usable_BK &= classes_B[:, None] != classes_K[None]
        own_BD, positive_BD, negatives_KD = (
            losses.direction(wide(project(projections, side, states)))
            for side, states in (("student", own), ("teacher", positive), ("teacher", negative))
        )
        if self.form == "infonce":
            loss = losses.info_nce(own_BD, positive_BD, negatives_KD, usable_BK, temperature=self.temperature)
            return {"codir": loss}
        with torch.no_grad():
            alike = torch.cat([part.flatten() for part in losses.similarities(own_BD, positive_BD, negatives_KD)])
            scale = projections["scale"]((alike / self.temperature).exp().mean())
        loss = losses.noise_contrastive(
            own_BD, positive_BD, negatives_KD, usable_BK, temperature=self.temperature, scale=scale
        )
        return {"codir": loss}


class _Scale(nn.Module):
    """Keeps the first value it is shown, in checkpoints too, and returns it from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    def forward(self, shown: Tensor) -> Tensor:
        value = self.get_buffer("value")
        if not value:
            value.copy_(shown)
            if distributed.is_available() and distributed.is_initialized():
                # Every rank is shown its own slice of the first step.
                distributed.broadcast(value, src=0)
        return value


def _layers(text: str, num_layers: int, option: str) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(1, num_layers + 1))
    pieces = text.split("+")
    if not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"option {option!r} of method 'codir' is {text!r}; expected layers like 1+3+5")
    layers = tuple(map(int, pieces))
    if max(layers) > num_layers:
        raise UsageError(f"option {option!r} of method 'codir' names layer {max(layers)}; there are 0 to {num_layers}")
    return layers
