"""What the fault harnesses found, printed at the end: one table and one line of JSON for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

FIGURES: dict[str, Mapping[str, Any]] = {}


@pytest.fixture
def figures() -> Callable[..., None]:
    """`figures(name, kills=500, seconds=81.2, ...)`: what a harness did, for the end of the session."""

    def keep(name: str, **found: Any) -> None:
        FIGURES[name] = found

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, found in FIGURES.items():
        terminalreporter.section(name, sep="-")
        width = max(map(len, found))
        for key, value in found.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
            terminalreporter.write_line(f"{key.replace('_', ' '):<{width}}  {shown}")
        terminalreporter.write_line(json.dumps({"faults": name, **found}))
