"""Writes the pages that are made from the code: `docs/cli.md`. `make docs` runs it; a test compares."""

from __future__ import annotations

from pathlib import Path

from kd.cli import ARTIFACT_OPTIONS, COMMON_OPTIONS, EXIT_CODES, SUMMARY
from kd.pipeline.config import StageField, stage_fields
from kd.stages import COMMANDS, stage_class

PAGE = Path(__file__).with_name("cli.md")

INTRODUCTION = f"""\
# Command line

<!-- Made by docs/generate.py from the stages themselves: edit those, then `make docs`. -->

{SUMMARY}

Results are on stdout; progress, estimates and warnings on stderr: bars on a terminal, JSON lines elsewhere.

**Where a value comes from.** An option on the command line, else the environment (only the options that have a variable
below: they change how a command runs, never its result), else the file given with `--config`, else the default. A
configuration file is YAML or JSON with the options' names, `learning_rate: 1e-3`; unknown names are errors.
`--print-config` prints such a file.

**Doing it again.** A command whose result is there already does nothing and says so. A result made with other settings
is never mixed with or replaced silently: the command is refused and shows the fields that differ, unless
`--overwrite` is given. An interrupted command is started again in the same words and goes on.

**Lists** take commas or the option several times.
"""


def page() -> str:
    """The text of `docs/cli.md`."""
    parts = [INTRODUCTION, "## Commands\n", _commands(), "## Common options\n", _common(), "## Exit codes\n", _codes()]
    for command in COMMANDS:
        parts += [f"## kd {command}\n", _command(command)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _commands() -> str:
    rows = []
    for command in COMMANDS:
        anchor = f"kd {command}".replace(" ", "-")
        rows.append(f"| [`kd {command}`](#{anchor}) | {stage_class(command).summary_line} |")
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
    parts = [f"{stage.summary_line}\n", f"    {usage}\n"]
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
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
