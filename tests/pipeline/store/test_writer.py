"""A shard is committed whole and sound, or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.store import ShardWriter, Signal, TeacherStore, array_spec, create_or_open, files

LOGITS = array_spec(Signal("logits"), 3)
TOKENS = array_spec(Signal("hidden.tok", 2), 4)
WIDE = array_spec(Signal("hidden.tok", 1), 4, dtype="float32")


@pytest.fixture
def store(tmp_path: Path, identity, tools) -> TeacherStore:
    store = create_or_open(tmp_path / "s", identity, tools.layout)
    store.allocate(*tools.make_rows(20))
    store.declare([LOGITS, TOKENS, WIDE])
    return store


@pytest.fixture
def writer(store: TeacherStore) -> ShardWriter:
    return store.writer(1, [LOGITS, TOKENS, WIDE])


def some_tokens(store: TeacherStore, slots: list[int], shard: int = 1) -> np.ndarray:
    total = int(store.read_tokens(shard).token_ids.lengths[slots].sum())
    return np.ones((total, 4), dtype=np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_signal_and_row(writer: ShardWriter, bad: float) -> None:
    values = np.zeros((3, 3), dtype=np.float32)
    values[1, 2] = bad
    with pytest.raises(RefusedError, match=r"logits of row 13 \(shard 1, slot 5\) is not finite: (nan|-?inf)"):
        writer.put_rows("logits", [4, 5, 6], values)


@pytest.mark.parametrize("bad", [65520.0, -65520.0, 1e30])
def test_a_float16_overflow_is_refused_with_signal_row_and_token(store, writer: ShardWriter, bad: float) -> None:
    values = some_tokens(store, [3, 0])
    length = store.read_tokens(1).token_ids.lengths[3]
    values[length + 1, 2] = bad
    with pytest.raises(RefusedError) as refused:
        writer.put_tokens("hidden.tok@2", [3, 0], values)
    assert "hidden.tok@2 of row 8 (shard 1, slot 0, token 1) does not fit float16" in str(refused.value)
    assert "capture this signal as float32" in str(refused.value)
    writer.put_tokens("hidden.tok@1", [3, 0], values)  # float32 takes it


def test_the_largest_float16_is_kept(store: TeacherStore, writer: ShardWriter) -> None:
    values = some_tokens(store, [0])
    values[0] = [65504.0, -65504.0, 65519.0, 6e-8]
    writer.put_tokens("hidden.tok@2", [0], values)
    with pytest.raises(RefusedError, match="not finite"):
        writer.put_tokens("hidden.tok@2", [1], np.full_like(some_tokens(store, [1]), np.inf).astype(np.float16))


def test_a_float64_that_overflows_float32_is_refused(writer: ShardWriter) -> None:
    with pytest.raises(RefusedError, match="does not fit float32"):
        writer.put_rows("logits", [0], np.array([[0.0, 1e39, 0.0]]))
    writer.put_rows("logits", [0], np.array([[0.0, float(np.finfo(np.float32).max), 0.0]]))


def test_what_does_not_belong_is_refused(store: TeacherStore, writer: ShardWriter) -> None:
    rows = np.zeros((2, 3), dtype=np.float32)
    for call, words in [
        (lambda: writer.put_rows("hidden.cls@1", [0, 1], rows), "does not hold hidden.cls@1"),
        (lambda: writer.put_tokens("logits", [0, 1], rows), "use put_rows"),
        (lambda: writer.put_rows("hidden.tok@2", [0, 1], rows), "use put_tokens"),
        (lambda: writer.put_rows("logits", [0, 8], rows), "row slots 0 to"),
        (lambda: writer.put_rows("logits", [0, -1], rows), "row slots 0 to"),
        (lambda: writer.put_rows("logits", [0, 0], rows), "written twice"),
        (lambda: writer.put_rows("logits", [0, 1], rows[:1]), r"have shape \[2, 3\], got \[1, 3\]"),
        (lambda: writer.put_rows("logits", [0, 1], rows[:, :2]), r"got \[2, 2\]"),
        (lambda: writer.put_rows("logits", [0, 1], rows.astype(int)), "must be floating point"),
        (lambda: writer.put_tokens("hidden.tok@2", [0, 1], some_tokens(store, [0])), "values of these 2 rows"),
        (lambda: store.writer(99, [LOGITS]), "has no shard 99"),
        (lambda: store.writer(0, [array_spec(Signal("logits"), 4)]), "was not declared"),
        (lambda: store.writer(0, list(store.layout.input_specs)), "was not declared"),
    ]:
        with pytest.raises(RefusedError, match=words):
            call()


def test_a_row_is_written_once(writer: ShardWriter) -> None:
    writer.put_rows("logits", [2, 4], np.zeros((2, 3)))
    with pytest.raises(RefusedError, match="row 12 was written twice"):
        writer.put_rows("logits", [3, 4], np.zeros((2, 3)))


def test_a_shard_with_a_row_missing_is_not_committed(tmp_path: Path, store, writer: ShardWriter, tools) -> None:
    before = tools.tree(tmp_path)
    writer.put_rows("logits", [0, 1, 3], np.zeros((3, 3)))
    with pytest.raises(RefusedError, match="5 rows of shard 1 were never written, the first is row 10"):
        writer.commit()
    assert tools.tree(tmp_path) == before
    assert set(store.missing([LOGITS])) == {0, 1, 2}


def fill(store: TeacherStore, value: float, specs=(LOGITS, TOKENS)) -> ShardWriter:
    writer = store.writer(0, specs)
    slots = np.arange(8)
    for spec in specs:
        if spec.axis == "token":
            writer.put_tokens(spec.signal, slots, value * some_tokens(store, list(slots), 0))
        else:
            writer.put_rows(spec.signal, slots, np.full((8, 3), value))
    return writer


def test_the_first_commit_stands(tmp_path: Path, store: TeacherStore, tools) -> None:
    late = fill(store, 2.0)
    assert fill(store, 1.0).commit() is not None
    before = tools.tree(tmp_path)
    assert late.commit() is None
    assert tools.tree(tmp_path) == before
    assert store.reader().gather("logits", [0]).tolist() == [[1.0, 1.0, 1.0]]


def test_a_commit_adds_what_is_not_there_and_keeps_the_rest(store: TeacherStore) -> None:
    late = fill(store, 2.0)
    fill(store, 1.0, [LOGITS]).commit()
    record = late.commit()
    assert [file.spec for file in record.files] == [TOKENS]
    assert store.reader().gather("logits", [0]).tolist() == [[1.0, 1.0, 1.0]]
    assert store.reader().gather_tokens("hidden.tok@2", [0])[0].max() == 2.0
    assert store.verify().ok


def test_writers_of_the_same_shard_in_many_threads_agree(store: TeacherStore) -> None:
    writers = [fill(store, float(value)) for value in range(6)]
    records = []
    threads = [threading.Thread(target=lambda w=w: records.append(w.commit())) for w in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(record is not None for record in records) == 1
    reader = store.reader()
    assert len(np.unique(reader.gather("logits", np.arange(8)))) == 1
    np.testing.assert_array_equal(
        np.unique(reader.gather("logits", [0])), np.unique(reader.gather_tokens("hidden.tok@2", [0])[0])
    )
    assert store.verify().ok and not store.verify().unrecorded


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(tmp_path: Path, store, monkeypatch, tools) -> None:
    writer, before = fill(store, 1.0), tools.tree(tmp_path)

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(KdError, match="no space left on the disk"):
        writer.commit()
    monkeypatch.undo()
    assert tools.tree(tmp_path) == before
    assert writer.commit() is not None


def test_a_filesystem_without_hard_links_will_do(store: TeacherStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    assert fill(store, 1.0).commit() is not None
    assert store.files.create("commits/x.json", b"1") and not store.files.create("commits/x.json", b"2")
    assert store.files.read("commits/x.json") == b"1"


def test_a_writer_whose_allocation_is_gone_commits_nothing(tmp_path: Path, store: TeacherStore) -> None:
    writer = fill(store, 1.0)
    (record,) = (tmp_path / "s" / "commits").glob("00000000.*")
    record.unlink()
    with pytest.raises(VerificationError, match="lost its allocation"):
        writer.commit()
