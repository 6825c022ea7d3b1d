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
    "train-teacher": (
        ".train_teacher:TrainTeacher",
        "Fine-tune any encoder checkpoint on labelled text into a teacher folder.",
    ),
    "augment": (".augment:Augment", "Make a corpus: import a dataset, hide labels, add variants of its texts."),
    "cache-teacher": (
        ".cache_teacher:CacheTeacher",
        "Run a teacher over a corpus once, and keep what it says in a store.",
    ),
    "train-student": (
        ".train_student:TrainStudent",
        "Train a student from stored teacher signals, without the teacher.",
    ),
    "evaluate": (".evaluate:Evaluate", "Score a teacher or a student on one split."),
    "compare": (".compare:Compare", "Compare students with their baselines and their teacher on one split."),
    "run": (".run_workflow:RunWorkflow", "Run a workflow: skip what is done, make again what changed, and compare."),
    "store inspect": (".store.inspect:InspectStore", "Print what a store holds: identity, rows, signals, bytes."),
    "store verify": (
        ".store.verify:VerifyStore",
        "Read a whole store and compare it with its records; exit code 4 if it differs.",
    ),
    "store repair": (
        ".store.repair:RepairStore",
        "Restore what is damaged in a store: the teacher runs on the damaged rows only.",
    ),
    "store audit": (
        ".store.audit:AuditStore",
        "Run the teacher again on a sample of rows, and compare; exit code 4 if they differ.",
    ),
    "store compact": (
        ".store.compact:CompactStore",
        "Put the commit records of a store into few files; it holds the same as before.",
    ),
    "store gc": (".store.gc:CollectStore", "List what no view of a store needs, and remove it with --delete."),
    "store merge": (".store.merge:MergeStores", "Copy what other stores of the same teacher hold into one store."),
    "store plan": (
        ".store.plan:PlanStore",
        "Print bytes and time of signals in each encoding, against a budget; writes nothing.",
    ),
    "store export": (
        ".store.export:ExportStore",
        "Write a view or a store as a dataset that datasets.load_dataset opens.",
    ),
    "methods": (".listings:ListMethods", "List the distillation methods."),
    "students": (".listings:ListStudents", "List the student architectures."),
    "signals": (
        ".listings:ListSignals",
        "List the teacher outputs that can be cached, with their bytes for a teacher.",
    ),
    "fingerprint": (".listings:ShowFingerprint", "Print the fingerprint of a finished artifact."),
}
"""Command → where its stage is, and its line in lists: `kd --help` imports no stage."""


def stage_class(command: str) -> type[Stage]:
    """The stage that a command runs."""
    where, _ = COMMANDS[command]
    module, name = where.split(":")
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
        f"{COMMANDS[command][1]}\n\nWhat `kd {command}` does, with its options as keyword arguments. Returns the "
        "`Outcome`: `skipped`, `summary` and the `artifact` with its path.\n\n"
        "Raises:\n    KdError: see `pipeline/errors.py`."
    )
    own = [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
    run.__signature__ = inspect.Signature([*inspect.signature(stage).parameters.values(), *own])  # type: ignore[attr-defined]
    return run
