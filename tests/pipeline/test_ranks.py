"""Processes of one launch: who leads, and that what cannot be shared is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.ranks import launched
from kd.pipeline.stage import Outcome, Stage, StageContext, StageResult, execute, option

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@dataclass(frozen=True, kw_only=True)
class Alone(Stage):
    command: ClassVar[str] = "alone"
    kind: ClassVar[str] = "corpus"

    output_dir: str = option(help="where")

    def run(self, context: StageContext) -> StageResult:
        (Path(self.output_dir) / "made").touch()
        return StageResult(summary={"rows": 3})


class Recorded:
    """Ranks that only say what was asked of them."""

    def __init__(self, *, leads: bool) -> None:
        self.leads, self.said = leads, [""][:0]

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        try:
            yield
        except RefusedError:
            self.said.append("refused")
            raise
        else:
            self.said.append("done")

    def following(self, run: Callable[[], object]) -> Outcome:
        self.said.append("followed")
        return Outcome(skipped=True, summary={}, artifact=None, follows=True)


@dataclass(frozen=True, kw_only=True)
class Shared(Alone):
    leads: ClassVar[bool] = True
    known: ClassVar[list[Recorded]] = []

    def ranks(self) -> Recorded:
        self.known.append(Recorded(leads=self.leads))
        return self.known[-1]


@dataclass(frozen=True, kw_only=True)
class Following(Shared):
    leads: ClassVar[bool] = False


def test_a_process_alone_and_one_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert launched() == (0, 1), "some batch queues set these for a process alone"
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert launched() == (3, 8)


def test_a_stage_that_one_process_does_is_refused_to_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="kd alone is the work of one process, and 2 were started") as refused:
        execute(Alone(output_dir=str(tmp_path / "a")))
    assert "without torchrun" in str(refused.value.fix) and not (tmp_path / "a").exists()


def test_rank_0_makes_skips_and_refuses_and_tells_the_others(tmp_path: Path) -> None:
    stage = Shared(output_dir=str(tmp_path / "a"))
    assert not execute(stage).skipped and execute(stage).skipped
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(RefusedError):
        execute(Shared(output_dir=str(tmp_path / "b")))
    assert [ranks.said for ranks in Shared.known[-3:]] == [["done"], ["done"], ["refused"]]


def test_the_others_touch_nothing(tmp_path: Path) -> None:
    outcome = execute(Following(output_dir=str(tmp_path / "a")))
    assert outcome.follows and outcome.artifact is None and not (tmp_path / "a").exists()
    assert Shared.known[-1].said == ["followed"]


def test_the_others_print_their_errors_beside_the_result_and_not_into_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from kd.cli import main

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert main(["methods", "--json", "--no-such-option"]) == 2
    said = capfd.readouterr()
    assert said.out == "" and "no option --no-such-option" in said.err
