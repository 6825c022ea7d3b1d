"""`kd evaluate`: score one model on one split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..pipeline.errors import RefusedError, UsageError
from ..pipeline.stage import Stage, StageContext, StageResult, option
from .corpus import DatasetSource

if TYPE_CHECKING:
    import numpy as np

    from .corpus import Corpus
    from .predict import Predictor

SMALL_SPLIT = 1_000
"""Below this many rows one standard error of an accuracy is about a point."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Score a teacher or a run on a labelled split."""

    command: ClassVar[str] = "evaluate"

    model: str = option(help="Teacher, run, or any fine-tuned classifier.", metavar="RUN|TEACHER")
    dataset: str = option(help="Dataset to score on, as D or D:split.")
    text_column: str | None = option(None, help="Column of the (first) text; that of the model's training by default.")
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.")
    label_column: str | None = option(None, help="Column of the label; that of the model's training by default.")
    metric: str | None = option(None, help="The metric to put first; the task's main metric by default.")
    teacher: str | None = option(None, help="Also report how often the model agrees with this teacher.")
    predictions: str | None = option(None, help="Write every row's logits and prediction to this Parquet file.")
    max_length: int | None = option(None, help="Cut inputs to this many tokens; as in training by default.")
    batch_size: int = option(32, help="Rows per forward pass.", identity=False)
    device: str | None = option(None, help="Where to run; a GPU where there is one.", identity=False)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", 3)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected {least} or more")

    def run(self, context: StageContext) -> StageResult:
        """Predict every row and score those with a label."""
        import numpy as np

        from .cache_teacher.teacher import max_positions
        from .metrics import agreement, check_metric, main_metric, task_metrics
        from .predict import load_predictor

        model = load_predictor(self.model, device=self.device, max_length=self.max_length)
        positions = max_positions(model.model.config)
        if positions is not None and model.max_length > positions:
            raise UsageError(
                f"--max-length is {model.max_length}; {self.model} takes {positions} tokens at most",
                fix=f"give --max-length {positions} or less",
            )
        names = model.label_names
        metric = check_metric(self.metric or main_metric(model.task, names), model.task, len(names), names)
        teacher = None if self.teacher is None else load_predictor(self.teacher, device=self.device)
        order = None if teacher is None else matching_columns(teacher, model)
        corpus = read_split(
            self.dataset,
            model,
            text_column=self.text_column,
            text_pair_column=self.text_pair_column,
            label_column=self.label_column,
        )
        has_gold = corpus.has_gold
        if not has_gold.any() and teacher is None and self.predictions is None:
            raise RefusedError(
                f"{self.dataset} has no labelled row to score",
                fix="give --label-column, a split with labels, or ask for --teacher or --predictions",
            )
        logits_NC = model.predict(*corpus.texts(), batch_size=self.batch_size, progress=context.progress)
        num_labelled = int(has_gold.sum())
        summary: dict[str, Any] = {
            "model": self.model,
            "dataset": self.dataset,
            "task": model.task,
            "rows": len(corpus),
            "unlabelled_rows": len(corpus) - num_labelled,
            "main_metric": metric,
        }
        if num_labelled:
            metrics = task_metrics(model.task, *with_gold(corpus, logits_NC), names)
            summary["metrics"] = {metric: metrics[metric], **metrics}
            if metric == "accuracy" and model.task == "single-label":
                share = metrics["accuracy"]
                summary["standard_error"] = float(np.sqrt(share * (1 - share) / num_labelled))
        if teacher is not None:
            teacher_NC = teacher.predict(*corpus.texts(), batch_size=self.batch_size, progress=context.progress)
            teacher_NC = teacher_NC if order is None else teacher_NC[:, order]
            summary["teacher"] = self.teacher
            summary["agreement"] = agreement(model.task, logits_NC, teacher_NC)
            if num_labelled:
                summary["teacher_metrics"] = task_metrics(model.task, *with_gold(corpus, teacher_NC), names)
        if model.task == "token":
            summary["words"] = len(logits_NC)
            summary["words_not_seen"] = int(np.isnan(logits_NC[:, 0]).sum())
        if self.predictions is not None:
            write_predictions(self.predictions, corpus, model, logits_NC)
            summary["predictions"] = self.predictions
        return StageResult(summary=summary)

    def report(self, summary: Mapping[str, Any]) -> str:
        """Metrics as aligned lines."""
        lines = [f"{summary['model']} on {summary['dataset']}: {summary['rows']} rows, {summary['task']}"]
        if summary["unlabelled_rows"]:
            lines.append(f"{summary['unlabelled_rows']} rows have no label and are not scored")
        if summary.get("words_not_seen"):
            lines.append(
                f"{summary['words_not_seen']} of {summary['words']} words were cut or dropped by the tokenizer: they "
                "count as predicted to be nothing (--max-length)"
            )
        teacher = summary.get("teacher_metrics", {})
        shown = summary.get("metrics", {})
        width = max([len(name) for name in shown] + [len("agreement")])
        if teacher:
            lines.append(f"{'':{width}}   model  teacher")
        for name, value in shown.items():
            lines.append(f"{name:{width}}  {value:6.4f}" + (f"   {teacher[name]:6.4f}" if teacher else ""))
        if "agreement" in summary:
            lines.append(f"{'agreement':{width}}  {summary['agreement']:6.4f}   with {summary['teacher']}")
        if "standard_error" in summary:
            lines.append(f"one standard error of the accuracy: {summary['standard_error']:.4f}")
        if "predictions" in summary:
            lines.append(f"predictions: {summary['predictions']}")
        return "\n".join(lines)


def with_gold(corpus: Corpus, logits: np.ndarray) -> tuple[np.ndarray, Any]:
    """The logits of a corpus' rows (or words, of a token task) that have a gold label, and these labels."""
    import numpy as np

    if corpus.info.task != "token":
        labels, has_gold = corpus.labels()
        return logits[has_gold], labels[has_gold]
    tags, has_gold = corpus.tags()
    return logits[np.repeat(has_gold, tags.lengths)], tags.take(np.flatnonzero(has_gold))


def matching_columns(other: Predictor, model: Predictor) -> np.ndarray | None:
    """Where `model`'s labels stand among `other`'s logits; None when they stand in the same order.

    Raises:
        RefusedError: the two do different tasks or have different labels.
    """
    if other.task != model.task:
        raise RefusedError(
            f"{other.path} is a {other.task} model and {model.path} a {model.task} one",
            fix="compare models of one task",
        )
    return other.columns_of(model.label_names, of=str(model.path))


def read_split(
    dataset: str,
    model: Predictor,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
) -> Corpus:
    """A split read for a model: columns of its training unless given, labels numbered as the model numbers them.

    Raises:
        UsageError: the column of the text is neither given nor known.
        RefusedError: as `load_corpus`; a label that the model does not have.
    """
    from .corpus import load_corpus

    known = dict(model.content.get("columns") or {})
    if text_column is not None:
        known["text_column"] = text_column
        # Somebody who names the text names the pair too, if there is one.
        known["text_pair_column"] = text_pair_column
    elif text_pair_column is not None:
        known["text_pair_column"] = text_pair_column
    if label_column is not None:
        known["label_column"] = label_column
    if known.get("text_column") is None:
        raise UsageError(
            f"--text-column is needed: {model.path} does not say which columns it was trained on",
            fix="give --text-column and --label-column",
        )
    source = DatasetSource(dataset=dataset, task=model.task, **known)
    return load_corpus(source, split_default="test", label_names=model.label_names or None)


def write_predictions(path: str, corpus: Corpus, model: Predictor, logits_NC: np.ndarray) -> None:
    """One row per example: `example_id`, texts, `label`, `predicted` (names, or numbers for regression), `logits`.

    Of a token task the last three are lists with one entry per word; null where a word was not seen.
    """
    import json
    import os
    from pathlib import Path

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ..pipeline.ragged import Ragged
    from .metrics import decide

    predicted: Any = decide(model.task, logits_NC)
    logits: pa.Array = pa.FixedSizeListArray.from_arrays(
        pa.array(logits_NC.reshape(-1), pa.float32()), logits_NC.shape[1]
    )
    if model.task == "token":
        tags, has_gold = corpus.tags()
        labels: Any = tags
        predicted = Ragged(predicted, tags.offsets)
        logits = pa.array([None if np.isnan(row[0]) else row for row in logits_NC], logits.type)
        logits = pa.ListArray.from_arrays(pa.array(tags.offsets, pa.int32()), logits)
    else:
        labels, has_gold = corpus.labels()

    def named(value: Any) -> Any:
        if model.task == "token":
            return [None if tag < 0 else model.label_names[tag] for tag in value.tolist()]
        if model.task == "regression":
            return float(value)
        if model.task == "multi-label":
            return [model.label_names[index] for index in np.flatnonzero(value)]
        return model.label_names[int(value)]

    table = pa.table(
        {
            "example_id": corpus.table["example_id"],
            "text_a": corpus.table["text_a"],
            "text_b": corpus.table["text_b"],
            "label": [named(value) if known else None for value, known in zip(labels, has_gold, strict=True)],
            "predicted": [named(value) for value in predicted],
            "logits": logits,
        }
    )
    table = table.replace_schema_metadata({"label_names": json.dumps(model.label_names)})
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, target)
