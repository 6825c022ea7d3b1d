"""Synonyms from the database files of WordNet: which words, which senses, and what is no WordNet."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment
from kd.stages.augment.synonym import synonym_lists, wordnet_digest
from kd.stages.augment.words import split_words
from kd.stages.corpus import open_corpus


def test_synonyms_are_single_words_of_the_same_part_of_speech_in_the_words_capitals(wordnet: Path) -> None:
    asked = [("film", "NN1"), ("Film", "VVB"), ("GOOD", "AJ0"), ("films", "NN2"), ("well", "AV0"), ("dog", "NOUN")]
    assert synonym_lists(*zip(*asked, strict=True), wordnet) == [
        ["movie", "picture", "cinema"],
        ["Shoot", "Take"],
        ["FINE"],
        [],
        [],  # of a closed class for kd: "well" is no content word
        ["Rover"],
    ]
    assert synonym_lists(["film", "film"], ["PREP", "NP0"], wordnet) == [[], []]


def test_a_folder_without_wordnet_is_refused(tmp_path: Path, wordnet: Path) -> None:
    with pytest.raises(RefusedError, match=r"holds no WordNet: there is no index\.noun"):
        wordnet_digest(tmp_path)
    assert len(wordnet_digest(wordnet)) == 32


@pytest.fixture
def damaged(wordnet: Path, tmp_path: Path) -> Callable[..., Path]:
    """`damaged(name, change)`: WordNet with the bytes of one file changed."""

    def make(name: str, change: Callable[[bytes], bytes]) -> Path:
        shutil.copytree(wordnet, tmp_path / "dict")
        file = tmp_path / "dict" / name
        file.write_bytes(change(file.read_bytes()))
        return tmp_path / "dict"

    return make


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.noun", lambda data: data[:-20], r"index\.noun .* line 8 is cut off or none of an index: 'rover n 1"),
        ("index.verb", lambda data: data.replace(b"shoot v 1", b"shoot v x"), r"index\.verb .* line 4 is cut off"),
        ("index.adv", lambda data: b"\xef\xbb\xbf" + data, r"index\.adv .* line 1 is cut off"),
        ("index.adj", lambda data: data.replace(b"fine a", b"f\xefne a"), r"index\.adj .* line 2 is not UTF-8"),
        ("index.noun", lambda data: b"", r"index\.noun .* it has no entries"),
        ("index.noun", lambda data: data.decode().encode("utf-16"), r"index\.noun .* line 1 is not UTF-8"),
    ],
)
def test_an_index_that_is_not_as_published_is_refused_by_file_and_line(
    damaged: Callable[..., Path], name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        wordnet_digest(damaged(name, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.replace(b"\n", b"\r\n"), r"no synset stands at byte .*; its lines end with CR LF"),
        (
            lambda data: data[: data.index(b"photographic")],
            r"no synset stands at byte \d+, line 3: '\d+ 03 n 02 film 0 '",
        ),
        (lambda data: data[:10], r"no synset stands at byte \d+, line 1: ''"),
        (lambda data: data.replace(b" 03 n 02 ", b" 03 n zz "), r"no synset stands at byte"),
        (lambda data: data.replace(b"cinema", b"cin\xe9ma"), r"line 4 is not UTF-8"),
    ],
)
def test_a_data_file_that_is_not_as_published_is_refused_by_file_and_place(
    damaged: Callable[..., Path], change: Callable[[bytes], bytes], message: str
) -> None:
    folder = damaged("data.noun", change)
    assert len(wordnet_digest(folder)) == 32
    with pytest.raises(RefusedError, match=rf"data\.noun is no file of WordNet as it was published: .*{message}"):
        synonym_lists(["film"], ["NN1"], folder)


def test_an_index_with_line_ends_of_windows_reads_the_same(wordnet: Path, damaged: Callable[..., Path]) -> None:
    folder = damaged("index.noun", lambda data: data.replace(b"\n", b"\r\n"))
    assert synonym_lists(["film"], ["NN1"], folder) == synonym_lists(["film"], ["NN1"], wordnet)


def test_words_become_synonyms_and_nothing_else(tmp_path: Path, wordnet: Path, sentences: list[str]) -> None:
    texts = [text for text in sentences if "film" in text or "dog" in text][:30]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    fields = {"operators": ("synonym",), "synonym_probability": 0.9, "wordnet": str(wordnet), "tagger": "heuristic"}
    stage = Augment(dataset=str(tmp_path / "x.parquet"), text_column="text", output_dir=str(tmp_path / "c"), **fields)
    execute(stage)
    rows = {row["example_id"]: row for row in open_corpus(tmp_path / "c").table.to_pylist()}
    allowed = {"film": {"movie", "picture", "cinema"}, "dog": {"Rover"}}
    seen = set()
    for row in rows.values():
        if row["parent_id"] is not None:
            assert row["aug_op"] == "synonym"
            old, new = split_words(rows[row["parent_id"]]["text_a"]), split_words(row["text_a"])
            changes = {(a, b) for a, b in zip(old, new, strict=True) if a != b}
            assert changes and all(b in allowed[a] for a, b in changes)
            seen |= changes
    assert {old for old, _ in seen} == {"film", "dog"}
    content = (read_manifest(tmp_path / "c") or {})["content"]["augmentation"]
    assert content["files"] == {"wordnet": wordnet_digest(wordnet)}
