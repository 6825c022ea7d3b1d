"""What a compute dtype does to logits: the figures by hand, and measured, said and recorded by a capture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kd.pipeline.artifact import read_manifest
from kd.stages.cache_teacher import dtype_effect
from kd.stages.cache_teacher.dtype_effect import describe_effect, effect_on_logits, sample


def test_single_label_by_hand() -> None:
    exact = np.array([[math.log(3.0), 0.0], [0.0, 5.0]])  # 3/4, 1/4
    found = np.array([[0.0, 0.0], [0.0, 5.0]])  # 1/2, 1/2
    effect = effect_on_logits(exact, found, task="single-label")
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert effect["kl_max"] == pytest.approx(expected) and effect["kl_mean"] == pytest.approx(expected / 2)
    assert effect["agreement"] == 1.0  # argmax of equal values is the first
    assert effect["difference_max"] == pytest.approx(math.log(3.0))
    turned = effect_on_logits(exact, np.array([[0.0, 1.0], [0.0, 5.0]]), task="single-label")
    assert turned["agreement"] == 0.5


def test_multi_label_by_hand() -> None:
    exact, found = np.array([[math.log(3.0), -1.0]]), np.array([[0.0, -1.0]])
    effect = effect_on_logits(exact, found, task="multi-label")
    assert effect["kl_max"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert effect["agreement"] == 0.5  # zero is no yes


def test_a_regression_has_a_difference_and_nothing_else() -> None:
    effect = effect_on_logits(np.array([[1.0], [2.0]]), np.array([[1.5], [2.0]]), task="regression")
    assert effect == {"difference_max": 0.5}
    assert describe_effect({"dtype": "bfloat16", "rows": 2, **effect}).endswith("logits differ by at most 0.5")


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_a_constant_added_to_all_logits_or_nothing_at_all_is_no_distance(task: str) -> None:
    exact = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 20
    effect = effect_on_logits(exact, exact + (3.0 if task == "single-label" else 0.0), task=task)
    assert effect["agreement"] == 1.0 and 0.0 <= effect["kl_max"] < 1e-6


def test_the_sample_keeps_to_rows_and_tokens_and_holds_at_least_one_row() -> None:
    assert sample(np.full(5, 3)).tolist() == [0, 1, 2, 3, 4]
    spread = sample(np.full(10_000, 10))
    assert len(spread) == 256 == len(np.unique(spread)) and spread[0] == 0 and spread[-1] == 9999
    long = sample(np.full(10_000, 512))
    assert 1 < len(long) <= 8192 // 512
    assert sample(np.array([20_000])).tolist() == [0]


def test_a_capture_in_bfloat16_says_and_records_what_that_did(
    bench: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype_effect, "SAMPLE_ROWS", 16)
    outcome = bench.capture(bench.corpus(sentences[:40]), dtype="bfloat16", rows_per_shard=32)
    effect = read_manifest(bench.folder / "view")["summary"]["dtype_effect"]
    assert outcome.summary["dtype_effect"] == effect
    assert effect["dtype"] == "bfloat16" and effect["rows"] == 16
    assert any(line.startswith("bfloat16 against float32 on 16 rows: ") for line in bench.said)

    # The same rows by plain transformers: the two dtypes are as far apart as was recorded.
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForSequenceClassification.from_pretrained(str(bench.teacher), dtype=dtype).eval()
        with torch.inference_mode():
            rows = [model(**tokenizer(sentences[row], return_tensors="pt")).logits.float() for row in range(0, 32, 2)]
        logits.append(torch.cat(rows).numpy())
    apart = effect_on_logits(*logits, task="single-label")
    assert 0 < effect["difference_max"] < 10 * apart["difference_max"] < 1
    assert 0 < effect["kl_max"] < 0.1 and effect["kl_mean"] <= effect["kl_max"]


def test_float32_and_captures_without_work_for_the_teacher_measure_nothing(bench: Any, sentences: list[str]) -> None:
    corpus = bench.corpus(sentences[:20])
    assert "dtype_effect" not in bench.capture(corpus).summary
    low = {"dtype": "bfloat16", "store": str(bench.folder / "low")}
    assert "dtype_effect" in bench.capture(corpus, output_dir=str(bench.folder / "v1"), **low).summary
    assert "dtype_effect" not in bench.capture(corpus, output_dir=str(bench.folder / "v2"), **low).summary
