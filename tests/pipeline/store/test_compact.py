"""Compacted records are the same records in fewer files, for everyone who reads the store now or later."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import VerificationError
from kd.pipeline.store import TeacherStore, compact, compacted, create_or_open, open_store
from kd.pipeline.store import records as records_module
from kd.pipeline.store import store as store_module
from kd.pipeline.store.compacted import compacted_file, decode_compacted, digest_of, encode_compacted


@pytest.fixture
def store(make_store) -> TeacherStore:
    store, *_ = make_store(30)
    return store


def commits(store: TeacherStore) -> list[str]:
    return sorted(os.listdir(Path(store.url, "commits")))


def test_all_records_become_one_file_and_nothing_else_changes(store: TeacherStore, tmp_path: Path, tools) -> None:
    before, digest, catalogue = tools.tree(tmp_path), store.digest(), store.catalogue()
    done = store.compact()
    assert (done.records, len(done.removed), len(done.written)) == (len(catalogue.records),) * 2 + (1,)
    assert commits(store) == [Path(done.written[0]).name]
    after = tools.tree(tmp_path)
    assert {name: data for name, data in before.items() if "/commits/" not in name} == {
        name: data for name, data in after.items() if "/commits/" not in name
    }
    again = open_store(store.url)
    assert again.digest() == digest == store.digest()
    assert again.catalogue() == catalogue == store.catalogue()
    report = again.verify()
    assert report.ok and not report.unrecorded
    assert store.compact() == compact.Compaction() and commits(store) == [Path(done.written[0]).name]


def test_a_compacted_file_holds_the_exact_bytes_of_the_records(store: TeacherStore) -> None:
    loose = {name: Path(store.url, "commits", name).read_bytes() for name in commits(store)}
    (written,) = store.compact().written
    table = pq.read_table(Path(store.url, written))
    assert dict(zip(table.column("name").to_pylist(), table.column("record").to_pylist(), strict=True)) == loose


def test_compacted_records_are_in_memory_once(store: TeacherStore) -> None:
    before = store.catalogue().records
    assert store._records._known
    store.compact()
    assert store.catalogue().records == before and not store._records._known


def test_a_store_grows_after_compaction_and_the_next_one_merges(store: TeacherStore, tools) -> None:
    store.compact()
    store.allocate(*tools.make_rows(20, seed=1))
    tools.capture(store)
    digest = store.digest()
    assert len(commits(store)) > 1
    store.compact()
    assert len(commits(store)) == 1
    assert open_store(store.url).digest() == digest and store.verify().ok
    rows = np.arange(8)
    np.testing.assert_array_equal(open_store(store.url).reader().gather("logits", rows).shape, (8, 3))


def test_full_files_stay_and_large_ones_are_split(store: TeacherStore, monkeypatch: pytest.MonkeyPatch, tools) -> None:
    monkeypatch.setattr(compact, "MAX_RECORDS", 3)
    digest, count = store.digest(), len(store.catalogue().records)
    done = store.compact()
    assert len(done.written) == -(-count // 3)
    assert open_store(store.url).digest() == digest
    full = {name for name in commits(store) if pq.read_metadata(Path(store.url, "commits", name)).num_rows == 3}
    store.allocate(*tools.make_rows(20, seed=1))
    store.compact()
    assert full <= set(commits(store)) and store.verify().ok


def test_a_record_that_stands_in_two_files_is_one_record(store: TeacherStore) -> None:
    loose = {name: Path(store.url, "commits", name).read_bytes() for name in commits(store)}
    catalogue = store.catalogue()
    store.compact()
    for name, data in loose.items():
        Path(store.url, "commits", name).write_bytes(data)
    again = open_store(store.url)
    assert again.catalogue() == catalogue and again.verify().ok and not again.verify().unrecorded
    again.compact()
    assert len(commits(store)) == 1


def test_readers_that_listed_before_the_compaction_list_again(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue, reader = store.catalogue(), store.reader()
    logits = reader.gather("logits", np.arange(16)).copy()
    late = open_store(store.url)
    listed = late.files.list("commits")
    store.compact()
    answers = iter([listed])
    list_now = late.files.list
    monkeypatch.setattr(late.files, "list", lambda name: next(answers, None) or list_now(name))
    assert late.catalogue() == catalogue
    np.testing.assert_array_equal(reader.gather("logits", np.arange(16)), logits)
    np.testing.assert_array_equal(reader.gather_tokens("hidden.tok@1", [20])[1], reader.lengths([20]))


def test_writers_that_were_at_work_during_the_compaction_commit(make_store, tools) -> None:
    store, *_ = make_store(20, specs=tools.specs[:1])
    spec = tools.specs[3]
    store.declare([spec])
    rows = store.read_tokens(0)
    writer = store.writer(0, [spec])
    writer.put_tokens(spec.signal, np.arange(len(rows.rows)), tools.answer(spec, rows.token_ids, rows.segment_ids))
    open_store(store.url).compact()
    assert writer.commit() is not None
    assert store.missing([spec], [0]) == {} and store.verify().ok


@pytest.mark.parametrize("way", ["opening", "allocating"])
def test_many_loose_records_are_compacted_by_the_way(
    make_store, monkeypatch: pytest.MonkeyPatch, tools, way: str
) -> None:
    store, *_ = make_store(30)
    digest = store.digest()
    monkeypatch.setattr(store_module, "LOOSE_RECORDS", len(commits(store)))
    create_or_open(store.url, store.identity)
    assert len(commits(store)) > 1
    monkeypatch.setattr(store_module, "LOOSE_RECORDS", len(commits(store)) - 1)
    if way == "opening":
        create_or_open(store.url, store.identity)
        assert store.digest() == digest
    else:
        store.allocate(*tools.make_rows(3))
    assert len(commits(store)) == 1


def test_every_flipped_byte_of_a_compacted_file_is_found(store: TeacherStore) -> None:
    (written,) = store.compact().written
    path = Path(store.url, written)
    before = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(before), 40):
        data = bytearray(before)
        data[place] ^= 4
        path.write_bytes(data)
        (problem, *_) = store.verify().problems
        assert problem.file == written and "edited or damaged" in problem.what
    path.write_bytes(before[:-1])
    assert "edited or damaged" in store.verify().problems[0].what
    path.unlink()
    assert not store.verify().ok or store.verify().unrecorded


def test_a_damaged_record_is_left_where_it_is_and_named(store: TeacherStore) -> None:
    path = Path(store.url, "commits", commits(store)[0])
    path.write_bytes(path.read_bytes() + b" ")
    done = open_store(store.url).compact()
    assert [problem.file for problem in done.problems] == [f"commits/{path.name}"]
    assert path.name in commits(store) and len(commits(store)) == 2


# --- what others may send ------------------------------------------------------------------------------------------


def parquet(names: list, records: list, **options) -> bytes:
    schema = options.pop("schema", None)
    table = pa.table({"name": names, "record": records}, schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "none", "use_dictionary": False} | options)
    return buffer.getvalue()


def repeated(count: int, value: bytes) -> bytes:
    """A file that unfolds to `count` times `value`, which it holds once."""
    record = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value], pa.binary()))
    fields = [compacted.SCHEMA.field("name"), pa.field("record", record.type, nullable=False)]
    names = pa.array([f"{number:08d}" for number in range(count)])
    return parquet(names, record, schema=pa.schema(fields), use_dictionary=["record"], store_schema=False)


HOSTILE = [
    (b"", "not Parquet"),
    (b"PAR1" * 50, "not Parquet"),
    (parquet([1, 2], [b"a", b"b"]), "expected name and record"),
    (parquet(["a", None], [b"a", b"b"]), "expected name and record"),
    (parquet(["a"], [["nested"]]), "expected name and record"),
    (parquet(["a"], [b"x"], schema=compacted.SCHEMA, compression="zstd"), "compressed with ZSTD"),
    (repeated(60_000, bytes(1 << 16)), "repeats a value"),
    (repeated(70_000, b"x"), "says it has 70000 records"),
    (parquet(["a", "b"], [b"x", b"y"], schema=compacted.SCHEMA, row_group_size=1), "2 row groups"),
    (parquet(["a", "a"], [b"x", b"y"], schema=compacted.SCHEMA), "repeats a value"),
    (parquet(["a"], [bytes(2 << 20)], schema=compacted.SCHEMA), "one above"),
    (parquet(["ü"], [b"x"], schema=compacted.SCHEMA), "not plain text"),
    (parquet(["../../x.json"], [b"x"], schema=compacted.SCHEMA), "name is not that of a record"),
    (parquet([f"00000000.{'0' * 32}.json"], [b"x"], schema=compacted.SCHEMA), "digest in its name"),
]


@pytest.mark.parametrize(("data", "words"), HOSTILE, ids=[words for _, words in HOSTILE])
def test_a_compacted_file_that_is_none_is_refused_for_what_is_wrong_with_it(
    store: TeacherStore, data: bytes, words: str
) -> None:
    name = compacted_file(data)
    Path(store.url, name).write_bytes(data)
    with pytest.raises(VerificationError, match="is damaged") as refused:
        open_store(store.url).catalogue()
    assert words in str(refused.value) and name in str(refused.value)
    assert any(words in problem.what for problem in store.verify().problems)


def test_a_record_for_another_store_in_a_compacted_file_is_refused(store: TeacherStore, make_store) -> None:
    record = store.catalogue().records[0]
    data = record.encode().replace(store.store_digest.encode(), b"0" * 32)
    forged = encode_compacted({f"00000000.{digest_of(data)}.json": data})
    Path(store.url, compacted_file(forged)).write_bytes(forged)
    with pytest.raises(VerificationError, match="belongs to another store"):
        open_store(store.url).catalogue()


def test_huge_compacted_files_are_refused_before_they_are_read(store: TeacherStore) -> None:
    (written,) = store.compact().written
    with open(Path(store.url, written), "r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(VerificationError, match="at most 67108864 are expected"):
        compact.RecordReader(store.files, store.store_digest, store.layout, fresh=True).catalogue()


def test_encoding_is_the_same_whatever_the_order_and_decodes_to_the_same() -> None:
    records = {f"{shard:08d}.{digest_of(bytes([shard]))}.json": bytes([shard]) * 9 for shard in range(5)}
    data = encode_compacted(records)
    assert data == encode_compacted(dict(reversed(records.items())))
    assert decode_compacted(data, name=Path(compacted_file(data)).name) == records


def test_the_quick_way_of_decoding_a_record_finds_what_the_slow_one_does(store: TeacherStore) -> None:
    for record in store.catalogue().records:
        arguments = record.encode(), record.shard, store.store_digest, store.layout
        assert records_module._decode_canonical(*arguments) == records_module._decode_json(*arguments) == record
