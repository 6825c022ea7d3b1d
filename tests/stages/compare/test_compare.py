from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import NullProgress, StageContext, execute
from kd.stages.compare import Compare
from kd.stages.compare import comparison as comparison_module


class Said(NullProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str, **fields: object) -> None:
        self.warnings.append(text)


@pytest.fixture
def runs(make_run, tmp_path) -> list[str]:
    made = [
        make_run(tmp_path / "floor", role="baseline", init="random", noise=1.0, seed=1),
        make_run(tmp_path / "start-1", role="baseline", init="embeddings", noise=0.6, seed=1),
        make_run(tmp_path / "start-2", role="baseline", init="embeddings", noise=0.6, seed=2),
        make_run(tmp_path / "distilled-1", init="embeddings", noise=0.02, seed=1),
        make_run(tmp_path / "distilled-2", init="embeddings", noise=0.02, seed=2),
        # The labels stand in another order here: nothing may be matched by position.
        make_run(tmp_path / "turned", method="pkd", noise=0.0, names=("positive", "neutral", "negative")),
    ]
    return [str(run) for run in made]


def stage(runs: list[str], judged: Path, tmp_path: Path, **fields: object) -> Compare:
    values = {"runs": tuple(runs), "dataset": str(judged), "latency_texts": 8, "output_dir": str(tmp_path / "out")}
    return Compare(**{**values, **fields})


def test_the_table_holds_what_the_protocol_asks_for(runs, tiny_teacher, judged, tmp_path) -> None:
    compare = stage(runs, judged, tmp_path, teacher=str(tiny_teacher))
    summary = json.loads(json.dumps(execute(compare).summary, allow_nan=False))
    floor, start, distilled, turned = summary["groups"]
    assert [group["role"] for group in summary["groups"]] == ["floor", "start", "distilled", "distilled"]
    assert distilled["seeds"] == start["seeds"] == [1, 2]
    teacher = summary["teacher"]["metrics"]["accuracy"]
    assert teacher == pytest.approx(0.9)
    mean = sum(run["metrics"]["accuracy"] for run in distilled["runs"]) / 2
    assert distilled["metrics"]["accuracy"] == pytest.approx(mean)
    for name, base in (("share_of_floor_gap", floor), ("share_of_start_gap", start)):
        expected = (mean - base["metrics"]["accuracy"]) / (teacher - base["metrics"]["accuracy"])
        assert distilled[name] == pytest.approx(expected)
    gain = distilled["gain_over_start"]
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert gain["mean"] == pytest.approx(mean - start["metrics"]["accuracy"])
    assert distilled["deviations"]["accuracy"] is not None and floor["deviations"]["accuracy"] is None
    # The same weights with labels in another order: same decisions, same score.
    assert turned["agreement"] == 1.0
    assert (distilled["gain_over_plain"], turned["gain_over_plain"]) == (None, None)
    assert turned["metrics"]["nll"] == pytest.approx(summary["teacher"]["metrics"]["nll"], rel=1e-4)
    cost = distilled["cost"]
    assert cost["parameters"] > cost["parameters_without_embeddings"] > 0
    assert 0 < cost["p50_ms"] <= cost["p95_ms"]
    assert {group["cost"]["p50_ms"] for group in summary["groups"]} == {cost["p50_ms"]}, "one student, timed once"
    assert cost["speed_up"] == pytest.approx(summary["teacher"]["cost"]["p50_ms"] / cost["p50_ms"])
    assert any("one standard error" in note for note in summary["notes"])

    text = compare.report(summary)
    assert "of start gap" in text and "±" in text and "machine:" in text
    assert "distilled − start" in text
    page = (tmp_path / "out" / "report.md").read_text()
    assert "![main metric and latency](comparison.png)" in page
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == {
        key: value for key, value in summary.items() if key != "seconds"
    }
    command = summary["command"]
    assert command.startswith("kd compare") and "--teacher" in command
    assert execute(compare).skipped
    assert compare.report(execute(compare).summary) == text


def test_a_method_is_held_against_plain_soft_targets(make_run, judged, tmp_path) -> None:
    """The method has the teacher's weights, the soft targets noisy ones: what is shown is their difference."""
    made = [
        make_run(tmp_path / "plain", method="soft-target:0.9,hard:0.1", noise=0.6),
        make_run(tmp_path / "pkd", method="soft-target:0.9,pkd:0.1,hard:0.1", noise=0.0),
    ]
    compare = stage([str(run) for run in made], judged, tmp_path, latency_texts=0)
    summary = execute(compare).summary
    plain, pkd = summary["groups"]
    gain = pkd["gain_over_plain"]
    assert plain["gain_over_plain"] is None
    assert gain["mean"] == pytest.approx(pkd["metrics"]["accuracy"] - plain["metrics"]["accuracy"])
    assert 0 < gain["low"] <= gain["mean"] <= gain["high"]
    header, *rows = [line for line in compare.report(summary).splitlines() if "soft" in line][:3]
    assert header.endswith("over soft targets")
    assert rows[1].endswith(f"{100 * gain['mean']:+.2f} ({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f})")


def test_without_a_teacher_there_are_scores_and_gains_and_no_shares(runs, judged, tmp_path) -> None:
    compare = stage(runs[:4], judged, tmp_path, latency_texts=0)
    summary = execute(compare).summary
    assert summary["teacher"] is None
    assert summary["groups"][-1]["share_of_start_gap"] is None
    assert summary["groups"][-1]["gain_over_start"]["mean"] is not None
    text = compare.report(summary)
    assert "agreement" not in text and "p50" not in text


def test_a_distilled_run_without_a_baseline_says_so(runs, tiny_teacher, judged, tmp_path) -> None:
    summary = execute(stage([runs[3]], judged, tmp_path, teacher=str(tiny_teacher), latency_texts=0)).summary
    assert summary["groups"][0]["gain_over_start"] is None
    assert any("no baseline from the same start" in note for note in summary["notes"])


def test_unequal_budgets_are_said_and_so_is_what_the_user_has_to_say(make_run, judged, tmp_path) -> None:
    made = [
        make_run(tmp_path / "base", role="baseline", init="random", steps=50, noise=0.5),
        make_run(tmp_path / "distilled", init="random", steps=100),
    ]
    notes = ("one method does not fit, and why", "second")
    compare = stage([str(run) for run in made], judged, tmp_path, latency_texts=0, notes=notes)
    summary = execute(compare).summary
    assert any("unequal budgets" in note for note in summary["notes"])
    assert summary["notes"][-2:] == [*notes]
    assert "one method does not fit, and why\n" in compare.report(summary)


def test_without_matplotlib_there_is_a_table_and_a_warning_that_names_the_extra(
    runs, judged, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(comparison_module, "find_spec", lambda name: None)
    said = Said()
    outcome = execute(stage(runs[:2], judged, tmp_path, latency_texts=0), StageContext(progress=said))
    assert outcome.summary["plot"] is None
    assert any("kd-pipeline[report]" in warning for warning in said.warnings)
    assert "comparison.png" not in (tmp_path / "out" / "report.md").read_text()


def test_a_teacher_with_other_labels_is_refused(make_model, runs, judged, tmp_path) -> None:
    other = make_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "neutral", "2": "positive"}, "label2id": {}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="do not have the same labels"):
        execute(stage(runs[:1], judged, tmp_path, teacher=str(other), latency_texts=0))


def test_a_diverged_run_is_named(make_run, judged, tmp_path) -> None:
    run = make_run(tmp_path / "broken", noise=float("nan"))
    with pytest.raises(RefusedError, match=re.escape(str(run))):
        execute(stage([str(run)], judged, tmp_path, latency_texts=0))


def test_what_is_no_run_is_refused_before_any_model_loads(tiny_teacher, judged, tmp_path) -> None:
    with pytest.raises(RefusedError, match=r"no manifest\.json"):
        stage([str(tiny_teacher)], judged, tmp_path).inputs()
    with pytest.raises(UsageError, match="at least one run"):
        stage([], judged, tmp_path)
    with pytest.raises(UsageError, match="--batch-size is 0; expected 1 or more"):
        stage(["run"], judged, tmp_path, batch_size=0)


def test_a_student_of_text_without_labels_is_refused(make_run, judged, tmp_path) -> None:
    general = make_run(tmp_path / "general", task="masked-lm", label_names=())
    with pytest.raises(RefusedError, match=r"(?s)general was trained without labels.*kd train-student"):
        stage([str(general)], judged, tmp_path).inputs()


def test_a_split_without_labels_is_refused(runs, write_rows, sentences, tmp_path) -> None:
    data = write_rows(tmp_path / "d.csv", ["text", "label"], [[text, ""] for text in sentences[:5]])
    with pytest.raises(RefusedError, match="no labelled row"):
        stage(runs, data, tmp_path).inputs()


def test_any_metric_of_the_task_may_lead(runs, judged, tmp_path) -> None:
    compare = stage(runs[:4], judged, tmp_path, latency_texts=0, metric="macro_f1", bootstrap_samples=100)
    summary = execute(compare).summary
    assert summary["main_metric"] == "macro_f1"
    assert summary["groups"][-1]["gain_over_start"]["low"] <= summary["groups"][-1]["gain_over_start"]["high"]


def test_a_search_is_told_and_its_options_are_no_unequal_budget(make_run, judged, tmp_path) -> None:
    made = [
        make_run(tmp_path / "base-1", role="baseline", learning_rate=1e-3, validation=0.6),
        make_run(tmp_path / "base-3", role="baseline", learning_rate=3e-3, validation=0.7),
        make_run(tmp_path / "distilled-1", learning_rate=1e-3, validation=0.9),
        make_run(tmp_path / "distilled-3", learning_rate=3e-3, validation=0.8),
    ]
    compare = stage([str(run) for run in made], judged, tmp_path, latency_texts=0, search=("learning_rate",))
    summary = execute(compare).summary
    assert [group["runs"][0]["path"] for group in summary["groups"]] == [str(made[1]), str(made[2])]
    assert not any("unequal" in note for note in summary["notes"])
    text = compare.report(summary)
    assert "chosen by validation accuracy: distilled" in text and "learning_rate 0.001 (90.00), not" in text
