"""The ranks of one training: rank 0 decides and writes, the others wait for its word and end as it ends.

They talk through torch.distributed's key-value store before and after training; in training, through DDP.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...pipeline.errors import KdError, RefusedError
from ...pipeline.ranks import launched
from ...pipeline.stage import Outcome

LEAVING_S = 5.0
"""How long the others outlive a rank 0 that failed: torchrun ends all as soon as one has, and rank 0 has to speak."""
_trainings = itertools.count()


class TrainingRanks:
    """This process among those that train one student. Make it with `join`.

    Args:
        rank: of this process.
        store: a `torch.distributed` store that all of them see, with keys of this training alone.
    """

    def __init__(self, rank: int, store: Any) -> None:
        self.rank, self._store = rank, store

    @classmethod
    def join(cls) -> TrainingRanks:
        """Meet the others where the launcher said; training later meets in the same place."""
        from torch import distributed

        rank, _ = launched()
        # torch declares neither of the two as exported; its documentation does.
        torch_distributed: Any = distributed
        store, *_ = next(torch_distributed.rendezvous("env://"))
        return cls(rank, torch_distributed.PrefixStore(f"kd-training-{next(_trainings)}", store))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0: however what is inside ends, the others learn of it and end alike."""
        code = 0
        try:
            yield
        except BaseException as error:
            code = error.exit_code if isinstance(error, KdError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            raise
        finally:
            self._say("ended", {"code": code})
            # Where this process keeps the store, the others must have heard of it before the store goes.
            self._wait_for_others(LEAVING_S if code else 60)
            if not code:
                _leave_group()

    def following(self, run: Callable[[], object]) -> Outcome:
        """The others: take part in `run` once rank 0 does, and end as it ends.

        Raises:
            SystemExit: rank 0 failed, and says so itself; with its exit code.
        """
        trains = self._hear("trains", "ended") == "trains"
        if trains:
            try:
                run()
            except BaseException:
                # What all ranks meet alike rank 0 says; only what this one met alone is its own to say.
                code = 0
                with contextlib.suppress(RuntimeError):  # rank 0 is gone, and the store with it
                    code = self._ended() if self._hear("ended", timeout_s=LEAVING_S) else 0
                if code:
                    self._leave(code)
                raise
            self._hear("ended")
        if code := self._ended():
            self._leave(code)
        _leave_group()
        return Outcome(skipped=not trains, summary={}, artifact=None, follows=True)

    def require_alike(self, seen: Mapping[str, Any]) -> None:
        """Compare what this rank is about to train on with what rank 0 sees.

        Rank 0 starts the others with it.

        Raises:
            RefusedError: naming what differs; on another rank than 0.
        """
        if self.leads:
            self._say("trains", seen)
            return
        leader = self._word("trains")
        if differing := [
            f"{name}: {leader[name]} on rank 0, {seen[name]} here" for name in seen if leader[name] != seen[name]
        ]:
            raise RefusedError(
                f"rank {self.rank} on {socket.gethostname()} sees other files than rank 0",
                details=differing,
                fix="views, stores and --output-dir must be the same files on every machine",
            )

    # --- words ---------------------------------------------------------------------------------------------------

    def _say(self, key: str, word: Mapping[str, Any]) -> None:
        self._store.set(key, json.dumps(word))

    def _word(self, key: str) -> dict[str, Any]:
        word: dict[str, Any] = json.loads(self._store.get(key))
        return word

    def _hear(self, *keys: str, timeout_s: float = float("inf")) -> str | None:
        """The first of the keys that rank 0 has said; None after so long."""
        until = time.monotonic() + timeout_s
        # Asked again and again, since rank 0 may read its inputs for longer than any time-out of the store.
        while time.monotonic() < until:
            for key in keys:
                if self._store.check([key]):
                    return key
            time.sleep(0.05)
        return None

    def _ended(self) -> int:
        """Rank 0's exit code; it learns that this rank knows."""
        code = int(self._word("ended")["code"])
        self._store.add("heard", 1)
        return code

    def _wait_for_others(self, seconds: float) -> None:
        _, count = launched()
        until = time.monotonic() + seconds
        while self._store.add("heard", 0) < count - 1 and time.monotonic() < until:
            time.sleep(0.01)

    def _leave(self, code: int) -> None:
        """End with rank 0's exit code, and not before it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
            time.sleep(LEAVING_S)
        raise SystemExit(code)


def _leave_group() -> None:
    """Take the process group down, if training made one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
