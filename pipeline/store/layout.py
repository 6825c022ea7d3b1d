"""Layout: where everything stands inside a store. Pure arithmetic and names; opens nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError, UsageError
from ..fingerprint import differing_fields
from .signal import ARRAY_NAMES, SEGMENT_IDS, TOKEN_IDS, ArraySpec, Axis

STORE_FORMAT = "kd-store"
STORE_VERSION = 1
STORE_FILE = "store.json"
GROUP_FILE = "zarr.json"
COMMITS = "commits"
INDEX = "index"
SIDECARS = "sidecars"
VIEWS = "views"
CLAIMS = "claims"
PAIRS_PER_SHARD = 1 << 24
"""What a capture gives the pair axis. Rows of up to 128 tokens then fill the other axes first, and a shard of scores of
12 heads stays below 403 MB a layer."""
MAX_PAIRS = 1 << 31
MAX_CHUNKS = 1 << 22
MAX_SHARDS = 10**8
"""Shard numbers have eight digits in file names."""


@dataclass(frozen=True)
class StoreLayout:
    """What is fixed when a store is created, so that the same rows always give the same bytes.

    Attributes:
        rows_per_shard: slots on the example axis that each shard owns.
        tokens_per_shard: slots on the token axis that each shard owns; the longest row must fit.
        pairs_per_shard: slots on the axis of token pairs, n * n for a row of n tokens; 0 for a store without.
        batch_tokens: token budget of one teacher batch. Batch composition moves results in the last bits, so a
            shard computed again must be batched as it was.
        token_dtype: "uint16", or "uint32" for vocabularies from 65535 on.
        chunk_bytes: the inner chunks of a shard file hold as many entries as fit in this and divide the shard.
    """

    rows_per_shard: int = 4096
    tokens_per_shard: int = 131072
    batch_tokens: int = 8192
    token_dtype: str = "uint16"
    chunk_bytes: int = 1 << 20
    pairs_per_shard: int = 0

    def __post_init__(self) -> None:
        limits = {
            "rows_per_shard": 1 << 24,
            "tokens_per_shard": 1 << 31,
            "batch_tokens": 1 << 31,
            "chunk_bytes": 1 << 31,
            "pairs_per_shard": MAX_PAIRS,
        }
        for name, limit in limits.items():
            value, least = getattr(self, name), 0 if name == "pairs_per_shard" else 1
            if type(value) is not int or not least <= value <= limit:
                raise UsageError(f"{name} must be {least} to {limit}, got {value!r}")
        if self.token_dtype not in ("uint16", "uint32"):
            raise UsageError(f"token_dtype must be uint16 or uint32, got {self.token_dtype!r}")

    @classmethod
    def for_vocabulary(cls, vocab_size: int, **fields: Any) -> StoreLayout:
        """The layout for token ids below `vocab_size`; further fields as in the constructor."""
        # The highest value of the dtype stays free: it fills the slots that hold no token.
        return cls(token_dtype="uint16" if vocab_size < 65535 else "uint32", **fields)

    def to_json(self) -> dict[str, Any]:
        """As in store.json; what is not there is not named."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    def require_equal(self, expected: StoreLayout, *, url: str) -> None:
        """Refuse unless both are equal; RefusedError with one line per differing field, the store's value first."""
        lines = differing_fields(self.to_json(), expected.to_json())
        if lines:
            raise RefusedError(
                f"store {url} was created with another layout (store → asked for)",
                details=lines,
                fix="leave these options out (the store keeps its own), or give another --store",
            )

    @property
    def input_specs(self) -> tuple[ArraySpec, ArraySpec]:
        """Of token_ids and segment_ids, which every shard has."""
        return ArraySpec(TOKEN_IDS, (), self.token_dtype), ArraySpec(SEGMENT_IDS, (), "uint8")

    def capacity(self, axis: Axis) -> int:
        """Slots per shard on an axis.

        Raises:
            RefusedError: the axis of token pairs, which this store was made without.
        """
        if axis == "pair" and not self.pairs_per_shard:
            raise RefusedError(
                "this store was made without room for pairs of tokens, which attention scores take",
                fix="capture attention.qkv instead, or give another --store",
            )
        return {"example": self.rows_per_shard, "token": self.tokens_per_shard, "pair": self.pairs_per_shard}[axis]

    def chunk_length(self, spec: ArraySpec) -> int:
        """Entries per inner chunk: the largest divisor of the shard's capacity that fits in `chunk_bytes`.

        A power of two when the capacity is one.
        """
        capacity = self.capacity(spec.axis)
        most = max(1, self.chunk_bytes // spec.entry_bytes)
        small = [length for length in range(1, math.isqrt(capacity) + 1) if capacity % length == 0]
        return max(length for length in (*small, *(capacity // other for other in small)) if length <= most)

    def num_chunks(self, spec: ArraySpec) -> int:
        """Inner chunks per shard, absent ones included.

        Raises:
            RefusedError: more than anybody would want: each takes 16 bytes of every shard file and of memory.
        """
        count = self.capacity(spec.axis) // self.chunk_length(spec)
        if count > MAX_CHUNKS:
            raise RefusedError(
                f"a shard file of {spec.signal} would have {count} inner chunks; {MAX_CHUNKS} are the most",
                details={f"{spec.axis} slots per shard": self.capacity(spec.axis), "chunk_bytes": self.chunk_bytes},
                fix="make the store with a number of slots per shard that has many divisors, such as a power of two",
            )
        return count

    def padded_length(self, spec: ArraySpec, entries: int) -> int:
        """Entries that a shard file with `entries` used slots holds: whole inner chunks."""
        chunk = self.chunk_length(spec)
        return -(-entries // chunk) * chunk

    def file_bytes(self, spec: ArraySpec, entries: int) -> int:
        """Size of a shard file with `entries` used slots: whole chunks, 16 bytes per chunk, a checksum of 4."""
        return self.padded_length(spec, entries) * spec.entry_bytes + 16 * self.num_chunks(spec) + 4

    def shard_file(self, spec: ArraySpec, shard: int) -> str:
        """Path of a shard file inside the store, as Zarr's default chunk keys have it."""
        return shard_file(spec.path, len(spec.shape), shard)

    def array_metadata(self, spec: ArraySpec, num_shards: int) -> dict[str, Any]:
        """The array's zarr.json (Zarr v3), declared long enough for `num_shards`."""
        chunk = [self.chunk_length(spec), *spec.shape]
        bytes_codec: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        inner_codec = bytes_codec if spec.itemsize > 1 else {"name": "bytes"}
        capacity = self.capacity(spec.axis)
        return {
            "shape": [num_shards * capacity, *spec.shape],
            "data_type": spec.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [capacity, *spec.shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if spec.dtype.startswith("float") else int(fill_value(spec)),
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": chunk,
                        "codecs": [inner_codec],
                        "index_codecs": [bytes_codec, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {
                "kd": {"signal": str(spec.signal), "encoding": spec.encoding}
                | ({"part": spec.part} if spec.part else {})
            },
            "dimension_names": list(spec.dims),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def fill_value(spec: ArraySpec) -> npt.NDArray[Any]:
    """What slots without a row read as: NaN, the highest value of an id's dtype, or the code that int8 never uses."""
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return np.asarray(np.nan, dtype=dtype)
    return np.asarray(np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max, dtype=dtype)


def group_metadata() -> dict[str, Any]:
    """zarr.json of a group."""
    return {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """A zarr.json as it stands on disk."""
    return json.dumps(metadata, indent=2).encode()


def shard_file(array: str, num_dims: int, shard: int) -> str:
    """`hidden.tok/06/c/3/0`: the file of shard 3 of an array with `num_dims` trailing dimensions."""
    return "/".join([array, "c", str(shard), *["0"] * num_dims])


_SHARD_FILE = re.compile(r"([a-z0-9_.]+(?:/[0-9]{2,3})?)/c/(0|[1-9][0-9]{0,7})(?:/0)*")


def parse_shard_file(name: str) -> tuple[str, int] | None:
    """(path of the array, shard) of the name of a shard file; None for any other name.

    >>> parse_shard_file("hidden.tok/06/c/3/0")
    ('hidden.tok/06', 3)
    """
    match = _SHARD_FILE.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


def array_label(path: str) -> str:
    """An array for people: `hidden.tok@6` for `hidden.tok/06`, `hidden.tok@6:int8` for `hidden.tok.int8.scale/06`."""
    folder, _, layer = path.partition("/")
    name, encoding, _ = ARRAY_NAMES.get(folder, (folder, None, ""))
    return name + (f"@{int(layer)}" if layer else "") + (f":{encoding}" if encoding else "")


def index_file(shard: int) -> str:
    """Path of a shard's row index inside the store."""
    return f"{INDEX}/{shard:08d}.parquet"


def record_file(shard: int, digest: str) -> str:
    """Path of a commit record inside the store."""
    return f"{COMMITS}/{shard:08d}.{digest}.json"


RECORD_NAME = re.compile(r"([0-9]{8})\.([0-9a-f]{32})\.json")
