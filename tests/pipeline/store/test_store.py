"""A store gives every input one place for good, refuses what does not match it, and grows without rewriting."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import RefusedError, UsageError, VerificationError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import (
    InputRows,
    Signal,
    StoreIdentity,
    StoreLayout,
    array_spec,
    create_or_open,
    open_store,
    row_keys,
)


def test_equal_inputs_share_a_row_and_known_rows_keep_theirs(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    ids, segments = tools.make_rows(20)
    twice = ids.take([*range(20), 3, 3, 0])
    first = store.allocate(twice, segments.take([*range(20), 3, 3, 0]))
    assert (first.num_new, first.num_known, first.num_duplicates) == (20, 0, 3)
    assert first.rows[20:].tolist() == [first.rows[3], first.rows[3], first.rows[0]]
    assert len(set(first.rows.tolist())) == 20
    assert first.shards == first.shards_new == tuple(range(store.catalogue().num_shards))

    before = tools.tree(tmp_path)
    again = store.allocate(ids, segments)
    assert (again.num_new, again.num_known, again.shards_new) == (0, 20, ())
    np.testing.assert_array_equal(again.rows, first.rows[:20])
    assert tools.tree(tmp_path) == before


def test_an_overlapping_corpus_costs_its_unseen_rows_only(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    ids, segments = tools.make_rows(30)
    store.allocate(ids.slice(0, 18), segments.slice(0, 18))
    before = tools.tree(tmp_path)
    preview = store.preview(InputRows.of(store.layout, ids, segments))
    second = store.allocate(ids, segments)
    assert (preview.num_new, preview.num_known) == (second.num_new, second.num_known) == (12, 18)
    assert len(preview.planned) == len(second.shards_new)
    assert store.shard_sizes(second.shards_new) == preview.sizes
    after = tools.tree(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.endswith("zarr.json") for name in changed)  # arrays were declared longer, nothing else


def test_a_row_number_says_its_shard_and_slot(make_store) -> None:
    store, _, _, rows = make_store(30)
    for shard in range(store.catalogue().num_shards):
        inside = store.read_tokens(shard).rows
        assert inside.tolist() == list(range(shard * 8, shard * 8 + len(inside)))
    assert set(rows.tolist()) == {r for s in range(store.catalogue().num_shards) for r in store.read_tokens(s).rows}


def test_what_the_teacher_reads_comes_back_exactly(make_store) -> None:
    store, ids, segments, rows = make_store(30)
    shards = [store.read_tokens(shard) for shard in range(store.catalogue().num_shards)]
    place = {int(row): i for i, row in enumerate(np.concatenate([shard.rows for shard in shards]))}
    back = [place[int(row)] for row in rows]
    stored = Ragged.concatenate([shard.token_ids for shard in shards])
    assert stored.values.dtype == np.uint16
    assert stored.take(back) == Ragged(ids.values.astype(np.uint16), ids.offsets)
    assert Ragged.concatenate([shard.segment_ids for shard in shards]).take(back) == segments
    np.testing.assert_array_equal(store.lookup(row_keys(ids, segments)), rows)
    assert store.lookup(row_keys(ids)).tolist() != rows.tolist()  # other segment ids, other inputs


def test_token_ids_above_16_bits_need_the_wide_dtype_and_get_it(tmp_path: Path, identity) -> None:
    wide = create_or_open(tmp_path / "wide", identity, StoreLayout.for_vocabulary(250_000))
    ids = Ragged.from_rows([[1, 249_999]], "int64")
    wide.allocate(ids)
    assert wide.read_tokens(0).token_ids == Ragged(ids.values.astype(np.uint32), ids.offsets)
    assert StoreLayout.for_vocabulary(65534).token_dtype == "uint16"
    assert StoreLayout.for_vocabulary(65535).token_dtype == "uint32"
    narrow = create_or_open(tmp_path / "narrow", identity)
    for bad in (65535, 249_999, -1):
        with pytest.raises(RefusedError, match=f"token_ids of row 1: {bad} is not 0 to 65534"):
            narrow.allocate(Ragged.from_rows([[5], [7, bad]], "int64"))
    with pytest.raises(RefusedError, match="segment_ids of row 0: 255 is not 0 to 254"):
        narrow.allocate(Ragged.from_rows([[5]], "int64"), Ragged.from_rows([[255]], "int64"))
    assert narrow.catalogue().num_shards == 0


def test_a_row_without_tokens_is_refused_before_anything_is_written(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    before = tools.tree(tmp_path)
    with pytest.raises(RefusedError, match="row 1 has no tokens"):
        store.allocate(Ragged.from_rows([[1], [], [2]], "int64"))
    assert tools.tree(tmp_path) == before


def test_an_empty_corpus_is_allocated_to_nothing(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    allocation = store.allocate(Ragged.from_rows([], "int64"))
    assert (len(allocation.rows), allocation.num_new, allocation.shards) == (0, 0, ())
    tools.capture(store)
    assert store.verify().ok


def test_another_identity_is_refused_field_by_field(tmp_path: Path, identity: StoreIdentity) -> None:
    create_or_open(tmp_path / "s", identity)
    other = StoreIdentity(
        teacher={**identity.teacher, "digest": "x" * 32, "labels": ["no", "yes", "maybe"]},
        tokenizer=identity.tokenizer,
        capture={"max_length": 64},
    )
    with pytest.raises(RefusedError) as refused:
        create_or_open(tmp_path / "s", other)
    message = str(refused.value)
    assert "4 fields differ" in message
    assert f'teacher.digest: "{"t" * 32}" → "{"x" * 32}"' in message
    assert 'teacher.labels: ["no", "maybe", "yes"] → ["no", "yes", "maybe"]' in message
    assert "capture.max_length: 128 → 64" in message
    assert 'capture.dtype: "float32" → (absent)' in message
    assert "tokenizer" not in message
    with pytest.raises(RefusedError, match="max_length"):
        open_store(tmp_path / "s", expect=other)
    assert open_store(tmp_path / "s", expect=identity).identity == identity


def test_an_identity_is_the_same_after_a_trip_through_json(identity: StoreIdentity) -> None:
    again = StoreIdentity(**json.loads(json.dumps(identity.to_json())))
    assert again == identity and again.digest == identity.digest
    assert replace(identity, capture={"dtype": "float32", "max_length": 128}).digest == identity.digest


def test_another_layout_is_refused_and_none_keeps_the_stores_own(tmp_path: Path, identity, tools) -> None:
    create_or_open(tmp_path / "s", identity, tools.layout)
    assert create_or_open(tmp_path / "s", identity).layout == tools.layout
    with pytest.raises(RefusedError, match="rows_per_shard: 8 → 16"):
        create_or_open(tmp_path / "s", identity, replace(tools.layout, rows_per_shard=16))


@pytest.mark.parametrize(
    "fields", [{"rows_per_shard": 0}, {"tokens_per_shard": 1 << 40}, {"token_dtype": "int8"}, {"batch_tokens": 1.5}]
)
def test_a_layout_out_of_range_is_refused(fields: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        StoreLayout(**fields)


def test_a_folder_with_other_things_in_it_is_not_made_a_store(tmp_path: Path, identity) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RefusedError, match="is not a store"):
        create_or_open(tmp_path, identity)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_url_is_the_local_path(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(f"file://{tmp_path}/s", identity)
    assert store.allocate(tools.make_rows(3)[0]).num_new == 3
    assert open_store(tmp_path / "s").digest() == store.digest()


def test_a_store_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="does not exist"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match=r"has no store\.json"):
        open_store(tmp_path)


def test_an_edited_store_json_is_refused(tmp_path: Path, identity) -> None:
    create_or_open(tmp_path / "s", identity)
    file = tmp_path / "s" / "store.json"
    content = json.loads(file.read_text())
    content["identity"]["capture"]["max_length"] = 64
    file.write_text(json.dumps(content))
    with pytest.raises(VerificationError, match="edited or damaged"):
        open_store(tmp_path / "s")


def test_records_of_another_store_are_refused(tmp_path: Path, identity, make_store) -> None:
    store, *_ = make_store(10, name="a")
    other = create_or_open(tmp_path / "b", replace(identity, capture={"max_length": 1}), store.layout)
    shutil.copytree(tmp_path / "a" / "commits", tmp_path / "b" / "commits")
    with pytest.raises(VerificationError, match="belongs to another store"):
        other.catalogue()


def test_signals_are_declared_once_and_alike(make_store) -> None:
    store, *_ = make_store(10)
    store.declare([array_spec(Signal("logits"), 3)])
    assert store.declare([array_spec(Signal("logits"), 3, dtype="float16")])[0].path == "logits.float16"
    with pytest.raises(RefusedError, match=r"holds logits with entries of shape \[3\], asked for \[5\]"):
        store.declare([array_spec(Signal("logits"), 5)])
    assert store.spec("logits") == array_spec(Signal("logits"), 3)
    with pytest.raises(RefusedError, match=r"holds no hidden\.mean@1"):
        store.spec("hidden.mean@1")


def test_missing_lists_what_is_not_captured(make_store, tools) -> None:
    store, *_ = make_store(20)
    assert store.missing(tools.specs) == {}
    mean = array_spec(Signal("hidden.mean", 1), 4)
    assert store.missing([mean, *tools.specs]) == {shard: (mean,) for shard in range(store.catalogue().num_shards)}
    more, more_segments = tools.make_rows(5, seed=1)
    shards = store.allocate(more, more_segments).shards_new
    assert store.missing([Signal("logits")]) == {shards[0]: (tools.specs[0],)}
    assert store.missing([Signal("logits")], shards=[0]) == {}
    with pytest.raises(RefusedError, match="has shards 0 to"):
        store.missing([Signal("logits")], shards=[999])


def test_a_second_set_of_signals_rewrites_nothing(tmp_path: Path, make_store, tools) -> None:
    store, *_ = make_store(20, specs=tools.specs[:1])
    before = tools.tree(tmp_path)
    assert tools.capture(store, tools.specs) == store.catalogue().num_shards
    after = tools.tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert tools.capture(store, tools.specs) == 0
    assert tools.tree(tmp_path) == after


def test_the_digest_says_what_a_store_holds_not_how_it_came_there(make_store, tools) -> None:
    at_once, *_ = make_store(20, name="a")
    by_and_by, *_ = make_store(20, name="b", specs=tools.specs[3:])
    assert by_and_by.digest() != at_once.digest()
    tools.capture(by_and_by, tools.specs[:1], shards=[1])
    tools.capture(by_and_by, tools.specs)
    assert by_and_by.digest() == at_once.digest()
    other, *_ = make_store(21, name="c")
    assert other.digest() != at_once.digest()


def test_a_store_can_be_moved_and_handed_to_another_process(tmp_path: Path, make_store) -> None:
    store, *_ = make_store(10)
    assert pickle.loads(pickle.dumps(store)).digest() == store.digest()
    moved = Path(shutil.move(tmp_path / "store", tmp_path / "moved"))
    assert open_store(moved).verify().ok
    with pytest.raises(RefusedError, match="does not exist"):
        pickle.loads(pickle.dumps(store))


def test_every_group_opens_in_xarray(make_store, tools) -> None:
    import xarray

    store, *_ = make_store(20)
    store.declare([array_spec(Signal("hidden.tok", 3), 4)])  # declared, never captured
    more, more_segments = tools.make_rows(9, seed=1)
    store.allocate(more, more_segments)
    tools.capture(store)
    num_shards = store.catalogue().num_shards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr mentions files that are not of its own
        root = xarray.open_zarr(store.url, consolidated=False)
        tokens = xarray.open_zarr(store.url, group="hidden.tok", consolidated=False)
        cls = xarray.open_zarr(store.url, group="hidden.cls", consolidated=False)
    assert root.sizes == {"token": 64 * num_shards, "example": 8 * num_shards, "label": 3}
    assert tokens.sizes == {"token": 64 * num_shards, "hidden": 4} and sorted(tokens) == ["01", "02", "03"]
    assert cls["02"].dims == ("example", "hidden")
    reader = store.reader()
    np.testing.assert_array_equal(root["logits"].values[:8], reader.gather("logits", np.arange(8)))
    ids, lengths = reader.gather_tokens("token_ids", [8])
    np.testing.assert_array_equal(root["token_ids"].values[64 : 64 + lengths[0]], ids[0])
    assert np.isnan(tokens["03"].values).all()


def test_inspect_adds_up(make_store) -> None:
    store, ids, _, _ = make_store(20)
    said = store.inspect()
    assert (said["rows"], said["tokens"]) == (20, len(ids.values))
    assert said["signals"]["hidden.tok@2"] | {"bytes": 0} == {
        "axis": "token", "dtype": "float16", "encoding": "float16", "shape": [4], "shards": said["shards"], "bytes": 0,
    }  # fmt: skip
    assert said["bytes"] == sum(signal["bytes"] for signal in said["signals"].values())
    json.dumps(said, allow_nan=False)


def allocate_some(url: str, seed: int, barrier) -> None:
    from kd.pipeline.store import open_store

    rng = np.random.default_rng(seed)
    rows = [[int(v), 7, int(v) % 13] for v in rng.permutation(120)[:90]]
    store = open_store(url)
    barrier.wait()
    for start in range(0, 90, 30):
        store.allocate(Ragged.from_rows(rows[start : start + 30], "int64"))


def test_two_processes_that_allocate_at_once_give_no_row_two_places(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(2)
    workers = [context.Process(target=allocate_some, args=(store.url, seed, barrier)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    keys = [store.reader().row_keys(store.read_tokens(s).rows) for s in range(store.catalogue().num_shards)]
    assert len({key.tobytes() for key in np.concatenate(keys)}) == sum(map(len, keys)) > 90
    assert store.verify().ok


def test_a_folder_that_another_process_makes_meanwhile_is_no_foreign_one(
    tmp_path: Path, identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_dir = Path.is_dir

    def and_then_it_is_there(path: Path) -> bool:
        found = is_dir(path)
        (tmp_path / "s").mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_dir", and_then_it_is_there)
    assert create_or_open(tmp_path / "s", identity).catalogue().num_shards == 0
