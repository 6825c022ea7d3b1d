"""Losses between attention maps and other relations of tokens: pure functions of tensors.

Dimension key: B examples, H heads, T token positions (of a query, then of a key), D features. Scores are raw: scaled by
1 / sqrt(width of a head), unmasked, before any softmax; distributions are made here, over an example's true tokens
alone. Teacher tensors are constants: no gradient reaches them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduce import Pooling, over_pairs, over_tokens, pairs_of, wide

HIDDEN = -1e30
"""Score of a pair that does not count: finite, so that a row of padding is a distribution too and no gradient NaN."""


def score_mse(student_BHTT: Tensor, teacher_BHTT: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """Mean squared error between raw scores, over heads and pairs of true tokens, then examples by `pooling`.

    Adding a constant to a row of scores changes it, unlike what is computed after a softmax.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> score_mse(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), mask).item()
    1.0
    """
    pairs_B1TT = pairs_of(mask_BT)[:, None]
    student_BHTT = wide(student_BHTT).masked_fill(~pairs_B1TT, 0.0)
    teacher_BHTT = wide(teacher_BHTT.detach()).masked_fill(~pairs_B1TT, 0.0)
    return over_pairs((student_BHTT - teacher_BHTT).square(), mask_BT, pooling)


def probability_mse(student_BHTT: Tensor, teacher_BHTT: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """The same between attention probabilities, made from raw scores.

    >>> mask = torch.tensor([[True, True]])
    >>> probability_mse(torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2), mask).item()
    0.0
    """
    student_BHTT, teacher_BHTT = _log_probs(student_BHTT, mask_BT), _log_probs(teacher_BHTT.detach(), mask_BT)
    return over_pairs((student_BHTT.exp() - teacher_BHTT.exp()).square(), mask_BT, pooling)


def attention_kl(
    student_BHTT: Tensor,
    teacher_BHTT: Tensor,
    mask_BT: Tensor,
    *,
    pooling: Pooling = "kd",
    cross_entropy: bool = False,
) -> Tensor:
    """Mean of KL(teacher || student) between rows of attention, over heads and true rows, then examples by `pooling`.

    In nats. A row is a distribution over the example's true tokens. Adding a constant to a row of scores changes
    nothing.

    Args:
        cross_entropy: without the teacher's entropy taken off; the gradient is the same.

    >>> scores, mask = torch.tensor([[[[0.0, 0.0], [3.0, 3.0]]]]), torch.tensor([[True, True]])
    >>> attention_kl(scores, torch.zeros(1, 1, 2, 2), mask).item()
    0.0
    >>> round(attention_kl(scores, torch.zeros(1, 1, 2, 2), mask, cross_entropy=True).item(), 6)  # ln 2
    0.693147
    """
    student_BHTT, teacher_BHTT = _log_probs(student_BHTT, mask_BT), _log_probs(teacher_BHTT.detach(), mask_BT)
    gap_BHTT = -student_BHTT if cross_entropy else teacher_BHTT - student_BHTT
    rows_BHT = (teacher_BHTT.exp() * gap_BHTT).sum(-1)
    return over_tokens(rows_BHT.mean(1), mask_BT, pooling)


def relation_scores(first_BTD: Tensor, second_BTD: Tensor, mask_BT: Tensor, *, heads: int) -> Tensor:
    """[B, H, T, T]: scaled dot products of two sets of token vectors, their features cut into H relation heads.

    Features lie head by head, so any number of heads that divides D can be cut from the same vectors (Wang et al.,
    arXiv 2012.15828). Each product is divided by sqrt(D / H).

    >>> vectors, mask = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), torch.tensor([[True, True]])
    >>> relation_scores(vectors, vectors, mask, heads=2).tolist()
    [[[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 16.0]]]]
    """
    first, second = (
        wide(vectors).masked_fill(~mask_BT[..., None], 0.0).reshape(*vectors.shape[:2], heads, -1).transpose(1, 2)
        for vectors in (first_BTD, second_BTD)
    )
    with torch.autocast(first.device.type, enabled=False):
        scores_BHTT: Tensor = first @ second.transpose(2, 3) / first.shape[-1] ** 0.5
        return scores_BHTT


def _log_probs(scores_BHTT: Tensor, mask_BT: Tensor) -> Tensor:
    hidden_B1TT = ~pairs_of(mask_BT)[:, None]
    return wide(scores_BHTT).masked_fill(hidden_B1TT, HIDDEN).log_softmax(-1)
