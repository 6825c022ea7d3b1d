"""What a student is: an architecture with options, how it starts, and which of its outputs a method may watch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ....pipeline.errors import RefusedError, UsageError, VerificationError, near_match
from ....pipeline.store.store import TeacherStore
from ..registry import Registry, split_options

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..methods.base import StudentOutputs

PROBLEM_TYPE = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
GENERAL = ("masked-lm", "encoder")
"""Kinds of task without labels."""
START_KINDS = ("random", "embeddings", "vectors", "layers")


@dataclass(frozen=True)
class Start:
    """Where a student's weights begin.

    Attributes:
        kind: "random", "embeddings" (the teacher's word table), "vectors" (a file of word vectors) or "layers" (blocks
            of the teacher, with its embeddings and, where shapes allow, its head).
        path: of the vectors.
        layers: teacher blocks, counted from 1, for the student's blocks 1, 2, ...
    """

    kind: str
    path: str = ""
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "vectors":
            return f"vectors:{self.path}"
        return "layers:" + "+".join(map(str, self.layers)) if self.kind == "layers" else self.kind


def parse_start(text: str) -> Start:
    """A start from its text: `random`, `embeddings`, `vectors:FILE` or `layers:1+3+5`.

    Raises:
        UsageError: anything else, with near matches.
    """
    kind, colon, rest = text.partition(":")
    if kind not in START_KINDS:
        raise UsageError(f"unknown start {text!r}{near_match(kind, START_KINDS)}")
    if kind == "vectors" and rest:
        return Start(kind, path=rest)
    if kind == "layers" and rest and all(piece.isdecimal() and int(piece) > 0 for piece in rest.split("+")):
        return Start(kind, layers=tuple(int(piece) for piece in rest.split("+")))
    if kind in ("random", "embeddings") and not colon:
        return Start(kind)
    expected = {"vectors": "vectors:FILE", "layers": "layers:1+3+5, blocks counted from 1"}.get(kind, kind)
    raise UsageError(f"start {text!r} cannot be read; expected {expected}")


@dataclass(frozen=True)
class Task:
    """What the student is to predict.

    Attributes:
        kind: "single-label", "multi-label", "regression" or "token"; "masked-lm" for the tokens of masked text,
            "encoder" for nothing: a student of hidden states, to be fine-tuned.
        label_names: names of the logits in their order; one name for regression, none for the last two.
        pair: whether examples have two texts.
    """

    kind: str
    label_names: tuple[str, ...]
    pair: bool

    @property
    def is_general(self) -> bool:
        """Whether there are no labels: the student is a start for others."""
        return self.kind in GENERAL

    @property
    def auto_class(self) -> Any:
        """The Auto class of transformers for its models."""
        import transformers

        others = {
            "token": transformers.AutoModelForTokenClassification,
            "masked-lm": transformers.AutoModelForMaskedLM,
            "encoder": transformers.AutoModel,
        }
        return others.get(self.kind, transformers.AutoModelForSequenceClassification)

    def config_fields(self) -> dict[str, Any]:
        """The fields of a transformers config that say so."""
        if self.is_general:
            return {}
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
            **({} if self.kind == "token" else {"problem_type": PROBLEM_TYPE[self.kind]}),
        }


@dataclass(frozen=True)
class TeacherFacts:
    """What a student may know of the teacher, all of it from the store.

    Attributes:
        store: that its outputs are in.
        config: the fields of its config.json.
    """

    store: TeacherStore
    config: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def num_heads(self) -> int:
        """Heads of its attention; 0 where its config does not say."""
        return int(self.config.get("num_attention_heads") or 0)

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def max_tokens(self) -> int:
        """The longest input that the teacher was shown."""
        return int(self.store.identity.capture["max_length"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""
        from transformers import AutoTokenizer

        from ...cache_teacher.identity import differing_behaviour

        folder = str(self.store.sidecar_folder("tokenizer"))
        try:
            # Never asks, never runs code: the store may be anybody's.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            changed = differing_behaviour(self.store.identity.tokenizer, tokenizer)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise VerificationError(
                f"the tokenizer that store {self.store.url} keeps cannot be opened",
                details=[(str(error).strip().splitlines() or [type(error).__name__])[0][:300]],
                fix="run kd cache-teacher with a new --store",
            ) from None
        if changed:
            raise VerificationError(
                f"the tokenizer that store {self.store.url} keeps is not the one that its rows were made with",
                details=changed,
                fix="run kd cache-teacher with a new --store",
            )
        return tokenizer

    def require_sidecars(self, *names: str, needed_by: str) -> None:
        """Refuse unless the store keeps these teacher tensors.

        Raises:
            RefusedError: naming the missing ones and the command that adds them.
        """
        missing = [name for name in names if not self.store.has_sidecar(name)]
        if missing:
            raise RefusedError(
                f"{needed_by} needs teacher tensors that store {self.store.url} does not keep: {', '.join(missing)}",
                fix=f"run kd cache-teacher again with --sidecars {','.join(names)}, or train with --init random",
            )

    def tensors(self, sidecar: str) -> dict[str, np.ndarray]:
        """Tensors of a sidecar in float32, by their names in the teacher."""
        return {name: np.asarray(value, np.float32) for name, value in self.store.sidecar(sidecar).items()}

    def word_table(self) -> np.ndarray:
        """[vocab_size, hidden] float32: the teacher's word embeddings."""
        tensors = self.tensors("embeddings")
        for name, value in tensors.items():
            if name.endswith(("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight", "wte.weight")):
                if value.ndim == 2 and len(value) == self.vocab_size and value.size and np.isfinite(value).all():
                    return value
                raise VerificationError(
                    f"{name} of sidecar 'embeddings' of store {self.store.url} is no table of {self.vocab_size} words: "
                    f"{list(value.shape)}" + ("" if np.isfinite(value).all() else ", not all of it finite"),
                    fix=f"kd store audit {self.store.url} --teacher TEACHER, or train with --init random",
                )
        raise RefusedError(
            f"sidecar 'embeddings' of store {self.store.url} has no table of word embeddings",
            details=sorted(tensors),
            fix="train with --init random",
        )


@dataclass(frozen=True)
class Build:
    """A student at its start.

    Attributes:
        model: what is trained and exported.
        start: facts about the start, for `metrics.json`.
    """

    model: PreTrainedModel
    start: Mapping[str, Any] = field(default_factory=dict)


class Student(ABC):
    """Base of the students. A subclass is a frozen dataclass of options, entered with `@students.register(name)`."""

    name: ClassVar[str]
    source: ClassVar[str] = ""
    """Where the architecture is from."""
    starts: ClassVar[tuple[str, ...]] = ("random",)
    """Kinds of start it can make; the first is its default."""
    general: ClassVar[bool] = False
    """Whether it can be trained on text without labels, for a task to be named later."""

    @property
    def training(self) -> Mapping[str, Any]:
        """`TrainingArguments` it does well with, for what the user leaves open."""
        return {}

    def require_sizes(self, **least: int) -> None:
        """Refuse options below their least value, and a dropout that is no share; a student calls it when it is made.

        Raises:
            UsageError: naming the option and its value.
        """
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(
                    f"option {name!r} of student {self.name!r} is {getattr(self, name)}; expected {value} or more"
                )
        dropout: float = getattr(self, "dropout", 0.0)
        if not 0 <= dropout < 1:
            raise UsageError(f"option 'dropout' of student {self.name!r} is {dropout:g}; expected 0 to below 1")

    def reads_teacher_tokens(self, teacher: TeacherFacts) -> bool:
        """Whether its input is the token ids that the teacher read, as the store keeps them."""
        return True

    @property
    def refuses_float16(self) -> bool:
        """Whether float16 autocast breaks it."""
        return False

    def default_start(self) -> Start:
        """How it starts unless told otherwise."""
        return Start(self.starts[0])

    def check(self, start: Start, teacher: TeacherFacts, task: Task) -> None:
        """Refuse what cannot work, before anything is built. Overrides call it first.

        Raises:
            UsageError, RefusedError: naming the option and what to change.
        """
        if task.is_general and not self.general:
            fitting = [name for name in students if students[name].general]
            raise RefusedError(
                f"student {self.name!r} is made for a task, and the view has no labels",
                fix=f"--student {' or '.join(fitting)} or a checkpoint, or cache a labelled corpus",
            )
        if start.kind not in self.starts:
            raise UsageError(f"student {self.name!r} cannot start from {start}; it knows {', '.join(self.starts)}")
        if start.kind in ("embeddings", "layers"):
            teacher.require_sidecars(
                "embeddings", *(["layers"] if start.kind == "layers" else []), needed_by=f"--init {start}"
            )

    @abstractmethod
    def widths(self, start: Start, teacher: TeacherFacts, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths of token states and of sentence vectors, for layers 0 (embeddings) to L."""

    def attention(self, start: Start, teacher: TeacherFacts) -> tuple[int, int]:
        """Heads of its attention, and the width of its queries, keys and values; (0, 0) where it has none."""
        return 0, 0

    def make_tokenizer(
        self,
        start: Start,
        teacher: TeacherFacts,
        texts: Callable[[], Sequence[str]],
        *,
        whole_words: bool = False,
    ) -> PreTrainedTokenizerBase:
        """The student's tokenizer.

        Args:
            texts: gives the training texts when it has to be learned.
            whole_words: it is then to make one unit of every word between spaces.
        """
        return teacher.tokenizer

    @abstractmethod
    def build(self, start: Start, teacher: TeacherFacts, task: Task, tokenizer: PreTrainedTokenizerBase) -> Build:
        """The student at its start; what the start leaves open is drawn from torch's global generator."""

    @abstractmethod
    def watch(self, model_output: Any, mask_BT: Tensor) -> StudentOutputs:
        """What the methods may read of one forward pass."""


students: Registry[Student] = Registry("student")


def parse_student(text: str) -> Student:
    """A student from its text: `name[:option=value]...`, or a checkpoint by path or hub id.

    Raises:
        UsageError: an unknown option (near matches are named), or neither a name nor anything like a checkpoint.
    """
    from .checkpoint import Checkpoint

    if Path(text).expanduser().is_dir():
        return Checkpoint(path=text)
    name, words, options = split_options(text, "student")
    if name not in students and not options and not words and "/" in text:
        return Checkpoint(path=text)
    if words:
        raise UsageError(f"{words[0]!r} in the student {text!r} is no option", fix="options are written key=value")
    return students.make(name, options)


def first_token_outputs(model_output: Any, mask_BT: Tensor) -> StudentOutputs:
    """What a transformer encoder shows: its hidden states, with the first token's as sentence vector."""
    from ..methods.base import StudentOutputs

    states = tuple(model_output.hidden_states or ())
    logits = getattr(model_output, "logits", None)
    if logits is None:  # an encoder without a head
        logits = model_output.last_hidden_state.new_zeros(len(mask_BT), 0)
    return StudentOutputs(logits, mask_BT, states, lambda layer: states[layer][:, 0])
