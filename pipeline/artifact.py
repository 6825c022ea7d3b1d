"""Artifacts: a directory plus `manifest.json`, written last. A directory is finished exactly when it has one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .disk import disk_full_explained
from .errors import RefusedError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Artifact:
    """A finished directory and what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What it is: "teacher", "corpus", "view", "run" or "comparison"."""
        return str(self.manifest["kind"])

    @property
    def fingerprint(self) -> str:
        """Hash of the stage's configuration and inputs that made it (32 hex)."""
        return str(self.manifest["fingerprint"])

    @property
    def content(self) -> Mapping[str, Any]:
        """What the kind adds to the manifest."""
        content = self.manifest.get("content", {})
        assert isinstance(content, Mapping)
        return content


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` so that `path` holds either its old bytes or all of the new ones, whatever is killed when.

    Raises:
        IncompleteError: the disk is full; the old bytes are there.
    """
    with disk_full_explained(path), _atomic_writer(Path(path)) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_writer(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path`, whole, at the end; an exception leaves the old bytes there.

    Raises:
        IncompleteError: the disk is full; the old bytes are there.
    """
    with disk_full_explained(path), _atomic_writer(Path(path)) as file:
        yield file


@contextlib.contextmanager
def _atomic_writer(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(path: Path | str, manifest: Mapping[str, Any]) -> None:
    """Finish the directory `path`: write its manifest by rename, as the last file."""
    text = json.dumps({"format": MANIFEST_FORMAT, **manifest}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write_bytes(Path(path) / MANIFEST, text.encode())


def kd_version() -> str:
    """Of the kd that is running, for manifests."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kd-pipeline")
    except PackageNotFoundError:
        return "unknown"


def json_ready(value: Any) -> Any:
    """`value` in what JSON has: numpy scalars as numbers, tuples as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def read_manifest(path: Path | str) -> dict[str, Any] | None:
    """The manifest in directory `path`, or None when it has none (unfinished or absent).

    Raises:
        RefusedError: the file is there and is not a manifest that this version reads.
    """
    file = Path(path) / MANIFEST
    try:
        size = file.stat().st_size
        # A pipe in its place would be waited for.
        if not file.is_file() or size > MAX_MANIFEST_BYTES:
            raise RefusedError(f"{file} is not a manifest: it is no file, or has {size} bytes")
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            f"{file} is not JSON: {error}", fix=f"delete {file.parent} and run its stage again"
        ) from None
    wanted = {"format", "kind", "fingerprint"}
    if (
        not isinstance(manifest, dict)
        or not wanted <= manifest.keys()
        or not isinstance(manifest["fingerprint"], str)
        or not all(isinstance(manifest.get(name, {}), dict) for name in ("content", "identity", "summary"))
    ):
        raise RefusedError(f"{file} is not a kd manifest", details=[f"expected the keys: {', '.join(sorted(wanted))}"])
    if manifest["format"] != MANIFEST_FORMAT:
        raise RefusedError(
            f"{file} has manifest format {manifest['format']!r}; this kd reads {MANIFEST_FORMAT}",
            fix="use the kd version that wrote it, or run its stage again",
        )
    return manifest


def open_artifact(path: Path | str, *, kind: str | None = None) -> Artifact:
    """Open a finished artifact.

    Raises:
        RefusedError: nothing there, unfinished, unreadable, or of another kind than `kind`.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        noun = kind or "artifact"
        if (path / "store.json").exists():
            raise RefusedError(f"{path} is a store, not a {noun}", fix=f"give the path of a {noun}")
        state = "has no manifest.json: its stage has not finished" if path.is_dir() else "does not exist"
        raise RefusedError(f"{noun} {path} {state}", fix=f"run the stage that makes the {noun} (again: it resumes)")
    if kind is not None and manifest["kind"] != kind:
        raise RefusedError(f"{path} is a {manifest['kind']}, not a {kind}", fix=f"give the path of a {kind}")
    return Artifact(path, manifest)
