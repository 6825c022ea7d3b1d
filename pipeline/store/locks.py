"""Whether a folder can be shared by writers: a file locked once cannot be locked again, by anybody anywhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid

from ..errors import RefusedError

_NEEDS = "a store needs a file system on which flock() keeps every other writer out (local disks, most network mounts)"

_TRIES = 100


def require_locks(folder: str, *, url: str) -> None:
    """Try it out in a folder that exists.

    Raises:
        RefusedError: locks are not supported, keep nobody out, or are known to this machine alone.
    """
    for _ in range(_TRIES):
        try:
            kept_out = _second_is_kept_out(f"{folder}/probe-{uuid.uuid4().hex}")
        except (FileNotFoundError, BlockingIOError):
            continue  # another process swept the folder, and this file with it
        except OSError as error:
            raise _refused(url, f"files there cannot be locked: {error}") from error
        if not kept_out:
            raise _refused(url, "a file there can be locked twice at once")
        break
    else:
        raise _refused(url, "a new file there is gone or locked by others at once, again and again")
    if local_only := _locks_of_this_machine(folder):
        raise _refused(url, f"it is mounted with {local_only}: other machines do not see the locks of this one")


def _second_is_kept_out(path: str) -> bool:
    """Whether a new file that is locked once cannot be locked again. Any OSError where it cannot be locked at all."""
    with contextlib.ExitStack() as stack:
        first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        stack.callback(os.close, first)
        stack.callback(_unlink, path)
        # From here on nobody sweeps it away.
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        stack.callback(os.close, second)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


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
