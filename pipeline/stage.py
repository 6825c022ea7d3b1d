"""Stages: frozen dataclasses whose fields are their whole configuration.

The fields are the command-line options, the keys of a configuration file, what the manifest records and what
the fingerprint hashes: one source. `execute` decides between skip, refuse, resume and run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .artifact import MANIFEST, Artifact, json_ready, kd_version, open_artifact, read_manifest, write_manifest
from .disk import disk_full_explained
from .errors import KdError, RefusedError, UsageError
from .fingerprint import differing_fields, fingerprint
from .ranks import Ranks, launched

UNFINISHED = "unfinished.json"
"""Marks a folder that a stage is working on, or was when it was killed; holds the identity of that work."""


def option(
    default: Any = MISSING,
    *,
    help: str,
    identity: bool = True,
    panel: str | None = None,
    positional: bool = False,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    split: bool = True,
) -> Any:
    """A stage field that is also a command-line option.

    Args:
        default: value when not given; without one the option is required.
        help: one line for `--help` and the docs.
        identity: whether the value changes the result. Worker counts and devices do not.
        panel: heading under which `--help` lists it.
        positional: a positional argument instead of `--name`.
        metavar: how `--help` names the value.
        choices: the values allowed; others are a UsageError with near matches.
        split: whether a comma in an option of a tuple field starts the next entry.
    """
    metadata = {
        "help": help,
        "identity": identity,
        "panel": panel,
        "positional": positional,
        "metavar": metavar,
        "choices": choices,
        "split": split,
    }
    if default is MISSING:
        return dataclass_field(metadata=metadata)
    return dataclass_field(default=default, metadata=metadata)


class ProgressTask(Protocol):
    """One bar: advance it, then finish it."""

    def advance(self, amount: float = 1, **fields: Any) -> None: ...

    def done(self, **fields: Any) -> None: ...


class Progress(Protocol):
    """Where a stage reports what it is doing. Never stdout.

    A task's `initial` amount was done by an earlier run: it counts as done and not towards the rate.
    """

    def task(
        self, name: str, *, total: float | None = None, unit: str = "rows", initial: float = 0
    ) -> ProgressTask: ...

    def info(self, text: str, **fields: Any) -> None: ...

    def warn(self, text: str, **fields: Any) -> None: ...

    def estimate(self, text: str, **fields: Any) -> None: ...


class _NullTask:
    def advance(self, amount: float = 1, **fields: Any) -> None:
        pass

    def done(self, **fields: Any) -> None:
        pass


class NullProgress:
    """Reports nothing; for the Python API and tests."""

    def task(self, name: str, *, total: float | None = None, unit: str = "rows", initial: float = 0) -> ProgressTask:
        return _NullTask()

    def info(self, text: str, **fields: Any) -> None:
        pass

    def warn(self, text: str, **fields: Any) -> None:
        pass

    def estimate(self, text: str, **fields: Any) -> None:
        pass


@dataclass(frozen=True)
class StageContext:
    """What surrounds one execution and does not change its result.

    Attributes:
        progress: where the stage reports.
        overwrite: replace the artifact in `output_dir`, whatever made it.
        overwrite_changed: replace it only if other settings or inputs made it.
        verbose: let the libraries underneath speak.
    """

    progress: Progress = dataclass_field(default_factory=NullProgress)
    overwrite: bool = False
    overwrite_changed: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class StageResult:
    """What a stage hands to its manifest.

    Attributes:
        summary: figures for people (`--json` prints them): rows, bytes, seconds.
        content: what readers of the artifact need.
        finished: False when nothing was written (a dry run): no manifest is made.
        failure: the work ended, with a summary worth printing, and is not good: no manifest is made, the command
            prints the summary, then this error, and exits with its code.
    """

    summary: Mapping[str, Any]
    content: Mapping[str, Any] = dataclass_field(default_factory=dict)
    finished: bool = True
    failure: KdError | None = None


@dataclass(frozen=True)
class Outcome:
    """How `execute` ended.

    Attributes:
        skipped: the artifact was already there.
        summary: the stage's figures; those of the earlier run when skipped.
        artifact: what it made; None for a report, a dry run or a failure.
        changed: one line per field in which a replaced artifact differed.
        failure: what to report and exit with, after the summary.
        follows: whether another process of the launch leads: it has the summary and the artifact, and prints them.
    """

    skipped: bool
    summary: Mapping[str, Any]
    artifact: Artifact | None
    changed: tuple[str, ...] = ()
    failure: KdError | None = None
    follows: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages. Subclasses are frozen, keyword-only dataclasses made of `option` fields."""

    command: ClassVar[str]
    """The command that runs it: a verb."""
    kind: ClassVar[str | None] = None
    """The kind of artifact it makes; None when it only reports."""
    version: ClassVar[int] = 1
    """Raised when the same configuration starts to give another result."""
    on_interrupt: ClassVar[str] = "the same command starts it again"
    """What is kept when it is interrupted, and how it goes on; printed after Ctrl-C."""

    def config(self) -> dict[str, Any]:
        """Every field and its value, JSON-ready."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def identity_config(self) -> dict[str, Any]:
        """The fields that change the result; without places of output."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.metadata.get("identity", True) and f.name != "output_dir"
        }

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the stage reads, by field name. Checks them: refuses bad ones before any work.

        A field named here is represented by its fingerprint alone, so moving an input changes nothing.
        """
        return {}

    def outdated(self, artifact: Artifact) -> str | None:
        """Why a finished artifact of these very settings must be made again, as when what it points to is gone."""
        return None

    def run(self, context: StageContext) -> StageResult:
        """Do the work into `output_dir`; called only when it is needed."""
        raise RefusedError(f"stage {self.command!r} has no work of its own")

    def ranks(self) -> Ranks | None:
        """The processes that do this together, or None for one alone; UsageError where it cannot be shared."""
        _, count = launched()
        if count > 1:
            raise UsageError(
                f"kd {self.command} is the work of one process, and {count} were started together",
                fix=f"start it without torchrun: python -m kd {self.command} ...",
            )
        return None

    def report(self, summary: Mapping[str, Any]) -> str | None:
        """The result for people, printed on stdout; None prints the summary as aligned lines."""
        return None

    def fingerprint_of(self, inputs: Mapping[str, str]) -> str:
        """Hash of stage, version, identity fields and the fingerprints of the inputs."""
        return fingerprint(self._identity(inputs))

    def _identity(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        config = {name: value for name, value in self.identity_config().items() if name not in inputs}
        return {"stage": self.command, "version": self.version, "config": config, "inputs": dict(inputs)}


def pending(stage: Stage) -> tuple[str, tuple[str, ...]]:
    """What `execute` would find: a state and one line per differing field.

    The state is "done", "changed" (finished or unfinished work of other settings), "unfinished" or "new". A stage that
    only reports is always "new".
    """
    inputs = stage.inputs()
    output_dir = getattr(stage, "output_dir", None)
    if stage.kind is None or output_dir is None:
        return "new", ()
    folder, identity = Path(output_dir), stage._identity(inputs)
    found = read_manifest(folder)
    if found is not None:
        changed = _differences(found, identity, fingerprint(identity))
        if not changed and (reason := stage.outdated(Artifact(folder, found))) is not None:
            changed = (reason,)
        return ("changed", changed) if changed else ("done", ())
    kept = read_manifest(_aside(folder))
    if kept is not None and kept["fingerprint"] == fingerprint(identity):
        return "done", ()
    try:
        marker = json.loads((folder / UNFINISHED).read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return "new", ()
    changed = tuple(differing_fields(marker, identity))
    return ("changed", changed) if changed else ("unfinished", ())


def execute(stage: Stage, context: StageContext | None = None) -> Outcome:
    """Run a stage unless its artifact is there.

    While it runs, `output_dir` holds `unfinished.json`, locked. An artifact that is to be replaced stands beside it
    as `<name>.replaced` until the new one is complete, and comes back when its settings do.

    Raises:
        RefusedError: `output_dir` holds the result, or the unfinished work, of another configuration (the differing
            fields are shown), files that no stage of kd put there, or work that another process is doing now.
        IncompleteError: the disk is full.
    """
    context = context or StageContext()
    ranks = stage.ranks()
    with disk_full_explained(getattr(stage, "output_dir", None) or f"kd {stage.command}"):
        if ranks is None:
            return _execute(stage, context)
        if ranks.leads:
            with ranks.leading():
                return _execute(stage, context)
    silent = dataclasses.replace(context, progress=NullProgress())
    return ranks.following(lambda: stage.run(silent))


def _execute(stage: Stage, context: StageContext) -> Outcome:
    output_dir = getattr(stage, "output_dir", None)
    inputs = stage.inputs()
    if stage.kind is None or output_dir is None or getattr(stage, "dry_run", False):
        result = stage.run(context)
        return Outcome(skipped=False, summary=result.summary, artifact=None, failure=result.failure)

    folder = Path(output_dir)
    if folder.is_symlink():
        folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"{folder} is a file; a {stage.kind} is a directory", fix="give another --output-dir")
    identity = stage._identity(inputs)
    wanted = fingerprint(identity)
    for place in (folder, _aside(folder)):
        _finish_deleting(place)

    found = read_manifest(folder)
    if found is None and not context.overwrite:
        found = _restore(folder, wanted)
    outdated: str | None = None
    if found is not None and found["fingerprint"] == wanted and not context.overwrite:
        outdated = stage.outdated(Artifact(folder, found))
        if outdated is None:
            context.progress.info(f"{stage.command}: {folder} is already done; nothing to do", skipped=True)
            return Outcome(skipped=True, summary=found.get("summary", {}), artifact=Artifact(folder, found))

    changed: tuple[str, ...] = ()
    if found is not None:
        changed = (outdated,) if outdated is not None else _differences(found, identity, wanted)
        if changed and outdated is None and not (context.overwrite or context.overwrite_changed):
            raise RefusedError(
                f"{folder} holds a {found['kind']} made with other settings",
                details=changed,
                fix="give another --output-dir, or --overwrite to replace it",
            )
        if changed:
            context.progress.info(
                f"{stage.command}: {folder} is made again: {'; '.join(changed)}", changed=list(changed)
            )
        _set_aside(folder, found)
    elif folder.exists() and any(folder.iterdir()):
        _take_over(folder, stage, identity, context)

    with _claimed(folder, identity):
        started = time.perf_counter()
        result = stage.run(context)
        if not result.finished or result.failure is not None:
            return Outcome(
                skipped=False, summary=result.summary, artifact=None, changed=changed, failure=result.failure
            )
        # A measure that came out as NaN must not cost the work that it measures.
        summary = json_ready({"seconds": round(time.perf_counter() - started, 3), **result.summary})
        write_manifest(
            folder,
            {
                "kd_version": kd_version(),
                "kind": stage.kind,
                "stage": stage.command,
                "fingerprint": wanted,
                "identity": identity,
                "config": stage.config(),
                "inputs": inputs,
                "summary": summary,
                "content": json_ready(result.content),
            },
        )
    if read_manifest(_aside(folder)) is not None:
        _discard(_aside(folder))
    artifact = open_artifact(folder, kind=stage.kind)
    return Outcome(skipped=False, summary=summary, artifact=artifact, changed=changed)


def _differences(found: Mapping[str, Any], identity: Mapping[str, Any], wanted: str) -> tuple[str, ...]:
    if found["fingerprint"] == wanted:
        return ()
    return tuple(differing_fields(found.get("identity", {}), identity)) or ("made by another version",)


@contextlib.contextmanager
def _claimed(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Hold `folder/unfinished.json`, locked; it goes when the folder has its manifest or nothing else in it."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / UNFINISHED
    with _locked(marker) as descriptor:
        data = json.dumps({"identity": identity}, ensure_ascii=False).encode()
        try:
            if marker.read_bytes() != data:
                with disk_full_explained(marker), open(descriptor, "r+b", closefd=False) as file:
                    file.truncate()
                    file.write(data)
            yield
        finally:
            names = os.listdir(folder) if folder.is_dir() else []
            if MANIFEST in names or names == [UNFINISHED]:
                marker.unlink()
            if names == [UNFINISHED]:
                folder.rmdir()


@contextlib.contextmanager
def _locked(marker: Path) -> Iterator[int]:
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(marker.parent) from None
        except OSError:
            pass  # A file system without locks: the marker alone has to do.
        yield descriptor
    finally:
        os.close(descriptor)


def _take_over(folder: Path, stage: Stage, identity: Mapping[str, Any], context: StageContext) -> None:
    """Make sure that what lies in `folder` may be continued by this work, or clear what may be cleared."""
    if not (folder / UNFINISHED).exists():
        raise RefusedError(
            f"{folder} holds files that are not a finished or unfinished {stage.kind} of kd",
            fix="give another --output-dir, or empty that folder yourself",
        )
    with _locked(folder / UNFINISHED):
        pass
    if os.listdir(folder) == [UNFINISHED]:
        return
    try:
        marker = json.loads((folder / UNFINISHED).read_bytes())["identity"]
        changed = differing_fields(marker, identity)
    except (ValueError, KeyError, TypeError):
        changed = [f"{UNFINISHED} is damaged"]
    if not changed and not context.overwrite:
        context.progress.info(f"{stage.command}: continues in {folder}", resumed=True)
        return
    if changed and not (context.overwrite or context.overwrite_changed):
        raise RefusedError(
            f"{folder} holds an interrupted {stage.kind} with other settings",
            details=changed,
            fix="give another --output-dir, or --overwrite to replace it",
        )
    _discard(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def _set_aside(folder: Path, found: Mapping[str, Any]) -> None:
    """Move a finished artifact aside; refuses when it is no longer the one that was `found` there."""
    _refuse_store(folder)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise _busy(folder) from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # While this waited, the same command started elsewhere may have moved it and begun to make it anew.
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)) or read_manifest(folder) != found:
            raise _busy(folder)
        _discard(_aside(folder))
        folder.rename(_aside(folder))
    except FileNotFoundError:
        raise _busy(folder) from None
    finally:
        os.close(descriptor)


def _busy(folder: Path) -> RefusedError:
    return RefusedError(
        f"another process is working in {folder} now",
        fix="wait for it and run the same command again, or give another --output-dir",
    )


def _restore(folder: Path, wanted: str) -> dict[str, Any] | None:
    """Bring back the artifact that stands aside if it is the wanted one; its manifest, or None."""
    kept = read_manifest(_aside(folder))
    if kept is None or kept["fingerprint"] != wanted:
        return None
    if (folder / UNFINISHED).exists():
        with _locked(folder / UNFINISHED):
            _discard(folder)
    if folder.exists():
        return None
    _aside(folder).rename(folder)
    return kept


def _discard(folder: Path) -> None:
    """Remove an artifact, finished or not, and nothing else."""
    if not folder.exists():
        return
    _refuse_store(folder)
    if read_manifest(folder) is None and not (folder / UNFINISHED).exists():
        raise RefusedError(
            f"{folder} would be deleted, which is not an artifact of kd",
            fix="move it away, or give another --output-dir",
        )
    # Out of the way in one step: a kill between two deletions must not leave a folder that nobody knows.
    _finish_deleting(folder)
    folder.rename(_deleting(folder))
    _finish_deleting(folder)


def _deleting(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleting")


def _finish_deleting(folder: Path) -> None:
    """Remove what an earlier `_discard` of this folder renamed and did not live to delete."""
    shutil.rmtree(_deleting(folder), ignore_errors=True)


def _refuse_store(folder: Path) -> None:
    store = next(folder.rglob("store.json"), None)
    if store is not None:
        raise RefusedError(
            f"replacing {folder} would delete the store in {store.parent}; kd never deletes a store",
            fix="move the store out of that folder, or give another --output-dir",
        )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
