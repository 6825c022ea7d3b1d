"""Progress: what is written where, how often, and that rates and remaining times are right."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from typing import Any

import pytest

from kd.pipeline.errors import UsageError
from kd.pipeline.progress import BarProgress, JsonProgress, Meter, open_progress


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_rate_and_remaining_time_by_hand() -> None:
    clock = Clock()
    meter = Meter(100, 0, clock)
    assert (meter.rate, meter.remaining_s) == (None, None)
    clock.now += 2
    meter.advance(20)
    assert meter.rate == pytest.approx(10)
    assert meter.remaining_s == pytest.approx(8)


def test_what_an_earlier_run_did_does_not_count_towards_the_rate() -> None:
    clock = Clock()
    meter = Meter(100, 60, clock)
    clock.now += 4
    meter.advance(20)
    assert (meter.rate, meter.mean_rate) == (pytest.approx(5), pytest.approx(5))
    assert meter.remaining_s == pytest.approx(4)


def test_the_rate_follows_a_change_within_half_a_minute() -> None:
    clock = Clock()
    meter = Meter(None, 0, clock)
    for _ in range(100):
        clock.now += 1
        meter.advance(100)
    for _ in range(31):
        clock.now += 1
        meter.advance(1)
    assert meter.rate == pytest.approx(1, rel=0.05)
    assert meter.mean_rate == pytest.approx(10031 / 131)
    assert meter.remaining_s is None


def test_a_task_writes_its_start_its_end_and_rare_progress() -> None:
    stream, clock = io.StringIO(), Clock()
    task = JsonProgress(stream, interval_s=5, clock=clock).task("capturing", total=100, unit="rows")
    for _ in range(100):
        clock.now += 1 / 16
        task.advance(1, shard=3)
    task.done(bytes=12)
    task.done()
    written = events(stream)
    assert [event["event"] for event in written] == ["start", "progress", "done"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]) for event in written)
    middle, last = written[1], written[2]
    assert {k: middle[k] for k in ("task", "unit", "done", "total", "shard")} == {
        **{"task": "capturing", "unit": "rows", "done": 80, "total": 100, "shard": 3}
    }
    assert (middle["rate"], middle["remaining_s"]) == (16, 1.25)
    assert (last["done"], last["bytes"], last["seconds"]) == (100, 12, 6.25)


def test_fields_cannot_hide_what_an_event_is() -> None:
    stream = io.StringIO()
    JsonProgress(stream).info("text", event_text=1, text_length=4, value=float("inf"))
    JsonProgress(stream).task("t").done(done="x", task="y")
    written = events(stream)
    assert (written[0]["event"], written[0]["text"], written[0]["value"]) == ("info", "text", None)
    assert (written[-1]["task"], written[-1]["done"]) == ("t", 0)


def test_quiet_leaves_warnings_only() -> None:
    stream = io.StringIO()
    progress = open_progress(quiet=True, stream=stream, style="json")
    task = progress.task("t", total=1)
    task.advance()
    task.done()
    progress.info("info")
    progress.estimate("estimate")
    progress.warn("careful")
    assert [event["event"] for event in events(stream)] == ["warn"]
    stream = io.StringIO()
    with open_progress(quiet=True, stream=stream, style="bars") as bars:
        bars.task("t", total=1).done()
        bars.info("info")
        bars.warn("careful")
    assert stream.getvalue().strip() == "warning: careful"


def test_lines_of_many_threads_stay_whole() -> None:
    stream = io.StringIO()
    progress = JsonProgress(stream, interval_s=0)
    task = progress.task("t", total=400)
    threads = [threading.Thread(target=lambda: [task.advance() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    task.done()
    assert events(stream)[-1]["done"] == 400


def test_bars_print_a_line_for_a_finished_task_and_square_brackets_as_they_are() -> None:
    stream = io.StringIO()
    with open_progress(stream=stream, style="bars") as progress:
        task = progress.task("student[seed=1]: training", total=10, unit="steps")
        task.advance(10, loss=0.123456)
        task.done()
        progress.warn("odd [red]text[/red]")
        progress.estimate("about 3 min")
    lines = stream.getvalue()
    assert re.search(r"student\[seed=1\]: training: 10 steps in 0\.\d\d s, .*steps/s, loss 0\.1235", lines)
    assert "warning: odd [red]text[/red]" in lines
    assert "estimate: about 3 min" in lines


def test_a_terminal_gets_bars_and_a_pipe_gets_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KD_PROGRESS", raising=False)
    assert isinstance(open_progress(stream=io.StringIO()), JsonProgress)
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        assert isinstance(open_progress(stream=terminal), BarProgress)
    os.close(primary)


@pytest.mark.parametrize(
    ("name", "value"),
    [("KD_PROGRESS", "lines"), *(("KD_PROGRESS_INTERVAL", value) for value in ("often", "-1", "nan", "inf"))],
)
def test_an_environment_that_says_something_else_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} is '{value}'"):
        open_progress(stream=io.StringIO())


def test_a_bar_on_a_terminal_shows_rate_and_remaining_time_and_leaves_the_cursor() -> None:
    code = (
        "import time\n"
        "from kd.pipeline.progress import open_progress\n"
        "with open_progress() as progress:\n"
        "    task = progress.task('capturing', total=200)\n"
        "    for _ in range(100): task.advance(); time.sleep(0.005)\n"
    )
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=secondary, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
    )
    os.close(secondary)
    seen = b""
    while True:
        try:
            seen += os.read(primary, 65536)
        except OSError:
            break
    assert process.wait() == 0
    assert process.stdout is not None and process.stdout.read() == b""
    text = seen.decode()
    assert re.search(r"capturing.*\d+/200 rows  \d+/s  [\d.]+ s left", text)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


def test_a_reader_that_has_gone_does_not_stop_the_work() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", buffering=1) as stream:
        progress = JsonProgress(stream, interval_s=0)
        progress.task("t", total=1).advance()
        progress.warn("nobody hears this")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
