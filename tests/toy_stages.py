"""Stages that do next to nothing, for tests of what surrounds stages. `install` enters them among kd's commands."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kd.pipeline.artifact import open_artifact
from kd.pipeline.errors import IncompleteError, RefusedError, UsageError
from kd.pipeline.progress import MUTED
from kd.pipeline.stage import Stage, StageContext, StageResult, option


@dataclass(frozen=True, kw_only=True)
class Make(Stage):
    """Makes an artifact out of a number and other artifacts; writes a line to `log` when it really runs."""

    command: ClassVar[str] = "make"
    kind: ClassVar[str] = "corpus"
    on_interrupt: ClassVar[str] = "half of {output_dir} is kept; the same command goes on"

    value: int = option(1, help="A number.")
    rate: float | None = option(None, help="A rate.", panel="Training")
    label: str | None = option(None, help="A text.")
    sources: tuple[str, ...] = option((), help="Artifacts it is made of.")
    mode: str | None = option(None, help="A mode.", choices=("steps", "epoch", "no"))
    careful: bool = option(False, help="A switch.")
    seed: int = option(42, help="Seed of nothing.")
    log: str | None = option(None, help="A file that gets a line for every run.", identity=False)
    sleep_s: float = option(0.0, help="How long it takes.", identity=False)
    until: str | None = option(None, help="Wait until this file is there.", identity=False)
    noise: bool = option(False, help="Write to stdout in every way there is.", identity=False)
    crash: str | None = option(None, help="How to fail.", identity=False)
    output_dir: str = option(help="Where it goes.", metavar="DIR")

    def __post_init__(self) -> None:
        if self.value < 0:
            raise UsageError(f"--value is {self.value}; expected 0 or more")

    def inputs(self) -> dict[str, str]:
        return {f"sources.{i}": open_artifact(source).fingerprint for i, source in enumerate(self.sources)}

    def identity_config(self) -> dict[str, Any]:
        return {name: value for name, value in super().identity_config().items() if name != "sources"}

    def run(self, context: StageContext) -> StageResult:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{Path(self.output_dir).name} {os.environ.get('OMP_NUM_THREADS')}\n")
        if self.noise:
            print("noise from print")
            os.system("echo noise from a child process")
            os.write(1, b"noise from the file descriptor\n")
            warnings.warn("noise from a warning", stacklevel=1)
        task = context.progress.task("making", total=3, unit="things")
        for _ in range(3):
            task.advance(loss=0.5)
            time.sleep(self.sleep_s / 3)
        while self.until and not Path(self.until).exists():
            time.sleep(0.01)
        task.done()
        if self.crash == "refused":
            raise RefusedError("the thing is refused", details=["because"], fix="do not")
        if self.crash == "unforeseen":
            raise ZeroDivisionError("by nought")
        if self.crash == "incomplete":
            return StageResult(summary={"things": 1}, failure=IncompleteError("two things are missing"))
        if self.crash == "killed":
            os.kill(os.getpid(), 9)
        (Path(self.output_dir) / "thing").write_text(str(self.value))
        return StageResult(summary={"things": 3, "thing_bytes": 12_345, "score": float("nan")})


@dataclass(frozen=True, kw_only=True)
class Judge(Stage):
    """Reports on artifacts and makes none."""

    command: ClassVar[str] = "compare"

    things: tuple[str, ...] = option(help="Things to judge.", positional=True, metavar="THING...")
    dry_run: bool = option(False, help="Only look.", identity=False)

    def run(self, context: StageContext) -> StageResult:
        values = [int((Path(thing) / "thing").read_text()) for thing in self.things]
        return StageResult(summary={"total": sum(values), "values": values})

    def report(self, summary: Mapping[str, Any]) -> str:
        return f"| total |\n|---|\n| {summary['total']} |"


@dataclass(frozen=True, kw_only=True)
class Fit(Make):
    """Another maker, as the second kind of step."""

    command: ClassVar[str] = "fit model"
    kind: ClassVar[str] = "run"


COMMANDS = {
    "make": ("toy_stages:Make", "Make a thing [in tests]."),
    "compare": ("toy_stages:Judge", "Judge things."),
    "fit model": ("toy_stages:Fit", "Fit a thing."),
}
STAGES = {"make": Make, "compare": Judge, "fit model": Fit}


def install(folder: Path) -> dict[str, str]:
    """An environment in which `kd` has these commands, through a `sitecustomize` in `folder`."""
    (folder / "sitecustomize.py").write_text(
        "import kd.stages\n"
        f"kd.stages.COMMANDS.update({COMMANDS!r})\n"
        "import kd.cli\n"
        "kd.cli.GROUPS['fit'] = 'Fit things.'\n"
    )
    here = str(Path(__file__).parent)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("KD_") and name not in MUTED}
    return {**plain, "PYTHONPATH": os.pathsep.join([str(folder), here]), "PYTHONDONTWRITEBYTECODE": "1"}
