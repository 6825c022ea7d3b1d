"""`kd train-teacher`: fine-tune any encoder on labelled text into a folder that transformers opens.

The definition is light; what needs torch is in `teacher_training.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..pipeline.errors import RefusedError, UsageError
from ..pipeline.fingerprint import fingerprint
from ..pipeline.stage import StageContext, StageResult, option
from .corpus import DatasetSource
from .corpus.source import TASKS
from .packaged import MINILM, checkpoint_source
from .training_options import TrainingOptions

if TYPE_CHECKING:
    from .corpus import Corpus

DATA, LABELS, HEAD = "Data", "Labels to keep", "Fine-tuning"


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(TrainingOptions):
    """Fine-tune an encoder into a teacher."""

    command: ClassVar[str] = "train-teacher"
    kind: ClassVar[str] = "teacher"
    on_interrupt: ClassVar[str] = "the same command goes on from the last checkpoint"

    model: str = option(
        help=f"Encoder checkpoint: a folder, a hub id, or `{MINILM}` for the packaged all-MiniLM-L6-v2.",
        metavar="PATH|ID",
    )
    dataset: str | None = option(None, help="Labelled dataset to train on, as D or D:split.", panel=DATA)
    corpus: str | None = option(None, help="Corpus folder whose labelled rows to train on.", panel=DATA)
    eval_dataset: str | None = option(
        None, help="Dataset to evaluate on and to pick the checkpoint by, as D or D:split.", panel=DATA
    )
    text_column: str | None = option(
        None, help="Column of the (first) text, or of lists of words, each with a tag.", panel=DATA
    )
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.", panel=DATA)
    label_column: str | None = option(None, help="Column of the label.", panel=DATA)
    task: str | None = option(
        None,
        help="What the label is, where the column does not settle it.",
        panel=DATA,
        choices=TASKS,
    )
    max_length: int | None = option(
        None, help="Cut inputs to this many tokens; 128, or what the model takes, if that is less.", panel=DATA
    )
    labels_per_class: int | None = option(None, help="Train on this many labelled rows of each class.", panel=LABELS)
    labels_total: int | None = option(None, help="Train on this many labelled rows in all.", panel=LABELS)
    label_seed: int = option(0, help="Which rows keep their label.", panel=LABELS)
    head: str = option(
        "auto",
        help="Start: random; fitted to the frozen encoder; aligned: fitted, once the first token means all; "
        "auto: the checkpoint's own for these labels, else aligned where left-out rows favour it.",
        panel=HEAD,
        choices=("auto", "aligned", "fitted", "random"),
    )
    head_learning_rate: float | None = option(None, help="Learning rate of head and pooler.", panel=HEAD)
    layer_learning_rate_decay: float | None = option(
        None, help="Learning rate of a layer as a share of that of the layer above.", panel=HEAD
    )
    freeze_embeddings: bool | None = option(
        None, help="Keep the table of word embeddings as it is; on by default for short sets.", panel=HEAD
    )
    freeze_encoder: bool = option(False, help="Train the head alone.", panel=HEAD)
    output_dir: str = option(help="Folder of the teacher.", metavar="TEACHER")

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.corpus is None):
            raise UsageError("train-teacher needs either --dataset or --corpus", fix="give one of them")
        if self.dataset is not None:
            for name, value in (("--text-column", self.text_column), ("--label-column", self.label_column)):
                if value is None:
                    raise UsageError(f"--dataset needs {name}", fix=f"name the column with {name}")
        if self.max_length is not None and self.max_length < 3:
            raise UsageError(f"--max-length is {self.max_length}; expected 3 or more")

    def inputs(self) -> dict[str, str]:
        """Fingerprints of model, data and evaluation data; refuses what cannot work before anything trains."""
        self.check_training_options(has_eval=self.eval_dataset is not None)
        self._require("head_learning_rate", lambda value: value > 0, "above 0")
        self._require("layer_learning_rate_decay", lambda value: 0 < value <= 1, "above 0 and at most 1")
        train = self.training_corpus()
        found = {
            "model": self._model_fingerprint(),
            "dataset" if self.corpus is None else "corpus": self._originals().fingerprint,
        }
        if self.eval_dataset is not None:
            found["eval_dataset"] = self.evaluation_corpus(train).fingerprint
        return found

    def run(self, context: StageContext) -> StageResult:
        """Train, and write the teacher folder."""
        from .teacher_training import train_teacher

        return train_teacher(self, context)

    def model_source(self) -> str:
        """The checkpoint as transformers opens it."""
        return checkpoint_source(self.model, option="--model")

    def training_corpus(self) -> Corpus:
        """The labelled rows, after hiding labels.

        Raises:
            RefusedError: no labelled row, or one class alone.
        """
        corpus = self._originals()
        corpus = corpus.replaced(table=corpus.table.filter(corpus.table["has_gold"]))
        where = self.corpus or self.dataset
        if not len(corpus):
            raise RefusedError(f"{where} has no labelled row", fix="give another split, or --label-column")
        if corpus.info.task == "token" and self.head not in ("auto", "random"):
            raise UsageError(
                f"--head {self.head} is fitted to one label per text; the task is 'token'", fix="leave --head out"
            )
        if corpus.info.task in ("single-label", "token"):
            labels = corpus.tags()[0].values if corpus.info.task == "token" else corpus.labels()[0]
            if (labels == labels[0]).all():
                raise RefusedError(
                    f"all {len(corpus)} labelled rows of {where} have the label "
                    f"{corpus.info.label_names[int(labels[0])]!r}: there is nothing to learn",
                    fix="check --label-column, or keep labels of more classes",
                )
        return corpus

    def transfer_texts(self, limit: int) -> Corpus:
        """At most `limit` texts of the training set, labelled or not; which ones follows from the texts alone."""
        import numpy as np
        import pyarrow as pa

        corpus = self._originals()
        order = np.argsort(np.array(corpus.table["example_id"].to_pylist()))[:limit]
        return corpus.replaced(table=corpus.table.take(pa.array(np.sort(order))))

    def _originals(self) -> Corpus:
        """Every row that no augmentation made, with labels hidden as asked."""
        import pyarrow.compute as pc

        from .corpus import hide_labels, load_corpus, open_corpus

        corpus = open_corpus(self.corpus) if self.corpus is not None else load_corpus(self._source(self.dataset or ""))
        corpus = corpus.replaced(table=corpus.table.filter(pc.equal(corpus.table["aug_op"].cast("string"), "orig")))
        return hide_labels(
            corpus,
            labels_per_class=self.labels_per_class,
            labels_total=self.labels_total,
            label_seed=self.label_seed,
        )

    def evaluation_corpus(self, train: Corpus) -> Corpus:
        """The rows of --eval-dataset with a label, numbered by the training corpus' label names."""
        from .corpus import load_corpus

        assert self.eval_dataset is not None
        info = train.info
        source = self._source(
            self.eval_dataset,
            text_column=self.text_column or info.text_column,
            text_pair_column=self.text_pair_column or info.text_pair_column,
            label_column=self.label_column or info.label_column,
            task=info.task,
        )
        corpus = load_corpus(source, split_default="validation", label_names=info.label_names or None)
        corpus = corpus.replaced(table=corpus.table.filter(corpus.table["has_gold"]))
        if not len(corpus):
            raise RefusedError(
                f"--eval-dataset {self.eval_dataset} has no labelled row",
                fix="give a split whose labels are published",
            )
        return corpus

    def _source(self, dataset: str, **columns: str | None) -> DatasetSource:
        fields = {
            "text_column": self.text_column,
            "text_pair_column": self.text_pair_column,
            "label_column": self.label_column,
            "task": self.task,
        } | columns
        return DatasetSource(dataset=dataset, **fields)  # type: ignore[arg-type]

    def _model_fingerprint(self) -> str:
        from .cache_teacher.identity import behaviour_config, tokenizer_identity
        from .cache_teacher.teacher import describe_teacher

        checkpoint = describe_teacher(self.model_source())
        if self.max_length is not None and self.max_length > checkpoint.max_tokens:
            raise UsageError(
                f"--max-length is {self.max_length}; {self.model} takes {checkpoint.max_tokens} tokens at most",
                fix=f"give --max-length {checkpoint.max_tokens} or less",
            )
        digest = checkpoint.tensor_digest
        checkpoint.unload()
        return fingerprint(
            {
                "tensors": digest,
                "config": behaviour_config(checkpoint.config),
                "model_type": checkpoint.config.model_type,
                "tokenizer": tokenizer_identity(checkpoint.tokenizer),
            }
        )
