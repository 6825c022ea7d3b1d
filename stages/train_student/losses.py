"""Distillation losses: pure functions of tensors, computed in float32 whatever autocast does.

Dimension key: B examples, C classes (or labels), T token positions, D features. A teacher tensor is a constant: no
gradient reaches it. Every loss is a mean over examples of a per-example value that depends on nothing else in the
batch, so it does not change with padding, with the order of rows, or with how rows are grouped into batches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def soft_target_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """Mean over B of KL(teacher || student) between distributions softened by `temperature`, in nats, times its square.

    The square keeps the gradient on the scale of the hard-label loss when the temperature changes (Hinton et al.,
    arXiv 1503.02531). Adding a constant to the logits of a row changes nothing.

    Args:
        student_BC: student logits; carries the gradient.
        teacher_BC: teacher logits.
        temperature: above 0; 1 leaves both distributions as they are.

    >>> student, teacher = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(soft_target_kl(student, teacher, temperature=t).item(), 6) for t in (1, 2)]
    [0.266217, 0.313684]
    """
    student_BC = _wide(student_BC) / temperature
    teacher_BC = _wide(teacher_BC.detach()) / temperature
    divergence = functional.kl_div(
        student_BC.log_softmax(-1), teacher_BC.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return divergence * temperature**2


def bernoulli_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """The same for multi-label heads: KL(teacher || student) of each label's Bernoulli, mean over B and C, in nats.

    The mean over labels is that of the hard multi-label loss, so the two keep their proportion.

    >>> both = torch.tensor([[0.3, -2.0]])
    >>> bernoulli_kl(both, both, temperature=2.0).item()
    0.0
    """
    student_BC = _wide(student_BC) / temperature
    teacher_BC = _wide(teacher_BC.detach()) / temperature
    on_BC = teacher_BC.sigmoid() * (functional.logsigmoid(teacher_BC) - functional.logsigmoid(student_BC))
    off_BC = (-teacher_BC).sigmoid() * (functional.logsigmoid(-teacher_BC) - functional.logsigmoid(-student_BC))
    return (on_BC + off_BC).mean() * temperature**2


def logit_mse(student_BC: Tensor, teacher_BC: Tensor, *, reduction: Literal["sum_class", "mean_all"]) -> Tensor:
    """Mean over B of the squared distance between logits: summed over classes, or averaged over them as well.

    `sum_class` is what papers write (Tang et al., arXiv 1903.12136); `mean_all` is what torch's default computes, and
    C times smaller.

    >>> student, teacher = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(logit_mse(student, teacher, reduction=r).item(), 4) for r in ("sum_class", "mean_all")]
    [2.0, 0.6667]
    """
    squares_BC = (_wide(student_BC) - _wide(teacher_BC.detach())).square()
    return squares_BC.sum(-1).mean() if reduction == "sum_class" else squares_BC.mean()


def vector_distance(
    student_BD: Tensor, teacher_BD: Tensor, *, normalize: bool, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Mean over B of the squared distance between sentence vectors, each first scaled to length 1 if `normalize`.

    Normalised, the sum form is 2 - 2 cos (Sun et al., arXiv 1908.09355); `mean` divides it by D, as the official code
    of that paper does.

    >>> student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 0.0]])
    >>> [vector_distance(student, teacher, normalize=n).item() for n in (True, False)]
    [2.0, 13.0]
    """
    student_BD, teacher_BD = _wide(student_BD), _wide(teacher_BD.detach())
    if normalize:
        student_BD = functional.normalize(student_BD, dim=-1, eps=1e-12)
        teacher_BD = functional.normalize(teacher_BD, dim=-1, eps=1e-12)
    squares_BD = (student_BD - teacher_BD).square()
    return squares_BD.sum(-1).mean() if reduction == "sum" else squares_BD.mean()


def token_mse(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    mask_BT: Tensor,
    *,
    reduction: Literal["example", "token"] = "example",
) -> Tensor:
    """Mean squared error between token states: over D, over an example's true tokens, then over B.

    Args:
        student_BTD: already projected to the teacher's width.
        teacher_BTD: padded with anything.
        mask_BT: bool, True at true tokens; an example without any counts 0.
        reduction: `token` is one mean over all true tokens of the batch instead (long examples weigh more).

    >>> states, mask = torch.tensor([[[1.0], [2.0]], [[4.0], [9.0]]]), torch.tensor([[True, True], [True, False]])
    >>> [token_mse(states, torch.zeros(2, 2, 1), mask, reduction=r).item() for r in ("example", "token")]
    [9.25, 7.0]
    """
    differences_BTD = (_wide(student_BTD) - _wide(teacher_BTD.detach())).masked_fill(~mask_BT[..., None], 0.0)
    squares_BT = differences_BTD.square().mean(-1)
    if reduction == "token":
        return squares_BT.sum() / mask_BT.sum().clamp(min=1)
    return (squares_BT.sum(1) / mask_BT.sum(1).clamp(min=1)).mean()


def gold_cross_entropy(student_BC: Tensor, label_B: Tensor, has_gold_B: Tensor) -> Tensor:
    """Mean over B of the cross-entropy with the gold class in nats; a row without gold counts 0.

    >>> loss = gold_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -1]), torch.tensor([True, False]))
    >>> round(loss.item(), 6)  # ln(4) / 2
    0.693147
    """
    rows_B = functional.cross_entropy(_wide(student_BC), label_B.masked_fill(~has_gold_B, 0).long(), reduction="none")
    return rows_B.masked_fill(~has_gold_B, 0.0).mean()


def gold_binary_cross_entropy(student_BC: Tensor, label_BC: Tensor, has_gold_B: Tensor) -> Tensor:
    """Mean over B and C of the binary cross-entropy of a multi-label head in nats; a row without gold counts 0.

    >>> loss = gold_binary_cross_entropy(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([True]))
    >>> round(loss.item(), 6)
    0.693147
    """
    rows_BC = functional.binary_cross_entropy_with_logits(_wide(student_BC), _wide(label_BC), reduction="none")
    return rows_BC.masked_fill(~has_gold_B[:, None], 0.0).mean()


def gold_squared_error(student_B1: Tensor, label_B: Tensor, has_gold_B: Tensor) -> Tensor:
    """Mean over B of the squared error of a regression head; a row without gold counts 0.

    >>> gold_squared_error(torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 0.0]), torch.tensor([True, False])).item()
    2.0
    """
    errors_B = _wide(student_B1)[:, 0] - _wide(label_B)
    return errors_B.masked_fill(~has_gold_B, 0.0).square().mean()


def _wide(values: Tensor) -> Tensor:
    # bfloat16 and float16 logits lose the small differences that a loss is made of; float64 stays for gradient checks.
    return values if values.dtype == torch.float64 else values.float()
