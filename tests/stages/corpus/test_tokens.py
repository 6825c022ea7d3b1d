"""Token tasks in a corpus: words and tags read, numbered by name, hidden by row, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.pipeline.artifact import write_manifest
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.ragged import Ragged
from kd.stages.corpus import Corpus, DatasetSource, hide_labels, load_corpus, open_corpus, write_corpus
from kd.stages.corpus.corpus import join_unlabelled
from kd.stages.corpus.tokens import read_tags, read_words

WORDS = [["Ann", "met", "Bob", "Lee"], ["no", "names"], ["Ann"]]
TAGS = [["B-PER", "O", "B-PER", "I-PER"], ["O", "O"], ["B-PER"]]


def load(folder: Path, words: Any, tags: Any = None, *, label_names: Any = None, **fields: Any) -> Corpus:
    columns = {"tokens": words} if tags is None else {"tokens": words, "tags": tags}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    fields = {"label_column": None if tags is None else "tags", **fields}
    source = DatasetSource(dataset=str(folder / "x.parquet"), text_column="tokens", **fields)
    return load_corpus(source, label_names=label_names)


def rows_of(tags: Ragged) -> list[list[int]]:
    return [row.tolist() for row in tags]


def test_a_list_of_words_beside_a_list_of_tags_is_a_token_task(tmp_path: Path) -> None:
    corpus = load(tmp_path, WORDS, TAGS)
    assert (corpus.info.task, corpus.info.label_names) == ("token", ("B-PER", "I-PER", "O"))
    assert [text.split(" ") for text in corpus.texts()[0]] == WORDS
    tags, has_gold = corpus.tags()
    assert (rows_of(tags), tags.values.dtype) == ([[0, 2, 0, 1], [2, 2], [0]], np.int64)
    assert has_gold.tolist() == [True] * 3
    assert corpus.num_words.tolist() == [4, 2, 1]


def test_words_and_tags_of_json_lines_and_of_datasets_are_those_of_parquet(tmp_path: Path) -> None:
    import datasets

    expected = load(tmp_path, WORDS, TAGS)
    rows = [{"tokens": words, "tags": tags} for words, tags in zip(WORDS, TAGS, strict=True)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    numbers = [[names.index(tag) for tag in tags] for tags in TAGS]
    saved = datasets.Dataset.from_dict({"tokens": WORDS, "tags": numbers}, features=features)
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "saved")
    for place in ("x.jsonl", "saved"):
        corpus = load_corpus(DatasetSource(dataset=str(tmp_path / place), text_column="tokens", label_column="tags"))
        assert corpus.with_label_names(expected.info.label_names).table["tags"] == expected.table["tags"]
    assert corpus.info.label_names == tuple(names)


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))])
def test_words_may_be_lists_of_any_make(tmp_path: Path, kind: pa.DataType) -> None:
    plain = pa.array(WORDS, pa.list_(pa.string()))
    if pa.types.is_dictionary(kind.value_type):
        words = pa.ListArray.from_arrays(plain.offsets, plain.values.dictionary_encode())
    else:
        words = plain.cast(kind)
    assert load(tmp_path, words, TAGS).texts() == load(tmp_path, WORDS, TAGS).texts()


def test_integers_without_names_are_their_own(tmp_path: Path) -> None:
    corpus = load(tmp_path, WORDS, [[3, 0, 3, 4], [0, 0], [1]])
    assert corpus.info.label_names == ("0", "1", "2", "3", "4")
    assert rows_of(corpus.tags()[0]) == [[3, 0, 3, 4], [0, 0], [1]]


def test_rows_without_tags_have_no_gold_and_rows_without_words_are_dropped(tmp_path: Path) -> None:
    words = [*WORDS, [], None]
    corpus = load(tmp_path, words, [TAGS[0], None, TAGS[2], [], ["O"]])
    assert corpus.counts["empty_dropped"] == 2
    tags, has_gold = corpus.tags()
    assert rows_of(tags) == [[0, 2, 0, 1], [-1, -1], [0]]
    assert has_gold.tolist() == [True, False, True]
    assert corpus.table["tags"].to_pylist()[1] is None
    corpus = load(tmp_path, WORDS, [[0, 1, 0, 2], [-1, -1], [0]])
    assert corpus.tags()[1].tolist() == [True, False, True]


@pytest.mark.parametrize("tags", [None, [None, None, None]])
def test_words_without_a_column_of_tags_are_an_unlabelled_token_corpus(tmp_path: Path, tags: Any) -> None:
    corpus = load(tmp_path, WORDS, tags)
    assert (corpus.info.task, corpus.info.label_names, corpus.counts["unlabelled"]) == ("token", (), 3)
    named = corpus.with_label_names(("O", "B-PER"))
    assert (named.info.label_names, rows_of(named.tags()[0])[0]) == (("O", "B-PER"), [-1] * 4)


@pytest.mark.parametrize(
    ("words", "tags", "fields", "message"),
    [
        ([["a", None]], [["O", "O"]], {}, "holds null as word 1 of row 0"),
        ([["a"], ["b", "", "c"]], [["O"], ["O"] * 3], {}, r"x\.parquet holds '' as word 1 of row 1"),
        ([["a"], None, ["New York"]], [["O"], None, ["O"]], {}, "'New York', which holds a space, as word 0 of row 2"),
        ([["a"], ["b", "c"]], [["O"], ["O"]], {}, r"row 1 of .* has 2 words and 1 tags .*its words: 'b c'.*\['O'\]"),
        ([["a"]], [["O", "O"]], {}, "row 0 .* has 1 words and 2 tags"),
        ([["a"]], [[]], {}, "has 1 words and 0 tags"),
        ([["a", "b"]], [["O", None]], {}, "holds None as tag 1 of row 0; expected a name"),
        ([["a"], ["b"]], [["O"], [""]], {}, "holds '' as tag 0 of row 1"),
        ([["a", "b"]], [[0, -100]], {}, "holds -100 as tag 1 of row 0; expected a number from 0"),
        ([["a", "b"]], [[0, 1 << 15]], {}, "holds 32768 as tag 1 of row 0"),
        ([["a"]], [[0.5]], {}, "holds list<element: double>; words need a list of tags"),
        ([["a"]], [1], {}, "holds int64; words need a list of tags.*join the words if a row has one label"),
        (["a b"], [["O", "O"]], {"task": "token"}, "holds string; task 'token' needs a list of words"),
        ([[1, 2]], [["O", "O"]], {}, "holds list<element: int64>, not text"),
        ([["a"]], [["O"]], {"task": "multi-label"}, "not text.*--task token"),
        ([["a"]], [["O"]], {"label_column": "tags,tokens_too"}, "no column 'tokens_too'"),
    ],
)
def test_what_are_no_words_or_tags_is_refused_with_its_place(
    tmp_path: Path, words: Any, tags: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=f"(?s){message}"):
        load(tmp_path, words, tags, **fields)


def test_a_table_of_text_holds_no_words(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("tokens,tags\na b,O O\n")
    source = DatasetSource(dataset=str(tmp_path / "x.csv"), text_column="tokens", label_column="tags", task="token")
    with pytest.raises(RefusedError, match=r"x\.csv holds string(?s:.*)CSV and TSV hold no lists"):
        load_corpus(source)


def test_json_words_of_several_types_are_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"tokens": ["a"]}\n{"tokens": ["b", 3]}\n')
    with pytest.raises(RefusedError, match=r"list of str \(line 1\), list of str and int \(line 2\)"):
        load_corpus(DatasetSource(dataset=str(tmp_path / "x.jsonl"), text_column="tokens"))


def test_pairs_of_lists_of_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'b': a token task has one text per row"):
        DatasetSource(dataset="x", text_column="a", text_pair_column="b", task="token")
    with pytest.raises(RefusedError, match="a token task has one text per row"):
        load(tmp_path, WORDS, TAGS, text_pair_column="tags", label_column=None)


# Names -----------------------------------------------------------------------------------------------------------


def test_tags_are_numbered_as_the_teacher_numbers_its_names(tmp_path: Path) -> None:
    expected = [[1, 0, 1, 2], [0, 0], [1]]
    for corpus in (
        load(tmp_path, WORDS, TAGS, label_names=("O", "B-PER", "I-PER", "B-LOC")),
        load(tmp_path, WORDS, TAGS).with_label_names(("O", "B-PER", "I-PER", "B-LOC")),
    ):
        assert corpus.counts["labels_matched_by"] == "name"
        assert rows_of(corpus.tags()[0]) == expected
    with pytest.raises(RefusedError, match=r"'I-PER' .* is not one of the 2 expected classes"):
        load(tmp_path, WORDS, TAGS, label_names=("O", "B-PER"))


def test_words_can_be_text_and_text_cannot_be_words(tmp_path: Path) -> None:
    assert load(tmp_path, WORDS).with_label_names(("a", "b"), task="single-label").labels()[0].tolist() == [-1] * 3
    with pytest.raises(RefusedError, match="'token', where 'single-label' is expected"):
        load(tmp_path, WORDS, TAGS).with_label_names(("a", "b"), task="single-label")
    with pytest.raises(RefusedError, match="no list of words, which task 'token' needs"):
        load(tmp_path, ["a text"]).with_label_names(("O",), task="token")


# Hiding, joining, writing ----------------------------------------------------------------------------------------


def test_a_row_keeps_all_its_tags_or_none(tmp_path: Path) -> None:
    corpus = load(tmp_path, WORDS, TAGS)
    hidden = hide_labels(corpus, labels_total=2)
    tags, has_gold = hidden.tags()
    assert (has_gold.sum(), hidden.counts["labels_hidden"], len(hidden)) == (2, 1, 3)
    for row, known in enumerate(has_gold):
        assert tags[row].tolist() == (corpus.tags()[0][row].tolist() if known else [-1] * len(WORDS[row]))
    with pytest.raises(UsageError, match="needs one class per row; the task is 'token'"):
        hide_labels(corpus, labels_per_class=1)


def test_further_words_are_joined_without_tags_and_text_is_not(tmp_path: Path) -> None:
    main = load(tmp_path, WORDS, TAGS)
    joined = join_unlabelled(main, [load(tmp_path, [["Ann"], ["more", "words"]], [["O"], ["O", "O"]])])
    assert joined.texts()[0][3:] == ["more words"]
    assert rows_of(joined.tags()[0])[3:] == [[-1, -1]]
    with pytest.raises(RefusedError, match="must be lists of words where the dataset's is"):
        join_unlabelled(main, [load(tmp_path, ["a text"])])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    import datasets

    corpus = load(tmp_path, WORDS, [TAGS[0], None, TAGS[2]])
    folder = tmp_path / "corpus"
    write_manifest(folder, {"kind": "corpus", "fingerprint": "0", "content": write_corpus(corpus, folder)})
    again = open_corpus(folder)
    assert (again.table, again.info, again.fingerprint) == (corpus.table, corpus.info, corpus.fingerprint)
    assert again.tags()[0] == corpus.tags()[0]
    assert datasets.load_dataset(str(folder), split="train")["tags"][:] == [[0, 2, 0, 1], None, [0]]


def test_the_fingerprint_sees_tags_and_not_the_order_of_rows(tmp_path: Path) -> None:
    corpus = load(tmp_path, WORDS, TAGS)
    assert load(tmp_path, WORDS[::-1], TAGS[::-1]).fingerprint == corpus.fingerprint
    assert load(tmp_path, WORDS, [["B-PER", "O", "B-PER", "O"], *TAGS[1:]]).fingerprint != corpus.fingerprint


words = st.text(st.characters(exclude_characters=" ", exclude_categories=["Cs"]), min_size=1, max_size=4)


@given(st.lists(st.lists(st.tuples(words, st.sampled_from(["O", "B-x", "I-x"])), max_size=5), min_size=1, max_size=5))
def test_words_and_tags_come_back_in_their_rows(rows: list[list[tuple[str, str]]]) -> None:
    lists = [[word for word, _ in row] for row in rows]
    texts = read_words(pa.chunked_array([pa.array(lists, pa.list_(pa.string()))]), name="w", where="x")
    assert [text.split(" ") if text else [] for text in texts] == lists
    column = pa.chunked_array([pa.array([[tag for _, tag in row] for row in rows], pa.list_(pa.string()))])
    labels = read_tags(column, texts, name="t", where="x", class_names=None)
    named = [[labels.names[number] for number in row] for row in labels.values]
    assert named == [[tag for _, tag in row] for row in rows]
