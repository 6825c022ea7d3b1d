"""A signal in several encodings: side by side, none touching the files of another, read as asked for."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray

from kd.pipeline.errors import RefusedError, VerificationError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import ArraySpec, Signal, TeacherStore, array_spec, array_specs, create_or_open, write_view
from kd.pipeline.store.codec import decode, encode
from kd.pipeline.store.recode import recode
from kd.pipeline.store.records import FileRecord, Record, decode_record
from kd.pipeline.store.signal import place
from kd.pipeline.store.view import View

TOKENS = Signal("hidden.tok", 2)


def made_of(text: str, size: int = 4) -> tuple[ArraySpec, ...]:
    return array_specs(Signal.parse(text), size)


def truth(store: TeacherStore, shard: int, size: int = 4) -> np.ndarray:
    """What a teacher says of a shard's tokens, with digits that only float32 keeps."""
    tokens = store.read_tokens(shard).token_ids.values
    return (np.sin(np.outer(tokens + 1, np.arange(1, size + 1))) * (1 + tokens[:, None] % 5)).astype(np.float32)


def put(store: TeacherStore, specs: tuple[ArraySpec, ...], shards: list[int]) -> None:
    specs = store.declare(specs)
    for shard in shards:
        rows = store.read_tokens(shard)
        writer = store.writer(shard, specs)
        writer.put_tokens(TOKENS, np.arange(len(rows.rows)), truth(store, shard))
        writer.commit()


def expected(store: TeacherStore, encoding: str) -> list[np.ndarray]:
    """What each row reads as, from the codec alone."""
    rows = []
    for shard in range(store.catalogue().num_shards):
        values = decode(encoding, encode(encoding, truth(store, shard)))
        rows += list(Ragged.from_lengths(values, store.read_tokens(shard).token_ids.lengths))
    return rows


def read(store: TeacherStore, signal: str | Signal, rows: np.ndarray, **options) -> list[np.ndarray]:
    values, lengths = store.reader(**options).gather_tokens(signal, rows)
    for row, length in zip(values, lengths, strict=True):
        assert (row[length:] == 0).all()
    return [row[:length] for row, length in zip(values, lengths, strict=True)]


def expect_equal(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def stored(make_store) -> tuple[TeacherStore, np.ndarray, list[int]]:
    store, _, _, rows = make_store(20, specs=())
    return store, rows, [*range(store.catalogue().num_shards)]


def test_a_second_encoding_stands_beside_the_first_and_changes_no_file(stored, tools) -> None:
    store, rows, shards = stored
    put(store, made_of("hidden.tok@2:float16"), shards)
    before = tools.tree(Path(store.url))
    put(store, (*made_of("hidden.tok@2:int8"), *made_of("hidden.tok@2:float32")), shards)
    after = tools.tree(Path(store.url))
    assert {name: after[name] for name in before} == before
    added = {Path(name).parts[0] for name in after.keys() - before.keys()}
    assert added == {"hidden.tok.int8", "hidden.tok.int8.scale", "hidden.tok.float32", "commits"}
    assert {"hidden.tok.int8/02/zarr.json", "hidden.tok.int8/02/c/0/0", "hidden.tok.int8.scale/02/c/0"} < after.keys()
    for encoding in ("float32", "float16", "int8"):
        expect_equal(read(store, f"hidden.tok@2:{encoding}", rows), expected(store, encoding))
    assert store.verify().ok
    assert [*store.inspect()["signals"]] == [
        "hidden.tok@2:float32", "hidden.tok@2:int8", "hidden.tok@2", "segment_ids", "token_ids",
    ]  # fmt: skip


def test_the_first_encoding_has_the_plain_path_whatever_it_is(stored) -> None:
    store, rows, shards = stored
    put(store, made_of("hidden.tok@2:int8"), shards)
    assert {spec.path for spec in store.declared().values() if spec.signal == TOKENS} == {
        "hidden.tok/02", "hidden.tok.scale/02",
    }  # fmt: skip
    assert store.spec("hidden.tok@2").dtype == "int8"
    expect_equal(read(store, TOKENS, rows), expected(store, "int8"))
    assert store.verify().ok


def test_an_encoding_that_stands_beside_another_stays_there(stored) -> None:
    """As in a merge, where specs come from a store in the order of their paths."""
    store, _, _ = stored
    given = place((*made_of("hidden.tok@2:float16"), *made_of("hidden.tok@2:int8")), ())
    declared = store.declare(sorted(given, key=lambda spec: spec.path))
    assert {spec.path for spec in declared} == {"hidden.tok/02", "hidden.tok.int8/02", "hidden.tok.int8.scale/02"}
    assert store.spec("hidden.tok@2").dtype == "float16"
    # Alone, and asked for again as anybody asks: not a second time under the plain path.
    alone = tuple(spec for spec in given if spec.encoding == "int8")
    assert place(made_of("hidden.tok@2:int8"), alone) == alone


def test_each_row_is_read_in_the_most_exact_encoding_that_its_shard_has(stored) -> None:
    store, rows, shards = stored
    put(store, made_of("hidden.tok@2:int8"), shards[:2])
    put(store, made_of("hidden.tok@2:float16"), shards[1:2])
    put(store, made_of("hidden.tok@2:float32"), shards[2:])
    best = ["int8", "float16", "float32"]
    wanted = [
        expected(store, best[row // store.layout.rows_per_shard])[i].astype(np.float32) for i, row in enumerate(rows)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    expect_equal(read(store, TOKENS, rows[order]), [wanted[i] for i in order])
    for row, one in zip(rows, wanted, strict=True):  # alone as in a batch
        expect_equal(read(store, TOKENS, np.array([row])), [one])
    reader = pickle.loads(pickle.dumps(store.reader()))
    np.testing.assert_array_equal(
        reader.gather_tokens(TOKENS, rows, pad_value=9)[0], store.reader().gather_tokens(TOKENS, rows, pad_value=9)[0]
    )
    assert reader.has(TOKENS, rows).all() and not reader.has("hidden.tok@2:float32", rows).all()
    with pytest.raises(RefusedError, match=r"hidden\.tok@2:float32 was not captured"):
        reader.gather_tokens("hidden.tok@2:float32", rows)
    with pytest.raises(RefusedError, match=r"holds no hidden\.tok@1:int8"):
        reader.gather_tokens("hidden.tok@1:int8", rows)


def test_per_example_signals_have_encodings_too(make_store, tools) -> None:
    store, ids, segments, rows = make_store(20)
    logits = tools.answer(tools.specs[0], ids, segments)
    tools.capture(store, array_specs(Signal("logits", None, "int8"), 3), shards=[0, 1])
    np.testing.assert_array_equal(store.reader().gather("logits", rows), logits)
    mine = rows < 2 * store.layout.rows_per_shard
    found = store.reader().gather("logits:int8", rows[mine])
    np.testing.assert_array_equal(found, decode("int8", encode("int8", logits[mine])))
    assert np.abs(found - logits[mine]).max() <= np.abs(logits).max() / 254 * 1.001
    pinned = store.reader({Signal("logits"): "int8"})
    np.testing.assert_array_equal(pinned.gather("logits", rows[mine]), found)
    out = np.empty(1000, np.float32)
    assert np.shares_memory(pinned.gather("logits", rows[mine], out=out), out)


def test_a_view_reads_what_it_was_made_with_though_the_store_gained_better(stored, tmp_path: Path) -> None:
    import pyarrow as pa

    store, rows, shards = stored
    put(store, made_of("hidden.tok@2:int8"), shards)
    specs = store.declare(made_of("hidden.tok@2:int8"))
    content = write_view(tmp_path / "view", pa.table({"n": range(len(rows))}), rows, store, specs)
    assert content["signals"] == ["hidden.tok@2:int8"]
    put(store, made_of("hidden.tok@2:float32"), shards)
    view = View(tmp_path / "view", store, rows, {}, content)
    assert view.signals == (Signal("hidden.tok", 2, "int8"),)
    view.check_coverage([TOKENS, "hidden.tok@2:float32"])
    values, _ = view.reader.gather_tokens(TOKENS, rows[:1])
    np.testing.assert_array_equal(values[0], expected(store, "int8")[0])


def test_encoding_again_from_float32_gives_the_bytes_a_capture_gives(make_store, tools) -> None:
    captured, *_ = make_store(20, specs=(), name="captured")
    recoded, *_ = make_store(20, specs=(), name="recoded")
    shards = [*range(captured.catalogue().num_shards)]
    others = (*made_of("hidden.tok@2:int8"), *made_of("hidden.tok@2:float16"))
    for store in (captured, recoded):
        put(store, made_of("hidden.tok@2:float32"), shards)
    put(captured, others, shards)
    others = recoded.declare(others)
    for shard in shards:
        writer = recoded.writer(shard, others)
        assert recode(recoded, writer, others) == {TOKENS}
        writer.commit()
    assert tools.tree(Path(recoded.url)) == tools.tree(Path(captured.url))


@pytest.mark.parametrize("first", ["float16", "int8"])
def test_nothing_is_made_from_numbers_that_lost_something(stored, first: str) -> None:
    store, _, shards = stored
    put(store, made_of(f"hidden.tok@2:{first}"), shards)
    wanted = store.declare(made_of(f"hidden.tok@2:{'int8' if first == 'float16' else 'float16'}"))
    assert recode(store, store.writer(0, wanted), wanted) == set()


def test_a_damaged_source_is_not_encoded_with_a_good_checksum(stored) -> None:
    store, _, shards = stored
    put(store, made_of("hidden.tok@2:float32"), shards)
    file = Path(store.url, store.layout.shard_file(store.spec(TOKENS), 0))
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    wanted = store.declare(made_of("hidden.tok@2:int8"))
    with pytest.raises(VerificationError, match="does not have the recorded checksum"):
        recode(store, store.writer(0, wanted), wanted)


def test_damage_to_a_scale_is_named_with_its_signal_and_encoding(stored) -> None:
    store, _, shards = stored
    put(store, made_of("hidden.tok@2:float16"), shards)
    put(store, made_of("hidden.tok@2:int8"), shards)
    scale = next(spec for spec in store.declared().values() if spec.part == "scale")
    file = Path(store.url, store.layout.shard_file(scale, 1))
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    (problem,) = store.verify().problems
    assert (problem.shard, problem.signal, problem.file) == (1, "hidden.tok@2:int8", "hidden.tok.int8.scale/02/c/1")


def test_a_record_that_names_codes_without_their_scales_is_refused(stored) -> None:
    store, _, shards = stored
    put(store, made_of("hidden.tok@2:int8"), shards)
    record = next(record for record in store.shard_records(0) if record.index is None)
    assert sorted(file.spec.part for file in record.files) == ["", "scale"]
    for kept in record.files:
        alone = Record(record.store, 0, record.rows, record.tokens, (kept,), allocation=record.allocation)
        with pytest.raises(ValueError, match=r"it names hidden\.tok\S*/02 without hidden\.tok\S*/02"):
            decode_record(
                alone.encode(), name=alone.file.removeprefix("commits/"), store=store.store_digest, layout=store.layout
            )


@pytest.mark.parametrize(
    ("array", "dtype", "encoding", "shape"),
    [
        ("hidden.tok.int8/02", "int8", "float16", [4]),
        ("hidden.tok.int8/02", "float16", "float16", [4]),
        ("hidden.tok.float16/02", "float32", "float32", [4]),
        ("hidden.tok.scale/02", "float32", "int8", [4]),
        ("hidden.tok.scale/02", "float32", "float32", []),
        ("hidden.tok.scale.int8/02", "float32", "int8", []),
        ("hidden.tok.zip/02", "int8", "zip", [4]),
        ("token_ids.int8", "int8", "int8", []),
    ],
)
def test_a_path_that_does_not_fit_its_encoding_is_no_array(
    stored, array: str, dtype: str, encoding: str, shape: list[int]
) -> None:
    from kd.pipeline.errors import UsageError

    with pytest.raises((ValueError, UsageError)):
        ArraySpec.at(array, tuple(shape), dtype, encoding)


@pytest.mark.parametrize(("encoding", "value"), [("float16", 7e4), ("int8", 2e38), ("int8", np.nan), ("int8", np.inf)])
def test_what_an_encoding_cannot_hold_is_refused_before_anything_is_kept(stored, encoding: str, value: float) -> None:
    store, _, _ = stored
    specs = store.declare((*made_of("hidden.tok@2:float32"), *made_of(f"hidden.tok@2:{encoding}")))
    values = truth(store, 0)
    values[7, 2] = value
    writer = store.writer(0, specs)
    what = rf"does not fit {encoding}" if np.isfinite(value) else "is not finite"
    with pytest.raises(RefusedError, match=what):
        writer.put_tokens(TOKENS, np.arange(len(store.read_tokens(0).rows)), values)
    with pytest.raises(RefusedError, match="were never written"):
        writer.commit()


def test_entries_of_another_size_are_refused_in_any_encoding(stored) -> None:
    store, _, _ = stored
    store.declare(made_of("hidden.tok@2:float16"))
    with pytest.raises(RefusedError, match=r"entries of shape \[4\], asked for \[5\]"):
        store.declare(made_of("hidden.tok@2:int8", 5))


def test_two_encodings_asked_for_at_once_are_placed_in_order(tmp_path: Path) -> None:
    wanted = (*made_of("hidden.tok@2:int8"), *made_of("hidden.tok@2:float16"), *made_of("hidden.tok@2:int8"))
    assert [spec.path for spec in place(wanted, ())] == [
        "hidden.tok/02",
        "hidden.tok.scale/02",
        "hidden.tok.float16/02",
    ]
    assert [spec.path for spec in place(wanted, [array_spec(TOKENS, 4, dtype="float16")])] == [
        "hidden.tok.int8/02", "hidden.tok.int8.scale/02", "hidden.tok/02",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_xarray_opens_every_encoding(stored) -> None:
    store, _, shards = stored
    put(store, made_of("hidden.tok@2:float32"), shards)
    put(store, made_of("hidden.tok@2:int8"), shards)
    codes = xarray.open_zarr(store.url, group="hidden.tok.int8", consolidated=False, mask_and_scale=False)["02"]
    scales = xarray.open_zarr(store.url, group="hidden.tok.int8.scale", consolidated=False)["02"]
    assert codes.dims == ("token", "hidden") and scales.dims == ("token",) and codes.dtype == np.int8
    tokens = len(truth(store, 0))
    np.testing.assert_array_equal(
        (codes[:tokens] * scales[:tokens]).values, decode("int8", encode("int8", truth(store, 0)))
    )
    assert (codes[tokens : store.layout.tokens_per_shard] == -128).all()


def test_a_file_record_round_trips_with_its_encoding() -> None:
    spec = next(spec for spec in place(made_of("hidden.tok@2:int8"), [array_spec(TOKENS, 4)]) if spec.part)
    record = FileRecord(spec, 3, 10, "0" * 32, "0" * 32)
    said = record.to_json()
    assert said["file"] == "hidden.tok.int8.scale/02/c/3" and said["encoding"] == "int8"
    assert ArraySpec.at(said["array"], tuple(said["shape"]), said["dtype"], said["encoding"]) == spec


def test_a_store_that_other_software_wrote_into_opens_all_the_same(stored, tmp_path: Path, identity) -> None:
    store, _, _ = stored
    Path(store.url, "logits.notes").mkdir()
    Path(store.url, "logits.notes", "zarr.json").write_text("{}")
    assert create_or_open(store.url, identity).declared().keys() == {"token_ids", "segment_ids"}
