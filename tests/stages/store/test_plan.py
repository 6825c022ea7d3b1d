"""`kd store plan`: what it says a capture costs is what the capture costs, and it writes nothing."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import open_store
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.store.plan import PlanStore


@pytest.fixture(autouse=True)
def surroundings(one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def texts(tmp_path: Path, sentences: list[str]) -> Path:
    file = tmp_path / "texts.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in sentences[:60])])
    return file


@pytest.fixture
def shared(tiny_teacher: Path, texts: Path) -> dict[str, Any]:
    return {
        "teacher": str(tiny_teacher),
        "dataset": str(texts),
        "text_column": "text",
        "max_length": 32,
        "rows_per_shard": 16,
        "tokens_per_shard": 512,
    }


def plan(**options: Any) -> dict[str, Any]:
    return dict(execute(PlanStore(**{"time": False} | options), StageContext()).summary)


def capture(store: Path, shared: dict[str, Any], signals: str, **options: Any) -> None:
    view = store.with_name(f"view-{len(list(store.parent.iterdir()))}")
    execute(
        CacheTeacher(**shared | {"store": str(store), "signals": signals, "output_dir": str(view)} | options),
        StageContext(),
    )


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "signals",
    ["logits", "logits:int8,hidden.cls@all:float32", "hidden.tok@1:int8,hidden.tok@1:float16,hidden.mean@last"],
)
def test_a_new_store_takes_what_was_planned(
    tmp_path: Path, shared: dict[str, Any], signals: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = plan(**shared, signals=signals)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "cache" not in str(path)] == []
    capture(tmp_path / "store", shared, signals)
    assert said["asked"]["bytes"] == pytest.approx(bytes_of(tmp_path / "store"), rel=0.02)
    assert said["rows"] == said["rows_new"] == 60 and said["asked"]["rows_to_compute"] == 60


def test_an_existing_store_is_charged_for_what_it_lacks(tmp_path: Path, shared: dict[str, Any]) -> None:
    store = tmp_path / "store"
    capture(store, shared, "logits,hidden.tok@1:float32")
    before = bytes_of(store)
    register = bytes_of(store / "views")
    alone = plan(store=str(store), signals="logits,hidden.tok@1:int8,hidden.cls@2")
    assert alone["rows_new"] == 0 and alone["asked"]["rows_to_compute"] == 60
    recoded = plan(store=str(store), signals="logits,hidden.tok@1:int8")
    assert (recoded["asked"]["rows_to_compute"], recoded["asked"]["signals"]) == (0, "logits:float32,hidden.tok@1:int8")
    nothing = plan(store=str(store), signals="logits,hidden.tok@1")
    assert nothing["asked"]["bytes"] == 0 and nothing["best"]["bytes"] == 0
    capture(store, shared, "logits,hidden.tok@1:int8,hidden.cls@2")
    grown = bytes_of(store) - before - (bytes_of(store / "views") - register)
    assert alone["asked"]["bytes"] == pytest.approx(grown, rel=0.02)


def test_new_rows_and_missing_signals_are_planned_together(
    tmp_path: Path, shared: dict[str, Any], sentences: list[str]
) -> None:
    store = tmp_path / "store"
    capture(store, shared, "logits")
    more = tmp_path / "more.csv"
    with more.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in sentences[40:90])])
    before = bytes_of(store)
    shared = shared | {"dataset": str(more)}
    said = plan(**shared, store=str(store), signals="logits,hidden.tok@all:int8")
    capture(store, shared, "logits,hidden.tok@all:int8")
    assert said["asked"]["bytes"] == pytest.approx(bytes_of(store) - before, rel=0.02)
    assert said["rows"] == 50 and 0 < said["rows_new"] < 50


def test_the_table_weighs_encodings_against_the_budget(tmp_path: Path, shared: dict[str, Any]) -> None:
    store = tmp_path / "store"
    capture(store, shared, "hidden.cls@2")
    signals = "logits,hidden.tok@1,hidden.mean@2:float32"
    exact, half, small = plan(store=str(store), signals=signals)["table"]
    assert [row["encoding"] for row in (exact, half, small)] == ["float32", "float16", "int8"]
    assert exact["signals"] == "logits:float32,hidden.tok@1:float32,hidden.mean@2:float32"
    assert small["signals"] == "logits:int8,hidden.tok@1:int8,hidden.mean@2:float32"
    assert exact["bytes"] > half["bytes"] > small["bytes"] and exact["error"] == "none" and "253.9" in small["error"]
    for budget, expected in (
        (exact["bytes"], exact["signals"]),
        # Tokens are the dearest, so they are the first to give; logits stay exact.
        (exact["bytes"] - 1, "logits:float32,hidden.tok@1:float16,hidden.mean@2:float32"),
        (half["bytes"] - 1, "logits:float32,hidden.tok@1:int8,hidden.mean@2:float32"),
        (10, None),
    ):
        said = plan(store=str(store), signals=signals, max_bytes=str(budget))
        assert (said["best"] and said["best"]["signals"]) == expected
        assert [row["fits"] for row in said["table"]] == [row["bytes"] <= budget for row in said["table"]]
        assert said["table"][0]["share"] == pytest.approx(exact["bytes"] / budget)
        text = PlanStore(store=str(store)).report(said)
        assert ("nothing fits" if expected is None else f"--signals {expected}") in text
        assert "largest |x|" in text


def test_time_comes_from_a_batch_on_the_teacher_and_can_be_left_out(tmp_path: Path, shared: dict[str, Any]) -> None:
    store = tmp_path / "store"
    capture(store, shared, "logits:float32")
    said = plan(store=str(store), teacher=shared["teacher"], signals="hidden.tok@1", time=True)
    asked = said["asked"]
    assert said["tokens_per_s"] > 0
    assert asked["seconds"] == pytest.approx(asked["tokens_to_compute"] / said["tokens_per_s"], abs=0.06)
    for options in ({"time": False}, {"time": True, "teacher": None}):
        left_out = plan(**{"store": str(store), "teacher": shared["teacher"], "signals": "hidden.tok@1"} | options)
        assert left_out["tokens_per_s"] is None and left_out["asked"]["seconds"] is None
    with pytest.raises(RefusedError, match="dtype"):
        other = tmp_path / "other"
        capture(other, shared | {"max_length": 16}, "logits")
        plan(**shared | {"dtype": "bfloat16"}, store=str(other), signals="logits")


def test_wrong_combinations_say_what_to_give(tmp_path: Path, shared: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="nothing to plan for"):
        PlanStore(signals="logits")
    with pytest.raises(UsageError, match="tokenizer"):
        PlanStore(store="s", dataset="d.csv", text_column="text")
    with pytest.raises(UsageError, match="cannot read 'lots'"):
        PlanStore(store="s", max_bytes="lots")
    with pytest.raises(RefusedError, match="does not exist"):
        plan(store=str(tmp_path / "none"))
    capture(tmp_path / "store", shared, "logits")
    with pytest.raises(UsageError, match="layers 0 to"):
        plan(store=str(tmp_path / "store"), signals="hidden.tok@99")
    assert open_store(tmp_path / "store").verify().ok
