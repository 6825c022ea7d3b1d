"""A damaged or missing store.json, found again: every record names the digest of what stood in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import KdError, VerificationError

if TYPE_CHECKING:
    from ...pipeline.store import StoreIdentity, StoreLayout
    from ...pipeline.store.files import StoreFiles
    from ...pipeline.store.repair import Outcome
    from ..cache_teacher.teacher import Teacher

BATCH_TOKENS = (2048, 8192, 4096, 1024, 512, 16384, 32768, 65536)
CHUNK_BYTES = (1 << 20,)
ROWS_PER_SHARD = (4096,)
"""What is tried where nothing on disk says it; the first are kd's own defaults."""


def restore_store_file(
    url: str, teacher: Teacher | None, damage: KdError, outcome: Outcome, *, write: bool = True
) -> None:
    """Write store.json as it was.

    Raises:
        damage: as given, when there is no store at `url` at all.
        VerificationError: nothing that is known has the digest in the records.
    """
    from ...pipeline.store.files import open_files
    from ...pipeline.store.layout import STORE_FILE
    from ...pipeline.store.records import stores_named

    files = open_files(url)
    named = stores_named(files)
    if not named:
        raise damage
    try:
        data = files.read(STORE_FILE)
    except (KdError, OSError):
        data = b""
    found = _found(files, data, max(named, key=lambda digest: named[digest]), teacher)
    if found is None:
        needs = "" if teacher else "; with --teacher it may be computed again"
        raise VerificationError(
            f"{files.path(STORE_FILE)} is damaged or gone, and nothing here has the digest that records name{needs}",
            details=[damage.what],
            fix="restore it from a copy" if teacher else f"kd store repair {url} --teacher TEACHER",
        )
    if write:
        with files.lock():
            files.write(STORE_FILE, [found])
        outcome.restore(None, None, STORE_FILE, "it has the digest that every record names")


def _found(files: StoreFiles, data: bytes, wanted: str, teacher: Teacher | None) -> bytes | None:
    from ...pipeline.store import StoreIdentity, StoreLayout
    from ...pipeline.store.repair import undo_flip
    from ...pipeline.store.store import store_file_bytes

    def as_written(data: bytes) -> bytes | None:
        """store.json with the identity and layout in `data`, if that is the one."""
        try:
            content = json.loads(data)
            made = store_file_bytes(StoreIdentity(**content["identity"]), StoreLayout(**content["layout"]))
        except (ValueError, KeyError, TypeError, KdError, RecursionError):
            return None
        return made if json.loads(made)["digest"] == wanted else None

    if (made := as_written(data)) is not None:
        return made
    undone = undo_flip(data, lambda tried: as_written(tried) is not None)
    if undone is not None:
        return as_written(undone)
    if teacher is not None:
        for identity, layout in _candidates(files, data, teacher):
            made = store_file_bytes(identity, layout)
            if json.loads(made)["digest"] == wanted:
                return made
    return None


def _candidates(files: StoreFiles, data: bytes, teacher: Teacher) -> Iterator[tuple[StoreIdentity, StoreLayout]]:
    """The teacher's identity and every layout and capture that the arrays and the remains of store.json allow."""
    from ...pipeline.store import StoreLayout
    from ...pipeline.store.layout import PAIRS_PER_SHARD
    from ..cache_teacher.teacher import DTYPES, store_identity

    text = data.decode("utf-8", "replace")

    def numbers(name: str, *others: int) -> list[int]:
        said = re.search(rf'"{name}"\s*:\s*([0-9]{{1,10}})\b', text)
        return list(dict.fromkeys([*([int(said[1])] if said else []), *others]))

    token_chunk, token_dtype = _chunk_and_dtype(files, "token_ids") or (None, None)
    row_chunks = [chunk for path in ("logits",) if (chunk := (_chunk_and_dtype(files, path) or (None,))[0])]
    row_chunks += [
        chunk
        for name in ("hidden.cls", "hidden.mean")
        for layer in files.list(name)
        if (chunk := (_chunk_and_dtype(files, f"{name}/{layer}") or (None,))[0])
    ]
    identity = store_identity(teacher, max_length=1 << 30, dtype="float32")
    longest = teacher.max_tokens
    layouts = itertools.product(
        row_chunks[:1] or numbers("rows_per_shard", *ROWS_PER_SHARD),
        [token_chunk] if token_chunk else numbers("tokens_per_shard", 131072),
        [token_dtype] if token_dtype else ["uint16", "uint32"],
        numbers("batch_tokens", *BATCH_TOKENS),
        numbers("chunk_bytes", *CHUNK_BYTES),
        numbers("pairs_per_shard", PAIRS_PER_SHARD, 0),
    )
    lengths = numbers("max_length", 128, *range(1, min(longest, 8192) + 1))
    dtypes = sorted(DTYPES, key=lambda dtype: f'"{dtype}"' not in text)
    for (rows, tokens, token_type, batch, chunk, pairs), length, dtype in itertools.product(
        list(layouts), lengths, dtypes
    ):
        capture: Mapping[str, Any] = {**identity.capture, "max_length": length, "dtype": dtype}
        try:
            layout = StoreLayout(
                rows_per_shard=rows,
                tokens_per_shard=tokens,
                batch_tokens=batch,
                token_dtype=token_type,
                chunk_bytes=chunk,
                pairs_per_shard=pairs,
            )
        except KdError:
            continue
        yield dataclasses.replace(identity, capture=capture), layout


def _chunk_and_dtype(files: StoreFiles, path: str) -> tuple[int, str] | None:
    """(entries per shard, dtype) of an array, from its zarr.json."""
    try:
        metadata = json.loads(files.read(f"{path}/zarr.json"))
        return int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0]), str(metadata["data_type"])
    except (KdError, OSError, ValueError, KeyError, TypeError, IndexError):
        return None
