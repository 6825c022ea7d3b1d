"""Schedules: numbers that change from step to step of a phase, written `linear:start=4:end=1`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass
from typing import ClassVar

from ...pipeline.errors import UsageError, near_match
from .registry import Registry, join_options, split_options


class Schedule(ABC):
    """Base of the schedules. A subclass is a frozen dataclass of options, entered with `@schedules.register(name)`."""

    name: ClassVar[str]

    @abstractmethod
    def at(self, step: int, num_steps: int) -> float:
        """The value at a step, counted from 0, of a phase of so many steps."""

    def __str__(self) -> str:
        return join_options(self.name, self)


schedules: Registry[Schedule] = Registry("schedule")


@schedules.register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same at every step."""

    value: float

    def at(self, step: int, num_steps: int) -> float:
        return self.value


@schedules.register("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """From `start` at the first step in equal parts to `end` at the last one.

    >>> [Linear(start=4, end=1).at(step, 4) for step in range(4)]
    [4.0, 3.0, 2.0, 1.0]
    """

    start: float
    end: float

    def at(self, step: int, num_steps: int) -> float:
        return self.start + (self.end - self.start) * min(step / max(num_steps - 1, 1), 1.0)


@schedules.register("annealing")
@dataclass(frozen=True, kw_only=True)
class Annealing(Schedule):
    """From `start` to `end` in stages of as many steps each; 0 makes as many stages as there are whole numbers.

    A temperature cools as in Annealing-KD (Jafari et al., arXiv 2104.07163): 10, 9, ..., 1, each for a while.

    >>> [Annealing(start=3, end=1).at(step, 6) for step in range(6)]
    [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    """

    start: float
    end: float
    stages: int = 0

    def __post_init__(self) -> None:
        if self.stages < 0:
            raise UsageError(f"option 'stages' of schedule 'annealing' is {self.stages}; expected 0 or more")

    def at(self, step: int, num_steps: int) -> float:
        stages = self.stages or round(abs(self.start - self.end)) + 1
        stage = min(step * stages // max(num_steps, 1), stages - 1)
        return self.start + (self.end - self.start) * stage / max(stages - 1, 1)


def parse_schedule(text: str) -> Schedule:
    """A schedule from its text: `constant:value=3`, `linear:start=4:end=1`, `annealing:start=10:end=1[:stages=5]`.

    Raises:
        UsageError: an unknown name or option (near matches are named), one that is missing, or no number.
    """
    name, words, options = split_options(text, "schedule")
    if name not in schedules:
        raise UsageError(f"unknown schedule {name!r}{near_match(name, schedules)}")
    if words:
        raise UsageError(f"{words[0]!r} in the schedule {text!r} is no option", fix="options are written key=value")
    fields = dataclasses.fields(schedules[name])  # type: ignore[arg-type]
    missing = [field.name for field in fields if field.default is MISSING and field.name not in options]
    if missing:
        raise UsageError(f"the schedule {text!r} lacks {' and '.join(missing)}")
    return schedules.make(name, options)
