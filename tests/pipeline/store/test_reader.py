"""The reader gives back what was written, for any rows in any order, and never what was not."""

from __future__ import annotations

import gc
import json
import multiprocessing
import pickle
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import RefusedError, VerificationError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import (
    Signal,
    StoreLayout,
    StoreReader,
    TeacherStore,
    array_spec,
    array_specs,
    create_or_open,
    reader,
)
from kd.pipeline.store.layout import fill_value
from kd.pipeline.store.records import FileRecord, Record, hash_parts
from kd.pipeline.store.shard import crc32c


def expect_everything(reader: StoreReader, ids: Ragged, segments: Ragged, rows: np.ndarray, specs, answer) -> None:
    """Every signal of every row, shuffled and repeated, equals what the teacher says."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(rows), 50)
    mine = ids.take(chosen), segments.take(chosen)
    for spec in specs:
        expected = answer(spec, *mine)
        if spec.axis == "example":
            values = reader.gather(spec.signal, rows[chosen])
        else:
            padded, lengths = reader.gather_tokens(spec.signal, rows[chosen], pad_value=0)
            np.testing.assert_array_equal(lengths, mine[0].lengths)
            values = Ragged.from_padded(padded, lengths).values
            assert (padded[np.arange(padded.shape[1]) >= lengths[:, None]] == 0).all()
        assert values.dtype == spec.dtype
        np.testing.assert_array_equal(values, expected)


@settings(max_examples=12, deadline=None)
@given(
    layout=st.builds(
        StoreLayout,
        rows_per_shard=st.sampled_from([1, 3, 8, 64]),
        tokens_per_shard=st.sampled_from([9, 33, 64, 4096]),
        chunk_bytes=st.sampled_from([1, 64, 1 << 20]),
    ),
    count=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_any_rows_of_any_layout_come_back(layout: StoreLayout, count: int, seed: int, identity, tools) -> None:
    ids, segments = tools.make_rows(count, seed)
    with tempfile.TemporaryDirectory() as folder:
        store = create_or_open(folder, identity, layout)
        rows = store.allocate(ids, segments).rows
        tools.capture(store)
        opened = store.reader()
        expect_everything(opened, ids, segments, rows, [*tools.specs, *layout.input_specs], input_or_answer(tools))
        assert all(array.map is not None for array in opened._arrays.values())


def input_or_answer(tools):
    def answer(spec, ids: Ragged, segments: Ragged) -> np.ndarray:
        inputs = {"token_ids": ids, "segment_ids": segments}
        return inputs[spec.signal.name].values if spec.signal.name in inputs else tools.answer(spec, ids, segments)

    return answer


def test_rows_may_be_few_none_or_repeated(make_store) -> None:
    store, ids, _, rows = make_store(20)
    opened = store.reader()
    assert opened.gather("logits", []).shape == (0, 3)
    values, lengths = opened.gather_tokens("hidden.tok@2", np.empty(0, dtype=np.int64))
    assert values.shape == (0, 0, 4) and lengths.shape == (0,)
    assert opened.gather("logits", rows[[5, 5]].tolist()).tolist()[0] == opened.gather("logits", rows[[5]]).tolist()[0]
    np.testing.assert_array_equal(opened.lengths(rows), ids.lengths)
    assert opened.spec("hidden.tok@2").shape == (4,)


def test_long_rows_are_cut_and_short_ones_padded_with_what_was_asked_for(make_store) -> None:
    store, ids, _, rows = make_store(20)
    opened = store.reader()
    values, lengths = opened.gather_tokens("token_ids", rows, max_tokens=4, pad_value=999)
    assert values.shape == (20, 4)
    np.testing.assert_array_equal(lengths, np.minimum(ids.lengths, 4))
    for row, expected in enumerate(ids):
        assert values[row].tolist() == [*expected[:4].tolist(), 999, 999][:4]


def test_memory_that_is_handed_in_is_used(make_store) -> None:
    store, _, _, rows = make_store(20)
    opened = store.reader()
    memory = np.full(100_000, -1, dtype=np.float16)
    values, _ = opened.gather_tokens("hidden.tok@2", rows, out=memory)
    assert np.shares_memory(values, memory) and (memory[values.size :] == -1).all()
    np.testing.assert_array_equal(values, opened.gather_tokens("hidden.tok@2", rows)[0])
    assert np.shares_memory(opened.gather("hidden.cls@2", rows, out=memory.reshape(100, 1000)), memory)
    for bad in (memory.astype(np.float32), memory[:10], memory[::2]):
        with pytest.raises(RefusedError, match="out must be contiguous float16"):
            opened.gather_tokens("hidden.tok@2", rows, out=bad)


@pytest.mark.parametrize("bad", [[-1], [4], [0, 7], [10**12], [0, -(10**12)], [24]])
def test_a_row_that_does_not_exist_is_refused(tmp_path: Path, identity, tools, bad: list[int]) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    for start in (0, 4, 8):  # three shards of four rows, so that slots 4 to 7 of each are empty
        ids, segments = tools.make_rows(12)
        store.allocate(ids.slice(start, start + 4), segments.slice(start, start + 4))
    tools.capture(store)
    opened = store.reader()
    for call in (opened.lengths, opened.row_keys, lambda rows: opened.gather("logits", rows)):
        with pytest.raises(RefusedError, match=r"has no row"):
            call(bad)
    with pytest.raises(RefusedError, match="must be a list of integers"):
        opened.gather("logits", [0.5])


def test_an_absent_shard_is_refused_never_read_as_fill_values(make_store, tools) -> None:
    store, ids, segments, rows = make_store(20, specs=tools.specs[:1])
    store.declare(tools.specs)
    tools.capture(store, tools.specs, shards=[0])
    more, more_segments = tools.make_rows(5, seed=1)
    new = store.allocate(more, more_segments).rows
    opened = store.reader()
    assert opened.gather("logits", rows).shape == (20, 3)
    with pytest.raises(RefusedError) as refused:
        opened.gather("logits", np.concatenate([rows, new]))
    assert f"logits was not captured for 5 of 25 rows (shard {new[0] // 8})" in str(refused.value)
    assert "kd cache-teacher with --signals logits" in str(refused.value)
    with pytest.raises(RefusedError, match=r"hidden\.tok@2 was not captured for .* \(shards 1, 2\)"):
        opened.gather_tokens("hidden.tok@2", rows)
    inside = rows[rows < 8]
    expect_everything(
        opened, ids.take(np.flatnonzero(rows < 8)), segments.take(np.flatnonzero(rows < 8)), inside, tools.specs,
        tools.answer,
    )  # fmt: skip
    np.testing.assert_array_equal(opened.has("hidden.tok@2", np.concatenate([rows, new])), [*(rows < 8), *[False] * 5])
    assert not opened.has("hidden.mean@1", rows).any()


def test_a_signal_that_was_never_captured_is_refused_with_what_there_is(make_store, tools) -> None:
    store, *_ = make_store(9, specs=tools.specs[:1])
    with pytest.raises(RefusedError, match=r"holds no hidden\.tok@5\n  captured: logits, segment_ids, token_ids"):
        store.reader().gather_tokens("hidden.tok@5", [0])
    with pytest.raises(RefusedError, match="use gather_tokens"):
        store.reader().gather("token_ids", [0])
    with pytest.raises(RefusedError, match=r"use gather$"):
        store.reader().gather_tokens("logits", [0])


def test_a_reader_keeps_to_what_it_saw_and_a_new_one_sees_more(make_store, tools) -> None:
    store, _, _, rows = make_store(10)
    old = store.reader()
    more, more_segments = tools.make_rows(5, seed=1)
    new = store.allocate(more, more_segments).rows
    tools.capture(store)
    with pytest.raises(RefusedError, match="has no row"):
        old.gather("logits", new)
    assert old.gather("logits", rows).shape == (10, 3)
    assert store.reader().gather("logits", new).shape == (5, 3)


# -- damage that is noticed without a verification ----------------------------------------------------------------


def shard_path(store: TeacherStore, signal: str, shard: int) -> Path:
    spec = store.spec(signal)
    return Path(store.url, store.layout.shard_file(spec, shard))


@pytest.mark.parametrize("signal", ["logits", "hidden.tok@2"])
def test_a_deleted_shard_file_is_noticed_when_the_array_is_opened(make_store, signal: str) -> None:
    store, *_ = make_store(20)
    shard_path(store, signal, 1).unlink()
    with pytest.raises(VerificationError, match=rf"{signal}, shard 1: .* is missing"):
        store.reader().spec(signal)


@pytest.mark.parametrize("signal", ["logits", "hidden.tok@2"])
def test_a_truncated_shard_file_is_noticed_before_it_is_mapped(make_store, signal: str) -> None:
    store, *_ = make_store(20)
    path = shard_path(store, signal, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=rf"{signal}, shard 1: .* bytes, its record says"):
        store.reader().spec(signal)


def test_two_shard_files_that_changed_places_are_noticed(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    store.allocate(*tools.make_rows(16, longest=4))
    tools.capture(store)
    one, two = (shard_path(store, "logits", shard) for shard in (0, 1))
    assert one.stat().st_size == two.stat().st_size
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(VerificationError, match="another file stands in its place"):
        store.reader().gather("logits", [0])


def test_a_link_that_leads_out_of_the_store_is_refused(tmp_path: Path, make_store) -> None:
    store, *_ = make_store(20)
    path = shard_path(store, "logits", 1)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match="a link that leads out of its place"):
        store.reader().gather("logits", [0])


def test_token_ids_that_do_not_fit_their_keys_are_refused_before_a_teacher_reads_them(make_store) -> None:
    store, *_ = make_store(20)
    path = shard_path(store, "token_ids", 1)
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="token_ids, shard 1"):
        store.read_tokens(1)


# -- layouts that cannot be mapped ---------------------------------------------------------------------------------


def replace_file(store: TeacherStore, signal: str, shard: int, data: bytes) -> None:
    """What software that rewrites a shard would do: another file, and a record of it."""
    (old,) = [record for record in store.shard_records(shard) if record.index is None]
    path = shard_path(store, signal, shard)
    path.write_bytes(data)
    files = tuple(
        FileRecord(file.spec, shard, *hash_parts([data])) if str(file.spec.signal) == signal else file
        for file in old.files
    )
    new = Record(old.store, shard, old.rows, old.tokens, files, allocation=old.allocation)
    Path(store.url, old.file).unlink()
    store.files.create(new.file, new.encode())


def rewrite_array(store: TeacherStore, signal: str, tmp_path: Path, **how) -> None:
    """Write an array anew with zarr-python, in another layout."""
    spec = store.spec(signal)
    capacity = store.layout.capacity(spec.axis)
    folder = Path(store.url, spec.path)
    values = zarr.open_array(folder, mode="r")[:]
    kwargs = {"chunks": (capacity, *spec.shape), "compressors": None, **how}
    array = zarr.create_array(
        tmp_path / "rewritten", shape=values.shape, dtype=spec.dtype, fill_value=fill_value(spec)[()],
        dimension_names=spec.dims, attributes={"kd": {"signal": signal, "encoding": spec.encoding}}, **kwargs,
    )  # fmt: skip
    for shard in range(store.catalogue().num_shards):
        entries = store.catalogue().allocations[shard].entries(spec)
        start = shard * capacity
        array[start : start + entries] = values[start : start + entries]
    shutil.copy(tmp_path / "rewritten" / "zarr.json", folder / "zarr.json")
    for shard in range(store.catalogue().num_shards):
        rewritten = tmp_path / "rewritten" / Path(store.layout.shard_file(spec, shard)).relative_to(spec.path)
        replace_file(store, signal, shard, rewritten.read_bytes())


@pytest.mark.parametrize(
    "how",
    [
        {"compressors": (zarr.codecs.ZstdCodec(level=1),)},
        {"chunks": (16, 4), "shards": (64, 4), "compressors": (zarr.codecs.BloscCodec(),)},
        {"chunks": (4, 4), "shards": (64, 4)},
        {"chunks": (64, 1), "shards": (64, 4)},
        {},
    ],
    ids=["compressed", "sharded and compressed", "other chunks", "chunks across entries", "no shards"],
)
def test_layouts_that_cannot_be_mapped_are_read_through_zarr(tmp_path: Path, make_store, tools, how: dict) -> None:
    store, ids, segments, rows = make_store(20)
    rewrite_array(store, "hidden.tok@2", tmp_path, **how)
    opened = store.reader()
    expect_everything(opened, ids, segments, rows, tools.specs, tools.answer)
    assert opened._arrays["hidden.tok/02"].map is None
    assert opened._arrays["hidden.tok/01"].map is not None

    # Such an array can be read, and declared longer, and is then refused rather than mixed with another layout.
    more, more_segments = tools.make_rows(5, seed=1)
    shard = store.allocate(more, more_segments).shards_new[0]
    expect_everything(store.reader(), ids, segments, rows, tools.specs, tools.answer)
    with pytest.raises(RefusedError, match="rewritten by other software"):
        store.writer(shard, tools.specs)
    store.writer(shard, [spec for spec in tools.specs if str(spec.signal) != "hidden.tok@2"])


def test_chunks_in_another_order_are_not_mapped(make_store, tools) -> None:
    store, ids, segments, rows = make_store(20)
    spec = store.spec("hidden.tok@2")
    path = shard_path(store, "hidden.tok@2", 0)
    data = path.read_bytes()
    chunk_bytes = store.layout.chunk_length(spec) * spec.entry_bytes
    index = np.frombuffer(data[-16 * store.layout.num_chunks(spec) - 4 : -4], dtype="<u8").reshape(-1, 2).copy()
    index[[0, 1], 0] = index[[1, 0], 0]
    encoded = index.tobytes()
    swapped = data[chunk_bytes : 2 * chunk_bytes] + data[:chunk_bytes] + data[2 * chunk_bytes : -len(encoded) - 4]
    replace_file(store, "hidden.tok@2", 0, swapped + encoded + crc32c(encoded).to_bytes(4, "little"))
    opened = store.reader()
    expect_everything(opened, ids, segments, rows, tools.specs, tools.answer)
    assert opened._arrays["hidden.tok/02"].map is None


def test_the_slow_way_is_taken_where_memory_cannot_be_mapped(make_store, tools, monkeypatch) -> None:
    store, ids, segments, rows = make_store(30)
    monkeypatch.setattr(reader, "CACHE_BYTES", 600)  # about one shard
    monkeypatch.setattr(reader, "SUPPORTED", False)
    opened = store.reader()
    expect_everything(opened, ids, segments, rows, [*tools.specs, *store.layout.input_specs], input_or_answer(tools))
    cached = opened._arrays["hidden.tok/02"]._cache
    assert len(cached) == 1 or sum(values.nbytes for values in cached.values()) <= 600
    values, _ = opened.gather_tokens("token_ids", rows, pad_value=7)
    np.testing.assert_array_equal(values, ids.to_padded(7))

    def refuse(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(reader, "SUPPORTED", True)
    monkeypatch.setattr("kd.pipeline.store.mapping._map", refuse)
    opened = store.reader()
    expect_everything(opened, ids, segments, rows, tools.specs, tools.answer)
    assert opened._arrays["hidden.tok/02"].map is None


def test_an_absent_inner_chunk_is_refused_never_read_as_fill_values(make_store) -> None:
    store, *_ = make_store(20)
    spec = store.spec("hidden.tok@2")
    path = shard_path(store, "hidden.tok@2", 0)
    data = bytearray(path.read_bytes())
    start = len(data) - 16 * store.layout.num_chunks(spec) - 4
    data[start : start + 16] = b"\xff" * 16
    checksum = crc32c(bytes(data[start:-4]))
    replace_file(store, "hidden.tok@2", 0, bytes(data[:-4]) + checksum.to_bytes(4, "little"))
    with pytest.raises(VerificationError, match=r"hidden\.tok@2, shard 0: .* lacks some of its"):
        store.reader().gather_tokens("hidden.tok@2", [0])


def test_metadata_of_other_shape_or_unknown_codecs_is_not_obeyed(tmp_path: Path, make_store) -> None:
    store, *_ = make_store(20)
    rewrite_array(store, "hidden.tok@2", tmp_path, compressors=(zarr.codecs.ZstdCodec(),))
    file = Path(store.url, "hidden.tok/02/zarr.json")
    good = json.loads(file.read_text())
    huge = {"name": "regular", "configuration": {"chunk_shape": [1 << 40, 4]}}
    for change, words in [
        ({"chunk_grid": huge}, "in chunks of"),
        ({"data_type": "float32"}, "describes float32"),
        ({"shape": [192, 5]}, "describes float16"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, r"codec 'numcodecs\.pickle'"),
    ]:
        file.write_text(json.dumps(good | change))
        with pytest.raises(VerificationError, match=words):
            store.reader().gather_tokens("hidden.tok@2", [0])


# -- processes and threads -----------------------------------------------------------------------------------------


def gather_there(opened: StoreReader, rows: np.ndarray, results) -> None:
    results.put(opened.gather_tokens("hidden.tok@2", rows)[0].tobytes())


def test_a_reader_works_in_forkserver_processes(make_store) -> None:
    store, _, _, rows = make_store(20)
    opened = store.reader()
    expected = opened.gather_tokens("hidden.tok@2", rows)[0].tobytes()
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    process = context.Process(target=gather_there, args=(opened, rows, results))
    process.start()
    assert results.get(timeout=60) == expected
    process.join()
    assert pickle.loads(pickle.dumps(opened)).gather_tokens("hidden.tok@2", rows)[0].tobytes() == expected


def test_threads_share_a_reader(make_store, tools) -> None:
    store, ids, segments, rows = make_store(30)
    opened, failures = store.reader(), []

    def work() -> None:
        try:
            for _ in range(5):
                expect_everything(opened, ids, segments, rows, tools.specs, tools.answer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_mappings_go_with_the_reader(make_store) -> None:
    store, _, _, rows = make_store(20)

    def mapped() -> int:
        return sum(str(Path(store.url).resolve()) in line for line in Path("/proc/self/maps").read_text().splitlines())

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    before = mapped()
    opened = store.reader()
    values = opened.gather("logits", rows)
    assert mapped() > before
    del opened
    gc.collect()
    assert mapped() == before
    assert np.isfinite(values).all()  # a copy


def test_rows_far_apart_in_a_large_store_are_reached(tmp_path: Path, identity, tools) -> None:
    store = create_or_open(tmp_path / "s", identity, StoreLayout())
    shards = [tools.make_rows(3, seed=seed) for seed in range(4)]
    rows = [store.allocate(*part).rows for part in shards]
    spec = array_spec(Signal("hidden.tok", 1), 4)
    tools.capture(store, [spec])
    opened = store.reader()
    assert [int(part[0]) for part in rows] == [0, 4096, 8192, 12288]
    ids = Ragged.concatenate([part[0] for part in shards])
    segments = Ragged.concatenate([part[1] for part in shards])
    expect_everything(opened, ids, segments, np.concatenate(rows), [spec], tools.answer)


def test_hidden_cls_is_the_first_token_where_only_tokens_are_stored(make_store, tools) -> None:
    tok = tools.specs[3]
    cls = array_specs(Signal("hidden.cls", 2), 4)
    store, ids, segments, rows = make_store(30, specs=[tok])
    first = tools.answer(tok, ids, segments)[ids.offsets[:-1]]
    reader = store.reader()
    assert reader.has("hidden.cls@2", rows).all() and not reader.has("hidden.cls@1", rows).any()
    assert (reader.spec("hidden.cls@2").axis, reader.spec("hidden.cls@2").shape) == ("example", (4,))
    np.testing.assert_array_equal(reader.gather("hidden.cls@2", rows), first)
    out = np.full((30, 4), 7, dtype=np.float16)
    assert reader.gather("hidden.cls@2", rows, out=out).base is not None
    np.testing.assert_array_equal(out, first)
    with pytest.raises(RefusedError, match=r"hidden\.cls@2 has one entry per example"):
        reader.gather_tokens("hidden.cls@2", rows)
    # Stored in some shards: there it is read, elsewhere derived.
    tools.capture(store, cls, shards=[0])
    mixed = store.reader().gather("hidden.cls@2", rows)
    mine = rows < store.layout.rows_per_shard
    np.testing.assert_array_equal(mixed[mine], tools.answer(cls[0], ids, segments)[mine])
    np.testing.assert_array_equal(mixed[~mine], first[~mine])


def test_hidden_cls_is_derived_from_token_states_kept_as_int8(make_store, tools) -> None:
    store, _, _, rows = make_store(30, specs=array_specs(Signal("hidden.tok", 2, "int8"), 4))
    reader = store.reader()
    tokens, _ = reader.gather_tokens("hidden.tok@2", rows)
    np.testing.assert_array_equal(reader.gather("hidden.cls@2", rows), tokens[:, 0])
