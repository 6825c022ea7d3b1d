"""The axis of token pairs: n * n entries of a row of n tokens, which no shard boundary cuts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import RefusedError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import (
    ArraySpec,
    Signal,
    StoreIdentity,
    StoreLayout,
    TeacherStore,
    array_specs,
    create_or_open,
    open_store,
    row_keys,
)
from kd.pipeline.store.gc import collect_garbage
from kd.pipeline.store.merge import merge_stores
from kd.pipeline.store.plan import plan_bytes, plan_shards

SCORES, MAPS, TOKENS = Signal("attention.score", 2), Signal("attention.qkv", 2), Signal("hidden.tok", 2)
LAYOUT = StoreLayout(rows_per_shard=8, tokens_per_shard=64, chunk_bytes=64, pairs_per_shard=200)
SHAPES = {"attention.score": (2,), "attention.qkv": (3, 4), "hidden.tok": (4,)}


def specs_of(*signals: Signal, encoding: str = "float16") -> tuple[ArraySpec, ...]:
    wanted = (Signal(signal.name, signal.layer, encoding) for signal in signals)
    return tuple(spec for signal in wanted for spec in array_specs(signal, SHAPES[signal.name]))


SPECS = specs_of(SCORES, MAPS, TOKENS)


def said_of(signal: Signal, ids: np.ndarray) -> np.ndarray:
    """What the teacher says of a row: integers that float16 holds; of a pair, they tell which token attends."""
    ids = ids.astype(np.int64) % 1000
    if signal.kind.axis == "pair":
        first = np.stack([ids[:, None] + np.zeros_like(ids), 2 * np.add.outer(ids, -ids) + 1], axis=-1)
        return first.reshape(-1, 2).astype(np.float32)
    parts = np.stack([ids, ids + 1, ids % 7, np.arange(len(ids))], axis=1).astype(np.float32)
    return parts if signal.name == "hidden.tok" else np.stack([parts, parts + 3, -parts], axis=1)


def capture(store: TeacherStore, specs: Sequence[ArraySpec] = SPECS) -> None:
    for shard, todo in store.missing(store.declare(specs)).items():
        ids = store.read_tokens(shard).token_ids
        writer = store.writer(shard, todo)
        slots = np.arange(len(ids))[::-1]
        for signal in dict.fromkeys(spec.signal for spec in todo):
            writer.put(signal, slots, np.concatenate([said_of(signal, ids[slot]) for slot in slots.tolist()]))
        writer.commit()


@pytest.fixture
def make(tmp_path: Path, identity: StoreIdentity, tools):
    def make(name: str = "store", rows: Sequence[int] = range(30), specs=SPECS, layout=LAYOUT):
        store = create_or_open(tmp_path / name, identity, layout)
        ids, segments = tools.make_rows(60)
        ids, segments = ids.take([*rows]), segments.take([*rows])
        placed = store.allocate(ids, segments)
        capture(store, specs)
        return store, ids, placed.rows

    return make


def check(store: TeacherStore, ids: Ragged, rows: np.ndarray, order: Sequence[int]) -> None:
    values, lengths = store.reader().gather_pairs(SCORES, rows[[*order]])
    assert values.shape == (len(order), lengths.max(initial=0), lengths.max(initial=0), 2)
    for place, row in enumerate(order):
        n = int(lengths[place])
        np.testing.assert_array_equal(values[place, :n, :n].reshape(-1, 2), said_of(SCORES, ids[row]))
        rest = values[place].copy()
        rest[:n, :n] = 0
        assert not rest.any()


def test_rows_come_back_padded_in_any_order(make) -> None:
    store, ids, rows = make()
    check(store, ids, rows, np.random.default_rng(0).permutation(30).tolist())
    check(store, ids, rows, [3, 3, 0])
    check(store, ids, rows, [])


def test_maps_of_tokens_have_two_dimensions(make) -> None:
    store, ids, rows = make()
    values, lengths = store.reader().gather_tokens(MAPS, rows)
    for row, n in enumerate(lengths.tolist()):
        np.testing.assert_array_equal(values[row, :n], said_of(MAPS, ids[row]))


def test_shards_that_cannot_be_mapped_give_the_same(make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids, rows = make()
    monkeypatch.setattr("kd.pipeline.store.reader.SUPPORTED", False)
    check(store, ids, rows, np.random.default_rng(1).permutation(30).tolist())


def test_shards_of_several_encodings_come_as_one_batch(make, tmp_path: Path) -> None:
    store, ids, rows = make(specs=specs_of(SCORES, encoding="float32"))
    capture(store, specs_of(SCORES, MAPS, encoding="int8"))
    reader = store.reader()
    exact, _ = reader.gather_pairs(SCORES, rows)
    coded, _ = reader.gather_pairs("attention.score@2:int8", rows)
    assert exact.dtype == coded.dtype == np.float32
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(exact - coded) <= largest / 253.9).all() and not np.array_equal(exact, coded)
    maps, lengths = reader.gather_tokens("attention.qkv@2:int8", rows)
    for row, n in enumerate(lengths.tolist()):
        expected = said_of(MAPS, ids[row])
        bound = np.abs(expected).max(axis=(1, 2), keepdims=True) / 253.9
        assert (np.abs(maps[row, :n] - expected) <= bound).all()


def test_xarray_opens_the_group(make) -> None:
    store, *_ = make()
    group = xarray.open_zarr(store.url, group="attention.score", consolidated=False)
    assert group["02"].dims == ("pair", "head")


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), max_size=40), st.integers(100, 300))
def test_a_shard_is_closed_when_its_pairs_would_overflow(lengths: list[int], pairs: int) -> None:
    layout = StoreLayout(rows_per_shard=8, tokens_per_shard=64, pairs_per_shard=pairs)
    shards = plan_shards(lengths, layout)
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(len(lengths)))
    for shard in shards:
        assert shard.pairs == sum(n * n for n in lengths[shard.start : shard.stop]) <= pairs
    for shard in shards[:-1]:
        following = lengths[shard.stop]
        assert shard.rows == 8 or shard.tokens + following > 64 or shard.pairs + following**2 > pairs


def test_a_row_with_more_pairs_than_a_shard_is_named() -> None:
    with pytest.raises(RefusedError, match="row 1 has more pairs of tokens than a shard's 200"):
        plan_shards([3, 15], LAYOUT)


def test_planned_bytes_are_the_bytes_written(make) -> None:
    store, *_ = make()
    planned = plan_bytes(store.layout, SPECS, store.shard_sizes(range(store.catalogue().num_shards)))
    assert planned == {signal: said["bytes"] for signal, said in store.inspect()["signals"].items() if "@" in signal}


def test_index_and_records_say_where_pairs_begin(make) -> None:
    store, ids, _ = make()
    start = 0
    for record in store.catalogue().allocations:
        table = pq.read_table(Path(store.url) / f"index/{record.shard:08d}.parquet")
        lengths = ids.lengths[start : start + record.rows]
        assert table.column("pair_start").to_pylist() == (np.cumsum(lengths**2) - lengths**2).tolist()
        assert record.pairs == (lengths**2).sum() == json.loads(record.encode())["pairs"]
        start += record.rows


def test_a_store_without_pairs_names_none_and_refuses_scores(make, tools) -> None:
    store, _, rows = make(specs=specs_of(MAPS, TOKENS), layout=tools.layout)
    assert "pairs_per_shard" not in json.loads((Path(store.url) / "store.json").read_text())["layout"]
    assert b"pairs" not in store.catalogue().allocations[0].encode()
    assert open_store(store.url).reader().gather_tokens(MAPS, rows)[0].any()
    with pytest.raises(RefusedError, match="without room for pairs of tokens"):
        store.declare(specs_of(SCORES))


def test_verify_names_damaged_scores(make) -> None:
    store, *_ = make()
    assert store.verify().ok
    file = Path(store.url) / "attention.score/02/c/1/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    assert [problem.signal for problem in store.verify().problems] == ["attention.score@2"]


def test_a_merge_puts_pairs_together_row_by_row(make) -> None:
    source, ids, _ = make("source", range(5, 40))
    target, *_ = make("target", range(20), specs=specs_of(TOKENS))
    whole, *_ = make("whole", range(20))
    merge_stores(target, [source, whole])
    assert target.verify().ok
    check(target, ids, target.lookup(row_keys(ids, source_segments(source, ids))), range(35))


def source_segments(store: TeacherStore, ids: Ragged) -> Ragged:
    rows = [store.read_tokens(shard) for shard in range(store.catalogue().num_shards)]
    return Ragged.concatenate([shard.segment_ids for shard in rows])


def test_what_no_view_needs_is_collected_and_the_rest_reads_on(make, tmp_path: Path) -> None:
    store, ids, rows = make()
    shards = range(store.catalogue().num_shards)
    fingerprint = "ab" * 16
    store.enter_view(
        fingerprint, tmp_path / "view", corpus={"name": "c"}, signals=[SPECS[0]], num_rows=30, shards=shards
    )
    (tmp_path / "view").mkdir()
    write_manifest(tmp_path / "view", {"kind": "view", "fingerprint": fingerprint})
    collect_garbage(store, delete=True)
    store = open_store(store.url)
    assert {path for path in store.catalogue().files if "@" in path or "." in path} == {"attention.score/02"}
    assert store.verify().ok
    check(store, ids, rows, range(30))


def test_a_value_that_does_not_fit_is_named_by_its_two_tokens(make) -> None:
    store, ids, _ = make(specs=specs_of(TOKENS))
    specs = store.declare(specs_of(SCORES))
    writer = store.writer(0, specs)
    values = said_of(SCORES, ids[0])
    n = int(ids.lengths[0])
    values[n + 1, 1] = 1e6
    with pytest.raises(RefusedError, match=r"slot 0, tokens 1 and 1\) does not fit float16"):
        writer.put_pairs(SCORES, [0], values)
    with pytest.raises(RefusedError, match="one entry per pair"):
        writer.put_tokens(SCORES, [0], values)
