"""Leases on an object store: one holder, signs of life, takeover by one of many, and no work under a lost one."""

from __future__ import annotations

import json
import threading
import time
import uuid
from typing import Any

import fsspec
import pytest

from kd.pipeline.errors import IncompleteError, UsageError
from kd.pipeline.store.lease import Lease, Leases, lease_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A file system on which time passes while an object is written."""

    def __init__(self, filesystem: Any, clock: Clock) -> None:
        self._filesystem, self._clock, self.seconds = filesystem, clock, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        self._clock.now += self.seconds
        self._filesystem.pipe_file(path, data, mode=mode)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder() -> str:
    return f"/{uuid.uuid4().hex}/claims"


@pytest.fixture
def machines(clock: Clock, folder: str) -> list[Leases]:
    """Three processes that look at one folder; nothing renews but what a test renews."""
    filesystem = fsspec.filesystem("memory")
    return [Leases(filesystem, folder, seconds=40.0, clock=clock) for _ in range(3)]


def names(leases: Leases) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in leases.filesystem.find(leases.folder))


def test_a_lease_has_one_holder_and_is_free_at_once_when_released(machines: list[Leases]) -> None:
    first, second, _ = machines
    lease = first.take("lock")
    assert lease is not None and second.take("lock") is None and first.take("lock") is None
    assert first.take("other") is not None
    lease.release()
    again = second.take("lock")
    assert again is not None and again.generation == 2 and first.take("lock") is None
    assert names(first) == ["lock.2", "other.1"], "generations that ended are removed"


def test_a_lease_that_shows_no_life_is_taken_after_its_time_and_not_before(
    machines: list[Leases], clock: Clock
) -> None:
    first, second, _ = machines
    lease = first.take("lock")
    assert lease is not None
    clock.now += 1000.0
    assert second.take("lock") is None, "nobody knows yet how long it has stood still"
    clock.now += 39.9
    assert second.take("lock") is None
    clock.now += 0.2
    taken = second.take("lock")
    assert taken is not None and taken.valid and not lease.valid
    with pytest.raises(IncompleteError, match="ran out before the work under it was done"):
        lease.check()
    lease.release()
    assert names(first) == ["lock.2"] and first.take("lock") is None, "who lost a lease gives nothing back"


def test_renewals_keep_a_lease_for_as_long_as_they_come_in_time(machines: list[Leases], clock: Clock) -> None:
    first, second, _ = machines
    lease = first.take("lock")
    assert lease is not None
    for _ in range(10):
        clock.now += 25.0
        assert lease.renew() and lease.valid
        assert second.take("lock") is None
    clock.now += 29.9
    lease.check()
    clock.now += 0.2  # a quarter is kept for what is under way
    with pytest.raises(IncompleteError):
        lease.check()
    clock.now += 10.0
    assert not lease.renew(), "late by a moment is late: it may be somebody else's"
    assert not lease.valid


def test_a_renewal_that_arrives_too_late_does_not_revive_a_lease(clock: Clock, folder: str) -> None:
    filesystem = Slow(fsspec.filesystem("memory"), clock)
    lease = Leases(filesystem, folder, seconds=40.0, clock=clock).take("lock")
    assert lease is not None
    clock.now += 30.0
    filesystem.seconds = 15.0
    assert not lease.renew() and not lease.valid


def test_of_many_who_take_over_one_wins(machines: list[Leases], clock: Clock) -> None:
    dead = machines[0].take("lock")
    assert dead is not None
    takers = [Leases(machines[0].filesystem, machines[0].folder, seconds=40.0, clock=clock) for _ in range(16)]
    assert [taker.take("lock") for taker in takers] == [None] * 16
    clock.now += 41.0
    won: list[Lease] = []
    start = threading.Barrier(16)

    def take(taker: Leases) -> None:
        start.wait()
        if (lease := taker.take("lock")) is not None:
            won.append(lease)

    threads = [threading.Thread(target=take, args=(taker,)) for taker in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and won[0].generation == 2


def test_who_looked_long_ago_does_not_get_in_beside_the_present_holder(
    machines: list[Leases], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look and its creation, two others come and go, so that the name it creates is free again."""
    slow, first, second = machines
    opening = first.take("lock")
    assert opening is not None
    opening.release()
    present: list[Lease] = []
    create = Lease.create

    def late(self: Lease) -> bool:
        if self._leases is slow:
            between = first.take("lock")
            assert between is not None and between.generation == self.generation
            between.release()
            now = second.take("lock")
            assert now is not None and now.generation == self.generation + 1
            present.append(now)
        return create(self)

    monkeypatch.setattr(Lease, "create", late)
    assert slow.take("lock") is None
    assert present[0].valid and first.take("lock") is None


def test_an_answer_that_was_lost_is_not_taken_for_somebody_elses_lease(machines: list[Leases]) -> None:
    class Twice(Slow):
        def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
            super().pipe_file(path, data, mode)
            if mode == "create":
                super().pipe_file(path, data, mode)  # as a package does that got no answer

    leases = machines[0]
    leases.filesystem = Twice(leases.filesystem, Clock())
    lease = leases.take("lock")
    assert lease is not None and lease.valid and machines[1].take("lock") is None


def test_a_damaged_lease_is_waited_for_like_any_other(machines: list[Leases], clock: Clock) -> None:
    leases = machines[0]
    leases.filesystem.pipe_file(leases.path("lock", 7), b"{")
    assert leases.take("lock") is None
    clock.now += 41.0
    lease = leases.take("lock")
    assert lease is not None and lease.generation == 8


@pytest.mark.parametrize("seconds", [1e12, float("inf"), float("nan"), -1.0])
def test_nobody_can_make_others_wait_for_longer_than_an_hour(
    machines: list[Leases], clock: Clock, seconds: float
) -> None:
    leases = machines[0]
    content = json.dumps({"seconds": seconds, "released": False}).encode()
    leases.filesystem.pipe_file(leases.path("lock", 1), content)
    assert leases.take("lock") is None
    clock.now += 3601.0
    assert leases.take("lock") is not None


def test_forgotten_leases_leave_nothing(machines: list[Leases]) -> None:
    lease = machines[0].take("shard-1", forget=True)
    assert lease is not None and names(machines[0]) == ["shard-1.1"]
    lease.release()
    lease.release()
    assert names(machines[0]) == []


def test_a_thread_renews_until_the_lease_is_let_go_of(folder: str) -> None:
    filesystem = fsspec.filesystem("memory")
    leases, others = (Leases(filesystem, folder, seconds=0.4) for _ in range(2))
    lease = leases.take("lock")
    assert lease is not None
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        assert others.take("lock") is None
        time.sleep(0.02)
    lease.check()
    del lease
    until = time.monotonic() + 5.0
    while (taken := others.take("lock")) is None:
        assert time.monotonic() < until, "a lease that nobody has in hand is still renewed"
        time.sleep(0.02)
    taken.release()


def test_the_time_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KD_LEASE_SECONDS", raising=False)
    assert lease_seconds() == 60.0
    monkeypatch.setenv("KD_LEASE_SECONDS", "2.5")
    assert lease_seconds() == 2.5
    for bad in ("0", "never", "1e9", "nan"):
        monkeypatch.setenv("KD_LEASE_SECONDS", bad)
        with pytest.raises(UsageError, match="KD_LEASE_SECONDS"):
            lease_seconds()
