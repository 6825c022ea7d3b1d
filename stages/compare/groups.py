"""Which runs are one row of the table, and which baselines a distilled row is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipeline.artifact import open_artifact
from ...pipeline.errors import RefusedError
from ...pipeline.fingerprint import fingerprint

RANDOM = "random"


@dataclass(frozen=True)
class Run:
    """What a run's manifest says.

    Attributes:
        path: its folder.
        fingerprint: of everything that made it.
        group_key: the same without the seed.
        role: "baseline" or "distilled".
        student, init, method: as the user would write them.
        views: fingerprints of what it was trained on.
        seed, steps: of its training.
        rows: rows that it was trained on; None if unknown.
        seconds: wall time of its training; None if unknown.
        budget: what a fair baseline shares: steps asked for, rows per step, gold rows, learning rate.
        content: the kind-specific part of the manifest.
    """

    path: Path
    fingerprint: str
    group_key: str
    role: str
    student: str
    init: str
    method: str
    views: tuple[str, ...]
    seed: int
    steps: int
    rows: int | None
    seconds: float | None
    budget: Mapping[str, Any]
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """One of them, for everything but the seed."""
        return self.runs[0]

    @property
    def role(self) -> str:
        """ "floor" (random start, gold labels), "start" (another start, gold labels) or "distilled"."""
        if self.first.role == "distilled":
            return "distilled"
        return "floor" if self.first.init == RANDOM else "start"


def read_run(path: str | Path) -> Run:
    """A run by its folder.

    Raises:
        RefusedError: not a finished run.
    """
    artifact = open_artifact(path, kind="run")
    manifest, content = artifact.manifest, artifact.content
    identity = dict(manifest.get("identity", {}))
    config = {name: value for name, value in identity.get("config", {}).items() if name != "seed"}
    return Run(
        path=artifact.path,
        fingerprint=artifact.fingerprint,
        group_key=fingerprint({**identity, "config": config}),
        role=content["role"],
        student=content["student"],
        init=content["init"],
        method=content["method"],
        views=tuple(content.get("view", ())),
        seed=content["seed"],
        steps=content["steps"],
        rows=manifest.get("summary", {}).get("rows"),
        seconds=manifest.get("summary", {}).get("seconds"),
        budget=content.get("budget", {"max_steps": content["steps"]}),
        content=content,
    )


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order floor, start, distilled; inside a role in the order given; a run given twice counts once.

    Raises:
        RefusedError: runs of different tasks.
    """
    tasks = {run.content["task"]: run.path for run in runs}
    if len(tasks) > 1:
        raise RefusedError(
            "these runs do different tasks and cannot be compared",
            details=[f"{task}: {path}" for task, path in tasks.items()],
        )
    members: dict[str, dict[str, Run]] = {}
    for run in runs:
        members.setdefault(run.group_key, {}).setdefault(run.fingerprint, run)
    groups = [Group(tuple(sorted(found.values(), key=lambda run: run.seed))) for found in members.values()]
    order = {"floor": 0, "start": 1, "distilled": 2}
    return sorted(groups, key=lambda group: order[group.role])


def baselines(group: Group, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """`(floors, starts)` of a distilled group: the same student on gold labels, from a random and from the same start.

    Where there are baselines of as many steps, others are left out; several may remain (other learning rates, say).
    For a group that itself starts at random the two are the same.
    """
    peers = [other for other in groups if other.first.role == "baseline" and other.first.student == group.first.student]

    def from_start(init: str) -> list[Group]:
        found = [other for other in peers if other.first.init == init]
        same_budget = [other for other in found if other.first.steps == group.first.steps]
        return same_budget or found

    return from_start(RANDOM), from_start(group.first.init)
