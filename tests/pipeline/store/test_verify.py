"""Verification finds whatever was done to a store, and says where."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.store import TeacherStore, create_or_open, open_store, verify_store


@pytest.fixture
def store(make_store) -> TeacherStore:
    store, *_ = make_store(30)
    store.put_sidecar("embeddings", {"word.weight": np.arange(12, dtype=np.float32).reshape(3, 4)})
    return store


def found(store: TeacherStore) -> list[str]:
    """Problems as text; a store that cannot even be opened counts as one."""
    try:
        return [str(problem) for problem in verify_store(store.url).problems]
    except VerificationError as error:
        return [error.what]


def file_of(store: TeacherStore, signal: str, shard: int) -> Path:
    return Path(store.url, store.layout.shard_file(store.spec(signal), shard))


def record_of(store: TeacherStore, shard: int, *, allocation: bool) -> Path:
    (record,) = [r for r in store.shard_records(shard) if (r.index is not None) == allocation]
    return Path(store.url, record.file)


def test_an_undamaged_store_has_no_problems(store: TeacherStore) -> None:
    report = store.verify()
    assert report.ok and report.problems == () and report.unrecorded == ()
    on_disk = [path for path in Path(store.url).rglob("*") if path.is_file()]
    assert report.files == len(on_disk) - sum(path.name in ("zarr.json", ".lock") for path in on_disk)
    report.require_ok()
    json.dumps(report.to_json())


@pytest.mark.parametrize("signal", ["logits", "hidden.cls@2", "hidden.tok@2", "token_ids", "segment_ids"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete", "empty", "link"])
def test_damage_to_a_shard_file_names_shard_and_signal(store: TeacherStore, signal: str, damage: str) -> None:
    path = file_of(store, signal, 2)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
    path.unlink()
    if damage == "link":
        path.symlink_to("/dev/zero")
    elif damage != "delete":
        path.write_bytes({"truncate": data[:-1], "extend": data + b"\0", "empty": b""}.get(damage, bytes(data)))
    (problem,) = [p for p in found(store) if not p.startswith("shard 2, token_ids: shard")][:1]
    assert problem.startswith(f"shard 2, {signal}: "), problem
    with pytest.raises(VerificationError, match=rf"shard 2, {signal}"):
        store.verify().require_ok()


def test_every_one_of_many_bit_flips_is_found(store: TeacherStore) -> None:
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(Path(store.url).rglob("*")) if path.is_file() and path.name != ".lock"]
    for flip in range(150):
        path = paths[flip % len(paths)] if flip < len(paths) else paths[int(rng.integers(len(paths)))]
        before = path.read_bytes()
        data = bytearray(before)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        problems = found(store)
        path.write_bytes(before)
        assert problems, f"flip {flip} in {path.relative_to(store.url)} was not found"
    assert store.verify().ok


def test_files_that_changed_places_are_found_in_both(store: TeacherStore) -> None:
    one, two = file_of(store, "logits", 0), file_of(store, "logits", 1)
    data = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(data)
    assert [problem.split(":")[0] for problem in found(store)] == ["shard 0, logits", "shard 1, logits"]


def test_arrays_that_changed_places_are_found(store: TeacherStore) -> None:
    one, two = file_of(store, "hidden.tok@1", 0), file_of(store, "hidden.tok@2", 0)
    data = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(data)
    assert [p.split(":")[0] for p in found(store)] == ["shard 0, hidden.tok@1", "shard 0, hidden.tok@2"]
    with pytest.raises(VerificationError, match="another file stands in its place"):
        store.reader().gather_tokens("hidden.tok@2", [0])


def test_a_damaged_or_deleted_index_names_its_shard(store: TeacherStore) -> None:
    path = Path(store.url, "index", "00000001.parquet")
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    assert found(store)[0].startswith("shard 1, index: ") and "recorded checksum" in found(store)[0]
    with pytest.raises(VerificationError, match=r"00000001\.parquet is damaged"):
        store.reader().lengths([0])
    path.unlink()
    assert "00000001.parquet is missing" in found(store)[0]


@pytest.mark.parametrize("allocation", [True, False])
def test_an_edited_record_is_found(store: TeacherStore, allocation: bool) -> None:
    path = record_of(store, 1, allocation=allocation)
    content = json.loads(path.read_bytes())
    content["arrays"][0]["xxh3_128"] = "0" * 32
    path.write_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    assert any("shard 1, record" in p and "edited or damaged" in p for p in found(store)), found(store)
    with pytest.raises(VerificationError, match="edited or damaged"):
        open_store(store.url).reader()


def test_a_record_under_another_shards_number_is_found(store: TeacherStore) -> None:
    path = record_of(store, 1, allocation=False)
    path.rename(path.with_name(path.name.replace("00000001", "00000002")))
    assert any("it names shard 1, its file shard 2" in problem for problem in found(store))


def test_a_deleted_allocation_is_found_and_its_number_is_not_given_away(store: TeacherStore, tools) -> None:
    last = store.catalogue().num_shards - 1
    for shard in (1, last):
        path = record_of(store, shard, allocation=True)
        data = path.read_bytes()
        path.unlink()
        assert any(f"shard {shard}, record: the record of its allocation is missing" in p for p in found(store))
        with pytest.raises(VerificationError, match="allocation is missing"):
            open_store(store.url).allocate(*tools.make_rows(3, seed=1))
        path.write_bytes(data)
    assert store.verify().ok


def test_a_deleted_commit_leaves_files_that_are_listed_and_a_shard_to_be_computed_again(store, tools) -> None:
    digest = store.digest()
    record_of(store, 1, allocation=False).unlink()
    report = store.verify()
    assert report.ok and [name.split("/c/1")[0] for name in report.unrecorded] == [
        "hidden.cls/02", "hidden.tok/01", "hidden.tok/02", "logits",
    ]  # fmt: skip
    with pytest.raises(RefusedError, match=r"logits was not captured for 1 of 1 rows \(shard 1\)"):
        store.reader().gather("logits", [8])
    assert tools.capture(store) == 1
    assert store.digest() == digest and not store.verify().unrecorded


def test_a_commit_for_another_allocation_is_found(store: TeacherStore, make_store) -> None:
    other, *_ = make_store(5, name="other")  # shard 0 holds five of the rows here
    record = next(r for r in other.shard_records(0) if r.index is None)
    store.files.create(record.file, record.encode())
    assert any("made for another allocation of rows to this shard" in problem for problem in found(store))
    with pytest.raises(VerificationError, match="another allocation"):
        store.reader()


def test_an_allocation_that_was_replaced_whole_is_found(store: TeacherStore, make_store, tools) -> None:
    """Index, token ids and their record of another set of rows, all sound in themselves: the logits are not theirs."""
    other, *_ = make_store(1, name="other")
    other.allocate(*tools.make_rows(30, seed=1))
    for name in ("index/00000001.parquet", "token_ids/c/1", "segment_ids/c/1"):
        shutil.copy(Path(other.url, name), Path(store.url, name))
    record_of(store, 1, allocation=True).unlink()
    shutil.copy(record_of(other, 1, allocation=True), Path(store.url, "commits"))
    assert any("made for another allocation" in problem for problem in found(store))
    with pytest.raises(VerificationError, match="made for another allocation"):
        open_store(store.url).reader()


def test_two_records_that_name_different_contents_are_found(store: TeacherStore) -> None:
    from dataclasses import replace

    record = next(r for r in store.shard_records(0) if r.index is None)
    forged = replace(record, files=tuple(replace(file, xxh3_128="0" * 32) for file in record.files))
    store.files.create(forged.file, forged.encode())
    assert any("two records name different contents" in problem for problem in found(store))


@pytest.mark.parametrize("edit", ["delete", "garbage", "shape", "fill", "dtype"])
def test_metadata_that_would_mislead_other_software_is_found(store: TeacherStore, edit: str) -> None:
    path = Path(store.url, "hidden.tok/02/zarr.json")
    content = json.loads(path.read_bytes())
    changed = {
        "shape": {**content, "shape": [64, 4]},
        "fill": {**content, "fill_value": 0.0},
        "dtype": {**content, "data_type": "float32"},
    }
    path.unlink()
    if edit != "delete":
        path.write_text("not json" if edit == "garbage" else json.dumps(changed[edit]))
    assert [p.split(":")[0] for p in found(store)] == ["hidden.tok@2"] or "hidden.tok@2: " in found(store)[0]


@pytest.mark.parametrize("damage", ["flip", "delete", "add", "record"])
def test_damage_to_a_sidecar_is_found(store: TeacherStore, damage: str) -> None:
    folder = Path(store.url, "sidecars", "embeddings")
    file = folder / ("record.json" if damage == "record" else "tensors.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    if damage == "delete":
        file.unlink()
    elif damage == "add":
        (folder / "modeling_evil.py").write_text("import os")
    else:
        file.write_bytes(data)
    assert any("sidecar embeddings" in problem for problem in found(store))
    with pytest.raises(KdError, match="embeddings"):
        store.sidecar("embeddings")


def test_leftovers_of_a_killed_process_are_listed_and_harmless(store: TeacherStore) -> None:
    Path(store.url, ".staging", "logits~c~99~0").write_bytes(b"half")
    Path(store.url, ".staging", "sidecars", "head").mkdir(parents=True)
    Path(store.url, "notes.txt").write_text("mine")
    report = store.verify()
    assert report.ok and report.unrecorded == (".staging/logits~c~99~0", "notes.txt")
    create_or_open(store.url, store.identity)
    assert store.verify().unrecorded == ("notes.txt",)
    assert os.listdir(Path(store.url, ".staging")) == []


def test_what_a_living_process_is_writing_is_not_swept_away(store: TeacherStore) -> None:
    with store.files.stage("logits/c/99/0", [b"slow"]) as staged:
        create_or_open(store.url, store.identity)
        staged.publish()
    assert store.files.read("logits/c/99/0") == b"slow"


def test_shards_are_verified_wherever_an_executor_puts_them(store: TeacherStore) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        assert verify_store(store.url, map_shards=pool.map).ok
        file_of(store, "logits", 2).unlink()
        assert not verify_store(store.url, map_shards=pool.map).ok


def test_a_damaged_record_names_the_signals_that_it_proved(store: TeacherStore) -> None:
    record_of(store, 1, allocation=False).write_text("{}")
    (problem,) = store.verify().problems
    assert (problem.shard, problem.signal) == (1, "record")
    assert "without a record now: hidden.cls@2, hidden.tok@1, hidden.tok@2, logits" in problem.what


def test_a_sidecar_without_its_record_is_found(store: TeacherStore) -> None:
    Path(store.url, "sidecars", "embeddings", "record.json").unlink()
    assert [problem.file for problem in store.verify().problems] == ["sidecars/embeddings/record.json"]


@pytest.mark.parametrize("name", ["store.json", "sidecars/embeddings/record.json"])
def test_a_blank_added_to_a_file_that_kd_writes_in_one_way_is_found(store: TeacherStore, name: str) -> None:
    with Path(store.url, name).open("ab") as file:
        file.write(b" \n")
    assert [problem.file for problem in store.verify().problems] == [name]


def test_damaged_metadata_of_an_array_without_shards_is_found(store: TeacherStore) -> None:
    from kd.pipeline.store import Signal, array_spec

    store.declare([array_spec(Signal("hidden.mean", 1), 4)])
    assert store.verify().ok
    path = Path(store.url, "hidden.mean/01/zarr.json")
    path.write_bytes(path.read_bytes().replace(b"NaN", b"0.0"))
    assert found(store) == [
        "hidden.mean@1: it does not describe the array as kd declared it (hidden.mean/01/zarr.json)"
    ]


def test_token_ids_that_were_committed_for_other_row_keys_are_found(store: TeacherStore, monkeypatch, tools) -> None:
    """Sound checksums, wrong join: what a broken writer would leave."""
    from kd.pipeline.store import store as module

    monkeypatch.setattr(
        module, "encode_index", lambda keys, *rest, real=module.encode_index, **named: real(keys[::-1], *rest, **named)
    )
    number = store.catalogue().num_shards
    store.allocate(*tools.make_rows(4, seed=3))
    assert found(store)[0].startswith(f"shard {number}, token_ids: token ids and row keys do not belong together")


def test_a_record_supersedes_others_for_the_arrays_that_it_names_and_no_other(store: TeacherStore) -> None:
    from dataclasses import replace

    from kd.pipeline.store.records import build_catalogue

    old = next(r for r in store.shard_records(0) if r.index is None)
    logits = next(file for file in old.files if str(file.spec.signal) == "logits")
    newer = replace(old, files=(replace(logits, xxh3_128="1" * 32),), supersedes=(old.digest,))
    newest = replace(newer, files=(replace(logits, xxh3_128="2" * 32),), supersedes=(newer.digest, old.digest))
    store.files.create(newer.file, newer.encode())
    store.files.create(newest.file, newest.encode())
    catalogue, problems = build_catalogue(open_store(store.url).shard_records(0))
    assert problems == []
    assert catalogue.files["logits"][0].xxh3_128 == "2" * 32
    assert catalogue.files["hidden.cls/02"][0] in old.files
    assert [(p.shard, p.signal) for p in store.verify().problems] == [(0, "logits")]


def test_of_records_that_disagree_about_an_array_the_one_that_stands_alone_is_named(store: TeacherStore) -> None:
    from dataclasses import replace

    path = record_of(store, 0, allocation=False)
    record = next(r for r in store.shard_records(0) if r.index is None)
    path.unlink()
    odd = next(file for file in record.files if str(file.spec.signal) == "hidden.cls@2")
    edited = replace(odd, spec=replace(odd.spec, dtype="float32", encoding="float32"))
    forged = replace(record, files=tuple(edited if file is odd else file for file in record.files))
    store.files.create(forged.file, forged.encode())
    problems = verify_store(store.url).problems
    assert [(problem.shard, problem.signal) for problem in problems] == [(0, "hidden.cls@2")]
    assert "stored as float32 [4] here and as float16 [4] in other shards" in problems[0].what
