"""A full disk: one error that says where, and that nothing is lost, wherever a write meets it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from .errors import IncompleteError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or no file may be that large (a limit of the process or of the file system)."""


def is_disk_full(error: BaseException) -> bool:
    """Whether that is what an exception says; also those of libraries that keep the words and lose the number."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    said = str(error)
    return "No space left on device" in said or any(f"(os error {number})" in said for number in FULL)


def disk_full(path: str | os.PathLike[str], error: BaseException) -> IncompleteError:
    """The error to raise in its place."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return IncompleteError(
        f"no space left on the disk of {os.fspath(path)}",
        details=[f"the system says: {said}"],
        fix="free some and run the same command again: it resumes",
    )


@contextlib.contextmanager
def disk_full_explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `disk_full` for what inside the block meets a full disk; IncompleteError.

    Args:
        path: what is being written, unless the exception itself names a file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, IncompleteError) or not is_disk_full(error):
            raise
        raise disk_full(getattr(error, "filename", None) or path, error) from error
