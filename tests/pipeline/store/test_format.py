"""docs/store-format.md is enough to read a store: a reader written from that page alone, and a digest kept by hand.

`FormatReader` imports nothing of kd. If it breaks, the format changed: raise `STORE_VERSION`, and say so in the docs.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import zarr


class FormatReader:
    """Reads a store with numpy, zarr and pyarrow, by docs/store-format.md."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        described = json.loads((self.folder / "store.json").read_text())
        assert (described["format"], described["version"]) == ("kd-store", 1)
        digest = described.pop("digest")
        assert digest == hashlib.blake2b(canonical(described), digest_size=16).hexdigest()
        self.layout, self.allocations, self.files = described["layout"], {}, {}
        commits = []
        for path in sorted((self.folder / "commits").iterdir()):
            data = path.read_bytes()
            number, record_digest, _ = path.name.split(".")
            assert record_digest == hashlib.blake2b(data, digest_size=16).hexdigest()
            record = json.loads(data)
            assert data == canonical(record) + b"\n"
            assert record["store"] == digest and record["shard"] == int(number)
            if "index" in record:
                self.allocations[record["shard"]] = (record_digest, record)
            commits.append(record)
        for record in commits:
            assert "index" in record or record["allocation"] == self.allocations[record["shard"]][0]
            for array in record["arrays"]:
                self.files[array["array"], record["shard"]] = array
        self.rows = {}  # row key -> (shard, slot, first token, number of tokens)
        for shard, (_, record) in self.allocations.items():
            index = self.checked(record["index"])
            for row in pq.read_table(index).to_pylist():
                place = row["row_slot"], row["token_start"], row["num_tokens"]
                self.rows[row["row_key"]] = (shard, *place)

    def checked(self, file: dict) -> Path:
        path = self.folder / file["file"]
        data = path.read_bytes()
        assert len(data) == file["bytes"] and xxhash.xxh3_128_hexdigest(data) == file["xxh3_128"]
        assert "head" not in file or xxhash.xxh3_128_hexdigest(data[:4096]) == file["head"]
        return path

    def key(self, token_ids: list[int], segment_ids: list[int]) -> bytes:
        parts = [b"kd-row-1", struct.pack("<Q", len(token_ids)), struct.pack(f"<{len(token_ids)}I", *token_ids)]
        return hashlib.blake2b(b"".join([*parts, bytes(segment_ids)]), digest_size=16).digest()

    def read(self, array: str, key: bytes) -> np.ndarray:
        """What the teacher said in `array` for one row: [...] or [tokens, ...]."""
        shard, slot, start, length = self.rows[key]
        self.checked(self.files[array, shard])  # KeyError: not captured; zarr would read fill values
        stored = zarr.open_array(self.folder / array, mode="r")
        if stored.metadata.dimension_names[0] == "example":
            return stored[shard * self.layout["rows_per_shard"] + slot]
        first = shard * self.layout["tokens_per_shard"] + start
        return stored[first : first + length]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_a_reader_written_from_the_docs_reads_every_row(make_store, tools) -> None:
    store, ids, segments, _ = make_store(20)
    reader = FormatReader(store.url)
    assert len(reader.rows) == 20
    for i in range(len(ids)):
        key = reader.key(ids[i].tolist(), segments[i].tolist())
        one = ids.slice(i, i + 1), segments.slice(i, i + 1)
        assert reader.read("token_ids", key).tolist() == ids[i].tolist()
        assert reader.read("segment_ids", key).tolist() == segments[i].tolist()
        for spec in tools.specs:
            expected = tools.answer(spec, *one)
            np.testing.assert_array_equal(
                reader.read(spec.path, key), expected if spec.axis == "token" else expected[0]
            )


def test_bytes_can_be_read_where_the_docs_say_they_are(make_store, tools) -> None:
    """Without zarr: entry e of a shard is at e times its size."""
    store, ids, segments, rows = make_store(20)
    reader = FormatReader(store.url)
    shard, _, start, length = reader.rows[reader.key(ids[7].tolist(), segments[7].tolist())]
    file = reader.files["hidden.tok/02", shard]
    data = (reader.folder / file["file"]).read_bytes()
    entry = np.dtype(file["dtype"]).itemsize * int(np.prod(file["shape"]))
    values = np.frombuffer(data[start * entry : (start + length) * entry], dtype="<f2").reshape(length, *file["shape"])
    np.testing.assert_array_equal(values, store.reader().gather_tokens("hidden.tok@2", rows[[7]])[0][0])


def test_the_digest_of_a_known_store_never_changes(make_store, tools) -> None:
    """Changes when the same rows would be stored differently: then raise STORE_VERSION, and copy what this prints."""
    store, *_ = make_store(20)
    store.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32).reshape(2, 3)})
    golden = Path(__file__).parents[2] / "golden" / "store_digest.json"
    assert {"digest": store.digest(), "store_digest": store.store_digest} == json.loads(golden.read_text())


def test_the_docs_name_every_field_of_a_record_and_every_column_of_the_index(make_store) -> None:
    page = (Path(__file__).parents[3] / "docs" / "store-format.md").read_text()
    store, *_ = make_store(5)
    names = {"row_key", "row_slot", "token_start", "num_tokens"}

    def collect(value: object) -> None:
        if isinstance(value, dict):
            names.update(value)
            for item in value.values():
                collect(item)
        elif isinstance(value, list) and value:
            collect(value[0])

    for record in store.shard_records(0):
        collect(json.loads(record.encode()))
    described = json.loads(Path(store.url, "store.json").read_text())
    names |= {*described, *described["layout"], *described["identity"]}
    missing = {name for name in names if not re.search(rf"`{re.escape(name)}`|\"{re.escape(name)}\"", page)}
    assert not missing


@pytest.mark.parametrize("fact", ["kd-row-1", "xxh3", "BLAKE2b", "crc32c", ".staging", ".lock", "record.json"])
def test_the_docs_name_what_a_reader_must_know(fact: str) -> None:
    assert fact in (Path(__file__).parents[3] / "docs" / "store-format.md").read_text()
