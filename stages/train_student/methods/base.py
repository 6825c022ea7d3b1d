"""What a method is: a named loss, the teacher signals it needs, the student outputs it reads, its projections.

Dimension key: B examples, C classes, T token positions, D features; layer 0 is the embedding output, 1..L the blocks.
Of masked text: M slots of an example for masked tokens, P masked tokens of the batch, V vocabulary. Of token tasks: M
slots of an example for words, P words of the batch that have a token of both models.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from ...derivation import at_positions
from ..losses.reduce import wide
from ..registry import Registry, join_options, spelled, split_options

FAMILY = "family"
"""Beside the signals of a batch and of its negatives, where a method asks for such: int64, alike for all variants of a
text. They are no negatives of each other."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a method may know of both models before either is built.

    Attributes:
        task: "single-label", "multi-label", "regression" or "token"; "masked-lm", or "encoder" where nothing is
            predicted.
        num_labels: C; 1 for regression, 0 where there are no labels.
        token_widths: the student's D of token states, layer 0 first.
        sentence_widths: the student's D of sentence vectors, layer 0 first.
        teacher_layers: L of the teacher.
        teacher_width: D of the teacher's hidden states.
        student_heads: H of the student's attention; 0 where it has none to watch.
        attention_width: D of the student's queries, keys and values, all heads together.
        teacher_heads: H of the teacher's attention; its queries, keys and values are as wide as its hidden states.
    """

    task: str
    num_labels: int
    token_widths: tuple[int, ...]
    sentence_widths: tuple[int, ...]
    teacher_layers: int
    teacher_width: int
    student_heads: int = 0
    attention_width: int = 0
    teacher_heads: int = 0

    @property
    def student_layers(self) -> int:
        """L of the student."""
        return len(self.token_widths) - 1


class Heads(NamedTuple):
    """What one block's attention works on: queries, keys and values [B, H, T, D / H], and what scores are scaled by."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@dataclass(frozen=True)
class StudentOutputs:
    """What one forward pass of a student shows to the methods.

    Attributes:
        logits_BC: with gradient; of a masked LM [P, V] and of words [P, C], row by row, and of an encoder without a
            head [B, 0].
        mask_BT: bool, True at true tokens.
        token_states: [B, T, D] per layer, layer 0 first; empty when no method reads them.
        sentence_vector: the student's own summary [B, D] of a layer: [CLS], or what a BiLSTM pools.
        heads: what the attention of a block works on, by layer (1..L), before any dropout; empty when no method reads
            it.
        positions_BM: int64: which tokens are masked, or begin a word; below 0 in slots that are not used.
    """

    logits_BC: Tensor
    mask_BT: Tensor
    token_states: tuple[Tensor, ...] = ()
    sentence_vector: Callable[[int], Tensor] | None = None
    heads: Mapping[int, Heads] = dataclasses.field(default_factory=dict)
    positions_BM: Tensor | None = None

    @property
    def masked_BM(self) -> Tensor:
        """bool: slots of masked tokens, or words, that are used."""
        assert self.positions_BM is not None
        return self.positions_BM >= 0

    def masked(self, layer: int) -> Tensor:
        """[B, M, D] states of the masked tokens; zeros in slots that are not used."""
        assert self.positions_BM is not None
        return at_positions(self.token_states[layer], self.positions_BM)

    def token(self, layer: int) -> Tensor:
        """[B, T, D] states of a layer; garbage where `mask_BT` is False."""
        return self.token_states[layer]

    def sentence(self, layer: int) -> Tensor:
        """[B, D]: the student's own sentence vector at a layer."""
        assert self.sentence_vector is not None
        return self.sentence_vector(layer)

    def mean(self, layer: int) -> Tensor:
        """[B, D]: mean over true tokens; zeros for an example without any."""
        states_BTD = self.token_states[layer].masked_fill(~self.mask_BT[..., None], 0.0)
        return states_BTD.sum(1) / self.mask_BT.sum(1, keepdim=True).clamp(min=1)

    def states(self, at: str, layer: int) -> Tensor:
        """What stands against `hidden.cls`, `hidden.mean` or `hidden.tok`: `sentence`, `mean` or `token` of a layer."""
        return {"cls": self.sentence, "mean": self.mean, "tok": self.token}[at](layer)

    def score(self, layer: int) -> Tensor:
        """[B, H, T, T] attention scores of a block: scaled, unmasked, before any softmax; garbage at padding."""
        heads = self.heads[layer]
        with torch.autocast(heads.query.device.type, enabled=False):
            return wide(heads.query) @ wide(heads.key).transpose(2, 3) * heads.scaling

    def qkv(self, layer: int) -> Tensor:
        """[B, T, 3, D] queries, keys and values of a block, head after head; garbage at padding."""
        heads = self.heads[layer]
        return torch.stack([part.transpose(1, 2).flatten(2) for part in heads[:3]], dim=2)


@dataclass(frozen=True)
class Targets:
    """What the student of one batch is held against; row b belongs to row b of the student's outputs.

    Attributes:
        signals: teacher tensors by `str(signal)`: logits [B, C], sentence vectors [B, D], token states [B, T, D],
            attention scores [B, H, T, T], queries, keys and values [B, T, 3, D]; of masked tokens states [B, M, D]
            and logits [P, V]; of words logits [P, C].
        labels: int64 [B], float32 [B] or float32 [B, C] by task; anything where there is no gold. Of masked text
            int64 [P]: what stood there; of words int64 [P].
        has_gold_B: bool, whether `labels` holds a gold label; of masked text and words [P].
        negatives: the signals of K other rows, drawn for this step, where a method asks for them; beside these, and
            beside `signals`, stands `FAMILY`.
        seed, epoch: what a method's draws come from, so that they are the same on all ranks and after a resume.
    """

    signals: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    labels: Tensor | None = None
    has_gold_B: Tensor | None = None
    negatives: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    seed: int = 0
    epoch: int = 0

    def __getitem__(self, signal: Signal) -> Tensor:
        return self.signals[str(signal)]


class Unfit(UsageError):
    """A method cannot be used on these two models."""


class Method(ABC):
    """Base of the methods. A subclass is a frozen dataclass of options, entered with `@methods.register(name)`."""

    name: ClassVar[str]
    source: ClassVar[str] = ""
    """Where the loss is from."""
    lesser: ClassVar[tuple[str, ...]] = ()
    """Options by which it fits students that it is not for as it is, those that leave out least first."""

    @abstractmethod
    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        """Teacher signals the loss needs from the store.

        Raises:
            UsageError: the options name what the two models do not have.
            Unfit: the method, with these options, is not for these two models.
        """

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        """Student outputs the loss reads: "logits", or "token@1", "sentence@2", "mean@1", "score@2", "qkv@2"."""
        return ("logits",)

    def takes_scores(self) -> bool:
        """Whether it takes products of the teacher's queries and keys for its attention: not of every teacher they are.

        Positions that are rotary or relative enter scores behind the maps of queries and keys.
        """
        return False

    def num_negatives(self, shapes: Shapes) -> int:
        """Rows besides the batch whose signals the loss compares with, drawn anew for every step."""
        return 0

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        """Modules trained with the student and dropped from its export."""
        return nn.ModuleDict()

    @abstractmethod
    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        """Scalar terms by name; each is logged and the trainer alone weighs and sums them."""


methods: Registry[Method] = Registry("method")


OF_WORDS = Signal("logits.tok")
"""Logits of a token classifier; methods get those of words, at the first token of each."""


def by_teacher_token(signal: Signal) -> bool:
    """Whether what a method gets of a signal belongs to tokens, which the student must then read too."""
    return signal.kind.axis != "example" and signal != OF_WORDS


def fitting_methods(shapes: Shapes, *, reads_teacher_tokens: bool = True) -> tuple[str, ...]:
    """Names of the methods that two models can be used with, options at their defaults.

    Args:
        reads_teacher_tokens: whether the student reads the teacher's tokens, as every signal of tokens asks.
    """
    fitting = []
    for name in methods:
        method = methods.make(name, {})
        try:
            signals = method.signals(shapes)
        except UsageError:
            continue
        if (shapes.task == "encoder" and "logits" in method.reads(shapes)) or (
            shapes.task == "masked-lm" and Signal("logits") in signals
        ):
            continue
        if reads_teacher_tokens or not any(map(by_teacher_token, signals)):
            fitting.append(name)
    return tuple(fitting)


def fitting_form(name: str, shapes: Shapes) -> str | None:
    """The options, as text, with which a method fits two models: none, or what it has to leave out; None if it cannot.

    >>> form = Shapes(task="single-label", num_labels=2, token_widths=(8, 6), sentence_widths=(8, 6),
    ...     teacher_layers=4, teacher_width=16, teacher_heads=2)
    >>> fitting_form("soft-target", form), fitting_form("ir-kd", form), fitting_form("minilm", form)
    ('', 'attention=false', None)
    """
    for options in ("", *methods[name].lesser):
        try:
            _parse_one(f"{name}:{options}" if options else name).method.signals(shapes)
        except UsageError:
            continue
        return options
    return None


@dataclass(frozen=True)
class Term:
    """A method with the weight that multiplies all it returns."""

    weight: float
    method: Method

    def __str__(self) -> str:
        name, *options = join_options(self.method.name, self.method).split(":")
        return ":".join([name, spelled(self.weight), *options])


def parse_methods(specs: str | Sequence[str]) -> tuple[Term, ...]:
    """Weighted methods from their text form.

    Args:
        specs: `"soft-target:0.9:temperature=4,hard:0.1"`, or a list of such texts. A method is written
            `name[:weight][:option=value]...`; the weight is 1 when absent.

    Raises:
        UsageError: nothing given, an unknown method or option (near matches are named), a weight that is not a
            number above 0, or the same method twice with the same options.
    """
    texts = [piece.strip() for spec in ([specs] if isinstance(specs, str) else specs) for piece in spec.split(",")]
    terms = [_parse_one(text) for text in texts if text]
    if not terms:
        raise UsageError("no method is given", fix="--method logit-mse (kd methods lists them)")
    for index, term in enumerate(terms):
        if any(term.method == other.method for other in terms[:index]):
            raise UsageError(
                f"method {term.method.name!r} is given twice with the same options", fix="add up the weights"
            )
    return tuple(terms)


def _parse_one(text: str) -> Term:
    name, words, options = split_options(text, "method")
    method = methods.make(name, options)
    if len(words) > 1:
        raise UsageError(f"{text!r} has more than one weight: {', '.join(words)}", fix="options are written key=value")
    try:
        weight = float(words[0]) if words else 1.0
    except ValueError:
        raise UsageError(
            f"the weight {words[0]!r} in {text!r} is not a number", fix=f"{name}:0.5, options as {name}:0.5:key=value"
        ) from None
    if not 0 < weight < float("inf"):
        raise UsageError(
            f"the weight {weight:g} in {text!r} is not a number above 0", fix="leave the method out instead"
        )
    return Term(weight, method)
