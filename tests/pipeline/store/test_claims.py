"""Claims of shards: one holder at a time, ended by release, by forgetting, and by the death of a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.pipeline.store import create_or_open, open_store

HOLD = """
import sys, time
from kd.pipeline.store import open_store
claim = open_store(sys.argv[1]).claim(1)
print("held" if claim else "refused", flush=True)
time.sleep(60)
"""


def test_a_shard_has_one_holder_at_a_time(make_store: Callable[..., Any]) -> None:
    store, *_ = make_store()
    first = store.claim(0)
    assert first is not None
    assert store.claim(0) is None and open_store(store.url).claim(0) is None
    other = store.claim(1)
    assert other is not None
    first.release()
    first.release()
    again = store.claim(0)
    assert again is not None and store.claim(1) is None
    del other
    assert store.claim(1) is not None


def test_a_claim_ends_with_its_block(make_store: Callable[..., Any]) -> None:
    store, *_ = make_store()
    with store.claim(2):
        assert store.claim(2) is None
    assert store.claim(2) is not None


def test_a_claim_dies_with_its_process_and_outlives_the_sweep_of_another_writer(
    make_store: Callable[..., Any], identity: Any
) -> None:
    store, *_ = make_store()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, store.url], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        create_or_open(store.url, identity)
        assert store.claim(1) is None and store.claim(0) is not None
    finally:
        holder.kill()
        holder.wait()
    with store.claim(1) as claim:
        assert claim is not None
    create_or_open(store.url, identity)
    assert not any(Path(store.url, ".staging").iterdir()), "a claim was left behind"


def test_what_a_killed_holder_leaves_is_swept(make_store: Callable[..., Any], identity: Any) -> None:
    store, *_ = make_store()
    left = Path(store.url, ".staging", "claim~00000007")
    left.write_bytes(b"")
    create_or_open(store.url, identity)
    assert not left.exists()
