"""`kd store compact`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kd.cli import main


def test_compact_says_what_it_did_and_does_nothing_the_second_time(
    store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "inspect", str(store), "--json"]) == 0
    digest = json.loads(capfd.readouterr().out)["digest"]
    assert main(["store", "compact", str(store), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["records"], said["files_before"], said["files_after"], said["digest"]) == (6, 6, 1, digest)
    assert len(os.listdir(store / "commits")) == 1
    assert main(["store", "compact", str(store)]) == 0
    assert "in few files already" in capfd.readouterr().out
    assert main(["store", "verify", str(store)]) == 0
