"""How long `kd --help` and `kd store inspect` take, beside an interpreter that does nothing or imports typer alone.

    python benchmarks/startup.py [--quick] [--repeats 9] [--rows 10000000]

The store is one of that many rows as far as `inspect` looks: store.json, the description of every array, and the commit
records of all shards, allocations and signals, in the files that kd puts them in. What the records name is not written.
Files are in the page cache; processes take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from large_store import IDENTITY, SPECS
from report import Figure, finish, take_turns

from kd.pipeline.store import ArraySpec, create_or_open
from kd.pipeline.store.compacted import compacted_file, encode_compacted
from kd.pipeline.store.records import FileRecord, IndexRecord, Record

PYTHON = sys.executable
COMMANDS = {
    "python -c pass": [PYTHON, "-c", "pass"],
    "python -c 'import typer'": [PYTHON, "-c", "import typer"],
    "kd --help": [PYTHON, "-m", "kd", "--help"],
}
TARGETS_S = {"kd --help": 0.3, "kd store inspect": 1.0}
TOKENS_PER_ROW = 13


def make_records(folder: Path, num_rows: int) -> str:
    """A store with all records of `num_rows` rows and none of the files they name."""
    store = create_or_open(folder, IDENTITY)
    layout, specs = store.layout, store.declare(SPECS)
    digest, records = "0" * 32, []
    for shard in range(-(-num_rows // layout.rows_per_shard)):
        rows = min(layout.rows_per_shard, num_rows - shard * layout.rows_per_shard)
        tokens = rows * TOKENS_PER_ROW

        def files(named: Sequence[ArraySpec], shard: int = shard, rows: int = rows) -> tuple[FileRecord, ...]:
            return tuple(FileRecord(spec, shard, rows * spec.entry_bytes, digest, digest) for spec in named)

        first = Record(
            store.store_digest, shard, rows, tokens, files(layout.input_specs), IndexRecord(rows * 28, digest, digest)
        )
        records += [first, Record(store.store_digest, shard, rows, tokens, files(specs), allocation=first.digest)]
    # As `kd store compact` leaves them.
    data = encode_compacted({Path(record.file).name: record.encode() for record in records})
    store.files.create(compacted_file(data), data)
    return store.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="timed runs of each, after one warm-up: 9, or 3 with --quick")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the store that is inspected")
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 9)
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        inspect = [PYTHON, "-m", "kd", "store", "inspect", make_records(Path(folder) / "store", options.rows), "--json"]
        said = json.loads(subprocess.run(inspect, check=True, capture_output=True, text=True).stdout)
        assert f'"rows": {options.rows}' in json.dumps(said), said
        ways = {name: lambda c=command: _run(c) for name, command in (COMMANDS | {"kd store inspect": inspect}).items()}
        seconds = take_turns(ways, repeats)
    figures = [
        Figure(
            what="start",
            way=name,
            value=statistics.median(times),
            unit="s",
            low=min(times),
            high=max(times),
            at_most=TARGETS_S.get(name),
        )
        for name, times in seconds.items()
    ]
    finish("startup", figures, {"repeats": repeats, "rows": options.rows})


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
