"""`kd store gc`: what no view of a store needs any more goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...pipeline.progress import size
from ...pipeline.stage import Stage, StageContext, StageResult, option


@dataclass(frozen=True, kw_only=True)
class CollectStore(Stage):
    """Lists the signals that no view of a store needs, and what killed processes left; removes them if asked to."""

    command: ClassVar[str] = "store gc"
    on_interrupt: ClassVar[str] = "the store is sound; the same command does the rest"

    store: str = option(help="The store.", positional=True, metavar="STORE")
    delete: bool = option(False, help="Remove it; without this, nothing is changed.")
    keep_view: tuple[str, ...] = option(
        (), help="A view that is elsewhere now; keep what it needs.", metavar="VIEW", split=False
    )

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store import open_store
        from ...pipeline.store.gc import collect_garbage

        store = open_store(self.store)
        garbage = collect_garbage(store, keep_views=self.keep_view, delete=self.delete)
        summary = {"url": store.url, "deleted": self.delete, **garbage.to_json()}
        if self.delete:
            summary["digest"] = store.digest()
        return StageResult(summary=summary)

    def report(self, summary: Mapping[str, Any]) -> str:
        from ...pipeline.store.register import format_ranges, from_ranges

        done = "were removed" if summary["deleted"] else "would go; --delete removes them"
        lines = [f"store {summary['url']}: {summary['files']:,} files, {size(summary['bytes'])}, {done}"]
        for label, signal in summary["signals"].items():
            shards = format_ranges(from_ranges(signal["shards"]))
            lines.append(f"  {label}  shards {shards}, {size(signal['bytes'])}")
        if summary["leftovers"]:
            lines.append(f"  left by killed processes: {len(summary['leftovers']):,} files")
        if summary["unrecorded"]:
            lines.append(
                f"  left alone: {len(summary['unrecorded']):,} files that a view needs and no record names; "
                "kd store repair captures them again"
            )
        lines += [f"  view is gone: {place}" for place in summary["views_gone"]]
        lines += [f"  kept for view {place}" for place in summary["views_kept"]]
        lines += [f"  not kd's, left alone: {name}" for name in summary["foreign"][:10]]
        return "\n".join(lines)
