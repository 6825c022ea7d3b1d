"""What the teacher says of variants: the figures by hand, then those of a capture (`bench` is in conftest.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.stage import execute
from kd.pipeline.store import open_view
from kd.stages.augment import Augment
from kd.stages.cache_teacher import variants as variants_module
from kd.stages.cache_teacher.variants import TeacherOnVariants
from kd.stages.corpus import Corpus, CorpusInfo
from kd.stages.corpus.schema import label_field, schema

NAMES = ("bad", "good")
ODDS = {0.5: 0.0, 0.75: math.log(3.0), 0.9: math.log(9.0)}
"""The logit above another of 0 that has this probability."""

Row = tuple[str, str | None, str, Any, list[float]]
"""Name, name of its original, aug_op, gold label, logits."""


def said(rows: list[Row], task: str = "single-label", names: tuple[str, ...] = NAMES) -> TeacherOnVariants:
    """The figures of rows whose ids and texts are their names."""
    table = pa.Table.from_pylist(
        [
            {
                "example_id": name.encode().ljust(16),
                "parent_id": parent and parent.encode().ljust(16),
                "text_a": f"text {name}",
                "aug_op": operator,
                label_field(task): gold,
                "has_gold": gold is not None,
            }
            for name, parent, operator, gold, _ in rows
        ],
        schema=schema(task),
    )
    logits = np.array([row[4] for row in rows], np.float32)
    return TeacherOnVariants(Corpus(table, CorpusInfo(task, names, "text")), lambda examples: logits[examples])


SINGLE: list[Row] = [
    ("a", None, "orig", 1, [0.0, ODDS[0.9]]),
    ("b", None, "orig", 1, [ODDS[0.75], 0.0]),
    ("c", None, "orig", None, [0.0, ODDS[0.9]]),
    ("a0", "a", "mask", None, [ODDS[0.9], 0.0]),
    ("a1", "a", "mask+ngram", None, [ODDS[0.75], 0.0]),
    ("b0", "b", "mask", None, [0.0, ODDS[0.75]]),
    ("c0", "c", "mask", None, [0.0, ODDS[0.75]]),
    ("x0", "x", "ngram", None, [0.0, ODDS[0.9]]),
]


def test_single_labels_by_hand() -> None:
    found = said(SINGLE)
    assert (found.num_originals, found.num_variants, found.num_orphans) == (3, 5, 1)
    assert found.by_aug_op == {
        "mask": {"rows": 3, "changed": round(2 / 3, 6), "confidence": 0.8},
        "mask+ngram": {"rows": 1, "changed": 1.0, "confidence": 0.75},
        "ngram": {"rows": 1, "changed": None, "confidence": 0.9},  # there is nothing to compare it with
    }
    assert found.by_operator == {
        "mask": {"rows": 4, "changed": 0.75, "confidence": 0.7875},
        "ngram": {"rows": 2, "changed": 1.0, "confidence": 0.825},
    }
    assert (found.num_gold, found.agreement, found.confidence) == (2, 0.5, 0.85)
    summary = found.summary()
    assert summary["variants_flipped"] == {"mask": 0.75, "ngram": 1.0}
    assert summary["mean_confidence"] == {"originals": 0.85, "mask": 0.7875, "ngram": 0.825}
    assert summary["variants_without_original"] == 1


def test_the_page_shows_the_changes_of_which_the_teacher_was_surest_both_times() -> None:
    page = said(SINGLE).text()
    assert "| mask | 4 | 75.0% | 0.787 |\n| ngram | 2 | 100.0% | 0.825 |\n" in page
    assert "The originals of 1 variants are not among these rows." in page
    assert "Of 2 originals the gold label is known: it agrees with 50.0%." in page
    # Its own first, by the lesser of the two probabilities: 0.9 and 0.9, then 0.75 and 0.75, then one that it shares.
    head = "## mask\n\n| original | teacher | variant | teacher |\n|---|---|---|---|\n"
    assert page.split(head)[1].split("\n\n")[0].splitlines() == [
        "| text a | good (0.900) | text a0 | bad (0.900) |",
        "| text b | bad (0.750) | text b0 | good (0.750) |",
        "| text a | good (0.900) | text a1 | bad (0.750) |",
    ]
    assert said(SINGLE).text() == page


def test_multi_label_rows_differ_where_any_label_does() -> None:
    names = tuple(f"label{i}" for i in range(10))
    on, off = ODDS[0.9], -ODDS[0.9]
    first, other = [on] * 2 + [off] * 8, [on] * 2 + [off] * 7 + [on]
    found = said(
        [
            ("a", None, "orig", [1, 1, 1, *[0] * 7], first),
            ("a0", "a", "mask", None, first),
            ("a1", "a", "mask", None, other),
        ],
        "multi-label",
        names,
    )
    assert found.by_operator == {"mask": {"rows": 2, "changed": 0.5, "confidence": 0.9}}
    assert found.agreement == 0.9
    assert "| text a | label0, label1 (0.900) | text a1 | label0, label1, label9 (0.900) |" in found.text()


def test_scores_have_a_mean_change_and_no_confidence() -> None:
    found = said(
        [
            ("a", None, "orig", 1.0, [1.0]),
            ("b", None, "orig", 2.0, [3.0]),
            ("a0", "a", "mask", None, [1.5]),
            ("b0", "b", "mask", None, [2.0]),
        ],
        "regression",
        (),
    )
    assert found.by_operator == {"mask": {"rows": 2, "changed": 0.75, "confidence": None}}
    assert found.agreement == 1.0
    assert found.summary()["variants_mean_change"] == {"mask": 0.75}
    assert "mean_confidence" not in found.summary()
    assert "| mask | 2 | 0.75 |\n" in found.text()
    assert "| text b | 3 | text b0 | 2 |\n| text a | 1 | text a0 | 1.5 |" in found.text()


def test_rare_sets_of_operators_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants_module, "COMBINATIONS", 1)
    page = said(SINGLE).text()
    assert "| mask | 3 | 66.7% | 0.800 |\n| 2 more sets of operators | 2 | | |\n" in page


def capture_variants(bench: Any, sentences: list[str], **options: Any) -> Any:
    file = bench.corpus(sentences[:60])
    fields = {"text_column": "text", "label_column": "label", "operators": ("mask", "ngram"), "num_variants": 4}
    execute(Augment(dataset=file, output_dir=str(bench.folder / "augmented"), **fields))
    columns = {"text_column": None, "label_column": None}
    return bench.capture(**columns, corpus=str(bench.folder / "augmented"), **options)


def test_a_capture_reports_on_its_variants(bench: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants_module, "BLOCK_LOGITS", 3 * 7)  # several blocks
    outcome = capture_variants(bench, sentences)
    view = open_view(bench.folder / "view")
    logits = view.reader.gather("logits", view.rows)
    rows = view.examples.to_pylist()
    at = {row["example_id"]: number for number, row in enumerate(rows)}
    flips: dict[str, list[bool]] = {}
    for number, row in enumerate(rows):
        if row["parent_id"]:
            flip = bool(logits[number].argmax() != logits[at[row["parent_id"]]].argmax())
            for name in {row["aug_op"], *row["aug_op"].split("+")}:
                flips.setdefault(name, []).append(flip)
    shares = {name: round(sum(found) / len(found), 6) for name, found in flips.items()}
    assert 0 < shares["mask"] < 1
    assert outcome.summary["variants_flipped"] == {name: shares[name] for name in ("mask", "ngram")}
    assert outcome.summary["variants_of"] == {name: len(flips[name]) for name in ("mask", "ngram")}
    manifest = read_manifest(bench.folder / "view") or {}
    assert manifest["content"]["on_variants"]["by_aug_op"]["mask+ngram"]["changed"] == shares["mask+ngram"]
    gold = [row["label_gold"] for row in rows[:60]]
    agreement = float(np.mean(logits[:60].argmax(1) == gold))
    assert outcome.summary["agreement_with_gold"] == pytest.approx(agreement, abs=1e-6)
    page = (bench.folder / "view" / "report.md").read_text()
    assert f"| mask | {len(flips['mask'])} | {shares['mask']:.1%} |" in page

    # The same of logits that are there already, and nothing without variants or logits.
    again = capture_variants(bench, sentences, output_dir=str(bench.folder / "again"))
    assert again.summary["rows_computed"] == 0
    assert (bench.folder / "again" / "report.md").read_text() == page
    capture_variants(bench, sentences, signals="hidden.cls@1", output_dir=str(bench.folder / "without"))
    plain = bench.capture(bench.corpus(sentences[:60]), output_dir=str(bench.folder / "plain"))
    assert "variants_of" not in plain.summary
    for name in ("without", "plain"):
        assert not Path(bench.folder / name / "report.md").exists()
