"""Made-up models for tests of methods: what a teacher or student shows of a batch, as plain numbers.

Dimension key: B examples, T token positions, D features, H heads. Padding holds garbage on purpose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.pipeline.store.signal import Signal
from kd.stages.train_student.methods import Heads, Method, Shapes, StudentOutputs, Targets, parse_methods

GARBAGE = 1e4


def grid(shape: tuple[int, ...], start: float) -> Tensor:
    """sin(start), sin(start + 1), ... in C order, float64: the inputs that the golden numbers were computed from."""
    return torch.sin(start + torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def make(spec: str) -> Method:
    """The one method that `spec` names."""
    (term,) = parse_methods(spec)
    return term.method


def shapes(**changes: Any) -> Shapes:
    """A student of 2 blocks, 6 wide, under a teacher of 4 blocks, 8 wide, both with 2 heads; 3 classes."""
    values: dict[str, Any] = {
        "task": "single-label",
        "num_labels": 3,
        "token_widths": (6, 6, 6),
        "sentence_widths": (6, 6, 6),
        "teacher_layers": 4,
        "teacher_width": 8,
        "student_heads": 2,
        "attention_width": 6,
        "teacher_heads": 2,
    }
    return Shapes(**{**values, **changes})


def alike(layers: int = 3, width: int = 8, heads: int = 2) -> Shapes:
    """A student of its teacher's shape."""
    widths = (width,) * (layers + 1)
    return shapes(
        token_widths=widths,
        sentence_widths=widths,
        teacher_layers=layers,
        teacher_width=width,
        student_heads=heads,
        attention_width=width,
        teacher_heads=heads,
    )


@dataclass(frozen=True)
class World:
    """What one model shows of a batch.

    Attributes:
        mask: bool [B, T].
        logits: [B, C].
        states: [B, T, D] of layers 0..L.
        heads: what attention works on, by layer 1..L.
    """

    mask: Tensor
    logits: Tensor
    states: tuple[Tensor, ...]
    heads: Mapping[int, Heads]

    @classmethod
    def made(
        cls,
        widths: Sequence[int],
        heads: int,
        *,
        attention_width: int | None = None,
        lengths: Sequence[int] = (3, 2),
        classes: int = 3,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> World:
        """Random numbers of a seed."""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        rows, longest = mask.shape
        size = (attention_width or widths[-1]) // max(heads, 1)
        blocks = {
            layer: Heads(*(drawn(rows, heads, longest, size) for _ in range(3)), scaling=size**-0.5)
            for layer in range(1, len(widths) if heads else 1)
        }
        made = cls(mask, drawn(rows, classes), tuple(drawn(rows, longest, width) for width in widths), blocks)
        return made.changed(lambda t, token_axis: _soiled(t, mask, token_axis))

    @classmethod
    def student_of(cls, form: Shapes, **changes: Any) -> World:
        return cls.made(form.token_widths, form.student_heads, attention_width=form.attention_width, **changes)

    @classmethod
    def teacher_of(cls, form: Shapes, **changes: Any) -> World:
        widths = (form.teacher_width,) * (form.teacher_layers + 1)
        return cls.made(widths, form.teacher_heads, **{"seed": 1, **changes})

    def changed(self, change: Any) -> World:
        """Every tensor but the mask through `change(tensor, axis of tokens or None)`."""
        return World(
            self.mask,
            change(self.logits, None),
            tuple(change(state, 1) for state in self.states),
            {
                layer: Heads(*(change(part, 2) for part in block[:3]), scaling=block.scaling)
                for layer, block in self.heads.items()
            },
        )

    def rows(self, index: Iterable[int]) -> World:
        """The examples `index`, in that order."""
        picked = torch.tensor([*index])
        return dataclasses.replace(self.changed(lambda t, axis: t[picked]), mask=self.mask[picked])

    def padded(self, extra: int) -> World:
        """The same with more padding."""

        def longer(values: Tensor, axis: int | None) -> Tensor:
            if axis is None:
                return values
            shape = list(values.shape)
            shape[axis] = extra
            return torch.cat([values, values.new_full(shape, -GARBAGE)], dim=axis)

        mask = torch.cat([self.mask, self.mask.new_zeros(len(self.mask), extra)], dim=1)
        return dataclasses.replace(self.changed(longer), mask=mask)

    def heads_permuted(self, order: Sequence[int]) -> World:
        """The same with its attention heads in another order."""
        return dataclasses.replace(
            self,
            heads={
                layer: Heads(*(part[:, [*order]] for part in block[:3]), scaling=block.scaling)
                for layer, block in self.heads.items()
            },
        )

    def leaves(self) -> list[Tensor]:
        """Every tensor that gradient can reach."""
        return [self.logits, *self.states, *(part for block in self.heads.values() for part in block[:3])]

    def of_leaves(self, leaves: Sequence[Tensor]) -> World:
        """This world with other numbers, in the order of `leaves()`."""
        left = iter(leaves)
        return self.changed(lambda tensor, axis: next(left))

    def outputs(self) -> StudentOutputs:
        """What a student of these numbers shows to the methods."""
        return StudentOutputs(self.logits, self.mask, self.states, lambda layer: self.states[layer][:, 0], self.heads)

    def signal(self, signal: Signal) -> Tensor:
        """What a store of a teacher of these numbers gives for a signal, padded."""
        shown, layer = self.outputs(), signal.layer or 0
        found = {
            "logits": lambda: shown.logits_BC,
            "hidden.tok": lambda: shown.token(layer),
            "hidden.cls": lambda: shown.sentence(layer),
            "hidden.mean": lambda: shown.mean(layer),
            "attention.score": lambda: shown.score(layer),
            "attention.qkv": lambda: shown.qkv(layer),
        }
        return found[signal.name]()

    def targets(self, signals: Iterable[Signal], **fields: Any) -> Targets:
        """What the student of the batch is held against when these are its teacher's numbers."""
        return Targets({str(signal): self.signal(signal) for signal in signals}, **fields)

    def examples(self) -> list[dict[str, Any]]:
        """Row by row as float64 numpy, true tokens only: `logits`, `states` [n, D]; by layer q, k, v [H, n, D]."""
        found = []
        for row, length in enumerate(self.mask.sum(1).tolist()):
            parts = {
                name: {layer: _numpy(block[part][row, :, :length]) for layer, block in self.heads.items()}
                for part, name in enumerate("qkv")
            }
            states = [_numpy(state[row, :length]) for state in self.states]
            found.append({"logits": _numpy(self.logits[row]), "states": states, **parts})
        return found


def _soiled(values: Tensor, mask: Tensor, token_axis: int | None) -> Tensor:
    if token_axis is None:
        return values
    at = mask if token_axis == 1 else mask[:, None]
    return values.masked_fill(~at[..., None], GARBAGE)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().double().numpy()
