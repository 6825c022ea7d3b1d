"""`kd train-student`: the definition. What needs torch is in `preparation.py` and `training.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.errors import UsageError
from ...pipeline.ranks import launched
from ...pipeline.stage import StageContext, StageResult, option
from ..training_options import TrainingOptions

if TYPE_CHECKING:
    from .preparation import Preparation
    from .ranks import TrainingRanks

DATA, STUDENT = "Data", "Student and methods"


@dataclass(frozen=True, kw_only=True)
class TrainStudent(TrainingOptions):
    """Train a student from what the store kept of its teacher; the teacher itself is never opened."""

    command: ClassVar[str] = "train-student"
    kind: ClassVar[str] = "run"
    on_interrupt: ClassVar[str] = "the same command goes on from the step it stopped at"

    view: tuple[str, ...] = option(
        help="View that cache-teacher made; several are trained on together.", metavar="VIEW"
    )
    student: str = option(
        "bilstm",
        help="Architecture with options, as in bilstm:hidden_size=300 (kd students lists them), or a checkpoint.",
        metavar="NAME|PATH|ID",
        panel=STUDENT,
    )
    method: tuple[str, ...] = option(
        ("soft-target",),
        help="Methods with weights and options, as in soft-target:0.9:temperature=4,hard:0.1 (kd methods lists them); "
        "or a YAML file of TextBrewer's intermediate_matches.",
        metavar="METHOD,...",
        panel=STUDENT,
    )
    recipe: str | None = option(
        None,
        help="Train in the phases of this YAML file, each with methods of its own, instead of --method.",
        metavar="FILE",
        panel=STUDENT,
    )
    init: str | None = option(
        None,
        help="Start of the student: random, embeddings (the teacher's word table), vectors:FILE or layers:1+3+5. "
        "By default embeddings, where the student reads the teacher's tokens.",
        metavar="START",
        panel=STUDENT,
    )
    lr_multipliers: tuple[str, ...] = option(
        (),
        help="Learning rates of parts, as multiples of --learning-rate: embeddings:0.1,layers<=2:0.5,head:5.",
        metavar="PART:FACTOR,...",
        panel=STUDENT,
    )
    baseline: bool = option(
        False,
        help="Train the same student from the same start for as many steps on gold labels alone.",
        panel=STUDENT,
    )
    eval_dataset: str | None = option(
        None, help="Labelled dataset to evaluate on and to pick the checkpoint by, as D or D:split.", panel=DATA
    )
    validation_fraction: float = option(
        0.0,
        help="Hold this share of the view back to evaluate on, with all variants of a text.",
        panel=DATA,
    )
    text_column: str | None = option(None, help="Text column of --eval-dataset; the view's by default.", panel=DATA)
    text_pair_column: str | None = option(
        None, help="Second text column of --eval-dataset; the view's by default.", panel=DATA
    )
    label_column: str | None = option(None, help="Label column of --eval-dataset; the view's by default.", panel=DATA)
    output_dir: str = option(help="Folder of the run.", metavar="RUN")

    def __post_init__(self) -> None:
        if not self.view:
            raise UsageError("train-student needs a view", fix="--view VIEW (kd cache-teacher makes one)")
        if len({*self.view}) < len(self.view):
            raise UsageError(f"--view names a view twice: {', '.join(self.view)}")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"--validation-fraction is {self.validation_fraction:g}; expected 0 to below 1")
        if self.recipe is not None and self.method != type(self).method:
            raise UsageError(
                "--method and --recipe exclude each other: the phases of a recipe have methods of their own",
                fix="give one of them",
            )
        if self.recipe is not None and self.resume_from_checkpoint is not None:
            raise UsageError(
                "--resume-from-checkpoint cannot say which phase of --recipe it is from",
                fix="leave it out: the same command goes on from the phase and step it stopped at",
            )
        if self.eval_dataset is not None and self.validation_fraction:
            raise UsageError(
                "--eval-dataset and --validation-fraction exclude each other: each says what to evaluate on",
                fix="give one of them",
            )

    @property
    def has_eval(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval_dataset is not None or self.validation_fraction > 0

    def identity_config(self) -> dict[str, Any]:
        """The fields that change the result: a recipe's phases; a rank's slice of a step as an accumulated pass."""
        config = super().identity_config()
        if not self.lr_multipliers:
            # A run without them is the one it was before there were any.
            del config["lr_multipliers"]
        if self.recipe is None:
            del config["recipe"]
        else:
            # What the file says counts, not where it is.
            config["recipe"] = {
                f"{number} {phase.name}": phase.to_config() for number, phase in enumerate(self.prepared.recipe, 1)
            }
        _, count = launched()
        if count > 1:
            config["gradient_accumulation_steps"] = (self.gradient_accumulation_steps or 1) * count
        return config

    def inputs(self) -> dict[str, str]:
        """Fingerprints of views, evaluation data and files of the start.

        Refuses what cannot work: unknown names and options, signals that the views do not hold, labels that do not
        fit. No weights are loaded.
        """
        return self.prepared.fingerprints

    def run(self, context: StageContext) -> StageResult:
        """Train, and write the run folder."""
        from .training import train_student

        return train_student(self.prepared, context, self._ranks)

    def ranks(self) -> TrainingRanks | None:
        """The processes that torchrun started to train this student."""
        return self._ranks

    @cached_property
    def _ranks(self) -> TrainingRanks | None:
        if launched()[1] == 1:
            return None
        from .ranks import TrainingRanks

        return TrainingRanks.join()

    @cached_property
    def prepared(self) -> Preparation:
        """Everything the run needs except weights, opened and checked."""
        self.check_training_options(has_eval=self.has_eval)
        from .preparation import prepare

        return prepare(self)
