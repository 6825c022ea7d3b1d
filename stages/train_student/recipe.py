"""Recipes: a training in phases, read from a file and checked before anything loads.

    name: hint, then soft targets
    phases:
      - name: hint
        method: fitnets:layer_map=1-2
        share: 0.3
        trainable: [embeddings, layers<=1, projections]
      - name: kd
        method: hard, soft-target:4:temperature=3
        share: 0.7
        schedules: {soft-target.weight: "linear:start=4:end=1"}

A phase has its methods, its length (`share` of all steps, or its own `max_steps` or `num_train_epochs`; less, where it
converges by its rule `until`), and what it trains. In texts `{middle}` and `{last}` stand for layers of the student.
With `per_layer` an entry stands for one phase per layer of the student, bottom first; its texts may then hold
`{layer}`, `{pair}` (that layer and its teacher layer) and `{pairs}` (those up to it).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...pipeline.config import parse_values
from ...pipeline.errors import KdError, UsageError, near_match
from ...pipeline.settings import Settings, is_positive, read_settings
from ...pipeline.store.signal import Signal
from ..training_options import TrainingOptions
from .convergence import LOSS, Convergence, parse_convergence
from .methods import Method, Shapes, Term, parse_methods
from .methods.hard import Hard
from .methods.layer_maps import layer_pairs
from .multipliers import Multiplier, parse_multipliers
from .parts import Part, Place, lowest_first, parse_parts
from .schedules import Schedule, parse_schedule

if TYPE_CHECKING:
    from .stage import TrainStudent

OPTIONS = (
    *("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "load_best_model_at_end", "early_stopping_patience"),
)
"""Options of train-student that a phase may have for itself."""
KEYS = (
    *("name", "method", "share", *OPTIONS, "until"),
    *("lr_multipliers", "trainable", "unfreeze_every", "schedules", "per_layer"),
)
OF_SELECTION = ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One leg of training.

    Attributes:
        name: unique in the recipe; empty where there is no recipe.
        terms: methods and weights.
        share: of all steps, or None where the options say how long it is.
        options: of train-student, that hold in this phase.
        until: when it ends before its last step; None is never.
        multipliers: of the learning rate, by part.
        trainable: what is trained; None is everything that the student's start leaves trainable.
        unfreeze_every: steps (below 1, a share of the phase) after which one more part is trained, the top one first;
            None trains all of them from the beginning.
        schedules: by "METHOD.weight" or "METHOD.OPTION".
        selects: whether it is evaluated and ends with the best checkpoint.
    """

    name: str = ""
    terms: tuple[Term, ...]
    share: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    until: Convergence | None = None
    multipliers: tuple[Multiplier, ...] = ()
    trainable: tuple[Part, ...] | None = None
    unfreeze_every: float | None = None
    schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    selects: bool = True

    @property
    def method(self) -> str:
        """The methods as text, weights and options included."""
        return ",".join(map(str, self.terms))

    @cached_property
    def gold_alone(self) -> bool:
        """Whether gold labels are all that it learns from."""
        return all(isinstance(term.method, Hard) for term in self.terms)

    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        """Teacher signals that its methods need, each once."""
        return tuple(dict.fromkeys(signal for term in self.terms for signal in term.method.signals(shapes)))

    def terms_at(self, step: int, num_steps: int) -> tuple[Term, ...]:
        """The terms with what the schedules say of a step."""
        if not self.schedules:
            return self.terms
        values = {key: schedule.at(step, num_steps) for key, schedule in self.schedules.items()}
        return tuple(_scheduled(term, values) for term in self.terms)

    def places_at(self, step: int, num_steps: int, num_layers: int) -> list[Place] | None:
        """Places of the student that a step trains while they are unfrozen one by one; None without unfreezing."""
        if self.unfreeze_every is None:
            return None
        every = self.unfreeze_every if self.unfreeze_every >= 1 else max(1, round(self.unfreeze_every * num_steps))
        places = lowest_first(self.trainable, num_layers)
        return places[max(0, len(places) - 1 - step // int(every)) :]

    def stage(self, stage: TrainStudent) -> TrainStudent:
        """The training options that hold in this phase."""
        left_out = {} if self.selects else {**dict.fromkeys(OF_SELECTION), "early_stopping_patience": None}
        return dataclasses.replace(stage, **{**left_out, **self.options})

    def to_config(self) -> dict[str, Any]:
        """What a recipe file would say of it, JSON-ready."""
        config: dict[str, Any] = {"name": self.name, "method": self.method}
        if self.share is not None:
            config["share"] = self.share
        config |= self.options
        if self.until is not None:
            config["until"] = str(self.until)
        if self.multipliers:
            config["lr_multipliers"] = [str(multiplier) for multiplier in self.multipliers]
        if self.trainable is not None:
            config["trainable"] = [part.text for part in self.trainable]
        if self.unfreeze_every is not None:
            config["unfreeze_every"] = self.unfreeze_every
        if self.schedules:
            config["schedules"] = {key: str(schedule) for key, schedule in self.schedules.items()}
        return config


def _scheduled(term: Term, values: Mapping[str, float]) -> Term:
    """The term with the values that are for it."""
    prefix = term.method.name + "."
    mine = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    weight = mine.pop("weight", term.weight)
    method: Any = term.method
    return Term(weight, dataclasses.replace(method, **mine) if mine else method)


def num_steps(phases: Sequence[Phase], *, total: int, steps_per_epoch: int) -> tuple[int, ...]:
    """Optimiser steps of every phase.

    Args:
        total: of all phases, where these have shares.
        steps_per_epoch: of the rows that a distilled run trains on.

    Raises:
        UsageError: a phase comes out with no step.
    """
    if phases[0].share is None:
        return tuple(
            int(phase.options.get("max_steps") or math.ceil(phase.options["num_train_epochs"] * steps_per_epoch))
            for phase in phases
        )
    ends, done = [], 0.0
    for phase in phases:
        assert phase.share is not None
        done += phase.share
        ends.append(round(total * done))
    steps = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    for phase, count in zip(phases, steps, strict=True):
        if count < 1:
            raise UsageError(
                f"phase {phase.name!r} has no step: its share {phase.share:g} of {total} steps in all",
                fix="train longer (--num-train-epochs, --max-steps), or give it a greater share",
            )
    return steps


def read_recipe(file: str, stage: TrainStudent, shapes: Shapes) -> tuple[Phase, ...]:
    """The phases in a file, checked against the two models.

    Args:
        file: YAML or JSON.
        stage: whose options hold where a phase has none of its own.
        shapes: of both models.

    Raises:
        UsageError: what is wrong, with its line; near matches for unknown names.
    """
    settings = read_settings(file)
    _check_keys(settings, ("name", "description", "phases"), "recipe")
    entries = settings.get("phases")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{settings.place('phases')}: `phases` is not a list of phases")
    phases: list[Phase] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Settings):
            raise UsageError(f"{settings.place('phases')}: phase {number} is not `key: value` lines")
        _check_keys(entry, KEYS, "phase")
        filled = _expanded(entry, shapes)
        for copy in filled:
            phase = _phase(copy, number, stage, shapes)
            share = None if phase.share is None else phase.share / len(filled)
            phases.append(dataclasses.replace(phase, share=share))
    names = [phase.name for phase in phases]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"{file}: two phases are called {twice[0]!r}", fix="give every phase a `name` of its own")
    _check_lengths(phases, file, stage)
    for phase in phases[:-1]:
        if "early_stopping_patience" in phase.options and not phase.selects:
            raise UsageError(
                f"{file}: phase {phase.name!r} is not evaluated, and early_stopping_patience counts evaluations",
                fix="load_best_model_at_end: true evaluates it, or give it a rule on its loss: until: loss",
            )
    phases[-1] = dataclasses.replace(phases[-1], selects=True)
    return tuple(phases)


def _check_keys(settings: Settings, known: Sequence[str], noun: str) -> None:
    for key in settings:
        if key not in known:
            raise UsageError(f"{settings.place(key)}: a {noun} has no key {key!r}{near_match(str(key), known)}")


def _expanded(entry: Settings, shapes: Shapes) -> list[Settings]:
    """The entry, or one copy of it per layer, with placeholders filled."""
    rule, num_layers = entry.get("per_layer"), shapes.student_layers
    values = {"middle": str((num_layers + 1) // 2), "last": str(num_layers)}
    if rule is None:
        return [_filled(entry, values, entry.place())]
    place = entry.place("per_layer")
    if rule not in ("skip", "last"):
        raise UsageError(f"{place}: per_layer is {rule!r}; expected skip or last, a layer map")
    pairs = [f"{m}-{g}" for m, g in layer_pairs(rule, shapes, where=f"{place}: per_layer")]
    name = str(entry.get("name", "layer"))
    if "{layer}" not in name:
        name += "-{layer}"
    copies = []
    for layer, pair in enumerate(pairs, 1):
        of_layer = {**values, "layer": str(layer), "pair": pair, "pairs": "+".join(pairs[:layer])}
        copy = _filled(entry, of_layer, entry.place())
        copy["name"] = _filled(name, of_layer, entry.place("name"))
        copies.append(copy)
    return copies


def _filled(value: Any, values: Mapping[str, str], place: str) -> Any:
    if isinstance(value, Settings):
        filled = Settings({key: _filled(item, values, value.place(key)) for key, item in value.items()})
        filled.file, filled.lines = value.file, value.lines
        return filled
    if isinstance(value, list):
        return [_filled(item, values, place) for item in value]
    if not isinstance(value, str):
        return value

    def fill(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise UsageError(f"{place}: {found[0]} stands for nothing{near_match(found[1], values)}")
        return values[found[1]]

    return re.sub(r"\{(\w*)\}", fill, value)


def _phase(entry: Settings, number: int, stage: TrainStudent, shapes: Shapes) -> Phase:
    name = str(entry.get("name", f"phase-{number}"))
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UsageError(f"{entry.place('name')}: name {name!r} is not letters, digits, '.', '_' and '-'")

    def checked(key: str, parse: Any) -> Any:
        try:
            return parse(entry[key])
        except KdError as error:
            what = f"{entry.place(key)}: {key} of phase {name!r}: {error.what}"
            raise type(error)(what, details=error.details, fix=error.fix) from None

    if "method" not in entry:
        raise UsageError(f"{entry.place(next(iter(entry), None))}: phase {name!r} has no `method`", fix="kd methods")
    terms: tuple[Term, ...] = checked("method", lambda given: parse_methods(_texts(given)))
    checked("method", lambda _: [term.method.signals(shapes) for term in terms])
    options = parse_values(
        TrainingOptions,
        {key: entry[key] for key in OPTIONS if entry.get(key) is not None},
        named=lambda key: f"{entry.place(key)}: {key} of phase {name!r}",
    )
    phase = Phase(
        name=name,
        terms=terms,
        share=checked("share", _positive) if "share" in entry else None,
        options=options,
        until=checked("until", lambda text: _until(text, terms)) if "until" in entry else None,
        multipliers=checked("lr_multipliers", lambda given: parse_multipliers(given, num_layers=shapes.student_layers))
        if "lr_multipliers" in entry
        else parse_multipliers(stage.lr_multipliers, num_layers=shapes.student_layers),
        trainable=checked("trainable", lambda given: parse_parts(_texts(given), num_layers=shapes.student_layers))
        if "trainable" in entry
        else None,
        unfreeze_every=checked("unfreeze_every", _positive) if "unfreeze_every" in entry else None,
        schedules=checked("schedules", lambda given: _schedules(given, terms)) if "schedules" in entry else {},
        selects=bool(options.get("load_best_model_at_end")),
    )
    try:
        phase.stage(stage).check_training_options(has_eval=stage.has_eval)
    except UsageError as error:
        raise UsageError(f"{entry.place()}: phase {name!r}: {error.what}", fix=error.fix) from None
    _check_reached(phase, shapes, entry)
    if "lr_multipliers" in entry:
        _check_multiplied(phase, shapes, entry)
    return phase


def _texts(value: Any) -> str | list[str]:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return value
    raise UsageError(f"{value!r} is not a text or a list of texts")


def _until(text: Any, terms: Sequence[Term]) -> Convergence:
    rule = parse_convergence(str(text))
    known = [LOSS, *(term.method.name for term in terms)]
    if rule.of.partition(".")[0] not in known:
        raise UsageError(f"{rule.of!r} is nothing that is watched here{near_match(rule.of, known)}")
    return rule


def _positive(value: Any) -> float:
    if not is_positive(value):
        raise UsageError(f"{value!r} is not a number above 0")
    number: float = value
    return number


def _schedules(given: Any, terms: Sequence[Term]) -> dict[str, Schedule]:
    """The schedules of a phase by what they change."""
    if not isinstance(given, Mapping):
        raise UsageError("not `METHOD.OPTION: schedule` lines")
    known = {f"{term.method.name}.{option}": term for term in terms for option in ("weight", *_numbers(term.method))}
    found = {}
    for key, text in given.items():
        if key not in known:
            name, _, option = str(key).partition(".")
            of_method = [other for other in known if other.startswith(f"{name}.")]
            what = f"method {name!r} has no {option!r} to change" if of_method else f"{key!r} is nothing to change here"
            raise UsageError(f"{what}{near_match(str(key), of_method or known)}", details=[f"here: {', '.join(known)}"])
        schedule = parse_schedule(str(text))
        for step in range(2):
            value = schedule.at(step, 2)
            if str(key).endswith(".weight"):
                if not 0 <= value < math.inf:
                    raise UsageError(f"{key} would be {value:g}; expected a number from 0 on")
            else:
                _scheduled(known[key], {str(key): value})
        found[str(key)] = schedule
    return found


def _numbers(method: Method) -> list[str]:
    """Options of a method that are numbers on a scale."""
    return [field.name for field in dataclasses.fields(method) if field.type in ("float", float)]  # type: ignore[arg-type]


def _check_lengths(phases: Sequence[Phase], file: str, stage: TrainStudent) -> None:
    own = [phase for phase in phases if {"max_steps", "num_train_epochs"} & phase.options.keys()]
    shares = [phase for phase in phases if phase.share is not None]
    both = [p.name for p in own if p.share is not None or {"max_steps", "num_train_epochs"} <= p.options.keys()]
    if both:
        raise UsageError(
            f"{file}: phase {both[0]!r} says twice how long it is", fix="share, max_steps or num_train_epochs"
        )
    if not own and not shares:
        raise UsageError(f"{file}: no phase says how long it is", fix="give every phase a `share` of all steps")
    if len(own) not in (0, len(phases)) or len(shares) not in (0, len(phases)):
        kind, others = ("a share", shares) if shares else ("a length", own)
        other = next(phase.name for phase in phases if phase not in others)
        raise UsageError(
            f"{file}: phase {others[0].name!r} has {kind}, and phase {other!r} has none",
            fix="give every phase a `share`, or every phase its own max_steps or num_train_epochs",
        )
    total = sum(phase.share or 0.0 for phase in phases)
    if shares and not math.isclose(total, 1.0, abs_tol=1e-6):
        listed = ", ".join(f"{phase.name} {phase.share:g}" for phase in phases)
        raise UsageError(f"{file}: the shares of the phases sum to {total:g}; expected 1", details=[listed])
    given = [name for name in ("max_steps", "num_train_epochs") if getattr(stage, name) is not None]
    if own and given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} and phases with lengths of their own exclude each other",
            fix=f"leave it out, or give the phases of {file} a `share` each",
        )


def _check_multiplied(phase: Phase, shapes: Shapes, entry: Settings) -> None:
    """Every part that a phase gives a learning rate of its own is trained in it."""
    places = lowest_first(phase.trainable, shapes.student_layers)
    if phase.trainable is None or any(Place("projections") in part for part in phase.trainable):
        places.append(Place("projections"))
    for multiplier in phase.multipliers:
        if not any(place in multiplier.part for place in places):
            trained = ", ".join(map(str, places))
            raise UsageError(
                f"{entry.place('lr_multipliers')}: phase {phase.name!r} trains {trained}, not {multiplier.part.text}"
            )


def _check_reached(phase: Phase, shapes: Shapes, entry: Settings) -> None:
    """Something of what is trained from the first step on has an effect on what the methods read."""
    top = shapes.student_layers + 1
    reads = [name.partition("@") for term in phase.terms for name in term.method.reads(shapes)]
    highest = max(int(layer) if at else top for _, at, layer in reads)
    places = phase.places_at(0, 1, shapes.student_layers) or lowest_first(phase.trainable, shapes.student_layers)
    heights = [{"embeddings": 0, "layers": place.layer, "head": top}[place.name] for place in places]
    if any(height <= highest for height in heights):
        return
    projections = phase.trainable is None or any(Place("projections") in part for part in phase.trainable)
    if not projections or not any(len(term.method.projections(shapes)) for term in phase.terms):
        key = "trainable" if phase.trainable is not None else "unfreeze_every"
        trained = ", ".join(map(str, places)) or "no part of the student"
        raise UsageError(
            f"{entry.place(key)}: phase {phase.name!r} begins with training {trained}, and its methods read only what "
            f"is below: {', '.join(''.join(name) for name in reads)}"
        )
