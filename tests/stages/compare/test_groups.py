from __future__ import annotations

import dataclasses

import pytest

from kd.pipeline.errors import RefusedError
from kd.stages.compare.groups import baselines, make_groups, plain_soft_targets, read_run, told_apart_by_view


def test_runs_that_differ_in_their_seed_alone_are_one_row(make_run, tmp_path) -> None:
    runs = [make_run(tmp_path / f"d{seed}", seed=seed) for seed in (2, 0, 1)]
    runs.append(make_run(tmp_path / "other", seed=0, method="logit-mse"))
    runs.append(make_run(tmp_path / "view", seed=0, view="b"))
    groups = make_groups([read_run(run) for run in runs])
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1, 2], [0], [0]]


def test_a_run_given_twice_counts_once(make_run, tmp_path) -> None:
    run = read_run(make_run(tmp_path / "d"))
    assert len(make_groups([run, run])[0].runs) == 1


def test_rows_stand_in_the_order_floor_start_distilled(make_run, tmp_path) -> None:
    runs = [
        make_run(tmp_path / "distilled", init="embeddings"),
        make_run(tmp_path / "start", role="baseline", init="embeddings"),
        make_run(tmp_path / "floor", role="baseline", init="random"),
    ]
    groups = make_groups([read_run(run) for run in runs])
    assert [group.role for group in groups] == ["floor", "start", "distilled"]


def test_a_baseline_has_the_same_student_start_and_budget(make_run, tmp_path) -> None:
    def group_of(name: str, **fields: object):
        return make_groups([read_run(make_run(tmp_path / name, **fields))])[0]

    distilled = group_of("distilled", init="embeddings", steps=100)
    floor = group_of("floor", role="baseline", init="random", steps=100)
    start = group_of("start", role="baseline", init="embeddings", steps=100)
    short = group_of("short", role="baseline", init="embeddings", steps=50)
    other = group_of("other", role="baseline", init="embeddings", student="bilstm", steps=100)
    everything = [floor, start, short, other, distilled]
    assert baselines(distilled, everything) == ([floor], [start])
    assert baselines(distilled, [short, other, distilled]) == ([], [short])
    from_nothing = group_of("from-nothing", init="random", steps=100)
    assert baselines(from_nothing, [*everything, from_nothing]) == ([floor], [floor])


def test_rows_that_only_their_text_tells_apart_are_named_by_it(make_run, tmp_path) -> None:
    made = [
        make_run(tmp_path / "one", view="v1"),
        make_run(tmp_path / "four", view="v4"),
        make_run(tmp_path / "pkd", view="v4", method="pkd"),
    ]
    groups = make_groups([read_run(run) for run in made])
    assert [told_apart_by_view(group, groups) for group in groups] == ["v1", "v4", None]


def test_plain_soft_targets_are_those_of_the_same_student_start_text_and_steps(make_run, tmp_path) -> None:
    def group_of(name: str, **fields: object):
        return make_groups([read_run(make_run(tmp_path / name, **fields))])[0]

    plain = group_of("plain", method="soft-target:0.9:temperature=2.0,hard:0.1")
    pkd = group_of("pkd", method="soft-target:0.9:temperature=2.0,pkd:0.1,hard:0.1")
    phased = group_of("phased", method="soft-target:1 > hard:1")
    other = group_of("other", method="soft-target:0.9", init="embeddings")
    longer = group_of("longer", method="soft-target:0.9", steps=500)
    augmented = group_of("augmented", method="soft-target:0.9", view="b")
    labels = group_of("labels", role="baseline", method="hard:1")
    everything = [plain, pkd, phased, other, longer, augmented, labels]
    assert plain_soft_targets(pkd, everything) is plain
    assert plain_soft_targets(phased, everything) is plain
    assert [plain_soft_targets(group, everything) for group in (plain, labels)] == [None, None]
    assert plain_soft_targets(pkd, [*everything, group_of("hot", method="soft-target:1:temperature=8.0")]) is None


def test_runs_of_different_tasks_are_refused(make_run, tmp_path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", task="multi-label")]
    with pytest.raises(RefusedError, match="different tasks"):
        make_groups([read_run(run) for run in runs])


def test_a_search_keeps_the_value_with_the_best_mean_validation_score(make_run, tmp_path) -> None:
    scores = {(1e-3, 1): 0.70, (1e-3, 2): 0.90, (3e-3, 1): 0.95, (3e-3, 2): 0.60}
    runs = [
        read_run(make_run(tmp_path / f"{rate}-{seed}", learning_rate=rate, seed=seed, validation=score))
        for (rate, seed), score in scores.items()
    ]
    other = read_run(make_run(tmp_path / "other", view="b", learning_rate=3e-3))
    assert len(make_groups([*runs, other])) == 3
    found, alone = make_groups([*runs, other], search=("learning_rate",))
    assert [(run.config["learning_rate"], run.seed) for run in found.runs] == [(1e-3, 1), (1e-3, 2)]
    assert [(point.options["learning_rate"], round(point.score, 3)) for point in found.tried] == [
        (1e-3, 0.8),
        (3e-3, 0.775),
    ]
    assert alone.tried == ()


def test_agreement_can_choose_where_runs_have_it(make_run, tmp_path) -> None:
    """Baselines are judged on labels alone, and go by the main metric beside it."""
    scores = {"low": (0.99, 0.80), "high": (0.97, 0.90)}
    runs = []
    for index, (name, (accuracy, agreement)) in enumerate(scores.items()):
        for role in ("distilled", "baseline"):
            path = make_run(tmp_path / f"{role}-{name}", role=role, learning_rate=1e-3 + index, validation=accuracy)
            run = read_run(path)
            metrics = {**run.content["metrics"], **({"agreement": agreement} if role == "distilled" else {})}
            runs.append(dataclasses.replace(run, content={**run.content, "metrics": metrics}))
    baseline, distilled = make_groups(runs, search=("learning_rate",), search_metric="agreement")
    assert [(point.metric, point.score) for point in distilled.tried] == [("agreement", 0.90), ("agreement", 0.80)]
    assert [(point.metric, point.score) for point in baseline.tried] == [("accuracy", 0.99), ("accuracy", 0.97)]
    with pytest.raises(RefusedError, match=r"agrement: no run has .*did you mean 'agreement'"):
        make_groups(runs, search=("learning_rate",), search_metric="agrement")


def test_a_search_that_cannot_be_decided_is_refused(make_run, tmp_path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a", seed=1)),
        read_run(make_run(tmp_path / "b", seed=1, learning_rate=3e-3)),
        read_run(make_run(tmp_path / "c", seed=2)),
    ]
    with pytest.raises(RefusedError, match="not complete") as refusal:
        make_groups(runs, search=("learning_rate",))
    assert any("seeds 1, 2" in line for line in refusal.value.details)
    with pytest.raises(RefusedError, match="did you mean 'learning_rate'"):
        make_groups(runs, search=("learnin_rate",))
    unjudged = read_run(make_run(tmp_path / "d", seed=1, learning_rate=2e-3, validation=None))
    with pytest.raises(RefusedError, match="no validation score in common"):
        make_groups([*runs[:2], unjudged], search=("learning_rate",))
