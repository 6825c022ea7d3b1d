"""Ways that take turns a few steps at a time, each going on where it stopped: a slow moment of the machine meets all.

Every way runs in a process of its own, so that each has the threads it would have alone, and one runs at a time. A way
is a picklable function that takes a `Baton` and calls `step_ended` on it after each of its steps; what it returns comes
back when it has ended.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any


class Baton:
    """What a way holds while it runs, and waits for when it has done the steps of its turn.

    Attributes:
        now: the clock; a way on a device puts one here that waits for the device.
    """

    def __init__(self, connection: Connection) -> None:
        self.now: Callable[[], float] = time.perf_counter
        self._connection = connection
        self._wait()

    def step_ended(self) -> None:
        """Go on at once, or after all others have had their turn."""
        self._steps_left -= 1
        if not self._steps_left:
            self._connection.send(self.now() - self._started)
            self._wait()

    def _wait(self) -> None:
        self._steps_left: int = self._connection.recv()
        self._started = self.now()


class Relay:
    """The processes that ways run in, for one set of ways after another.

    Args:
        count: how many; at least as many as there are ways in a set.
        imports: modules that ways need, imported once for all: each process is a copy of one that has them and has
            computed nothing yet.
    """

    def __init__(self, count: int, imports: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *imports])
        pipes = [context.Pipe() for _ in range(count)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pipes]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a process that dies is noticed

    def run(
        self, ways: Mapping[str, Callable[[Baton], Any]], *, rounds: int, steps: int, warm_up: int
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Let each way do `steps` steps a round, backwards in every other one, after `warm_up` steps that do not count.

        Returns:
            Seconds that each way took, one number a round; and what each returned, having done all its steps.
        """
        by_name = dict(zip(ways, self._connections, strict=False))
        for name, connection in by_name.items():
            connection.send(ways[name])
            _turn(connection, warm_up)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in [*ways][:: -1 if number % 2 else 1]:
                seconds[name].append(_turn(by_name[name], steps))
        return seconds, {name: _turn(connection, 0) for name, connection in by_name.items()}

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _turn(connection: Connection, steps: int) -> Any:
    connection.send(steps)
    answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection) -> None:
    while True:
        try:
            way = connection.recv()
        except EOFError:
            return
        try:
            connection.send(way(Baton(connection)))
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))
