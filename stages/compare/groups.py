"""Which runs are one row of the table, and which baselines a distilled row is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipeline.artifact import open_artifact
from ...pipeline.errors import RefusedError, near_match
from ...pipeline.fingerprint import fingerprint
from ..metrics import LOWER_IS_BETTER, main_metric

RANDOM, AGREEMENT = "random", "agreement"


@dataclass(frozen=True)
class Run:
    """What a run's manifest says.

    Attributes:
        path: its folder.
        fingerprint: of everything that made it.
        identity: what that is a hash of.
        role: "baseline" or "distilled".
        student, init, method: as the user would write them.
        views: fingerprints of what it was trained on.
        view_names: the names of their folders.
        seed, steps: of its training.
        rows: rows that it was trained on; None if unknown.
        seconds: wall time of its training; None if unknown.
        budget: what a fair baseline shares: steps asked for, rows per step, gold rows, learning rate.
        evaluated_on: what its own metrics were measured on; None when nothing was.
        content: the kind-specific part of the manifest.
    """

    path: Path
    fingerprint: str
    identity: Mapping[str, Any]
    role: str
    student: str
    init: str
    method: str
    views: tuple[str, ...]
    view_names: tuple[str, ...]
    seed: int
    steps: int
    rows: int | None
    seconds: float | None
    budget: Mapping[str, Any]
    evaluated_on: str | None
    content: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The options that are part of its identity."""
        return dict(self.identity.get("config", {}))

    def key_without(self, *options: str) -> str:
        """Hash of everything that made it but these options."""
        config = {name: value for name, value in self.config.items() if name not in options}
        return fingerprint({**self.identity, "config": config})


@dataclass(frozen=True)
class Tried:
    """One point of a search.

    Attributes:
        options: the values of the searched options.
        metric, score: mean over the seeds of what the runs themselves measured, on their validation rows.
        seeds: how many.
    """

    options: Mapping[str, Any]
    metric: str
    score: float
    seeds: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; the best of those that differ in searched options too.

    Attributes:
        runs: by seed.
        tried: every point of the search, the chosen one first; none where nothing was searched.
    """

    runs: tuple[Run, ...]
    tried: tuple[Tried, ...] = ()

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
    return Run(
        path=artifact.path,
        fingerprint=artifact.fingerprint,
        identity=manifest.get("identity", {}),
        role=content["role"],
        student=content["student"],
        init=content["init"],
        method=content["method"],
        views=tuple(content.get("view", ())),
        view_names=tuple(
            str(path).rstrip("/").rpartition("/")[2] for path in manifest.get("config", {}).get("view") or ()
        ),
        seed=content["seed"],
        steps=content["steps"],
        rows=manifest.get("summary", {}).get("rows"),
        seconds=manifest.get("summary", {}).get("seconds"),
        budget=content.get("budget", {"max_steps": content["steps"]}),
        evaluated_on=manifest.get("summary", {}).get("evaluated_on"),
        content=content,
    )


def make_groups(runs: Sequence[Run], *, search: Sequence[str] = (), search_metric: str | None = None) -> list[Group]:
    """Groups in the order floor, start, distilled; inside a role in the order given; a run given twice counts once.

    Args:
        search: options of train-student that were tried with several values. Of runs that differ in these alone, the
            values with the best mean validation score stay; the same seeds must have been run with all of them.
        search_metric: that score. Rows whose runs have none of it, and all rows when not given, are chosen by the
            task's main metric, or by agreement with the teacher where they have none of that either.

    Raises:
        RefusedError: runs of different tasks, an option that no run has, or runs that cannot be chosen among.
    """
    tasks = {run.content["task"]: run.path for run in runs}
    if len(tasks) > 1:
        raise RefusedError(
            "these runs do different tasks and cannot be compared",
            details=[f"{task}: {path}" for task, path in tasks.items()],
        )
    for name in search:
        if any(name not in run.config for run in runs):
            known = sorted(set.intersection(*(set(run.config) for run in runs)))
            raise RefusedError(f"--search {name}: not an option of these runs{near_match(name, known)}")
    if search_metric is not None and all(_validated(run, search_metric) is None for run in runs):
        measured = {name for run in runs for name in run.content.get("metrics", {})}
        raise RefusedError(
            f"--search-metric {search_metric}: no run has such a validation score{near_match(search_metric, measured)}"
        )
    members: dict[str, dict[str, dict[str, Run]]] = {}
    for run in runs:
        row, point = run.key_without("seed", *search), run.key_without("seed")
        members.setdefault(row, {}).setdefault(point, {}).setdefault(run.fingerprint, run)
    groups = [_best([*found.values()], search, search_metric) for found in members.values()]
    order = {"floor": 0, "start": 1, "distilled": 2}
    return sorted(groups, key=lambda group: order[group.role])


def _best(points: Sequence[Mapping[str, Run]], search: Sequence[str], search_metric: str | None) -> Group:
    """The group of the point with the best validation score; on a tie the one given first."""
    groups = [tuple(sorted(found.values(), key=lambda run: run.seed)) for found in points]
    if len(groups) == 1:
        return Group(groups[0])
    first = groups[0][0]
    seeds = {tuple(run.seed for run in group) for group in groups}
    if len(seeds) > 1:
        raise RefusedError(
            f"the search over {', '.join(search)} is not complete: {first.student} from {first.init}, {first.method}",
            details=[
                f"{_point(group[0], search)}: seeds {', '.join(str(run.seed) for run in group)}" for group in groups
            ],
            fix="run every value with the same seeds",
        )
    members = [run for group in groups for run in group]
    main = main_metric(first.content["task"], first.content.get("label_names") or ())
    wanted = [*([search_metric] if search_metric else []), main, AGREEMENT]
    metric = next((name for name in wanted if all(_validated(run, name) is not None for run in members)), None)
    if metric is None:
        raise RefusedError(
            f"{first.path} and the runs beside it have no validation score in common, so nothing can be chosen by it",
            fix="train them with --validation-fraction or --eval-dataset, or leave --search out",
        )
    tried = [
        Tried(_point(group[0], search), metric, _mean(run.content["metrics"][metric] for run in group), len(group))
        for group in groups
    ]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    order = sorted(range(len(groups)), key=lambda index: -sign * tried[index].score)
    return Group(groups[order[0]], tuple(tried[index] for index in order))


def _validated(run: Run, metric: str) -> float | None:
    """What a run measured on its validation rows; None where it did not."""
    found: float | None = run.content.get("metrics", {}).get(metric)
    return found


def _point(run: Run, search: Sequence[str]) -> dict[str, Any]:
    return {name: run.config[name] for name in search}


def _mean(values: Iterable[float]) -> float:
    found = [*values]
    return sum(found) / len(found)


def told_apart_by_view(group: Group, groups: Sequence[Group]) -> str | None:
    """The names of a group's views, where another group differs from it in these; None where nothing needs them."""

    def written(of: Group) -> tuple[str, ...]:
        return (of.role, of.first.student, of.first.init, of.first.method)

    names = group.first.view_names
    twins = [other for other in groups if written(other) == written(group) and other.first.views != group.first.views]
    return "+".join(names) if names and any(other.first.view_names != names for other in twins) else None


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


def plain_soft_targets(group: Group, groups: Sequence[Group]) -> Group | None:
    """The row with no other method than soft targets and gold labels that a distilled group is to beat.

    Of the same student, start, rows and steps; None for a row that is one itself, and where there is none or several.
    """
    first = group.first
    if group.role != "distilled" or _is_plain(first):
        return None
    found = [
        other
        for other in groups
        if other.role == "distilled"
        and _is_plain(other.first)
        and (other.first.student, other.first.init, other.first.views, other.first.steps)
        == (first.student, first.init, first.views, first.steps)
    ]
    return found[0] if len(found) == 1 else None


def _is_plain(run: Run) -> bool:
    names = {term.partition(":")[0] for phase in run.method.split(" > ") for term in phase.split(",")}
    return "soft-target" in names and names <= {"soft-target", "hard"} and " > " not in run.method
