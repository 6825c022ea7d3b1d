"""Running workflows: skip, re-run exactly what changed, carry on beside a failure, stop and go on, side by side."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.scheduler import _relay
from kd.pipeline.stage import NullProgress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_stages

# a → b → compare(b, c); c stands alone.
FLOW = """\
name: flow
variables: {a: 1, b: 1, c: 1, crash: null, sleep: 0, until: null}
steps:
  - {id: a, stage: make, with: {value: "${vars.a}", log: log, sleep_s: "${vars.sleep}", until: "${vars.until}"}}
  - id: b
    stage: fit model
    with: {value: "${vars.b}", sources: "${steps.a.output_dir}", log: log, crash: "${vars.crash}"}
  - {id: c, stage: make, with: {value: "${vars.c}", log: log, label: "of-${steps.a.short_fingerprint}"}}
  - {id: compare, stage: compare, with: {things: ["${steps.b.output_dir}", "${steps.c.output_dir}"]}}
"""


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("flow.yaml").write_text(FLOW.replace('label: "of-${steps.a.short_fingerprint}"', "label: alone"))
    return toy_stages.install(tmp_path / "site")


def start(env: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kd", *words]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kd(env: dict[str, str], *words: str, code: int = 0) -> dict[str, Any]:
    process = start(env, *words, "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stdout + stderr
    assert stdout.count("\n") == 1
    return {**json.loads(stdout), "stderr": stderr}


def states(result: dict[str, Any]) -> dict[str, str]:
    return {step["id"]: step["state"] for step in result["steps"]}


def ran() -> list[str]:
    """The steps that really ran since the last call, by the log that they write."""
    lines = Path("log").read_text().split("\n") if Path("log").exists() else []
    Path("log").unlink(missing_ok=True)
    return sorted(line.split()[0] for line in lines if line)


def test_a_second_run_does_nothing_and_an_edit_makes_again_exactly_what_depends_on_it(env: dict[str, str]) -> None:
    first = kd(env, "run", "flow.yaml")
    assert states(first) == {"a": "done", "b": "done", "c": "done", "compare": "done"}
    assert ran() == ["a", "b", "c"]
    assert first["comparison"] == {"total": 2, "values": [1, 1]}
    assert first["comparison_table"] == "| total |\n|---|\n| 2 |"
    assert Path("runs/flow/logs/b.log").read_text().startswith("$ kd fit model --sources runs/flow/a --log log")

    second = kd(env, "run", "flow.yaml")
    assert states(second) == {"a": "already done", "b": "already done", "c": "already done", "compare": "done"}
    assert ran() == []

    planned = kd(env, "run", "flow.yaml", "--set", "b=5", "--dry-run")
    assert states(planned) == {"a": "already done", "b": "would run again", "c": "already done", "compare": "follows"}
    third = kd(env, "run", "flow.yaml", "--set", "b=5")
    assert states(third) == {"a": "already done", "b": "done", "c": "already done", "compare": "done"}
    assert third["steps"][1]["why"] == planned["steps"][1]["why"] == "config.value: 1 → 5"
    assert third["comparison"]["total"] == 6
    assert ran() == ["b"]

    fourth = kd(env, "run", "flow.yaml", "--set", "b=5", "--set", "a=2")
    assert states(fourth) == {"a": "done", "b": "done", "c": "already done", "compare": "done"}
    assert fourth["steps"][0]["why"] == "config.value: 1 → 2"
    assert fourth["steps"][1]["why"].startswith("inputs.sources.0: ")
    assert ran() == ["a", "b"]
    assert sorted(path.name for path in Path("runs/flow").iterdir()) == ["a", "b", "c", "logs", "workflow.lock"]


def test_a_failed_step_stops_what_needs_it_and_nothing_else_and_the_rest_is_kept(env: dict[str, str]) -> None:
    result = kd(env, "run", "flow.yaml", "--set", "crash=refused", code=5)
    assert states(result) == {"a": "done", "b": "failed", "c": "done", "compare": "not run"}
    assert result["error"]["type"] == "IncompleteError"
    assert result["error"]["what"] == "1 of 4 steps failed, and 1 that need them did not run"
    assert result["error"]["details"] == ["b: the thing is refused", "  because", "  fix: do not"]
    assert ran() == ["a", "b", "c"]
    mended = kd(env, "run", "flow.yaml")
    assert states(mended) == {"a": "already done", "b": "done", "c": "already done", "compare": "done"}
    assert ran() == ["b"]


@pytest.mark.parametrize(
    ("crash", "what"),
    [("unforeseen", "unexpected ZeroDivisionError: by nought"), ("killed", "kd fit model was killed by signal 9")],
)
def test_a_step_that_crashes_leaves_a_log_that_says_where(env: dict[str, str], crash: str, what: str) -> None:
    result = kd(env, "run", "flow.yaml", "--only", "b", "--set", f"crash={crash}", code=5)
    assert [*states(result)] == ["a", "b"]
    assert result["error"]["details"] == [f"b: {what}", "  fix: see runs/flow/logs/b.log"]
    if crash == "unforeseen":
        assert "toy_stages.py" in Path("runs/flow/logs/b.log").read_text()


def test_an_artifact_that_is_made_again_stands_until_the_new_one_is_complete(env: dict[str, str]) -> None:
    kd(env, "run", "flow.yaml", "--only", "b")
    kd(env, "run", "flow.yaml", "--only", "b", "--set", "b=5", "--set", "crash=refused", code=5)
    assert Path("runs/flow/b.replaced/thing").read_text() == "1"
    ran()
    assert states(kd(env, "run", "flow.yaml", "--only", "b")) == {"a": "already done", "b": "already done"}
    assert ran() == []


def test_mistakes_anywhere_in_the_file_stop_it_before_the_first_step(env: dict[str, str]) -> None:
    Path("flow.yaml").write_text(FLOW.replace("things:", "thinks:"))
    result = kd(env, "run", "flow.yaml", code=2)
    assert result["error"]["what"] == "flow.yaml has a problem; nothing was run"
    assert "did you mean 'things'?" in result["error"]["details"][0]
    assert not Path("runs").exists()


def test_printed_commands_do_the_same_in_a_shell(env: dict[str, str]) -> None:
    Path("flow.yaml").write_text(FLOW)
    printed = start(env, "run", "flow.yaml", "--print-commands").communicate()[0]
    assert not Path("runs").exists()
    Path("bin").mkdir()
    Path("bin/kd").write_text(f'#!/bin/sh\nexec {sys.executable} -m kd "$@"\n')
    Path("bin/kd").chmod(0o755)
    path = os.pathsep.join([str(Path("bin").resolve()), env["PATH"]])
    subprocess.run(["bash", "-euc", printed], env={**env, "PATH": path}, check=True, capture_output=True)
    assert ran() == ["a", "b", "c"]
    result = kd(env, "run", "flow.yaml")
    assert states(result) == {"a": "already done", "b": "already done", "c": "already done", "compare": "done"}


def test_independent_steps_run_side_by_side_and_share_the_threads(env: dict[str, str]) -> None:
    # a waits for the file that c makes: it ends only if both run at once.
    env.pop("OMP_NUM_THREADS", None)
    kd(env, "run", "flow.yaml", "--jobs", "2", "--set", "until=runs/flow/c/thing")
    threads = dict(line.split() for line in Path("log").read_text().splitlines())
    assert threads["a"] == threads["c"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_a_step_that_none_can_run_beside_has_all_threads(env: dict[str, str]) -> None:
    env.pop("OMP_NUM_THREADS", None)
    steps = "{id: first, stage: make, with: {log: log}}"
    for name, needs in (("left", "first"), ("right", "first"), ("last", "[left, right]")):
        steps += f", {{id: {name}, stage: make, needs: {needs}, with: {{log: log}}}}"
    Path("flow.yaml").write_text(f"name: flow\nsteps: [{steps}]\n")
    kd(env, "run", "flow.yaml", "--jobs", "2")
    half = str(max(1, len(os.sched_getaffinity(0)) // 2))
    threads = dict(line.split() for line in Path("log").read_text().splitlines())
    assert threads == {"first": "None", "left": half, "right": half, "last": "None"}


def test_steps_report_through_the_workflow_with_their_names(env: dict[str, str]) -> None:
    lines = [json.loads(line) for line in kd(env, "run", "flow.yaml", "--only", "a")["stderr"].splitlines()]
    assert {(line["event"], line.get("task")) for line in lines} >= {("start", "a: making"), ("done", "a: making")}
    done = next(line for line in lines if line["event"] == "done" and line["task"] == "a: making")
    assert (done["done"], done["unit"], done["loss"]) == (3, "things", 0.5)


def test_the_table_for_people_ends_in_the_comparison(env: dict[str, str]) -> None:
    stdout = start(env, "run", "flow.yaml").communicate()[0]
    lines = stdout.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["a", "done"],
        ["b", "done"],
        ["c", "done"],
        ["compare", "done"],
    ]
    assert lines[-3:] == ["| total |", "|---|", "| 2 |"]


def test_one_instance_of_several_axes_can_be_asked_for(env: dict[str, str]) -> None:
    text = "name: flow\nsteps: [{id: a, stage: make, matrix: {value: [1, 2], label: [x, y]}}, {id: b, stage: make}]\n"
    Path("flow.yaml").write_text(text)
    planned = kd(env, "run", "flow.yaml", "--only", "a[value=2,label=x],b", "--dry-run")
    assert [*states(planned)] == ["a[value=2,label=x]", "b"]


def test_several_comparisons_are_all_shown(env: dict[str, str]) -> None:
    with Path("flow.yaml").open("a") as file:
        file.write('  - {id: other, stage: compare, with: {things: ["${steps.a.output_dir}"]}}\n')
    result = kd(env, "run", "flow.yaml")
    assert result["comparison_table"] == "| total |\n|---|\n| 2 |\n\n| total |\n|---|\n| 1 |"
    assert result["comparison"]["total"] == 1


def test_verbose_steps_speak_into_their_logs(env: dict[str, str]) -> None:
    Path("flow.yaml").write_text("name: flow\nsteps: [{id: a, stage: make, with: {noise: true}}]\n")
    kd(env, "run", "flow.yaml", "--verbose")
    assert "noise from a warning" in Path("runs/flow/logs/a.log").read_text()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "in_background"), [("SIGINT", False), ("SIGTERM", False), ("SIGTERM", True)])
def test_an_interrupt_stops_the_steps_too_and_the_same_command_goes_on(
    env: dict[str, str], number: str, in_background: bool
) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        if in_background:  # scripts start such processes with SIGINT ignored, and so are those that they start
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        process = start(env, "run", "flow.yaml", "--set", "until=never")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(Path("log"))
    process.send_signal(signal.Signals[number])
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert (
        stderr.splitlines()[-1] == "interrupted: run: finished steps are kept; the same command goes on with the rest"
    )
    assert "a: interrupted: make: half of runs/flow/a is kept; the same command goes on" in stderr
    assert not Path("runs/flow/a/manifest.json").exists()
    assert states(kd(env, "run", "flow.yaml", "--only", "a")) == {"a": "done"}


def test_two_runs_in_one_place_do_not_mix_even_when_the_first_was_killed(env: dict[str, str]) -> None:
    process = start(env, "run", "flow.yaml", "--set", "until=go")
    wait_for(Path("log"))
    assert "another `kd run`" in kd(env, "run", "flow.yaml", code=3)["error"]["what"]
    process.kill()
    process.communicate()
    # Its step lives on, and still holds the place.
    assert "another `kd run`" in kd(env, "run", "flow.yaml", code=3)["error"]["what"]
    Path("go").touch()
    wait_for(Path("runs/flow/a/manifest.json"))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and start(env, "run", "flow.yaml").wait() == 3:
        time.sleep(0.05)
    assert ran() == ["a", "b", "c"]


def test_a_folder_called_like_a_library_does_not_get_in_the_way(env: dict[str, str]) -> None:
    for name in ("typer", "yaml", "json", "kd"):
        Path(name).mkdir()
        Path(name, "__init__.py").write_text("raise RuntimeError('the wrong one')")
    kd_script = shutil.which("kd", path=str(Path(sys.executable).parent))
    assert kd_script is not None
    subprocess.run([kd_script, "run", "flow.yaml", "--only", "a"], env=env, check=True, capture_output=True)


def test_a_step_that_reports_a_field_named_step_does_not_stop_the_relay() -> None:
    class Recorder(NullProgress):
        def __init__(self) -> None:
            self.seen: list[tuple[str, dict[str, object]]] = []

        def info(self, text: str, **fields: object) -> None:
            self.seen.append((text, fields))

    recorder = Recorder()
    lines = io.StringIO('{"event": "info", "text": "a", "step": 200}\n{"event": "info", "text": "b", "loss": 1}\n')
    _relay("teacher", lines, io.StringIO(), recorder)
    assert recorder.seen == [("teacher: a", {"step": "teacher"}), ("teacher: b", {"loss": 1, "step": "teacher"})]
