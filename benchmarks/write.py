"""How fast shards are committed, beside a raw write of the same bytes to a file that is fsynced.

    python benchmarks/write.py [--quick] [--megabytes 40] [--shards 4] [--rounds 5] [--folder FOLDER]

A shard is rows of made-up `hidden.tok` (384 wide, float16) in memory; the ways, taken in turn, in one folder:

- kd: check, put and commit each shard: hash, write, fsync, rename, record;
- kd, 6 layers: the same bytes as six layers, in six files a shard;
- raw: one file (or six) a shard, written from memory in one call, fsynced, closed.

Also what the parts of a commit cost alone: hashing, and copying into the shard's buffer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from report import Figure, Timed, compared, finish, take_turns

WIDTH, LAYERS, TOKENS_PER_ROW = 384, 6, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shards, three rounds")
    parser.add_argument("--megabytes", type=float, default=40, help="of a shard")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--folder", help="where to write; the folder for temporary files by default")
    arguments = parser.parse_args()
    shards = arguments.shards or (2 if arguments.quick else 4)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="kd-bench-") as folder:
        bench = Bench(Path(folder), arguments.megabytes, shards)
        seconds = take_turns(
            {
                "kd": lambda: bench.commit(1),
                "raw write + fsync": bench.raw,
                f"kd, {LAYERS} layers": lambda: bench.commit(LAYERS),
                f"raw, {LAYERS} files a shard": lambda: bench.raw(LAYERS),
            },
            rounds,
        )
        parts = take_turns({"copy": bench.copy, "hash": bench.hash}, rounds)
    megabytes = bench.megabytes

    def rate(spent: float) -> float:
        return megabytes / spent

    what = f"{shards} shards of {megabytes / shards:.0f} MB"
    one, many = [*seconds][:2], [*seconds][2:]
    figures: list[Figure] = [
        *compared(f"{what}, one file each", {way: seconds[way] for way in one}, unit="MB/s", number=rate),
        *compared(f"{what}, {LAYERS} files each", {way: seconds[way] for way in many}, unit="MB/s", number=rate),
        *(
            compared(f"{what}, {name} alone", {"kd": times}, unit="MB/s", number=rate)[0]
            for name, times in parts.items()
        ),
    ]
    settings = {"megabytes": megabytes, "shards": shards, "rounds": rounds, "folder": arguments.folder or "temporary"}
    finish("write", figures, settings)


class Bench:
    """Values in memory, and the ways to get them onto the disk."""

    def __init__(self, folder: Path, megabytes: float, shards: int) -> None:
        from kd.pipeline.ragged import Ragged
        from kd.pipeline.store import StoreIdentity, StoreLayout

        self.folder, self.shards = folder, shards
        # As many tokens for all layers together as for the one, so that both write the same bytes.
        self.rows = max(1, int(megabytes * 1e6 / (2 * WIDTH * TOKENS_PER_ROW * LAYERS)))
        tokens = self.rows * TOKENS_PER_ROW
        self.values = np.random.default_rng(0).standard_normal((LAYERS * tokens, WIDTH), np.float32).astype(np.float16)
        self.megabytes = self.values.nbytes * shards / 1e6
        self.identity = StoreIdentity(teacher={}, tokenizer={}, capture={})
        self.layout = {
            layers: StoreLayout(
                rows_per_shard=self.rows * LAYERS // layers, tokens_per_shard=max(1024, tokens * LAYERS // layers)
            )
            for layers in (1, LAYERS)
        }
        self.token_ids = {
            layers: Ragged.from_lengths(
                np.arange(shards * tokens * LAYERS // layers) // 7 % 60_000,
                np.full(shards * self.rows * LAYERS // layers, TOKENS_PER_ROW),
            )
            for layers in (1, LAYERS)
        }
        self.buffer = np.empty_like(self.values)

    def commit(self, layers: int) -> Timed:
        from kd.pipeline.ragged import Ragged
        from kd.pipeline.store import array_spec, create_or_open, parse_signals

        token_ids = self.token_ids[layers]
        segment_ids = Ragged(np.zeros(len(token_ids.values), dtype=np.uint8), token_ids.offsets)
        signals = parse_signals(f"hidden.tok@1-{layers}" if layers > 1 else "hidden.tok@1", LAYERS)
        specs = tuple(array_spec(signal, WIDTH) for signal in signals)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            store = create_or_open(Path(folder) / "store", self.identity, self.layout[layers])
            allocation = store.allocate(token_ids, segment_ids)
            store.declare(specs)
            started = time.perf_counter()
            for shard in allocation.shards:
                writer = store.writer(shard, specs)
                entries = writer.num_rows * TOKENS_PER_ROW
                for number, spec in enumerate(specs):
                    writer.put_tokens(
                        spec.signal, np.arange(writer.num_rows), self.values[number * entries : (number + 1) * entries]
                    )
                assert writer.commit() is not None
            seconds = time.perf_counter() - started
            held = len(allocation.shards) * entries * len(specs) * 2 * WIDTH / 1e6
        return Timed(seconds * self.megabytes / held)

    def raw(self, files: int = 1) -> Timed:
        part = memoryview(self.values).cast("B")
        step = len(part) // files
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started = time.perf_counter()
            for number in range(self.shards * files):
                with open(f"{folder}/{number}", "wb", buffering=0) as stream:
                    stream.write(part[number % files * step : (number % files + 1) * step])
                    os.fsync(stream.fileno())
            seconds = time.perf_counter() - started
        return Timed(seconds)

    def copy(self) -> None:
        for _ in range(self.shards):
            self.buffer[...] = self.values

    def hash(self) -> None:
        from kd.pipeline.store.records import hash_parts

        for _ in range(self.shards):
            hash_parts([self.values.reshape(-1).view(np.uint8)])


if __name__ == "__main__":
    main()
