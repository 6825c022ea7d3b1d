"""`aug_edits`: what it says of a variant leads from its original to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import StageContext, execute
from kd.stages.augment import Augment
from kd.stages.augment.words import split_words
from kd.stages.corpus import open_corpus

Edit = tuple[int, int, str]


def augmented(folder: Path, sentences: list[str], *, keep: bool = True, pair: bool = False, **fields: Any) -> Any:
    pq.write_table(pa.table({"text": sentences[:40], "other": sentences[40:80]}), folder / "x.parquet")
    options = {"text_column": "text", "tagger": "heuristic", "num_variants": 6, "keep_edits": keep, **fields}
    options["text_pair_column"] = "other" if pair else None
    stage = Augment(dataset=str(folder / "x.parquet"), output_dir=str(folder / "corpus"), **options)
    return execute(stage, StageContext(overwrite=True))


def variants(folder: Path) -> list[tuple[list[list[str]], list[list[str]], list[Edit], dict[str, Any]]]:
    """Words of the original and of the variant, per side; the edits, and the row."""
    rows = open_corpus(folder / "corpus", edits=True).table.to_pylist()
    names = (read_manifest(folder / "corpus") or {})["content"]["augmentation"]["edit_operators"]
    originals = {row["example_id"]: row for row in rows if row["parent_id"] is None}
    assert all(row["aug_edits"] is None for row in originals.values())
    found = []
    for row in (row for row in rows if row["parent_id"] is not None):
        old, new = (
            [split_words(which[name]) for name in ("text_a", "text_b") if which[name] is not None]
            for which in (originals[row["parent_id"]], row)
        )
        edits = [(edit["side"], edit["pos"], names[edit["op"]]) for edit in row["aug_edits"]]
        assert {name for *_, name in edits} == {*row["aug_op"].split("+")}
        found.append((old, new, edits, row))
    assert len(found) > 100
    return found


def test_replaced_and_moved_words_are_those_that_differ(tmp_path: Path, sentences: list[str]) -> None:
    augmented(tmp_path, sentences, operators=("mask", "pos"))
    for (old,), (new,), edits, _ in variants(tmp_path):
        differ = [place for place, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
        assert edits == [(0, place, "mask" if new[place] == "[MASK]" else "pos") for place in differ]
    augmented(tmp_path, sentences, operators=("swap",))
    for (old,), (new,), edits, _ in variants(tmp_path):
        differ = [place for place, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
        assert edits == [(0, place, "swap") for place in differ]


def test_words_that_are_gone_are_named(tmp_path: Path, sentences: list[str]) -> None:
    augmented(tmp_path, sentences, operators=("delete", "ngram"), ngram_probability=0.5)
    for (old,), (new,), edits, _ in variants(tmp_path):
        gone = [place for _, place, _ in edits]
        assert sorted({*gone}) == sorted(gone)  # what was deleted is not cut away too
        assert [word for place, word in enumerate(old) if place not in gone] == new


def test_several_operators_note_their_places_each(tmp_path: Path, sentences: list[str]) -> None:
    augmented(tmp_path, sentences, operators=("mask", "delete", "swap", "ngram"), swap_probability=0.3)
    for (old,), _, edits, row in variants(tmp_path):
        assert edits == sorted(edits, key=lambda edit: edit[1])
        assert all(side == 0 and 0 <= place < len(old) for side, place, _ in edits), row


def test_sides_are_those_of_the_original(tmp_path: Path, sentences: list[str]) -> None:
    operators = ("mask", "exchange", "recombine")
    augmented(tmp_path, sentences, pair=True, operators=operators, recombine_probability=0.3)
    for old, new, edits, row in variants(tmp_path):
        if "exchange" in row["aug_op"]:
            assert edits[0] == (-1, -1, "exchange")
            new = new[::-1]
        whole = [side for side, place, name in edits if name == "recombine" and place == -1]
        masked = [(side, place) for side, place, name in edits if name == "mask"]
        assert not {*whole} & {side for side, _ in masked}
        for side in range(2):
            assert (new[side] != old[side]) == (side in whole or side in {side for side, _ in masked})
        assert all(new[side][place] == "[MASK]" != old[side][place] for side, place in masked)


def test_without_being_asked_for_there_is_no_column_and_all_else_is_the_same(
    tmp_path: Path, sentences: list[str]
) -> None:
    augmented(tmp_path, sentences)
    kept = open_corpus(tmp_path / "corpus")
    assert "aug_edits" not in kept.table.column_names
    augmented(tmp_path, sentences, keep=False)
    assert open_corpus(tmp_path / "corpus").table == kept.table
    with pytest.raises(RefusedError, match="does not say what was changed where"):
        open_corpus(tmp_path / "corpus", edits=True)
    with pytest.raises(RefusedError, match="keep_edits"):
        execute(
            Augment(
                **{**(read_manifest(tmp_path / "corpus") or {})["config"], "keep_edits": True},
            )
        )
