"""Losses that tell a row's own teacher vector from those of other rows: pure functions of tensors.

Dimension key: B examples, K negatives, D features. Vectors have length 1; the softmax runs in float32, for
exp(1 / 0.07) overflows float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduce import wide


def info_nce(
    student_BD: Tensor,
    positive_BD: Tensor,
    negatives_KD: Tensor,
    usable_BK: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Mean over B of -log of the share that a row's own teacher vector has of exp(similarity / temperature), in nats.

    van den Oord et al., arXiv 1807.03748, as Sun et al. use it (arXiv 2009.14167). log(K + 1) when all similarities are
    equal; 0 for a row without any usable negative.

    Args:
        student_BD, positive_BD, negatives_KD: of length 1; [B, K, D] where each row has negatives of its own.
        usable_BK: bool, which negatives count for which row.

    >>> one, usable = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, True, True]])
    >>> round(info_nce(one, one, one.expand(3, 2), usable, temperature=0.07).item(), 6)  # ln 4
    1.386294
    """
    own_B, others_BK = similarities(student_BD, positive_BD, negatives_KD)
    logits = torch.cat([own_B[:, None], others_BK.masked_fill(~usable_BK, float("-inf"))], dim=1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def noise_contrastive(
    student_BD: Tensor,
    positive_BD: Tensor,
    negatives_KD: Tensor,
    usable_BK: Tensor,
    *,
    temperature: float,
    scale: Tensor,
    eps: float = 0.0,
) -> Tensor:
    """The form of the released code of Sun et al. (arXiv 2009.14167): is a vector the row's own, or noise?

    With P = exp(similarity / temperature) / scale and K usable negatives, mean over B of
    -log(P_0 / (P_0 + K + eps)) - sum_k log(K / (P_k + K + eps)). The released code has P / N and K / N for N training
    rows, which N leaves as it is (its eps of 1e-7 becomes N times that).

    Args:
        scale: scalar, the mean of exp(similarity / temperature) at the start of training.

    >>> one = torch.tensor([[1.0, 0.0]])
    >>> loss = noise_contrastive(one, one, one, torch.tensor([[True]]), temperature=1.0, scale=torch.tensor(1.0).exp())
    >>> round(loss.item(), 6)  # 2 ln 2
    1.386294
    """
    own_B, others_BK = similarities(student_BD, positive_BD, negatives_KD)
    count_B = usable_BK.sum(1).to(own_B.dtype)
    own_B = (own_B / temperature).exp() / scale
    others_BK = (others_BK / temperature).exp() / scale
    positive_B = (own_B / (own_B + count_B + eps)).log()
    noise_BK = (count_B[:, None] / (others_BK + count_B[:, None] + eps)).clamp(min=torch.finfo(own_B.dtype).tiny).log()
    return -(positive_B + noise_BK.masked_fill(~usable_BK, 0.0).sum(1)).mean()


def similarities(student_BD: Tensor, positive_BD: Tensor, negatives_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products [B] with a row's own vector and [B, K] with the negatives, in float32."""
    student_BD, positive_BD, negatives_KD = wide(student_BD), wide(positive_BD), wide(negatives_KD)
    with torch.autocast(student_BD.device.type, enabled=False):
        own_B = (student_BD * positive_BD).sum(-1)
        if negatives_KD.ndim == 2:
            return own_B, student_BD @ negatives_KD.T
        return own_B, (negatives_KD @ student_BD[..., None])[..., 0]
