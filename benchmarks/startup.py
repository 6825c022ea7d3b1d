"""How long `kd --help` takes, beside a bare interpreter and an interpreter that only imports typer.

python benchmarks/startup.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from report import Figure, finish, take_turns

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import typer'": [sys.executable, "-c", "import typer"],
    "kd --help": [sys.executable, "-m", "kd", "--help"],
}
TARGETS_S = {"kd --help": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each command, after one warm-up")
    repeats = parser.parse_args().repeats
    ways = {name: lambda c=command: _run(c) for name, command in COMMANDS.items()}
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
        for name, times in take_turns(ways, repeats).items()
    ]
    finish("startup", figures, {"repeats": repeats})


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
