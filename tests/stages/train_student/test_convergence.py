"""Rules of convergence by hand; whole trainings that end by one are in test_phases.py."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd.pipeline.errors import UsageError
from kd.stages.train_student.convergence import ConvergenceCallback, had_ended, parse_convergence

LOSSES = [4.0, 2.0, 1.0, 1.0, 0.995, 0.991, 0.99, 1.0, 0.5, 0.6, 0.7, 0.8, 0.05, 0.04]


def steps_of(text: str, losses: list[float] = LOSSES, *, saved_at: int | None = None) -> int | None:
    """The step that a rule ends after; with its state through a checkpoint's JSON at a step."""
    callback, control = parse_convergence(text).callback(100), SimpleNamespace(should_training_stop=False)
    for step, loss in enumerate(losses, 1):
        callback.see(callback.watched(torch.tensor(loss), {}))
        callback.on_step_end(None, SimpleNamespace(global_step=step), control)
        if step == saved_at:
            state = json.loads(json.dumps(callback.state()))
            callback = ConvergenceCallback.from_state(state)
        if control.should_training_stop:
            assert callback.ended == step and had_ended({"ConvergenceCallback": callback.state()})
            return step
        assert callback.ended is None and not had_ended({"ConvergenceCallback": callback.state()})
    return None


@pytest.mark.parametrize(
    ("text", "step", "why"),
    [
        ("loss:every=1:patience=3", 6, "of 1.0 each must be below 0.99"),
        ("loss:every=1:patience=2", 5, "the second of those"),
        ("loss:every=1:patience=3:improvement=0.004", 12, "0.995, 0.99 and 0.5 are low enough"),
        ("loss:every=2:patience=2:improvement=0.05", 8, "windows of 3, 1, 0.993, 0.995"),
        ("loss:every=1:patience=0:below=0.9", 9, "the first below"),
        ("loss:every=2:below=0.9:patience=9", 10, "the first window below"),
        ("loss:every=1:patience=0:below=0.01", None, "never"),
    ],
)
def test_a_rule_ends_after_the_step_that_follows_from_the_losses(text: str, step: int | None, why: str) -> None:
    assert steps_of(text) == step, why
    for saved_at in range(1, len(LOSSES)):
        assert steps_of(text, saved_at=saved_at) == step, f"a checkpoint at step {saved_at} changed it"


def test_windows_may_be_shares_of_the_phase() -> None:
    assert parse_convergence("loss:every=0.1").callback(40).every == 4
    assert parse_convergence("loss:every=0.01").callback(40).every == 1
    assert parse_convergence("loss").callback(1000).every == 50


def test_terms_are_watched_by_the_beginning_of_their_names() -> None:
    callback = parse_convergence("ir-kd.cosine").callback(10)
    terms = {
        f"ir-kd.{name}": torch.tensor(value) for name, value in (("cosine.1-2", 1.0), ("cosine.2-4", 2.0), ("x", 4.0))
    }
    assert callback.watched(torch.tensor(9.0), terms).item() == 3.0
    with pytest.raises(UsageError, match=r"'ir-kd\.cos', and there is no such term"):
        parse_convergence("ir-kd.cos").callback(10).watched(torch.tensor(9.0), terms)


@pytest.mark.parametrize("text", ["loss", "loss:every=50:patience=5", "ir-kd.cosine:patience=0:below=0.05"])
def test_the_written_form_of_a_rule_reads_back_as_itself(text: str) -> None:
    assert str(parse_convergence(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss:patence=3", "did you mean 'patience'"),
        ("loss:3", "'3' in 'loss:3' is no option"),
        ("loss:every=0", "'every' of a rule of convergence is 0; expected a number above 0"),
        ("loss:improvement=-1", "expected 0 or more"),
        ("loss:patience=0", "would never hold"),
        ("loss:patience=soon", "expected a whole number"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_convergence(text)
    assert words in str(refused.value)


def test_early_stopping_that_ended_training_is_told_from_one_that_waits() -> None:
    def state(counter: int) -> dict[str, Any]:
        attributes = {"early_stopping_patience_counter": counter}
        return {"EarlyStoppingCallback": {"args": {"early_stopping_patience": 2}, "attributes": attributes}}

    assert [had_ended(state(counter)) for counter in (0, 1, 2)] == [False, False, True]
    assert not had_ended({})
