"""Registries of named parts with options: methods and students are written `name:option=value:...` by users.

Light: nothing here imports torch, so listing and parsing are instant.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from ...pipeline.errors import UsageError, near_match

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Named dataclasses whose fields are options.

    Args:
        noun: what one entry is called in messages: "method", "student".
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._parts: dict[str, type[Part]] = {}

    def register(self, name: str) -> Callable[[type[Part]], type[Part]]:
        """Class decorator: enter the class under `name`, which it also gets as its attribute `name`."""

        def enter(part: type[Part]) -> type[Part]:
            assert name not in self._parts, f"two {self.noun}s are called {name!r}"
            part.name = name  # type: ignore[attr-defined]
            self._parts[name] = part
            return part

        return enter

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> type[Part]:
        """The class called `name`.

        Raises:
            UsageError: nothing is called so; near matches are named.
        """
        if name not in self._parts:
            raise UsageError(f"unknown {self.noun} {name!r}{near_match(name, self._parts)}", fix=f"kd {self.noun}s")
        return self._parts[name]

    def make(self, name: str, options: Mapping[str, Any]) -> Part:
        """An instance of the part called `name`, its options converted from text by their types.

        Raises:
            UsageError: an unknown name or option, or a value of the wrong type; near matches are named.

        A part with `presets` takes the options of the one that its option `preset` names, but for those given.
        """
        part = self[name]
        presets = getattr(part, "presets", {})
        if options.get("preset") in presets:
            options = {**presets[options["preset"]].options, **options}
        kinds = get_type_hints(part)
        known = [f.name for f in dataclasses.fields(part)]  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for option, value in options.items():
            if option not in known:
                have = near_match(option, known) if known else f": {self.noun} {name!r} has none"
                raise UsageError(f"unknown option {option!r} of {self.noun} {name!r}{have}")
            values[option] = _convert(value, kinds[option], f"option {option!r} of {self.noun} {name!r}")
        return part(**values)

    def describe(self) -> list[dict[str, Any]]:
        """One entry per part, by name.

        Returns:
            `name`, `summary` and `about` (first line and rest of the docstring), `options` (name to default), `source`;
            `presets` (by name, their fields), where it has some.
        """
        return [
            {
                "name": name,
                "summary": inspect.cleandoc(self._parts[name].__doc__ or "").partition("\n")[0],
                "about": inspect.cleandoc(self._parts[name].__doc__ or "").partition("\n")[2].strip(),
                "options": {f.name: f.default for f in dataclasses.fields(self._parts[name])},  # type: ignore[arg-type]
                "source": getattr(self._parts[name], "source", ""),
                **_presets(self._parts[name]),
            }
            for name in self
        ]


def _presets(part: type) -> dict[str, Any]:
    presets = getattr(part, "presets", None)
    if not presets:
        return {}
    # As they are: `asdict` would copy mappings that cannot be.
    fields = {name: vars(preset) for name, preset in presets.items()}
    return {"presets": fields}


def split_options(text: str, noun: str) -> tuple[str, list[str], dict[str, str]]:
    """Take `name:word:key=value` apart into its name, the bare words and the options.

    >>> split_options("soft-target:0.9:temperature=4", "method")
    ('soft-target', ['0.9'], {'temperature': '4'})
    """
    name, *pieces = [piece.strip() for piece in text.split(":")]
    words = [piece for piece in pieces if "=" not in piece]
    options: dict[str, str] = {}
    for piece in pieces:
        if "=" in piece:
            key, _, value = (part.strip() for part in piece.partition("="))
            key = key.replace("-", "_")
            if not key or not value or key in options:
                raise UsageError(f"{piece!r} in the {noun} {text!r} is not one option of the form key=value")
            options[key] = value
    if not name:
        raise UsageError(f"the {noun} {text!r} has no name before its first ':'")
    return name, words, options


def join_options(name: str, part: Any) -> str:
    """The shortest text that `split_options` and `make` turn into `part` again: only options off their default.

    Raises nothing; the inverse is exact for the option types that `make` knows.
    """
    pieces = [name]
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value != field.default:
            pieces.append(f"{field.name}={spelled(value)}")
    return ":".join(pieces)


def spelled(value: Any) -> str:
    """An option's value or a weight as text that reads back as the same."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` (text from a command line, or already typed from YAML) as an option of type `kind`."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        if value is None or value in ("none", "None"):
            return None
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if str(value) not in choices:
            raise UsageError(
                f"{where} is {value!r}; expected one of {', '.join(choices)}{near_match(str(value), choices)}"
            )
        return str(value)
    text = str(value)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{where} is {text!r}; expected true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            number = kind(text)
            if not math.isfinite(number):
                raise ValueError
            return number
        except (ValueError, OverflowError):
            raise UsageError(f"{where} is {text!r}; expected {'a whole' if kind is int else 'a'} number") from None
    assert kind is str, f"{where}: no conversion to {kind}"
    return text
