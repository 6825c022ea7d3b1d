"""Progress on stderr: bars on a terminal, JSON lines elsewhere, warnings alone with --quiet. Never stdout."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from .artifact import json_ready
from .errors import UsageError
from .stage import NullProgress, Progress, ProgressTask

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars

RATE_WINDOW_S = 30.0
"""The rate is that of the last half minute, so that it follows a change without jumping about."""


class ClosingProgress(NullProgress):
    """A progress that is closed when the command ends, however it ends."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_progress(*, quiet: bool = False, stream: TextIO | None = None, style: str | None = None) -> ClosingProgress:
    """Bars when `stream` is a terminal, JSON lines when not.

    Args:
        quiet: warnings only.
        stream: stderr by default.
        style: "bars" or "json" instead of asking the stream; the environment variable KD_PROGRESS by default.

    `KD_PROGRESS_INTERVAL` is the shortest time in seconds between two progress lines of one task (5).

    Raises:
        UsageError: one of the two variables is none of what it may be.
    """
    stream = stream or sys.stderr
    style = style or os.environ.get("KD_PROGRESS") or ("bars" if stream.isatty() else "json")
    if style not in ("bars", "json"):
        raise UsageError(f"KD_PROGRESS is {style!r}", fix="give bars or json, or leave it out")
    given = os.environ.get("KD_PROGRESS_INTERVAL") or "5"
    try:
        interval_s = float(given)
    except ValueError:
        interval_s = -1.0
    if not 0.0 <= interval_s < math.inf:
        raise UsageError(f"KD_PROGRESS_INTERVAL is {given!r}", fix="give seconds, 0 or more")
    return (
        BarProgress(stream, quiet=quiet)
        if style == "bars"
        else JsonProgress(stream, quiet=quiet, interval_s=interval_s)
    )


class Meter:
    """How much of a task is done, how fast, and how long the rest takes."""

    def __init__(self, total: float | None, initial: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.amount = initial
        self._initial = initial
        self._clock = clock
        self._started = clock()
        self._samples = collections.deque([(self._started, initial)])

    def advance(self, amount: float) -> None:
        """Count `amount` more as done."""
        self.amount += amount
        now = self._clock()
        self._samples.append((now, self.amount))
        # The oldest kept sample lies just outside the window, so that the window is always covered.
        while len(self._samples) > 2 and self._samples[1][0] < now - RATE_WINDOW_S:
            self._samples.popleft()

    @property
    def seconds(self) -> float:
        """Since the task began."""
        return self._clock() - self._started

    @property
    def rate(self) -> float | None:
        """Units per second over the last half minute; None before anything was done."""
        seconds, done = self._clock() - self._samples[0][0], self.amount - self._samples[0][1]
        return done / seconds if seconds > 0 and done > 0 else None

    @property
    def mean_rate(self) -> float | None:
        """Units per second since the task began, without what an earlier run did."""
        seconds, done = self.seconds, self.amount - self._initial
        return done / seconds if seconds > 0 and done > 0 else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until `total` at the present rate; None when that is unknown."""
        rate = self.rate
        if self.total is None or rate is None:
            return None
        return max(0.0, self.total - self.amount) / rate


class JsonProgress(ClosingProgress):
    """One JSON object per line: events start, progress, done, info, warn and estimate, each with a UTC time.

    A task writes at most one progress line per `interval_s`; its start and end are always written.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._quiet = quiet
        self._lock = threading.Lock()
        self.interval_s = interval_s
        self.clock = clock

    def task(self, name: str, *, total: float | None = None, unit: str = "rows", initial: float = 0) -> ProgressTask:
        return super().task(name) if self._quiet else _JsonTask(self, name, total, unit, initial)

    def info(self, text: str, **fields: Any) -> None:
        if not self._quiet:
            self.write("info", {**fields, "text": text})

    def warn(self, text: str, **fields: Any) -> None:
        self.write("warn", {**fields, "text": text})

    def estimate(self, text: str, **fields: Any) -> None:
        if not self._quiet:
            self.write("estimate", {**fields, "text": text})

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """Write one event; one call is one line, whichever thread it comes from."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"event": event, "time": now, **json_ready(fields)}, ensure_ascii=False)
        # Nobody listening any more (a closed pipe, a full disk) must not cost the work that is reported.
        with self._lock, contextlib.suppress(OSError):
            self._stream.write(line + "\n")
            self._stream.flush()


class _JsonTask:
    def __init__(self, progress: JsonProgress, name: str, total: float | None, unit: str, initial: float) -> None:
        self._progress = progress
        self._meter = Meter(total, initial, progress.clock)
        self._named = {"task": name, "unit": unit}
        self._fields: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._written_at = progress.clock()
        progress.write("start", {**self._named, "total": total, "done": initial})

    def advance(self, amount: float = 1, **fields: Any) -> None:
        with self._lock:
            self._meter.advance(amount)
            self._fields |= fields
            now = self._progress.clock()
            if now - self._written_at < self._progress.interval_s:
                return
            self._written_at = now
            self._write("progress", rate=self._meter.rate, remaining_s=self._meter.remaining_s)

    def done(self, **fields: Any) -> None:
        with self._lock:
            if not self._ended:
                self._ended = True
                self._fields |= fields
                self._write("done", rate=self._meter.mean_rate, seconds=self._meter.seconds)

    def _write(self, event: str, **figures: float | None) -> None:
        rounded = {name: value and float(f"{value:.4g}") for name, value in figures.items()}
        counts = {"done": self._meter.amount, "total": self._meter.total}
        self._progress.write(event, {**self._fields, **self._named, **counts, **rounded})


class BarProgress(ClosingProgress):
    """A bar per running task with rate and remaining time; a finished task leaves one line."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._bars: RichBars | None = None
        self._lock = threading.Lock()

    def task(self, name: str, *, total: float | None = None, unit: str = "rows", initial: float = 0) -> ProgressTask:
        return super().task(name) if self._quiet else _BarTask(self, name, total, unit, initial)

    def info(self, text: str, **fields: Any) -> None:
        if not self._quiet:
            self.print(text, "")

    def warn(self, text: str, **fields: Any) -> None:
        self.print(f"warning: {text}", "yellow")

    def estimate(self, text: str, **fields: Any) -> None:
        if not self._quiet:
            self.print(f"estimate: {text}", "cyan")

    def print(self, text: str, style: str) -> None:
        """Print a line above the bars."""
        from rich.text import Text

        self._console.print(Text(text, style=style))

    def bars(self) -> RichBars:
        """The live display, started when first asked for."""
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichBars

        with self._lock:
            if self._bars is None:
                columns = [
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=24),
                    TextColumn("{task.fields[figures]}", markup=False),
                ]
                self._bars = RichBars(*columns, console=self._console, transient=True)
                self._bars.start()
            return self._bars

    def close(self) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None


class _BarTask:
    def __init__(self, progress: BarProgress, name: str, total: float | None, unit: str, initial: float) -> None:
        self._progress = progress
        self._name = name
        self._unit = unit
        self._meter = Meter(total, initial)
        self._fields: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._id = progress.bars().add_task(name, total=total, completed=int(initial), figures="")
        self._ended = False

    def advance(self, amount: float = 1, **fields: Any) -> None:
        with self._lock:
            self._meter.advance(amount)
            self._fields |= fields
            self._progress.bars().update(self._id, completed=self._meter.amount, figures=self._figures())

    def done(self, **fields: Any) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._fields |= fields
            self._progress.bars().remove_task(self._id)
            parts = [f"{self._name}: {_count(self._meter.amount)} {self._unit} in {duration(self._meter.seconds)}"]
            if self._meter.mean_rate is not None:
                parts.append(f"{_rate(self._meter.mean_rate)} {self._unit}/s")
            self._progress.print(", ".join([*parts, *self._shown_fields()]), "dim")

    def _figures(self) -> str:
        meter = self._meter
        done = _count(meter.amount) if meter.total is None else f"{_count(meter.amount)}/{_count(meter.total)}"
        parts = [f"{done} {self._unit}"]
        if meter.rate is not None:
            parts.append(f"{_rate(meter.rate)}/s")
        if meter.remaining_s is not None:
            parts.append(f"{duration(meter.remaining_s)} left")
        return "  ".join([*parts, *self._shown_fields()])

    def _shown_fields(self) -> list[str]:
        return [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self._fields.items()
        ]


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> [duration(s) for s in (0.25, 9.04, 75, 3700)]
    ['0.25 s', '9.0 s', '1 min 15 s', '1 h 01 min']
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of ten.

    >>> [size(n) for n in (12, 154_608, 10_000_000_000)]
    ['12 B', '154.6 kB', '10.0 GB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _count(amount: float) -> str:
    return f"{round(amount):,}" if amount == round(amount) else f"{amount:,.1f}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


MUTED = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""The environment in which the libraries underneath keep their bars, logs and warnings to themselves."""


def mute_libraries() -> None:
    """Set `MUTED` where the user has not said otherwise.

    Call it before the libraries are imported: they read their settings from the environment, and so do worker
    processes.
    """
    import warnings

    for name, value in MUTED.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
