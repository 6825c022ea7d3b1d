"""`kd store merge` after real captures: the target serves the corpora of all sources without the teacher."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kd.cli import main
from kd.pipeline.store import open_store, open_view
from kd.stages.cache_teacher import teacher


def test_the_views_of_the_sources_are_made_on_the_target_without_the_teacher(
    bench: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    corpora = {"one": bench.corpus(sentences[:20], "one"), "two": bench.corpus(sentences[14:40], "two")}
    options = {"rows_per_shard": 8, "signals": "logits,hidden.tok@1"}
    for name, corpus in corpora.items():
        store, view = bench.folder / f"store-{name}", bench.folder / f"view-{name}"
        bench.capture(corpus, **options, store=str(store), output_dir=str(view))
    monkeypatch.setattr(teacher, "_load", lambda *args: pytest.fail("the weights were loaded"))
    stores = [str(bench.folder / f"store-{name}") for name in corpora]
    merged = str(bench.folder / "merged")
    assert main(["store", "merge", *stores, "--into", merged]) == 0
    assert "makes them here, and computes nothing" in capfd.readouterr().out
    assert main(["store", "merge", *stores, "--into", merged, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["incomplete"] == {} and sum(said["rows_new"].values()) == 0
    assert open_store(merged).verify().ok and open_store(merged).inspect()["rows"] == 40

    for name, corpus in corpora.items():
        outcome = bench.capture(corpus, **options, store=merged, output_dir=str(bench.folder / f"merged-{name}"))
        assert (outcome.summary["rows_new"], outcome.summary["rows_computed"]) == (0, 0)
        old, new = open_view(bench.folder / f"view-{name}"), open_view(bench.folder / f"merged-{name}")
        np.testing.assert_array_equal(
            old.reader.gather("logits", old.rows).argmax(1), new.reader.gather("logits", new.rows).argmax(1)
        )
    assert [view["there"] for view in open_store(merged).inspect()["views"]] == [True, True]


def test_a_merge_of_nothing_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "merge", "--into", "somewhere"]) == 2
    assert "SOURCE" in capfd.readouterr().err
