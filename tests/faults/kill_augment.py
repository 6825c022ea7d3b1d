"""Corpora of one dataset by different numbers of workers, of shuffled rows, and killed at random moments: equal bytes?

    python tests/faults/kill_augment.py DATASET [--text-column sentence] [--label-column label] [--rows N]
           [--variants 20] [--workers 1 2 3] [--kills 6] [--seed 0] [--folder DIR] [-- OPTIONS OF kd augment]

DATASET is a folder with train.parquet and perhaps other splits, which are kept from leaking. Every corpus is made by
`kd augment` in processes of its own. The first one is what all others are compared with: every file by its bytes, the
manifest without durations, paths and the number of workers. A corpus that is killed is killed whole, workers too, by
SIGKILL, and begun again with another number of workers and its rows in another order, until it is done; so many such
corpora are made that there are `--kills` kills. Prints one JSON line; fails at the first difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

KILLS_PER_CORPUS = 4


def write_orders(dataset: Path, folder: Path, rows: int | None, seed: int) -> list[Path]:
    """The dataset as it is (its first rows), and with the rows of its training split shuffled; of the same name."""
    train = pq.read_table(dataset / "train.parquet").slice(0, rows)
    orders = {"given": np.arange(len(train)), "shuffled": np.random.default_rng(seed).permutation(len(train))}
    places = []
    for name, order in orders.items():
        place = folder / name / dataset.name
        place.mkdir(parents=True)
        for file in dataset.glob("*.parquet"):
            if file.name != "train.parquet":
                shutil.copy(file, place)
        pq.write_table(train.take(pa.array(order)), place / "train.parquet")
        places.append(place)
    return places


def digests(corpus: Path) -> dict[str, Any]:
    """Of every file; of the manifest what does not say when, where and by how many it was made."""
    found: dict[str, Any] = {}
    for file in sorted(corpus.rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            found[str(file.relative_to(corpus))] = xxhash.xxh3_128(file.read_bytes()).hexdigest()
    manifest = json.loads((corpus / "manifest.json").read_bytes())
    found["manifest"] = {name: manifest[name] for name in ("fingerprint", "identity", "inputs", "content")}
    found["summary"] = {name: value for name, value in manifest["summary"].items() if name != "seconds"}
    return found


class Corpora:
    """Makes corpora and compares them with the first."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._folder, self._options = folder, options
        self.reference: dict[str, Any] = {}
        self.made = 0

    def start(self, dataset: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kd", "augment", "--quiet", "--json", "--dataset", str(dataset)]
        command += ["--output-dir", str(output), "--workers", str(workers), *self._options]
        log = (self._folder / "log").open("ab")
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        assert process.wait() == 0, (self._folder / "log").read_text()[-2000:]

    def compare(self, output: Path, what: str) -> None:
        found = digests(output)
        self.reference = self.reference or found
        for name in sorted({*found, *self.reference}):
            assert found.get(name) == self.reference.get(name), f"{what}: {name} is not what the first corpus has"
        self.made += 1
        shutil.rmtree(output)


def stage_of(output: Path) -> str:
    """How far a corpus has come, seen from its files."""
    if (output / "manifest.json").exists():
        return "manifest"
    if any((output / "data").glob("*.parquet")):
        return "writing the corpus"
    kinds = {file.name.split("-")[0] for file in (output / "work").glob("*.arrow")}
    return next((f"after {kind}" for kind in ("variants", "words", "originals.arrow") if kind in kinds), "start")


def one_killed(
    corpora: Corpora, datasets: Sequence[Path], output: Path, durations: Mapping[int, float], rng: random.Random
) -> Counter[str]:
    """Make a corpus that is killed up to `KILLS_PER_CORPUS` times; how far it was each time.

    Args:
        durations: by number of workers, how long a corpus takes that nobody disturbs.
    """
    moments: Counter[str] = Counter()
    for number in range(KILLS_PER_CORPUS + 1):
        workers = rng.choice([*durations])
        process = corpora.start(rng.choice(datasets), output, workers)
        if number == KILLS_PER_CORPUS:
            corpora.finish(process)
            break
        try:
            process.wait(timeout=rng.uniform(0.1, 0.9) * durations[workers])
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode == -signal.SIGKILL:
            moments[stage_of(output)] += 1
            continue
        corpora.finish(process)
        break
    return moments


def harness(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rng, begun = random.Random(arguments.seed), time.perf_counter()
    datasets = write_orders(arguments.dataset, folder, arguments.rows, arguments.seed)
    options = ["--text-column", arguments.text_column, "--num-variants", str(arguments.variants)]
    options += ["--label-column", arguments.label_column] if arguments.label_column else []
    corpora = Corpora(folder, [*options, *arguments.options])
    output = folder / "corpus"
    seconds: dict[str, float] = {}
    durations: dict[int, float] = {}
    for dataset, workers in [*((datasets[0], count) for count in arguments.workers), (datasets[1], 1)]:
        what = f"{dataset.parent.name} order, {workers} workers"
        started = time.perf_counter()
        corpora.finish(corpora.start(dataset, output, workers))
        seconds[what] = durations[workers] = round(time.perf_counter() - started, 1)
        corpora.compare(output, what)
        print(f"{what}: {seconds[what]} s", file=sys.stderr, flush=True)
    moments: Counter[str] = Counter()
    while moments.total() < arguments.kills:
        moments += one_killed(corpora, datasets, output, durations, rng)
        corpora.compare(output, f"killed after {dict(moments)}")
        print(f"killed: {dict(moments)}", file=sys.stderr, flush=True)
    return {
        "rows": corpora.reference["summary"]["rows"],
        "variants": corpora.reference["summary"]["variants"],
        "corpora": corpora.made,
        "kills": moments.total(),
        "moments": dict(moments.most_common()),
        "files": {name: digest for name, digest in corpora.reference.items() if isinstance(digest, str)},
        "seconds": {**seconds, "all": round(time.perf_counter() - begun, 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--text-column", default="sentence")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--rows", type=int, help="of the training split; all")
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    given = sys.argv[1:]
    own = given[: given.index("--")] if "--" in given else given
    arguments = parser.parse_args(own, argparse.Namespace(options=given[len(own) + 1 :]))
    with tempfile.TemporaryDirectory(prefix="kd-augment-", dir=arguments.folder) as folder:
        print(json.dumps(harness(arguments, Path(folder))))


if __name__ == "__main__":
    main()
