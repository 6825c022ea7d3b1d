"""Verifying a store, beside hashing the same files and doing nothing else.

    python benchmarks/verify.py [--quick] [--rows 20000] [--rounds 5] [--folder DIR]

Both read every file from the page cache, in one process on one core:
- kd: `verify_store`: checksums, the index against its columns, row keys against token ids, metadata, records.
- xxh3: the files read into one buffer of 1 MiB and hashed with XXH3-128, file after file.
Ways take turns within a round; figures are medians over rounds. Seconds are those of the processor, so that other work
on the machine counts little; the load it had is printed. Two stores, since the row keys are hashed one by one, whatever
a row carries: one with the hidden states of all tokens (384 wide, float16), one with three logits a row and no more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from report import Figure, compared, finish, take_turns

from kd.pipeline.ragged import Ragged
from kd.pipeline.store import ArraySpec, Signal, StoreIdentity, TeacherStore, array_spec, create_or_open, verify_store

LABELS, HIDDEN = 3, 384
LOGITS, TOKENS = array_spec(Signal("logits"), LABELS), array_spec(Signal("hidden.tok", 6), HIDDEN)
TARGET_GB_PER_S = 1.0


def make_store(folder: Path, lengths: np.ndarray[Any, Any], specs: Sequence[ArraySpec]) -> TeacherStore:
    """A store of random rows, captured from no teacher."""
    rng = np.random.default_rng(0)
    identity = StoreIdentity(teacher={"digest": "none"}, tokenizer={"digest": "none"}, capture={"benchmark": "verify"})
    store = create_or_open(folder, identity)
    store.allocate(Ragged.from_lengths(rng.integers(0, 30000, int(lengths.sum())), lengths))
    store.declare(specs)
    for shard, todo in store.missing(specs).items():
        rows = store.read_tokens(shard)
        writer, slots = store.writer(shard, todo), np.arange(len(rows.rows))
        writer.put_rows(LOGITS.signal, slots, rng.standard_normal((len(slots), LABELS), dtype=np.float32))
        if TOKENS in todo:
            values = rng.integers(0, 0x7C00, (len(rows.token_ids.values), HIDDEN), dtype=np.uint16).view(np.float16)
            writer.put_tokens(TOKENS.signal, slots, values)
        writer.commit()
    return store


def hash_all(paths: Sequence[Path]) -> int:
    """Hash files and return how many bytes they have."""
    buffer, total = memoryview(bytearray(1 << 20)), 0
    for path in paths:
        digest = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                total += count
        digest.digest()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--rows", type=int, help="in each store (default 20,000; 5,000 if quick)")
    parser.add_argument("--rounds", type=int, help="timed rounds, after one warm-up (default 5; 2 if quick)")
    parser.add_argument("--folder", type=Path, help="where to build the stores (default: a temporary folder)")
    options = parser.parse_args()
    num_rows, rounds = (
        options.rows or (5_000 if options.quick else 20_000),
        options.rounds or (2 if options.quick else 5),
    )
    rng = np.random.default_rng(1)
    lengths = np.clip(np.rint(rng.lognormal(2.2, 0.7, num_rows)).astype(np.int64) + 2, 3, 66)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, specs in {"logits, hidden.tok@6": (LOGITS, TOKENS), "logits": (LOGITS,)}.items():
            store = make_store(Path(folder) / name.split(",")[-1].strip(), lengths, specs)
            paths = [path for path in sorted(Path(store.url).rglob("*")) if path.is_file()]
            size = hash_all(paths)
            assert verify_store(store.url).ok
            ways = {"kd": lambda s=store: verify_store(s.url), "xxh3": lambda p=paths: hash_all(p)}
            seconds = take_turns(ways, rounds, clock=time.process_time)
            kd, xxh3 = compared(name, seconds, unit="GB/s", number=lambda s, size=size: size / s / 1e9)
            figures += [replace(kd, at_least=TARGET_GB_PER_S if TOKENS in specs else None), xxh3]
            rate = num_rows / statistics.median(seconds["kd"])
            figures.append(Figure(what=name, way="kd", value=rate, unit="rows/s"))
    settings = {"rows": num_rows, "rounds": rounds, "clock": "processor"}
    finish("verify", figures, settings)


if __name__ == "__main__":
    main()
