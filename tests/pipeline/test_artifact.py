"""A file is written whole or not at all, whatever is killed when."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.pipeline.artifact import atomic_write_bytes, json_ready, open_artifact
from kd.pipeline.errors import RefusedError

LOOP = """
import sys
from kd.pipeline.artifact import atomic_write_bytes
print("ready", flush=True)
while True:
    for letter in b"ab":
        atomic_write_bytes(sys.argv[1], bytes([letter]) * 3_000_000)
"""


def test_a_kill_leaves_the_old_bytes_or_the_new_ones(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for delay_s in (0.003, 0.011, 0.029, 0.05):
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while not target.exists():
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = target.read_bytes()
        assert len(data) == 3_000_000
        assert len(set(data)) == 1


def test_a_failed_write_leaves_no_temporary_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        atomic_write_bytes(tmp_path / "file", "text")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_every_kind_become_json() -> None:
    import numpy as np

    value = json_ready({"a": np.float32(0.5), "b": np.int64(3), "c": (1, float("nan")), 4: np.array(2.0), "d": {"e"}})
    assert json.loads(json.dumps(value, allow_nan=False)) == {"a": 0.5, "b": 3, "c": [1, None], "4": 2.0, "d": ["e"]}


def test_a_store_in_the_place_of_an_artifact_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "store.json").touch()
    with pytest.raises(RefusedError, match="is a store, not a view"):
        open_artifact(tmp_path, kind="view")
