"""Configuration of stages: from flags, files and workflow steps to a checked stage, and back to a command line.

A stage's dataclass fields are the one source; every value, wherever it comes from, is parsed here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from .errors import UsageError, near_match
from .stage import Stage

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class StageField:
    """One field of a stage as an option.

    Attributes:
        name: of the dataclass field and the configuration key.
        base: str, int, float or bool; the item's type when `many`.
        optional: None is a value.
        many: a tuple of `base`.
        required: has no default.
        env: environment variable that sets it, or None. Only fields that do not change the result have one: a result
            must not depend on a setting that no command and no file shows.
    """

    name: str
    base: type
    optional: bool
    many: bool
    required: bool
    default: Any
    help: str
    panel: str | None
    positional: bool
    metavar: str | None
    choices: tuple[str, ...] | None
    split: bool
    env: str | None

    @property
    def flag(self) -> str:
        """The option's spelling on the command line; a field that Python would take for a word of its own ends in _."""
        return "--" + self.name.rstrip("_").replace("_", "-")

    @property
    def shown(self) -> str:
        """How a message names it."""
        return self.value_name if self.positional else self.flag

    @property
    def value_name(self) -> str:
        """How help names its value."""
        if self.metavar:
            return self.metavar
        if self.choices and not self.many:
            return "|".join(self.choices)
        if self.positional:
            return self.name.upper().replace("_", "-")
        noun = {str: "TEXT", int: "INT", float: "NUMBER", bool: ""}[self.base]
        return noun + ",..." if self.many else noun

    @property
    def shown_default(self) -> str | None:
        """The default as help prints it; None when there is nothing to say."""
        if self.required or self.default in (None, (), ""):
            return None
        if self.base is bool and not self.many:
            return "on" if self.default else None
        return ",".join(map(str, self.default)) if self.many else str(self.default)


def stage_fields(stage: type[Stage]) -> tuple[StageField, ...]:
    """The fields of a stage in the order in which they are declared."""
    hints = typing.get_type_hints(stage)
    return tuple(_stage_field(stage, field, hints[field.name]) for field in dataclasses.fields(stage))


def _stage_field(stage: type[Stage], field: dataclasses.Field[Any], hint: Any) -> StageField:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [option for option in options if option is not types.NoneType]
    where = f"{stage.__name__}.{field.name}: {hint}"
    assert len(kinds) == 1, f"{where} is not one type or `type | None`"
    many = typing.get_origin(kinds[0]) is tuple
    base = typing.get_args(kinds[0])[0] if many else kinds[0]
    assert base in (str, int, float, bool), f"{where} is not made of str, int, float or bool"
    assert not many or typing.get_args(kinds[0])[1:] == (...,), f"{where} is not tuple[type, ...]"
    assert field.default_factory is MISSING, f"{where} has a default factory"
    data = field.metadata
    identity = data.get("identity", True)
    return StageField(
        name=field.name,
        base=base,
        optional=types.NoneType in options,
        many=many,
        required=field.default is MISSING,
        default=None if field.default is MISSING else field.default,
        help=data.get("help", ""),
        panel=data.get("panel"),
        positional=data.get("positional", False),
        metavar=data.get("metavar"),
        choices=data.get("choices"),
        split=data.get("split", True),
        env=None if identity or field.name == "output_dir" or data.get("positional") else f"KD_{field.name.upper()}",
    )


def parse_values(
    stage: type[Stage], values: Mapping[str, Any], *, named: Callable[[str], str], problems: list[str] | None = None
) -> dict[str, Any]:
    """Values parsed into the fields' types, by field name. Keys may be spelt with dashes.

    Args:
        stage: whose fields they are.
        values: texts of flags, or what a YAML or JSON file holds.
        named: how a message names a key and its place ("--seed", "seed in a.yaml:3").
        problems: where to collect what is wrong instead of raising at the first.

    Raises:
        UsageError: a key that is no field (with near matches), or a value that is not of the field's type.
    """
    fields = {field.name: field for field in stage_fields(stage)}
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = name if name in fields or f"{name}_" not in fields else f"{name}_"
        try:
            if name not in fields:
                raise UsageError(f"{named(key)}: {stage.command} has no such setting{near_match(name, fields)}")
            if name in parsed:
                raise UsageError(f"{named(key)}: given twice, once with dashes and once with underscores")
            parsed[name] = _parse(fields[name], value, named(key))
        except UsageError as error:
            if problems is None:
                raise
            problems.append(error.what)
    return parsed


def _parse(field: StageField, value: Any, named: str) -> Any:
    if value is None:
        if field.optional:
            return None
        raise UsageError(f"{named} is null; expected {_expected(field)}")
    if not field.many:
        return _parse_one(field, value, named)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if field.split else [value]
    if not isinstance(value, list | tuple):
        value = [value]
    items = tuple(_parse_one(field, item, named) for item in value)
    if "" in items:
        raise UsageError(f"{named} has an empty entry; expected {_expected(field)}")
    return items


def _parse_one(field: StageField, value: Any, named: str) -> Any:
    parsed = _as_type(field.base, value)
    if parsed is None:
        raise UsageError(f"{named} is {_quoted(value)}; expected {_expected(field)}")
    if field.choices and parsed not in field.choices:
        hint = near_match(str(parsed), field.choices)
        raise UsageError(f"{named} is {_quoted(parsed)}; expected one of {', '.join(field.choices)}{hint}")
    return parsed


def _as_type(base: type, value: Any) -> Any:
    """`value` as a `base`, or None when it is none."""
    if base is str:
        if isinstance(value, bool):
            return "true" if value else "false"
        return str(value) if isinstance(value, str | int | float) else None
    if base is bool:
        text = str(value).lower() if isinstance(value, bool | str | int) else ""
        return True if text in _TRUE else False if text in _FALSE else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
        if base is float:
            return number if not math.isnan(number) else None
        # "1e6" and 1e6 are whole numbers too; a long one must not pass through a float.
        return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else _whole(value, number)
    except (ValueError, OverflowError):
        return None


def _whole(value: str | int | float, number: float) -> int | None:
    if isinstance(value, int):
        return value
    return int(number) if number == int(number) else None


def _expected(field: StageField) -> str:
    noun = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[field.base]
    if field.choices:
        noun = "one of " + ", ".join(field.choices)
    if field.many:
        noun = f"a list ({noun} each)"
    return noun + (" or null" if field.optional else "")


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def build_stage(stage: type[Stage], values: Mapping[str, Any]) -> Stage:
    """The stage with parsed `values`, the rest at their defaults.

    Raises:
        UsageError: a required field is missing, or the stage refuses the values.
    """
    missing = [field for field in stage_fields(stage) if field.required and field.name not in values]
    if missing:
        raise UsageError(
            f"{stage.command} needs {' and '.join(field.shown for field in missing)}",
            details=[f"{field.shown}: {field.help}" for field in missing],
            fix=f"see kd {stage.command} --help",
        )
    return stage(**values)


def read_config(stage: type[Stage], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Values for `stage` from a YAML or JSON file of `field: value`.

    Raises:
        UsageError: no such file, not a mapping, unknown keys or values of the wrong type; with the line.
    """
    from .settings import read_settings

    settings = read_settings(path)
    return parse_values(stage, settings, named=lambda key: f"{key} in {settings.place(key)}")


def command_line(stage: Stage, *extra: str) -> list[str]:
    """The words of the plain command that runs `stage`, `kd` first; fields at their defaults are left out.

    Args:
        stage: what to run.
        extra: further options.

    Raises:
        UsageError: a value cannot be written as an option.
    """
    words = ["kd", *stage.command.split(), *extra]
    positional: list[str] = []
    for field in stage_fields(type(stage)):
        value = getattr(stage, field.name)
        if not field.required and value == field.default:
            continue
        if field.positional:
            positional += [str(item) for item in value] if field.many else [str(value)]
        elif value is None:
            raise UsageError(f"{stage.command}: {field.name} is null, which no option can say", fix="leave it out")
        elif field.many and not field.split:
            words += [word for item in value for word in (field.flag, str(item))]
        elif field.many:
            commas = [item for item in value if "," in str(item)]
            if commas:
                raise UsageError(
                    f"{stage.command}: {field.flag} {commas[0]!r} contains a comma, which parts its entries"
                )
            words += [field.flag, ",".join(map(str, value))] if value else [f"{field.flag}="]
        elif field.base is bool:
            words.append(field.flag if value else "--no-" + field.flag[2:])
        else:
            text = str(value)
            words += [f"{field.flag}={text}"] if text.startswith("-") else [field.flag, text]
    if any(word.startswith("-") for word in positional):
        words.append("--")
    return words + positional
