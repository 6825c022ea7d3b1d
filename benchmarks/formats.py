"""The same teacher outputs in every format that read.py compares, and for each a reader of random rows.

A format is a class: `write` makes its files once, an instance reads them, and `read` gives the batch of some rows as
numpy arrays, one per signal: [B, ...] of signals per example, padded [B, T, HIDDEN] of signals per token. Rows are
positions 0..N-1 of the corpus. What is not installed raises ImportError where it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.pipeline.ragged import Ragged, offsets_of
from kd.pipeline.store import Signal, StoreIdentity, array_spec, create_or_open, open_store

LABELS, HIDDEN = 3, 384
CASES = {
    "logits": ("logits",),
    "hidden.cls": ("hidden.cls@6",),
    "hidden.tok, 1 layer": ("hidden.tok@6",),
    "hidden.tok, 6 layers": tuple(f"hidden.tok@{layer}" for layer in range(1, 7)),
}
SIGNALS = (*CASES["logits"], *CASES["hidden.cls"], *CASES["hidden.tok, 6 layers"])
Array = np.ndarray[Any, Any]


class Corpus:
    """The rows of a made-up store: lengths like those of SST-2 in word pieces, 3 to 66 tokens, 13.5 in the mean."""

    def __init__(self, folder: Path) -> None:
        self.reader = open_store(folder / "kd").reader()
        self.rows = np.load(folder / "rows.npy")
        self.lengths = self.reader.lengths(self.rows)

    def values(self, signal: str) -> Ragged | Array:
        """All rows of a signal in memory: [N, ...], or ragged where it has an entry per token."""
        if not signal.startswith("hidden.tok"):
            return self.reader.gather(signal, self.rows)
        blocks = (self.rows[start : start + 4096] for start in range(0, len(self.rows), 4096))
        return Ragged.concatenate([Ragged.from_padded(*self.reader.gather_tokens(signal, rows)) for rows in blocks])


def make_store(folder: Path, num_rows: int) -> None:
    """A store of random rows with all signals, captured from no teacher."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.lognormal(2.2, 0.7, num_rows)).astype(np.int64) + 2, 3, 66)
    identity = StoreIdentity(teacher={"digest": "none"}, tokenizer={"digest": "none"}, capture={"benchmark": "read"})
    store = create_or_open(folder / "kd", identity)
    ids = Ragged.from_lengths(rng.integers(0, 30000, int(lengths.sum())), lengths)
    np.save(folder / "rows.npy", store.allocate(ids).rows)
    specs = [array_spec(Signal.parse(name), LABELS if name == "logits" else HIDDEN) for name in SIGNALS]
    store.declare(specs)
    for shard, todo in store.missing(specs).items():
        writer, lengths = store.writer(shard, todo), store.read_tokens(shard).token_ids.lengths
        slots = np.arange(len(lengths))
        writer.put_rows("logits", slots, rng.standard_normal((len(slots), LABELS), dtype=np.float32))
        writer.put_rows("hidden.cls@6", slots, _halves(rng, len(slots)))
        for signal in CASES["hidden.tok, 6 layers"]:
            writer.put_tokens(signal, slots, _halves(rng, int(lengths.sum())))
        writer.commit()


def _halves(rng: np.random.Generator, entries: int) -> Array:
    """[entries, HIDDEN] of every finite float16 from 0, equally often."""
    return rng.integers(0, 0x7C00, (entries, HIDDEN), dtype=np.uint16).view(np.float16)


def padded(rows: Sequence[Array]) -> Array:
    """[B, T, HIDDEN] from rows [n, HIDDEN], zeros after a row's end."""
    out = np.zeros((len(rows), max(map(len, rows)), HIDDEN), np.float16)
    for values, row in zip(rows, out, strict=True):
        row[: len(values)] = values
    return out


class Kd:
    """The store itself, every batch gathered into memory that is used again."""

    def __init__(self, folder: Path, signals: Sequence[str]) -> None:
        corpus = Corpus(folder)
        self.reader, self.rows, self.signals = corpus.reader, corpus.rows, signals
        self.out = [np.empty(64 * int(corpus.lengths.max()) * HIDDEN, np.float16) for _ in signals]

    def read(self, batch: Array) -> list[Array]:
        rows = self.rows[batch]
        if not self.signals[0].startswith("hidden.tok"):
            return [self.reader.gather(signal, rows) for signal in self.signals]
        pairs = zip(self.signals, self.out, strict=True)
        return [self.reader.gather_tokens(signal, rows, out=out)[0] for signal, out in pairs]


class Copies:
    """Rows of arrays in memory, copied one by one into memory that is used again: what no reader can beat by much."""

    def __init__(self, folder: Path, signals: Sequence[str]) -> None:
        corpus = Corpus(folder)
        self.values = [corpus.values(signal) for signal in signals]
        self.starts, self.lengths = offsets_of(corpus.lengths), corpus.lengths
        self.out = [np.empty(64 * int(corpus.lengths.max()) * HIDDEN, np.float16) for _ in signals]

    def read(self, batch: Array) -> list[Array]:
        return [self._copied(values, out, batch) for values, out in zip(self.values, self.out, strict=True)]

    def _copied(self, values: Ragged | Array, out: Array, batch: Array) -> Array:
        if not isinstance(values, Ragged):
            copied = np.empty((len(batch), values.shape[1]), values.dtype)
            for place, row in enumerate(batch.tolist()):
                copied[place] = values[row]
            return copied
        lengths, width = self.lengths[batch].tolist(), int(self.lengths[batch].max())
        copied = out[: len(batch) * width * HIDDEN].reshape(len(batch), width, HIDDEN)
        for place, (start, length) in enumerate(zip(self.starts[batch].tolist(), lengths, strict=True)):
            copied[place, :length] = values.values[start : start + length]
            copied[place, length:] = 0
        return copied


class Datasets:
    """A `save_to_disk` folder, read in torch format: ragged [n, HIDDEN] rows, padded by torch."""

    flat = False

    @classmethod
    def write(cls, folder: Path, corpus: Corpus) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset(_table(corpus, flat=cls.flat)).save_to_disk(folder / cls.__name__.lower())

    def __init__(self, folder: Path, signals: Sequence[str]) -> None:
        import datasets
        import torch

        on_disk = datasets.load_from_disk(folder / type(self).__name__.lower()).select_columns([*signals])
        dtype = torch.float32 if signals == CASES["logits"] else torch.float16
        self.rows, self.signals = on_disk.with_format("torch", dtype=dtype), signals

    def read(self, batch: Array) -> list[Array]:
        from torch.nn.utils.rnn import pad_sequence

        found = self.rows[batch.tolist()]
        if not self.signals[0].startswith("hidden.tok"):
            return [found[signal].numpy() for signal in self.signals]
        rows = ([row.view(-1, HIDDEN) for row in found[signal]] for signal in self.signals)
        return [pad_sequence(one, batch_first=True).numpy() for one in rows]


class DatasetsFlat(Datasets):
    """The same with every row a flat list of n * HIDDEN numbers: its fastest form."""

    flat = True


def _table(corpus: Corpus, *, flat: bool) -> Any:
    import pyarrow as pa

    columns = {}
    for signal in SIGNALS:
        values = corpus.values(signal)
        if isinstance(values, Ragged):
            numbers = pa.array(values.values.reshape(-1))
            entries = numbers if flat else pa.FixedSizeListArray.from_arrays(numbers, HIDDEN)
            columns[signal] = pa.LargeListArray.from_arrays(pa.array(values.offsets * (HIDDEN if flat else 1)), entries)
        else:
            columns[signal] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.table(columns)


class Parquet:
    """The same table in Parquet with row groups of 1,000, of which those that a batch needs are read."""

    @classmethod
    def write(cls, folder: Path, corpus: Corpus) -> None:
        import pyarrow.parquet as pq

        pq.write_table(_table(corpus, flat=False), folder / "parquet", row_group_size=1000)

    rows_per_group, file = 1000, "parquet"

    def __init__(self, folder: Path, signals: Sequence[str]) -> None:
        import pyarrow.parquet as pq

        self.parquet, self.signals = pq.ParquetFile(folder / self.file, memory_map=True), signals

    def read(self, batch: Array) -> list[Array]:
        groups, places = np.unique(batch // self.rows_per_group, return_inverse=True)
        table = self.parquet.read_row_groups(groups.tolist(), columns=[*self.signals])
        rows = places * self.rows_per_group + batch % self.rows_per_group
        return [self._values(table.column(signal).combine_chunks().take(rows), signal) for signal in self.signals]

    def _values(self, column: Any, signal: str) -> Array:
        numbers = column.flatten()
        if not signal.startswith("hidden.tok"):
            return numbers.to_numpy().reshape(len(column), -1)
        values = numbers.flatten().to_numpy().reshape(-1, HIDDEN)
        return Ragged(values, np.asarray(column.offsets, dtype=np.int64) - column.offsets[0].as_py()).to_padded()


class ParquetBlobs(Parquet):
    """Its best form for this: each row's bytes as one binary value, row groups of 8, nothing encoded or compressed."""

    rows_per_group, file = 8, "parquet-blobs"

    @classmethod
    def write(cls, folder: Path, corpus: Corpus) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            signal: pa.array([row.tobytes() for row in corpus.values(signal)], pa.binary()) for signal in SIGNALS
        }
        pq.write_table(
            pa.table(columns),
            folder / cls.file,
            row_group_size=cls.rows_per_group,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )

    def _values(self, column: Any, signal: str) -> Array:
        rows = [np.frombuffer(value.as_buffer(), np.float32 if signal == "logits" else np.float16) for value in column]
        return padded([row.reshape(-1, HIDDEN) for row in rows]) if signal.startswith("hidden.tok") else np.stack(rows)


class Zarr:
    """The store's own arrays, row by row through zarr-python."""

    def __init__(self, folder: Path, signals: Sequence[str]) -> None:
        import zarr

        corpus = Corpus(folder)
        store = open_store(folder / "kd")
        self.arrays = [
            zarr.open_array(f"{store.files.address}/{store.spec(signal).path}", mode="r") for signal in signals
        ]
        shards, first, self.lengths = corpus.reader.index.locate(corpus.rows)
        self.by_token = signals[0].startswith("hidden.tok")
        self.starts = shards * store.layout.tokens_per_shard + first if self.by_token else corpus.rows

    def read(self, batch: Array) -> list[Array]:
        starts = self.starts[batch].tolist()
        if not self.by_token:
            return [np.stack([array[start] for start in starts]) for array in self.arrays]
        ends = (self.starts + self.lengths)[batch].tolist()
        return [padded([array[a:b] for a, b in zip(starts, ends, strict=True)]) for array in self.arrays]


class Samples:
    """Formats that keep whole samples: one folder per case, so that a batch of logits reads nothing else."""

    @classmethod
    def write(cls, folder: Path, corpus: Corpus) -> None:
        for case, signals in CASES.items():
            values = [corpus.values(signal) for signal in signals]
            samples = (dict(zip(signals, row, strict=True)) for row in zip(*values, strict=True))
            cls.write_samples(cls.folder_of(folder, case), samples)

    @classmethod
    def folder_of(cls, folder: Path, case: str) -> Path:
        return folder / cls.__name__.lower() / case.replace(", ", "-").replace(" ", "-")

    write_samples: Callable[[Path, Iterator[dict[str, Array]]], None]
    open: Callable[[Path], Any]
    """Both are a subclass's own."""

    def __init__(self, folder: Path, signals: Sequence[str]) -> None:
        case = next(case for case, named in CASES.items() if named == tuple(signals))
        self.samples, self.signals = self.open(self.folder_of(folder, case)), signals

    def read(self, batch: Array) -> list[Array]:
        samples = [self.samples[row] for row in batch.tolist()]
        rows = ([np.asarray(sample[signal]) for sample in samples] for signal in self.signals)
        return [padded(one) if one[0].ndim == 2 else np.stack(one) for one in rows]


class Litdata(Samples):
    """litdata, chunks of 64 MB."""

    @staticmethod
    def write_samples(folder: Path, samples: Iterator[dict[str, Array]]) -> None:
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
        for number, sample in enumerate(samples):
            writer.add_item(number, sample)
        writer.done()
        writer.merge()

    def open(self, folder: Path) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(folder))


class Streaming(Samples):
    """mosaicml-streaming, MDS shards of 64 MB."""

    @staticmethod
    def write_samples(folder: Path, samples: Iterator[dict[str, Array]]) -> None:
        from streaming import MDSWriter

        first = next(samples)
        columns = {signal: f"ndarray:{row.dtype}" for signal, row in first.items()}
        with MDSWriter(out=str(folder), columns=columns, size_limit=64 << 20) as writer:
            writer.write(first)
            for sample in samples:
                writer.write(sample)

    def open(self, folder: Path) -> Any:
        from streaming import StreamingDataset

        return StreamingDataset(local=str(folder), batch_size=1)


FORMATS: dict[str, type[Any]] = {
    "kd": Kd,
    "copies": Copies,
    "datasets": Datasets,
    "datasets flat": DatasetsFlat,
    "zarr": Zarr,
    "parquet": Parquet,
    "parquet blobs": ParquetBlobs,
    "litdata": Litdata,
    "streaming": Streaming,
}
