"""Files of a store: whole or absent, whatever is killed when. One interface; here on a local disk.

Every name is relative to the store and made of plain components, so nothing that is read from a record or an
index can lead out of it. A file is written in `.staging/`, fsynced, and renamed to its place. `object_files.py` does
the same where there are no renames.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..disk import disk_full, disk_full_explained, is_disk_full
from ..errors import KdError, RefusedError, VerificationError
from .buffers import ALIGNMENT
from .locks import require_locks

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]*")
STAGING = ".staging"
LOCK_FILE = ".lock"
SMALL_FILE_BYTES = 64 << 20
"""Records, metadata and indexes larger than this are refused before they are read."""

DIRECT_BYTES = 1 << 21
"""Buffers from this size on are written past the page cache, where the file system lets them."""

Names = list[str]
Buffer = Any
"""Anything with the buffer protocol: bytes, memoryview, a contiguous numpy array."""


class Claim(Protocol):
    """The sole right to some work. Ends with `release`, when it is let go of, or (in the end) with the process."""

    def release(self) -> object:
        """Give the right back; again does nothing."""

    def __enter__(self) -> Claim: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Staged(Protocol):
    """A complete file that waits for its name; `publish` only under the store's lock. To be used in a `with` block."""

    def publish(self) -> None:
        """Give the file its name, replacing what had it."""

    def __enter__(self) -> Staged: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Blob(NamedTuple):
    """A file that a record names: never changed once it is there, so that copies of it can be kept."""

    name: str
    bytes: int
    xxh3_128: str


class StoreFiles(abc.ABC):
    """The files below one URL. Made by `open_files`.

    Attributes:
        url: as given.
        address: the same place for any process on this machine: an absolute path, or the URL.
    """

    url: str
    address: str

    def path(self, name: str) -> str:
        """Where `name` is. RefusedError when it would leave the store or is no plain name."""
        if not name or not all(_COMPONENT.fullmatch(part) for part in name.split("/")):
            raise RefusedError(f"{self.url}: {name!r} is not the name of a file inside a store")
        return f"{self.address}/{name}"

    def is_at(self, url: str) -> bool:
        """Whether `url` names the same place."""
        return self.address == open_files(url).address

    # -- reading ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def is_empty(self, *, besides: Collection[str] = ()) -> bool:
        """Whether nothing is at the URL, other than files or folders of these names in a folder."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Bytes; FileNotFoundError when it is not there."""

    @abc.abstractmethod
    def list(self, name: str) -> Names:
        """Names in a folder, sorted; none when it is not there."""

    @abc.abstractmethod
    def walk(self, name: str = "") -> set[str]:
        """Paths of all files below a folder, relative to it."""

    @abc.abstractmethod
    def read(self, name: str, *, limit: int = SMALL_FILE_BYTES) -> bytes:
        """The whole of a file that has at most `limit` bytes; VerificationError when it has more."""

    @abc.abstractmethod
    def read_many(self, names: Sequence[str], *, limit: int = SMALL_FILE_BYTES) -> Iterator[bytes | Exception]:
        """`read` of each, in order: what it returned, or what it raised."""

    @abc.abstractmethod
    def blocks(self, name: str, block_bytes: int = ...) -> Iterator[bytes | memoryview]:
        """The bytes of a file, block by block; a block is valid until the next one is asked for."""

    @abc.abstractmethod
    def fetch(self, blob: Blob) -> str:
        """Path of a file on a local disk with the bytes of `blob`.

        What is on a local disk is that file itself, unchecked; else a copy, checked when it was made.

        Raises:
            FileNotFoundError: not there.
            VerificationError: another file is.
        """

    @abc.abstractmethod
    def fetch_all(self, blobs: Sequence[Blob]) -> None:
        """Make `fetch` quick for these, many at once and in this order; errors are left to `fetch`."""

    @abc.abstractmethod
    def hold(self, blobs: Sequence[Blob]) -> bool:
        """Whether there is room on a local disk for all of these together; it is theirs while this object lives."""

    @abc.abstractmethod
    def complete_folders(self, name: str, proof: str) -> Names:
        """Names of the folders in a folder that were put there as a whole (see `put_folder`), sorted."""

    @abc.abstractmethod
    def local_folder(self, name: str, blobs: Sequence[Blob]) -> Path:
        """A folder on a local disk with these files of a folder."""

    # -- writing ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def probe(self) -> None:
        """Try out what writers rely on; RefusedError when the file system lacks it."""

    @abc.abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Held while the store's shape changes: allocation, declarations, commits. Ends when a process dies."""

    @abc.abstractmethod
    def claim(self, name: str) -> Claim | None:
        """Take the sole right to some work; None while somebody who lives (or another thread) has it."""

    @abc.abstractmethod
    def stage(self, name: str, parts: Sequence[Buffer]) -> Staged:
        """Write a file that gets its name with `publish` on the result."""

    @abc.abstractmethod
    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write or replace a file."""

    @abc.abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it is there; False when it was."""

    @abc.abstractmethod
    def remove(self, *names: str) -> None:
        """Take files away, one after another and for good when it returns; one that is not there is no error.

        Whoever has a file open or mapped keeps what it holds. A folder that becomes empty stays.
        """

    @abc.abstractmethod
    def put_folder(self, name: str, contents: Mapping[str, bytes]) -> None:
        """Write a new folder of files; it is there as a whole or not at all. Hold the lock.

        Args:
            contents: by names in the folder; the last one is what proves that the folder is there.
        """

    @abc.abstractmethod
    def sweep(self) -> None:
        """Remove what killed processes left; what a living one is writing stays. Hold the lock."""


def open_files(url: str | os.PathLike[str]) -> StoreFiles:
    """The files below a local path or any URL of fsspec.

    Raises:
        RefusedError: the package for such URLs is not installed.
    """
    where = os.fspath(url)
    if "://" not in where and "::" not in where:
        return LocalFiles(where)
    if where.startswith(("file://", "local://")):
        return LocalFiles(where.partition("://")[2], url=where)
    from .object_files import ObjectFiles

    return ObjectFiles(where)


class LocalFiles(StoreFiles):
    """Files on a local disk, or on a mount on which `flock` works."""

    def __init__(self, path: str, url: str | None = None) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(path)))
        self.url = path if url is None else url
        self.address = str(self.root)
        self._real_root: str | None = None

    def is_at(self, url: str) -> bool:
        other = open_files(url)
        return isinstance(other, LocalFiles) and other.root.resolve() == self.root.resolve()

    def is_empty(self, *, besides: Collection[str] = ()) -> bool:
        # Asked once: a folder that another process makes between two looks would be neither absent nor a folder.
        try:
            return not set(os.listdir(self.root)) - {*besides}
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            return False

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
        return os.path.lexists(self.path(name))

    def size(self, name: str) -> int:
        return os.stat(self.readable(name)).st_size

    def list(self, name: str) -> Names:
        try:
            return sorted(os.listdir(self.path(name) if name else self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, name: str = "") -> set[str]:
        top = self.path(name) if name else str(self.root)
        return {os.path.relpath(os.path.join(folder, file), top) for folder, _, names in os.walk(top) for file in names}

    def read(self, name: str, *, limit: int = SMALL_FILE_BYTES) -> bytes:
        with open(self.readable(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise VerificationError(f"{self.path(name)} has {size} bytes; at most {limit} are expected")
            # Not `limit`: a buffered reader allocates as much as it is asked for.
            return file.read(size + 1)

    def read_many(self, names: Sequence[str], *, limit: int = SMALL_FILE_BYTES) -> Iterator[bytes | Exception]:
        for name in names:
            try:
                yield self.read(name, limit=limit)
            except (KdError, OSError) as error:
                yield error

    def fetch(self, blob: Blob) -> str:
        return self.readable(blob.name)

    def fetch_all(self, blobs: Sequence[Blob]) -> None:
        pass

    def hold(self, blobs: Sequence[Blob]) -> bool:
        return True

    def complete_folders(self, name: str, proof: str) -> Names:
        return self.list(name)

    def local_folder(self, name: str, blobs: Sequence[Blob]) -> Path:
        return Path(self.inside(name))

    def blocks(self, name: str, block_bytes: int = 1 << 20) -> Iterator[memoryview]:
        # One buffer that stays in the processor's cache: a new one each time costs more than hashing what is in it.
        buffer = memoryview(bytearray(block_bytes))
        with open(self.readable(name), "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with disk_full_explained(self.root):
            make_folders(self.root)
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(f"{self.root}/{LOCK_FILE}", flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def probe(self) -> None:
        make_folders(self.inside(STAGING))
        require_locks(self.inside(STAGING), url=self.url)

    def stage(self, name: str, parts: Sequence[Buffer]) -> StagedFile:
        path = self.path(name)
        self.inside(name)
        with disk_full_explained(path):
            return StagedFile(path, self.inside(f"{STAGING}/{name.replace('/', '~')}"), parts)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        with self.stage(name, parts) as staged:
            staged.publish()

    def create(self, name: str, data: bytes) -> bool:
        with self.stage(name, [data]) as staged:
            return staged.publish_new()

    def remove(self, *names: str) -> None:
        folders: dict[str, None] = {}
        for name in names:
            path = self.path(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                folders[os.path.dirname(path)] = None
        for folder in folders:
            sync_folder(folder)

    def put_folder(self, name: str, contents: Mapping[str, bytes]) -> None:
        folder, temporary = self.inside(name), self.inside(f"{STAGING}/{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        with disk_full_explained(folder):
            for file, data in contents.items():
                self.path(f"{name}/{file}")  # refuses names that are not plain
                path = f"{temporary}/{file}"
                make_folders(os.path.dirname(path))
                with open(path, "xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                sync_folder(os.path.dirname(path))
            make_folders(os.path.dirname(folder))
            os.rename(temporary, folder)
        sync_folder(os.path.dirname(folder))

    def sweep(self) -> None:
        staging = self.inside(STAGING)
        for name in os.listdir(staging) if os.path.isdir(staging) else []:
            if os.path.isdir(f"{staging}/{name}") and not os.path.islink(f"{staging}/{name}"):
                shutil.rmtree(f"{staging}/{name}")  # of `put_folder`, which holds the lock
                continue
            descriptor = _open_locked(f"{staging}/{name}", wait=False, create=False)
            if descriptor is not None:
                os.unlink(f"{staging}/{name}")
                os.close(descriptor)

    def claim(self, name: str) -> FileClaim | None:
        path = self.inside(f"{STAGING}/claim~{name}")
        with disk_full_explained(path):
            make_folders(os.path.dirname(path))
            descriptor = _open_locked(path, wait=False)
        return None if descriptor is None else FileClaim(path, descriptor)


class FileClaim:
    """The sole right to some work: a locked file. Ends with `release`, with this object, or with the process."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())
        """Give the right back; again does nothing."""

    def __enter__(self) -> FileClaim:
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


class StagedFile:
    """A complete, fsynced file that waits to get its name. Leaving the `with` block removes it unless published.

    Where it waits follows from its name. A lock on the open file keeps two living processes from writing the same
    one: the second waits for the first to publish or die.
    """

    def __init__(self, path: str, temporary: str, parts: Iterable[Buffer]) -> None:
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
        except BaseException as error:
            self.discard()
            if is_disk_full(error):
                raise disk_full(path, error) from error
            raise

    def publish(self) -> None:
        """Give the file its name, replacing what had it."""
        with disk_full_explained(self.final):
            os.rename(self.temporary, self.final)
        self._close()
        sync_folder(os.path.dirname(self.final))

    def publish_new(self) -> bool:
        """Give the file its name unless that is taken; False when it was."""
        try:
            with disk_full_explained(self.final):
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

    def __enter__(self) -> StagedFile:
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
    view = view[_write_directly(descriptor, view) :]
    while view.nbytes:
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def _write_directly(descriptor: int, view: memoryview) -> int:
    """Write the whole blocks of a large, aligned buffer past the page cache; how many bytes that were.

    The processor then copies nothing and the kernel looks for no pages, which takes both from a teacher that computes
    meanwhile, and what others have in the cache stays there. Where it cannot be done, nothing is written.
    """
    whole = view.nbytes // ALIGNMENT * ALIGNMENT
    if whole < DIRECT_BYTES or not hasattr(os, "O_DIRECT"):
        return 0
    if np.frombuffer(view, np.uint8).ctypes.data % ALIGNMENT or os.lseek(descriptor, 0, os.SEEK_CUR) % ALIGNMENT:
        return 0
    flags, written = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while written < whole and written % ALIGNMENT == 0:
            written += os.write(descriptor, view[written:whole][: 1 << 30])
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return written


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
