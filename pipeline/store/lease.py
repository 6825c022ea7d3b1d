"""Leases: the sole right to something on an object store, for as long as its holder shows signs of life.

A lease is a small object `<name>.<generation>`, made by exclusive creation and written again and again by its holder.
Whoever sees one unchanged for as long as it promises takes the next generation, again by exclusive creation: of
two who try, one wins. Nobody compares the clocks of two machines, only how long something stood still.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..errors import IncompleteError, UsageError

LEASE_SECONDS = 60.0
"""How long a lease lasts after its last renewal, unless the environment variable KD_LEASE_SECONDS says otherwise."""
LONGEST_S = 3600.0
"""What any lease may ask others to wait for."""
MOST_BYTES = 4096
_NAME = re.compile(r"(.+)\.([0-9]{1,15})")


def create_object(filesystem: Any, path: str, data: bytes) -> bool:
    """Make an object; False when it is there."""
    for wait_s in (0.1, 0.5, 2.0, None):
        try:
            filesystem.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except Exception as error:
            # S3's answer to two requests at the same moment, of which it may have granted neither.
            if wait_s is None or "ConditionalRequestConflict" not in str(error):
                raise
            time.sleep(wait_s)
        else:
            break
    return True


def lease_seconds() -> float:
    """`KD_LEASE_SECONDS`, or 60."""
    text = os.environ.get("KD_LEASE_SECONDS") or str(LEASE_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= LONGEST_S:
        raise UsageError(f"KD_LEASE_SECONDS is {text!r}", fix=f"give seconds between 0.1 and {LONGEST_S:.0f}")
    return seconds


class Leases:
    """The leases in one folder of an object store.

    Args:
        filesystem: any of fsspec with exclusive creation.
        folder: path on it.
        seconds: how long a lease lasts after its last renewal.
        clock: seconds that only grow.
    """

    def __init__(
        self, filesystem: Any, folder: str, *, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.filesystem, self.folder, self.seconds, self.clock = filesystem, folder, seconds, clock
        self._seen: dict[str, tuple[int, bytes, float]] = {}
        """Of leases that others have: generation, content, and when that was first seen."""

    def take(self, name: str, *, forget: bool = False) -> Lease | None:
        """A lease that is nobody's, or of somebody who showed no sign of life; None while it is somebody's.

        Args:
            forget: remove the object on release. Cheaper to have many of; in rare races two may then hold it, so
                it must not be what the soundness of anything rests on.
        """
        older = self._generations(name)
        if older and not self._free(name, older[-1]):
            return None
        lease = Lease(self, name, (older[-1] if older else 0) + 1, forget)
        if not lease.create():
            return None
        generations = self._generations(name)
        if generations and generations[-1] > lease.generation:
            # Between looking and creating, others took and gave back the generations in between.
            lease.release()
            return None
        for generation in generations:
            if generation < lease.generation:
                self._remove(name, generation)
        self._seen.pop(name, None)
        return lease

    def path(self, name: str, generation: int) -> str:
        """Of the object of one generation."""
        return f"{self.folder}/{name}.{generation}"

    def _generations(self, name: str) -> list[int]:
        try:
            paths = self.filesystem.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        matches = (_NAME.fullmatch(path.rpartition("/")[2]) for path in paths)
        return sorted(int(match[2]) for match in matches if match is not None and match[1] == name)

    def _free(self, name: str, generation: int) -> bool:
        try:
            # A range, since some packages ask for the size before they read a whole object.
            content = bytes(self.filesystem.cat_file(self.path(name, generation), start=0, end=MOST_BYTES))
        except FileNotFoundError:
            return True
        try:
            said = json.loads(content)
            released, seconds = bool(said["released"]), float(said["seconds"])
        except (ValueError, KeyError, TypeError):
            released, seconds = False, self.seconds
        if not 0.0 <= seconds <= LONGEST_S:  # NaN, which no time ever passes, is neither
            seconds = LONGEST_S
        if released:
            return True
        now = self.clock()
        seen = self._seen.get(name)
        if seen is None or seen[:2] != (generation, content):
            self._seen[name] = (generation, content, now)
            return False
        return now - seen[2] > seconds

    def _remove(self, name: str, generation: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self.path(name, generation))


class Lease:
    """A lease in hand. A thread renews it until it is released or forgotten; `check` before relying on it."""

    def __init__(self, leases: Leases, name: str, generation: int, forget: bool) -> None:
        self.name, self.generation = name, generation
        self._leases, self._forget = leases, forget
        self._owner, self._renewals = uuid.uuid4().hex, 0
        self._valid_until = float("-inf")
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def create(self) -> bool:
        """Make the object; False when somebody else did."""
        started, data = self._leases.clock(), self._content()
        path = self._leases.path(self.name, self.generation)
        if not create_object(self._leases.filesystem, path, data):
            # A request whose answer was lost is sent again, and then fails because of itself.
            try:
                if bytes(self._leases.filesystem.cat_file(path, start=0, end=MOST_BYTES)) != data:
                    return False
            except FileNotFoundError:
                return False
        self._valid_until = started + self._leases.seconds
        arguments = weakref.ref(self), self._stop, self._leases.seconds / 4
        self._renewer = threading.Thread(target=_renew, args=arguments, name=f"kd-lease-{self.name}", daemon=True)
        self._renewer.start()
        return True

    def renew(self) -> bool:
        """Show a sign of life; False when it came too late, and the lease is lost."""
        clock = self._leases.clock
        started = clock()
        if started > self._valid_until:
            return False
        self._renewals += 1
        with contextlib.suppress(Exception):  # tried again until it is too late
            self._leases.filesystem.pipe_file(self._leases.path(self.name, self.generation), self._content())
            if clock() > self._valid_until:
                # Somebody may have taken it before this was written.
                self._valid_until = float("-inf")
                return False
            self._valid_until = started + self._leases.seconds
        return True

    @property
    def valid(self) -> bool:
        """Whether enough of it is left to do one thing more."""
        return self._leases.clock() < self._valid_until - self._leases.seconds / 4

    def check(self) -> None:
        """IncompleteError unless enough of it is left to do one thing more."""
        if not self.valid:
            raise IncompleteError(
                f"the lease {self._leases.path(self.name, self.generation)} ran out before the work under it was done",
                details=["this process was held up, or its renewals did not get through; others may have gone on"],
                fix="run the same command again (KD_LEASE_SECONDS makes leases longer)",
            )

    def release(self) -> None:
        """Give it back; again does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join()  # a renewal under way would undo the release
        if not self.valid:
            return
        path = self._leases.path(self.name, self.generation)
        with contextlib.suppress(Exception):  # whoever waits for it waits until it has run out
            if self._forget:
                self._leases.filesystem.rm_file(path)
            else:
                self._leases.filesystem.pipe_file(path, self._content(released=True))
        self._valid_until = float("-inf")

    def _content(self, *, released: bool = False) -> bytes:
        content = {
            "owner": self._owner,
            "process": f"{os.uname().nodename}:{os.getpid()}",
            "renewals": self._renewals,
            "seconds": self._leases.seconds,
            "released": released,
        }
        return json.dumps(content).encode()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _renew(reference: weakref.ref[Lease], stop: threading.Event, interval_s: float) -> None:
    while not stop.wait(interval_s):
        lease = reference()
        # A lease that nobody has in hand any more is left to run out.
        if lease is None or not lease.renew():
            return
        del lease
