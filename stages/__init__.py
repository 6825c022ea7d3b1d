"""What kd does: one stage per file or folder.

`COMMANDS` is the one list of commands. A stage is imported when its command is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline.stage import Outcome, Stage

COMMANDS = {
    "train-teacher": ".train_teacher:TrainTeacher",
    "augment": ".augment:Augment",
    "cache-teacher": ".cache_teacher:CacheTeacher",
    "train-student": ".train_student:TrainStudent",
    "evaluate": ".evaluate:Evaluate",
    "compare": ".compare:Compare",
    "run": ".run_workflow:RunWorkflow",
    "store inspect": ".store.inspect:InspectStore",
    "store verify": ".store.verify:VerifyStore",
    "store repair": ".store.repair:RepairStore",
    "store audit": ".store.audit:AuditStore",
    "store compact": ".store.compact:CompactStore",
    "store gc": ".store.gc:CollectStore",
    "store merge": ".store.merge:MergeStores",
    "store plan": ".store.plan:PlanStore",
    "store export": ".store.export:ExportStore",
    "methods": ".listings:ListMethods",
    "students": ".listings:ListStudents",
    "signals": ".listings:ListSignals",
    "fingerprint": ".listings:ShowFingerprint",
}
"""Command → where its stage is."""


def stage_class(command: str) -> type[Stage]:
    """The stage that a command runs."""
    module, name = COMMANDS[command].split(":")
    found: type[Stage] = getattr(import_module(module, __name__), name)
    assert found.command == command, f"{found.__name__}.command is {found.command!r}, not {command!r}"
    return found


class StageClasses(Mapping[str, "type[Stage]"]):
    """Command → stage, each imported when it is looked up."""

    def __getitem__(self, command: str) -> type[Stage]:
        return stage_class(command)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def stage_function(command: str) -> Callable[..., Outcome]:
    """The Python function that does what a command does, with the stage's fields as keyword arguments."""
    from ..pipeline.config import build_stage, parse_values
    from ..pipeline.stage import NullProgress, Progress, StageContext, execute

    stage = stage_class(command)

    def run(*, overwrite: bool = False, progress: Progress | None = None, **fields: Any) -> Outcome:
        values = parse_values(stage, fields, named=str)
        context = StageContext(progress=progress or NullProgress(), overwrite=overwrite)
        outcome = execute(build_stage(stage, values), context)
        if outcome.failure is not None:
            raise outcome.failure
        return outcome

    run.__name__ = run.__qualname__ = command.replace("-", "_").replace(" ", "_")
    run.__doc__ = (
        f"{stage.summary_line}\n\nWhat `kd {command}` does, with its options as keyword arguments. Returns the "
        "`Outcome`: `skipped`, `summary` and the `artifact` with its path.\n\n"
        "Raises:\n    KdError: see `pipeline/errors.py`."
    )
    own = [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
    run.__signature__ = inspect.Signature([*inspect.signature(stage).parameters.values(), *own])  # type: ignore[attr-defined]
    return run
