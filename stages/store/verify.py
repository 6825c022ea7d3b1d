"""`kd store verify`: every file of a store against its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import IncompleteError, KdError, VerificationError
from ...pipeline.executor import check_execution, cluster_option, map_shards, workers_option
from ...pipeline.progress import size
from ...pipeline.stage import Stage, StageContext, StageResult, option

if TYPE_CHECKING:
    from ...pipeline.store import VerifyReport


@dataclass(frozen=True)
class _VerifyShard:
    """The job of checking one shard, as the executor maps it."""

    url: str
    run: str

    def compute(self, shard: int, advance: Callable[[int], None]) -> Any:
        from ...pipeline.store.verify import verify_shard

        return verify_shard(self.url, shard, self.run)

    def finish(self, computed: Any) -> Any:
        return computed


def verify_with(
    url: str, context: StageContext, *, workers: int = 1, cluster: str | None = None
) -> tuple[VerifyReport, list[str]]:
    """Verify a store over an executor: (what was found, shards that could not be checked with the reason)."""
    from ...pipeline.store import verify_store

    died: list[str] = []

    def mapped(check: object, urls: Iterable[str], shards: Iterable[int], runs: Iterable[str]) -> Iterator[Any]:
        numbers, run = [*shards], next(iter(runs), "")
        task = context.progress.task("verifying", total=len(numbers), unit="shards")
        # Named for this run: a shared scheduler answers a known key with the old task's result.
        outcomes = map_shards(_VerifyShard(url, run), numbers, name=f"verify-{run}", workers=workers, cluster=cluster)
        for outcome in outcomes:
            task.advance()
            if outcome.failure is not None:
                died.append(f"shard {outcome.shard}: {outcome.failure}")
            else:
                yield outcome.record
        task.done()

    return verify_store(url, map_shards=mapped), died


@dataclass(frozen=True, kw_only=True)
class VerifyStore(Stage):
    """Reads every file of a store and compares it with its record."""

    command: ClassVar[str] = "store verify"
    on_interrupt: ClassVar[str] = "nothing was changed; the same command starts again"

    store: str = option(help="The store.", positional=True, metavar="STORE")
    workers: int = workers_option()
    cluster: str | None = cluster_option()

    def __post_init__(self) -> None:
        check_execution(self.workers, self.cluster)

    def run(self, context: StageContext) -> StageResult:
        started = time.perf_counter()
        report, died = verify_with(self.store, context, workers=self.workers, cluster=self.cluster)
        if report.unrecorded:
            context.progress.info(
                f"{len(report.unrecorded)} files that no record names: left by a killed process; harmless",
                files=[*report.unrecorded],
            )
        failure: KdError | None = None
        try:
            report.require_ok()
        except VerificationError as error:
            failure = error
        if failure is None and died:
            failure = IncompleteError(f"{len(died)} shards could not be checked", details=died)
        summary = {**report.to_json(), "seconds": round(time.perf_counter() - started, 3)}
        return StageResult(summary=summary, failure=failure)

    def report(self, summary: Mapping[str, Any]) -> str:
        state = "as recorded" if summary["ok"] else f"{len(summary['problems'])} problems"
        return f"store {summary['url']}: {summary['files']:,} files, {size(summary['bytes'])}: {state}"
