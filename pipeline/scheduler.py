"""Running a workflow: every step is the plain `kd` command in a process of its own.

So memory goes back when a step ends, independent steps run side by side, and a step can be pasted into a shell. The
command itself decides whether its work is done already.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from .artifact import MANIFEST, open_artifact
from .config import command_line
from .errors import KdError, RefusedError
from .stage import Progress, ProgressTask, Stage, pending
from .threads import thread_environment
from .workflow import Step, Workflow

_ASKED = re.compile(r"\x00(short)?:([^\x00]+)\x00")
_STOP_S = 60.0
"""How long interrupted steps have to leave things in order."""


@dataclass(frozen=True)
class StepResult:
    """How a step ended.

    Attributes:
        id: of the step.
        command: what it ran: "train-teacher".
        state: "done", "already done", "failed" or "not run" (a step that it needs failed).
        seconds: wall time in this run.
        changed: why an earlier artifact was replaced: one line per differing field.
        result: the JSON object that the command printed.
        error: what was wrong, as `KdError.to_json` has it.
        waits_for: the steps because of which it was not run, or whose results it waits for.
        stage: as it ran, with every value filled in.
    """

    id: str
    command: str
    state: str
    seconds: float = 0.0
    changed: tuple[str, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None
    waits_for: tuple[str, ...] = ()
    stage: Stage | None = None


def run_workflow(
    workflow: Workflow, progress: Progress, *, jobs: int = 1, plan: Stage | None = None, verbose: bool = False
) -> list[StepResult]:
    """Run the steps, up to `jobs` at once; a step that fails stops those that need it, and no other.

    Args:
        workflow: what to run, in its order.
        progress: gets what the steps report, each line with the step's id.
        jobs: processes at once; they share the processor's threads evenly. A step that none can run beside has all.
        plan: the command that prints what `plan_workflow` says of these steps. Asked first where something is there
            already: one process then finds all that is done, instead of one for each step.
        verbose: let the libraries of the steps speak, into their logs.

    Raises:
        RefusedError: another `kd run` is working in the same folder.
        KeyboardInterrupt: Ctrl-C, after the running steps have ended too.
    """
    folder = Path(workflow.output_dir)
    with _folder_lock(folder) as lock:
        return _Run(workflow, progress, jobs, verbose, lock).all(
            _already_done(workflow, plan) if plan is not None else {}
        )


class _Run:
    def __init__(self, workflow: Workflow, progress: Progress, jobs: int, verbose: bool, lock: int) -> None:
        self.workflow = workflow
        self.progress = progress
        self.jobs = jobs
        self.verbose = verbose
        self.lock = lock
        self.ended: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.starting = threading.Lock()
        self.stopped = False

    def all(self, results: dict[str, StepResult]) -> list[StepResult]:
        """Run the steps that `results` does not have yet."""
        for result in results.values():
            self.tell(result)
        waiting = [step for step in self.workflow.steps if step.id not in results]
        threads: list[threading.Thread] = []
        running = 0
        try:
            while waiting or running:
                # Nothing becomes ready before a step ends, so what begins alone stays alone.
                is_alone = running == 0 and sum(all(n in results for n in step.needs) for step in waiting) == 1
                for step in [*waiting]:
                    blocked_by = [
                        need for need in step.needs if need in results and results[need].state in ("failed", "not run")
                    ]
                    if blocked_by:
                        waiting.remove(step)
                        results[step.id] = StepResult(
                            step.id, step.stage.command, "not run", waits_for=tuple(blocked_by)
                        )
                        self.tell(results[step.id])
                    elif running < self.jobs and all(need in results for need in step.needs):
                        waiting.remove(step)
                        running += 1
                        count = f"step {len(results) + running} of {len(self.workflow.steps)}"
                        self.progress.info(f"{step.id}: started, {count}", step=step.id)
                        threads.append(threading.Thread(target=self.one, args=(step, is_alone), daemon=True))
                        threads[-1].start()
                if running:
                    result = self.ended.get()
                    running -= 1
                    results[result.id] = result
                    self.tell(result)
        except KeyboardInterrupt:
            self.stop(threads)
            raise
        return [results[step.id] for step in self.workflow.steps]

    def tell(self, result: StepResult) -> None:
        if result.error is not None:
            self.progress.warn(f"{result.id}: failed: {result.error['what']}", step=result.id)
        elif result.waits_for:
            self.progress.warn(f"{result.id}: not run: it needs {', '.join(result.waits_for)}", step=result.id)
        elif result.state == "done":
            self.progress.info(f"{result.id}: done in {result.seconds:.1f} s", step=result.id, seconds=result.seconds)
        else:
            self.progress.info(f"{result.id}: {result.state}", step=result.id)

    def one(self, step: Step, is_alone: bool) -> None:
        """Run one step to its end, alone or beside others, and put its result in the queue; never raises."""
        started = time.perf_counter()
        try:
            stage = step.resolve(_fingerprint_of(self.workflow))
            code, printed = self.process(step, stage, is_alone)
            result = replace(_read_result(step, code, printed, self.log_of(step)), stage=stage)
        except KdError as error:
            result = StepResult(step.id, step.stage.command, "failed", error=error.to_json())
        except Exception as error:
            what = f"unexpected {type(error).__name__}: {error}"
            result = StepResult(step.id, step.stage.command, "failed", error={"what": what, "details": [], "fix": None})
        self.ended.put(replace(result, seconds=round(time.perf_counter() - started, 3)))

    def log_of(self, step: Step) -> Path:
        return Path(self.workflow.output_dir) / "logs" / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', step.id).strip('-')}.log"

    def process(self, step: Step, stage: Stage, is_alone: bool) -> tuple[int, str]:
        extra = [*(["--overwrite-changed"] if stage.kind else []), *(["--verbose"] if self.verbose else [])]
        command = _process_words(stage, "--json", *extra)
        self.log_of(step).parent.mkdir(parents=True, exist_ok=True)
        with self.log_of(step).open("w", encoding="utf-8") as log:
            print("$", shlex.join(command_line(stage)), file=log, flush=True)
            with self.starting:
                if self.stopped:
                    raise RefusedError("interrupted")
                # A group of its own, so that Ctrl-C reaches each step once, from here; the lock is held until the
                # last step has ended, even if this process is killed.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    env=self.environment(is_alone),
                    process_group=0,
                    pass_fds=[self.lock],
                )
                self.processes[step.id] = process
            assert process.stdout is not None and process.stderr is not None
            relay = threading.Thread(target=_relay, args=(step.id, process.stderr, log, self.progress), daemon=True)
            relay.start()
            printed = process.stdout.read()
            code = process.wait()
            relay.join()
            process.stdout.close()
            process.stderr.close()
            return code, printed

    def environment(self, is_alone: bool) -> dict[str, str]:
        given = {**_environment(), "KD_PROGRESS": "json", "KD_TRACEBACK": "1"}
        given.setdefault("KD_PROGRESS_INTERVAL", "0.5")
        if self.jobs > 1 and not is_alone:
            given |= thread_environment(self.jobs)
        return given

    def stop(self, threads: list[threading.Thread]) -> None:
        """Interrupt the running steps, and end them if they are interrupted again or take too long."""
        with self.starting:
            self.stopped = True
            for process in self.processes.values():
                # A step takes it as Ctrl-C, and gets it even where SIGINT is ignored: `kd run ... &` in a script.
                _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        try:
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self.processes.values():
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
        while not self.ended.empty():
            result = self.ended.get()
            if result.error is not None:
                self.progress.info(f"{result.id}: interrupted: {result.error['what']}", step=result.id)


def _process_words(stage: Stage, *extra: str) -> list[str]:
    # -P: a folder called like a library, where the user happens to stand, must not be imported.
    return [sys.executable, "-P", "-m", "kd", *command_line(stage, *extra)[1:]]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("KD_JSON", "KD_QUIET", "KD_VERBOSE")}


def _already_done(workflow: Workflow, plan: Stage) -> dict[str, StepResult]:
    """The steps that `plan` finds done, with what their manifests say. Empty where it cannot tell."""
    places = {step.id: Path(step.output_dir) for step in workflow.steps if step.output_dir is not None}
    if not any((place / MANIFEST).exists() for place in places.values()):
        return {}
    ran = subprocess.run(
        _process_words(plan, "--json", "--quiet"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=_environment(),
    )
    try:
        states = {entry["id"]: entry["state"] for entry in json.loads(ran.stdout)["steps"]}
    except (ValueError, KeyError, TypeError):
        return {}
    done: dict[str, StepResult] = {}
    for step in workflow.steps:
        # A step may have stood aside (`<name>.replaced`): its own command brings it back.
        if states.get(step.id) == "already done" and (places[step.id] / MANIFEST).exists():
            artifact = open_artifact(places[step.id])
            result = {"output_dir": step.output_dir, **artifact.manifest.get("summary", {})}
            done[step.id] = StepResult(
                step.id,
                step.stage.command,
                "already done",
                result=result,
                stage=step.resolve(_fingerprint_of(workflow)),
            )
    return done


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _relay(id: str, lines: IO[str], log: IO[str], progress: Progress) -> None:
    """Hand on what a step reports: its JSON lines to our progress, everything to its log."""
    tasks: dict[str, tuple[ProgressTask, float]] = {}
    for line in lines:
        # Whatever happens here, the pipe is read to its end: a step whose stderr nobody reads would stand still.
        with contextlib.suppress(OSError):
            log.write(line)
            log.flush()
        try:
            event = json.loads(line) if line.startswith("{") else {}
            kind = event.pop("event", None)
        except ValueError:
            continue
        event.pop("time", None)
        if kind in ("info", "warn", "estimate"):
            text = f"{id}: {event.pop('text', '')}"
            # A step may report a field of the same name; a clash would end this thread, and with it the step's pipe.
            getattr(progress, kind)(text, **{**event, "step": id})
        elif kind in ("start", "progress", "done") and "task" in event and "done" in event:
            _relay_task(id, kind, event, tasks, progress)
    for task, _ in tasks.values():
        task.done()


def _relay_task(
    id: str, kind: str, event: dict[str, Any], tasks: dict[str, tuple[ProgressTask, float]], progress: Progress
) -> None:
    name, done = event.pop("task"), event.pop("done") or 0
    total, unit = event.pop("total", None), event.pop("unit", "rows")
    if kind == "start":
        tasks[name] = progress.task(f"{id}: {name}", total=total, unit=unit, initial=done), done
        return
    if name not in tasks:
        return
    task, before = tasks[name]
    fields = {key: value for key, value in event.items() if key not in ("rate", "remaining_s", "seconds")}
    task.advance(done - before, **fields)
    tasks[name] = task, done
    if kind == "done":
        task.done()
        del tasks[name]


def _read_result(step: Step, code: int, printed: str, log: Path) -> StepResult:
    """What the command's JSON object and exit code say."""
    command = step.stage.command
    try:
        result = json.loads(printed)
        error = result.pop("error", None)
    except (ValueError, AttributeError):
        result, error = {}, None
    if code == 0 and error is None:
        state = "already done" if result.get("skipped") else "done"
        return StepResult(step.id, command, state, changed=tuple(result.get("changed", ())), result=result)
    if error is None:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        error = {"what": f"kd {command} {ended}", "details": [], "fix": None}
    if code == 1 or code < 0:
        error = {**error, "fix": f"see {log}"}
    return StepResult(step.id, command, "failed", result=result, error=error)


def plan_workflow(workflow: Workflow) -> list[StepResult]:
    """What `run_workflow` would do, as far as it can be known now: `state` and, for what changed, the differing fields.

    The states are "already done", "would run", "would continue", "would run again", "follows" (it depends on what
    would run) and "failed" (refused now).
    """
    results: dict[str, StepResult] = {}
    states = {"done": "already done", "new": "would run", "unfinished": "would continue", "changed": "would run again"}
    for step in workflow.steps:
        moving = [need for need in step.needs if results[need].state != "already done"]
        if moving:
            results[step.id] = StepResult(step.id, step.stage.command, "follows", waits_for=tuple(moving))
            continue
        try:
            state, changed = pending(step.resolve(_fingerprint_of(workflow)))
            results[step.id] = StepResult(step.id, step.stage.command, states[state], changed=changed)
        except KdError as error:
            results[step.id] = StepResult(step.id, step.stage.command, "failed", error=error.to_json())
    return [*results.values()]


def commands_of(workflow: Workflow) -> list[str]:
    """The workflow as shell commands, one per step; a fingerprint that is not known yet is asked for in the shell."""
    places = {step.id: step.output_dir for step in workflow.steps}

    def quoted(word: str) -> str:
        parts = _ASKED.split(word)
        text = [shlex.quote(part) if part or len(parts) == 1 else "" for part in parts[::3]]
        for index, (short, id) in enumerate(zip(parts[1::3], parts[2::3], strict=True)):
            place = places[id]
            assert place is not None
            text[index] += f'"$(kd fingerprint {"--short " if short else ""}{shlex.quote(place)})"'
        return "".join(text)

    lines = []
    for step in workflow.steps:
        stage = step.resolve(lambda id, short: f"\x00{'short' if short else ''}:{id}\x00")
        lines.append(" ".join(map(quoted, command_line(stage))))
    return lines


def _fingerprint_of(workflow: Workflow) -> Callable[[str, bool], str]:
    places = {step.id: step.output_dir for step in workflow.steps}

    def fingerprint_of(id: str, short: bool) -> str:
        place = places[id]
        assert place is not None
        return open_artifact(place).fingerprint[: 8 if short else None]

    return fingerprint_of


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "workflow.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"another `kd run`, or a step that it left behind, is working in {folder}",
                fix="wait for it and run the same command again, or give another --output-dir",
            ) from None
        except OSError:
            pass  # A file system without locks.
        yield descriptor
    finally:
        os.close(descriptor)
