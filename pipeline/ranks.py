"""Several processes of one launch, as torchrun starts them, doing one stage together."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .stage import Outcome


def launched() -> tuple[int, int]:
    """(rank of this process, number of processes) of the launch it belongs to; (0, 1) when it is alone.

    Read from what torchrun and other launchers put into the environment.
    """
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, count) if "MASTER_ADDR" in os.environ else (0, 1)


class Ranks(Protocol):
    """The processes that do one stage. Rank 0 leads: it alone skips, refuses, holds the folder and writes."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        ...

    def leading(self) -> AbstractContextManager[None]:
        """Rank 0: however what is inside ends, the others learn of it and end alike."""
        ...

    def following(self, run: Callable[[], object]) -> Outcome:
        """The others: take part in `run` once rank 0 does, and end as it ends.

        Raises:
            SystemExit: rank 0 failed, and says so itself; with its exit code.
        """
        ...
