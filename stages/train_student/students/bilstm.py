"""Student `bilstm`: the BiLSTM of Tang et al., over the teacher's pieces or words of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ....pipeline.errors import UsageError
from .base import Build, Start, Student, Task, TeacherFacts, students
from .starts import fitted, read_vectors, standardized, table_for_words, vector_width

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..methods.base import StudentOutputs

RANDOM_EMBEDDING_SIZE = 300
PAD, UNKNOWN, SEPARATOR, MASK = "[PAD]", "[UNK]", "[SEP]", "[MASK]"


@students.register("bilstm")
@dataclass(frozen=True, kw_only=True)
class BiLstm(Student):
    """Bidirectional LSTM, pooled, with a ReLU layer before the logits; pairs are encoded apart and compared.

    Options: `units` are the teacher's `pieces` or own lower-cased `words` (at most `max_words` of those that occur
    `min_count` times); `hidden_size` is that of one direction; `embedding_size` 0 takes the width of the start (300 at
    random); `head_size` 0 leaves the ReLU layer out; `static=true` never trains the embeddings.

    Starts: `embeddings` takes the teacher's word table (for own words the mean of their pieces), standardised and,
    for a smaller `embedding_size`, reduced to its leading directions; `vectors:FILE` takes word vectors for
    `units=words`.
    """

    source = "Tang et al., Distilling Task-Specific Knowledge from BERT into Simple Neural Networks, arXiv 1903.12136"
    starts: ClassVar[tuple[str, ...]] = ("embeddings", "random", "vectors")
    training: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 64,
        "num_train_epochs": 10,
        "weight_decay": 0.0,
        "warmup_steps": 0.05,
    }

    units: Literal["pieces", "words"] = "pieces"
    embedding_size: int = 0
    hidden_size: int = 150
    num_layers: int = 1
    head_size: int = 200
    pooling: Literal["max", "mean", "last"] = "max"
    dropout: float = 0.1
    static: bool = False
    min_count: int = 1
    max_words: int = 50_000

    def __post_init__(self) -> None:
        for name, least in (("embedding_size", 0), ("hidden_size", 1), ("num_layers", 1), ("head_size", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"option {name!r} of student 'bilstm' is {getattr(self, name)}; expected {least} or more"
                )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"option 'dropout' of student 'bilstm' is {self.dropout:g}; expected 0 to below 1")

    @property
    def reads_pieces(self) -> bool:
        """Whether its units are the teacher's token ids."""
        return self.units == "pieces"

    def reads_teacher_tokens(self, teacher: TeacherFacts) -> bool:
        return self.reads_pieces

    def default_start(self) -> Start:
        return Start("embeddings" if self.reads_pieces else "random")

    def check(self, start: Start, teacher: TeacherFacts, task: Task) -> None:
        super().check(start, teacher, task)
        if start.kind == "vectors" and self.reads_pieces:
            raise UsageError(
                "word vectors start a student that reads words, and this one reads the teacher's pieces",
                fix="--student bilstm:units=words",
            )
        if self.static and start.kind == "random":
            raise UsageError("a static table that starts at random would never be trained", fix="leave static=true out")
        width = self._table_width(start, teacher)
        if width and self.embedding_size > width:
            raise UsageError(
                f"option 'embedding_size' of student 'bilstm' is {self.embedding_size}, and {start} has width {width}",
                fix=f"ask for at most {width}",
            )

    def _table_width(self, start: Start, teacher: TeacherFacts) -> int:
        if start.kind == "vectors":
            return vector_width(start.path)
        return teacher.hidden_size if start.kind == "embeddings" else 0

    def _width(self, start: Start, teacher: TeacherFacts) -> int:
        return self.embedding_size or self._table_width(start, teacher) or RANDOM_EMBEDDING_SIZE

    def widths(self, start: Start, teacher: TeacherFacts, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
        token = (self._width(start, teacher), *[2 * self.hidden_size] * self.num_layers)
        return token, tuple((4 if task.pair else 1) * width for width in token)

    def make_tokenizer(self, teacher: TeacherFacts, texts: Callable[[], Sequence[str]]) -> PreTrainedTokenizerBase:
        if self.reads_pieces:
            return teacher.tokenizer
        return word_tokenizer(
            texts(), min_count=self.min_count, max_words=self.max_words, max_tokens=teacher.max_tokens
        )

    def build(self, start: Start, teacher: TeacherFacts, task: Task, tokenizer: PreTrainedTokenizerBase) -> Build:
        import torch

        from ..bilstm_model import BiLstmConfig, BiLstmForSequenceClassification

        config = BiLstmConfig(
            vocab_size=teacher.vocab_size if self.reads_pieces else len(tokenizer),
            embedding_size=self._width(start, teacher),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            head_size=self.head_size,
            pooling=self.pooling,
            pair=task.pair,
            dropout=self.dropout,
            freeze_embeddings=self.static,
            pad_token_id=tokenizer.pad_token_id or 0,
            sep_token_id=tokenizer.sep_token_id,
            cls_token_id=tokenizer.cls_token_id,
            **task.config_fields(),
        )
        model = BiLstmForSequenceClassification(config)
        if start.kind == "random":
            return Build(model)
        table_VD = self._table(start, teacher, tokenizer, config.embedding_size)
        # Rows of NaN have no start of their own and stay as they were drawn.
        given_V = np.isfinite(table_VD).all(1)
        given_V[config.pad_token_id] = False
        weight_VD = model.get_parameter("embeddings.weight")
        with torch.no_grad():
            weight_VD[torch.from_numpy(given_V)] = torch.from_numpy(table_VD[given_V])
        return Build(model, {"embeddings_from_start": round(float(given_V.sum()) / (len(given_V) - 1), 4)})

    def _table(self, start: Start, teacher: TeacherFacts, tokenizer: PreTrainedTokenizerBase, width: int) -> np.ndarray:
        """[V, width] float32 start of the embeddings; NaN where there is none."""
        vocabulary = _vocabulary(tokenizer)
        if start.kind == "embeddings":
            table_VD = fitted(standardized(teacher.word_table()), width, what="the teacher's word table")
            if self.reads_pieces:
                return table_VD
            special = {UNKNOWN: "unk_token", SEPARATOR: "sep_token", MASK: "mask_token"}
            words = [getattr(teacher.tokenizer, special[w]) or "" if w in special else w for w in vocabulary]
            return table_for_words(words, table_VD, teacher.tokenizer)
        words, vectors_VD = read_vectors(start.path)
        vectors_VD = fitted(standardized(vectors_VD), width, what=f"the word vectors {start.path}")
        # The first of equal words counts. Vectors of cased corpora spell names with capitals; ours are lower-cased.
        row_of = {word.lower(): row for row, word in reversed([*enumerate(words)])}
        row_of |= {word: row for row, word in reversed([*enumerate(words)])}
        rows = np.array([row_of.get(word, -1) for word in vocabulary])
        table_VD = np.full((len(vocabulary), width), np.nan, np.float32)
        table_VD[rows >= 0] = vectors_VD[rows[rows >= 0]]
        return table_VD

    def watch(self, model_output: Any, mask_BT: Tensor) -> StudentOutputs:
        from ..methods.base import StudentOutputs

        if model_output.hidden_states is None:
            return StudentOutputs(model_output.logits, mask_BT)
        return StudentOutputs(
            model_output.logits,
            model_output.encoded_mask,
            model_output.hidden_states,
            model_output.sentence_states.__getitem__,
        )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    by_word = tokenizer.get_vocab()
    return sorted(by_word, key=by_word.__getitem__)


def word_tokenizer(texts: Sequence[str], *, min_count: int, max_words: int, max_tokens: int) -> PreTrainedTokenizerBase:
    """A tokenizer of lower-cased words, its vocabulary the most frequent ones of `texts`.

    Words are those of `kd augment`; `[MASK]` has its own row. Equal counts are ordered by the word, so the vocabulary
    depends on nothing but the texts. Pairs are joined by `[SEP]`.

    Args:
        texts: what to count words in.
        min_count: occurrences below which a word is unknown.
        max_words: most rows, special tokens included.
        max_tokens: `model_max_length` of the tokenizer.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from ...augment.words import WORD_PATTERN

    special = [PAD, UNKNOWN, SEPARATOR, MASK]
    backend = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    backend.normalizer = _normalizer(mask=" ")  # counted as a word, [MASK] would get a second row
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_words, min_frequency=min_count, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    backend.normalizer = _normalizer(mask=MASK)
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {SEPARATOR} $B:1", special_tokens=[(SEPARATOR, special.index(SEPARATOR))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        sep_token=SEPARATOR,
        mask_token=MASK,
        model_max_length=max_tokens,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        truncation_side="right",
    )


def _normalizer(*, mask: str) -> Any:
    """Composed, lower-cased text in which the mask token of any teacher has become `mask`."""
    from tokenizers import normalizers

    masks = [normalizers.Replace(token, mask) for token in ("[mask]", "<mask>")]
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *masks])
