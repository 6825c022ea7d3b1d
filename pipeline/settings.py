"""Settings files: YAML 1.2 (or JSON) mappings that know their lines, and the YAML that kd prints."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

MAX_VALUES = 100_000
"""Most values in a file, those that an alias repeats counted again: ten lines of aliases can stand for billions."""


class Settings(dict[Any, Any]):
    """A mapping read from a file, with the line of each key.

    Attributes:
        file: the file it was read from.
        lines: key → line, counted from 1.
    """

    file: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lines: dict[Any, int] = {}

    def place(self, key: Any = None) -> str:
        """`file:line` of a key, or `file`."""
        return f"{self.file}:{self.lines[key]}" if key in self.lines else self.file


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `no`, `on` and `12:30` are texts, 1e-3 is a number, a key stands once."""


_Loader.yaml_implicit_resolvers = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+0123456789."],
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    settings = Settings()
    settings.file = loader.name
    yield settings
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool | None):
            raise UsageError(f"{loader.name}:{line}: a key is a word, not a list or mapping")
        if key in lines:
            raise UsageError(f"{loader.name}:{line}: {key!r} stands twice, first in line {lines[key]}")
        lines[key] = line
    settings.update(loader.construct_mapping(node, deep=True))
    settings.lines = lines


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 0777 as octal; 1.2 as a decimal number.
    try:
        return int(node.value)
    except ValueError:  # Python reads so many digits and no more
        line = node.start_mark.line + 1
        raise UsageError(f"{loader.name}:{line}: a whole number of {len(node.value)} digits") from None


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(re.sub(r"\.(inf|nan)$", r"\1", node.value.lower())),
)


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """The mapping in a YAML or JSON file.

    Raises:
        UsageError: as `read_yaml`, or not a mapping.
    """
    settings = read_yaml(path)
    if settings is None:
        settings = Settings()
        settings.file = str(path)
    if not isinstance(settings, Settings):
        raise UsageError(f"{path} holds {type(settings).__name__}, not `key: value` lines")
    return settings


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value in a YAML or JSON file; mappings come as `Settings`, and an empty file as None.

    Raises:
        UsageError: no such file, not UTF-8, or malformed (with line and column).
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; mappings come as `Settings`.

    Args:
        text: one YAML or JSON document.
        name: what messages call it.

    Raises:
        UsageError: malformed, with line and column; nested too deeply, or larger than `MAX_VALUES`.
    """
    # YAML forbids tabs as white space, JSON is full of them: outside of strings they mean the same as spaces.
    text = text.replace("\t", " ") if text.lstrip().startswith("{") else text
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{name}:{line}: the character U+{error.character:04X} cannot stand in YAML") from None
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _num_values(node, {}, name)) > MAX_VALUES:
            raise UsageError(
                f"{name} stands for {count} values, its aliases written out; at most {MAX_VALUES} are read"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise UsageError(f"{name}: values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UsageError(f"{place}: {error.problem or error.context}", fix="see https://yaml.org/spec/1.2.2") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: {error}") from None
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, counted: dict[int, int], name: str) -> int:
    """How many values a node stands for; UsageError when it stands within itself."""
    if id(node) not in counted:
        counted[id(node)] = 0
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_num_values(part, counted, name) for part in inner)
    elif not counted[id(node)]:
        raise UsageError(f"{name}:{node.start_mark.line + 1}: a value stands within itself")
    return counted[id(node)]


def is_positive(value: Any) -> bool:
    """Whether a value of a file is a number above 0, and below infinity as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def to_yaml(settings: dict[str, Any]) -> str:
    """`settings` as YAML that reads back as the same values, keys in their order."""
    return "".join(f"{key}: {_scalar(value)}\n" for key, value in settings.items())


# What YAML forbids in a text, and what it takes for the end of a line.
_TO_ESCAPE = re.compile(
    "[^\\x20-\\x7e\\xa0-\\u2027\\u202a-\\ud7ff\\ue000-\\ufefe\\uff00-\\ufffd\\U00010000-\\U0010ffff]"
)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z0-9_./][\w ./:@+=,()-]*[\w./@+=)]|[A-Za-z0-9_/]", value, re.ASCII)
        if plain and ": " not in value and isinstance(parse_yaml(value, ""), str):
            return value
    return _quoted(value)


def _quoted(value: Any) -> str:
    # JSON is YAML, but for infinities and the characters above.
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return _TO_ESCAPE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
