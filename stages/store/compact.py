"""`kd store compact`: the commit records of a store in few files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...pipeline.stage import Stage, StageContext, StageResult, option


@dataclass(frozen=True, kw_only=True)
class CompactStore(Stage):
    """Puts the many small records of a store into one Parquet file, so that it opens fast."""

    command: ClassVar[str] = "store compact"
    on_interrupt: ClassVar[str] = "nothing is lost; the same command does the rest"

    store: str = option(help="The store.", positional=True, metavar="STORE")

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store import open_store
        from ...pipeline.store.records import require_none

        store = open_store(self.store)
        done = store.compact()
        require_none(done.problems, store.url)
        return StageResult(summary={"url": store.url, **done.to_json(), "digest": store.digest()})

    def report(self, summary: Mapping[str, Any]) -> str:
        if not summary["files_after"]:
            return f"store {summary['url']}: its records are in few files already"
        return (
            f"store {summary['url']}: {summary['records']:,} records of {summary['files_before']:,} files "
            f"are in {summary['files_after']:,} now"
        )
