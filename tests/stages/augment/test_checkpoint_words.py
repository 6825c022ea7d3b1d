"""Words from a checkpoint: neighbours in its word table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment
from kd.stages.augment.candidates import is_content_word
from kd.stages.augment.checkpoint import checkpoint_digest, load_word_table
from kd.stages.augment.neighbour import neighbour_lists, whole_words
from kd.stages.augment.words import split_words
from kd.stages.corpus import open_corpus


def augmented(texts: list[str], folder: Path, **fields: Any) -> list[tuple[list[str], list[str]]]:
    """(words of the original, words of the variant) of a corpus made of these texts."""
    pq.write_table(pa.table({"text": texts}), folder / "x.parquet")
    stage = Augment(dataset=str(folder / "x.parquet"), text_column="text", output_dir=str(folder / "corpus"), **fields)
    execute(stage)
    rows = {row["example_id"]: row for row in open_corpus(folder / "corpus").table.to_pylist()}
    return [
        (split_words(rows[row["parent_id"]]["text_a"]), split_words(row["text_a"]))
        for row in rows.values()
        if row["parent_id"] is not None
    ]


# Neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 512])
def test_neighbours_are_those_that_brute_force_finds(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("kd.stages.augment.neighbour.BLOCK", block)
    table_VH, tokenizer = load_word_table(tiny_teacher)
    words = ["Film", "book", "the", "unseen", "card", "42", "dinner", "\u5317"]
    found = neighbour_lists(words, table_VH, tokenizer, 4)
    known = {word: table_VH[number] for number, word in whole_words(tokenizer).items() if is_content_word(word)}
    for word, neighbours in zip(words, found, strict=True):
        if word in ("the", "42", "\u5317"):  # closed class, no letters, unknown
            assert neighbours == []
            continue
        mean = table_VH[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)
        cosines = {
            other: float(mean @ vector / np.linalg.norm(mean) / np.linalg.norm(vector))
            for other, vector in known.items()
            if other != word.lower()
        }
        best = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert neighbours == [other.capitalize() if word == "Film" else other for other in best]


def test_words_become_neighbours(tiny_teacher: Path, tmp_path: Path, sentences: list[str]) -> None:
    fields = {"operators": ("neighbour",), "neighbour_probability": 0.5, "word_table": str(tiny_teacher)}
    pairs = augmented(sentences[:12], tmp_path, num_candidates=3, **fields)
    assert len(pairs) > 20
    table_VH, tokenizer = load_word_table(tiny_teacher)
    words = sorted({word for old, _ in pairs for word in old})
    lists = dict(zip(words, neighbour_lists(words, table_VH, tokenizer, 3), strict=True))
    for old, new in pairs:
        assert all(b == a or b in lists[a] for a, b in zip(old, new, strict=True))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is no checkpoint"):
        checkpoint_digest(tmp_path)
