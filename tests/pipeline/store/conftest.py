"""A made-up teacher whose outputs follow from the token ids by hand arithmetic, and stores it was captured into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.ragged import Ragged
from kd.pipeline.store import (
    ArraySpec,
    Signal,
    StoreIdentity,
    StoreLayout,
    TeacherStore,
    array_spec,
    create_or_open,
)

SPECS = (
    array_spec(Signal("logits"), 3),
    array_spec(Signal("hidden.cls", 2), 4),
    array_spec(Signal("hidden.tok", 1), 4),
    array_spec(Signal("hidden.tok", 2), 4),
)
PAIRS = (array_spec(Signal("attention.score", 1), 2), array_spec(Signal("attention.qkv", 1), (3, 4)))
"""What `SPECS` has not: pairs of tokens, and several vectors a token."""
Made = tuple[TeacherStore, Ragged, Ragged, np.ndarray]
LAYOUT = StoreLayout(rows_per_shard=8, tokens_per_shard=64, chunk_bytes=64)


def make_rows(count: int, seed: int = 0, longest: int = 9) -> tuple[Ragged, Ragged]:
    """`count` distinct rows of token ids below 1000, and segment ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    ids = rng.integers(0, 1000, int(lengths.sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids[offsets], ids[offsets + 1] = np.arange(count) % 1000, np.arange(count) // 1000 + 500 * (seed % 2)
    return Ragged.from_lengths(ids, lengths), Ragged.from_lengths(rng.integers(0, 2, len(ids)), lengths)


def answer(spec: ArraySpec, ids: Ragged, segments: Ragged) -> np.ndarray:
    """What the teacher says: integers that float16 holds exactly."""
    layer = spec.signal.layer or 0
    if spec.axis == "pair":
        # It tells which token attends and which is attended to.
        pairs = [np.stack([np.repeat(row, len(row)), np.tile(row, len(row))], 1) for row in ids]
        return np.concatenate(pairs).astype(np.float32) if pairs else np.zeros((0, 2), np.float32)
    if spec.axis == "token":
        position = np.concatenate([np.arange(n) for n in ids.lengths]) if len(ids) else np.zeros(0)
        found = np.stack([ids.values, position, np.full(len(position), layer), segments.values], 1).astype(np.float32)
        return found if spec.shape == (4,) else np.stack([found, found + 1, -found], 1)
    sums = np.array([row.sum() % 2048 for row in ids])
    columns = [sums, ids.lengths, np.array([row.sum() for row in segments]), np.full(len(ids), layer)]
    return np.stack(columns, 1)[:, : spec.shape[0]].astype(np.float32)


def capture(store: TeacherStore, specs: Sequence[ArraySpec] = SPECS, shards: Iterable[int] | None = None) -> int:
    """Do what cache-teacher does: everything that is missing, shard by shard. Number of shards computed."""
    missing = store.missing(store.declare(specs), shards)
    for shard, todo in missing.items():
        rows = store.read_tokens(shard)
        writer = store.writer(shard, todo)
        slots = np.arange(len(rows.rows))[::-1]
        ids, segments = rows.token_ids.take(slots), rows.segment_ids.take(slots)
        for spec in {spec.signal: spec for spec in todo if not spec.part}.values():
            put = writer.put_tokens if spec.axis == "token" else writer.put_rows
            put(spec.signal, slots, answer(spec, ids, segments))
        writer.commit()
    return len(missing)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync guards against, a power cut, no test here makes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def identity() -> StoreIdentity:
    return StoreIdentity(
        teacher={"digest": "t" * 32, "labels": ("no", "maybe", "yes")},
        tokenizer={"digest": "k" * 32},
        capture={"max_length": 128, "dtype": "float32"},
    )


@pytest.fixture
def make_store(tmp_path: Path, identity: StoreIdentity) -> Callable[..., Made]:
    """Builds a captured store: (store, token ids, segment ids, row numbers)."""

    def make(
        count: int = 30, *, name: str = "store", specs: Sequence[ArraySpec] = SPECS, layout: StoreLayout = LAYOUT
    ) -> Made:
        store = create_or_open(tmp_path / name, identity, layout)
        ids, segments = make_rows(count)
        rows = store.allocate(ids, segments).rows
        capture(store, specs)
        return store, ids, segments, rows

    return make


class Tools:
    """The functions above, for tests (files of tests do not import one another)."""

    specs, layout = SPECS, LAYOUT
    make_rows = staticmethod(make_rows)
    answer = staticmethod(answer)
    capture = staticmethod(capture)
    tree = staticmethod(tree)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
