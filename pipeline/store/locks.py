"""Whether a folder can be shared by writers: a file locked once cannot be locked again, by anybody anywhere."""

from __future__ import annotations

import fcntl
import os
import re
import uuid

from ..errors import RefusedError

_NEEDS = "a store needs a file system on which flock() keeps every other writer out (local disks, most network mounts)"


def require_locks(folder: str, *, url: str) -> None:
    """Try it out in a folder that exists.

    Raises:
        RefusedError: locks are not supported, keep nobody out, or are known to this machine alone.
    """
    path = f"{folder}/probe-{uuid.uuid4().hex}"
    first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    second = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            raise _refused(url, "a file there can be locked twice at once")
    except OSError as error:
        raise _refused(url, f"files there cannot be locked: {error}") from error
    finally:
        os.close(second)
        os.unlink(path)
        os.close(first)
    if local_only := _locks_of_this_machine(folder):
        raise _refused(url, f"it is mounted with {local_only}: other machines do not see the locks of this one")


def _refused(url: str, why: str) -> RefusedError:
    return RefusedError(
        f"{url} is on a file system that cannot hold a store", details=[why, _NEEDS], fix="give another --store"
    )


def _locks_of_this_machine(folder: str, mounts: str = "/proc/self/mountinfo") -> str | None:
    """The mount option that keeps locks from the server of a network mount; None when there is none."""
    try:
        with open(mounts, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split() for line in file]
    except OSError:
        return None  # not Linux
    folder = os.path.realpath(folder)
    best, found = "", None
    for fields in lines:
        # man 5 proc: id, parent, device, root, mount point, options, optional fields, "-", type, source, options.
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        dash = fields.index("-", 6)
        if (folder == point or folder.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            options = fields[dash + 3].split(",") if fields[dash + 1].startswith("nfs") else []
            bad = [option for option in options if option in ("nolock", "local_lock=all", "local_lock=flock")]
            best, found = point, (bad[0] if bad else None)
    return found
