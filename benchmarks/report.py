"""What all benchmarks share: ways that take turns, the machine's line, one table with targets, one JSON line last.

A script measures (`take_turns`), makes a `Figure` of every number (`compared` makes those of several ways at once) and
ends in `finish`. Ratios are within one run; absolute numbers stand beside the machine they were measured on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timed:
    """What a way returns that timed itself, because it has to prepare something that does not count."""

    seconds: float


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds that each way took, one number a round, after one round that does not count if it is to warm up.

    Within a round every way has one turn, and the next round goes through them backwards: what a machine that slows
    down does to one way, it does to all. `time.process_time` as the clock counts the processor's time alone. A way that
    returns a mapping stands for several that took turns by themselves: what each of those took, by name.
    """
    seconds: dict[str, list[float]] = {}
    first = 0 if warm_up else 1
    for number in range(first, rounds + 1):
        for name in [*ways][:: -1 if (number - first) % 2 else 1]:
            started = clock()
            done = ways[name]()
            spent = clock() - started
            for way, timed in (done if isinstance(done, Mapping) else {name: done}).items():
                seconds.setdefault(way, [])
                if number:
                    seconds[way].append(timed.seconds if isinstance(timed, Timed) else spent)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: `value` `unit` of a way, with its least and greatest over the rounds.

    `ratio` is how kd compares with this way, with its quartiles over the rounds. The target, if any, is of `ratio`
    where there is one, else of `value`.
    """

    what: str
    way: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        number = self.value if self.ratio is None else self.ratio
        return (self.at_least is None or number >= self.at_least) and (self.at_most is None or number <= self.at_most)

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        target = f">= {self.at_least:g}" if self.at_least is not None else ""
        target = target or (f"<= {self.at_most:g}" if self.at_most is not None else "")
        spread = "" if self.low is None or self.high is None else f"{_short(self.low)}..{_short(self.high)}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        low, high = self.ratio_low, self.ratio_high
        middle = "" if low is None or high is None else f"{low:.2f}..{high:.2f}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return self.what, self.way, _short(self.value), self.unit, spread, ratio, middle, target, met


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compared(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    unit: str = "s",
    number: Callable[[float], float] = float,
    at_least: Mapping[str, float] | None = None,
) -> list[Figure]:
    """A figure of each way, the first of which is kd; ratios say how many times as fast as each other one kd is.

    A ratio is the median of those within each round: a machine whose speed changes between rounds changes medians of
    seconds, and not what was measured side by side.

    `number` turns seconds into what is shown, in `unit` (`lambda s: rows / s`); `at_least` has ratios' targets by way.
    """
    kd = next(iter(seconds))
    figures = []
    for way, times in seconds.items():
        ratios = [spent / of_kd for spent, of_kd in zip(times, seconds[kd], strict=True)]
        low, middle, high = quartiles(ratios) if way != kd else (None, None, None)
        shown = [number(spent) for spent in times]
        figures.append(
            Figure(
                what=what,
                way=way,
                value=number(statistics.median(times)),
                unit=unit,
                low=min(shown),
                high=max(shown),
                ratio=middle,
                ratio_low=low,
                ratio_high=high,
                at_least=(at_least or {}).get(way),
            )
        )
    return figures


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """What a quarter, a half and three quarters of some numbers are below; between two of them, linearly."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, versions, threads of the libraries that were imported, load."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    threads: dict[str, Any] = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset")}
    for library, ask in (("torch", "get_num_threads"), ("pyarrow", "cpu_count")):
        if library in sys.modules:
            threads[library] = getattr(sys.modules[library], ask)()
    return {
        "cpu": next((line.split(": ")[-1] for line in lines if line.startswith("model name")), platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "pyarrow", "zarr")},
        "threads": threads,
        "load": [round(value, 1) for value in os.getloadavg()] if hasattr(os, "getloadavg") else [],
    }


def finish(
    name: str, figures: Sequence[Figure], settings: Mapping[str, Any] | None = None, *, notes: Sequence[str] = ()
) -> None:
    """Print the table, the notes and the machine, and as the last line one JSON object with all of it."""
    head = ("what", "way", "value", "unit", "least..most", "ratio", "quartiles", "target", "met")
    table = [head, *(figure.cells() for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = zip(line, widths, "<<><>>>>>", strict=True)
        print("  ".join(f"{cell:{side}{width}}" for cell, width, side in cells).rstrip())
    for note in notes:
        print(note)
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = [{**{k: v for k, v in asdict(f).items() if v is not None}, "met": f.met} for f in figures]
    missed = [f"{figure.what}: {figure.way}" for figure in figures if figure.met is False]
    result = {"benchmark": name, "figures": rows, "missed": missed, "settings": {**(settings or {})}, "machine": facts}
    print(json.dumps({**result, "notes": [*notes]}, default=str), flush=True)
