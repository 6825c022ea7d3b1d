"""Follows docs/how-to/add-a-method.md to the letter, in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "add-a-method.md"
COPIED = ("pipeline", "stages", "tests", "workflows", "__init__.py", "__main__.py", "cli.py", "pyproject.toml")


def blocks() -> list[tuple[str, str, str]]:
    """(kind, path, text) of every block that names a file, in order."""
    found = re.findall(r"^```(\w+) (\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [(kind, path, text) for kind, path, text in found]


def copy_of_the_project(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.parquet", "runs"))
        else:
            shutil.copy(source, folder / name)
    (folder / ".links").mkdir()
    (folder / ".links" / "kd").symlink_to(folder)
    return folder


def follow(project: Path) -> None:
    """Do what the blocks say: new files are written, known ones get the text at their end, diffs their line."""
    for kind, path, text in blocks():
        file = project / path
        if kind == "diff":
            known, new = (line[1:] for line in text.splitlines())
            content = file.read_text(encoding="utf-8")
            assert content.count(f"{known}\n") == 1, f"{path} has no line {known!r} of its own"
            file.write_text(content.replace(f"{known}\n", f"{known}\n{new}\n"), encoding="utf-8")
        elif file.exists():
            file.write_text(file.read_text(encoding="utf-8") + "\n\n" + text, encoding="utf-8")
        else:
            file.write_text(text, encoding="utf-8")


COMMANDS = """
from kd.cli import main
assert main(["methods"]) == 0
print("---")
assert main(["run", "workflows/methods/token-similarity.yaml", "--dry-run"]) == 0
"""


def run(project: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(project / ".links"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *words], cwd=project, env=environment, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.slow
def test_a_method_added_as_the_page_says_is_listed_tested_and_has_a_recipe(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path)
    follow(project)
    tests = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/stages/train_student/methods",
        "-k",
        "token-similarity",
    ]
    passed = re.search(r"(\d+) passed", run(project, *tests))
    assert passed is not None and int(passed[1]) >= 9, "fewer tests than the page promises"
    listed, steps = run(project, "-c", COMMANDS).split("---")
    assert "token-similarity  Match the cosines" in listed
    assert "token-similarity" in steps
    run(project, "-m", "ruff", "check", "stages/train_student/methods", "tests/stages/train_student/methods")


def test_the_page_has_one_file_one_line_one_test_and_one_recipe() -> None:
    assert [(kind, path.partition("/")[0]) for kind, path, _ in blocks()] == [
        ("python", "stages"),
        ("diff", "stages"),
        ("python", "tests"),
        ("diff", "tests"),
        ("yaml", "workflows"),
    ]
