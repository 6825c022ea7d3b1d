"""When a phase has converged: `loss:patience=3:every=50`, `fitnets:improvement=0.02`, `ir-kd.cosine:below=0.05`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...pipeline.errors import UsageError, near_match
from .registry import Registry, join_options, split_options

LOSS = "loss"


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """A phase ends, before its last step, when what is watched has stopped falling.

    It is averaged over windows of `every` steps (below 1, a share of the phase's). The phase ends with a window that is
    below `below`; or with the `patience`-th in a row that is not below the lowest one before by at least the share
    `improvement` of it (0 waits for `below` alone).

    Attributes:
        of: "loss", the weighted sum, or terms by the beginning of their names, "ir-kd.cosine": their unweighted sum.
    """

    of: str = LOSS
    every: float = 0.05
    patience: int = 3
    improvement: float = 0.01
    below: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("every", None), ("patience", 0), ("improvement", 0), ("below", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
                expected = "a number above 0" if least is None else "0 or more"
                raise UsageError(f"option {name!r} of a rule of convergence is {value:g}; expected {expected}")
        if not (self.patience or self.below):
            raise UsageError(
                "a rule of convergence without patience and below would never hold", fix="give one of them"
            )

    def __str__(self) -> str:
        name, *options = join_options(self.of, self).split(":")
        return ":".join([name, *(option for option in options if not option.startswith("of="))])

    def callback(self, num_steps: int) -> ConvergenceCallback:
        """What watches a phase of so many steps."""
        every = int(self.every) if self.every >= 1 else max(1, round(self.every * num_steps))
        return ConvergenceCallback(self.of, every, self.patience, self.improvement, self.below)


_rules: Registry[Convergence] = Registry("rule of convergence")
_rules.register("until")(Convergence)


def parse_convergence(text: str) -> Convergence:
    """A rule from its text, `WATCHED[:option=value]...`.

    Raises:
        UsageError: an unknown option (near matches are named), or a value that makes no sense.
    """
    of, words, options = split_options(text, "rule of convergence")
    if words or "of" in options:
        raise UsageError(f"{(words or ['of'])[0]!r} in {text!r} is no option", fix="options are written key=value")
    return _rules.make("until", {**options, "of": of})


class ConvergenceCallback(TrainerCallback, ExportableState):
    """Ends training when a rule holds. What it knows is in every checkpoint, so a resume ends with the same step.

    Args:
        every: steps of a window.

    Attributes:
        ended: the step that the rule held after, or None.
    """

    def __init__(self, of: str, every: int, patience: int, improvement: float, below: float) -> None:
        self.of, self.every, self.patience = of, every, patience
        self.improvement, self.below = improvement, below
        self.total: float | Tensor = 0.0
        self.count = 0
        self.lowest: float | None = None
        self.waited = 0
        self.ended: int | None = None

    def watched(self, loss: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """What the rule is about, of one forward pass.

        Raises:
            UsageError: no term is called so.
        """
        if self.of == LOSS:
            return loss.detach()
        found = [
            value for name, value in terms.items() if name == self.of or name.startswith((self.of + ".", self.of + "#"))
        ]
        if not found:
            raise UsageError(f"`until` watches {self.of!r}, and there is no such term{near_match(self.of, terms)}")
        return sum(found[1:], start=found[0])

    def see(self, value: Tensor) -> None:
        """Take one forward pass into account, the same number on all ranks; it stays on its device."""
        self.total = self.total + value
        self.count += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        mean, self.total, self.count = float(self.total) / self.count, 0.0, 0
        if self.lowest is None or mean < self.lowest * (1 - self.improvement):
            self.lowest, self.waited = mean, 0
        else:
            self.waited += 1
        if mean < self.below or 0 < self.patience <= self.waited:
            self.ended = state.global_step
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """As transformers keeps it in a checkpoint."""
        arguments = ("of", "every", "patience", "improvement", "below")
        known = {name: getattr(self, name) for name in ("count", "lowest", "waited", "ended")}
        return {
            "args": {name: getattr(self, name) for name in arguments},
            "attributes": {**known, "total": float(self.total)},
        }


def had_ended(callbacks: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of the step after which training ended by a rule, before its last step.

    Args:
        callbacks: `stateful_callbacks` of its `trainer_state.json`.
    """
    rule = callbacks.get(ConvergenceCallback.__name__, {}).get("attributes", {})
    waiting = callbacks.get("EarlyStoppingCallback", {})
    patience = waiting.get("args", {}).get("early_stopping_patience", math.inf)
    return rule.get("ended") is not None or (
        waiting.get("attributes", {}).get("early_stopping_patience_counter", 0) >= patience
    )
