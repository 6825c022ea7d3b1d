"""One parser for flags, files and workflows, and command lines that say exactly what a stage is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.config import build_stage, command_line, parse_values, read_config, stage_fields
from kd.pipeline.errors import UsageError
from kd.pipeline.stage import Stage, option


@dataclass(frozen=True, kw_only=True)
class Example(Stage):
    command: ClassVar[str] = "do example"

    things: tuple[str, ...] = option(help="Positional.", positional=True)
    rate: float | None = option(None, help="A rate.")
    count: int = option(3, help="A count.")
    fast: bool = option(False, help="A switch.")
    careful: bool | None = option(None, help="A switch with three states.")
    name: str = option("x", help="A name.")
    layers: tuple[int, ...] = option((), help="Numbers.")
    words: tuple[str, ...] = option((), help="Words that may hold commas.", split=False)
    mode: str | None = option(None, help="A mode.", choices=("steps", "epoch", "no"))
    workers: int = option(1, help="Workers.", identity=False)
    output_dir: str = option(help="Where.", identity=False)


def parse(**values: Any) -> dict[str, Any]:
    return parse_values(Example, values, named=lambda name: f"--{name}")


def test_texts_and_typed_values_parse_alike() -> None:
    assert parse(rate="1e-3", count="1e6", fast="yes", layers="1, 2", name="5") == parse(
        rate=1e-3, count=1_000_000, fast=True, layers=[1, 2], name=5
    )


def test_long_whole_numbers_keep_every_digit() -> None:
    assert parse(count="9007199254740993")["count"] == 9007199254740993


def test_dashes_and_underscores_are_the_same_key() -> None:
    assert parse_values(Example, {"output-dir": "a"}, named=str) == {"output_dir": "a"}
    with pytest.raises(UsageError, match="given twice"):
        parse_values(Example, {"output-dir": "a", "output_dir": "b"}, named=str)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "three"}, "--count is 'three'; expected a whole number"),
        ({"count": 2.5}, "--count is 2.5; expected a whole number"),
        ({"count": True}, "--count is True; expected a whole number"),
        ({"count": None}, "--count is null; expected a whole number"),
        ({"count": "inf"}, "--count is 'inf'; expected a whole number"),
        ({"rate": "nan"}, "--rate is 'nan'; expected a number or null"),
        ({"rate": [1]}, r"--rate is \[1\]; expected a number or null"),
        ({"fast": "maybe"}, "--fast is 'maybe'; expected true or false"),
        ({"layers": "1,x"}, "--layers is 'x'; expected a list"),
        ({"things": "a,,b"}, "--things has an empty entry"),
        ({"mode": "epochs"}, r"--mode is 'epochs'; expected one of steps, epoch, no \(did you mean 'epoch'\?\)"),
        ({"naem": "x"}, r"--naem: do example has no such setting \(did you mean 'name'\?\)"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(**values)


def test_missing_options_are_all_named_with_their_help() -> None:
    with pytest.raises(UsageError, match=r"do example needs THINGS and --output-dir") as caught:
        build_stage(Example, {})
    assert "--output-dir: Where." in str(caught.value)


def test_a_file_gives_values_and_its_mistakes_have_lines(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("things: [a]\nmode: no\noutput-dir: b\n")
    assert read_config(Example, tmp_path / "a.yaml") == {"things": ("a",), "mode": "no", "output_dir": "b"}
    (tmp_path / "a.yaml").write_text("things: [a]\ncuont: 3\n")
    with pytest.raises(UsageError, match=r"cuont in .*a\.yaml:2: .*did you mean 'count'"):
        read_config(Example, tmp_path / "a.yaml")


def test_only_settings_that_do_not_change_the_result_come_from_the_environment() -> None:
    assert {field.name: field.env for field in stage_fields(Example) if field.env} == {"workers": "KD_WORKERS"}


def test_defaults_are_left_out_of_a_command_line() -> None:
    stage = build_stage(Example, {"things": ("a", "b"), "output_dir": "out"})
    assert command_line(stage) == ["kd", "do", "example", "--output-dir", "out", "a", "b"]


def test_what_no_option_can_say_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nullable(Stage):
        command: ClassVar[str] = "nullable"
        device: str | None = option("auto", help="A device.")
        views: tuple[str, ...] = option((), help="Paths.")

    with pytest.raises(UsageError, match="device is null, which no option can say"):
        command_line(Nullable(device=None))
    with pytest.raises(UsageError, match="contains a comma"):
        command_line(Nullable(views=("a,b",)))


plain = st.text(st.characters(exclude_characters=",\x00", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(
    things=st.lists(plain, min_size=1, max_size=3),
    rate=st.none() | st.floats(allow_nan=False),
    count=st.integers(),
    fast=st.booleans(),
    careful=st.none() | st.booleans(),
    name=plain,
    layers=st.lists(st.integers(), max_size=3),
    words=st.lists(plain | st.just("a,b"), max_size=3),
)
def test_a_command_line_parses_back_to_the_same_stage(**values: Any) -> None:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    stage = Example(**values, output_dir="-odd")

    words = command_line(stage)
    assert words[:3] == ["kd", "do", "example"]
    read: dict[str, Any] = {}
    fields = {field.flag: field for field in stage_fields(Example)}
    rest = words[3:]
    while rest:
        word = rest.pop(0)
        if word == "--" or not word.startswith("--"):
            read["things"] = tuple(rest if word == "--" else [word, *rest])
            break
        flag, equals, value = word.partition("=")
        if flag.startswith("--no-"):
            read[flag[5:]] = "false"
        elif fields[flag].base is bool:
            read[flag[2:]] = "true"
        elif fields[flag].many and not fields[flag].split:
            read.setdefault(fields[flag].name, []).append(rest.pop(0))
        else:
            read[fields[flag].name] = value if equals else rest.pop(0)
    assert build_stage(Example, parse_values(Example, read, named=str)) == stage
