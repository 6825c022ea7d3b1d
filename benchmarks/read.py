"""Reading shuffled batches from a store, beside three other ways to read the same rows.

    python benchmarks/read.py [--rows 67349] [--batches 300] [--rounds 5] [--folder DIR]

Same rows, same order, same output: logits [64, 3] float32, and hidden.tok as padded [64, T, 384] float16.
- datasets: a `save_to_disk` folder of the same ragged [n, 384] rows, torch format, padded.
- flat: the same with each row flattened to a list of n * 384 numbers and reshaped by hand, its fastest form.
- zarr: one read of the store's own array per row, through zarr-python.
- copies: rows of one array in memory copied one by one, what no reader can be expected to beat by much.
Ways take turns within a round, so a machine that slows down slows all of them; figures are medians over rounds.
Lengths are drawn like those of SST-2 in word pieces: 3 to 66, mean 13.5.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import Figure, Timed, compared, finish, take_turns

from kd.pipeline.ragged import Ragged, offsets_of, ranges
from kd.pipeline.store import Signal, StoreIdentity, StoreReader, TeacherStore, array_spec, create_or_open

BATCH, LABELS, HIDDEN = 64, 3, 384
LOGITS, TOKENS = Signal("logits"), Signal("hidden.tok", 6)
TARGETS = {
    "logits": {"datasets": 10.0, "zarr": 100.0},
    "hidden.tok@6": {"datasets": 10.0, "zarr": 100.0, "copies": 0.8},
    "hidden.tok@6 bucketed": {"copies": 0.8},
}
Batches = list[np.ndarray[Any, Any]]


def make_store(folder: Path, lengths: np.ndarray[Any, Any], rng: np.random.Generator) -> TeacherStore:
    """A store of random rows, captured from no teacher."""
    identity = StoreIdentity(teacher={"digest": "none"}, tokenizer={"digest": "none"}, capture={"benchmark": "read"})
    store = create_or_open(folder, identity)
    ids = Ragged.from_lengths(rng.integers(0, 30000, int(lengths.sum())), lengths)
    store.allocate(ids)
    specs = [array_spec(LOGITS, LABELS), array_spec(TOKENS, HIDDEN)]
    store.declare(specs)
    for shard, todo in store.missing(specs).items():
        rows = store.read_tokens(shard)
        writer, slots = store.writer(shard, todo), np.arange(len(rows.rows))
        writer.put_rows(LOGITS, slots, rng.standard_normal((len(slots), LABELS), dtype=np.float32))
        total = len(rows.token_ids.values)
        # Every finite float16, equally often.
        writer.put_tokens(TOKENS, slots, rng.integers(0, 0x7C00, (total, HIDDEN), dtype=np.uint16).view(np.float16))
        writer.commit()
    return store


class Ways:
    """The same batches, read in different ways. Every way takes row positions 0..N-1."""

    def __init__(self, store: TeacherStore, lengths: np.ndarray[Any, Any], folder: Path) -> None:
        self.reader: StoreReader = store.reader()
        keys_of_all = np.concatenate([store.read_tokens(shard).rows for shard in range(store.catalogue().num_shards)])
        self.rows, self.lengths = keys_of_all, self.reader.lengths(keys_of_all)
        assert sorted(self.lengths) == sorted(lengths)
        self.starts = offsets_of(self.lengths)
        self.logits = self.reader.gather(LOGITS, self.rows)
        parts = [self._tokens(chunk) for chunk in np.array_split(np.arange(len(self.rows)), len(self.rows) // 4096 + 1)]
        self.tokens = np.concatenate(parts)
        self.out = np.empty(BATCH * int(self.lengths.max()) * HIDDEN, dtype=np.float16)
        _, first, _ = self.reader.index.locate(self.rows)
        self.zarr_starts = self.rows // store.layout.rows_per_shard * store.layout.tokens_per_shard + first
        self._open_zarr(store)
        self._open_datasets(folder)

    def _tokens(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values, lengths = self.reader.gather_tokens(TOKENS, self.rows[positions])
        return Ragged.from_padded(values, lengths).values

    def _open_zarr(self, store: TeacherStore) -> None:
        import zarr

        self.zarr_logits, self.zarr_tokens = (
            zarr.open_array(f"{store.files.address}/{store.spec(signal).path}", mode="r") for signal in (LOGITS, TOKENS)
        )

    def _open_datasets(self, folder: Path) -> None:
        import datasets
        import pyarrow as pa
        import torch

        datasets.disable_progress_bars()
        numbers = pa.array(self.tokens.reshape(-1))
        table = pa.table(
            {
                "logits": pa.FixedSizeListArray.from_arrays(pa.array(self.logits.reshape(-1)), LABELS),
                "tokens": pa.LargeListArray.from_arrays(
                    pa.array(self.starts), pa.FixedSizeListArray.from_arrays(numbers, HIDDEN)
                ),
                "flat": pa.LargeListArray.from_arrays(pa.array(self.starts * HIDDEN), numbers),
            }
        )
        datasets.Dataset(table).save_to_disk(folder)
        on_disk = datasets.load_from_disk(folder)
        self.datasets_logits = on_disk.select_columns(["logits"]).with_format("torch")
        self.flat_tokens = on_disk.select_columns(["flat"]).with_format("torch", dtype=torch.float16)
        self.datasets_tokens = on_disk.select_columns(["tokens"]).with_format("torch", dtype=torch.float16)

    def logits_kd(self, batch: np.ndarray[Any, Any]) -> Any:
        return self.reader.gather(LOGITS, self.rows[batch])

    def logits_copies(self, batch: np.ndarray[Any, Any]) -> Any:
        out = np.empty((len(batch), LABELS), dtype=np.float32)
        for i, row in enumerate(batch.tolist()):
            out[i] = self.logits[row]
        return out

    def logits_datasets(self, batch: np.ndarray[Any, Any]) -> Any:
        return self.datasets_logits[batch.tolist()]["logits"]

    def logits_zarr(self, batch: np.ndarray[Any, Any]) -> Any:
        return np.stack([self.zarr_logits[row] for row in self.rows[batch].tolist()])

    def tokens_kd(self, batch: np.ndarray[Any, Any]) -> Any:
        return self.reader.gather_tokens(TOKENS, self.rows[batch], out=self.out)[0]

    def tokens_copies(self, batch: np.ndarray[Any, Any]) -> Any:
        out = self._padded(batch)
        starts, lengths = self.starts[batch].tolist(), self.lengths[batch].tolist()
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            out[i, :length] = self.tokens[start : start + length]
            out[i, length:] = 0
        return out

    def tokens_unpadded(self, batch: np.ndarray[Any, Any]) -> Any:
        """Less work than the others do: the rows one after another, no padding written."""
        positions = ranges(self.starts[batch], self.lengths[batch])
        out = self.out[: len(positions) * HIDDEN].reshape(-1, HIDDEN)
        return np.take(self.tokens, positions, axis=0, out=out, mode="clip")

    def tokens_datasets(self, batch: np.ndarray[Any, Any]) -> Any:
        from torch.nn.utils.rnn import pad_sequence

        return pad_sequence(self.datasets_tokens[batch.tolist()]["tokens"], batch_first=True)

    def tokens_flat(self, batch: np.ndarray[Any, Any]) -> Any:
        from torch.nn.utils.rnn import pad_sequence

        rows = self.flat_tokens[batch.tolist()]["flat"]
        return pad_sequence([row.view(-1, HIDDEN) for row in rows], batch_first=True)

    def tokens_zarr(self, batch: np.ndarray[Any, Any]) -> Any:
        out = self._padded(batch)
        out[...] = 0
        starts, lengths = self.zarr_starts[batch].tolist(), self.lengths[batch].tolist()
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            out[i, :length] = self.zarr_tokens[start : start + length]
        return out

    def _padded(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        width = int(self.lengths[batch].max())
        return self.out[: len(batch) * width * HIDDEN].reshape(len(batch), width, HIDDEN)


def measure(
    ways: dict[str, Callable[[np.ndarray[Any, Any]], Any]], batches: Batches, counts: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Seconds per batch of each way and round; a round reads other batches than the one before."""

    def reading(name: str, read: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[], Timed]:
        turn = iter(range(rounds + 1))

        def go() -> Timed:
            start = next(turn) * counts[name] % max(1, len(batches) - counts[name])
            chosen = batches[start : start + counts[name]]
            started = time.perf_counter()
            for batch in chosen:
                read(batch)
            return Timed((time.perf_counter() - started) / len(chosen))

        return go

    return take_turns({name: reading(name, read) for name, read in ways.items()}, rounds)


def check_equal(ways: dict[str, Callable[[np.ndarray[Any, Any]], Any]], batch: np.ndarray[Any, Any]) -> None:
    """All ways give the same numbers."""
    expected = np.array(ways["kd"](batch))
    for name, read in ways.items():
        if name != "unpadded":
            np.testing.assert_array_equal(np.asarray(read(batch)), expected, err_msg=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=67349, help="rows in the store (SST-2 has 67,349)")
    parser.add_argument("--batches", type=int, default=300, help="batches a fast way reads per round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one warm-up")
    parser.add_argument("--folder", type=Path, help="where to build the store (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options.rows, options.batches, options.rounds)


def run(folder: Path, num_rows: int, num_batches: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.lognormal(2.2, 0.7, num_rows)).astype(np.int64) + 2, 3, 66)
    store = make_store(folder / "store", lengths, rng)
    ways = Ways(store, lengths, folder / "datasets")
    order = rng.permutation(num_rows)
    shuffled = [order[i : i + BATCH] for i in range(0, num_rows - BATCH + 1, BATCH)]
    # As a sampler with length buckets gives them: sorted inside pools of 50 batches, batches shuffled.
    pools = [order[i : i + 50 * BATCH] for i in range(0, num_rows, 50 * BATCH)]
    sorted_rows = np.concatenate([pool[np.argsort(ways.lengths[pool], kind="stable")] for pool in pools])
    bucketed = [sorted_rows[i : i + BATCH] for i in range(0, num_rows - BATCH + 1, BATCH)]
    rng.shuffle(bucketed)

    few = max(2, num_batches // 100)
    counts = {
        "kd": num_batches,
        "copies": num_batches,
        "unpadded": num_batches,
        "datasets": max(2, num_batches // 30),
        "flat": max(2, num_batches // 10),
        "zarr": few,
    }
    cases = {
        "logits": (["kd", "copies", "datasets", "zarr"], "logits_", shuffled),
        "hidden.tok@6": (["kd", "copies", "unpadded", "datasets", "flat", "zarr"], "tokens_", shuffled),
        "hidden.tok@6 bucketed": (["kd", "copies", "unpadded", "datasets", "flat", "zarr"], "tokens_", bucketed),
    }
    figures: list[Figure] = []
    for case, (names, prefix, batches) in cases.items():
        chosen = {name: getattr(ways, prefix + name) for name in names}
        check_equal(chosen, batches[0])
        seconds = measure(chosen, batches, counts, rounds)
        figures += compared(case, seconds, unit="us/batch", number=lambda s: s * 1e6, at_least=TARGETS[case])
    settings = {"rows": num_rows, "batch": BATCH, "rounds": rounds}
    finish("read", figures, settings, notes=["`unpadded` writes no padding, and is there for scale"])


if __name__ == "__main__":
    main()
