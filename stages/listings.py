"""What there is: methods, students and signals by name, and the fingerprint of an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..pipeline.artifact import open_artifact
from ..pipeline.stage import Stage, StageContext, StageResult, option


def _table(entries: list[dict[str, Any]]) -> str:
    """One line per entry, and one with its options and their defaults where it has any."""
    width = max((len(entry["name"]) for entry in entries), default=0)
    lines: list[str] = []
    for entry in entries:
        source = f" ({entry['source']})" if entry.get("source") else ""
        lines.append(f"{entry['name']:<{width}}  {entry['summary']}{source}")
        if entry.get("options"):
            options = "  ".join(f"{name}={value}" for name, value in entry["options"].items())
            lines.append(f"{'':<{width}}  options: {options}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class ListMethods(Stage):
    """The distillation methods that `--method` knows."""

    command: ClassVar[str] = "methods"
    summary_line: ClassVar[str] = "List the distillation methods."

    def run(self, context: StageContext) -> StageResult:
        from .train_student.methods import methods

        return StageResult(summary={"methods": methods.describe()})

    def report(self, summary: Mapping[str, Any]) -> str:
        return _table(summary["methods"])


@dataclass(frozen=True, kw_only=True)
class ListStudents(Stage):
    """The students that `--student` knows besides any checkpoint."""

    command: ClassVar[str] = "students"
    summary_line: ClassVar[str] = "List the student architectures."

    def run(self, context: StageContext) -> StageResult:
        from .train_student.students import students

        return StageResult(summary={"students": students.describe()})

    def report(self, summary: Mapping[str, Any]) -> str:
        return _table(summary["students"])


@dataclass(frozen=True, kw_only=True)
class ListSignals(Stage):
    """The teacher outputs that `--signals` knows."""

    command: ClassVar[str] = "signals"
    summary_line: ClassVar[str] = "List the teacher outputs that can be cached."

    def run(self, context: StageContext) -> StageResult:
        from ..pipeline.store.signal import ENCODINGS, SIGNALS

        signals = [
            {"name": name, "summary": kind.about, "axis": kind.axis, "per_layer": kind.per_layer, "dtype": kind.dtype}
            for name, kind in SIGNALS.items()
        ]
        encodings = [{"name": name, "error": encoding.error} for name, encoding in ENCODINGS.items()]
        return StageResult(summary={"signals": signals, "encodings": encodings})

    def report(self, summary: Mapping[str, Any]) -> str:
        rows = [
            {
                "name": signal["name"] + ("@LAYERS" if signal["per_layer"] else ""),
                "summary": f"{signal['summary']}; per {signal['axis']}, {signal['dtype']}",
            }
            for signal in summary["signals"]
        ]
        encodings = [
            {"name": encoding["name"], "summary": f"largest error: {encoding['error']}"}
            for encoding in summary["encodings"]
        ]
        return (
            _table(rows)
            + "\n\nLAYERS: 6, 4+6, 1-12, all, last; 0 is the embedding output"
            + "\n\nEach may be followed by :ENCODING, x being the teacher's number:\n"
            + _table(encodings)
        )


@dataclass(frozen=True, kw_only=True)
class ShowFingerprint(Stage):
    """The fingerprint of a finished artifact: for batch scripts that name things after what made them."""

    command: ClassVar[str] = "fingerprint"
    summary_line: ClassVar[str] = "Print the fingerprint of a finished artifact."

    path: str = option(help="A folder with a manifest.json.", positional=True, metavar="PATH")
    short: bool = option(False, help="Its first 8 digits only.")

    def run(self, context: StageContext) -> StageResult:
        artifact = open_artifact(self.path)
        return StageResult(
            summary={
                "path": self.path,
                "kind": artifact.kind,
                "fingerprint": artifact.fingerprint,
                "short_fingerprint": artifact.fingerprint[:8],
            }
        )

    def report(self, summary: Mapping[str, Any]) -> str:
        return str(summary["short_fingerprint" if self.short else "fingerprint"])
