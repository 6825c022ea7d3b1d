"""docs/store-format.md is enough to read a store: a reader written from that page alone, and a digest kept by hand.

`FormatReader` uses nothing of kd. If it breaks, the format changed: raise `STORE_VERSION`, and say so in the docs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import zarr

from kd.pipeline.store import Signal, array_specs
from kd.pipeline.store.records import FileRecord, hash_parts
from kd.pipeline.store.writer import shard_parts


class FormatReader:
    """Reads a store with numpy, zarr and pyarrow, by docs/store-format.md."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        described = json.loads((self.folder / "store.json").read_text())
        store = described.pop("digest")
        assert (described["format"], described["version"], store) == ("kd-store", 1, blake(canonical(described)))
        self.layout, written, self.files, self.rows = described["layout"], {}, {}, {}
        for path in (self.folder / "commits").iterdir():
            if path.suffix == ".json":
                written[path.name] = path.read_bytes()
            else:
                assert path.stem == blake(path.read_bytes())
                written |= {row["name"]: row["record"] for row in pq.read_table(path).to_pylist()}
        records = {blake(data): json.loads(data) for data in written.values()}
        assert {f"{record['shard']:08d}.{digest}.json" for digest, record in records.items()} == set(written)
        gone = {(old, a["array"]) for r in records.values() for old in r.get("supersedes", ()) for a in r["arrays"]}
        for digest, record in records.items():
            assert record["store"] == store and ("index" in record or record["allocation"] in records)
            for array in record["arrays"]:
                if (digest, array["array"]) not in gone:
                    self.files[array["array"], record["shard"]] = array
            for row in pq.read_table(self.checked(record["index"])).to_pylist() if "index" in record else ():
                place = record["shard"], row["row_slot"], row["token_start"], row["num_tokens"]
                self.rows[row["row_key"]] = place

    def checked(self, file: dict) -> Path:
        data = (self.folder / file["file"]).read_bytes()
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (file["bytes"], file["xxh3_128"])
        return self.folder / file["file"]

    def key(self, token_ids: list[int], segment_ids: list[int]) -> bytes:
        head = struct.pack(f"<8sQ{len(token_ids)}I", b"kd-row-1", len(token_ids), *token_ids)
        return hashlib.blake2b(head + bytes(segment_ids), digest_size=16).digest()

    def stored(self, array: str, key: bytes) -> np.ndarray:
        """The numbers of one row in one array: [...] or [tokens, ...]."""
        shard, slot, start, length = self.rows[key]
        self.checked(self.files[array, shard])  # KeyError: not captured; zarr would read fill values
        numbers = zarr.open_array(self.folder / array, mode="r")
        if numbers.metadata.dimension_names[0] == "example":
            return numbers[shard * self.layout["rows_per_shard"] + slot]
        first = shard * self.layout["tokens_per_shard"] + start
        return numbers[first : first + length]

    def read(self, signal: str, key: bytes) -> np.ndarray:
        """What the teacher said for one row (`hidden.tok/06`), float32, from the most exact encoding of its shard."""
        name, slash, layer = signal.partition("/")
        for encoding in ("float32", "float16", "int8"):
            for place in (name, f"{name}.{encoding}"):
                if self.files.get((place + slash + layer, self.rows[key][0]), {}).get("encoding") == encoding:
                    numbers = self.stored(place + slash + layer, key).astype(np.float32)
                    scale = self.stored(f"{place}.scale{slash}{layer}", key)[..., None] if encoding == "int8" else 1
                    return numbers * np.float32(scale)
        raise KeyError(signal)


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def require_equal(reader: FormatReader, ids, segments, tools) -> None:
    for i in range(len(ids)):
        key = reader.key(ids[i].tolist(), segments[i].tolist())
        one = ids.slice(i, i + 1), segments.slice(i, i + 1)
        assert reader.stored("token_ids", key).tolist() == ids[i].tolist()
        assert reader.stored("segment_ids", key).tolist() == segments[i].tolist()
        for spec in tools.specs:
            expected = tools.answer(spec, *one)
            np.testing.assert_array_equal(
                reader.read(spec.path, key), expected if spec.axis == "token" else expected[0]
            )


@pytest.mark.parametrize("compacted", [False, True])
def test_a_reader_written_from_the_docs_reads_every_row(make_store, tools, compacted: bool) -> None:
    store, ids, segments, _ = make_store(20)
    if compacted:
        store.compact()
        assert {path.suffix for path in Path(store.url, "commits").iterdir()} == {".parquet"}
    reader = FormatReader(store.url)
    assert len(reader.rows) == 20
    require_equal(reader, ids, segments, tools)


def test_the_reader_has_sixty_lines() -> None:
    lines, _ = inspect.getsourcelines(FormatReader)
    helpers = [inspect.getsourcelines(function)[0] for function in (blake, canonical)]
    assert len(lines) + sum(map(len, helpers)) <= 66 and sum(bool(line.strip()) for line in lines) <= 60


def test_the_reader_takes_the_most_exact_encoding_of_a_shard(make_store, tools) -> None:
    """int8 alone in one shard, float32 as well in another."""
    store, ids, segments, rows = make_store(20, specs=())
    signal = Signal("hidden.tok", 2)
    kept = {}
    for encoding, shards in (("int8", (0, 1, 2)), ("float32", (1,)), ("float16", (2,))):
        specs = store.declare(array_specs(Signal("hidden.tok", 2, encoding), 4))
        for shard in shards:
            held = store.read_tokens(shard)
            values = np.sin(np.arange(4 * len(held.token_ids.values), dtype=np.float32)).reshape(-1, 4)
            writer = store.writer(shard, specs)
            writer.put_tokens(signal, np.arange(len(held.rows)), values)
            writer.commit()
            kept[shard] = encoding
    reader = FormatReader(store.url)
    for i, row in enumerate(rows):
        key = reader.key(ids[i].tolist(), segments[i].tolist())
        expected, _ = store.reader().gather_tokens(Signal("hidden.tok", 2, kept[reader.rows[key][0]]), [row])
        np.testing.assert_array_equal(reader.read("hidden.tok/02", key), expected[0].astype(np.float32))
    assert set(kept.values()) == {"int8", "float32", "float16"}


def test_the_reader_leaves_out_what_is_superseded(make_store, tools) -> None:
    store, ids, segments, _ = make_store(20)
    old = next(record for record in store.shard_records(0) if record.index is None)
    spec = next(spec for spec in tools.specs if str(spec.signal) == "logits")
    parts = shard_parts(store.layout, spec, np.full((old.rows, 3), 7, dtype=np.float32))
    store.files.write("logits/c/0/0", parts)
    new = replace(old, files=(FileRecord(spec, 0, *hash_parts(parts)),), supersedes=(old.digest,))
    store.files.create(new.file, new.encode())
    reader = FormatReader(store.url)
    key = reader.key(ids[0].tolist(), segments[0].tolist())
    assert reader.read("logits", key).tolist() == [7, 7, 7]
    expected = tools.answer(tools.specs[-1], ids.slice(0, 1), segments.slice(0, 1))
    np.testing.assert_array_equal(reader.read(tools.specs[-1].path, key), expected)


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
