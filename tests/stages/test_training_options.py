from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.stages.training_options import TrainingOptions, resumable_checkpoint


def test_what_the_user_gives_wins_over_what_the_stage_prefers() -> None:
    arguments = TrainingOptions(learning_rate=1e-3).training_arguments(
        output_dir="x", has_eval=False, learning_rate=5e-5, num_train_epochs=7
    )
    assert (arguments.learning_rate, arguments.num_train_epochs) == (1e-3, 7)
    assert arguments.report_to == []


def test_with_rows_to_evaluate_on_the_best_of_ten_evaluations_is_kept() -> None:
    arguments = TrainingOptions().training_arguments(output_dir="x", has_eval=True)
    assert arguments.load_best_model_at_end
    assert arguments.eval_steps == arguments.save_steps == 0.1


def test_checkpoints_follow_the_evaluations_that_the_user_asks_for() -> None:
    arguments = TrainingOptions(eval_strategy="epoch").training_arguments(output_dir="x", has_eval=True)
    assert arguments.save_strategy == "epoch"
    arguments = TrainingOptions(eval_steps=50).training_arguments(output_dir="x", has_eval=True)
    assert arguments.save_steps == 50
    arguments = TrainingOptions(save_steps=40).training_arguments(output_dir="x", has_eval=True)
    assert arguments.save_steps == arguments.eval_steps == 40
    arguments = TrainingOptions(eval_strategy="no").training_arguments(output_dir="x", has_eval=True)
    assert not arguments.load_best_model_at_end


def test_what_transformers_refuses_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="SchedulerType"):
        TrainingOptions(lr_scheduler_type="liner").training_arguments(output_dir="x", has_eval=False)
    with pytest.raises(UsageError, match="wandbb is not supported"):
        TrainingOptions(report_to="wandbb").training_arguments(output_dir="x", has_eval=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; expected a number above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"per_device_train_batch_size": -4}, "--per-device-train-batch-size is -4"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"adam_beta2": 1.0}, "--adam-beta2 is 1.0"),
        ({"early_stopping_patience": 3}, "--early-stopping-patience 3 needs rows to evaluate on"),
        ({"eval_strategy": "steps"}, "--eval-strategy steps needs rows"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_loads(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingOptions(**options).check_training_options(has_eval=False)


def test_a_checkpoint_folder_that_is_not_there_or_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such folder"):
        TrainingOptions(resume_from_checkpoint="nowhere").check_training_options(has_eval=False)
    with pytest.raises(RefusedError, match="not a complete checkpoint"):
        TrainingOptions(resume_from_checkpoint=str(tmp_path)).check_training_options(has_eval=False)


def test_a_checkpoint_that_was_being_written_when_it_was_killed_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((10, json.dumps({"global_step": 10})), (20, '{"global_st'), (30, None)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    found = resumable_checkpoint(TrainingOptions(), tmp_path)
    assert found is not None and found.name == "checkpoint-10"
    assert resumable_checkpoint(TrainingOptions(), tmp_path / "elsewhere") is None
