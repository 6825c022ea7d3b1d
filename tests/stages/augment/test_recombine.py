"""`recombine` against an oracle in plain Python, and what it must not make."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd.pipeline.artifact import read_manifest
from kd.pipeline.stage import execute
from kd.stages.augment import Augment
from kd.stages.augment.dedup import text_keys
from kd.stages.augment.words import split_words
from kd.stages.corpus import open_corpus

Pairs = Sequence[tuple[str, str]]


def augmented(folder: Path, pairs: Pairs, test: Pairs = (), **fields: Any) -> tuple[list[dict[str, Any]], Any]:
    """Rows and manifest of the corpus of these pairs, beside a test split."""
    (folder / "pairs").mkdir()
    for name, rows in (("train", pairs), ("test", test)):
        table = pa.table({"one": [one for one, _ in rows], "other": [other for _, other in rows]})
        pq.write_table(table, folder / "pairs" / f"{name}.parquet")
    options = {"text_column": "one", "text_pair_column": "other", "tagger": "heuristic", "operators": ("recombine",)}
    stage = Augment(dataset=str(folder / "pairs"), output_dir=str(folder / "corpus"), **{**options, **fields})
    execute(stage)
    return open_corpus(folder / "corpus").table.to_pylist(), read_manifest(folder / "corpus")


def draws_of(row: dict[str, Any], iteration: int, count: int) -> list[float]:
    head = struct.pack("<q", row["seed"]) + row["aug_config_hash"] + row["parent_id"] + struct.pack("<I", iteration)
    key = int.from_bytes(blake2b(head, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count).tolist()  # type: ignore[no-any-return]


def test_an_independent_oracle_agrees(tmp_path: Path, sentences: list[str]) -> None:
    # Some texts occur several times, and on both sides: they are drawn from once, and by side.
    pairs = [(sentences[i % 25], sentences[20 + i % 31]) for i in range(60)]
    rows, manifest = augmented(
        tmp_path, pairs, num_variants=9, operators=("mask", "recombine", "exchange"), recombine_probability=0.5
    )
    originals = {row["example_id"]: row for row in rows if row["parent_id"] is None}
    pools = [sorted({pair[side] for pair in pairs}, key=str.encode) for side in range(2)]
    seen = {"a": 0, "b": 0, "both": 0, "left alone": 0}
    for row in (row for row in rows if row["parent_id"] is not None):
        parent = originals[row["parent_id"]]
        old, new = [[which[f"text_{letter}"] for letter in "ab"] for which in (parent, row)]
        lengths = [len(split_words(text)) for text in old]
        draws = draws_of(row, row["aug_iter"], 2 + sum(2 * length + 3 for length in lengths) + 3)
        whether, which, what = draws[-3:]
        assert ("exchange" in row["aug_op"]) == (draws[1] < 0.5)
        if draws[1] < 0.5:
            new.reverse()
        recombined = "recombine" in row["aug_op"].split("+")
        assert recombined == (whether < 0.5)
        if not recombined:
            seen["left alone"] += 1
            continue
        seen[row["aug_side"]] += 1
        side = row["aug_iter"] % 3 if row["aug_iter"] % 3 < 2 else math.floor(which * 2)
        others = [text for text in pools[side] if text != old[side]]
        assert new[side] == others[math.floor(what * len(others))]
        if row["aug_side"] != "both":
            assert new[1 - side] == old[1 - side] and "mask" not in row["aug_op"]
        assert [row["n_words_a"], row["n_words_b"]] == [len(split_words(row[f"text_{letter}"])) for letter in "ab"]
    assert min(seen.values()) > 30
    assert manifest["content"]["augmentation"]["recombine"]["texts"] == [25, 31]
    assert manifest["summary"]["changes"]["recombine"]["texts"] > 150
    assert "## recombine" in (tmp_path / "corpus" / "report.md").read_text()


def test_no_pair_of_another_split_and_no_original_is_made(tmp_path: Path) -> None:
    left, right = [f"left {i}" for i in range(4)], [f"right {i}" for i in range(4)]
    known = {(i, j) for i in range(4) for j in range(4)}
    train = [(left[i], right[i]) for i in range(4)]
    test = [(left[i].upper(), right[j]) for i, j in sorted(known) if i < j]
    rows, manifest = augmented(tmp_path, train, test, recombine_probability=1.0, num_variants=60)
    made = {(row["text_a"], row["text_b"]) for row in rows if row["parent_id"] is not None}
    assert made == {(left[i], right[j]) for i, j in known if i > j}
    dropped = manifest["summary"]["variants_dropped"]
    assert dropped["leak"] > 0 and dropped["duplicate"] > 0
    keys = text_keys([row["text_a"] for row in rows], [row["text_b"] for row in rows])
    assert len(set(keys)) == len(keys)


def test_where_there_is_one_text_nothing_takes_its_place(tmp_path: Path, sentences: list[str]) -> None:
    rows, manifest = augmented(
        tmp_path, [(text, "one question") for text in sentences[:5]], recombine_probability=1.0, num_variants=4
    )
    assert {row["text_b"] for row in rows} == {"one question"}
    assert all(row["aug_side"] != "b" for row in rows)
    assert manifest["summary"]["variants_dropped"]["unchanged"] >= 5


def test_the_texts_that_are_drawn_from_are_hashed_whatever_their_order(tmp_path: Path, sentences: list[str]) -> None:
    pairs = [(sentences[i], sentences[20 + i]) for i in range(12)]
    digests = []
    for name, given in (("one", pairs), ("same", pairs[::-1]), ("more", [*pairs, (sentences[0], sentences[90])])):
        (tmp_path / name).mkdir()
        rows, manifest = augmented(tmp_path / name, given)
        digests.append((manifest["content"]["augmentation"]["recombine"]["digest"], len(rows)))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]
