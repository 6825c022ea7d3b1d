"""`kd store inspect` and `kd store verify`: what they say about a sound store and about a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kd.cli import main
from kd.pipeline.progress import MUTED
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import Signal, StoreIdentity, StoreLayout, array_spec, create_or_open


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MUTED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    identity = StoreIdentity(
        teacher={"tensors": "a" * 32}, tokenizer={"digest": "b" * 32}, capture={"max_length": 8, "dtype": "float32"}
    )
    made = create_or_open(
        str(tmp_path / "store"), identity, StoreLayout.for_vocabulary(100, rows_per_shard=16, tokens_per_shard=128)
    )
    rows = [np.arange(number, number + 3) for number in range(40)]
    allocation = made.allocate(Ragged.from_rows(rows, np.uint16), None)
    spec = array_spec(Signal("logits"), 2)
    made.declare([spec])
    for shard in allocation.shards:
        count = len(made.read_tokens(shard).rows)
        writer = made.writer(shard, [spec])
        writer.put_rows(Signal("logits"), np.arange(count), np.random.default_rng(shard).normal(size=(count, 2)))
        writer.commit()
    return tmp_path / "store"


def test_inspect_says_what_is_there(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "inspect", str(store)]) == 0
    text = capfd.readouterr().out
    assert "40 with 120 tokens in 3 shards" in text
    assert "logits       per example x 2 float32, 3 of 3 shards, " in text
    assert main(["store", "inspect", str(store), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 40


def test_a_sound_store_verifies_and_a_flipped_byte_is_named_with_exit_code_4(
    store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "verify", str(store)]) == 0
    assert capfd.readouterr().out.strip().endswith(": as recorded")
    damaged = sorted(path for path in (store / "logits").rglob("*") if path.is_file() and path.name != "zarr.json")[1]
    data = bytearray(damaged.read_bytes())
    data[5] ^= 1
    damaged.write_bytes(data)
    assert main(["store", "verify", str(store), "--json"]) == 4
    result = json.loads(capfd.readouterr().out)
    assert result["error"]["type"] == "VerificationError"
    assert (result["ok"], len(result["problems"])) == (False, 1)
    assert result["problems"][0]["shard"] == 1
    assert str(damaged.relative_to(store)) in result["error"]["details"][0]


@pytest.mark.slow
def test_workers_find_the_same_damage(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (
        next(path for path in sorted((store / "logits").rglob("*")) if path.is_file() and path.name != "zarr.json")
    ).unlink()
    assert main(["store", "verify", str(store), "--json", "--workers", "2"]) == 4
    assert json.loads(capfd.readouterr().out)["problems"][0]["what"] == "it is missing"


def test_a_place_without_a_store_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(tmp_path)]) == 3
    assert str(tmp_path) in capfd.readouterr().err
