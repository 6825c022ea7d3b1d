"""`kd compare`: the definition. What needs torch is in `comparison.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...pipeline.artifact import open_artifact, read_manifest
from ...pipeline.errors import RefusedError, UsageError
from ...pipeline.fingerprint import fingerprint
from ...pipeline.stage import Stage, StageContext, StageResult, option
from ..corpus import DatasetSource
from ..corpus.source import TASKS

if TYPE_CHECKING:
    from ..corpus import Corpus

DATA, MEASURE = "Data", "Measurement"


@dataclass(frozen=True, kw_only=True)
class Compare(Stage):
    """Compare runs with their baselines and their teacher."""

    command: ClassVar[str] = "compare"
    kind: ClassVar[str] = "comparison"

    runs: tuple[str, ...] = option(
        help="Runs of train-student; those that differ in their seed alone are one row of the table.",
        positional=True,
        metavar="RUN",
        split=False,
    )
    teacher: str | None = option(None, help="The teacher, as the last word and for agreement.")
    dataset: str = option(help="The split to report on, as D or D:split.", panel=DATA)
    text_column: str | None = option(None, help="Column of the (first) text; as in training by default.", panel=DATA)
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.", panel=DATA)
    label_column: str | None = option(None, help="Column of the label; as in training by default.", panel=DATA)
    search: tuple[str, ...] = option(
        (),
        help="Options that were tried with several values, such as learning_rate: of runs that differ in these alone, "
        "those with the best validation score are the row.",
        panel=MEASURE,
        metavar="OPTION,...",
    )
    search_metric: str | None = option(
        None,
        help="Validation score that chooses among these: the task's main metric by default. agreement with the teacher "
        "counts all rows held back, where few of them have labels.",
        panel=MEASURE,
    )
    metric: str | None = option(None, help="What to compare by; the task's main metric by default.", panel=MEASURE)
    bootstrap_samples: int = option(2000, help="Resamples of the paired bootstrap.", panel=MEASURE)
    bootstrap_seed: int = option(0, help="Seed of the bootstrap and of the timed texts.", panel=MEASURE)
    latency_texts: int = option(
        200, help="Texts to time one by one on one CPU thread; 0 leaves timing out.", panel=MEASURE
    )
    notes: tuple[str, ...] = option((), help="A line to put below the table. Repeatable.", metavar="TEXT", split=False)
    batch_size: int = option(64, help="Rows per forward pass.", identity=False, panel=MEASURE)
    device: str | None = option(
        None, help="Where to predict; a GPU where there is one. Timing is always on the CPU.", identity=False
    )
    output_dir: str = option(help="Folder of the report.", metavar="DIR")

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("compare needs at least one run", fix="kd compare RUN... --output-dir DIR")
        if self.bootstrap_samples < 100:
            raise UsageError(f"--bootstrap-samples is {self.bootstrap_samples}; expected 100 or more")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}; expected 1 or more")
        if self.search_metric is not None and not self.search:
            raise UsageError("--search-metric chooses among the values of --search, which is not given")
        if self.latency_texts < 0:
            raise UsageError(f"--latency-texts is {self.latency_texts}; expected 0 or more")

    def inputs(self) -> dict[str, str]:
        """Fingerprints of runs, teacher and split; refuses what cannot be compared."""
        runs = [open_artifact(run, kind="run") for run in self.runs]
        for run in runs:
            if run.content["task"] not in TASKS:
                raise RefusedError(
                    f"{run.path} was trained without labels: it predicts nothing that a split could be scored by",
                    fix=f"kd train-student --student {run.path} --view VIEW, and compare what comes of that",
                )
        found = {"runs": fingerprint([run.fingerprint for run in runs])}
        if self.teacher is not None:
            found["teacher"] = _teacher_fingerprint(self.teacher)
        found["dataset"] = self.read_split().fingerprint
        return found

    def run(self, context: StageContext) -> StageResult:
        """Predict, time, count and write the report."""
        from .comparison import compare

        return compare(self, context)

    def report(self, summary: Mapping[str, Any]) -> str:
        """The table."""
        from .table import plain_report

        return plain_report(summary)

    def reference(self) -> Mapping[str, Any]:
        """What the teacher's manifest says of task, labels and columns; the first run's where kd made no teacher."""
        manifest = None if self.teacher is None else read_manifest(self.teacher)
        if manifest is not None and manifest["kind"] == "teacher":
            content: Mapping[str, Any] = manifest["content"]
            return content
        return open_artifact(self.runs[0], kind="run").content

    def read_split(self) -> Corpus:
        """The rows of the split that have a label, numbered as `reference` numbers its labels."""
        from ..corpus import load_corpus

        reference = self.reference()
        known = dict(reference.get("columns") or {})
        if self.text_column is not None:
            known |= {"text_column": self.text_column, "text_pair_column": self.text_pair_column}
        known |= {
            name: value
            for name, value in (("text_pair_column", self.text_pair_column), ("label_column", self.label_column))
            if value is not None
        }
        for name in ("text_column", "label_column"):
            if known.get(name) is None:
                raise UsageError(f"--{name.replace('_', '-')} is needed: the runs do not say which it was")
        source = DatasetSource(dataset=self.dataset, task=reference["task"], **known)
        corpus = load_corpus(source, split_default="test", label_names=tuple(reference["label_names"]) or None)
        corpus = corpus.replaced(table=corpus.table.filter(corpus.table["has_gold"]))
        if not len(corpus):
            raise RefusedError(
                f"{self.dataset} has no labelled row to compare on", fix="give a split whose labels are published"
            )
        return corpus


def _teacher_fingerprint(path: str) -> str:
    manifest = read_manifest(path)
    if manifest is not None:
        return open_artifact(path, kind="teacher").fingerprint
    from ..cache_teacher.teacher import describe_teacher

    teacher = describe_teacher(path)
    digest = fingerprint(teacher.identity())
    teacher.unload()
    return digest
