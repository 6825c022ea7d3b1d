"""The benchmarks run, at sizes at which their figures mean nothing: what they call must not change under them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHARED = {"formats", "large_store", "relay", "report"}
SMALL = {
    "augment": ["--quick", "--only", "rules", "masked-lm", "--rows", "60", "--sentences", "2", "--variants", "2"],
    "capture": ["--quick", "--rows", "16", "--rounds", "1"],
    "derived": ["--rows", "12", "--teachers", "pre-ln"],
    "gpu": ["--device", "cpu", "--quick", "--rows", "60", "--steps", "1"],
    "read": ["--quick", "--rows", "200", "--batches", "2", "--rounds", "1", "--formats", "copies,datasets,parquet"],
    "scale": ["--sizes", "200"],
    "startup": ["--repeats", "1", "--rows", "20000"],
    "train": [  # its steps run in the benchmark for GPUs
        *("--quick", "--only", "epoch", "resume", "--rows", "300", "--steps", "1", "--live-steps", "1"),
        *("--resume-rows", "500", "--batch-size", "8", "--teacher-layers", "1"),
    ],
    "write": ["--quick", "--megabytes", "1", "--rounds", "1"],
    "verify": ["--rows", "200", "--rounds", "1"],
}


def test_every_benchmark_is_run_here() -> None:
    assert {file.stem for file in BENCHMARKS.glob("*.py")} - SHARED == {*SMALL}


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is ten times as slow in the third round, and from the second way of the second round on."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from report import compared

    kd, other = compared("what", {"kd": [1.0, 1.0, 10.0], "other": [2.0, 20.0, 20.0]})
    assert kd.ratio is None
    assert (other.ratio, other.ratio_low, other.ratio_high) == (2.0, 2.0, 11.0)
    assert other.cells()[5:7] == ("2.00x", "2.00..11.00")


def test_ways_go_backwards_in_every_other_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from report import Timed, take_turns

    turns: list[str] = []
    ways = {name: lambda name=name: turns.append(name) or Timed(1.0) for name in "ab"}
    assert take_turns(ways, rounds=2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert "".join(turns) == "ab" + "ba" + "ab"
    assert [*take_turns(ways, rounds=1, warm_up=False)] == ["a", "b"]  # `compared` takes the first for kd


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_benchmark_ends_in_one_json_line(name: str, tmp_path: Path, warm_python: str) -> None:
    command = [warm_python, str(BENCHMARKS / f"{name}.py"), *SMALL[name]]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["benchmark"] == name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_for_gpus_says_that_there_is_none(warm_python: str) -> None:
    command = [warm_python, str(BENCHMARKS / "gpu.py"), "--quick"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr and "--device cpu --quick" in done.stderr and not done.stdout
