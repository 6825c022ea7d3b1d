"""`kd store merge`: what was captured elsewhere, in one store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...pipeline.errors import UsageError
from ...pipeline.progress import size
from ...pipeline.stage import Stage, StageContext, StageResult, option


@dataclass(frozen=True, kw_only=True)
class MergeStores(Stage):
    """Copies rows and signals of stores of one teacher, capture and layout into one of them, or a new one."""

    command: ClassVar[str] = "store merge"
    on_interrupt: ClassVar[str] = "what was copied is kept; the same command does the rest"

    source: tuple[str, ...] = option(
        help="Stores to copy from; they stay as they are.", positional=True, metavar="SOURCE", split=False
    )
    into: str = option(help="The store that grows; made when it is not there.", metavar="STORE")

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("no store to merge", fix="kd store merge SOURCE... --into STORE")

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store import create_or_open, open_store
        from ...pipeline.store.files import open_files
        from ...pipeline.store.layout import STORE_FILE
        from ...pipeline.store.merge import merge_stores, require_alike

        sources = [open_store(source) for source in self.source]
        first = open_store(self.into) if open_files(self.into).exists(STORE_FILE) else sources[0]
        for source in sources:
            if source is not first:
                require_alike(first, source)
        target = create_or_open(self.into, sources[0].identity, sources[0].layout)
        tasks: dict[str, Any] = {}

        def advance(what: str, count: int) -> None:
            if what not in tasks:
                tasks[what] = context.progress.task(f"merging {what}", unit=what)
            tasks[what].advance(count)

        merged = merge_stores(target, sources, advance=advance)
        for task in tasks.values():
            task.done()
        summary = {"url": target.url, "sources": [*self.source], **vars(merged), "digest": target.digest()}
        return StageResult(summary=summary)

    def report(self, summary: Mapping[str, Any]) -> str:
        from ...pipeline.store.register import format_ranges, from_ranges

        lines = [f"store {summary['url']}: {sum(summary['rows_new'].values()):,} rows are new"]
        for source, count in summary["rows_new"].items():
            lines.append(f"  {source}: {count:,} new, {summary['rows_known'][source]:,} known")
        lines.append(
            f"  {summary['shards_copied']:,} shards copied, {summary['shards_packed']:,} packed; signals: "
            f"{summary['files_copied']:,} files copied, {summary['files_packed']:,} packed, "
            f"{size(summary['bytes_written'])}"
        )
        for array, shards in summary["incomplete"].items():
            lines.append(f"  {array} lacks shards {format_ranges(from_ranges(shards))}")
        lines.append("  views of the sources point to the sources; kd cache-teacher with the same corpus, teacher and")
        lines.append("  signals, this --store and another --output-dir makes them here, and computes nothing")
        lines.append("  (kd store gc takes away what no view made here needs)")
        return "\n".join(lines)
