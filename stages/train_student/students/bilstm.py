"""Student `bilstm`: the BiLSTM of Tang et al., over the teacher's pieces or words of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ....pipeline.errors import RefusedError, UsageError
from .base import Build, Start, Student, Task, TeacherFacts, students
from .bilstm_presets import PRESETS, Preset
from .starts import fitted, read_vectors, read_words, standardized, table_for_words, vector_width, words_of_pieces

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..methods.base import StudentOutputs

RANDOM_EMBEDDING_SIZE = 300
PAD, UNKNOWN, SEPARATOR, MASK = "[PAD]", "[UNK]", "[SEP]", "[MASK]"
LEAST = {
    **dict.fromkeys(("embedding_size", "head_size", "file_words"), 0),
    **dict.fromkeys(("hidden_size", "num_layers", "min_count"), 1),
    "max_words": 5,  # the special tokens, and a word
}
"""Of its options."""


@students.register("bilstm")
@dataclass(frozen=True, kw_only=True)
class BiLstm(Student):
    """Bidirectional LSTM, pooled, with a ReLU layer before the logits; pairs are encoded apart and compared.

    Of a token task nothing is pooled: the layers before the logits read the state of every token, and own words are
    those of the corpus, one state each.

    Options: `preset` is where the others start from (`kd students` lists them); `units` are the teacher's `pieces` or
    own lower-cased `words` (at most `max_words` of those that occur `min_count` times in training, and the first
    `file_words` of a file of word vectors); `hidden_size` is that of one direction; `embedding_size` 0 takes the width
    of the start (300 at random); `head_size` 0 leaves the ReLU layer out; `static=true` never trains the embeddings,
    `multichannel=true` reads a copy that is never trained beside them.

    Starts: `embeddings` takes the teacher's word table (for own words the mean of their pieces), `vectors:FILE` word
    vectors (for pieces that are words, and others at random), standardised and, for a smaller `embedding_size`, reduced
    to their leading directions; what a greater one adds starts at random.
    """

    source = "Tang et al., Distilling Task-Specific Knowledge from BERT into Simple Neural Networks, arXiv 1903.12136"
    starts: ClassVar[tuple[str, ...]] = ("embeddings", "random", "vectors")
    presets: ClassVar[Mapping[str, Preset]] = PRESETS

    preset: Literal["kd", "tang", "paddle", "inc"] = "kd"
    units: Literal["pieces", "words"] = "pieces"
    embedding_size: int = 0
    hidden_size: int = 150
    num_layers: int = 1
    head_size: int = 200
    pooling: Literal["max", "mean", "last", "attention"] = "max"
    dropout: float = 0.1
    static: bool = False
    multichannel: bool = False
    min_count: int = 1
    max_words: int = 50_000
    file_words: int = 0

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(
                    f"option {name!r} of student 'bilstm' is {getattr(self, name)}; expected {least} or more"
                )
        if self.static and self.multichannel:
            raise UsageError(
                "options 'static' and 'multichannel' of student 'bilstm' exclude each other: the one trains no table, "
                "the other one of two",
                fix="give one of them",
            )
        if self.file_words and self.reads_pieces:
            raise UsageError(
                "option 'file_words' of student 'bilstm' is for words, and this one reads the teacher's pieces",
                fix="--student bilstm:units=words",
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"option 'dropout' of student 'bilstm' is {self.dropout:g}; expected 0 to below 1")

    @property
    def training(self) -> Mapping[str, Any]:
        return PRESETS[self.preset].training

    @property
    def reads_pieces(self) -> bool:
        """Whether its units are the teacher's token ids."""
        return self.units == "pieces"

    def reads_teacher_tokens(self, teacher: TeacherFacts) -> bool:
        return self.reads_pieces

    def default_start(self) -> Start:
        return Start("embeddings" if self.reads_pieces or self.static or self.multichannel else "random")

    def check(self, start: Start, teacher: TeacherFacts, task: Task) -> None:
        super().check(start, teacher, task)
        if (self.static or self.multichannel) and start.kind == "random":
            option = "static" if self.static else "multichannel"
            raise UsageError(
                f"a table that starts at random and is never trained knows nothing, and {option}=true keeps one",
                fix=f"--init embeddings or vectors:FILE, or {option}=false",
            )
        if self.file_words and start.kind != "vectors":
            raise UsageError(
                f"option 'file_words' of student 'bilstm' takes words from a file of word vectors, and {start} is none",
                fix="--init vectors:FILE",
            )
        if task.kind == "token" and self.pooling != PRESETS[self.preset].options.get("pooling", "max"):
            raise UsageError(
                f"option 'pooling' of student 'bilstm' is {self.pooling!r}, and a token task pools nothing",
                fix="leave pooling out",
            )
        width = self._table_width(start, teacher)
        if start.kind != "random" and not width:
            raise RefusedError(f"word vectors {start.path}: no table of finite numbers in it")
        if self.static and self.embedding_size > width:
            raise UsageError(
                f"option 'embedding_size' of student 'bilstm' is {self.embedding_size}, and {start} has width {width}: "
                "with static=true the rest would stay at random",
                fix=f"ask for at most {width}, or leave static=true out",
            )
        if task.pair and self.reads_pieces and teacher.tokenizer.sep_token_id is None:
            raise RefusedError(
                "the teacher's tokenizer has no separator token, by which a BiLSTM tells two texts apart",
                fix="--student bilstm:units=words",
            )

    def _table_width(self, start: Start, teacher: TeacherFacts) -> int:
        if start.kind == "vectors":
            return vector_width(start.path)
        return teacher.hidden_size if start.kind == "embeddings" else 0

    def _width(self, start: Start, teacher: TeacherFacts) -> int:
        return self.embedding_size or self._table_width(start, teacher) or RANDOM_EMBEDDING_SIZE

    def widths(self, start: Start, teacher: TeacherFacts, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
        embeddings = (2 if self.multichannel else 1) * self._width(start, teacher)
        token = (embeddings, *[2 * self.hidden_size] * self.num_layers)
        return token, tuple((4 if task.pair else 1) * width for width in token)

    def make_tokenizer(
        self,
        start: Start,
        teacher: TeacherFacts,
        texts: Callable[[], Sequence[str]],
        *,
        whole_words: bool = False,
    ) -> PreTrainedTokenizerBase:
        if self.reads_pieces:
            return teacher.tokenizer
        return word_tokenizer(
            texts(),
            min_count=self.min_count,
            max_words=self.max_words,
            max_tokens=teacher.max_tokens,
            further=read_words(start.path, self.file_words) if self.file_words else (),
            whole_words=whole_words,
        )

    def build(self, start: Start, teacher: TeacherFacts, task: Task, tokenizer: PreTrainedTokenizerBase) -> Build:
        import torch

        from ..bilstm_model import BiLstmConfig, BiLstmForSequenceClassification, BiLstmForTokenClassification

        of_words = task.kind == "token"
        config = BiLstmConfig(
            vocab_size=teacher.vocab_size if self.reads_pieces else len(tokenizer),
            embedding_size=self._width(start, teacher),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            head_size=self.head_size,
            pooling="max" if of_words else self.pooling,
            pair=task.pair,
            dropout=self.dropout,
            freeze_embeddings=self.static,
            multichannel=self.multichannel,
            pad_token_id=tokenizer.pad_token_id or 0,
            sep_token_id=tokenizer.sep_token_id,
            cls_token_id=tokenizer.cls_token_id,
            **task.config_fields(),
        )
        model = (BiLstmForTokenClassification if of_words else BiLstmForSequenceClassification)(config)
        if start.kind == "random":
            return Build(model)
        table_VD = self._table(start, teacher, tokenizer, config.embedding_size)
        # Rows of NaN have no start of their own and stay as they were drawn, as do features that the table lacks.
        given_V = np.isfinite(table_VD).all(1)
        given_V[config.pad_token_id] = False
        if not given_V.any():
            raise RefusedError(
                f"none of the {len(given_V):,} {self.units} that the student reads is in {start.path}",
                fix="word vectors of that language, one word per row, or --init embeddings",
            )
        weight_VD = model.get_parameter("embeddings.weight")
        with torch.no_grad():
            weight_VD[torch.from_numpy(given_V), : table_VD.shape[1]] = torch.from_numpy(table_VD[given_V])
            if self.multichannel:
                model.get_parameter("static_embeddings.weight").copy_(weight_VD)
        return Build(model, {"embeddings_from_start": round(float(given_V.sum()) / (len(given_V) - 1), 4)})

    def _table(self, start: Start, teacher: TeacherFacts, tokenizer: PreTrainedTokenizerBase, width: int) -> np.ndarray:
        """[V, width, or less] float32 start of the embeddings; NaN where there is none."""
        vocabulary = _vocabulary(tokenizer, teacher.vocab_size if self.reads_pieces else len(tokenizer))
        if start.kind == "embeddings":
            table_VD = teacher.word_table()
            table_VD = fitted(standardized(table_VD), min(width, table_VD.shape[1]), what="the teacher's word table")
            if self.reads_pieces:
                return table_VD
            special = {UNKNOWN: "unk_token", SEPARATOR: "sep_token", MASK: "mask_token"}
            words = [getattr(teacher.tokenizer, special[w]) or "" if w in special else w for w in vocabulary]
            return table_for_words(words, table_VD, teacher.tokenizer)
        words, vectors_VD = read_vectors(start.path)
        width = min(width, vectors_VD.shape[1])
        vectors_VD = fitted(standardized(vectors_VD), width, what=f"the word vectors {start.path}")
        # The first of equal words counts. Either side may be lower-cased where the other is not: our words are, names
        # in vectors of cased corpora are not.
        row_of = {word.lower(): row for row, word in reversed([*enumerate(words)])}
        row_of |= {word: row for row, word in reversed([*enumerate(words)])}
        if self.reads_pieces:
            vocabulary = words_of_pieces(vocabulary)
        rows = np.array([row_of.get(word, row_of.get(word.lower(), -1)) for word in vocabulary])
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


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Its units by id; "" where there is none."""
    units = [""] * size
    for unit, index in tokenizer.get_vocab().items():
        if index < size:
            units[index] = unit
    return units


def word_tokenizer(
    texts: Sequence[str],
    *,
    min_count: int,
    max_words: int,
    max_tokens: int,
    further: Iterable[str] = (),
    whole_words: bool = False,
) -> PreTrainedTokenizerBase:
    """A tokenizer of lower-cased words, its vocabulary the most frequent ones of `texts`.

    Words are those of `kd augment`; `[MASK]` has its own row. Equal counts are ordered by the word, so the vocabulary
    depends on nothing but the texts. Pairs are joined by `[SEP]`.

    Args:
        texts: what to count words in.
        min_count: occurrences below which a word is unknown.
        max_words: most rows for them, special tokens included.
        max_tokens: `model_max_length` of the tokenizer.
        further: words that have a row beside them, in this order; what is no single word is left out.
        whole_words: words are instead what stands between spaces, as the texts of a token task have them.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from ...augment.words import WORD_PATTERN, split_words

    special = [PAD, UNKNOWN, SEPARATOR, MASK]
    backend = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    backend.normalizer = _normalizer(mask=" ")  # counted as a word, [MASK] would get a second row
    backend.pre_tokenizer = (
        pre_tokenizers.Split(" ", behavior="removed")
        if whole_words
        else pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_words, min_frequency=min_count, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    backend.normalizer = _normalizer(mask=MASK)
    row_of = backend.get_vocab()
    for word in map(backend.normalizer.normalize_str, further):
        if (word.split(" ") if whole_words else split_words(word)) == [word]:
            row_of.setdefault(word, len(row_of))
    backend.model = models.WordLevel(row_of, unk_token=UNKNOWN)
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
