"""Reading: every format, every layout of a folder, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import RefusedError
from kd.stages.corpus import Corpus, DatasetSource, load_corpus
from kd.stages.corpus.files import evaluation_splits

ROWS: dict[str, list[Any]] = {"text": ["a good film", 'a "bad" one, really', "naïve 😀"], "label": [1, 0, 1]}


def load(dataset: Path | str, **fields: Any) -> Corpus:
    return load_corpus(
        DatasetSource(**{"dataset": str(dataset), "text_column": "text", "label_column": "label", **fields})
    )


def write_arrow(path: Path, *, stream: bool = False) -> None:
    table = pa.table(ROWS)
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table)


def write_in(path: Path) -> None:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table(ROWS), path)
        case ".arrow":
            write_arrow(path)
        case ".jsonl":
            rows = zip(ROWS["text"], ROWS["label"], strict=True)
            path.write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in rows), encoding="utf-8")
        case ".json":
            rows = zip(ROWS["text"], ROWS["label"], strict=True)
            path.write_text(json.dumps([{"text": t, "label": n} for t, n in rows], indent=1))
        case ".csv":
            path.write_text('text,label\na good film,1\n"a ""bad"" one, really",0\nnaïve 😀,1\n', encoding="utf-8")
        case ".tsv":
            path.write_text('text\tlabel\na good film\t1\na "bad" one, really\t0\nnaïve 😀\t1\n', encoding="utf-8")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv"])
def test_the_same_rows_in_every_format_are_the_same_corpus(tmp_path: Path, suffix: str) -> None:
    write_in(tmp_path / f"x{suffix}")
    write_in(tmp_path / "reference.parquet")
    corpus = load(tmp_path / f"x{suffix}")
    assert corpus.texts() == (ROWS["text"], None)
    assert corpus.labels()[0].tolist() == ROWS["label"]
    assert corpus.fingerprint == load(tmp_path / "reference.parquet").fingerprint


def test_arrow_streams_are_read_like_arrow_files(tmp_path: Path) -> None:
    write_arrow(tmp_path / "x.arrow", stream=True)
    assert load(tmp_path / "x.arrow").texts()[0] == ROWS["text"]


def test_words_that_csv_readers_like_to_swallow_are_texts(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\nNA,0\nnull,1\n007,0\nTrue,1\n")
    assert load(tmp_path / "x.csv").texts()[0] == ["NA", "null", "007", "True"]


def test_csv_values_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'text,label\r\n"one\ntwo",0\r\nthree,1\r\n')
    assert load(tmp_path / "x.csv").texts()[0] == ["one\ntwo", "three"]


def test_tsv_quotes_are_text_unless_every_field_that_has_one_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "glue.tsv").write_text('text\tlabel\n"Yes\t0\nhe said "no"\t1\n')
    (tmp_path / "pandas.tsv").write_text('text\tlabel\n"""Yes"""\t0\nplain\t1\n')
    assert load(tmp_path / "glue.tsv").texts()[0] == ['"Yes', 'he said "no"']
    assert load(tmp_path / "pandas.tsv").texts()[0] == ['"Yes"', "plain"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("\ufefftext,label\ncafé,1\n".encode())
    assert load(tmp_path / "x.csv").texts()[0] == ["café"]


def test_a_line_separator_inside_json_text_does_not_end_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one\u2028two", "label": 1}\n', encoding="utf-8")
    assert load(tmp_path / "x.jsonl").texts()[0] == ["one\u2028two"]


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("x.csv", b"text,label\ncaf\xe9,0\n", ["line 2", "byte 0xe9", "offset 14", "is not UTF-8", "iconv"]),
        ("x.csv", "text,label\nx,0\n".encode("utf-16"), ["UTF-16, not UTF-8", "iconv -f UTF-16"]),
        ("x.csv", b"text,label\nhello,0\na, b,1\nx\n", ["2 rows", "row 3: 3 columns: a, b,1", "header: text, label"]),
        ("x.csv", b'text,label\n"unterminated,0\nx,1\n', ["do not have the 2 columns"]),
        ("x.csv", b"text,text,label\na,b,0\n", ["several columns named 'text'"]),
        ("x.csv", b"text;label\na;0\n", ["seems to be separated by ';'", "header: text;label"]),
        ("x.csv", b"text,label\n", ["no rows with text", "rows: 0"]),
        ("x.csv", b"", ["is empty"]),
        ("x.csv", b"text,lable\na,0\n", ["no column 'label' (did you mean 'lable'?)", "columns: text, lable"]),
        ("x.csv", b"sentence,label\na,0\n", ["no column 'text'", "columns: sentence, label"]),
        ("x.tsv", b"text\tlabel\na\tb\t0\n", ["row 2: 3 columns", "remove tabs"]),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"\n', ["line 2: not JSON"]),
        ("x.jsonl", b'{"text": "a", "label": 1}\n\n[1]\n', ["line 3: expected an object, found [1]"]),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n', ["different types", "int (line 2)"]),
        ("x.jsonl", b'{"text": "\\ud800", "label": 1}\n', ["not Unicode"]),
        ("x.json", b'[{"text": "a"},]', ["not JSON"]),
        ("x.parquet", b"PAR1 no more", ["cannot be read as Parquet"]),
        ("x.arrow", b"no arrow at all", ["cannot be read as Arrow"]),
        ("x.txt", b"hello", ["not of a known type", ".jsonl"]),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    tmp_path: Path, name: str, content: bytes, messages: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RefusedError) as caught:
        load(tmp_path / name)
    for message in (*messages, name):
        assert message in str(caught.value)


def test_bytes_in_a_parquet_text_column_that_are_not_utf8_are_found(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\5\0\0\0"), pa.py_buffer(b"caf\xe9!")
    text = pa.StringArray.from_buffers(1, offsets, data)
    pq.write_table(pa.table({"text": text, "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(
        RefusedError, match=r"column 'text' of .* is not valid: .*Invalid UTF8 sequence at string index 0"
    ):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int64"), ([b"a", b"b"], "binary"), ([[1, 2], [3]], "list<"), ([{"x": 1}, {"x": 2}], "struct")],
)
def test_a_text_column_of_another_type_is_refused_with_its_type(tmp_path: Path, values: list[Any], kind: str) -> None:
    pq.write_table(pa.table({"text": values, "label": [0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(RefusedError, match=f"column 'text' .* holds {kind}.*, not text"):
        load(tmp_path / "x.parquet")


# Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        ["train.parquet", "test.parquet"],
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
        ["train/part-0.jsonl", "test/part-0.jsonl"],
        ["train.tsv", "test.csv"],
    ],
)
def test_every_usual_layout_of_a_dataset_folder_is_understood(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_in(tmp_path / name)
    assert load(tmp_path).texts()[0] == ROWS["text"]
    assert load(f"{tmp_path}:train[1:]").texts()[0] == ROWS["text"][1:]
    assert load(f"{tmp_path}:test").table["split"].to_pylist() == ["test"] * 3


def test_the_shards_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    for i in range(3):
        pq.write_table(pa.table({"text": [f"row {i}"], "label": [i]}), tmp_path / f"train-{i:05d}-of-00003.parquet")
    assert load(tmp_path).texts()[0] == ["row 0", "row 1", "row 2"]


def test_dev_is_found_as_validation(tmp_path: Path) -> None:
    write_in(tmp_path / "train.tsv")
    write_in(tmp_path / "dev.tsv")
    assert len(load(f"{tmp_path}:validation")) == 3


def test_a_folder_with_one_split_needs_no_name(tmp_path: Path) -> None:
    write_in(tmp_path / "reviews.csv")
    assert set(load(tmp_path).table["split"].to_pylist()) == {"reviews"}


def test_splits_can_be_joined_and_keep_their_names(tmp_path: Path) -> None:
    write_in(tmp_path / "train.csv")
    write_in(tmp_path / "test.csv")
    corpus = load(f"{tmp_path}:train[:1]+test")
    assert corpus.table["split"].to_pylist() == ["train", "test", "test", "test"]


def test_an_unknown_split_lists_those_there_are(tmp_path: Path) -> None:
    write_in(tmp_path / "train.csv")
    write_in(tmp_path / "test.csv")
    with pytest.raises(RefusedError, match=r"no split 'trian' \(did you mean 'train'\?\)\n  splits: test, train"):
        load(f"{tmp_path}:trian")


def test_a_split_in_two_formats_is_not_guessed(tmp_path: Path) -> None:
    write_in(tmp_path / "train.csv")
    write_in(tmp_path / "train.parquet")
    with pytest.raises(RefusedError, match="in several formats"):
        load(tmp_path)


def test_a_file_has_no_other_split_than_itself(tmp_path: Path) -> None:
    write_in(tmp_path / "dev.csv")
    assert len(load(f"{tmp_path / 'dev.csv'}:dev[:2]")) == 2
    assert len(load(f"{tmp_path / 'dev.csv'}:validation")) == 3
    with pytest.raises(RefusedError, match=r"one file and has no split 'test'"):
        load(f"{tmp_path / 'dev.csv'}:test")


def test_a_typing_error_in_a_path_gets_the_near_match(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    write_in(tmp_path / "reviews.csv")
    with pytest.raises(RefusedError, match=r"does not exist \(did you mean 'sst2'\?\)"):
        load(tmp_path / "sst3")
    with pytest.raises(RefusedError, match=r"does not exist \(did you mean 'reviews.csv'\?\)"):
        load(tmp_path / "review.csv")
    with pytest.raises(RefusedError, match="nor does the folder"):
        load(tmp_path / "nowhere" / "x.csv")


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RefusedError) as caught:
        load("owner/name:train")
    assert str(caught.value).splitlines()[0] == (
        "dataset 'owner/name' is not a local path, and the hub cannot be reached: "
        "Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"
    )


def test_a_hub_dataset_is_read_with_its_configuration_and_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({**ROWS}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load("owner/name/config:validation[:2]")
    assert asked == [("owner/name", "config", "validation")]
    assert (corpus.info.label_names, len(corpus)) == (("no", "yes"), 2)


@pytest.mark.parametrize("layout", ["save_to_disk", "save_to_disk_one", "parquet", "card"])
def test_class_names_of_datasets_are_kept_in_order(tmp_path: Path, layout: str) -> None:
    import datasets

    names = ["zebra", "ant", "bee"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    match layout:
        case "save_to_disk":
            datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "d")
        case "save_to_disk_one":
            data.select([1, 0]).select([1, 0]).save_to_disk(tmp_path / "d")
        case "parquet":
            (tmp_path / "d").mkdir()
            data.to_parquet(tmp_path / "d" / "train.parquet")
        case "card":
            (tmp_path / "d").mkdir()
            pq.write_table(pa.table({"text": ["a", "b"], "label": [2, 0]}), tmp_path / "d" / "train.parquet")
            card = "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
            card += "".join(f"          '{i}': {name}\n" for i, name in enumerate(names))
            (tmp_path / "d" / "README.md").write_text(f"---\n{card}---\n# A dataset\n")
    corpus = load(tmp_path / "d")
    assert corpus.info.label_names == ("zebra", "ant", "bee")
    assert corpus.labels()[0].tolist() == [2, 0]


# Leakage ---------------------------------------------------------------------------------------------------------


def test_evaluation_splits_are_those_beside_the_one_in_use(tmp_path: Path) -> None:
    for name in ("train", "dev", "test_matched", "unsupervised"):
        write_in(tmp_path / f"{name}.csv")
    folder = str(tmp_path)
    assert evaluation_splits(folder, "train") == [f"{folder}:dev", f"{folder}:test_matched"]
    assert evaluation_splits(folder, None) == evaluation_splits(folder, "train[:5]")
    assert evaluation_splits(f"{folder}/train.csv", None) == [f"{folder}/dev.csv", f"{folder}/test_matched.csv"]
    assert evaluation_splits(folder, "train+dev[:10]") == [f"{folder}:test_matched"]
    assert evaluation_splits(folder, "dev") == []
    assert evaluation_splits(f"{folder}/unsupervised.csv", None) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.json", '[{"text": ' + "1" * 5000 + "}]", "train.json cannot be read"),
        ("train.jsonl", '{"text": ' + "1" * 5000 + "}", "train.jsonl, line 1: cannot be read"),
        ("train.jsonl", '{"text": "a", "label": ' + str(2**70) + "}", "numbers of more than 64 bits"),
        ("dataset_dict.json", "{}", r"dataset_dict.json does not describe a saved dataset: KeyError: 'splits'"),
        ("dataset_dict.json", '{"splits": ["train"]}', "state.json does not describe a saved dataset: FileNotFound"),
        ("state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}', "lacks files that its state.json names"),
        ("dataset_info.json", "[]", "dataset_info.json does not describe a dataset"),
    ],
)
def test_what_describes_a_dataset_and_is_damaged_is_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    if name == "dataset_info.json":
        (tmp_path / "train.csv").write_text("text,label\na b,1\n")
    with pytest.raises(RefusedError, match=says):
        load(tmp_path, label_column="label")


def test_a_card_that_declares_nothing_that_can_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na b,x\nc d,y\n")
    for card in ("[1]", "dataset_info: {features: [text]}", "dataset_info: {features: [{dtype: {class_label: 5}}]}"):
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
        assert load(tmp_path, label_column="label").info.label_names == ("x", "y")
