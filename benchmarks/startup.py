"""How long `kd --help` takes, beside a bare interpreter and an interpreter that only imports typer.

    python benchmarks/startup.py [--repeats 15]

Prints one table and one JSON line. The runs are interleaved, so a machine that slows down slows all three.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import typer'": [sys.executable, "-c", "import typer"],
    "kd --help": [sys.executable, "-m", "kd", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each command, after one warm-up")
    repeats = parser.parse_args().repeats

    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(repeats + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repeat:
                seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median_s in medians.items():
        print(f"{name:28} {median_s:7.3f} s   (min {min(seconds[name]):.3f}, max {max(seconds[name]):.3f})")
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "median_s": {name: round(value, 4) for name, value in medians.items()},
                "target_s": {"kd --help": 0.3},
                "repeats": repeats,
                "machine": platform.platform(),
            }
        )
    )


if __name__ == "__main__":
    main()
