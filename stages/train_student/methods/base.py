"""What a method is: a named loss, the teacher signals it needs, the student outputs it reads, its projections.

Dimension key: B examples, C classes, T token positions, D features; layer 0 is the embedding output, 1..L the blocks.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ....pipeline.errors import UsageError
from ....pipeline.store.signal import Signal
from ..registry import Registry, join_options, split_options


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a method may know of both models before either is built.

    Attributes:
        task: "single-label", "multi-label" or "regression".
        num_labels: C; 1 for regression.
        token_widths: the student's D of token states, layer 0 first.
        sentence_widths: the student's D of sentence vectors, layer 0 first.
        teacher_layers: L of the teacher.
        teacher_width: D of the teacher's hidden states.
    """

    task: str
    num_labels: int
    token_widths: tuple[int, ...]
    sentence_widths: tuple[int, ...]
    teacher_layers: int
    teacher_width: int

    @property
    def student_layers(self) -> int:
        """L of the student."""
        return len(self.token_widths) - 1


@dataclass(frozen=True)
class StudentOutputs:
    """What one forward pass of a student shows to the methods.

    Attributes:
        logits_BC: with gradient.
        mask_BT: bool, True at true tokens.
        token_states: [B, T, D] per layer, layer 0 first; empty when no method reads them.
        sentence_vector: the student's own summary [B, D] of a layer: [CLS], or what a BiLSTM pools.
    """

    logits_BC: Tensor
    mask_BT: Tensor
    token_states: tuple[Tensor, ...] = ()
    sentence_vector: Callable[[int], Tensor] | None = None

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


@dataclass(frozen=True)
class Targets:
    """What the student of one batch is held against; row b belongs to row b of the student's outputs.

    Attributes:
        signals: teacher tensors by `str(signal)`: logits [B, C], sentence vectors [B, D], token states [B, T, D].
        labels: int64 [B], float32 [B] or float32 [B, C] by task; anything where there is no gold.
        has_gold_B: bool, whether `labels` holds a gold label.
    """

    signals: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    labels: Tensor | None = None
    has_gold_B: Tensor | None = None

    def __getitem__(self, signal: Signal) -> Tensor:
        return self.signals[str(signal)]


class Method(ABC):
    """Base of the methods. A subclass is a frozen dataclass of options, entered with `@methods.register(name)`."""

    name: ClassVar[str]
    source: ClassVar[str] = ""
    """Where the loss is from."""

    @abstractmethod
    def signals(self, shapes: Shapes) -> tuple[Signal, ...]:
        """Teacher signals the loss needs from the store.

        Raises:
            UsageError: the options do not fit the two models.
        """

    def reads(self, shapes: Shapes) -> tuple[str, ...]:
        """Student outputs the loss reads: "logits", or "token@1", "sentence@2", "mean@1"."""
        return ("logits",)

    def projections(self, shapes: Shapes) -> nn.ModuleDict:
        """Modules trained with the student and dropped from its export."""
        return nn.ModuleDict()

    @abstractmethod
    def loss(
        self, student: StudentOutputs, targets: Targets, projections: nn.ModuleDict, shapes: Shapes
    ) -> dict[str, Tensor]:
        """Scalar terms by name; each is logged and the trainer alone weighs and sums them."""


methods: Registry[Method] = Registry("method")


@dataclass(frozen=True)
class Term:
    """A method with the weight that multiplies all it returns."""

    weight: float
    method: Method

    def __str__(self) -> str:
        name, *options = join_options(self.method.name, self.method).split(":")
        return ":".join([name, f"{self.weight:g}", *options])


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


def layer_pairs(text: str, shapes: Shapes, *, with_last: bool, where: str) -> tuple[tuple[int, int], ...]:
    """Pairs (student layer, teacher layer) from `skip`, `last` or `1-2+2-4` (student-teacher).

    `skip` spreads the student's blocks evenly, g(m) = m L_T / L_S rounded; `last` takes the teacher's top blocks,
    g(m) = L_T - L_S + m (Sun et al., arXiv 1908.09355, section 3.2). Explicit pairs may name layer 0.

    Args:
        with_last: whether `skip` and `last` include the student's last block.
        where: the option, for messages.

    Raises:
        UsageError: not of that form, or a layer that a model does not have.
    """
    num_student, num_teacher = shapes.student_layers, shapes.teacher_layers
    top = num_student if with_last else num_student - 1
    if text == "skip":
        return tuple((m, max(1, int(m * num_teacher / num_student + 0.5))) for m in range(1, top + 1))
    if text == "last":
        if num_student > num_teacher:
            raise UsageError(
                f"{where} is 'last', and the student has more layers ({num_student}) than the teacher ({num_teacher})",
                fix="use skip, or name pairs: 1-2+2-4 (student-teacher)",
            )
        return tuple((m, num_teacher - num_student + m) for m in range(1, top + 1))
    pairs = []
    for piece in text.split("+"):
        student, _, teacher = piece.partition("-")
        if not (student.isdecimal() and teacher.isdecimal()):
            raise UsageError(f"{where} is {text!r}; expected skip, last or pairs student-teacher like 1-2+2-4")
        pairs.append((int(student), int(teacher)))
    for side, layers, num in (
        ("student", [pair[0] for pair in pairs], num_student),
        ("teacher", [pair[1] for pair in pairs], num_teacher),
    ):
        if max(layers) > num:
            raise UsageError(f"{where} names layer {max(layers)} of the {side}, which has layers 0 to {num}")
    return tuple(pairs)
