"""`kd store verify`: what it says about a sound store and about a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.cli import main


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
