"""Any variant can be made again from its original, its provenance and the manifest of its corpus."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment, draws
from kd.stages.augment import augment as augment_module
from kd.stages.augment.operators import OPERATORS, PAIRED
from kd.stages.augment.regenerate import regenerate
from kd.stages.corpus import open_corpus


def augmented(folder: Path, sentences: list[str], **fields: Any) -> list[dict[str, Any]]:
    pq.write_table(pa.table({"text": sentences[:30], "other": sentences[40:70]}), folder / "x.parquet")
    options = {"text_column": "text", "tagger": "heuristic", "num_variants": 12, **fields}
    execute(Augment(dataset=str(folder / "x.parquet"), output_dir=str(folder / "corpus"), **options))
    return open_corpus(folder / "corpus").table.to_pylist()


def texts(row: dict[str, Any]) -> tuple[str, str | None]:
    return row["text_a"], row["text_b"]


def acting(pair: bool) -> tuple[str, ...]:
    """The operators for texts, or for pairs of them."""
    return tuple(name for name in OPERATORS if name != "mention" and (pair or name not in PAIRED))


@pytest.mark.parametrize("pair", [False, True])
def test_two_hundred_variants_of_all_operators_are_made_again(
    tmp_path: Path,
    sentences: list[str],
    wordnet: Path,
    tiny_teacher: Path,
    masked_lm: Path,
    monkeypatch: pytest.MonkeyPatch,
    pair: bool,
) -> None:
    monkeypatch.setattr(augment_module, "VARIANTS_PER_CHUNK", 100)  # several chunks
    rows = augmented(
        tmp_path,
        sentences,
        operators=acting(pair),
        text_pair_column="other" if pair else None,
        mlm_probability=0.15,
        recombine_probability=0.3 if pair else None,
        wordnet=str(wordnet),
        word_table=str(tiny_teacher),
        masked_lm=str(masked_lm),
        seed=7,
    )
    variants = [row for row in rows if row["parent_id"] is not None]
    chosen = random.Random(0).sample(variants, 200)
    found = regenerate(tmp_path / "corpus", [row["example_id"] for row in chosen])
    assert found == [texts(row) for row in chosen]
    used = {name for row in chosen for name in row["aug_op"].split("+")}
    assert used == {*acting(pair)}


def test_nothing_is_read_from_the_variants_but_their_provenance(
    tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = augmented(tmp_path, sentences)
    variants = [row for row in rows if row["parent_id"] is not None][::9]
    corpus = open_corpus(tmp_path / "corpus")
    is_original = corpus.table["parent_id"].is_null()
    gone = pa.compute.if_else(is_original, corpus.table["text_a"], "nothing")
    blank = corpus.replaced(
        table=corpus.table.set_column(corpus.table.schema.get_field_index("text_a"), "text_a", gone)
    )
    monkeypatch.setattr("kd.stages.augment.regenerate.open_corpus", lambda path: blank)
    assert regenerate(tmp_path / "corpus", [row["example_id"] for row in variants]) == [texts(row) for row in variants]
    assert regenerate(tmp_path / "corpus", []) == []


def test_what_would_make_other_variants_is_refused(
    tmp_path: Path, sentences: list[str], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = shutil.copytree(tiny_teacher, tmp_path / "table")
    rows = augmented(tmp_path, sentences, operators=("pos", "neighbour"), word_table=str(table))
    original, variant = (row["example_id"] for row in (rows[0], rows[-1]))
    with pytest.raises(RefusedError, match=f"has no variants with these ids\n  {original.hex()}"):
        regenerate(tmp_path / "corpus", [original])
    moved = shutil.move(table, tmp_path / "moved")
    assert regenerate(tmp_path / "corpus", [variant], word_table=moved) == [texts(rows[-1])]
    (Path(moved) / "config.json").write_text("{}")
    with pytest.raises(RefusedError, match="the files of the corpus is not what is here"):
        regenerate(tmp_path / "corpus", [variant], word_table=moved)
    said = (read_manifest(tmp_path / "corpus") or {})["content"]["augmentation"]["aug_version"]
    monkeypatch.setattr("kd.stages.augment.regenerate.AUG_VERSION", said + "x")
    assert said == draws.AUG_VERSION
    with pytest.raises(RefusedError, match="version of the operators"):
        regenerate(tmp_path / "corpus", [variant], word_table=moved)
