"""`kd store repair`: what is damaged comes back bit for bit, and only the damaged rows are run."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.pipeline.errors import KdError, RefusedError, UsageError
from kd.pipeline.stage import Outcome, StageContext, execute
from kd.pipeline.store import open_store, verify_store
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.store.repair import RepairStore

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNALS = "logits,hidden.cls@1,hidden.tok@2"
ROWS = 16
"""In each shard of the store."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "second"], *zip(sentences[:40], sentences[100:140], strict=True)])
    return file


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, texts: Path) -> Path:
    """A captured store of pairs: three shards, sidecars, records loose."""
    torch.set_num_threads(1)
    return capture_into(tmp_path_factory.mktemp("sound"), tiny_teacher, texts, SIGNALS)


def capture_into(folder: Path, teacher: Path, texts: Path, signals: str) -> Path:
    stage = CacheTeacher(
        teacher=str(teacher),
        dataset=str(texts),
        text_column="text",
        text_pair_column="second",
        store=str(folder / "store"),
        signals=signals,
        sidecars=("embeddings", "head"),
        rows_per_shard=ROWS,
        max_length=48,
        output_dir=str(folder / "view"),
    )
    execute(stage, StageContext())
    return folder / "store"


@pytest.fixture
def store(tmp_path: Path, sound: Path) -> Path:
    shutil.copytree(sound, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that the teacher reads in this process; not the trial of its hooks."""
    from kd.stages.cache_teacher.runner import Runner

    seen: list[int] = []
    original = Runner._forward

    def forward(self: Any, token_ids: Any, segment_ids: Any, slots: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(slots))
        return original(self, token_ids, segment_ids, slots, *args, **kwargs)

    monkeypatch.setattr(Runner, "_forward", forward)
    return seen


def content(store: Path) -> dict[str, str]:
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != ".lock" and ".staging" not in path.parts
    }


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: unequal for one that was written again, equal bytes or not."""
    return {
        str(path.relative_to(store)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in store.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0x10
    path.write_bytes(data)


def repair(store: Path, teacher: Path | None, **options: Any) -> Outcome:
    made = RepairStore(store=str(store), teacher=None if teacher is None else str(teacher), device="cpu", **options)
    return execute(made, StageContext())


def record(store: Path, shard: int, *, allocation: bool) -> Path:
    (found,) = [r for r in open_store(str(store)).shard_records(shard) if (r.index is not None) == allocation]
    return store / found.file


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete", "swap"])
def test_a_damaged_signal_is_computed_again_and_nothing_else_is_touched(
    store: Path, sound: Path, tiny_teacher: Path, rows_run: list[int], damage: str
) -> None:
    file = store / "hidden.tok/02/c/1/0"
    data = file.read_bytes()
    if damage == "flip":
        flip(file)
    elif damage == "delete":
        file.unlink()
    elif damage == "swap":
        shutil.copy(store / "hidden.tok/02/c/0/0", file)
    else:
        file.write_bytes(data[:-7] if damage == "truncate" else data + b"more")
    before = stamps(store)
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None
    assert (outcome.summary["rows_computed"], sum(rows_run)) == (ROWS, ROWS)
    assert [mended["file"] for mended in outcome.summary["restored"]] == ["hidden.tok/02/c/1/0"]
    after = stamps(store)
    assert {name for name in after if before.get(name) != after[name]} == {"hidden.tok/02/c/1/0"}
    assert content(store) == content(sound)


def test_every_array_of_an_encoding_is_repaired_on_its_own(
    tmp_path: Path, tiny_teacher: Path, texts: Path, rows_run: list[int]
) -> None:
    store = capture_into(tmp_path, tiny_teacher, texts, "hidden.tok@2:float16,hidden.tok@2:int8,logits:int8")
    before = content(store)
    for name in ("hidden.tok.int8/02/c/1/0", "hidden.tok.int8.scale/02/c/1", "logits.scale/c/1"):
        rows_run.clear()
        flip(store / name, 9)
        outcome = repair(store, tiny_teacher)
        assert outcome.failure is None and sum(rows_run) == ROWS
        assert [mended["file"] for mended in outcome.summary["restored"]] == [name]
        assert content(store) == before


def test_a_sound_store_is_left_alone_and_no_teacher_is_run(
    store: Path, tiny_teacher: Path, rows_run: list[int]
) -> None:
    before = stamps(store)
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None and outcome.summary["problems_found"] == 0 and rows_run == []
    assert stamps(store) == before


def test_without_a_teacher_the_signal_is_listed_as_lost_and_the_rest_is_restored(store: Path, sound: Path) -> None:
    flip(store / "logits/c/0/0", 3)
    (store / "logits/zarr.json").unlink()
    outcome = repair(store, None)
    assert outcome.failure is not None and outcome.failure.exit_code == 4
    assert outcome.failure.details == ["logits/c/0/0: the teacher makes it again: give --teacher"]
    assert [mended["file"] for mended in outcome.summary["restored"]] == ["logits/zarr.json"]
    assert {n for n, d in content(store).items() if content(sound)[n] != d} == {"logits/c/0/0"}


@pytest.mark.parametrize(
    "name", ["zarr.json", "hidden.tok/zarr.json", "hidden.tok/02/zarr.json", "token_ids/zarr.json", "logits/zarr.json"]
)
@pytest.mark.parametrize("damage", ["delete", "garbage"])
def test_metadata_comes_back_without_a_teacher(store: Path, sound: Path, name: str, damage: str) -> None:
    (store / name).unlink()
    if damage == "garbage":
        (store / name).write_text("{")
    assert repair(store, None).failure is None
    assert content(store) == content(sound)


@pytest.mark.parametrize("allocation", [True, False])
@pytest.mark.parametrize("damage", ["flip", "empty", "half"])
def test_a_damaged_record_comes_back_without_a_teacher(store: Path, sound: Path, allocation: bool, damage: str) -> None:
    path = record(store, 1, allocation=allocation)
    data = path.read_bytes()
    flip(path) if damage == "flip" else path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    assert repair(store, None).failure is None
    assert content(store) == content(sound)


def test_a_deleted_allocation_comes_back_from_index_and_ids(store: Path, sound: Path) -> None:
    for shard in (0, 2):
        record(store, shard, allocation=True).unlink()
        assert repair(store, None).failure is None
        assert content(store) == content(sound)


def test_a_deleted_commit_is_computed_again_for_its_shard_alone(
    store: Path, sound: Path, tiny_teacher: Path, rows_run: list[int]
) -> None:
    record(store, 1, allocation=False).unlink()
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None and outcome.summary["rows_computed"] == sum(rows_run) == ROWS
    assert content(store) == content(sound)


def test_a_damaged_file_of_compacted_records_gives_the_sound_ones_and_the_rest_is_proven(
    store: Path, tiny_teacher: Path, rows_run: list[int]
) -> None:
    made = open_store(str(store))
    digest = made.digest()
    made.compact()
    (compacted,) = (store / "commits").glob("*.parquet")
    whole = compacted.read_bytes()
    for place in (200, len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3, len(whole) - 30):
        for old in (store / "commits").iterdir():
            old.unlink()
        compacted.write_bytes(whole)
        flip(compacted, place)
        assert not verify_store(str(store)).ok
        outcome = repair(store, tiny_teacher)
        assert outcome.failure is None, (place, outcome.failure)
        assert open_store(str(store)).digest() == digest and verify_store(str(store)).ok
    assert rows_run == []


@pytest.mark.parametrize("name", ["token_ids/c/1", "segment_ids/c/1"])
@pytest.mark.parametrize("damage", ["flip", "extend", "tail"])
def test_small_damage_to_ids_is_found_by_the_row_keys(store: Path, sound: Path, name: str, damage: str) -> None:
    path = store / name
    if damage == "flip":
        flip(path, 21)
    else:
        data = path.read_bytes()
        path.write_bytes(data + b"x" if damage == "extend" else data[:-3])
    assert repair(store, None).failure is None
    assert content(store) == content(sound)


@pytest.mark.parametrize("names", [("index/00000001.parquet",), ("segment_ids/c/1",)])
def test_a_lost_index_or_lost_segments_follow_from_the_token_ids(
    store: Path, sound: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (store / name).unlink()
    assert repair(store, None).failure is None
    assert content(store) == content(sound)


@pytest.mark.parametrize(
    "names", [("token_ids/c/1",), ("token_ids/c/1", "segment_ids/c/1", "index/00000001.parquet")], ids=["ids", "all"]
)
def test_lost_token_ids_come_back_from_the_texts_alone(
    store: Path, sound: Path, tiny_teacher: Path, texts: Path, rows_run: list[int], names: tuple[str, ...]
) -> None:
    for name in names:
        (store / name).unlink()
    flip(store / "logits/c/1/0", 3)
    refused = repair(store, tiny_teacher)
    assert refused.failure is not None and any("--corpus or --dataset" in line for line in refused.failure.details)
    assert any(line.startswith("logits/c/1/0: the token ids of its shard") for line in refused.failure.details)
    outcome = repair(store, tiny_teacher, dataset=str(texts), text_column="text", text_pair_column="second")
    assert outcome.failure is None and sum(rows_run) == ROWS
    assert content(store) == content(sound)


@pytest.mark.parametrize("name", ["embeddings", "head", "tokenizer", "config"])
@pytest.mark.parametrize("damage", ["file", "record", "add"])
def test_a_sidecar_is_made_again_from_the_teacher(
    store: Path, sound: Path, tiny_teacher: Path, name: str, damage: str
) -> None:
    folder = store / "sidecars" / name
    if damage == "add":
        (folder / "modeling_evil.py").write_text("import os")
    elif damage == "record":
        (folder / "record.json").unlink()
    else:
        flip(next(path for path in sorted(folder.iterdir()) if path.name != "record.json"))
    assert repair(store, tiny_teacher).failure is None
    assert content(store) == content(sound)


@pytest.mark.parametrize("damage", ["flip", "delete", "half", "edit"])
def test_store_json_comes_back_when_the_records_prove_it(
    store: Path, sound: Path, tiny_teacher: Path, damage: str
) -> None:
    path = store / "store.json"
    text = path.read_text()
    path.unlink()
    if damage != "delete":
        path.write_text(
            {"half": text[: len(text) // 2], "edit": text.replace('"max_length": 48', '"max_length": 64')}.get(
                damage, text.replace("tensors", "tensorr", 1)
            )
        )
    with pytest.raises(KdError):
        open_store(str(store))
    assert repair(store, tiny_teacher).failure is None
    assert content(store) == content(sound)


def test_store_json_that_nothing_proves_is_refused(store: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    (store / "store.json").unlink()
    with pytest.raises(KdError, match="nothing here has the digest that records name; with --teacher"):
        repair(store, None)
    shutil.rmtree(store / "commits")
    with pytest.raises(RefusedError, match=r"has no store\.json"):
        repair(store, tiny_teacher)
    assert not (store / "store.json").exists()


def test_another_teacher_is_refused_field_by_field(
    store: Path, tmp_path: Path, make_model: Callable[..., Path], rows_run: list[int]
) -> None:
    flip(store / "logits/c/0/0", 3)
    before = stamps(store)
    other = make_model(tmp_path / "other", noise=0.01)
    with pytest.raises(RefusedError) as refused:
        repair(store, other)
    assert [line.split(":")[0] for line in refused.value.details] == ["teacher.tensors"]
    assert stamps(store) == before and rows_run == []


def test_a_dry_run_says_what_would_be_run_and_writes_nothing(
    store: Path, tiny_teacher: Path, rows_run: list[int]
) -> None:
    flip(store / "logits/c/0/0", 3)
    flip(store / "hidden.tok/02/c/2/0")
    before = stamps(store)
    outcome = repair(store, tiny_teacher, dry_run=True)
    assert (outcome.summary["rows_to_compute"], outcome.summary["shards_to_compute"]) == (ROWS + 8, 2)
    assert stamps(store) == before and rows_run == []


def test_what_computes_otherwise_is_reported_and_committed_only_when_told(
    store: Path, sound: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kind of machine: the same teacher, other bytes."""
    from kd.stages.cache_teacher.capture import CaptureJob

    original = CaptureJob.fill

    def noisy(self: Any, writer: Any, specs: Any, advance: Any) -> Any:
        done = original(self, writer, specs, advance)
        for buffer in writer._buffers.values():
            buffer.reshape(-1)[0] += 0.25
        return done

    flip(store / "logits/c/1/0", 3)
    monkeypatch.setattr(CaptureJob, "fill", noisy)
    refused = repair(store, tiny_teacher)
    assert refused.failure is not None and refused.failure.exit_code == 4
    assert "--accept-recomputed" in refused.failure.details[0] and refused.summary["differs"] == ["logits/c/1/0"]
    assert len(content(store)) == len(content(sound))

    accepted = repair(store, tiny_teacher, accept_recomputed=True)
    assert accepted.failure is None and accepted.summary["accepted"] == ["logits/c/1/0"]
    changed = {name for name, digest in content(store).items() if content(sound).get(name) != digest}
    assert len(changed) == 2 and any(name.startswith("commits/00000001.") for name in changed)
    assert verify_store(str(store)).ok
    reader = open_store(str(store)).reader()
    assert reader.gather("hidden.cls@1", range(40)).shape == (40, 32)
    difference = reader.gather("logits", range(40)) - open_store(str(sound)).reader().gather("logits", range(40))
    assert (difference != 0).sum() == 1


def test_killed_between_record_and_file_of_an_accepted_repair_the_rerun_finishes_it(
    store: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.pipeline.store.files import LocalFiles
    from kd.stages.cache_teacher.capture import CaptureJob

    original, write = CaptureJob.fill, LocalFiles.write

    def noisy(self: Any, writer: Any, specs: Any, advance: Any) -> Any:
        done = original(self, writer, specs, advance)
        for buffer in writer._buffers.values():
            buffer.reshape(-1)[0] += 0.25
        return done

    class Killed(BaseException):
        pass

    def killed(self: Any, name: str, parts: Any) -> None:
        raise Killed

    flip(store / "logits/c/1/0", 3)
    monkeypatch.setattr(CaptureJob, "fill", noisy)
    monkeypatch.setattr(LocalFiles, "write", killed)
    with pytest.raises(Killed):
        repair(store, tiny_teacher, accept_recomputed=True)
    monkeypatch.setattr(LocalFiles, "write", write)
    assert [problem.file for problem in verify_store(str(store)).problems] == ["logits/c/1/0"]
    again = repair(store, tiny_teacher)
    assert again.failure is None and again.summary["accepted"] == []
    assert verify_store(str(store)).ok


def test_killed_between_two_shards_the_rerun_computes_the_other_alone(
    store: Path, sound: Path, tiny_teacher: Path, rows_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.pipeline.store.files import LocalFiles

    class Killed(BaseException):
        pass

    write, written = LocalFiles.write, []

    def killed(self: Any, name: str, parts: Any) -> None:
        if written:
            raise Killed
        written.append(name)
        write(self, name, parts)

    flip(store / "logits/c/0/0", 3)
    flip(store / "logits/c/2/0", 3)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "write", killed)
        with pytest.raises(Killed):
            repair(store, tiny_teacher)
    assert written == ["logits/c/0/0"]
    rows_run.clear()
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None and sum(rows_run) == 8
    assert content(store) == content(sound)


def test_stale_temporaries_go_and_files_of_others_stay(store: Path, sound: Path) -> None:
    (store / ".staging").mkdir(exist_ok=True)
    (store / ".staging" / "logits~c~9~0").write_bytes(b"half")
    (store / "notes.txt").write_text("mine")
    assert repair(store, None).failure is None
    assert not any((store / ".staging").iterdir()) and (store / "notes.txt").read_text() == "mine"


def test_a_record_of_another_allocation_is_taken_away(store: Path, sound: Path) -> None:
    from dataclasses import replace

    mine = next(r for r in open_store(str(store)).shard_records(1) if r.index is None)
    foreign = replace(mine, allocation="0" * 32)
    (store / foreign.file).write_bytes(foreign.encode())
    outcome = repair(store, None)
    assert outcome.failure is None and [m["file"] for m in outcome.summary["removed"]] == [foreign.file]
    assert content(store) == content(sound)


def test_options_that_do_not_go_together_are_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        RepairStore(store=str(store), corpus="c")
    with pytest.raises(UsageError, match="--text-column"):
        RepairStore(store=str(store), teacher="t", dataset="d")


@pytest.mark.slow
def test_a_worker_repairs_the_same(store: Path, sound: Path, tiny_teacher: Path) -> None:
    """One process for both rounds of work, verifying and computing: each that starts imports torch anew."""
    from distributed import LocalCluster

    flip(store / "logits/c/0/0", 3)
    (store / "hidden.tok/02/c/2/0").unlink()
    quiet: dict[str, Any] = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=1, threads_per_worker=1, **quiet) as cluster:
        outcome = repair(store, tiny_teacher, cluster=cluster.scheduler_address)
    assert outcome.failure is None and outcome.summary["rows_computed"] == ROWS + 8
    assert content(store) == content(sound)


def test_the_command_says_what_it_did(
    store: Path, tiny_teacher: Path, capfd: pytest.CaptureFixture[str], environment: None
) -> None:
    from kd.cli import main

    flip(store / "logits/c/0/0", 3)
    assert main(["store", "repair", str(store)]) == 4
    assert "give --teacher" in capfd.readouterr().err
    assert main(["store", "repair", str(store), "--teacher", str(tiny_teacher), "--dry-run"]) == 0
    assert "to run: 16 rows in 1 shards" in capfd.readouterr().out
    assert main(["store", "repair", str(store), "--teacher", str(tiny_teacher), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["ok"] and result["rows_computed"] == ROWS


def rewritten(store: Path, shard: int, *, allocation: bool, **edits: Any) -> None:
    """A record edited by somebody who gave it the name that fits."""
    import hashlib

    path = record(store, shard, allocation=allocation)
    content_ = json.loads(path.read_bytes())
    for key, value in edits.items():
        if key in content_:
            content_[key] = value
        else:
            next(item for item in content_["arrays"] if item["array"] == "logits")[key] = value
    data = json.dumps(content_, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.unlink()
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    (store / "commits" / f"{shard:08d}.{digest}.json").write_bytes(data)


def test_a_record_edited_under_a_fitting_name_is_superseded_when_file_and_teacher_agree(
    store: Path, sound: Path, tiny_teacher: Path, rows_run: list[int]
) -> None:
    rewritten(store, 1, allocation=False, xxh3_128="0" * 32)
    before = stamps(store)
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None and sum(rows_run) == ROWS
    assert "file and teacher agree" in outcome.summary["restored"][0]["how"]
    after = stamps(store)
    assert all(after[name] == before[name] for name in before)
    assert outcome.summary["store_digest"] == open_store(str(sound)).digest()


def test_two_records_of_different_contents_are_decided_by_the_teacher(
    store: Path, sound: Path, tiny_teacher: Path
) -> None:
    original = record(store, 1, allocation=False)
    data = original.read_bytes()
    rewritten(store, 1, allocation=False, xxh3_128="0" * 32)
    original.write_bytes(data)
    assert any("two records name different contents" in str(p) for p in verify_store(str(store)).problems)
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None and outcome.summary["store_digest"] == open_store(str(sound)).digest()


def test_an_edited_allocation_gives_way_to_the_one_that_the_files_make(store: Path, sound: Path) -> None:
    rewritten(store, 1, allocation=True, rows=15)
    assert repair(store, None).failure is None
    assert content(store) == content(sound)


def test_a_store_that_lost_its_compacted_records_gets_them_back(store: Path, sound: Path, tiny_teacher: Path) -> None:
    """Nothing names a shard any more but the register of views: such a store was called sound, and gc emptied it."""
    open_store(str(store)).compact()
    (compacted,) = (store / "commits").iterdir()
    compacted.unlink()
    assert {problem.shard for problem in verify_store(str(store)).problems} == {0, 1, 2}
    outcome = repair(store, tiny_teacher)
    assert outcome.failure is None and outcome.summary["rows_computed"] == 40
    assert open_store(str(store)).digest() == open_store(str(sound)).digest()
