"""`kd store export`: `datasets` opens the folder without code, and every row holds its own values."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import Outcome, StageContext, execute
from kd.pipeline.store import View, open_store, open_view
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.store import export_tables
from kd.stages.store.export import ExportStore

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("negative", "neutral", "positive")
SIGNALS = "logits,hidden.cls@1,hidden.tok@2:int8,hidden.tok@1:float16,hidden.tok@1:float32"
COUNT = 50


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, sentences: list[str]) -> Path:
    """A folder with a store and a view of 50 texts, some of them equal and some without a label."""
    folder = tmp_path_factory.mktemp("made")
    texts = [*sentences[: COUNT - 3], *sentences[:3]]
    with (folder / "texts.csv").open("w", newline="") as stream:
        rows = [[text, NAMES[row % 3] if row % 4 else ""] for row, text in enumerate(texts)]
        csv.writer(stream).writerows([["text", "label"], *rows])
    stage = CacheTeacher(
        teacher=str(tiny_teacher),
        dataset=str(folder / "texts.csv"),
        text_column="text",
        label_column="label",
        store=str(folder / "store"),
        signals=SIGNALS,
        rows_per_shard=16,
        max_length=32,
        output_dir=str(folder / "view"),
    )
    execute(stage, StageContext())
    return folder


@pytest.fixture
def view(made: Path) -> View:
    return open_view(made / "view")


def export(source: Path, output: Path, **options: Any) -> Outcome:
    return execute(ExportStore(source=str(source), output_dir=str(output), **options), StageContext())


def loaded(folder: Path, cache: Path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder), cache_dir=str(cache))


def by_id(dataset: datasets.Dataset) -> dict[bytes, dict[str, Any]]:
    shuffled = dataset.shuffle(seed=3)
    rows = {row["example_id"]: row for row in shuffled}
    assert len(rows) == len(dataset)
    return rows


def ids_of(view: View) -> list[bytes]:
    return view.examples.column("example_id").to_pylist()


def test_every_example_has_its_own_columns_and_signals(
    view: View, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_tables, "FILE_BYTES", 40_000)
    monkeypatch.setattr(export_tables, "BLOCK_BYTES", 20_000)
    summary = export(made / "view", tmp_path / "out").summary
    files = sorted(os.listdir(tmp_path / "out" / "data"))
    assert len(files) == summary["files"] > 2 and files[0] == f"train-00000-of-{len(files):05d}.parquet"
    dataset = loaded(tmp_path / "out", tmp_path / "cache")["train"]
    features = dataset.features
    assert features["label_gold"].names == [*NAMES]
    assert (features["logits"].length, features["logits"].feature.dtype) == (3, "float32")
    width = view.reader.spec("hidden.cls@1").shape[0]
    assert features["hidden_tok_1"].feature.feature.dtype == "float16"  # the first that the view was made with
    assert features["hidden_tok_2"].feature.feature.dtype == "float32"  # int8, decoded
    assert features["hidden_tok_2"].feature.length == features["hidden_cls_1"].length == width
    rows = by_id(dataset)
    reader, examples = view.reader, view.examples.to_pylist()
    for number, example in enumerate(examples):
        row, where = rows[example["example_id"]], view.rows[[number]]
        assert (row["text_a"], row["label_gold"]) == (example["text_a"], example["label_gold"])
        assert row["input_ids"] == reader.gather_tokens("token_ids", where)[0][0].tolist()
        assert row["token_type_ids"] == [0] * len(row["input_ids"])
        np.testing.assert_array_equal(np.float32(row["logits"]), reader.gather("logits", where)[0])
        np.testing.assert_array_equal(np.float16(row["hidden_cls_1"]), reader.gather("hidden.cls@1", where)[0])
        for layer, dtype in ((1, np.float16), (2, np.float32)):
            values, lengths = reader.gather_tokens(f"hidden.tok@{layer}", where)
            np.testing.assert_array_equal(np.array(row[f"hidden_tok_{layer}"], dtype), values[0])
            assert values.dtype == dtype and len(row[f"hidden_tok_{layer}"]) == lengths[0]
    assert summary["rows"] == COUNT and {row["label_gold"] for row in rows.values()} == {None, 0, 1, 2}


def test_signals_may_be_chosen_in_any_encoding(view: View, made: Path, tmp_path: Path) -> None:
    export(made / "view", tmp_path / "out", signals="hidden.tok@1:float32,hidden.tok@1:float16")
    rows = by_id(loaded(tmp_path / "out", tmp_path / "cache")["train"])
    values, _ = view.reader.gather_tokens("hidden.tok@1:float32", view.rows[:1])
    row = rows[ids_of(view)[0]]
    assert "logits" not in row
    np.testing.assert_array_equal(np.float32(row["hidden_tok_1_float32"]), values[0])
    np.testing.assert_array_equal(np.float16(row["hidden_tok_1_float16"]), values[0].astype(np.float16))


def test_topk_rows_are_in_the_common_shape(view: View, made: Path, tmp_path: Path) -> None:
    assert export(made / "view", tmp_path / "out", format="topk", k=2).summary["rows"] == COUNT
    dataset = loaded(tmp_path / "out", tmp_path / "cache")["train"]
    assert dataset.column_names == ["example_id", "input_ids", "attention_mask", "token_ids", "top_values"]
    rows = by_id(dataset)
    for number, name in enumerate(ids_of(view)):
        logits = view.reader.gather("logits", view.rows[[number]])[0]
        row = rows[name]
        best = sorted(range(3), key=lambda label: -logits[label])[:2]
        assert row["token_ids"] == best and row["attention_mask"] == [1] * len(row["input_ids"])
        np.testing.assert_array_equal(np.float32(row["top_values"]), logits[best])
    everything = export(made / "view", tmp_path / "all", format="topk")
    assert everything.artifact is not None
    assert len(loaded(tmp_path / "all", tmp_path / "cache")["train"][0]["token_ids"]) == 3


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    columns = export_tables.top_columns(np.array([[1.0, 2.0, 2.0], [-1.0, -1.0, -3.0]], np.float32), 2)
    assert columns["token_ids"].to_pylist() == [[1, 2], [0, 1]]
    assert columns["top_values"].to_pylist() == [[2.0, 2.0], [-1.0, -1.0]]


def test_a_store_alone_exports_all_its_rows_by_row_key(made: Path, tmp_path: Path) -> None:
    export(made / "store", tmp_path / "out", signals="logits")
    dataset = loaded(tmp_path / "out", tmp_path / "cache")["train"]
    store = open_store(made / "store")
    assert len(dataset) == COUNT - 3  # equal texts are one row
    keys = store.index().row_keys(np.arange(3))
    found = {row["row_key"]: row for row in dataset}
    for row in range(3):
        np.testing.assert_array_equal(
            np.float32(found[keys[row].tobytes()]["logits"]), store.reader().gather("logits", [row])[0]
        )


def test_splits_of_the_corpus_become_splits(view: View, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "view"
    folder.mkdir()
    (folder / "manifest.json").write_text(
        (made / "view" / "manifest.json")
        .read_text()
        .replace('"../store"', f'"{os.path.relpath(made / "store", folder)}"')
    )
    table = view.examples
    splits = pa.array(["test" if row % 5 == 0 else "dev-1" if row % 5 == 1 else None for row in range(COUNT)])
    index = table.schema.get_field_index("split")
    pq.write_table(table.set_column(index, "split", splits), folder / "examples.parquet")
    summary = export(folder, tmp_path / "out", signals="logits").summary
    found = loaded(tmp_path / "out", tmp_path / "cache")
    assert {name: len(split) for name, split in found.items()} == {"test": 10, "dev_1": 10, "train": 30}
    assert summary["splits"] == {"dev_1": 10, "test": 10, "train": 30}
    assert {row["example_id"] for row in found["test"]} == {*ids_of(view)[::5]}


def test_the_card_says_what_the_columns_are_and_leaves_the_licence_open(view: View, made: Path, tmp_path: Path) -> None:
    export(made / "view", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    described = yaml.safe_load(head)
    assert "license" not in described and "# license:" in head
    assert described["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    features = {feature["name"]: feature for feature in described["dataset_info"]["features"]}
    assert features["label_gold"]["dtype"]["class_label"]["names"] == {str(i): name for i, name in enumerate(NAMES)}
    for words in ("`hidden.tok@2:int8`", "`hidden.tok@1:float16`", "/ 253.9", "none", "negative, neutral, positive"):
        assert words in body
    assert str(view.store.identity.teacher["tensors"]) in body


def test_an_export_is_an_artifact(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = export(made / "view", out, signals="logits")
    assert first.artifact is not None and first.artifact.kind == "export"
    assert first.artifact.content["files"] == {"data/train-00000-of-00001.parquet": COUNT}
    assert export(made / "view", out, signals="logits").skipped
    with pytest.raises(RefusedError, match="made with other settings"):
        export(made / "view", out, signals="hidden.cls@1")

    # Killed while it wrote: the same command starts its files anew.
    monkeypatch.setattr(export_tables.SplitFiles, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(made / "view", tmp_path / "killed", signals="logits")
    assert [*(tmp_path / "killed" / "data").glob("*.part")]
    monkeypatch.undo()
    again = export(made / "view", tmp_path / "killed", signals="logits")
    assert not again.skipped and os.listdir(tmp_path / "killed" / "data") == ["train-00000-of-00001.parquet"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    for options, error, words in (
        ({"k": 2}, UsageError, "--k goes with"),
        ({"format": "topk", "k": 0}, UsageError, "at least one"),
        ({"format": "topk", "signals": "hidden.cls@1"}, UsageError, "logits alone"),
        ({"signals": "hidden.mean@2"}, RefusedError, "lack"),
        ({"signals": "logits:int8"}, RefusedError, "lack"),
    ):
        with pytest.raises(error, match=words):
            export(made / "view", tmp_path / "out", **options)
    with pytest.raises(UsageError, match="has 3 labels"):
        export(made / "view", tmp_path / "out", format="topk", k=4)
    with pytest.raises(RefusedError, match=r"holds hidden\.mean@1 for 0 of"):
        export(made / "store", tmp_path / "out", signals="hidden.mean@1")
    assert not (tmp_path / "out").exists()
