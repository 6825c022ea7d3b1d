"""`kd store inspect`: what it says about a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.cli import main


def test_inspect_says_what_is_there(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "inspect", str(store)]) == 0
    text = capfd.readouterr().out
    assert "40 with 120 tokens in 3 shards" in text
    assert "logits       per example x 2 float32, 3 of 3 shards, " in text
    assert main(["store", "inspect", str(store), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 40
