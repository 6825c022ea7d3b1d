"""Sidecars: what is kept of the teacher beside its outputs, so that readers never open the teacher.

`sidecars/<name>/` holds `tensors.safetensors` or a few files as they are, and `record.json` with their sizes and
checksums. The folder is written in the staging folder and renamed: it is there as a whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import KdError, RefusedError, UsageError, VerificationError, near_match
from ..fingerprint import canonical_json, fingerprint
from .compacted import MAX_RECORD_BYTES
from .files import Blob, StoreFiles
from .layout import SIDECARS
from .records import Problem

if TYPE_CHECKING:
    from .repair import Outcome

RECORD = "record.json"
TENSORS = "tensors.safetensors"
MAX_SIDECAR_BYTES = 1 << 36


@dataclass(frozen=True)
class Sidecar:
    """What a sidecar's record says.

    Attributes:
        name: of the folder.
        kind: "tensors" or "files".
        metadata: what was said when it was put there.
        files: (bytes, xxh3_128) by file name.
    """

    name: str
    kind: str
    metadata: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    def path(self, file: str) -> str:
        """Of one of its files inside the store."""
        return f"{SIDECARS}/{self.name}/{file}"


def list_sidecars(files: StoreFiles) -> list[str]:
    """Names of the sidecars that are there, sorted."""
    return files.complete_folders(SIDECARS, RECORD)


def write_tensors(
    files: StoreFiles, store: str, name: str, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]
) -> None:
    """Keep tensors. Putting the same ones again does nothing.

    Raises:
        RefusedError: a sidecar of that name holds others, or a tensor is not finite.
    """
    for tensor_name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise RefusedError(f"sidecar {name!r}: tensor {tensor_name!r} has values that are not finite")
    _write(files, store, name, "tensors", tensor_files(tensors), metadata, keep_old=False)


def tensor_files(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    """The files of a sidecar of tensors."""
    import safetensors.numpy

    return {TENSORS: safetensors.numpy.save({key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)})}


def write_files(
    files: StoreFiles, store: str, name: str, folder: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> None:
    """Keep the files of a folder (sub-folders included). A sidecar of that name that is there stays as it is."""
    contents = folder_files(folder)
    if not contents:
        raise UsageError(f"sidecar {name!r}: no files in {folder}")
    if RECORD in contents:
        raise UsageError(f"sidecar {name!r}: {folder} has a file named {RECORD}, which is taken")
    _write(files, store, name, "files", contents, metadata, keep_old=True)


def copy_sidecar(source: StoreFiles, files: StoreFiles, store: str, name: str) -> None:
    """Keep a sidecar as another store of the same digest has it. One of that name that is there stays as it is.

    Raises:
        VerificationError: it is damaged there.
    """
    record = read_record(source, store, name)
    _require_intact(source, record)
    contents = {file: source.read(record.path(file), limit=MAX_SIDECAR_BYTES) for file in record.files}
    _write(files, store, name, record.kind, contents, record.metadata, keep_old=True)


def folder_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _record_of(
    store: str, name: str, kind: str, contents: Mapping[str, bytes], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "format": 1,
        "store": store,
        "name": name,
        "kind": kind,
        "metadata": json.loads(canonical_json(dict(metadata))),
        "files": {
            file: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)} for file, data in contents.items()
        },
    }
    record["digest"] = fingerprint(record)
    return record


def _write(
    files: StoreFiles,
    store: str,
    name: str,
    kind: str,
    contents: Mapping[str, bytes],
    metadata: Mapping[str, Any],
    *,
    keep_old: bool,
) -> None:
    record = _record_of(store, name, kind, contents, metadata)
    if "/" in name:
        raise UsageError(f"sidecar {name!r}: a name has no slash in it")
    files.path(f"{SIDECARS}/{name}")  # refuses a name that is not plain
    with files.lock():
        if name in list_sidecars(files):
            old = read_record(files, store, name)
            if not keep_old and (old.kind, old.files) != (
                kind,
                {file: (said["bytes"], said["xxh3_128"]) for file, said in record["files"].items()},
            ):
                raise RefusedError(
                    f"sidecar {name!r} of store {files.url} holds other tensors",
                    fix="give another --store; a store is never rewritten",
                )
            return
        files.put_folder(f"{SIDECARS}/{name}", {**contents, RECORD: canonical_json(record) + b"\n"})


def read_record(files: StoreFiles, store: str, name: str) -> Sidecar:
    """The record of a sidecar, checked.

    Raises:
        RefusedError: no such sidecar.
        VerificationError: its record is damaged or of another store.
    """
    try:
        data = files.read(f"{SIDECARS}/{name}/{RECORD}", limit=MAX_RECORD_BYTES)
    except FileNotFoundError:
        raise RefusedError(
            f"store {files.url} has no sidecar {name!r}{near_match(name, list_sidecars(files))}",
            fix=f"run kd cache-teacher again with --sidecars {name}",
        ) from None
    try:
        record = json.loads(data)
        written = canonical_json(record) + b"\n"
        digest = record.pop("digest")
        if fingerprint(record) != digest or written != data or record["format"] != 1 or record["name"] != name:
            raise ValueError("it was edited or damaged")
        if record["store"] != store:
            raise ValueError("it belongs to another store")
        contents = {file: (int(said["bytes"]), str(said["xxh3_128"])) for file, said in record["files"].items()}
        for file in contents:
            files.path(f"{SIDECARS}/{name}/{file}")
        return Sidecar(name, str(record["kind"]), dict(record["metadata"]), contents)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, KdError) as error:
        raise VerificationError(f"the record of sidecar {name!r} of store {files.url} is damaged: {error}") from None


def read_tensors(files: StoreFiles, store: str, name: str) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a sidecar, checked against its checksum; writable copies."""
    import safetensors
    import safetensors.numpy

    sidecar = read_record(files, store, name)
    if sidecar.kind != "tensors" or set(sidecar.files) != {TENSORS}:
        raise RefusedError(f"sidecar {name!r} of store {files.url} holds files, not tensors")
    blob = Blob(sidecar.path(TENSORS), *sidecar.files[TENSORS])
    try:
        data = Path(files.fetch(blob)).read_bytes() if blob.bytes <= MAX_SIDECAR_BYTES else b""
    except (FileNotFoundError, VerificationError):
        data = b""
    others = files.walk(f"{SIDECARS}/{name}") - {RECORD, TENSORS}
    if others or (len(data), xxhash.xxh3_128_hexdigest(data)) != (blob.bytes, blob.xxh3_128):
        _require_intact(files, sidecar)
        raise VerificationError(f"sidecar {name!r} of store {files.url} changed while it was read")
    try:
        return {key: np.array(value) for key, value in safetensors.numpy.load(data).items()}
    # What it raises for a dtype or a shape that numpy has not is its own affair.
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerificationError(f"sidecar {name!r} of store {files.url} is not safetensors: {error}") from None


def open_folder(files: StoreFiles, store: str, name: str) -> Path:
    """Folder of a file sidecar, its files checked against their checksums."""
    sidecar = read_record(files, store, name)
    _require_intact(files, sidecar)
    blobs = [Blob(sidecar.path(file), *said) for file, said in sidecar.files.items()]
    return files.local_folder(f"{SIDECARS}/{name}", blobs)


def _require_intact(files: StoreFiles, sidecar: Sidecar) -> None:
    problems = verify_sidecar(files, sidecar)
    if problems:
        raise VerificationError(
            f"sidecar {sidecar.name!r} of store {files.url} is damaged",
            details=[str(problem) for problem in problems[:5]],
            fix=f"kd store repair {files.url} --teacher TEACHER",
        )


def verify_sidecar(files: StoreFiles, sidecar: Sidecar) -> list[Problem]:
    """What is wrong with the files of a sidecar."""
    problems = [
        Problem(None, f"sidecar {sidecar.name}", sidecar.path(file), "its record does not name it")
        for file in sorted(files.walk(f"{SIDECARS}/{sidecar.name}") - {RECORD} - set(sidecar.files))
    ]
    for file, (size, expected) in sidecar.files.items():
        path = sidecar.path(file)
        try:
            found = files.size(path)
            if found != size:
                what = f"it has {found} bytes, its record says {size}"
            else:
                digest = xxhash.xxh3_128()
                for block in files.blocks(path):
                    digest.update(block)
                if digest.hexdigest() == expected:
                    continue
                what = "its bytes do not have the recorded checksum"
        except FileNotFoundError:
            what = "it is missing"
        except VerificationError as error:
            what = error.what
        problems.append(Problem(None, f"sidecar {sidecar.name}", path, what))
    return problems


def restore_sidecar(
    files: StoreFiles,
    store: str,
    name: str,
    kind: str,
    contents: Mapping[str, bytes],
    outcome: Outcome,
    *,
    accept: bool = False,
) -> None:
    """Write what is damaged of a sidecar from what the teacher gives now.

    Args:
        contents: its files, made from the teacher.
        accept: replace a sidecar that the teacher now gives otherwise (another version of its libraries) as a whole.
    """
    signal = f"sidecar {name}"
    with files.lock():
        try:
            said = read_record(files, store, name)
        except (RefusedError, VerificationError):
            said = None
        if said is not None and not _same(said, kind, contents):
            damaged = [problem.file for problem in verify_sidecar(files, said) if files.exists(problem.file)]
            if not accept:
                for file in damaged:
                    outcome.lose(
                        file,
                        "the teacher's libraries write it otherwise now: restore it from a copy, "
                        "or replace the sidecar as it is made now with --accept-recomputed",
                    )
                return
            said = None
        metadata = {} if said is None else said.metadata
        record = canonical_json(_record_of(store, name, kind, contents, metadata)) + b"\n"
        # The record last: until it is there, the sidecar counts as damaged.
        for file, data in {**contents, RECORD: record}.items():
            path = f"{SIDECARS}/{name}/{file}"
            if not _holds(files, path, data):
                files.write(path, [data])
                outcome.restore(None, signal, path, "made from the teacher")
        for file in sorted(files.walk(f"{SIDECARS}/{name}") - {RECORD} - set(contents)):
            files.remove(f"{SIDECARS}/{name}/{file}")
            outcome.remove(None, signal, f"{SIDECARS}/{name}/{file}", "its record does not name it")


def _same(said: Sidecar, kind: str, contents: Mapping[str, bytes]) -> bool:
    made = {file: (len(data), xxhash.xxh3_128_hexdigest(data)) for file, data in contents.items()}
    return (said.kind, said.files) == (kind, made)


def _holds(files: StoreFiles, path: str, data: bytes) -> bool:
    try:
        return files.size(path) == len(data) and files.read(path, limit=len(data)) == data
    except (KdError, OSError):
        return False
