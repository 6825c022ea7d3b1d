"""Writes the pages that are made from the code: `cli.md` and `methods.md`. `make docs` runs it; a test compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.cli import ARTIFACT_OPTIONS, COMMON_OPTIONS, EXIT_CODES, SUMMARY
from kd.pipeline.config import StageField, stage_fields
from kd.pipeline.stage import StageContext
from kd.stages import COMMANDS, stage_class
from kd.stages.listings import ListMethods, ListSignals, ListStudents

FOLDER = Path(__file__).parent

INTRODUCTION = f"""\
# Command line

<!-- Made by docs/generate.py from the stages themselves: edit those, then `make docs`. -->

{SUMMARY}

Results are on stdout; progress, estimates and warnings on stderr: bars on a terminal, JSON lines elsewhere
(`KD_PROGRESS=bars` or `json` chooses; `KD_PROGRESS_INTERVAL`: least seconds between two lines of a task, 5).

**Where a value comes from.** An option on the command line, else the environment (only the options that have a variable
below: they change how a command runs, never its result), else the file given with `--config`, else the default. A
configuration file is YAML or JSON with the options' names, `learning_rate: 1e-3`; unknown names are errors.
`--print-config` prints such a file.

**Doing it again.** A command whose result is there already does nothing and says so. A result made with other settings
is never mixed with or replaced silently: the command is refused and shows the fields that differ, unless
`--overwrite` is given. An interrupted command is started again in the same words and goes on.

**Lists** take commas or the option several times.
"""


METHODS_INTRODUCTION = """\
# Methods, students, signals

<!-- Made by docs/generate.py from the code: edit the docstrings there, then `make docs`. -->

A **method** is a named loss. `--method` takes several with weights, and options after a colon:
`soft-target:0.9:temperature=4,hard:0.1`. The loss that is minimised is the weighted sum; each term is logged under its
name. Before anything loads, the signals that the methods need are compared with what the view holds; what is missing is
named together with the command that captures it.

**Reductions.** Unless an option says otherwise a loss is a mean over examples of a value that depends on nothing else
in the batch: padding, order and grouping into batches change nothing. Soft targets are multiplied by temperature
squared.

**Hard labels** enter only through `hard`, and only on rows that have a gold label; augmented text carries none.

**Projections** (maps between a student's width and the teacher's) are trained with the student, live in its
checkpoints, and are not part of the exported student.

**Layers** count from 0, the embedding output. A layer map pairs student-teacher: `layer_map=1-2+2-4`; `skip` (or
`uniform`) spreads the student's layers evenly over the teacher's, `last` takes the teacher's top ones, `middle` and
`final` are one pair each. `ckd` and `alp-kd` take groups, `1-1.2.3+2-4.5.6`.

**Students** that a method with its default options is not for are refused before training, with the methods that are.
Widths may differ everywhere: a projection is trained, or none is needed.

**TextBrewer users** can name a YAML file of `intermediate_matches` instead, `--method matches.yaml` (keys `layer_T`,
`layer_S`, `feature`, `loss`, `weight`, `proj`); each entry becomes a method below, or is refused with the reason.

Adding a method: [how-to/add-a-method.md](how-to/add-a-method.md).
"""

STORED = """\
Signals as `--signals` takes them, for a teacher like BERT-base (12 layers, 768 wide, 12 heads, 2 labels) and a student
of half its layers, options at their defaults; bytes of an example of 25 and of 128 tokens when they are stored as they
are, and the least that they follow from: what `kd cache-teacher --for METHOD` stores of a large corpus of such texts
where it finds that they do (layers that normalise last, absolute positions; sidecars come once per teacher).
`kd methods --teacher TEACHER --length N --student-layers M` says it of yours, and what that least is.
"""


def pages() -> dict[Path, str]:
    """Every page that is made from the code, with its text."""
    return {FOLDER / "cli.md": cli_page(), FOLDER / "methods.md": methods_page()}


def methods_page() -> str:
    """The text of `docs/methods.md`."""
    context = StageContext()
    methods, short = (ListMethods(length=length).run(context).summary["methods"] for length in (128, 25))
    listed = ListStudents().run(context).summary
    students = listed["students"]
    signals = ListSignals().run(context).summary["signals"]
    rows = [
        f"| `{signal['name']}{'@LAYERS' if signal['per_layer'] else ''}` | {_cell(signal['summary'])} | "
        f"`{signal['shape']}` | {signal['dtype']} | {_cell(signal['follows_from'] or '')} | {_cell(signal['needs'])} |"
        for signal in signals
    ]
    signal_table = "\n".join(
        [
            "| signal | what it is | of one example | stored as | follows from | needs |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    parts = [METHODS_INTRODUCTION, "## Methods\n", STORED, _needs(short, methods)]
    parts += [_section(method) for method in methods]
    parts += ["## Students\n", _entries(students), _fits(listed["fits"])]
    return "\n".join([*parts, "## Signals\n", signal_table]).rstrip("\n") + "\n"


def _needs(short: list[dict[str, Any]], long: list[dict[str, Any]]) -> str:
    rows = [
        f"| [`{entry['name']}`](#{entry['name']}) | {_code(entry['signals'])} | {few['bytes_per_example']:,} | "
        f"{entry['bytes_per_example']:,} | {few['smallest_bytes']:,} | {entry['smallest_bytes']:,} | "
        f"{_code(entry['reads'])} | {entry['students']} |"
        for few, entry in zip(short, long, strict=True)
    ]
    columns = ("name", "signals", "bytes, 25 tokens", "bytes, 128", "least, 25", "least, 128")
    head = f"| {' | '.join(columns)} | student outputs | a student must have |"
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---|---|", *rows, ""])


PRESETS = """\
A preset is what others trained such a student with. Options written beside it count instead
(`bilstm:preset=tang:hidden_size=300`), as do those of the command (`--learning-rate 5e-4`); start and methods are the
command's. [training.md](training.md#a-bilstm-as-others-trained-it) says what kd does in its own way.
"""


FITS = """\
Which method is for which student, beside a teacher like BERT-base. Where widths differ a linear map is trained; a BERT
with other heads than its teacher stands as `mobilebert` does. The BiLSTM has two layers: `pkd` and `rail-kd` leave the
last one out. A cell with options is what is left of the method: without attention, or with relations of outputs in
place of values.
"""


def _fits(fits: list[dict[str, Any]]) -> str:
    def cell(options: str | None) -> str:
        return "no" if options is None else f"`{options}`" if options else "yes"

    head = f"| method | {' | '.join(fit['name'] for fit in fits)} |"
    rows = [
        f"| [`{name}`](#{name}) | {' | '.join(cell(fit['methods'][name]) for fit in fits)} |"
        for name in fits[0]["methods"]
    ]
    return "\n".join([FITS, head, "|---|" + "---|" * len(fits), *rows, ""])


def _code(text: str) -> str:
    return f"`{text.replace(',', ', ')}`" if text else "none"


def _section(entry: dict[str, Any]) -> str:
    options = ", ".join(f"`{name}={value}`" for name, value in entry["options"].items())
    return "\n".join(
        [
            f"### {entry['name']}\n",
            f"{entry['summary']} {entry['source']}.\n",
            f"{entry['about']}\n",
            *([f"Defaults: {options}\n"] if options else []),
        ]
    )


def _entries(entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        options = "<br>".join(f"`{name}={value}`" for name, value in entry.get("options", {}).items())
        rows.append(f"| `{entry['name']}` | {_cell(entry['summary'])} | {options} | {_cell(entry.get('source', ''))} |")
    rows.append("")
    presets = [
        f"| `{entry['name']}:preset={name}` | {_pairs(preset['options'])} | {_pairs(preset['training'])} | "
        f"{_cell(preset['beside'])} | {_cell(preset['source'])} |"
        for entry in entries
        for name, preset in entry.get("presets", {}).items()
        if preset["options"]
    ]
    return "\n".join(
        [
            *("| name | what it does | options and defaults | source |", "|---|---|---|---|", *rows, PRESETS),
            *("| student | options | training | with | source |", "|---|---|---|---|---|", *presets, ""),
        ]
    )


def _pairs(values: dict[str, Any]) -> str:
    return "<br>".join(f"`{name}={value}`" for name, value in values.items())


def cli_page() -> str:
    """The text of `docs/cli.md`."""
    parts = [INTRODUCTION, "## Commands\n", _commands(), "## Common options\n", _common(), "## Exit codes\n", _codes()]
    for command in COMMANDS:
        parts += [f"## kd {command}\n", _command(command)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _commands() -> str:
    rows = []
    for command in COMMANDS:
        anchor = f"kd {command}".replace(" ", "-")
        rows.append(f"| [`kd {command}`](#{anchor}) | {COMMANDS[command][1]} |")
    return "\n".join(["| command | |", "|---|---|", *rows, ""])


def _common() -> str:
    rows = []
    for name, value, text, variable in (*COMMON_OPTIONS, *ARTIFACT_OPTIONS):
        only = " Commands that make something." if (name, value, text, variable) in ARTIFACT_OPTIONS else ""
        flag = f"--{name.replace('_', '-')} {value}".strip()
        rows.append(f"| `{flag}` | {_cell(text)}{only}{_variable(variable)} |")
    seed = "Seed of what is random; accepted by every command, and told where it changes nothing."
    rows.insert(len(COMMON_OPTIONS), f"| `--seed INT` | {seed} |")
    return "\n".join(["| option | |", "|---|---|", *rows, ""])


def _codes() -> str:
    rows = [f"| {code} | {text} |" for code, text in EXIT_CODES.items()]
    return "\n".join(["| code | |", "|---|---|", *rows, ""])


def _command(command: str) -> str:
    stage = stage_class(command)
    fields = stage_fields(stage)
    positional = [field for field in fields if field.positional]
    words = [*(_use(field) for field in positional), *(_use(field) for field in fields if field.required)]
    usage = " ".join(["kd", command, *dict.fromkeys(words), "[OPTIONS]"])
    parts = [f"{COMMANDS[command][1]}\n", f"    {usage}\n"]
    for panel in dict.fromkeys(field.panel for field in fields):
        rows = [_row(field) for field in fields if field.panel == panel]
        head = [f"| {panel or 'option'} | |", "|---|---|"]
        parts.append("\n".join([*head, *rows, ""]))
    if stage.kind is not None:
        parts.append(f"Makes a {stage.kind}. Interrupted: {stage.on_interrupt}.\n")
    return "\n".join(parts)


def _use(field: StageField) -> str:
    if field.positional:
        return field.value_name + ("..." if field.many else "")
    return f"{field.flag} {field.value_name}"


def _row(field: StageField) -> str:
    spelled = _use(field).strip()
    if field.base is bool and not field.many:
        spelled = f"{field.flag}`, `--no-{field.flag[2:]}"
    notes = " **Required.**" if field.required else f" Default: `{field.shown_default}`." if field.shown_default else ""
    return f"| `{_cell(spelled)}` | {_cell(field.help)}{notes}{_variable(field.env)} |"


def _variable(name: str | None) -> str:
    return f" Environment: `{name}`." if name else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
