"""Losses against gold labels: pure functions of tensors.

Dimension key: B examples, C classes or labels, P masked tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .reduce import wide


def gold_cross_entropy(student_BC: Tensor, label_B: Tensor, has_gold_B: Tensor) -> Tensor:
    """Mean over B of the cross-entropy with the gold class in nats; a row without gold counts 0.

    >>> import torch
    >>> loss = gold_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -1]), torch.tensor([True, False]))
    >>> round(loss.item(), 6)  # ln(4) / 2
    0.693147
    """
    rows_B = functional.cross_entropy(wide(student_BC), label_B.masked_fill(~has_gold_B, 0).long(), reduction="none")
    return rows_B.masked_fill(~has_gold_B, 0.0).mean()


def token_cross_entropies(student_PV: Tensor, label_P: Tensor) -> Tensor:
    """[P]: cross-entropy in nats with the token that stood there.

    >>> import torch
    >>> [round(loss, 6) for loss in token_cross_entropies(torch.zeros(1, 4), torch.tensor([2])).tolist()]  # ln(4)
    [1.386294]
    """
    return functional.cross_entropy(wide(student_PV), label_P, reduction="none")


def gold_binary_cross_entropy(student_BC: Tensor, label_BC: Tensor, has_gold_B: Tensor) -> Tensor:
    """Mean over B and C of the binary cross-entropy of a multi-label head in nats; a row without gold counts 0.

    >>> import torch
    >>> loss = gold_binary_cross_entropy(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([True]))
    >>> round(loss.item(), 6)
    0.693147
    """
    rows_BC = functional.binary_cross_entropy_with_logits(wide(student_BC), wide(label_BC), reduction="none")
    return rows_BC.masked_fill(~has_gold_B[:, None], 0.0).mean()


def gold_squared_error(student_B1: Tensor, label_B: Tensor, has_gold_B: Tensor) -> Tensor:
    """Mean over B of the squared error of a regression head; a row without gold counts 0.

    >>> import torch
    >>> gold_squared_error(torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 0.0]), torch.tensor([True, False])).item()
    2.0
    """
    errors_B = wide(student_B1)[:, 0] - wide(label_B)
    return errors_B.masked_fill(~has_gold_B, 0.0).square().mean()
