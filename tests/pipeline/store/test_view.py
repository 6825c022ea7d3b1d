"""A view joins examples to rows by content: never to the wrong row, store or teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import KdError, RefusedError, VerificationError
from kd.pipeline.store import Signal, create_or_open, open_view, write_view
from kd.pipeline.store.keys import row_keys

INFO = {"task": "single-label", "label_names": ["no", "maybe", "yes"]}


def make_view(path: Path, store, rows: np.ndarray, signals=("logits", "hidden.tok@2")) -> Path:
    ids = [bytes([i]) * 16 for i in range(len(rows))]
    examples = pa.table(
        {
            "example_id": pa.array(ids, type=pa.binary(16)),
            "text_a": [f"text {i}" for i in range(len(rows))],
            "label_gold": pa.array(range(len(rows)), type=pa.int32()),
        }
    )
    content = write_view(
        path, examples, rows, store, [Signal.parse(s) for s in signals], corpus={"info": INFO, "fingerprint": "c"}
    )
    write_manifest(path, {"kind": "view", "fingerprint": "f" * 32, "content": content})
    return path


@pytest.fixture
def made(make_store, tmp_path: Path):
    store, ids, segments, rows = make_store(20)
    chosen = np.array([5, 3, 3, 19])  # the view has its own order, and may name a row twice
    return store, make_view(tmp_path / "view", store, rows[chosen]), ids.take(chosen), segments.take(chosen)


def test_a_view_gives_examples_rows_and_store(made, tools) -> None:
    store, path, ids, segments = made
    view = open_view(path)
    assert len(view) == 4 and view.info == INFO and view.signals == (Signal("logits"), Signal("hidden.tok", 2))
    assert view.examples.column_names == ["example_id", "text_a", "label_gold", "row", "row_key"]
    assert view.examples.column("text_a").to_pylist()[3] == "text 3"
    assert view.store.digest() == store.digest() and view.fingerprint == "f" * 32
    view.check_coverage(["logits", Signal("hidden.tok", 2)])
    np.testing.assert_array_equal(
        view.reader.gather("logits", view.rows), tools.answer(tools.specs[0], ids, segments)
    )  # joined by content
    np.testing.assert_array_equal(view.reader.row_keys(view.rows), row_keys(ids, segments))


def test_a_view_moves_together_with_its_store(made, tmp_path: Path) -> None:
    assert made[1].parent == tmp_path
    (tmp_path / "elsewhere").mkdir()
    for name in ("store", "view"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert len(open_view(tmp_path / "elsewhere" / "view")) == 4
    shutil.move(tmp_path / "elsewhere" / "store", tmp_path / "gone")
    with pytest.raises(RefusedError, match=r"points to the store .* which cannot be opened"):
        open_view(tmp_path / "elsewhere" / "view")


def test_coverage_lists_what_is_missing_with_counts_and_ids(made, tools, tmp_path: Path) -> None:
    store, *_ = made
    more, more_segments = tools.make_rows(3, seed=1)
    rows = np.concatenate([[0], store.allocate(more, more_segments).rows])
    view = open_view(make_view(tmp_path / "partial", store, rows))
    with pytest.raises(RefusedError) as refused:
        view.check_coverage(["logits", "token_ids", "hidden.mean@1"])
    message = str(refused.value)
    assert f"logits: 3 of 4 examples lack it, first {'01' * 16}, {'02' * 16}, {'03' * 16}" in message
    assert "hidden.mean@1: 4 of 4 examples lack it, first " + "00" * 16 in message
    assert "token_ids:" not in message
    assert "--signals logits,hidden.mean@1" in message


def edit_examples(path: Path, **columns) -> None:
    table = pq.read_table(path / "examples.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), table.schema.field(name), [values])
    pq.write_table(table, path / "examples.parquet")


def test_an_example_joined_to_another_row_is_refused(made) -> None:
    _, path, *_ = made
    rows = open_view(path).rows.copy()
    edit_examples(path, row=pa.array(np.array([rows[1], *rows[1:]])))
    with pytest.raises(VerificationError) as refused:
        open_view(path)
    assert f"example 0 was joined to row {rows[1]}" in str(refused.value)
    assert "1 of 4 examples" in str(refused.value) and "row key in the view" in str(refused.value)


def test_a_row_number_outside_the_store_is_refused(made) -> None:
    _, path, *_ = made
    edit_examples(path, row=pa.array([0, 1, 2, 10**9]))
    with pytest.raises(RefusedError, match="has no row 1000000000"):
        open_view(path)


def test_a_store_of_another_identity_in_the_same_place_is_refused(made, identity, tmp_path: Path) -> None:
    store, path, *_ = made
    shutil.rmtree(store.url)
    create_or_open(store.url, replace(identity, capture={"max_length": 1}))
    with pytest.raises(RefusedError, match="was made for another store"):
        open_view(path)


def test_the_same_rows_captured_in_another_order_are_noticed(made, identity, tools, tmp_path: Path) -> None:
    store, path, *_ = made
    shutil.rmtree(store.url)
    ids, segments = tools.make_rows(20)
    again = create_or_open(store.url, identity, store.layout)
    again.allocate(ids.take(np.arange(20)[::-1]), segments.take(np.arange(20)[::-1]))
    tools.capture(again)
    with pytest.raises(VerificationError, match="which holds another input"):
        open_view(path)


@pytest.mark.parametrize("damage", ["truncate", "delete", "rows", "column"])
def test_a_damaged_view_is_refused_in_one_sentence(made, damage: str) -> None:
    _, path, *_ = made
    file = path / "examples.parquet"
    data, table = file.read_bytes(), pq.read_table(file)
    file.unlink()
    if damage == "truncate":
        file.write_bytes(data[:-10])
    elif damage == "rows":
        pq.write_table(table.slice(0, 3), file)
    elif damage == "column":
        pq.write_table(table.drop_columns(["row_key"]), file)
    with pytest.raises(VerificationError, match=r"cannot be read|has 3 rows, the manifest says 4|lacks the column"):
        open_view(path)


def test_a_folder_that_is_no_view_is_refused(made, tmp_path: Path) -> None:
    store, path, *_ = made
    with pytest.raises(RefusedError, match="is a store, not a view"):
        open_view(store.url)
    with pytest.raises(RefusedError, match=r"has no manifest\.json"):
        open_view(path.parent)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["content"]["store"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(KdError, match="lacks 'store'"):
        open_view(path)


def test_as_many_rows_as_examples(make_store, tmp_path: Path) -> None:
    store, _, _, rows = make_store(5)
    with pytest.raises(RefusedError, match="3 examples, 5 rows"):
        write_view(tmp_path / "v", pa.table({"text_a": ["a", "b", "c"]}), rows, store, [])


def test_a_view_of_no_examples_opens(make_store, tmp_path: Path) -> None:
    store, *_ = make_store(5)
    view = open_view(make_view(tmp_path / "empty", store, np.empty(0, dtype=np.int64)))
    assert len(view) == 0
    view.check_coverage(["logits"])
