"""Synonyms from the database files of WordNet: which words, which senses, and what is no WordNet."""

from __future__ import annotations

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
