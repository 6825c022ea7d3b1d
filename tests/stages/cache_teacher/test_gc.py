"""`kd store gc` after real captures: views decide, and a capture computes again exactly what went."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kd.cli import main
from kd.pipeline.store import open_store, open_view


def test_what_went_is_captured_again_and_nothing_else(
    bench: Any, sentences: list[str], forwards: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = bench.corpus(sentences[:12], "one"), bench.corpus(sentences[6:30], "two")
    options = {"rows_per_shard": 6, "sidecars": ("none",)}
    bench.capture(one, **options, signals="logits", output_dir=str(bench.folder / "one"))
    bench.capture(two, **options, signals="logits,hidden.tok@1", output_dir=str(bench.folder / "two"))
    digest = open_store(bench.store).digest()
    shutil.rmtree(bench.folder / "two")

    assert main(["store", "gc", str(bench.store)]) == 0
    text = capfd.readouterr().out
    assert "would go" in text and f"view is gone: {bench.folder / 'two'}" in text
    assert open_store(bench.store).digest() == digest
    assert main(["store", "gc", str(bench.store), "--delete", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["signals"]["logits"]["shards"] == [[2, 4]] and said["signals"]["hidden.tok@1"]["shards"] == [[1, 4]]
    assert open_store(bench.store).verify().ok
    assert len(open_view(bench.folder / "one").examples) == 12

    forwards.clear()
    again = bench.capture(two, **options, signals="logits,hidden.tok@1", output_dir=str(bench.folder / "two"))
    assert again.summary["rows_new"] == 0 and again.summary["shards_computed"] == 4
    assert [rows for rows in forwards if rows > 1] == [6] * 4  # and one row for the checks of each start
    assert open_store(bench.store).digest() == digest


def test_a_view_that_is_elsewhere_now_is_kept_when_it_is_named(
    bench: Any, sentences: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.capture(bench.corpus(sentences[:12]), rows_per_shard=6, sidecars=("none",), signals="logits")
    (bench.folder / "view").rename(bench.folder / "moved")
    assert main(["store", "gc", str(bench.store), "--delete"]) == 3
    assert "no view of store" in capfd.readouterr().err
    assert (
        main(["store", "gc", str(bench.store), "--delete", "--keep-view", str(bench.folder / "moved"), "--json"]) == 0
    )
    said = json.loads(capfd.readouterr().out)
    assert said["views_kept"] == [str(bench.folder / "moved")] and not said["signals"]
    assert main(["store", "gc", str(bench.store), "--delete", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["views_kept"] == [str(bench.folder / "moved")]
    (bench.folder / "other").mkdir()
    assert main(["store", "gc", str(bench.store), "--keep-view", str(bench.folder / "other")]) == 3


def test_a_finished_view_that_the_register_lost_is_made_again(bench: Any, sentences: list[str]) -> None:
    corpus = bench.corpus(sentences[:6])
    bench.capture(corpus, signals="logits")
    assert bench.capture(corpus, signals="logits").skipped
    shutil.rmtree(bench.store / "views")
    again = bench.capture(corpus, signals="logits")
    assert not again.skipped and again.summary["rows_computed"] == 0
    assert open_store(bench.store).inspect()["views"][0]["there"]
