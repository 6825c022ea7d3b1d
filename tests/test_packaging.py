"""The list of packages in pyproject.toml is written by hand; it must be the list on disk."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_on_disk_is_listed_and_no_other() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {"kd"} | {
        ".".join(["kd", *file.parent.relative_to(ROOT).parts])
        for top in ("pipeline", "stages")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert listed == on_disk


def test_every_folder_with_modules_is_a_package() -> None:
    for top in ("pipeline", "stages"):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file
