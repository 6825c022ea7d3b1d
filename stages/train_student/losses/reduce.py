"""How a loss is averaged: over tokens, rows or pairs of true tokens, then over examples.

Dimension key: B examples, H heads, T token positions (of a query, then of a key).

Every per-example value depends on nothing else in the batch under `kd`, so the loss does not change with padding, with
the order of rows, or with how rows are grouped into batches. The two others are for numbers that must compare with
those of published code: `token` is one mean over all true positions of the batch (long examples weigh more), `padded`
divides by all positions, padded ones included, which count zero (longer padding makes the loss smaller).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["kd", "token", "padded"]


def over_tokens(values_BT: Tensor, mask_BT: Tensor, pooling: Pooling = "kd") -> Tensor:
    """Scalar mean of one number per token; positions where `mask_BT` is False are ignored, whatever they hold.

    An example without any true token counts 0.

    >>> import torch
    >>> values, mask = torch.tensor([[1.0, 4.0], [7.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> [over_tokens(values, mask, pooling).item() for pooling in ("kd", "token", "padded")]
    [4.75, 4.0, 3.0]
    """
    values_BT = values_BT.masked_fill(~mask_BT, 0.0)
    if pooling == "padded":
        return values_BT.mean()
    if pooling == "token":
        return values_BT.sum() / mask_BT.sum().clamp(min=1)
    return (values_BT.sum(1) / mask_BT.sum(1).clamp(min=1)).mean()


def over_masked(values_P: Tensor, masked_BM: Tensor, pooling: Pooling = "kd") -> Tensor:
    """The same of one number per masked token, row by row, where `masked_BM` is True.

    >>> import torch
    >>> masked = torch.tensor([[True, True], [True, False]])
    >>> [over_masked(torch.tensor([1.0, 4.0, 7.0]), masked, pooling).item() for pooling in ("kd", "token")]
    [4.75, 4.0]
    """
    return over_tokens(values_P.new_zeros(masked_BM.shape).masked_scatter(masked_BM, values_P), masked_BM, pooling)


def over_pairs(values_BHTT: Tensor, mask_BT: Tensor, pooling: Pooling = "kd") -> Tensor:
    """The same of one number per head and pair of tokens: a pair counts where both of its tokens do.

    >>> import torch
    >>> values, mask = torch.ones(2, 1, 2, 2), torch.tensor([[True, True], [True, False]])
    >>> [over_pairs(values, mask, pooling).item() for pooling in ("kd", "token", "padded")]
    [1.0, 1.0, 0.625]
    """
    pairs_BTT = pairs_of(mask_BT)
    return over_tokens(values_BHTT.mean(1).flatten(1), pairs_BTT.flatten(1), pooling)


def pairs_of(mask_BT: Tensor) -> Tensor:
    """bool [B, T, T]: whether both tokens of a pair are true ones."""
    return mask_BT[:, :, None] & mask_BT[:, None, :]


def wide(values: Tensor) -> Tensor:
    """`values` in float32, or float64 as they are: low precision loses the small differences a loss is made of."""
    return values if values.dtype == torch.float64 else values.float()
