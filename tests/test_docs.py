"""The documentation cannot drift: pages made from the code are current, and what others quote exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from kd.cli import EXIT_CODES, common_options
from kd.pipeline.config import stage_fields
from kd.stages import COMMANDS, stage_class

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_pages_made_from_the_code_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"


def test_every_command_option_and_exit_code_has_its_place() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        section = page.split(f"\n## kd {command}\n")[1].split("\n## ")[0]
        for field in stage_fields(stage_class(command)):
            assert f"`{field.value_name}" in section if field.positional else f"`{field.flag}" in section
        for name, *_ in common_options(stage_class(command)):
            assert f"| `--{name.replace('_', '-')}" in page
    for code in EXIT_CODES:
        assert f"\n| {code} | " in page


def quoted_commands() -> list[tuple[str, str]]:
    """(page, command line) of every `kd ...` in a code block or in backticks."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
        quoted = re.findall(r"`(kd [a-z][^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in [*lines, *quoted]:
            line = line.strip().removeprefix("$ ")
            # A drawing is no command.
            if re.match(r"kd [a-z]", line) and not re.search(r"[─│└┘┐┌]", line):
                found.append((page.name, re.split(r"\s+#|\s+→|\||&&|;", line)[0]))
    return found


@pytest.mark.parametrize(("page", "line"), quoted_commands())
def test_a_command_that_a_page_shows_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line.replace("[", " ").replace("]", " ").replace("(", " ").replace(")", " "))[1:]
    command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if command == "store" and len(words) == 1:
        return
    assert command in COMMANDS, f"{page}: {line}"
    stage = stage_class(command)
    known = {field.flag for field in stage_fields(stage)}
    known |= {"--no-" + field.flag[2:] for field in stage_fields(stage) if field.base is bool}
    known |= {"--" + name.replace("_", "-") for name, *_ in common_options(stage)} | {"--help"}
    used = {word.split("=")[0].rstrip(",.") for word in words if word.startswith("--")}
    assert used <= known, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file) if file else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
