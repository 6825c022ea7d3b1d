"""A corpus: how rows are treated, what identifies them, and the folder that `datasets` opens."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import RefusedError
from kd.stages.corpus import Corpus, DatasetSource, example_ids, load_corpus, open_corpus, write_corpus
from kd.stages.corpus import corpus as corpus_module
from kd.stages.corpus.corpus import join_unlabelled
from kd.stages.corpus.schema import example_id, schema


def load(folder: Path, columns: dict[str, list[Any]], **fields: Any) -> Corpus:
    pq.write_table(pa.table(columns), folder / "x.parquet")
    options = {"text_column": "text", **fields}
    if "label" in columns:
        options.setdefault("label_column", "label")
    allow_unlabelled = options.pop("allow_unlabelled", True)
    return load_corpus(DatasetSource(dataset=str(folder / "x.parquet"), **options), allow_unlabelled=allow_unlabelled)


def finish(corpus: Corpus, folder: Path) -> Path:
    write_manifest(folder, {"kind": "corpus", "fingerprint": "0", "content": write_corpus(corpus, folder)})
    return folder


def test_empty_texts_are_dropped_and_counted(tmp_path: Path) -> None:
    corpus = load(tmp_path, {"text": ["a", "", None, " \n", "b"], "label": [0, 1, 2, 3, 1]})
    assert corpus.texts()[0] == ["a", "b"]
    assert (corpus.counts["rows_read"], corpus.counts["empty_dropped"], corpus.counts["rows"]) == (5, 3, 2)


def test_a_pair_with_one_empty_text_is_dropped(tmp_path: Path) -> None:
    corpus = load(tmp_path, {"text": ["a", "b", ""], "other": ["x", None, "y"]}, text_pair_column="other")
    assert corpus.texts() == (["a"], ["x"])
    assert corpus.counts["empty_dropped"] == 2


def test_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    texts = ["  trailing  ", "tab\there", "e\u0301", "zero\u200bwidth", "nul\0"]
    assert load(tmp_path, {"text": texts}).texts()[0] == texts


def test_duplicates_are_kept_with_ids_of_their_own_and_counted(tmp_path: Path) -> None:
    corpus = load(tmp_path, {"text": ["a", "b", "a", "a"], "label": [0, 0, 0, 1]})
    assert (len(corpus), corpus.counts["duplicates"], corpus.counts["conflicting_labels"]) == (4, 2, 3)
    assert len(set(corpus.table["example_id"].to_pylist())) == 4


def test_a_label_without_gold_contradicts_none(tmp_path: Path) -> None:
    assert load(tmp_path, {"text": ["a", "a"], "label": [0, -1]}).counts["conflicting_labels"] == 0


def test_labels_can_be_required(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"1 of 2 rows .* have no label"):
        load(tmp_path, {"text": ["a", "b"], "label": [0, -1]}, allow_unlabelled=False)
    with pytest.raises(RefusedError, match=r"2 of 2 rows .* have no label"):
        load(tmp_path, {"text": ["a", "b"]}, allow_unlabelled=False)


def test_the_table_has_the_schema_of_its_task(tmp_path: Path) -> None:
    for label, task in (([0, 1], "single-label"), ([0.5, 1.5], "regression"), ([["a"], []], "multi-label")):
        corpus = load(tmp_path, {"text": ["a", "b"], "label": label})
        assert corpus.table.schema == schema(task)
        corpus.table.validate(full=True)


# Identity --------------------------------------------------------------------------------------------------------


def test_the_id_of_an_example_is_the_documented_hash() -> None:
    from hashlib import blake2b

    assert example_id("né", None) == blake2b(b"kd-example-1\x1f3\x1fn\xc3\xa9\x1f0", digest_size=16).digest()
    assert example_id("a", "b", 2) == blake2b(b"kd-example-1\x1f1\x1fa\x1fb\x1f2", digest_size=16).digest()


def test_the_unicode_form_of_a_text_does_not_change_its_id() -> None:
    assert example_id("cafe\u0301") == example_id("café")


@given(st.lists(st.tuples(st.text("ab\x1f0", max_size=4), st.none() | st.text("ab\x1f0", max_size=4)), max_size=30))
def test_different_texts_never_share_an_id(pairs: list[tuple[str, str | None]]) -> None:
    distinct = {(unicodedata.normalize("NFC", a), b) for a, b in pairs}
    assert len({example_id(a, b) for a, b in distinct}) == len(distinct)


def test_an_id_does_not_depend_on_task_file_split_or_label(tmp_path: Path) -> None:
    labelled = load(tmp_path, {"text": ["a", "b", "a"], "label": [0, 1, 0]})
    scored = load(tmp_path, {"text": ["a", "b", "a"], "label": [0.5, 1.5, 0.5]})
    assert labelled.table["example_id"] == scored.table["example_id"]
    assert labelled.table["example_id"].to_pylist() == example_ids(["a", "b", "a"])[0]


def test_the_fingerprint_ignores_order_and_sees_everything_else(tmp_path: Path) -> None:
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    reference = load(tmp_path, rows).fingerprint
    assert load(tmp_path, {"text": ["c", "a", "b"], "label": [1, 0, 1]}).fingerprint == reference
    others = [
        {"text": ["a", "b", "c "], "label": [0, 1, 1]},
        {"text": ["a", "b", "c"], "label": [0, 1, 0]},
        {"text": ["a", "b", "c"], "label": [0, 1, -1]},
        {"text": ["a", "b"], "label": [0, 1]},
        {"text": ["a", "b", "c", "c"], "label": [0, 1, 1, 1]},
        {"text": ["a", "b", "c"], "label": ["0", "1", "x"]},
    ]
    assert len({reference, *(load(tmp_path, other).fingerprint for other in others)}) == 7


def test_the_unicode_form_of_a_text_changes_the_fingerprint(tmp_path: Path) -> None:
    # The teacher's tokenizer may tell the two apart, though they are one example.
    assert load(tmp_path, {"text": ["café"]}).fingerprint != load(tmp_path, {"text": ["cafe\u0301"]}).fingerprint


# Transfer text ---------------------------------------------------------------------------------------------------


def test_transfer_text_is_joined_without_labels_and_without_what_is_known(tmp_path: Path) -> None:
    main = load(tmp_path, {"text": ["a", "b", "b"], "label": [0, 1, 1]})
    other = load(tmp_path, {"text": ["b", "c", "c", "d"], "label": [1.5, 2.5, 2.5, 0.1]})
    joined = join_unlabelled(main, [other, other])
    assert joined.texts()[0] == ["a", "b", "b", "c", "d"]
    assert joined.labels()[0].tolist() == [0, 1, 1, -1, -1]
    assert joined.table.slice(0, 3) == main.table
    counts = joined.counts
    assert (counts["rows"], counts["transfer_rows"], counts["transfer_known"], counts["unlabelled"]) == (5, 2, 6, 2)
    assert len(set(joined.table["example_id"].to_pylist())) == 5


def test_transfer_text_of_another_shape_is_refused(tmp_path: Path) -> None:
    main = load(tmp_path, {"text": ["a"], "other": ["b"]}, text_pair_column="other")
    with pytest.raises(RefusedError, match="as many texts per row"):
        join_unlabelled(main, [load(tmp_path, {"text": ["a"]})])


# On disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [[0, 1, -1], [0.5, None, 1.5], [["a"], ["a", "b"], None]])
def test_what_is_written_is_read_back(tmp_path: Path, label: list[Any]) -> None:
    corpus = load(tmp_path, {"text": ["a", "b", "c"], "label": label})
    opened = open_corpus(finish(corpus, tmp_path / "corpus"))
    assert opened.table == corpus.table
    assert (opened.info, opened.counts, opened.fingerprint) == (corpus.info, corpus.counts, corpus.fingerprint)
    assert opened.replaced().fingerprint == corpus.fingerprint
    assert opened.labels()[0].tolist() == corpus.labels()[0].tolist()


def test_pairs_are_read_back(tmp_path: Path) -> None:
    corpus = load(tmp_path, {"text": ["a", "b"], "other": ["x", "y"]}, text_pair_column="other")
    opened = open_corpus(finish(corpus, tmp_path / "corpus"))
    assert opened.texts() == (["a", "b"], ["x", "y"])


def test_datasets_opens_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for name in ("train", "test"):
        pq.write_table(pa.table({"text": [f"{name} text"], "label": ["yes"]}), tmp_path / f"{name}.parquet")
    corpus = load_corpus(DatasetSource(dataset=f"{tmp_path}:train+test", text_column="text", label_column="label"))
    folder = finish(corpus, tmp_path / "corpus")
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: split["text_a"][:] for name, split in loaded.items()} == {
        "train": ["train text"],
        "test": ["test text"],
    }


def test_a_large_split_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "ROWS_PER_FILE", 4)
    corpus = load(tmp_path, {"text": [f"text {i}" for i in range(10)]})
    folder = finish(corpus, tmp_path / "corpus")
    names = sorted(file.name for file in (folder / "data").iterdir())
    assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert open_corpus(folder).texts() == corpus.texts()


def test_the_same_corpus_is_the_same_bytes(tmp_path: Path) -> None:
    corpus = load(tmp_path, {"text": ["a", "b"], "label": [0, 1]})
    assert write_corpus(corpus, tmp_path / "one") == write_corpus(corpus, tmp_path / "two")


def test_a_corpus_whose_files_changed_is_refused(tmp_path: Path) -> None:
    folder = finish(load(tmp_path, {"text": ["a", "b"]}), tmp_path / "corpus")
    file = next((folder / "data").iterdir())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RefusedError, match="not the file that was written\n  xxh3_128"):
        open_corpus(folder)
    file.unlink()
    with pytest.raises(RefusedError, match="is missing"):
        open_corpus(folder)


def test_a_folder_without_manifest_is_no_corpus(tmp_path: Path) -> None:
    write_corpus(load(tmp_path, {"text": ["a"]}), tmp_path / "corpus")
    with pytest.raises(RefusedError, match="has no manifest"):
        open_corpus(tmp_path / "corpus")


def test_a_manifest_that_was_edited_is_refused_whatever_stands_in_it(tmp_path: Path) -> None:
    folder = finish(load(tmp_path, {"text": ["a", "b"], "label": [0, 1]}), tmp_path / "corpus")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = manifest["content"]
    edits = [{name: value} for name in ("files", "info", "counts", "corpus_fingerprint") for value in (None, [5], 5)]
    edits += [{"files": [None]}, {"files": []}, {"num_rows": 3}, {"info": {}}]
    edits += [{"info": content["info"] | change} for change in ({"task": ["x"]}, {"label_names": [1]}, {"more": 1})]
    for edit in edits:
        (folder / "manifest.json").write_text(json.dumps(manifest | {"content": content | edit}))
        with pytest.raises(RefusedError, match=r"edited or damaged|what no corpus says|has \d rows"):
            print(edit, open_corpus(folder).info)
