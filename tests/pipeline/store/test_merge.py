"""A merge brings every row and signal of its sources, each row once, and leaves the sources as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import RefusedError, VerificationError
from kd.pipeline.store import (
    Signal,
    StoreIdentity,
    TeacherStore,
    array_spec,
    array_specs,
    create_or_open,
    open_store,
    row_keys,
)
from kd.pipeline.store.merge import merge_stores

Make = Callable[..., TeacherStore]


@pytest.fixture
def make(tmp_path: Path, identity: StoreIdentity, tools) -> Make:
    """`make(name, rows, specs)`: a store of some of 60 rows."""

    def make(name: str, rows: Sequence[int], specs=tools.specs) -> TeacherStore:
        store = create_or_open(tmp_path / name, identity, tools.layout)
        ids, segments = tools.make_rows(60)
        if len(rows):
            store.allocate(ids.take([*rows]), segments.take([*rows]))
        tools.capture(store, specs)
        return store

    return make


def check(store: TeacherStore, tools, rows: Sequence[int], specs) -> None:
    """The store holds these rows, each once, with what the teacher says of them."""
    ids, segments = tools.make_rows(60)
    ids, segments = ids.take([*rows]), segments.take([*rows])
    store = open_store(store.url)
    report = store.verify()
    assert report.ok and not report.unrecorded
    assert store.inspect()["rows"] == len(rows)
    numbers = store.lookup(row_keys(ids, segments))
    assert (numbers >= 0).all()
    reader = store.reader()
    for spec in specs:
        if spec.axis == "example":
            np.testing.assert_array_equal(reader.gather(spec.signal, numbers), tools.answer(spec, ids, segments))
        else:
            values, lengths = reader.gather_tokens(spec.signal, numbers)
            found = np.concatenate([values[i, :n] for i, n in enumerate(lengths)])
            np.testing.assert_array_equal(found, tools.answer(spec, ids, segments))


def test_shards_of_new_rows_are_copied_byte_for_byte(make: Make, tmp_path: Path, tools) -> None:
    one, two, target = make("one", range(20)), make("two", range(20, 45)), make("target", [])
    sources = tools.tree(tmp_path / "one"), tools.tree(tmp_path / "two")
    done = merge_stores(target, [one, two])
    check(target, tools, range(45), tools.specs)
    shards = one.catalogue().num_shards, two.catalogue().num_shards
    assert (done.shards_copied, done.shards_packed, done.files_packed) == (sum(shards), 0, 0)
    assert done.files_copied == sum(shards) * len(tools.specs) and done.incomplete == {}
    assert (done.rows_new, done.rows_known) == ({one.url: 20, two.url: 25}, {one.url: 0, two.url: 0})
    for name in ("token_ids/c/{}", "index/{:08d}.parquet", "logits/c/{}/0", "hidden.tok/02/c/{}/0"):
        mine = Path(target.url, name.format(shards[0] + 1)).read_bytes()
        assert mine == Path(two.url, name.format(1)).read_bytes()
    assert (tools.tree(tmp_path / "one"), tools.tree(tmp_path / "two")) == sources


def test_a_merge_into_an_empty_store_has_the_digest_of_its_one_source(make: Make, tools) -> None:
    source = make("source", range(33))
    source.put_sidecar("embeddings", {"word": np.arange(6, dtype=np.float32)}, {"why": "test"})
    source.put_file_sidecar("config", Path(source.url, "hidden.tok", "01"))
    target = make("target", [], specs=())
    merge_stores(target, [source])
    assert target.digest() == source.digest()
    assert target.sidecar_metadata("embeddings") == {"why": "test"}
    assert (target.sidecar_folder("config") / "zarr.json").exists()


def test_rows_that_are_known_are_not_stored_twice(make: Make, tmp_path: Path, tools) -> None:
    target, one, two = make("target", range(13)), make("one", range(6, 30)), make("two", [*range(40, 50), 29, 3])
    before = {name: data for name, data in tools.tree(tmp_path / "target").items() if not name.endswith("zarr.json")}
    done = merge_stores(target, [one, two])
    check(target, tools, [*range(30), *range(40, 50)], tools.specs)
    assert done.rows_known == {one.url: 7, two.url: 2} and done.rows_new == {one.url: 17, two.url: 10}
    assert done.shards_packed > 0 and done.files_packed > 0
    after = tools.tree(tmp_path / "target")
    assert {name: after[name] for name in before} == before


def test_the_same_merge_again_writes_nothing(make: Make, tmp_path: Path, tools) -> None:
    target, source = make("target", range(13)), make("source", range(6, 30))
    merge_stores(target, [source])
    before = tools.tree(tmp_path)
    done = merge_stores(open_store(target.url), [source])
    assert tools.tree(tmp_path) == before
    assert (done.rows_new[source.url], done.files_copied, done.files_packed) == (0, 0, 0)


def test_signals_that_the_target_lacks_are_filled_in_from_wherever_they_are(make: Make, tools) -> None:
    logits, rest = tools.specs[:1], tools.specs[1:]
    target = make("target", range(20), logits)
    merge_stores(target, [make("one", range(11), rest), make("two", range(11, 20), rest)])
    check(target, tools, range(20), tools.specs)


def test_signals_that_nobody_has_for_some_rows_are_reported_and_captured_later(make: Make, tools) -> None:
    target = make("target", range(20))
    digest_of_all = make("reference", [*range(20), *range(20, 36)]).digest()
    done = merge_stores(target, [make("source", range(20, 36), tools.specs[:2])])
    assert set(done.incomplete) == {"hidden.tok/01", "hidden.tok/02"}
    assert target.inspect()["incomplete"] == done.incomplete
    with pytest.raises(RefusedError, match="was not captured for"):
        target.reader().gather_tokens("hidden.tok@1", np.arange(24, 26))
    tools.capture(target)
    check(target, tools, range(36), tools.specs)
    assert digest_of_all != ""


def test_a_store_of_another_teacher_is_refused_field_by_field_and_nothing_is_written(
    make: Make, tmp_path: Path, identity: StoreIdentity, tools
) -> None:
    target, sound = make("target", range(5)), make("sound", range(10))
    other = create_or_open(tmp_path / "other", replace(identity, capture={"max_length": 64, "dtype": "float32"}))
    before = tools.tree(tmp_path)
    with pytest.raises(RefusedError) as refused:
        merge_stores(target, [sound, other])
    assert "capture.max_length: 64 → 128" in str(refused.value) and other.url in str(refused.value)
    wide = create_or_open(tmp_path / "wide", identity, replace(tools.layout, rows_per_shard=16))
    with pytest.raises(RefusedError, match="rows_per_shard: 16 → 8"):
        merge_stores(target, [sound, wide])
    with pytest.raises(RefusedError, match="is source and target"):
        merge_stores(target, [sound, open_store(target.url)])
    after = tools.tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before and not name.startswith("wide/")} == set()


def test_signals_stored_in_another_way_are_refused_and_nothing_is_written(make: Make, tmp_path: Path, tools) -> None:
    target = make("target", range(5))
    source = make("source", range(10), [array_spec(Signal("hidden.tok", 1), 4, dtype="float32")])
    before = tools.tree(tmp_path)
    with pytest.raises(RefusedError, match=r"hidden\.tok/01: float32 \[4\] in .*, float16 \[4\] in "):
        merge_stores(target, [source])
    assert tools.tree(tmp_path) == before


@pytest.mark.parametrize("rows", [range(20, 40), range(8, 40)], ids=["copied", "packed"])
@pytest.mark.parametrize("damage", ["flip", "delete", "truncate"])
def test_a_damaged_source_is_named_and_the_target_stays_sound(make: Make, tools, rows: range, damage: str) -> None:
    target, source = make("target", range(13)), make("source", rows)
    path = Path(source.url, "hidden.tok/02/c/1/0")
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.unlink()
    if damage != "delete":
        path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-1]))
    with pytest.raises(VerificationError, match=r"hidden\.tok@2, shard 1 of source .*hidden\.tok/02/c/1/0"):
        merge_stores(target, [source])
    assert open_store(target.url).verify().ok
    shutil.rmtree(source.url)
    merge_stores(target, [make("source", rows)])
    check(target, tools, range(40) if len(rows) == 32 else [*range(13), *rows], tools.specs)


def test_rows_allocated_by_another_process_meanwhile_are_not_stored_twice(
    make: Make, tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = make("target", range(8)), make("source", range(8, 40))
    ids, segments = tools.make_rows(60)
    adopt = TeacherStore.adopt

    def late(store: TeacherStore, shards) -> tuple:
        if store.index().lookup(row_keys(ids.take([9]), segments.take([9]))) < 0:
            open_store(target.url).allocate(ids.take([9]), segments.take([9]))
        return adopt(store, shards)

    monkeypatch.setattr(TeacherStore, "adopt", late)
    merge_stores(target, [source])
    check(target, tools, range(40), tools.specs)


def test_further_encodings_are_merged_where_they_stand(make: Make, tmp_path: Path, tools) -> None:
    """int8 sorts before the plain path and stays beside it; packed shards keep codes with their scales."""
    sources = [make("one", range(0, 20)), make("two", range(15, 33))]
    for store in sources:
        tools.capture(store, array_specs(Signal("hidden.tok", 2, "int8"), 4))
    target = make("target", range(10, 25), specs=())
    merge_stores(target, sources)
    check(target, tools, [*range(10, 25), *range(10), *range(25, 33)], tools.specs)
    paths = {path for path in target.declared() if path.startswith("hidden.tok")}
    assert paths == {"hidden.tok/01", "hidden.tok/02", "hidden.tok.int8/02", "hidden.tok.int8.scale/02"}
    ids, segments = tools.make_rows(60)
    for store in (target, sources[0]):
        numbers = store.lookup(row_keys(ids.take([*range(20)]), segments.take([*range(20)])))
        values, lengths = store.reader().gather_tokens("hidden.tok@2:int8", numbers)
        exact, _ = store.reader().gather_tokens("hidden.tok@2", numbers)
        assert (np.abs(values - exact) <= np.abs(exact).max(axis=-1, keepdims=True) / 254 * 1.001).all()
        assert lengths.all()
