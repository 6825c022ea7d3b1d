"""`kd store inspect`: what a store holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...pipeline.progress import size
from ...pipeline.stage import Stage, StageContext, StageResult, option


@dataclass(frozen=True, kw_only=True)
class InspectStore(Stage):
    """What a store holds, from its records alone."""

    command: ClassVar[str] = "store inspect"

    store: str = option(help="The store.", positional=True, metavar="STORE")

    def run(self, context: StageContext) -> StageResult:
        from ...pipeline.store import open_store

        return StageResult(summary=open_store(self.store).inspect())

    def report(self, summary: Mapping[str, Any]) -> str:
        from ...pipeline.store.register import format_ranges, from_ranges

        identity, capture = summary["identity"], summary["identity"]["capture"]
        lines = [
            f"store {summary['url']}",
            f"  digest   {summary['digest']}",
            f"  rows     {summary['rows']:,} with {summary['tokens']:,} tokens in {summary['shards']:,} shards",
            f"  bytes    {size(summary['bytes'])}",
            f"  teacher  {_line(identity['teacher'])}",
            f"  capture  {_line(capture)}",
            f"  sidecars {', '.join(summary['sidecars']) or '(none)'}",
            "  signals",
        ]
        width = max((len(name) for name in summary["signals"]), default=0)
        for name, signal in summary["signals"].items():
            shape = "".join(f" x {length}" for length in signal["shape"])
            state = f"{signal['shards']} of {summary['shards']} shards"
            lines.append(
                f"    {name:<{width}}  per {signal['axis']}{shape} {signal['dtype']}, {state}, {size(signal['bytes'])}"
            )
        for array, shards in summary["incomplete"].items():
            lines.append(f"  {array} lacks shards {format_ranges(from_ranges(shards))}")
        if summary["derivable"]:
            lines.append("  derivable, without being stored")
            for one in summary["derivable"]:
                how = "and read from there" if one["exact"] else "up to rounding"
                by = f" by {', '.join(one['sidecars'])}" if "sidecars" in one else ""
                lines.append(f"    {one['signal']}  from {one['from']}{by}, {how}")
        lines.append("  views" if summary["views"] else "  views    (none)")
        for view in summary["views"]:
            state = "" if view["there"] else "; its folder is gone"
            what = f"{view['rows']:,} rows of {view['corpus']}, {', '.join(view['signals'])}"
            lines.append(f"    {view['path']}: {what}{state}")
        return "\n".join(lines)


def _line(values: Mapping[str, Any]) -> str:
    """The short values of a mapping on one line; long ones belong into --json."""
    texts = {key: str(value) for key, value in values.items() if not isinstance(value, Mapping)}
    return "  ".join(f"{key}={text if len(text) <= 40 else text[:37] + '...'}" for key, text in texts.items())
