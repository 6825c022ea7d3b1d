"""Between the phases of a training: what a phase freezes and schedules, what it hands on, and which ones are done."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ...pipeline.artifact import atomic_write_bytes
from ..training_options import CHECKPOINTS, newest_checkpoint
from .parts import Part, Place, place_of
from .recipe import Phase
from .trainer import Distillation, tied_names

RECORD, TENSORS = "phase.json", "phase.safetensors"


# --- within a phase ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training_only(distillation: Distillation, parts: Sequence[Part] | None) -> Iterator[None]:
    """Inside, parameters of other parts have no gradient; so the optimiser that is made there leaves them alone."""
    frozen = [
        parameter
        for name, parameter in distillation.named_parameters()
        if parameter.requires_grad and parts is not None and not any(place_of(name) in part for part in parts)
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class PhaseCallback(TrainerCallback):
    """Before every step: the weights and options that schedules have for it, and the parts that are unfrozen by then.

    Make it inside `training_only`. All follows from the number of the step, so nothing of it is in a checkpoint.
    """

    def __init__(self, phase: Phase, distillation: Distillation, num_layers: int) -> None:
        self._phase, self._distillation, self._num_layers = phase, distillation, num_layers
        self._places = {
            parameter: place_of(name) for name, parameter in distillation.named_parameters() if parameter.requires_grad
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phase.schedules:
            self._distillation.set_terms(self._phase.terms_at(state.global_step, state.max_steps))
        places = self._phase.places_at(state.global_step, state.max_steps, self._num_layers)
        if places is not None:
            for parameter, place in self._places.items():
                parameter.requires_grad_(place in places or place == Place("projections"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self._places:
            parameter.requires_grad_(True)


# --- from phase to phase -----------------------------------------------------------------------------------------


class CarriedProjections:
    """Projections of methods that a later phase has again; those of others are dropped with their phase.

    Attributes:
        tensors: by method name and name in its projections.
    """

    def __init__(self, tensors: dict[str, Tensor] | None = None) -> None:
        self.tensors = tensors or {}

    def give(self, distillation: Distillation, phase: Phase) -> None:
        """Start a phase's projections from those of the same name and shape of the same method."""
        for term, projections in zip(phase.terms, distillation.projections, strict=True):
            own = projections.state_dict()
            found = {name: self.tensors.get(f"{term.method.name}/{name}") for name in own}
            alike = {name: kept for name, kept in found.items() if kept is not None and kept.shape == own[name].shape}
            projections.load_state_dict(alike, strict=False)

    def take(self, distillation: Distillation, phase: Phase, later: Sequence[Phase]) -> None:
        """Keep what a finished phase made and later ones go on with; drop the rest."""
        for term, projections in zip(phase.terms, distillation.projections, strict=True):
            for name, value in projections.state_dict().items():
                self.tensors[f"{term.method.name}/{name}"] = value.detach().cpu().clone()
        needed = {term.method.name for other in later for term in other.terms}
        self.tensors = {key: value for key, value in self.tensors.items() if key.partition("/")[0] in needed}


# --- on disk -----------------------------------------------------------------------------------------------------


def phase_folder(output_dir: str | Path, phases: Sequence[Phase], number: int) -> Path:
    """Where a phase keeps its checkpoints, and its end when others follow; a training without phases has one folder."""
    folder = Path(output_dir) / CHECKPOINTS
    return folder if len(phases) == 1 else folder / f"{number + 1}-{phases[number].name}"


@dataclass(frozen=True)
class Reached:
    """How far an interrupted training had come.

    Attributes:
        folders: of the phases that are done.
        checkpoint: to go on from in the next one, or None.
    """

    folders: tuple[Path, ...]
    checkpoint: Path | None


def reached(output_dir: str | Path, phases: Sequence[Phase]) -> Reached:
    """What `output_dir` holds of these phases; that it is of this very configuration, `execute` sees to."""
    folders = [phase_folder(output_dir, phases, number) for number in range(len(phases))]
    done = 0
    while done < len(phases) - 1 and (folders[done] / RECORD).is_file():
        done += 1
    return Reached(tuple(folders[:done]), newest_checkpoint(folders[done]))


def finish(folder: Path, student: PreTrainedModel, carried: CarriedProjections, facts: dict[str, Any]) -> None:
    """Keep the end of a phase that others follow, in place of its checkpoints.

    The record is written last and by rename: a phase is done when it has one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = tied_names(student)
    tensors = {
        f"student.{name}": value.detach().cpu() for name, value in student.state_dict().items() if name not in tied
    }
    tensors |= {f"projections.{name}": value for name, value in carried.tensors.items()}
    # The record is the proof that these are whole; a kill before it leaves the checkpoints to go on from.
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    atomic_write_bytes(folder / RECORD, json.dumps(facts).encode())
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def restore(folder: Path, student: nn.Module) -> CarriedProjections:
    """Put the student where a finished phase left it; what later phases go on with."""
    tensors = load_file(folder / TENSORS)
    own = {n.removeprefix("student."): v for n, v in tensors.items() if n.startswith("student.")}
    student.load_state_dict(own | {name: own[first] for name, first in tied_names(student).items()})
    kept = {n.removeprefix("projections."): v for n, v in tensors.items() if n.startswith("projections.")}
    return CarriedProjections(kept)


def facts_of(folder: Path) -> dict[str, Any]:
    """What `finish` was told of a phase."""
    facts: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
    return facts
