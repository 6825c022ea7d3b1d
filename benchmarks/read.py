"""Reading random batches of 64 rows from a store, beside other formats and beside bare copies of rows in memory.

    python benchmarks/read.py [--quick] [--rows 6000] [--batches 200] [--rounds 3] [--formats kd,copies,...]

Same rows, same order, same numbers, checked on a batch before anything is timed; `formats.py` has the ways. Every way
runs in a process of its own, which holds its files open, and has a turn in every round.
- warm: all files are in the page cache; of two processes, time is until both are done, with other rows each.
- cold: before a turn all readers are closed, one opens its files, and they are thrown out of the page cache. How much
  of them the kernel still holds (`mincore`) is printed; where that is more than 2 % it was not cold, and it says so.
Slow ways read fewer batches; row reads through zarr read the first 8 rows of a batch, which count eightfold.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from formats import CASES, FORMATS, Array, Corpus, make_store
from report import Figure, Timed, compared, finish, take_turns

BATCH = 64
AT_LEAST = {"datasets": 10.0, "zarr": 100.0}
SHARE_OF_COPIES = 0.8
"""Of `hidden.tok`: other signals are too small for the copying to matter."""
BATCHES_LESS = {"datasets": 40, "datasets flat": 20, "zarr": 100, "parquet": 100, "parquet blobs": 20}
"""Slow ways read so many times fewer batches a turn."""
ZARR_ROWS = 8
IN_TWO = ("kd", "copies", "datasets")
NOT_COLD = 0.02


class Reader:
    """One way in a process of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, folder), daemon=True)
        self.process.start()

    def ask(self, *question: Any) -> Any:
        self.send(*question)
        return self.answer()

    def send(self, *question: Any) -> None:
        self.connection.send(question)

    def answer(self) -> Any:
        """What it answers; ImportError where its library is not installed."""
        found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        self.connection.close()
        self.process.join(5)


def _serve(connection: Connection, name: str, folder: Path) -> None:
    way: Any = None
    while True:
        try:
            verb, *details = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = None
            if verb == "open":
                way = None  # closes its files before they are opened again
                way = FORMATS[name](folder, details[0])
            elif verb == "close":
                way = None
            elif verb == "batch":
                answer = way.read(details[0])
            else:
                started = time.perf_counter()
                for batch in details[0]:
                    way.read(batch)
                answer = time.perf_counter() - started
            connection.send(answer)
        except Exception as error:
            connection.send(ImportError(str(error)) if isinstance(error, ImportError) else RuntimeError(repr(error)))


def files_of(folder: Path, name: str) -> list[Path]:
    """The files that a way reads."""
    where = {"kd": "kd", "zarr": "kd"}.get(name, name.replace(" ", "").replace("parquetb", "parquet-b"))
    place = folder / where
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def evict(files: Sequence[Path]) -> float:
    """Throw files out of the page cache, and return the share of their pages that the kernel still holds."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    held = pages = 0
    for path in files:
        if path.stat().st_size:
            there = _resident(path)
            held, pages = held + int(there.sum()), pages + len(there)
    return held / max(1, pages)


def _resident(path: Path) -> Array:
    """[pages] bool: which pages of a file are in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        there = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, ctypes.c_void_p(there.ctypes.data))
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return (there & 1).astype(bool)


class Turns:
    """Batches in random order, a part of them for every turn, so that no turn reads what the one before it read."""

    def __init__(self, num_rows: int, num_batches: int) -> None:
        self._rng, self._num_rows, self._num_batches = np.random.default_rng(1), num_rows, num_batches
        self.seen: list[Array] = []

    def next(self, name: str) -> list[Array]:
        count = max(1, self._num_batches // BATCHES_LESS.get(name, 2 if name in ("litdata", "streaming") else 1))
        rows = self._rng.integers(self._num_rows, size=(count, BATCH))
        return [batch[:ZARR_ROWS] for batch in rows] if name == "zarr" else [*rows]


def turn(readers: Sequence[Reader], turns: Turns) -> Callable[[], Timed]:
    """Seconds a batch: of one process, or of several that read at once."""
    name = readers[0].name

    def go() -> Timed:
        parts = [turns.next(name) for _ in readers]
        for reader, part in zip(readers, parts, strict=True):
            reader.send("read", part)
        slowest = max(reader.answer() for reader in readers)
        eightfold = BATCH / ZARR_ROWS if name == "zarr" else 1
        return Timed(slowest * eightfold / sum(map(len, parts)))

    return go


def cold_turn(reader: Reader, turns: Turns, files: Sequence[Path], signals: Sequence[str], held: list[float]) -> Any:
    """The same with nothing in the page cache; the share that was there in spite of all goes into `held`.

    All other readers are closed: the kernel keeps the pages that somebody has mapped.
    """
    warm = turn([reader], turns)

    def go() -> Timed:
        reader.ask("open", signals)
        held.append(evict(files))
        spent = warm()
        reader.ask("close")
        return spent

    return go


def opened(folder: Path, names: Sequence[str], notes: list[str]) -> Iterator[Reader]:
    """A process for each way whose library is there; a note for every other."""
    for name in names:
        reader = Reader(name, folder)
        try:
            reader.ask("open", CASES["logits"])
        except ImportError as error:
            notes.append(f"{name}: not installed ({error})")
            reader.end()
            continue
        yield reader


def write_formats(folder: Path, names: Sequence[str], notes: list[str]) -> list[str]:
    """Write the rows in every format that can be, and return the ways that there are."""
    corpus, there = Corpus(folder), []
    for name in names:
        try:
            if write := getattr(FORMATS[name], "write", None):
                write(folder, corpus)
            there.append(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: what it needs is there in another build
            notes.append(f"{name}: not installed, or not beside these versions ({error})")
    os.sync()
    return there


def compare(case: str, seconds: dict[str, list[float]], *, targets: bool) -> list[Figure]:
    at_least = AT_LEAST | ({"copies": SHARE_OF_COPIES} if case.startswith("hidden.tok") else {})
    return compared(case, seconds, unit="us/batch", number=lambda s: s * 1e6, at_least=at_least if targets else None)


def run(folder: Path, options: argparse.Namespace) -> None:
    notes: list[str] = []
    make_store(folder, options.rows)
    names = write_formats(folder, options.formats.split(","), notes)
    readers = list(opened(folder, names, notes))
    second = [] if options.quick else [Reader(reader.name, folder) for reader in readers if reader.name in IN_TWO]
    turns, figures = Turns(options.rows, options.batches), list[Figure]()
    some = np.random.default_rng(2).integers(options.rows, size=BATCH)
    for case, signals in CASES.items():
        for reader in (*readers, *second):
            reader.send("open", signals)
        for reader in (*readers, *second):
            reader.answer()
        expected = readers[0].ask("batch", some)
        for reader in readers[1:]:
            for mine, kd in zip(reader.ask("batch", some), expected, strict=True):
                np.testing.assert_array_equal(mine, kd, err_msg=f"{case}, {reader.name}")
        seconds = take_turns({reader.name: turn([reader], turns) for reader in readers}, options.rounds)
        figures += compare(case, seconds, targets=True)
        pairs = {one.name: turn([one, two], turns) for one in readers for two in second if one.name == two.name}
        if pairs:
            figures += compare(f"{case}, 2 processes", take_turns(pairs, options.rounds), targets=True)
        if case in options.cold:
            for reader in (*readers, *second):
                reader.ask("close")
            held: dict[str, list[float]] = {reader.name: [] for reader in readers if reader.name != "copies"}
            cold = {
                reader.name: cold_turn(reader, turns, files_of(folder, reader.name), signals, held[reader.name])
                for reader in readers
                if reader.name in held
            }
            figures += compare(f"{case}, cold", take_turns(cold, max(1, options.rounds // 2)), targets=False)
            for name, shares in held.items():
                said = "" if max(shares) <= NOT_COLD else ": could not be made cold"
                notes.append(f"{case}, cold, {name}: at most {max(shares):.1%} still in the page cache{said}")
    for reader in (*readers, *second):
        reader.end()
    settings = {"rows": options.rows, "batch": BATCH, "batches": options.batches, "rounds": options.rounds}
    finish("read", figures, settings, notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows in the store: 6,000, or 2,000 with --quick")
    parser.add_argument("--batches", type=int, help="batches that a fast way reads per turn: 200, or 50 with --quick")
    parser.add_argument("--rounds", type=int, help="timed rounds after one that warms up: 3, or 2 with --quick")
    parser.add_argument("--formats", default=",".join(FORMATS), help="ways to compare; the first is always kd")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, one process, cold of one case")
    parser.add_argument("--folder", type=Path, help="where to write the files (default: a temporary folder)")
    options = parser.parse_args()
    options.rows = options.rows or (2_000 if options.quick else 6_000)
    options.batches = options.batches or (50 if options.quick else 200)
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.cold = ["hidden.tok, 1 layer"] if options.quick else ["logits", "hidden.tok, 1 layer"]
    options.formats = ",".join(["kd", *(name for name in options.formats.split(",") if name != "kd")])
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="kd-bench-") as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
