"""A small store made without a teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
