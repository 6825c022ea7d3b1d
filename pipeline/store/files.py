"""Files of a store: whole or absent, whatever is killed when.

Every name is relative to the store and made of plain components, so nothing that is read from a record or an
index can lead out of it. A file is written in `.staging/`, fsynced, and renamed to its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import KdError, RefusedError, VerificationError

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]*")
STAGING = ".staging"
LOCK_FILE = ".lock"
SMALL_FILE_BYTES = 64 << 20
"""Records, metadata and indexes larger than this are refused before they are read."""

Buffer = Any
"""Anything with the buffer protocol: bytes, memoryview, a contiguous numpy array."""


class StoreFiles:
    """The files below one URL. In this version the URL is a local path (or file://)."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        filesystem, path = fsspec.core.url_to_fs(os.fspath(url))
        if not isinstance(filesystem, LocalFileSystem):
            raise RefusedError(f"{url} is not a local path; stores live on local disks", fix="give a local --store")
        self.root = Path(path)
        self.url = os.fspath(url)
        self._real_root: str | None = None

    def path(self, name: str) -> str:
        """Where `name` is on disk. RefusedError when it would leave the store or is no plain name."""
        if not name or not all(_COMPONENT.fullmatch(part) for part in name.split("/")):
            raise RefusedError(f"{self.url}: {name!r} is not the name of a file inside a store")
        return f"{self.root}/{name}"

    def readable(self, name: str) -> str:
        """Where an existing file is on disk, proven to be inside the store and regular (links can lead out of it).

        Raises:
            FileNotFoundError: not there.
            VerificationError: there, but elsewhere or not a file.
        """
        path = self.path(name)
        real = self.inside(name)
        if not os.path.isfile(real):
            if os.path.lexists(real):
                raise VerificationError(f"{path} is not a regular file")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return real

    def inside(self, name: str) -> str:
        """The real path of a name that no link leads elsewhere, there or not."""
        if self._real_root is None:
            self._real_root = os.path.realpath(self.root)
        real = os.path.realpath(f"{self.root}/{name}")
        if real != f"{self._real_root}/{name}":
            raise VerificationError(f"{self.root}/{name} is a link that leads out of its place, to {real}")
        return real

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        return os.path.lexists(self.path(name))

    def size(self, name: str) -> int:
        """Bytes; FileNotFoundError when it is not there."""
        return os.stat(self.readable(name)).st_size

    def list(self, name: str) -> list[str]:
        """Names in a folder, sorted; none when it is not there."""
        try:
            return sorted(os.listdir(self.path(name) if name else self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, name: str = "") -> set[str]:
        """Paths of all files below a folder, relative to it."""
        top = self.path(name) if name else str(self.root)
        return {os.path.relpath(os.path.join(folder, file), top) for folder, _, names in os.walk(top) for file in names}

    def read(self, name: str, *, limit: int = SMALL_FILE_BYTES) -> bytes:
        """The whole of a file that has at most `limit` bytes; VerificationError when it has more."""
        with open(self.readable(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise VerificationError(f"{self.path(name)} has {size} bytes; at most {limit} are expected")
            # Not `limit`: a buffered reader allocates as much as it is asked for.
            return file.read(size + 1)

    def blocks(self, name: str, block_bytes: int = 1 << 20) -> Iterator[memoryview]:
        """The bytes of a file, block by block; a block is valid until the next one is asked for."""
        # One buffer that stays in the processor's cache: a new one each time costs more than hashing what is in it.
        buffer = memoryview(bytearray(block_bytes))
        with open(self.readable(name), "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the store's shape changes: allocation, declarations, commits. Released when a process dies."""
        make_folders(self.root)
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(f"{self.root}/{LOCK_FILE}", flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def stage(self, name: str, parts: Sequence[Buffer]) -> Staged:
        """Write a file in the staging folder; `publish` on the result gives it its place."""
        path = self.path(name)
        self.inside(name)
        return Staged(path, self.inside(f"{STAGING}/{name.replace('/', '~')}"), parts)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write or replace a file."""
        with self.stage(name, parts) as staged:
            staged.publish()

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it is there; False when it was."""
        with self.stage(name, [data]) as staged:
            return staged.publish_new()

    def remove(self, *names: str) -> None:
        """Take files away, one after another and for good when it returns; one that is not there is no error.

        Whoever has a file open or mapped keeps what it holds. A folder that becomes empty stays.
        """
        folders: dict[str, None] = {}
        for name in names:
            path = self.path(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                folders[os.path.dirname(path)] = None
        for folder in folders:
            sync_folder(folder)

    def sweep(self) -> None:
        """Remove what killed processes left in the staging folder; what a living one is writing stays."""
        staging = self.inside(STAGING)
        for name in os.listdir(staging) if os.path.isdir(staging) else []:
            descriptor = _open_locked(f"{staging}/{name}", wait=False, create=False)
            if descriptor is not None:
                os.unlink(f"{staging}/{name}")
                os.close(descriptor)

    def claim(self, name: str) -> Claim | None:
        """Take the sole right to some work; None while a living process (or another thread) has it."""
        path = self.inside(f"{STAGING}/claim~{name}")
        make_folders(os.path.dirname(path))
        descriptor = _open_locked(path, wait=False)
        return None if descriptor is None else Claim(path, descriptor)


class Claim:
    """The sole right to some work: a locked file. Ends with `release`, with this object, or with the process."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())
        """Give the right back; again does nothing."""

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _release(path: str, descriptor: int, process: int) -> None:
    # Unlinked while it is locked: whoever opened it before finds it gone, and makes its own. A forked child that
    # ends does not give back what its parent has.
    if process == os.getpid():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    os.close(descriptor)


class Staged:
    """A complete, fsynced file that waits to get its name. Leaving the `with` block removes it unless published.

    Where it waits follows from its name. A lock on the open file keeps two living processes from writing the same
    one: the second waits for the first to publish or die.
    """

    def __init__(self, path: str, temporary: str, parts: Sequence[Buffer]) -> None:
        self.final, self.temporary = path, temporary
        make_folders(os.path.dirname(path))
        make_folders(os.path.dirname(temporary))
        descriptor = _open_locked(temporary, wait=True)
        assert descriptor is not None
        if os.fstat(descriptor).st_nlink > 1:
            # Killed between link and unlink: this is the published file under its second name, not ours to empty.
            os.unlink(temporary)
            os.close(descriptor)
            descriptor = _open_locked(temporary, wait=True)
            assert descriptor is not None
        self._descriptor = descriptor
        try:
            os.ftruncate(self._descriptor, 0)
            for part in parts:
                _write_all(self._descriptor, memoryview(part).cast("B"))
            os.fsync(self._descriptor)
        except OSError as error:
            self.discard()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise KdError(
                    f"no space left on the disk of {path}",
                    fix="free some and run the same command again: it resumes",
                ) from error
            raise
        except BaseException:
            self.discard()
            raise

    def publish(self) -> None:
        """Give the file its name, replacing what had it."""
        os.rename(self.temporary, self.final)
        self._close()
        sync_folder(os.path.dirname(self.final))

    def publish_new(self) -> bool:
        """Give the file its name unless that is taken; False when it was."""
        try:
            os.link(self.temporary, self.final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            # No hard links here (some network and FUSE mounts): the store's lock has to do.
            if os.path.lexists(self.final):
                return False
            os.rename(self.temporary, self.final)
        else:
            os.unlink(self.temporary)
        self._close()
        sync_folder(os.path.dirname(self.final))
        return True

    def discard(self) -> None:
        """Remove the temporary file."""
        if self._descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Staged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _open_locked(path: str, *, wait: bool, create: bool = True) -> int | None:
    """Descriptor of a staged file that this process alone holds; made when it is not there.

    Without `wait`, None when a living process holds it; without `create`, None when it is gone.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # While this waited, the other process may have renamed or removed the file it held.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write_all(descriptor: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def make_folders(path: str | os.PathLike[str]) -> None:
    """Make a folder and its parents, so that they survive a power cut."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    make_folders(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    sync_folder(parent)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
