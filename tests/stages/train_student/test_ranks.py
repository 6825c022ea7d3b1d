"""What rank 0 says to the others, and how they end. Real processes are in test_planted_keys.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kd.pipeline.errors import RefusedError
from kd.stages.train_student import ranks as module
from kd.stages.train_student.ranks import TrainingRanks


class Store:
    """A key-value store as torch.distributed's, for threads."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def add(self, key: str, number: int) -> int:
        self._counts[key] = self._counts.get(key, 0) + number
        return self._counts[key]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TrainingRanks, TrainingRanks]]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(module, "LEAVING_S", 0.2)
    store = Store()
    yield TrainingRanks(0, store), TrainingRanks(1, store)


def follow(ranks: TrainingRanks, run: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """Rank 1 in a thread, and what it ended with."""
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(ranks.following(run))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, ended


SEEN = {"inputs": {"view": "a"}, "checkpoint": "None"}


def test_the_others_train_when_rank_0_does_and_end_after_it(two: tuple[TrainingRanks, TrainingRanks]) -> None:
    first, second = two
    trained: list[int] = []

    def run() -> None:
        second.require_alike(SEEN)
        trained.append(1)

    thread, ended = follow(second, run)
    with first.leading():
        first.require_alike(SEEN)
        while not trained:
            pass
        thread.join(0.2)
        assert thread.is_alive(), "it waits until the folder is complete"
    thread.join(10)
    assert ended[0].follows and not ended[0].skipped


def test_what_rank_0_skips_the_others_do_not_begin(two: tuple[TrainingRanks, TrainingRanks]) -> None:
    thread, ended = follow(two[1], lambda: pytest.fail("it trained"))
    with two[0].leading():
        pass
    thread.join(10)
    assert ended[0].follows and ended[0].skipped


@pytest.mark.parametrize(("error", "code"), [(RefusedError("no"), 3), (KeyboardInterrupt(), 130), (OSError("disk"), 1)])
def test_the_others_end_with_rank_0s_code(
    two: tuple[TrainingRanks, TrainingRanks], error: BaseException, code: int
) -> None:
    thread, ended = follow(two[1], lambda: pytest.fail("it trained"))
    with pytest.raises(type(error)), two[0].leading():
        raise error
    thread.join(10)
    assert isinstance(ended[0], SystemExit) and ended[0].code == code


def test_what_both_meet_rank_0_says(two: tuple[TrainingRanks, TrainingRanks]) -> None:
    def diverge() -> None:
        raise RefusedError("training diverged")

    thread, ended = follow(two[1], diverge)
    with pytest.raises(RefusedError), two[0].leading():
        two[0].require_alike(SEEN)
        diverge()
    thread.join(10)
    assert isinstance(ended[0], SystemExit) and ended[0].code == 3


def test_a_rank_that_sees_other_files_says_so_itself(two: tuple[TrainingRanks, TrainingRanks]) -> None:
    first, second = two
    thread, ended = follow(second, lambda: second.require_alike({**SEEN, "checkpoint": "checkpoint-4"}))
    first.require_alike(SEEN)
    thread.join(10)
    assert isinstance(ended[0], RefusedError) and "checkpoint: None on rank 0, checkpoint-4 here" in str(ended[0])
