"""Files of a store on an object store: S3 and whatever else fsspec reaches that can create exclusively.

An object is whole or absent by itself, so nothing is staged. What local writers get from locked files, writers here get
from leases (`lease.py`) in `claims/`: one on the store while its shape changes, one on each shard being computed.
"""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from ..errors import KdError, RefusedError, VerificationError
from ..fingerprint import fingerprint
from ..user_cache import user_cache_folder
from .files import SMALL_FILE_BYTES, Blob, Buffer, Names, StoreFiles, make_folders
from .layout import CLAIMS
from .lease import Lease, Leases, create_object, lease_seconds
from .shard_cache import ShardCache, cache_bytes

BLOCK_BYTES = 16 << 20
"""Of one request for a part of a large object."""
REQUESTS = 16
"""Requests for small objects under way at once; waiting for answers, not bytes, is what these cost."""
DOWNLOADS = 8
"""Large objects fetched at once."""
LONGEST_POLL_S = 1.0
OUT_OF_RANGE = errno.EINVAL
"""What s3fs raises for a part of an object that begins where it ends, any part of an empty one included."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of kd that brings the package for URLs of a scheme."""


class ObjectFiles(StoreFiles):
    """The objects below a URL. Credentials and endpoints come from the environment, as fsspec's packages read them."""

    def __init__(self, url: str) -> None:
        self.url = self.address = url.rstrip("/")
        self.filesystem, self._root = _open_filesystem(self.url)
        self._leases = Leases(self.filesystem, f"{self._root}/{CLAIMS}", seconds=lease_seconds())
        self._cache = ShardCache(user_cache_folder() / "shards", cache_bytes())
        self._here = threading.local()

    # -- reading ------------------------------------------------------------------------------------------------

    def is_empty(self, *, besides: Collection[str] = ()) -> bool:
        return not set(self.list("")) - {*besides}

    def exists(self, name: str) -> bool:
        with self._asking(name):
            return bool(self.filesystem.exists(self._key(name)))

    def size(self, name: str) -> int:
        with self._asking(name):
            info = self.filesystem.info(self._key(name))
        if info["type"] != "file":
            raise VerificationError(f"{self.path(name)} is not a file")
        return int(info["size"])

    def list(self, name: str) -> Names:
        key = self._key(name)
        try:
            with self._asking(name):
                paths = self.filesystem.ls(key, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        ends = {path.rstrip("/").rpartition("/")[2] for path in paths if path.strip("/") != key.strip("/")}
        return sorted(ends - {""})

    def walk(self, name: str = "") -> set[str]:
        key = self._key(name).rstrip("/")
        with self._asking(name):
            paths = self.filesystem.find(key)
        return {path[len(key) + 1 :] for path in paths if path.startswith(f"{key}/")}

    def read(self, name: str, *, limit: int = SMALL_FILE_BYTES) -> bytes:
        try:
            with self._asking(name):
                # One request; asking for the size first would be another.
                data = bytes(self.filesystem.cat_file(self._key(name), start=0, end=limit + 1))
        except OSError as error:
            if error.errno != OUT_OF_RANGE:
                raise
            return b""
        if len(data) > limit:
            raise VerificationError(f"{self.path(name)} has more than {limit} bytes; at most that many are expected")
        return data

    def read_many(self, names: Sequence[str], *, limit: int = SMALL_FILE_BYTES) -> Iterator[bytes | Exception]:
        def read(name: str) -> bytes | Exception:
            try:
                return self.read(name, limit=limit)
            except (KdError, OSError) as error:
                return error

        if len(names) < 2:
            yield from map(read, names)
            return
        with ThreadPoolExecutor(max_workers=min(REQUESTS, len(names)), thread_name_prefix="kd-read") as pool:
            yield from pool.map(read, names)

    def blocks(self, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        return self._parts(name, self.size(name), block_bytes)

    def _parts(self, name: str, size: int, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        key = self._key(name)
        for start in range(0, size, block_bytes):
            try:
                with self._asking(name):
                    yield bytes(self.filesystem.cat_file(key, start=start, end=min(size, start + block_bytes)))
            except OSError as error:
                if error.errno != OUT_OF_RANGE:
                    raise
                return

    def fetch(self, blob: Blob) -> str:
        # One byte more than there should be: an object that was made longer is noticed.
        return self._cache.fetch(blob, lambda: self._parts(blob.name, blob.bytes + 1))

    def fetch_all(self, blobs: Sequence[Blob]) -> None:
        absent = [blob for blob in blobs if not self._cache.has(blob)]

        def fetch(blob: Blob) -> None:
            with contextlib.suppress(KdError, OSError):
                self.fetch(blob)

        if len(absent) > 1:
            with ThreadPoolExecutor(max_workers=min(DOWNLOADS, len(absent)), thread_name_prefix="kd-fetch") as pool:
                list(pool.map(fetch, absent))

    def hold(self, blobs: Sequence[Blob]) -> bool:
        return self._cache.hold(blobs)

    def complete_folders(self, name: str, proof: str) -> Names:
        return sorted(path.partition("/")[0] for path in self.walk(name) if path.partition("/")[2] == proof)

    def local_folder(self, name: str, blobs: Sequence[Blob]) -> Path:
        folder = user_cache_folder() / "folders" / fingerprint([[*blob] for blob in sorted(blobs)])
        for blob in blobs:
            path = folder / blob.name.removeprefix(f"{name}/")
            if not path.is_file():
                data = Path(self.fetch(blob)).read_bytes()
                make_folders(path.parent)
                part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
                part.write_bytes(data)
                part.rename(path)
        return folder

    # -- writing ------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        key = f"{self._root}/{CLAIMS}/probe-{uuid.uuid4().hex}"
        try:
            self.filesystem.pipe_file(key, b"1", mode="create")
        except PermissionError as error:
            raise RefusedError(
                f"writing to {self.url} is not allowed",
                details=[str(error)],
                fix="are these the credentials you mean? (for S3: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL)",
            ) from error
        except FileNotFoundError as error:
            raise RefusedError(f"{self.url} cannot be written to: {error}", fix="make the bucket first") from error
        except (NotImplementedError, TypeError, ValueError) as error:
            raise self._unfit(f"it cannot create a file exclusively: {error or type(error).__name__}") from error
        except Exception as error:
            raise self._unreachable(CLAIMS, error) from error
        try:
            self.filesystem.pipe_file(key, b"2", mode="create")
        except FileExistsError:
            pass
        except Exception as error:
            raise self._unfit(f"creating a file that exists fails with {type(error).__name__}: {error}") from error
        else:
            raise self._unfit("a file that exists can be created once more")
        finally:
            with contextlib.suppress(Exception):
                self.filesystem.rm_file(key)

    def _unfit(self, why: str) -> RefusedError:
        return RefusedError(
            f"{self.url} is on a file system that cannot hold a store",
            details=[
                why,
                "writers need exclusive creation: whoever creates a file second is told so (on S3: If-None-Match)",
            ],
            fix="give another --store; S3 itself and recent MinIO, Ceph and R2 can do it",
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        wait_s = 0.02
        while (lease := self._take("lock")) is None:
            # Not all at the same moments, or they would only ever see one another.
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LONGEST_POLL_S)
        self._here.lock = lease
        try:
            yield
        finally:
            self._here.lock = None
            lease.release()

    def claim(self, name: str) -> Lease | None:
        self.path(name)  # refuses a name that is not plain
        return self._take(f"shard-{name}", forget=True)

    def _take(self, name: str, *, forget: bool = False) -> Lease | None:
        with self._asking(f"{CLAIMS}/{name}"):
            return self._leases.take(name, forget=forget)

    def _check_lock(self) -> None:
        lease: Lease | None = getattr(self._here, "lock", None)
        if lease is not None:
            lease.check()

    def stage(self, name: str, parts: Sequence[Buffer]) -> StagedObject:
        return StagedObject(self, name, parts)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        data = b"".join(parts)
        self._check_lock()
        with self._asking(name):
            self.filesystem.pipe_file(self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        self._check_lock()
        with self._asking(name):
            return create_object(self.filesystem, self._key(name), bytes(data))

    def remove(self, *names: str) -> None:
        for name in names:
            self._check_lock()
            with contextlib.suppress(FileNotFoundError), self._asking(name):
                self.filesystem.rm_file(self._key(name))

    def version(self, name: str) -> str:
        """Changes whenever the object is written; FileNotFoundError when it is not there."""
        with self._asking(name):
            return str(self.filesystem.ukey(self._key(name)))

    def put_folder(self, name: str, contents: Mapping[str, bytes]) -> None:
        for file in contents:
            self.path(f"{name}/{file}")  # refuses names that are not plain, before anything is written
        for file, data in contents.items():
            self.write(f"{name}/{file}", [data])

    def sweep(self) -> None:
        """Nothing: leases that ended are removed by those who come after them."""

    # -- the file system ----------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        if name:
            self.path(name)
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Say in one sentence what went wrong with a request, after the retries of the package that made it."""
        try:
            yield
        except (KdError, FileNotFoundError, FileExistsError, NotADirectoryError):
            raise
        except OSError as error:
            if error.errno == OUT_OF_RANGE:
                raise
            raise self._unreachable(name, error) from error
        except Exception as error:
            raise self._unreachable(name, error) from error

    def _unreachable(self, name: str, error: Exception) -> KdError:
        said = (str(error).splitlines() or [""])[0][:300]
        details = [f"{type(error).__name__}: {said}"]
        where = f"{self.url}/{name}" if name else self.url
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return RefusedError(
                f"{where}: access denied",
                details=details,
                fix="are these the credentials you mean? (for S3: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL)",
            )
        return KdError(
            f"{where} cannot be reached", details=details, fix="run the same command again once it can: it resumes"
        )


class StagedObject:
    """An object under its name that no record names yet. `publish` makes sure, under the lock, that it is this one.

    It is created exclusively, outside the lock, since creating overwrites nobody's. Where an object stands already (a
    killed process left it, or a living one computes the same), `publish` compares, and overwrites what differs: whoever
    made that finds a record of ours before it would make its own. Nothing is removed when it is not published, for
    another writer may have found it equal to its own and recorded it.
    """

    def __init__(self, files: ObjectFiles, name: str, parts: Sequence[Buffer]) -> None:
        self._files, self._name, self._parts = files, name, parts
        self._version = files.version(name) if files.create(name, b"".join(parts)) else None

    def publish(self) -> None:
        """Make sure that the object is this one."""
        if self._version is not None:
            with contextlib.suppress(FileNotFoundError):
                if self._files.version(self._name) == self._version:
                    return
        if not self._is_equal():
            self._files.write(self._name, self._parts)

    def _is_equal(self) -> bool:
        ours, theirs = xxhash.xxh3_128(), xxhash.xxh3_128()
        try:
            if self._files.size(self._name) != sum(memoryview(part).nbytes for part in self._parts):
                return False
            for block in self._files.blocks(self._name):
                theirs.update(block)
        except FileNotFoundError:
            return False
        for part in self._parts:
            ours.update(memoryview(part).cast("B"))
        return ours.digest() == theirs.digest()

    def __enter__(self) -> StagedObject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts = ()


def _open_filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        # Listings change under us whenever another process writes.
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        raise RefusedError(
            f"{url}: the package for {scheme}:// URLs is not installed",
            details=[str(error)],
            fix=f'pip install "kd-pipeline[{extra}]"' if extra else f"install the fsspec package for {scheme}://",
        ) from None
    except ValueError as error:
        raise RefusedError(f"{url} is no URL that a store can be at: {error}", fix="give another --store") from None
    return filesystem, str(path).rstrip("/")
