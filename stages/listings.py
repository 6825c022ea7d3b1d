"""What there is: methods, students and signals by name, and the fingerprint of an artifact."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..pipeline.artifact import open_artifact
from ..pipeline.errors import RefusedError, UsageError
from ..pipeline.stage import Stage, StageContext, StageResult, option

if TYPE_CHECKING:
    from ..pipeline.store.signal import Axis, SignalKind
    from .cache_teacher.teacher import Teacher


USUAL_SHARE = 0.15
"""Of tokens that are masked, for examples of sizes."""


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
        for name, preset in entry.get("presets", {}).items():
            values = "  ".join(f"{option}={value}" for option, value in preset["options"].items())
            if values:
                lines.append(f"{'':<{width}}  preset={name}: {values} ({preset['source']})")
                lines.append(f"{'':<{width}}    with {preset['beside']}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class ListMethods(Stage):
    """The distillation methods that `--method` knows, and what each asks for, given a teacher and a length."""

    command: ClassVar[str] = "methods"

    teacher: str | None = option(
        None, help="Folder of the teacher that signals and bytes are for; BERT-base by default.", metavar="TEACHER"
    )
    length: int = option(128, help="Tokens of an example.")
    student_layers: int | None = option(None, help="Layers of the student; half the teacher's by default.")

    def run(self, context: StageContext) -> StageResult:
        from .train_student.method_facts import BERT_BASE, method_facts

        config = BERT_BASE if self.teacher is None else _teacher_config(self.teacher)
        facts = method_facts(config, length=self.length, student_layers=self.student_layers)
        return StageResult(summary={"methods": facts, "length": self.length, "teacher": self.teacher})

    def report(self, summary: Mapping[str, Any]) -> str:
        entries = summary["methods"]
        width = max(len(entry["name"]) for entry in entries)
        lines = []
        for entry in entries:
            lines.append(f"{entry['name']:<{width}}  {entry['summary']} ({entry['source']})")
            options = "  ".join(f"{name}={value}" for name, value in entry["options"].items())
            stored = f"{entry['signals'] or 'none'}, {_count(entry['bytes_per_example'])} bytes"
            least = ""
            if entry["smallest_bytes"] != entry["bytes_per_example"]:
                beside = f" with sidecars {','.join(entry['sidecars'])}" if entry["sidecars"] else ""
                least = f"{entry['smallest'] or 'none'}{beside}, {_count(entry['smallest_bytes'])} bytes"
            facts = {"options": options, "signals": stored, "least": least, "student": entry["students"]}
            for name, text in facts.items():
                if text:
                    lines.append(f"{'':<{width}}  {name}: {text}")
        of = summary["teacher"] or "BERT-base"
        return "\n".join(
            [
                *lines,
                f"\nbytes: per example of {summary['length']} tokens, teacher {of}",
                "least: what cache-teacher --for stores where the signals follow from it; sidecars once per teacher",
            ]
        )


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _teacher_config(folder: str) -> dict[str, Any]:
    """Fields of a teacher's config.json that facts about methods need, by the names that BERT's have."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(Path(folder).expanduser(), local_files_only=True, trust_remote_code=False)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_labels")
        return {name: int(getattr(config, name)) for name in names}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RefusedError(
            f"--teacher {folder} has no config.json of an encoder: {str(error).splitlines()[0]}",
            fix="name the folder of a checkpoint, or leave --teacher out for BERT-base",
        ) from None


@dataclass(frozen=True, kw_only=True)
class ListStudents(Stage):
    """The students that `--student` knows besides any checkpoint."""

    command: ClassVar[str] = "students"

    def run(self, context: StageContext) -> StageResult:
        from .train_student.method_facts import methods_of, student_forms
        from .train_student.students import students

        fits = [
            {"name": name, "student": text, "methods": methods_of(shapes)}
            for name, (text, shapes) in student_forms().items()
        ]
        return StageResult(summary={"students": students.describe(), "fits": fits})

    def report(self, summary: Mapping[str, Any]) -> str:
        lines = [_table(summary["students"]), "\nMethods, for a teacher like BERT-base:"]
        for fit in summary["fits"]:
            found = fit["methods"]
            lesser = [f"{name}:{options}" for name, options in found.items() if options]
            lines.append(f"{fit['student']}")
            for what, listed in (
                ("as they are", [name for name, options in found.items() if options == ""]),
                ("in part", lesser),
                ("not", [name for name, options in found.items() if options is None]),
            ):
                if listed:
                    lines.append(f"  {what}: {', '.join(listed)}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class ListSignals(Stage):
    """The teacher outputs that `--signals` knows: what they are, what they cost, and what they follow from."""

    command: ClassVar[str] = "signals"

    teacher: str | None = option(None, help="Whose sizes to count with: a folder or hub id.", metavar="PATH|ID")
    trust_remote_code: bool = option(False, help="Run Python code that comes with the checkpoint.")
    length: int = option(128, help="Tokens of the example that bytes are counted for.", metavar="TOKENS")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UsageError(f"--length {self.length}: an example has at least one token")

    def run(self, context: StageContext) -> StageResult:
        from ..pipeline.store.signal import ENCODINGS, SIGNALS

        teacher = self._described()
        signals = [
            {
                "name": name,
                "summary": kind.about,
                "axis": kind.axis,
                "shape": _shape(kind),
                "per_layer": kind.per_layer,
                "dtype": kind.dtype,
                **_origin(name),
                "needs": NEEDS[name],
                **({} if teacher is None else self._sizes(teacher, name)),
            }
            for name, kind in SIGNALS.items()
        ]
        encodings = [{"name": name, "error": encoding.error} for name, encoding in ENCODINGS.items()]
        summary: dict[str, Any] = {"signals": signals, "encodings": encodings}
        if teacher is not None:
            summary |= {"teacher": self.teacher, "length": self.length, "sidecars": _sidecars(teacher)}
        return StageResult(summary=summary)

    def _described(self) -> Teacher | None:
        from .cache_teacher.teacher import describe_teacher

        if self.teacher is None:
            return None
        teacher = describe_teacher(self.teacher, trust_remote_code=self.trust_remote_code)
        if not teacher.is_masked_lm:
            return teacher
        return teacher.masked(share=USUAL_SHARE, seed=0, max_length=self.length)

    def _sizes(self, teacher: Teacher, name: str) -> dict[str, Any]:
        """Bytes of one example: of a layer, and of all; none of what the teacher does not give."""
        from ..pipeline.store.signal import SIGNALS, Signal

        kind, sizes = SIGNALS[name], teacher.sizes
        layers = teacher.num_layers + 1 - kind.first_layer if kind.per_layer else 1
        other_head = name in ("logits", "logits.tok") and teacher.tags_tokens != (name == "logits.tok")
        if other_head or 0 in sizes.shape(signal := Signal(name, teacher.num_layers if kind.per_layer else None)):
            return {"layers": 0, "bytes": None, "bytes_all_layers": None}
        entries: dict[Axis, int] = {"example": 1, "token": self.length, "pair": self.length**2}
        one = sizes.of(signal, entries)
        return {"layers": layers, "bytes": one, "bytes_all_layers": one * layers}

    def report(self, summary: Mapping[str, Any]) -> str:
        rows = []
        for signal in summary["signals"]:
            rows.append(
                {
                    "name": signal["name"] + ("@LAYERS" if signal["per_layer"] else ""),
                    "summary": f"{signal['summary']}; {signal['shape']} {signal['dtype']}" + _cost(signal),
                }
            )
            origin = f"follows from {signal['follows_from']}" if signal["follows_from"] else "follows from nothing else"
            rows.append({"name": "", "summary": "; ".join(filter(None, (origin, signal["needs"])))})
        encodings = [
            {"name": encoding["name"], "summary": f"largest error: {encoding['error']}"}
            for encoding in summary["encodings"]
        ]
        parts = [
            _table(rows),
            "LAYERS: 6, 4+6, 1-12, all, last; 0 is the embedding output, attention is in 1 and above",
            "Each may be followed by :ENCODING, x being the teacher's number:\n" + _table(encodings),
        ]
        if "teacher" in summary:
            parts.insert(0, f"{summary['teacher']}, one example of {summary['length']} tokens")
            sidecars = [{"name": name, "summary": f"{count:,} B"} for name, count in summary["sidecars"].items()]
            parts.append("Sidecars, once per teacher:\n" + _table(sidecars))
        return "\n\n".join(parts)


NEEDS: Mapping[str, str] = {
    "logits": "needs a teacher with a classification head",
    "logits.tok": "needs a token classifier; --signals logits asks such a teacher for it",
    "hidden.cls": "",
    "hidden.mean": "",
    "hidden.tok": "needs a student that reads the teacher's tokens",
    "attention.qkv": "needs one query, key and value map per layer, and a student that reads the teacher's tokens",
    "attention.score": "as attention.qkv; refused where positions are relative or rotary",
    "mlm.hidden": "needs a masked-LM teacher and --mask-share",
    "mlm.logits": "as mlm.hidden; asked for as mlm.logits it is kept as that with the head, where it follows",
}
"""What a teacher and a student must be like for each signal."""


def _shape(kind: SignalKind) -> str:
    """Of one example, by the names of its dimensions; n tokens."""
    axis = {"example": [], "token": ["n"], "pair": ["n", "n"]}[kind.axis]
    return f"[{', '.join([*axis, *kind.dims])}]"


def _origin(name: str) -> dict[str, Any]:
    """What a signal follows from, in words, and by which sidecar: as the lattice has it for layer 2 of 2, and for 0."""
    from ..pipeline.store.lattice import route_to
    from ..pipeline.store.signal import SIGNALS, Signal

    kind = SIGNALS[name]
    layer = None if not kind.per_layer else 2
    words = {None: "", 2: " of its layer", 1: " of the layer below"}
    route = route_to(Signal(name, layer), 2)
    where = ""
    if route is None and kind.first_layer == 0:
        route, where = route_to(Signal(name, 0), 2), " (layer 0 only)"
    if route is None:
        return {"follows_from": None, "sidecar": None}
    sidecar = None if route.sidecar is None else route.sidecar.replace("@2", "@LAYER")
    if not kind.per_layer:
        words[2] = " of the last layer"
    sources = [f"{source.name}{words.get(source.layer, '')}" for source in route.sources]
    text = " and ".join(sources) + (f" with sidecar {sidecar}" if sidecar else "") + where
    return {"follows_from": text, "sidecar": sidecar}


def _cost(signal: Mapping[str, Any]) -> str:
    if "bytes" not in signal:
        return ""
    if signal["bytes"] is None:
        return "; not of this teacher"
    one = f"; {signal['bytes']:,} B"
    return one + (f" a layer, {signal['bytes_all_layers']:,} B for {signal['layers']}" if signal["per_layer"] else "")


def _sidecars(teacher: Teacher) -> dict[str, int]:
    from .cache_teacher.sidecars import SIDECARS, sidecar_bytes

    found = sidecar_bytes(teacher, tuple(SIDECARS))
    with contextlib.suppress(RefusedError):
        found |= {"attn_in@LAYER": sidecar_bytes(teacher, ("attn_in@1",))["attn_in@1"]}
    return found


@dataclass(frozen=True, kw_only=True)
class ShowFingerprint(Stage):
    """The fingerprint of a finished artifact: for batch scripts that name things after what made them."""

    command: ClassVar[str] = "fingerprint"

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
