"""Run a workflow: a chain of stages in one YAML file (`pipeline/workflow.py` has the format)."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..pipeline.errors import IncompleteError, UsageError
from ..pipeline.progress import duration
from ..pipeline.stage import Stage, StageContext, StageResult, option


@dataclass(frozen=True, kw_only=True)
class RunWorkflow(Stage):
    """Runs the steps of a workflow; what is done already is skipped, what changed is made again."""

    command: ClassVar[str] = "run"
    on_interrupt: ClassVar[str] = "finished steps are kept; the same command goes on with the rest"

    file: str = option(help="The workflow's YAML file.", positional=True, metavar="FILE")
    set: tuple[str, ...] = option((), help="Set a variable of the file. Repeatable.", metavar="NAME=VALUE", split=False)
    only: tuple[str, ...] = option((), help="Only these steps, and what they need.", metavar="STEP,...")
    output_dir: str | None = option(None, help="Where all goes; the file's `output_dir` by default.", metavar="DIR")
    jobs: int = option(1, help="Steps that run at once.", identity=False)
    print_commands: bool = option(False, help="Print the steps as shell commands, and run nothing.", identity=False)
    dry_run: bool = option(False, help="Print what would run, and why, and run nothing.", identity=False)
    seed: int | None = option(None, help="Set the file's variable `seed`.")

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"--jobs is {self.jobs}; expected 1 or more")

    def run(self, context: StageContext) -> StageResult:
        from ..pipeline.scheduler import commands_of, plan_workflow, run_workflow
        from ..pipeline.workflow import parse_variable, read_workflow
        from . import StageClasses

        variables = dict(map(parse_variable, self.set))
        if self.seed is not None:
            variables["seed"] = self.seed
        workflow = read_workflow(self.file, StageClasses(), variables=variables, output_dir=self.output_dir)
        if self.only:
            workflow = workflow.only(_names(self.only))
        named = {"workflow": workflow.name, "workflow_dir": workflow.output_dir}
        if self.print_commands:
            commands = commands_of(workflow)
            return StageResult(summary={**named, "commands": commands, "steps": [step.id for step in workflow.steps]})
        if self.dry_run:
            planned = plan_workflow(workflow)
            return StageResult(summary={**named, "steps": [_entry(step) for step in planned]}, finished=False)

        started = time.perf_counter()
        context.progress.info(f"{workflow.name}: {len(workflow.steps)} steps into {workflow.output_dir}")
        plan = dataclasses.replace(self, dry_run=True, jobs=1)
        results = run_workflow(workflow, context.progress, jobs=self.jobs, plan=plan, verbose=context.verbose)
        summary: dict[str, Any] = {
            **named,
            "seconds": round(time.perf_counter() - started, 3),
            "steps": [_entry(result) for result in results],
        }
        compared = [
            result for result in results if result.command == "compare" and result.error is None and result.result
        ]
        if compared:
            reports = []
            for result in compared:
                comparison = {key: value for key, value in result.result.items() if key not in _OUTCOME}
                assert result.stage is not None
                reports.append(result.stage.report(comparison) or "")
            summary["comparison"] = comparison  # the last one; all of them are in the report
            summary["comparison_table"] = "\n\n".join(reports)
        failed = [result for result in results if result.state == "failed"]
        if not failed:
            return StageResult(summary=summary)
        details = []
        for result in failed:
            assert result.error is not None
            details += [f"{result.id}: {result.error['what']}", *(f"  {line}" for line in result.error["details"])]
            if result.error["fix"]:
                details.append(f"  fix: {result.error['fix']}")
        not_run = sum(result.state == "not run" for result in results)
        rest = f", and {not_run} that need them did not run" if not_run else ""
        return StageResult(
            summary=summary,
            failure=IncompleteError(
                f"{len(failed)} of {len(results)} steps failed{rest}",
                details=details,
                fix="repair that and run the same command again: finished steps are kept",
            ),
        )

    def report(self, summary: Mapping[str, Any]) -> str:
        if "commands" in summary:
            return "\n".join(summary["commands"])
        width = max(len(step["id"]) for step in summary["steps"])
        lines = []
        for step in summary["steps"]:
            time_s = duration(step["seconds"]) if step["seconds"] else ""
            lines.append(f"{step['id']:<{width}}  {step['state']:<15}  {time_s:>11}  {step['why']}".rstrip())
        if "seconds" in summary:
            lines.append(f"{summary['workflow']}: {duration(summary['seconds'])}, in {summary['workflow_dir']}")
        if summary.get("comparison_table"):
            lines += ["", summary["comparison_table"]]
        return "\n".join(lines)


def _names(entries: Iterable[str]) -> list[str]:
    """The steps that --only names: a comma parts them, but for those between the brackets of one instance.

    >>> _names(("teacher", "student[seed=1", "kind=a]"))
    ['teacher', 'student[seed=1,kind=a]']
    """
    return re.findall(r"[^,\[]+(?:\[[^\]]*\]?)?", ",".join(entries))


_OUTCOME = ("skipped", "changed", "output_dir", "fingerprint")


def _entry(result: Any) -> dict[str, Any]:
    """One step as the summary has it. `why`: what changed, what failed, or what it waits for."""
    why = "; ".join(result.changed)
    if result.error is not None:
        why = result.error["what"]
    elif result.waits_for:
        why = (
            f"after {', '.join(result.waits_for)}"
            if result.state == "follows"
            else f"needs {', '.join(result.waits_for)}"
        )
    return {
        "id": result.id,
        "stage": result.command,
        "state": result.state,
        "seconds": result.seconds,
        "output_dir": result.result.get("output_dir"),
        "why": why,
    }
