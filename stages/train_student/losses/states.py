"""Losses between hidden states: pure functions of tensors.

Dimension key: B examples, T token positions, D features. Teacher tensors are constants: no gradient reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .reduce import Pooling, over_tokens, wide


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
    student_BD, teacher_BD = wide(student_BD), wide(teacher_BD.detach())
    if normalize:
        student_BD, teacher_BD = direction(student_BD), direction(teacher_BD)
    squares_BD = (student_BD - teacher_BD).square()
    return squares_BD.sum(-1).mean() if reduction == "sum" else squares_BD.mean()


def unit_distance(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Mean over B of the squared distance between two vectors scaled to length 1; gradient reaches both.

    >>> unit_distance(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 0.0]])).item()
    2.0
    """
    return squared_distances(first_BD, second_BD, normalize=True).mean()


def squared_distances(first: Tensor, second: Tensor, *, normalize: bool) -> Tensor:
    """[...]: squared distance along the last dimension between directions, or without `normalize` its mean over D.

    Gradient reaches both sides.
    """
    if normalize:
        return (direction(wide(first)) - direction(wide(second))).square().sum(-1)
    return (wide(first) - wide(second)).square().mean(-1)


def vector_cosine(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean over B of 1 - cos between sentence vectors.

    >>> vector_cosine(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [5.0, 0.0]])).item()
    0.5
    """
    return (1 - (direction(wide(student_BD)) * direction(wide(teacher_BD.detach()))).sum(-1)).mean()


def token_mse(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """Mean squared error between token states: over D, then over true tokens and examples by `pooling`.

    Args:
        student_BTD: already projected to the teacher's width.
        teacher_BTD: padded with anything.
        mask_BT: bool, True at true tokens; an example without any counts 0.

    >>> states, mask = torch.tensor([[[1.0], [2.0]], [[4.0], [9.0]]]), torch.tensor([[True, True], [True, False]])
    >>> [token_mse(states, torch.zeros(2, 2, 1), mask, pooling=p).item() for p in ("kd", "token")]
    [9.25, 7.0]
    """
    student_BTD, teacher_BTD = _true_tokens(student_BTD, teacher_BTD, mask_BT)
    return over_tokens((student_BTD - teacher_BTD).square().mean(-1), mask_BT, pooling)


def half_squared_distance(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over B of half the squared distance summed over true tokens and D (Romero et al., arXiv 1412.6550, eq. 3).

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> half_squared_distance(torch.ones(2, 2, 4), torch.zeros(2, 2, 4), mask).item()
    3.0
    """
    student_BTD, teacher_BTD = _true_tokens(student_BTD, teacher_BTD, mask_BT)
    return 0.5 * (student_BTD - teacher_BTD).square().sum((1, 2)).mean()


def token_cosine(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """Mean of 1 - cos between token states, over true tokens and examples by `pooling`.

    >>> token_cosine(torch.ones(1, 1, 2), torch.tensor([[[1.0, -1.0]]]), torch.tensor([[True]])).item()
    1.0
    """
    student_BTD, teacher_BTD = _true_tokens(student_BTD, teacher_BTD, mask_BT)
    return over_tokens(1 - (direction(student_BTD) * direction(teacher_BTD)).sum(-1), mask_BT, pooling)


def normalized_mse(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """`token_mse` after each token is shifted to mean 0 and scaled to variance 1 (Sun et al., arXiv 2004.02984).

    It does not change when all features of a token, of either side, are scaled or shifted together.

    >>> states = torch.tensor([[[1.0, 2.0, 4.0]]])
    >>> round(normalized_mse(3 * states + 5, states, torch.tensor([[True]])).item(), 6)
    0.0
    """
    student_BTD, teacher_BTD = _true_tokens(student_BTD, teacher_BTD, mask_BT)
    shape = student_BTD.shape[-1:]
    difference_BTD = functional.layer_norm(student_BTD, shape, eps=1e-12) - functional.layer_norm(
        teacher_BTD, shape, eps=1e-12
    )
    return over_tokens(difference_BTD.square().mean(-1), mask_BT, pooling)


def mean_mse(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """Squared difference between the means of a token's features, averaged by `pooling`.

    >>> mean_mse(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 0.0]]]), torch.tensor([[True]])).item()
    4.0
    """
    student_BTD, teacher_BTD = _true_tokens(student_BTD, teacher_BTD, mask_BT)
    return over_tokens((student_BTD.mean(-1) - teacher_BTD.mean(-1)).square(), mask_BT, pooling)


def variance_l1(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor, *, pooling: Pooling = "kd") -> Tensor:
    """Absolute difference between the variances (over D, biased) of a token's features, averaged by `pooling`.

    >>> variance_l1(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[5.0, 5.0]]]), torch.tensor([[True]])).item()
    1.0
    """
    student_BTD, teacher_BTD = _true_tokens(student_BTD, teacher_BTD, mask_BT)
    return over_tokens((student_BTD.var(-1, correction=0) - teacher_BTD.var(-1, correction=0)).abs(), mask_BT, pooling)


def flow_matrix(lower_BTD: Tensor, upper_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, D, E]: mean over an example's true tokens of the outer product of its states at two layers, in float32.

    Yim et al., A Gift from Knowledge Distillation, CVPR 2017, eq. 1, with tokens for pixels. Permuting tokens of both
    layers together changes nothing; swapping the layers transposes it.

    >>> states, mask = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[True, True]])
    >>> flow_matrix(states, states, mask).tolist()
    [[[5.0, 1.0], [1.0, 2.0]]]
    """
    lower_BTD = wide(lower_BTD).masked_fill(~mask_BT[..., None], 0.0)
    upper_BTE = wide(upper_BTE).masked_fill(~mask_BT[..., None], 0.0)
    return lower_BTD.transpose(1, 2) @ upper_BTE / mask_BT.sum(1).clamp(min=1)[:, None, None]


def flow_distance(student_BDE: Tensor, teacher_BDE: Tensor, *, reduction: Literal["sum", "mean"] = "mean") -> Tensor:
    """Mean over B of the squared distance between flow matrices: averaged over entries, or their sum (Frobenius).

    >>> [flow_distance(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), reduction=r).item() for r in ("mean", "sum")]
    [1.0, 4.0]
    """
    squares_BDE = (wide(student_BDE) - wide(teacher_BDE.detach())).square()
    return squares_BDE.mean() if reduction == "mean" else squares_BDE.sum((1, 2)).mean()


def attended_mse(
    student_BD: Tensor, teachers_BLD: Tensor, *, scaled: bool = False, through_weights: bool = True
) -> Tensor:
    """Mean squared error between a student vector and the teacher layers it attends to, over D and B.

    The layers are weighed by a_l = softmax_l(student . teacher_l) (Passban et al., arXiv 2012.14022).

    Args:
        teachers_BLD: one vector per candidate layer.
        scaled: divide the products by sqrt(D), which keeps the weights from being all but one zero.
        through_weights: whether the weights carry gradient; without, the student can only come nearer, not choose.

    >>> attended_mse(torch.ones(1, 2), torch.full((1, 3, 2), 3.0)).item()
    4.0
    """
    student_BD, teachers_BLD = wide(student_BD), wide(teachers_BLD.detach())
    weights_BL = layer_weights(student_BD, teachers_BLD, scaled=scaled)
    if not through_weights:
        weights_BL = weights_BL.detach()
    return (student_BD - (weights_BL[:, None] @ teachers_BLD)[:, 0]).square().mean()


def layer_weights(student_BD: Tensor, teachers_BLD: Tensor, *, scaled: bool) -> Tensor:
    """[B, L]: softmax over L of the products of a student vector with the teacher's, by sqrt(D) if `scaled`.

    >>> layer_weights(torch.ones(1, 2), torch.zeros(1, 4, 2), scaled=False).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    products_BL = (teachers_BLD @ student_BD[..., None])[..., 0]
    return (products_BL / student_BD.shape[-1] ** 0.5 if scaled else products_BL).softmax(-1)


def joined(layers: Sequence[Tensor], *, normalize: bool) -> Tensor:
    """[..., K D]: states of K layers side by side in float32, each first scaled to length 1 if `normalize`."""
    return torch.cat([direction(wide(layer)) if normalize else wide(layer) for layer in layers], dim=-1)


def direction(vectors: Tensor) -> Tensor:
    """`vectors` scaled to length 1 along the last dimension; a zero vector stays one."""
    return functional.normalize(vectors, dim=-1, eps=1e-12)


def _true_tokens(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    # What padding holds may be anything, and 0 times the gradient of NaN would still be NaN.
    padding_BT1 = ~mask_BT[..., None]
    return wide(student_BTD).masked_fill(padding_BT1, 0.0), wide(teacher_BTD.detach()).masked_fill(padding_BT1, 0.0)
