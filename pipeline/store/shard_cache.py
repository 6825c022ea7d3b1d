"""Copies of immutable remote files in a bounded folder on a local disk, shared by all processes and stores.

A copy is named by its checksum and was compared with it before it got its name. What was used longest ago goes
first; what a living process holds stays. Copies can be removed at any time: they are made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from ..errors import UsageError, VerificationError
from .files import Blob, StagedFile, make_folders
from .plan import parse_bytes

CACHE_BYTES = 20 << 30
"""Unless the environment variable KD_SHARD_CACHE_BYTES says otherwise."""
_COPY = re.compile(r"[0-9a-f]{32}-[0-9]+")


def cache_bytes() -> int:
    """`KD_SHARD_CACHE_BYTES` (such as 20GB), or 20 GiB."""
    text = os.environ.get("KD_SHARD_CACHE_BYTES")
    if not text:
        return CACHE_BYTES
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"KD_SHARD_CACHE_BYTES: {error.what}", fix=error.fix) from None


class _AlreadyThere(Exception):
    """Another thread or process made the copy while this one waited for its turn."""


class ShardCache:
    """The cache of this user.

    Args:
        folder: where; made when it is needed.
        limit: bytes that the copies may take together. Copies being made, and those that living processes hold,
            come on top when nothing else is left to remove.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._held: set[str] = set()
        self._holding: int | None = None
        self._process = os.getpid()

    def path(self, blob: Blob) -> str:
        """Where the copy is, or would be. VerificationError when what a record says is no checksum."""
        name = f"{blob.xxh3_128}-{blob.bytes}"
        if not _COPY.fullmatch(name):
            raise VerificationError(f"{blob.name}: {blob.xxh3_128!r} is no checksum of {blob.bytes} bytes")
        return f"{self.folder}/{name}"

    def has(self, blob: Blob) -> bool:
        """Whether the copy is there; if so, it counts as used now."""
        path = self.path(blob)
        try:
            os.utime(path)
            return os.stat(path).st_size == blob.bytes
        except FileNotFoundError:
            return False

    def fetch(self, blob: Blob, download: Callable[[], Iterator[bytes]]) -> str:
        """Path of the copy, made from what `download` yields when it is not there.

        Raises:
            VerificationError: what was downloaded does not have the checksum; nothing is kept of it.
        """
        path = self.path(blob)
        if self.has(blob):
            return path
        self._make_room(blob.bytes)
        checked = self._checked(blob, download)
        with (
            contextlib.suppress(_AlreadyThere),
            # The lock on the unfinished copy makes others wait, who then find the finished one.
            StagedFile(path, f"{path}.part", checked) as staged,
        ):
            staged.publish()
        return path

    def _checked(self, blob: Blob, download: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        if self.has(blob):
            raise _AlreadyThere
        digest, size = xxhash.xxh3_128(), 0
        for block in download():
            digest.update(block)
            size += len(block)
            if size <= blob.bytes:
                yield block
        if size != blob.bytes:
            raise VerificationError(f"{blob.name} has {size} bytes, its record says {blob.bytes}")
        if digest.hexdigest() != blob.xxh3_128:
            raise VerificationError(f"{blob.name}: its bytes do not have the recorded checksum")

    def hold(self, blobs: Sequence[Blob]) -> bool:
        """Keep the copies of these, there or yet to be made, while this process lives; False: they do not all fit.

        All or none: with what living processes hold already they must not exceed the limit.
        """
        if self._process != os.getpid():
            self._held, self._holding, self._process = set(), None, os.getpid()  # a fork holds nothing itself
        names = {os.path.basename(self.path(blob)) for blob in blobs}
        with self._lock():
            taken = self._held_by_the_living() | self._held
            if sum(map(_size_of, taken | names)) > self.limit:
                return False
            if self._holding is None:
                path = f"{self.folder}/{uuid.uuid4().hex}.held"
                self._holding = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_APPEND, 0o600)
                fcntl.flock(self._holding, fcntl.LOCK_EX)
                weakref.finalize(self, os.close, self._holding)
            os.write(self._holding, "".join(f"{name}\n" for name in sorted(names - self._held)).encode())
            self._held |= names
        return True

    def _make_room(self, size: int) -> None:
        with self._lock():
            copies = []
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if _COPY.fullmatch(entry.name):
                            copies.append((entry.stat().st_mtime, entry.name, entry.stat().st_size))
                        elif entry.name.endswith(".part"):
                            _remove_if_dead(entry.path)
            left = sum(bytes_ for _, _, bytes_ in copies) + size - self.limit
            if left <= 0:
                return
            held = self._held_by_the_living() | self._held
            for _, name, bytes_ in sorted(copies):
                if name not in held:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{self.folder}/{name}")
                    left -= bytes_
                    if left <= 0:
                        return

    def _held_by_the_living(self) -> set[str]:
        """Copies that processes hold which have not ended; what ended ones held is forgotten. Hold the lock."""
        held: set[str] = set()
        for name in os.listdir(self.folder):
            if name.endswith(".held") and not _remove_if_dead(f"{self.folder}/{name}"):
                with contextlib.suppress(FileNotFoundError), open(f"{self.folder}/{name}", encoding="ascii") as file:
                    held.update(line for line in file.read().split() if _COPY.fullmatch(line))
        return held

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        make_folders(self.folder)
        descriptor = os.open(f"{self.folder}/.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _size_of(name: str) -> int:
    return int(name.partition("-")[2])


def _remove_if_dead(path: str) -> bool:
    """Remove a file that no living process has locked; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
