"""Ways in processes of their own take turns of a few steps, and go on where they stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # for the processes too: they import this file

from relay import Baton, Relay


def counting(baton: Baton) -> Any:
    clock = iter(range(100))
    baton.now = lambda: float(next(clock))  # what is between two looks at it takes a second
    for _ in range(2 + 3 * 2):
        baton.step_ended()
    return os.getpid()


def failing(baton: Baton) -> None:
    baton.step_ended()
    raise ValueError("broken on purpose")


def test_every_round_has_a_time_of_each_way_and_the_warm_up_none() -> None:
    with Relay(3) as relay:
        seconds, returned = relay.run({"a": counting, "b": counting}, rounds=3, steps=2, warm_up=2)
        assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}
        assert returned["a"] != returned["b"] != os.getpid()
        again, same = relay.run({"a": counting}, rounds=1, steps=6, warm_up=2)
        assert again == {"a": [1.0]} and same["a"] == returned["a"]


def test_a_way_that_breaks_says_why() -> None:
    with Relay(1) as relay, pytest.raises(RuntimeError, match="broken on purpose"):
        relay.run({"a": failing}, rounds=1, steps=5, warm_up=2)
