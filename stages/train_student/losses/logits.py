"""Losses between logits: pure functions of tensors.

Dimension key: B examples, C classes or labels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from .reduce import wide


def soft_target_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Mean over B of KL(teacher || student) between distributions softened by `temperature`, in nats, times its square.

    The square keeps the gradient on the scale of the hard-label loss when the temperature changes (Hinton et al.,
    arXiv 1503.02531). Adding a constant to the logits of a row changes nothing.

    Args:
        student_BC: student logits; carries the gradient.
        teacher_BC: teacher logits.
        temperature: above 0; 1 leaves both distributions as they are. A tensor [B] has one for each example.

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(soft_target_kl(student, teacher, temperature=t).item(), 6) for t in (1, 2)]
    [0.266217, 0.313684]
    """
    if isinstance(temperature, Tensor):
        student_BC = (wide(student_BC) / temperature[:, None]).log_softmax(-1)
        teacher_BC = (wide(teacher_BC.detach()) / temperature[:, None]).log_softmax(-1)
        divergence_B = functional.kl_div(student_BC, teacher_BC, reduction="none", log_target=True).sum(-1)
        return (divergence_B * temperature**2).mean()
    student_BC = wide(student_BC) / temperature
    teacher_BC = wide(teacher_BC.detach()) / temperature
    divergence = functional.kl_div(
        student_BC.log_softmax(-1), teacher_BC.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return divergence * temperature**2


def soft_target_kls(student_PV: Tensor, teacher_PV: Tensor, *, temperature: float) -> Tensor:
    """[P]: the same of each of P predictions, for whoever averages them (`over_masked`).

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(value, 6) for value in soft_target_kls(student, teacher, temperature=2.0).tolist()]
    [0.313684]
    """
    student_PV = (wide(student_PV) / temperature).log_softmax(-1)
    teacher_PV = (wide(teacher_PV.detach()) / temperature).log_softmax(-1)
    return functional.kl_div(student_PV, teacher_PV, reduction="none", log_target=True).sum(-1) * temperature**2


def flsw_temperatures(student_BC: Tensor, teacher_BC: Tensor, *, base: float, beta: float, gamma: float) -> Tensor:
    """[B] temperatures around `base`: lower, so sharper, where the student is further from the teacher than most.

    t_b = base + beta (mean(w) - w_b) with w_b = (1 - cos(z_student, z_teacher))^gamma, not below 1 (or `base`, where
    that is lower): the focal loss style weights of Wen et al., arXiv 1911.07471. No gradient passes through them. The
    only thing here that depends on which examples share a batch.

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> flsw_temperatures(student, teacher, base=4.0, beta=2.0, gamma=1.0).tolist()
    [5.0, 3.0]
    """
    cosine_B = functional.cosine_similarity(wide(student_BC.detach()), wide(teacher_BC.detach()), dim=-1)
    weight_B = (1 - cosine_B).clamp(min=0.0) ** gamma
    return (base + beta * (weight_B.mean() - weight_B)).clamp(min=min(base, 1.0))


def bernoulli_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """The same for multi-label heads: KL(teacher || student) of each label's Bernoulli, mean over B and C, in nats.

    The mean over labels is that of the hard multi-label loss, so the two keep their proportion.

    >>> import torch
    >>> both = torch.tensor([[0.3, -2.0]])
    >>> bernoulli_kl(both, both, temperature=2.0).item()
    0.0
    """
    student_BC = wide(student_BC) / temperature
    teacher_BC = wide(teacher_BC.detach()) / temperature
    on_BC = teacher_BC.sigmoid() * (functional.logsigmoid(teacher_BC) - functional.logsigmoid(student_BC))
    off_BC = (-teacher_BC).sigmoid() * (functional.logsigmoid(-teacher_BC) - functional.logsigmoid(-student_BC))
    return (on_BC + off_BC).mean() * temperature**2


def logit_mse(student_BC: Tensor, teacher_BC: Tensor, *, reduction: Literal["sum_class", "mean_all"]) -> Tensor:
    """Mean over B of the squared distance between logits: summed over classes, or averaged over them as well.

    `sum_class` is what papers write (Tang et al., arXiv 1903.12136); `mean_all` is what torch's default computes, and
    C times smaller.

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(logit_mse(student, teacher, reduction=r).item(), 4) for r in ("sum_class", "mean_all")]
    [2.0, 0.6667]
    """
    squares_BC = (wide(student_BC) - wide(teacher_BC.detach())).square()
    return squares_BC.sum(-1).mean() if reduction == "sum_class" else squares_BC.mean()


def logit_distances(student_PC: Tensor, teacher_PC: Tensor, *, reduction: Literal["sum_class", "mean_all"]) -> Tensor:
    """[P]: the same of each of P predictions, for whoever averages them (`over_masked`).

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> logit_distances(student, teacher, reduction="sum_class").tolist()
    [2.0]
    """
    squares_PC = (wide(student_PC) - wide(teacher_PC.detach())).square()
    return squares_PC.sum(-1) if reduction == "sum_class" else squares_PC.mean(-1)
