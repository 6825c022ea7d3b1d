"""A made-up store of any number of rows, written through the store's own API a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd.pipeline.artifact import write_manifest
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import InputRows, Signal, StoreIdentity, TeacherStore, array_spec, create_or_open, write_view

SPECS = (array_spec(Signal("logits"), 3), array_spec(Signal("hidden.cls", 2), 8))
IDENTITY = StoreIdentity(teacher={"digest": "none"}, tokenizer={"digest": "none"}, capture={"benchmark": "scale"})
BLOCK = 1 << 12
"""Rows that kd tokenises at once."""


def blocks_of_ids(num_rows: int) -> Iterator[Ragged]:
    """Token ids of distinct rows, as the tokenizer's blocks come: 3 to 66 tokens, 13.5 in the mean, as in SST-2."""
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, BLOCK):
        count = min(BLOCK, num_rows - start)
        lengths = np.clip(np.rint(rng.lognormal(2.2, 0.7, count)).astype(np.int64) + 2, 3, 66)
        rows = Ragged.from_lengths(rng.integers(0, 30000, int(lengths.sum())), lengths)
        # The first two ids are the row's number, so that no two rows are equal.
        number, first = np.arange(start, start + count), rows.offsets[:-1]
        rows.values[first], rows.values[first + 1] = number % 30000, number // 30000
        yield rows


def add_all(inputs: InputRows, num_rows: int) -> InputRows:
    for ids in blocks_of_ids(num_rows):
        inputs.add(ids)
    return inputs


def open_or_make(folder: Path) -> TeacherStore:
    return create_or_open(folder / "store", IDENTITY)


def capture(store: TeacherStore) -> None:
    """Fill every shard with numbers that no teacher gave."""
    rng = np.random.default_rng(0)
    store.declare(SPECS)
    for shard, todo in store.missing(SPECS).items():
        writer = store.writer(shard, todo)
        slots = np.arange(writer.num_rows)
        for spec in todo:
            writer.put_rows(spec.signal, slots, rng.standard_normal((len(slots), *spec.shape), dtype=np.float32))
        writer.commit()
    store.compact(only_if_many=True)


def make_view(folder: Path, store: TeacherStore, rows: Any) -> None:
    """A view of all rows; its examples have an id and nothing else, so that what is measured is kd's part of it."""
    ids = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(8), len(rows), [None, pa.py_buffer(np.arange(len(rows), dtype=">i8"))]
    )
    content = write_view(folder / "view", pa.table({"example_id": ids}), rows, store, SPECS)
    write_manifest(folder / "view", {"kind": "view", "fingerprint": "f" * 32, "content": content})
