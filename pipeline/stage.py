"""Stages: frozen dataclasses whose fields are their whole configuration.

The fields are the command-line options, the keys of a configuration file, what the manifest records and what
the fingerprint hashes: one source. `execute` decides between skip, refuse, resume and run.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .artifact import Artifact, open_artifact, read_manifest, write_manifest
from .errors import RefusedError
from .fingerprint import differing_fields, fingerprint


def option(
    default: Any = MISSING,
    *,
    help: str,
    identity: bool = True,
    panel: str | None = None,
    positional: bool = False,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
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
    """
    metadata = {
        "help": help,
        "identity": identity,
        "panel": panel,
        "positional": positional,
        "metavar": metavar,
        "choices": choices,
    }
    if default is MISSING:
        return dataclass_field(metadata=metadata)
    return dataclass_field(default=default, metadata=metadata)


class ProgressTask(Protocol):
    """One bar: advance it, then finish it."""

    def advance(self, amount: float = 1, **fields: Any) -> None: ...

    def done(self, **fields: Any) -> None: ...


class Progress(Protocol):
    """Where a stage reports what it is doing. Never stdout."""

    def task(self, name: str, *, total: float | None = None, unit: str = "rows") -> ProgressTask: ...

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

    def task(self, name: str, *, total: float | None = None, unit: str = "rows") -> ProgressTask:
        return _NullTask()

    def info(self, text: str, **fields: Any) -> None:
        pass

    def warn(self, text: str, **fields: Any) -> None:
        pass

    def estimate(self, text: str, **fields: Any) -> None:
        pass


@dataclass(frozen=True)
class StageContext:
    """What surrounds one execution and does not change its result."""

    progress: Progress = dataclass_field(default_factory=NullProgress)
    overwrite: bool = False


@dataclass(frozen=True)
class StageResult:
    """What a stage hands to its manifest.

    Attributes:
        summary: figures for people (`--json` prints them): rows, bytes, seconds.
        content: what readers of the artifact need.
        finished: False when nothing was written (a dry run): no manifest is made.
    """

    summary: Mapping[str, Any]
    content: Mapping[str, Any] = dataclass_field(default_factory=dict)
    finished: bool = True


@dataclass(frozen=True)
class Outcome:
    """How `execute` ended: `skipped` when the artifact was already there."""

    skipped: bool
    summary: Mapping[str, Any]
    artifact: Artifact | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages. Subclasses are frozen, keyword-only dataclasses made of `option` fields."""

    command: ClassVar[str]
    """The command that runs it: a verb."""
    kind: ClassVar[str | None] = None
    """The kind of artifact it makes; None when it only reports."""
    summary_line: ClassVar[str] = ""
    """One line for `kd --help`."""
    version: ClassVar[int] = 1
    """Raised when the same configuration starts to give another result."""

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

    def run(self, context: StageContext) -> StageResult:
        """Do the work into `output_dir`; called only when it is needed."""
        raise RefusedError(f"stage {self.command!r} has no work of its own")

    def fingerprint_of(self, inputs: Mapping[str, str]) -> str:
        """Hash of stage, version, identity fields and the fingerprints of the inputs."""
        return fingerprint(self._identity(inputs))

    def _identity(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        config = {name: value for name, value in self.identity_config().items() if name not in inputs}
        return {"stage": self.command, "version": self.version, "config": config, "inputs": dict(inputs)}


def execute(stage: Stage, context: StageContext | None = None) -> Outcome:
    """Run a stage unless its artifact is there.

    Raises:
        RefusedError: `output_dir` holds the result of another configuration (the differing fields are shown), or
            files that no stage of kd put there.
    """
    context = context or StageContext()
    output_dir = getattr(stage, "output_dir", None)
    inputs = stage.inputs()
    if stage.kind is None or output_dir is None:
        result = stage.run(context)
        return Outcome(skipped=False, summary=result.summary, artifact=None)

    folder = Path(output_dir)
    wanted = stage.fingerprint_of(inputs)
    found = read_manifest(folder) if folder.exists() else None
    if found is not None and found["fingerprint"] == wanted and not context.overwrite:
        context.progress.info(f"{stage.command}: {folder} is already done; nothing to do", skipped=True)
        return Outcome(skipped=True, summary=found.get("summary", {}), artifact=Artifact(folder, found))
    if found is not None and found["fingerprint"] != wanted and not context.overwrite:
        raise RefusedError(
            f"{folder} holds a {found['kind']} made with other settings",
            details=differing_fields(found.get("identity", {}), stage._identity(inputs)) or ["made by another version"],
            fix="give another --output-dir, or --overwrite to replace it",
        )
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"{folder} is a file; a {stage.kind} is a directory", fix="give another --output-dir")

    started = time.perf_counter()
    if context.overwrite:
        discard(folder)
    result = stage.run(context)
    if not result.finished:
        return Outcome(skipped=False, summary=result.summary, artifact=None)
    summary = {"seconds": round(time.perf_counter() - started, 3), **result.summary}
    write_manifest(
        folder,
        {
            "kd_version": _kd_version(),
            "kind": stage.kind,
            "stage": stage.command,
            "fingerprint": wanted,
            "identity": stage._identity(inputs),
            "config": stage.config(),
            "inputs": inputs,
            "summary": summary,
            "content": dict(result.content),
        },
    )
    return Outcome(skipped=False, summary=summary, artifact=open_artifact(folder, kind=stage.kind))


def discard(folder: Path) -> None:
    """Remove an artifact that is to be replaced; refuses a folder that is not one.

    An unfinished folder has no manifest yet, so only a marker or a manifest of ours makes it safe to delete.
    """
    if not folder.exists():
        return
    if read_manifest(folder) is None and any(folder.iterdir()):
        raise RefusedError(
            f"--overwrite would delete {folder}, which is not a finished artifact of kd",
            fix="delete it yourself if that is what you want, or give another --output-dir",
        )
    shutil.rmtree(folder)


def _kd_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kd-pipeline")
    except PackageNotFoundError:
        return "unknown"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
