"""Peak resident memory and time per row of what is done to all rows at once, as rows grow a hundredfold.

    python benchmarks/scale.py [--quick] [--sizes 100000,1000000,10000000] [--folder DIR]

- plan: a new corpus into an empty store: tokenised rows to keys, looked up, packed into shards, the shards allocated;
- plan again: the same corpus into the store that has it: every row is looked up among all rows;
- view: opening a view of all rows, every row key compared with the store's;
- epoch: the view, the lengths of its rows, and every batch of 64 of an epoch of training, without what the rows hold.

Rows are made up a block at a time, and making them does not count: it is timed alone, and takes no part in a peak but
where they are handed over. Every phase and size is a process of its own.
`peak` is the most that the process had resident (VmHWM): interpreter, libraries and mapped pages included; the target
is about this one, and ratios are against the smallest size. `own` is the most that was its own and could only go to
swap (RssAnon), looked up every 2 ms. `imports` is what it had resident before it began.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import Figure, finish

AT_MOST = 1.2
PHASES = ("plan", "plan again", "view", "epoch")
BATCH = 64


# --- one phase, in a process of its own ---------------------------------------------------------------------------


def plan(folder: Path, num_rows: int) -> float:
    from large_store import add_all, open_or_make

    from kd.pipeline.store import InputRows
    from kd.pipeline.store.scratch import passed

    store = open_or_make(folder)
    _ready()
    started = time.perf_counter()
    inputs = add_all(InputRows(store.layout), num_rows)
    assert store.preview(inputs).num_new == (0 if store.catalogue().num_shards else num_rows)
    rows = store.allocate_inputs(inputs).rows
    spent = time.perf_counter() - started
    with (folder / "rows").open("wb") as file:
        for _, part in passed(rows):
            file.write(part.tobytes())
    return spent


def making(folder: Path, num_rows: int) -> float:
    """What `plan` spends on rows that a corpus would have."""
    from large_store import blocks_of_ids

    started = time.perf_counter()
    for _ in blocks_of_ids(num_rows):
        pass
    return time.perf_counter() - started


def view(folder: Path, num_rows: int) -> float:
    from kd.pipeline.store import open_view

    _ready()
    started = time.perf_counter()
    assert len(open_view(folder / "view")) == num_rows
    return time.perf_counter() - started


def epoch(folder: Path, num_rows: int) -> float:
    import numpy as np

    from kd.pipeline.store import open_view
    from kd.stages.train_student.order import BatchOrder
    from kd.stages.train_student.rows import StoredTokens, StoreRows
    from kd.stages.train_student.training import _numbers

    _ready()
    started = time.perf_counter()
    opened = open_view(folder / "view")
    lengths = StoredTokens(StoreRows([opened.reader], [opened.rows])).lengths
    order = BatchOrder(rows=_numbers(np.ones(num_rows, dtype=bool)), lengths=lengths, batch_size=BATCH, seed=1)
    count = sum(len(batch) for batch in order.batches(0))
    spent = time.perf_counter() - started
    assert count == num_rows // BATCH * BATCH
    return spent


RUN: dict[str, Callable[[Path, int], float]] = {
    "plan": plan, "plan again": plan, "view": view, "epoch": epoch, "making": making,
}  # fmt: skip


def _ready() -> None:
    """Import what is imported where it is first used, and say how much is resident then."""
    import pyarrow.parquet  # noqa: F401

    import kd.pipeline.store.index
    import kd.pipeline.store.reader
    import kd.pipeline.store.view  # noqa: F401

    print(json.dumps({"imports_kb": _status("VmRSS")}), flush=True)


def _status(field: str, pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


# --- all of them --------------------------------------------------------------------------------------------------


def measured(phase: str, folder: Path, num_rows: int) -> dict[str, float]:
    """Run a phase: its seconds and, in kB, `imports`, `peak` and `own`."""
    command = [sys.executable, __file__, "--phase", phase, "--sizes", str(num_rows), "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        own = 0
        while process.poll() is None:
            try:
                own = max(own, _status("RssAnon", process.pid))
            except (FileNotFoundError, ProcessLookupError):
                break
            time.sleep(0.002)
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{phase} of {num_rows} rows failed")
    said: dict[str, float] = {}
    for line in output.splitlines():
        said |= json.loads(line)
    return said | {"own_kb": own}


def prepare(folder: Path) -> None:
    """What `view` and `epoch` read."""
    import numpy as np
    from large_store import capture, make_view, open_or_make

    store = open_or_make(folder)
    capture(store)
    make_view(folder, store, np.memmap(folder / "rows", dtype=np.int64, mode="r"))


def figures_of(phase: str, sizes: list[int], results: list[dict[str, float]]) -> list[Figure]:
    figures = []
    for kind in ("peak", "own", "imports"):
        smallest = results[0][f"{kind}_kb"]
        for size, result in zip(sizes, results, strict=True):
            ratio = result[f"{kind}_kb"] / smallest if size != sizes[0] and kind != "imports" else None
            target = AT_MOST if kind == "peak" and size == sizes[-1] and ratio else None
            megabytes = result[f"{kind}_kb"] / 1024
            row = {"what": f"{phase}: {kind}", "way": f"{size:,} rows", "value": megabytes, "unit": "MiB"}
            figures.append(Figure(**row, ratio=ratio, at_most=target))
    for size, result in zip(sizes, results, strict=True):
        per_row_us = result["seconds"] / size * 1e6
        figures.append(Figure(what=f"{phase}: time", way=f"{size:,} rows", value=per_row_us, unit="us/row"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="rows, rising: 100000,1000000,10000000, or the first two with --quick")
    parser.add_argument("--quick", action="store_true", help="not the largest size")
    parser.add_argument("--folder", type=Path, help="where to keep the stores (default: a temporary folder)")
    parser.add_argument("--phase", choices=(*RUN, "prepare"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = options.sizes or ("100000,1000000" if options.quick else "100000,1000000,10000000")
    sizes = [int(size) for size in asked.split(",")]
    if options.phase == "prepare":
        prepare(options.folder)
        print(json.dumps({}))
        return
    if options.phase:
        seconds = RUN[options.phase](options.folder, sizes[0])
        print(json.dumps({"seconds": seconds, "peak_kb": _status("VmHWM")}))
        return
    results: dict[str, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    notes = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="kd-bench-") as scratch:
        for size in sizes:
            folder = Path(scratch) / str(size)
            folder.mkdir()
            making_s = measured("making", folder, size)["seconds"]
            for phase in PHASES:
                if phase == "view":
                    started = time.perf_counter()
                    measured("prepare", folder, size)
                    spent = time.perf_counter() - started
                    notes.append(f"{size:,} rows: signals written and view made in {spent:.1f} s")
                found = measured(phase, folder, size)
                if phase.startswith("plan"):
                    found["seconds"] -= making_s
                results[phase].append(found)
    figures = [figure for phase in PHASES for figure in figures_of(phase, sizes, results[phase])]
    finish("scale", figures, {"sizes": sizes}, notes=notes)


if __name__ == "__main__":
    main()
