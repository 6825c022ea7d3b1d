"""Settings files: YAML 1.2 without its surprises, JSON, lines in messages, and a faithful way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.errors import UsageError
from kd.pipeline.settings import parse_yaml, read_settings, to_yaml

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,20}", fullmatch=True), scalars | st.lists(scalars, max_size=3)))
def test_printed_settings_read_back_as_the_same_values(settings: dict[str, object]) -> None:
    read = parse_yaml(to_yaml(settings), "test") or {}
    assert read == settings
    assert list(map(type, read.values())) == list(map(type, settings.values()))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2026-11-01", "2026-11-01"),
        ("0777", 777),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ("a#b", "a#b"),
        ("runs/a:test", "runs/a:test"),
    ],
)
def test_values_are_what_they_look_like(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}\n", "test")["key"]
    assert read == value
    assert type(read) is type(value)


def test_every_key_knows_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# about\none: 1\n\ntwo:\n  three: 3\n")
    settings = read_settings(tmp_path / "a.yaml")
    assert settings.place("one") == f"{tmp_path}/a.yaml:2"
    assert settings["two"].place("three") == f"{tmp_path}/a.yaml:5"
    assert settings.place("absent") == f"{tmp_path}/a.yaml"


def test_json_with_tabs_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": [1, "x\ty"], "b": {"c": None}}, indent="\t"))
    assert read_settings(tmp_path / "a.json") == {"a": [1, "x\ty"], "b": {"c": None}}


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {lr: 1, seed: 2}\nother:\n  <<: *base\n  seed: 3\n")
    assert read_settings(tmp_path / "a.yaml")["other"] == {"lr": 1, "seed": 3}


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert read_settings(tmp_path / "a.yaml") == {}


REPEATED = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 20)
)
"""Two hundred lines at the most, and 10**19 values."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\nb: [1,\nc: 2\n", r"a\.yaml:4:1: expected ',' or ']'"),
        (b"a: 1\na: 2\n", r"a\.yaml:2: 'a' stands twice, first in line 1"),
        (b"- 1\n- 2\n", "holds list"),
        (b"just words\n", "holds str"),
        (b"a: \xff\n", "not UTF-8"),
        (b"a: *nowhere\n", r"a\.yaml:1:.*nowhere"),
        (b"a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (b"? [1, 2]\n: 3\n", "a key is a word"),
        (b"a: 1\n---\nb: 2\n", r"a\.yaml:2:1: but found another document"),
        (b"a:\n\tb: 1\n", r"a\.yaml:2"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: 1\nb: " + b"9" * 5000, r"a\.yaml:2: a whole number of 5000 digits"),
        (b"a: 1\nb: &b [1, *b]\n", r"a\.yaml:2: a value stands within itself"),
        (b"a: &a {b: *a}\n", r"a\.yaml:1: a value stands within itself"),
        (b"a: 1\nb: x\0y\n", r"a\.yaml:2: the character U\+0000 cannot stand in YAML"),
        (REPEATED, "stands for [0-9]+ values, its aliases written out; at most 100000"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_settings(tmp_path / "a.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"b\.yaml does not exist"):
        read_settings(tmp_path / "b.yaml")
