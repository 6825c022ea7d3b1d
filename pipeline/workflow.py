"""Workflows: a chain of stages in one YAML file, read, checked and expanded whole before anything runs.

    name: example
    variables: {data: "${workflow.dir}/data", seeds: [1, 2]}
    matrix: {seed: "${vars.seeds}"}
    steps:
      - id: teacher
        stage: train-teacher
        with: {dataset: "${vars.data}/train.parquet", model: minilm}
      - id: student
        stage: train-student
        with: {view: "${steps.view.output_dir}", seed: "${matrix.seed}"}

A step is one command; `with` holds its options. References: `${vars.NAME}`, `${matrix.AXIS}`, `${workflow.dir}` (of
the file), `${workflow.output_dir}`, `${steps.ID.output_dir}`, `${steps.ID.fingerprint}` and `.short_fingerprint` (known
when that step is done); `$${` is a plain `${`. A step runs after those it refers to, and after its `needs`. It is
expanded over the axes that it refers to and over its own `matrix`, whose axes set the options that are called like
them, and those in the `with` of their points; a reference to an expanded step means the instance with the same axes,
or all of them where an option takes a list.
"""

from __future__ import annotations

import graphlib
import heapq
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import build_stage, parse_values, stage_fields
from .errors import UsageError, near_match
from .settings import Settings, parse_yaml, read_settings
from .stage import Stage

_KEYS = ("name", "description", "variables", "output_dir", "matrix", "steps")
_STEP_KEYS = ("id", "stage", "with", "needs", "matrix")
_ATTRIBUTES = ("output_dir", "fingerprint", "short_fingerprint")
_REFERENCE = re.compile(r"\$(\$\{)|\$\{([^{}]*)\}")
# What is known only when another step is done stays in the values as this, to be filled in then.
_LATER = re.compile(r"\x00(short_)?fingerprint:([^\x00]+)\x00")

MAX_INSTANCES = 1000
"""Of one step: every one is a process, and a longer list is a slip in the matrix."""

Stages = Mapping[str, type[Stage]]


@dataclass(frozen=True)
class Step:
    """One command of a workflow: a step of the file at one point of its matrix.

    Attributes:
        id: `student`, or `student[seed=1]` when expanded.
        stage: what it runs.
        values: its options by field name; some may wait for fingerprints.
        needs: ids of the steps that have to be done before.
        output_dir: where its artifact goes; None for a stage that makes none.
    """

    id: str
    stage: type[Stage]
    values: Mapping[str, Any]
    needs: tuple[str, ...]
    output_dir: str | None

    def resolve(self, fingerprint_of: Callable[[str, bool], str]) -> Stage:
        """The stage with every value filled in.

        Args:
            fingerprint_of: step id, and whether the first 8 digits are meant → fingerprint of its artifact.
        """
        values = {name: _fill(value, fingerprint_of) for name, value in self.values.items()}
        return build_stage(self.stage, parse_values(self.stage, values, named=lambda name: f"{self.id}: {name}"))


@dataclass(frozen=True)
class Workflow:
    """A checked workflow; `steps` come in an order in which they may run."""

    name: str
    file: str
    output_dir: str
    steps: tuple[Step, ...]

    def only(self, names: Sequence[str]) -> Workflow:
        """The steps called `names` (as in the file, or one instance) and all that they need.

        Raises:
            UsageError: no such step.
        """
        by_id = {step.id: step for step in self.steps}
        wanted: set[str] = set()
        for name in names:
            found = [id for id in by_id if name in (id, id.split("[")[0])]
            if not found:
                known = {*by_id, *(id.split("[")[0] for id in by_id)}
                raise UsageError(f"{self.file} has no step {name!r}{near_match(name, known)}")
            wanted |= {*found}
        for step in reversed(self.steps):
            if step.id in wanted:
                wanted |= {*step.needs}
        return Workflow(self.name, self.file, self.output_dir, tuple(s for s in self.steps if s.id in wanted))


def read_workflow(
    file: str, stages: Stages, *, variables: Mapping[str, Any] | None = None, output_dir: str | None = None
) -> Workflow:
    """Read, check and expand a workflow file. Reads no other file.

    Args:
        file: the YAML file.
        stages: command → stage; the stages that a step may run.
        variables: values for the file's `variables`, over those it gives.
        output_dir: in place of the file's.

    Raises:
        UsageError: all that is wrong with the file, at once, with lines and near matches.
    """
    settings = read_settings(file)
    reader = _Reader(settings, file, stages)
    workflow = reader.read(variables or {}, output_dir)
    if reader.problems:
        problems = [*dict.fromkeys(reader.problems)]
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{file} has {count}; nothing was run", details=problems)
    assert workflow is not None
    return workflow


def parse_variable(text: str) -> tuple[str, Any]:
    """`name=value` as name and value; the value is read as YAML where it is a number, a list or true/false.

    >>> parse_variable("seeds=[1, 2]")
    ('seeds', [1, 2])

    Raises:
        UsageError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text!r} is not name=value")
    try:
        parsed = parse_yaml(value, "--set")
    except UsageError:
        parsed = value
    return name.strip().replace("-", "_"), value if isinstance(parsed, Settings) else parsed


class _Unresolved(Exception):
    """A reference that names nothing; its text is the problem."""


@dataclass(frozen=True)
class _Declared:
    """A step as the file has it, before expansion."""

    id: str
    place: str
    stage: type[Stage]
    options: Settings
    needs: tuple[str, ...]
    axes: Mapping[str, list[Any]]
    own_axes: tuple[str, ...]


class _Reader:
    def __init__(self, settings: Settings, file: str, stages: Stages) -> None:
        self.settings = settings
        self.file = file
        self.stages = stages
        self.problems: list[str] = []
        self.variables: dict[str, Any] = {}
        self.scope: dict[str, dict[str, Any]] = {}
        self.output_dir = ""
        self.declared: dict[str, _Declared] = {}
        self.points: dict[str, list[dict[str, Any]]] = {}

    def read(self, given: Mapping[str, Any], output_dir: str | None) -> Workflow | None:
        settings = self.settings
        self.check_keys(settings, _KEYS, "workflow")
        name = str(settings.get("name") or Path(self.file).stem)
        if not re.fullmatch(r"[\w.-]+", name):
            self.problems.append(f"{settings.place('name')}: name {name!r} is not letters, digits, '.', '_' and '-'")
        self.scope = {"vars": self.variables, "workflow": {"dir": _folder_of(self.file), "name": name}}
        self.read_variables(given)
        place = settings.place("output_dir")
        given_dir = self.substituted(settings.get("output_dir") or f"runs/{name}", self.scope, place)
        if not isinstance(given_dir, str):
            self.problems.append(f"{place}: output_dir is not a folder: {given_dir!r}")
        self.output_dir = output_dir or str(given_dir)
        self.scope["workflow"]["output_dir"] = self.output_dir
        axes = self.read_axes(settings.get("matrix"), settings.place("matrix"))
        steps = settings.get("steps")
        if not isinstance(steps, list) or not steps:
            self.problems.append(f"{settings.place('steps')}: `steps` is not a list of steps")
            return None
        for raw in steps:
            self.declare(raw, axes)
        if self.problems:
            return None
        for declared in self.declared.values():
            count = math.prod(map(len, declared.axes.values()))
            if count > MAX_INSTANCES:
                sizes = " x ".join(f"{len(values)} {axis}" for axis, values in declared.axes.items())
                self.problems.append(
                    f"{declared.place}: step {declared.id!r} would run {count} times ({sizes}); at most {MAX_INSTANCES}"
                )
        if self.problems:
            return None
        for declared in self.declared.values():
            self.points[declared.id] = [
                dict(zip(declared.axes, values, strict=True)) for values in itertools.product(*declared.axes.values())
            ]
        expanded = [
            self.expand(declared, point) for declared in self.declared.values() for point in self.points[declared.id]
        ]
        self.check_places(expanded)
        ordered = self.ordered(expanded)
        return Workflow(name, self.file, self.output_dir, tuple(ordered)) if not self.problems else None

    def check_keys(self, settings: Settings, known: Iterable[str], noun: str) -> None:
        for key in settings:
            if key not in known:
                self.problems.append(f"{settings.place(key)}: a {noun} has no key {key!r}{near_match(str(key), known)}")

    def read_variables(self, given: Mapping[str, Any]) -> None:
        raw = self.settings.get("variables") or Settings()
        place = self.settings.place("variables")
        if not isinstance(raw, Settings):
            self.problems.append(f"{place}: `variables` is not `name: value` lines")
            return
        for name in raw:
            if not isinstance(name, str):
                self.problems.append(f"{raw.place(name)}: the name of a variable is {name!r}, which is no word")
        unknown = [name for name in given if name not in raw]
        for name in unknown:
            self.problems.append(f"--set {name}: {self.file} has no variable {name!r}{near_match(name, map(str, raw))}")
        values = {**raw, **{name: value for name, value in given.items() if name in raw}}
        sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
        for name, value in values.items():
            sorter.add(str(name), *(_second(ref) for ref in _references(value) if ref.startswith("vars.")))
        try:
            order = [name for name in sorter.static_order() if name in values]
        except graphlib.CycleError as error:
            self.problems.append(f"{place}: variables refer to each other in a circle: {' → '.join(error.args[1])}")
            return
        for name in order:
            where = raw.place(name)
            self.variables[name] = self.substituted(values[name], self.scope, where)

    def read_axes(self, raw: Any, place: str) -> dict[str, list[Any]]:
        if raw is None:
            return {}
        if not isinstance(raw, Settings):
            self.problems.append(f"{place}: `matrix` is not `axis: [values]` lines")
            return {}
        axes: dict[str, list[Any]] = {}
        for axis, values in raw.items():
            values = self.substituted(values, self.scope, raw.place(axis))
            if not isinstance(values, list) or not values:
                self.problems.append(f"{raw.place(axis)}: axis {axis!r} is not a list with an entry")
                continue
            for value in values:
                options, where = _options(value), f"{raw.place(axis)}: axis {axis!r}: `with` of {_label(value)}"
                if not isinstance(options, Mapping):
                    self.problems.append(f"{where} is not `option: value` lines")
                elif {"output_dir", "output-dir"} & options.keys():
                    self.problems.append(f"{where} cannot say output_dir: each point has a folder of its own")
            labels = [_label(value) for value in values]
            if len({*labels}) < len(labels):
                self.problems.append(f"{raw.place(axis)}: axis {axis!r} has an entry twice: {', '.join(labels)}")
            axes[str(axis)] = values
        return axes

    def declare(self, raw: Any, shared: Mapping[str, list[Any]]) -> None:
        if not isinstance(raw, Settings):
            self.problems.append(f"{self.settings.place('steps')}: a step is not `key: value` lines: {raw!r}")
            return
        place = raw.place(next(iter(raw), None))
        id, command = str(raw.get("id") or raw.get("stage")), raw.get("stage")
        count = len(self.problems)
        self.check_keys(raw, _STEP_KEYS, "step")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", id):
            self.problems.append(f"{place}: step id {id!r} is not letters, digits, '_' and '-'")
        if id in self.declared:
            self.problems.append(f"{place}: two steps are called {id!r}; give one another `id`")
        if command is None:
            self.problems.append(f"{place}: step {id!r} has no `stage`")
        elif not isinstance(command, str) or command not in self.stages:
            self.problems.append(
                f"{raw.place('stage')}: unknown stage {command!r}{near_match(str(command), self.stages)}"
            )
        options = raw.get("with") or Settings()
        if not isinstance(options, Settings):
            self.problems.append(f"{raw.place('with')}: `with` is not `option: value` lines")
            options = Settings()
        needs = self.names(raw, "needs")
        own, listed = raw.get("matrix"), []
        if isinstance(own, list | str):
            # A list names axes of the workflow, to be expanded over without a reference to them.
            listed, own = self.names(raw, "matrix"), None
        own_axes = self.read_axes(own, raw.place("matrix"))
        named = [*listed, *(_second(ref) for ref in _references(options) if ref.startswith("matrix."))]
        for axis in named:
            if axis not in shared and axis not in own_axes:
                known = near_match(axis, [*shared, *own_axes])
                self.problems.append(f"{place}: step {id!r} refers to axis {axis!r}, which no matrix has{known}")
        given_place = options.get("output_dir", options.get("output-dir"))
        if any(ref.startswith("steps.") for ref in _references(given_place)):
            self.problems.append(f"{place}: step {id!r}: output_dir cannot refer to another step")
        for axis in own_axes.keys() & shared.keys():
            self.problems.append(f"{raw.place('matrix')}: axis {axis!r} is one of the workflow's; give it another name")
        if len(self.problems) > count:
            return
        assert isinstance(command, str)
        axes = {**{axis: values for axis, values in shared.items() if axis in named}, **own_axes}
        self.declared[id] = _Declared(
            id, place, self.stages[command], options, tuple(needs), axes, (*listed, *own_axes)
        )

    def names(self, raw: Settings, key: str) -> list[str]:
        """A name or a list of names."""
        given = raw.get(key) or []
        names = [given] if isinstance(given, str) else given
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
        self.problems.append(f"{raw.place(key)}: `{key}` is not a list of names")
        return []

    def expand(self, declared: _Declared, point: Mapping[str, Any]) -> Step:
        """One instance of a step, its values checked as far as they can be known."""
        id = _instance(declared.id, point)
        needs: dict[str, None] = {}

        def steps(reference: str) -> Any:
            return self.step_reference(reference, point, needs)

        full = {**self.scope, "matrix": point, "steps": steps}
        count = len(self.problems)
        fields = {field.name: field for field in stage_fields(declared.stage)}
        values: dict[str, Any] = {}
        for key, value in declared.options.items():
            where = f"{declared.options.place(key)}: step {declared.id!r}: {key}"
            values[key] = self.substituted(value, full, where)
            field = fields.get(str(key).replace("-", "_"))
            if isinstance(value, str) and isinstance(values[key], list) and field is not None and not field.many:
                self.problems.append(
                    f"{where} takes one value and {value} stands for {len(values[key])}: expand this step too "
                    f"(matrix: [{', '.join(self.spread(value, point))}])"
                )
                values[key] = next(iter(values[key]), "")
        for axis in declared.own_axes:
            # An axis called like an option sets it.
            if axis in fields and not {axis, axis.replace("_", "-")} & values.keys():
                values[axis] = point[axis]
            # What a point says holds over what the step says of all points.
            own = {str(key).replace("-", "_"): value for key, value in _options(point[axis]).items()}
            values = {key: value for key, value in values.items() if str(key).replace("-", "_") not in own} | own
        for name in declared.needs:
            try:
                for instance in self.instances(name, point):
                    needs[instance] = None
            except _Unresolved as error:
                self.problems.append(f"{declared.place}: step {declared.id!r}: needs: {error}")
        if "output_dir" in fields and not {"output_dir", "output-dir"} & values.keys():
            values["output_dir"] = self.place_of(declared, point)
        if len(self.problems) == count:
            self.check(declared, values)
        return Step(id, declared.stage, values, tuple(needs), self.place_of(declared, point))

    def check(self, declared: _Declared, values: Mapping[str, Any]) -> None:
        known = {key: _fill(value, lambda _, short: "0" * (8 if short else 32)) for key, value in values.items()}
        count = len(self.problems)

        def named(key: str) -> str:
            return f"{declared.options.place(key)}: step {declared.id!r}: {key}"

        parsed = parse_values(declared.stage, known, named=named, problems=self.problems)
        if len(self.problems) == count:
            try:
                build_stage(declared.stage, parsed)
            except UsageError as error:
                self.problems.append(f"{declared.place}: step {declared.id!r}: {error.what}")

    def place_of(self, declared: _Declared, point: Mapping[str, Any]) -> str | None:
        """The output_dir of one instance: what the step says, or a folder called like it."""
        if not any(field.name == "output_dir" for field in stage_fields(declared.stage)):
            return None
        given = declared.options.get("output_dir", declared.options.get("output-dir"))
        if given is not None:
            try:
                return str(_substitute(given, {**self.scope, "matrix": point}))
            except _Unresolved:
                return str(given)
        return "/".join([self.output_dir, declared.id, *(f"{axis}={_safe(value)}" for axis, value in point.items())])

    def step_reference(self, reference: str, point: Mapping[str, Any], needs: dict[str, None]) -> Any:
        """What `steps.ID.ATTRIBUTE` stands for seen from `point`; enters the steps in `needs`."""
        id, _, attribute = reference.removeprefix("steps.").partition(".")
        if id in self.declared and attribute not in _ATTRIBUTES:
            raise _Unresolved(f"${{{reference}}}: a step has no {attribute!r}{near_match(attribute, _ATTRIBUTES)}")
        instances = self.instances(id, point)
        declared = self.declared[id]
        if self.place_of(declared, {}) is None:
            raise _Unresolved(f"${{{reference}}}: {declared.stage.command} makes no artifact")
        needs.update(dict.fromkeys(instances))
        if attribute == "output_dir":
            found: list[Any] = [self.place_of(declared, instances[instance]) for instance in instances]
        else:
            found = [f"\x00{attribute}:{instance}\x00" for instance in instances]
        return found[0] if len(found) == 1 else found

    def instances(self, id: str, point: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Instance id → point, of those instances of step `id` that agree with `point` on the axes of both."""
        if id not in self.declared:
            raise _Unresolved(f"no step is called {id!r}{near_match(id, self.declared)}")
        found: dict[str, Mapping[str, Any]] = {
            _instance(id, other): other
            for other in self.points[id]
            if all(_label(other[axis]) == _label(point[axis]) for axis in other.keys() & point.keys())
        }
        if not found:
            raise _Unresolved(f"step {id!r} has no instance for {_instance('', point)}")
        return found

    def spread(self, value: str, point: Mapping[str, Any]) -> list[str]:
        axes = [
            axis for ref in _references(value) if ref.startswith("steps.") for axis in self.declared[_second(ref)].axes
        ]
        return [axis for axis in dict.fromkeys(axes) if axis not in point]

    def check_places(self, steps: Iterable[Step]) -> None:
        places: dict[Path, str] = {}
        for step in steps:
            if step.output_dir is None:
                continue
            place = Path(step.output_dir)
            if place in places:
                self.problems.append(f"{self.file}: steps {places[place]!r} and {step.id!r} both write to {place}")
            places[place] = step.id
        for place, id in places.items():
            for above in place.parents:
                if above in places:
                    self.problems.append(
                        f"{self.file}: steps {places[above]!r} and {id!r} write into each other: {above}, {place}"
                    )

    def ordered(self, steps: Sequence[Step]) -> list[Step]:
        positions = {step.id: number for number, step in enumerate(steps)}
        sorter = graphlib.TopologicalSorter({step.id: step.needs for step in steps})
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            self.problems.append(f"{self.file}: steps wait for each other in a circle: {' → '.join(error.args[1])}")
            return []
        ordered: list[Step] = []
        ready: list[int] = []
        while sorter.is_active():
            for id in sorter.get_ready():
                heapq.heappush(ready, positions[id])
            # Of those that may run, the one that stands first in the file: the order people expect.
            first = steps[heapq.heappop(ready)]
            ordered.append(first)
            sorter.done(first.id)
        return ordered

    def substituted(self, value: Any, scope: Mapping[str, Any], where: str) -> Any:
        try:
            return _substitute(value, scope)
        except _Unresolved as error:
            self.problems.append(f"{where}: {error}")
            return ""


def _substitute(value: Any, scope: Mapping[str, Any]) -> Any:
    """`value` with its references replaced: a text that is one reference takes its value, others are joined."""
    if isinstance(value, Settings):
        return {key: _substitute(item, scope) for key, item in value.items()}
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            found = _substitute(item, scope)
            # A reference to all instances of a step, inside a list, adds them to it.
            items += found if isinstance(item, str) and isinstance(found, list) else [found]
        return items
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole and whole[2] is not None:
        return _look_up(whole[2].strip(), scope)

    def text(match: re.Match[str]) -> str:
        if match[1]:
            return "${"
        found = _look_up(match[2].strip(), scope)
        if found is None and match[2].strip().startswith("vars."):
            raise _Unresolved(f"{match[0]} has no value yet: give it with --set {_second(match[2].strip())}=VALUE")
        if isinstance(found, list | dict) or found is None:
            raise _Unresolved(f"{match[0]} is {_kind(found)} and cannot stand inside a text")
        return ("true" if found else "false") if isinstance(found, bool) else str(found)

    return _REFERENCE.sub(text, value)


def _kind(value: Any) -> str:
    return "null" if value is None else "a list" if isinstance(value, list) else "a mapping"


def _look_up(reference: str, scope: Mapping[str, Any]) -> Any:
    root, *names = reference.split(".")
    if root not in scope or not names:
        forms = {
            "vars": "vars.NAME",
            "matrix": "matrix.AXIS",
            "steps": "steps.ID.output_dir",
            "workflow": "workflow.dir",
        }
        known = [forms[name] for name in scope]
        raise _Unresolved(f"${{{reference}}} is no reference{near_match(root, scope)}; known: {', '.join(known)}")
    if root == "steps":
        return scope["steps"](reference)
    value = scope[root]
    for index, name in enumerate(names):
        if not isinstance(value, Mapping) or name not in value:
            known_names = value if isinstance(value, Mapping) else ()
            before = ".".join([root, *names[:index]])
            raise _Unresolved(f"${{{reference}}}: {before} has no {name!r}{near_match(name, map(str, known_names))}")
        value = value[name]
    return value


def _references(value: Any) -> list[str]:
    """The references in a value, in order: `vars.data`, `steps.teacher.output_dir`."""
    if isinstance(value, Mapping):
        return [ref for item in value.values() for ref in _references(item)]
    if isinstance(value, list):
        return [ref for item in value for ref in _references(item)]
    return (
        [match[2].strip() for match in _REFERENCE.finditer(value) if match[2] is not None]
        if isinstance(value, str)
        else []
    )


def _second(reference: str) -> str:
    return reference.split(".")[1]


def _fill(value: Any, fingerprint_of: Callable[[str, bool], str]) -> Any:
    if isinstance(value, list):
        return [_fill(item, fingerprint_of) for item in value]
    if not isinstance(value, str):
        return value
    return _LATER.sub(lambda match: fingerprint_of(match[2], match[1] is not None), value)


def _folder_of(file: str) -> str:
    return str(Path(file).parent)


def _instance(id: str, point: Mapping[str, Any]) -> str:
    return f"{id}[{','.join(f'{axis}={_label(value)}' for axis, value in point.items())}]" if point else id


def _label(value: Any) -> str:
    """How a point on an axis is called: the value, or the `name` of a mapping."""
    if isinstance(value, Mapping):
        return str(value.get("name") or "+".join(_label(item) for item in value.values()))
    if isinstance(value, list):
        return "+".join(map(_label, value))
    return str(value)


def _options(value: Any) -> Any:
    """The options that a point on an axis sets."""
    return value.get("with", {}) if isinstance(value, Mapping) else {}


def _safe(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", _label(value)).strip("-") or "-"
