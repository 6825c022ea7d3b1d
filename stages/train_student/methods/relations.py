"""What MiniLM and MiniLMv2 share: relations between the tokens of one block's queries, keys or values.

Not a method: `minilm.py` and `minilmv2.py` are. Dimension key: B examples, T token positions, D features.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .. import losses
from ..losses.reduce import Pooling

PARTS = ("q", "k", "v")


def relation_terms(
    student_BT3D: Tensor,
    teacher_BT3D: Tensor,
    mask_BT: Tensor,
    relations: Iterable[tuple[str, str]],
    *,
    heads: int,
    pooling: Pooling,
) -> dict[str, Tensor]:
    """KL of every relation (like ("q", "k")) between softmax(X Y' / sqrt(D / heads)) of both models, by "q-k"."""
    terms = {}
    for pair in relations:
        first, second = (PARTS.index(part) for part in pair)
        scores = [
            losses.relation_scores(qkv[:, :, first], qkv[:, :, second], mask_BT, heads=heads)
            for qkv in (student_BT3D, teacher_BT3D.detach())
        ]
        terms["-".join(pair)] = losses.attention_kl(scores[0], scores[1], mask_BT, pooling=pooling)
    return terms
