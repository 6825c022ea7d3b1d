"""The command line: parse, build a stage, run it, print. Every command is generated from its stage's fields."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .pipeline.artifact import json_ready
from .pipeline.config import StageField, build_stage, parse_values, read_config, stage_fields
from .pipeline.errors import KdError, RefusedError, UsageError, near_match
from .pipeline.progress import duration, mute_libraries, open_progress, size
from .pipeline.ranks import launched
from .pipeline.stage import Outcome, Stage, StageContext, execute
from .pipeline.threads import keep_to_quota
from .stages import COMMANDS, stage_class

SUMMARY = "Run a teacher once, keep what it said, and train any number of students from that."
GROUPS = {"store": "Look at a teacher store, check it, and keep it in order."}
EXIT_CODES = {
    0: "done",
    1: "anything unforeseen",
    2: "usage: the command line or a configuration is malformed",
    3: "refused: identity, budget or bad data",
    4: "verification failed",
    5: "incomplete: some shards or steps failed, the rest is kept",
    130: "interrupted",
}
COMMON = "Common"
COMMON_OPTIONS: tuple[tuple[str, str, str, str | None], ...] = (
    # name, value's name ("" for a switch), help, environment variable
    ("config", "FILE", "Read options from this YAML or JSON file; options given here override it.", None),
    ("print_config", "", "Print every option as it would be used, as YAML for --config, and do nothing.", None),
    ("json", "", "Print the result, or the error, as one JSON object on stdout.", "KD_JSON"),
    ("quiet", "", "Warnings and errors only on stderr.", "KD_QUIET"),
    ("verbose", "", "Also what the libraries underneath say, and tracebacks.", "KD_VERBOSE"),
)
SEED_OPTION = ("seed", "INT", "Accepted everywhere; this command has no randomness.", None)
ARTIFACT_OPTIONS: tuple[tuple[str, str, str, str | None], ...] = (
    ("overwrite", "", "Replace what stands in --output-dir, once the new result is complete.", None),
    ("overwrite_changed", "", "Replace it only if other settings or inputs made it.", None),
)


_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""What a system says of a path that this user, or nobody, can read or write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kd` with `argv` (without the program's name; those of the process by default); the exit code."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    os.environ.update(keep_to_quota())
    as_json, verbose = _asked(words, "--json"), _asked(words, "--verbose")
    try:
        code = typer.main.get_command(app()).main(args=words or ["--help"], prog_name="kd", standalone_mode=False)
        return int(code or 0) if words else 2
    except KdError as error:
        return _fail(error.to_json(), error.exit_code, as_json)
    except typer.TyperException as error:
        return _fail(_parser_error(error, words).to_json(), UsageError.exit_code, as_json)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename is not None:
            refused = RefusedError(
                f"{error.filename} cannot be used: {os.strerror(error.errno)}",
                fix="see to its permissions, or give another place",
            )
            return _fail(refused.to_json(), refused.exit_code, as_json)
        if verbose or os.environ.get("KD_TRACEBACK"):
            import traceback

            traceback.print_exc(file=sys.stderr)
        what = f"unexpected {type(error).__name__}: {error}".rstrip(": ")
        fix = None if verbose else "run it again with --verbose to see where it happened"
        return _fail({"type": type(error).__name__, "what": what, "details": [], "fix": fix}, 1, as_json)


def _asked(words: Sequence[str], flag: str) -> bool:
    # An error may come before the options are parsed, and has to be printed as asked all the same.
    options = words[: words.index("--")] if "--" in words else words
    variable = "KD_" + flag.lstrip("-").upper()
    return flag in options or os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _parser_error(error: typer.TyperException, words: Sequence[str]) -> UsageError:
    """What the parser refuses (an unknown option, an option without its value), in kd's words."""
    message = error.format_message().rstrip(".")
    named = next((" ".join(words[:length]) for length in (2, 1) if " ".join(words[:length]) in COMMANDS), "")
    command = f"kd {named}".strip()
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if option is not None and context is not None and message.startswith("No such option"):
        known = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        message = f"{command} has no option {option}{_near_option(option, known)}"
    return UsageError(message, fix=f"see {command} --help")


def _near_option(option: str, known: Sequence[str]) -> str:
    hint = near_match(option, known)
    # A list of fifty options is no help; --help is.
    return hint if "did you mean" in hint else ""


def _fail(error: Mapping[str, Any], code: int, as_json: bool, **result: Any) -> int:
    rank, _ = launched()
    if as_json and not rank:
        _print_json({**result, "error": {**error, "exit_code": code}})
        return code
    lines = [f"error: {error['what']}", *(f"  {line}" for line in error["details"])]
    if error["fix"]:
        lines.append(f"  fix: {error['fix']}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    if rank:
        # The first process to fail ends the others: rank 0, which mostly meets the same, shall have said so by then.
        time.sleep(1)
    return code


def _print_json(value: Mapping[str, Any]) -> None:
    _print(json.dumps(json_ready(value), ensure_ascii=False, allow_nan=False))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read stdout has gone (`kd methods | head`): nothing is left to say, nor to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Commands(TyperGroup):
    """A group that imports the stage of a command when that command is asked for."""

    path: tuple[str, ...] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        return command_names(self.path)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # What the list in `kd --help` shows of it: importing the stages and making all options would triple the time.
        command = " ".join((*self.path, cmd_name))
        if cmd_name not in command_names(self.path):
            return None
        line = COMMANDS[command][1] if command in COMMANDS else GROUPS[command]
        return TyperCommand(cmd_name, help=_escaped(line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names = command_names(self.path)
        if args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        if args[0] not in names:
            raise UsageError(
                f"{ctx.command_path} has no command {args[0]!r}{near_match(args[0], names)}",
                fix=f"see {ctx.command_path} --help",
            )
        command = typer.main.get_command(app((*self.path, args[0])))
        command.name = args[0]
        return args[0], command, args[1:]

    def invoke(self, ctx: Any) -> Any:
        if not ctx._protected_args:
            raise UsageError(f"{ctx.command_path} needs a command{near_match('', command_names(self.path))}")
        return super().invoke(ctx)


def command_names(path: tuple[str, ...] = ()) -> list[str]:
    """The words that may follow `path`, in the order of `COMMANDS`."""
    commands = [tuple(command.split()) for command in COMMANDS]
    return [*dict.fromkeys(words[len(path)] for words in commands if words[: len(path)] == path)]


def app(path: tuple[str, ...] = ()) -> typer.Typer:
    """The Typer app of a command or a group of commands; of all of `kd` without a path."""
    command = " ".join(path)
    made = typer.Typer(add_completion=not path, rich_markup_mode="rich", pretty_exceptions_enable=False)
    if command in COMMANDS:
        stage = stage_class(command)
        made.command(name=path[-1], help=_escaped(COMMANDS[command][1]))(_callback(stage))
        return made
    group = type("_Group", (_Commands,), {"path": path})
    if path:
        made.callback(cls=group, help=GROUPS[command])(lambda: None)
        return made

    def version(value: bool) -> None:
        if value:
            from importlib.metadata import version as version_of

            print(f"kd {version_of('kd-pipeline')}")
            raise typer.Exit

    def root(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=version, help="Print the version."),
    ) -> None:
        pass

    codes = ", ".join(f"{code} {text.split(':')[0]}" for code, text in EXIT_CODES.items())
    # The annotations are texts here (`from __future__`), and Typer resolves them in this module.
    made.callback(cls=group, help=SUMMARY, epilog=f"Exit codes: {codes}.")(root)
    return made


def _callback(stage: type[Stage]) -> Callable[..., None]:
    def callback(**values: Any) -> None:
        _run(stage, values)

    parameters = [_parameter(field) for field in stage_fields(stage)]
    parameters += [_common_parameter(*common) for common in common_options(stage)]
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return callback


def common_options(stage: type[Stage]) -> tuple[tuple[str, str, str, str | None], ...]:
    """The options that a command has besides its stage's fields."""
    names = {field.name for field in stage_fields(stage)}
    options = (*COMMON_OPTIONS, *(() if "seed" in names else (SEED_OPTION,)), *(ARTIFACT_OPTIONS if stage.kind else ()))
    clashes = names & {name for name, *_ in options}
    assert not clashes, f"{stage.__name__}: fields called like common options: {clashes}"
    return options


def _parameter(field: StageField) -> inspect.Parameter:
    notes = "[required]" if field.required else f"[default: {field.shown_default}]" if field.shown_default else ""
    shown: dict[str, Any] = {
        "help": _escaped(field.help) + (f" [dim]{_escaped(notes)}[/dim]" if notes else ""),
        "rich_help_panel": field.panel,
        "show_default": False,
        "metavar": field.value_name,
        "envvar": field.env,
        "show_envvar": False,
    }
    # Nothing is required and nothing has a default here, so that a configuration file may give it.
    if field.positional:
        default = typer.Argument(None, **shown)
        return _keyword(field.name, default, (list[str] | None) if field.many else (str | None))
    if field.base is bool and not field.many:
        shown["metavar"] = ""
        return _keyword(field.name, typer.Option(None, f"{field.flag}/--no-{field.flag[2:]}", **shown), bool | None)
    return _keyword(
        field.name, typer.Option(None, field.flag, **shown), (list[str] | None) if field.many else (str | None)
    )


def _common_parameter(name: str, metavar: str, help: str, env: str | None) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    shown: dict[str, Any] = {
        "help": help,
        "rich_help_panel": COMMON,
        "show_default": False,
        "envvar": env,
        "show_envvar": False,
    }
    if metavar:
        return _keyword(name, typer.Option(None, flag, metavar=metavar, **shown), str | None)
    return _keyword(name, typer.Option(False, flag, metavar="", **shown), bool)


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _escaped(text: str) -> str:
    """`text` for a help page that reads [brackets] as markup."""
    return text.replace("[", "\\[")


def _run(stage_type: type[Stage], given: dict[str, Any]) -> None:
    common = {name: given.pop(name) for name, *_ in common_options(stage_type)}
    fields = {field.name: field for field in stage_fields(stage_type)}
    flags = {name: _split(fields[name], value) for name, value in given.items() if value is not None}
    values = read_config(stage_type, common["config"]) if common["config"] else {}
    values |= parse_values(stage_type, flags, named=lambda name: fields[name].shown)
    if common["print_config"]:
        _print_config(stage_type, values, as_json=common["json"])
        return
    if not common["verbose"]:
        mute_libraries()
    stage = build_stage(stage_type, values)
    with open_progress(quiet=common["quiet"]) as progress:
        if common.get("seed") is not None:
            progress.warn(f"kd {stage.command} has no randomness: --seed changes nothing")
        overwrite = {name: common.get(name, False) for name, *_ in ARTIFACT_OPTIONS}
        context = StageContext(progress=progress, verbose=common["verbose"], **overwrite)
        try:
            with _terminated_like_interrupted(), _stdout_kept_clean():
                outcome = execute(stage, context)
        except KeyboardInterrupt:
            note = f"{stage.command}: " + stage.on_interrupt.format_map(stage.config())
            raise typer.Exit(_interrupted(note, as_json=common["json"])) from None
    code = _print_outcome(stage, outcome, as_json=common["json"])
    if code:
        raise typer.Exit(code)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which batch queues send before they kill, does what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Asked now: training puts its own handler there, which lets a step end and saves a checkpoint.
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(number, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _split(field: StageField, value: Any) -> Any:
    if field.many and field.split and not field.positional:
        return [part.strip() for item in value for part in item.split(",") if item]
    return value


def _interrupted(note: str, *, as_json: bool) -> int:
    if as_json:
        return _fail({"type": "Interrupted", "what": note, "details": [], "fix": None}, 130, as_json=True)
    print(f"interrupted: {note}", file=sys.stderr, flush=True)
    return 130


def _print_config(stage: type[Stage], values: Mapping[str, Any], *, as_json: bool) -> None:
    from .pipeline.settings import to_yaml

    fields = stage_fields(stage)
    resolved = {
        field.name: [*value] if isinstance(value := values.get(field.name, field.default), tuple) else value
        for field in fields
        if field.name in values or not field.required
    }
    if as_json:
        _print_json(resolved)
        return
    missing = [f"# {f.name}:  (required) {f.help}\n" for f in fields if f.required and f.name not in values]
    _print(f"# kd {stage.command}\n" + "".join(missing) + to_yaml(resolved).rstrip("\n"))


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send to stderr what anything below a stage writes to stdout: Python, C and child processes alike."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _print_outcome(stage: Stage, outcome: Outcome, *, as_json: bool) -> int:
    if outcome.follows:
        return 0
    result: dict[str, Any] = {**outcome.summary}
    if stage.kind is not None:
        result |= {
            "skipped": outcome.skipped,
            "changed": outcome.changed,
            "output_dir": getattr(stage, "output_dir", None),
            "fingerprint": outcome.artifact.fingerprint if outcome.artifact else None,
        }
    if outcome.failure is not None and as_json:
        return _fail(outcome.failure.to_json(), outcome.failure.exit_code, as_json, **result)
    if as_json:
        _print_json(result)
        return 0
    _print(stage.report(outcome.summary) or _summary_text(stage, outcome))
    if outcome.failure is not None:
        return _fail(outcome.failure.to_json(), outcome.failure.exit_code, as_json)
    return 0


def _summary_text(stage: Stage, outcome: Outcome) -> str:
    state = "already done" if outcome.skipped else "done" if outcome.artifact else "nothing written"
    if outcome.failure is not None:
        state = "failed"
    place = f" → {outcome.artifact.path}" if outcome.artifact else ""
    lines = [f"{stage.command}: {state}{place}"]
    width = max((len(name) for name in outcome.summary), default=0)
    lines += [f"  {name:<{width}}  {_figure(name, value)}" for name, value in outcome.summary.items()]
    return "\n".join(lines)


def _figure(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return "  ".join(f"{key}={_figure(str(key), item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_figure(name, item) for item in value)
    if name == "seconds" or (name.endswith("_s") and not name.endswith("_per_s")):
        return duration(value)
    if name == "bytes" or name.startswith("bytes_") or name.endswith("_bytes"):
        return size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
