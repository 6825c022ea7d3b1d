"""Local file systems that cannot keep two writers apart are refused before anything is written."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.errors import RefusedError
from kd.pipeline.store import create_or_open, locks

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 22 0:40 / /net/good rw - nfs4 server:/a rw,vers=4.2,local_lock=none
36 22 0:41 / /net/bad rw shared:3 master:2 - nfs server:/b rw,vers=3,nolock,addr=1.2.3.4
37 36 0:42 / /net/bad/inside\\040it rw - nfs4 server:/c rw,local_lock=all
38 22 0:43 / /disk rw - xfs /dev/sdb nolock
"""


def test_a_local_disk_passes_and_nothing_is_left_of_the_trial(tmp_path: Path) -> None:
    locks.require_locks(str(tmp_path), url="store")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_refused(tmp_path: Path, identity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(RefusedError, match="cannot hold a store") as caught:
        create_or_open(tmp_path / "store", identity)
    assert "No locks available" in str(caught.value) and "flock()" in str(caught.value)
    assert not (tmp_path / "store" / "store.json").exists()
    assert not list((tmp_path / "store" / ".staging").iterdir())


def test_locks_that_keep_nobody_out_are_refused(tmp_path: Path, identity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    with pytest.raises(RefusedError, match="locked twice at once"):
        create_or_open(tmp_path / "store", identity)


def test_a_trial_that_another_process_sweeps_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = fcntl.flock, []

    def sweeping(descriptor: int, operation: int) -> None:
        if len(swept) < 2:
            (probe,) = tmp_path.iterdir()
            probe.unlink()
            swept.append(probe)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweeping)
    locks.require_locks(str(tmp_path), url="store")
    assert len(swept) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "option"),
    [
        ("/home/me", None),
        ("/net/good/store", None),
        ("/net/bad", "nolock"),
        ("/net/bad/store/.staging", "nolock"),
        ("/net/bad/inside it/store", "local_lock=all"),
        ("/net/badly/named", None),
        ("/disk/store", None),
    ],
)
def test_network_mounts_whose_locks_stay_on_this_machine_are_found(
    tmp_path: Path, folder: str, option: str | None
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert locks._locks_of_this_machine(folder, str(tmp_path / "mountinfo")) == option
    assert locks._locks_of_this_machine(folder, str(tmp_path / "no such file")) is None
