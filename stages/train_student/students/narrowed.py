"""A BERT's weights at a smaller width: what they do to some directions of its hidden states. Functions of arrays.

Dimension key: D the teacher's width, d the student's, H heads, e = D / H and f = d / H the widths of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .starts import leading_directions

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Directions:
    """The directions of the teacher's hidden states that a student's features stand for.

    Attributes:
        basis_Dd: orthonormal columns, float64.
        share: of the squares of the table that they were found in.
    """

    basis_Dd: np.ndarray
    share: float

    @classmethod
    def of(cls, table_VD: np.ndarray, width: int) -> Directions:
        """The mean over features, and the leading directions of what is left of the table's rows without it.

        LayerNorm takes the mean over features away. The basis is turned so that the mean over the student's features is
        that over the teacher's: then its LayerNorm, but for scales, does to these directions what the teacher's does.
        """
        wide = table_VD.shape[1]
        centred_VD = table_VD.astype(np.float64) - table_VD.mean(1, keepdims=True, dtype=np.float64)
        leading_Dd = leading_directions(centred_VD, width - 1)
        # A table of lower rank leaves the last of them open: none may be the mean again.
        orthonormal_Dd, signs_dd = np.linalg.qr(np.column_stack([np.full(wide, wide**-0.5), leading_Dd]))
        mean_first_Dd = orthonormal_Dd * np.where(np.diag(signs_dd) < 0, -1.0, 1.0)
        share = float(np.square(centred_VD @ mean_first_Dd[:, 1:]).sum() / max(np.square(centred_VD).sum(), 1e-30))
        # The reflection that takes the first axis to the diagonal (1, ..., 1) / sqrt(d).
        normal_d = np.full(width, -(width**-0.5))
        normal_d[0] += 1.0
        turn_dd = np.eye(width) - 2.0 * np.outer(normal_d, normal_d) / max(float(normal_d @ normal_d), 1e-30)
        basis_Dd = mean_first_Dd @ turn_dd
        return cls(basis_Dd, share)


def narrowed(tensors: Tensors, directions: Directions, *, heads: int) -> dict[str, np.ndarray]:
    """Embeddings and blocks of a BERT, by their names without `bert.`, float32, for a student of d features.

    A feature of the student is a direction of the teacher's hidden states: maps that read them are taken along the
    basis, maps and biases that add to them are projected onto it, and inside of a feed-forward block nothing changes.
    In every head the product of query and key map (with their biases) and that of value and output map are replaced by
    the nearest ones of rank f: their truncated singular value decompositions. Where the teacher's states have no other
    directions and its LayerNorms scale all features alike, and f is not below the rank of the products, the student
    computes what the teacher does.

    Args:
        tensors: of `embeddings.*` and `encoder.layer.N.*`.
        heads: H, of both.
    """
    basis_Dd = directions.basis_Dd
    wide, width = basis_Dd.shape
    # A LayerNorm scales to mean square 1: over d features, of the share of the squares that these directions have.
    gain = (directions.share * wide / width) ** 0.5
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith("LayerNorm.weight"):
            found[name] = gain * np.einsum("Dd,D,Dd->d", basis_Dd, value, basis_Dd)
        elif re.search(r"embeddings\.weight$|intermediate\.dense\.weight$", name):
            found[name] = value @ basis_Dd
        elif re.search(r"(LayerNorm|output\.dense)\.bias$|layer\.\d+\.output\.dense\.weight$", name):
            found[name] = basis_Dd.T @ value
        elif name.endswith("intermediate.dense.bias"):
            found[name] = value
    for block in dict.fromkeys(name.partition(".attention.")[0] for name in tensors if ".attention." in name):
        found |= _attention(tensors, f"{block}.attention.", basis_Dd, heads)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _attention(tensors: Tensors, prefix: str, basis_Dd: np.ndarray, heads: int) -> dict[str, np.ndarray]:
    """Query, key, value and output map of a block."""

    def reading(name: str) -> list[np.ndarray]:
        """[d + 1, e] per head: what states, and a one beside them for the bias, are multiplied with."""
        weight, bias = (np.asarray(tensors[f"{prefix}self.{name}.{part}"], np.float64) for part in ("weight", "bias"))
        return np.split(np.vstack([(weight @ basis_Dd).T, bias]), heads, axis=1)

    width = basis_Dd.shape[1]
    size, wide = width // heads, basis_Dd.shape[0] // heads
    written = np.split(basis_Dd.T @ np.asarray(tensors[f"{prefix}output.dense.weight"], np.float64), heads, axis=1)
    # Each model divides its scores by the root of its own width of a head.
    scale = (size / wide) ** 0.25
    pairs = [nearest_factors(query, key, size) for query, key in zip(reading("query"), reading("key"), strict=True)]
    queries, keys = ([scale * pair[side] for pair in pairs] for side in (0, 1))
    through = [nearest_factors(value, out, size) for value, out in zip(reading("value"), written, strict=True)]
    found = {f"{prefix}output.dense.weight": np.hstack([out for _, out in through])}
    parts: dict[str, Sequence[np.ndarray]] = {"query": queries, "key": keys, "value": [value for value, _ in through]}
    for name, per_head in parts.items():
        joined = np.hstack(per_head)
        found |= {f"{prefix}self.{name}.weight": joined[:-1].T, f"{prefix}self.{name}.bias": joined[-1]}
    return found


def nearest_factors(first_NE: np.ndarray, second_ME: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, rank] and [M, rank] whose product is the nearest of that rank to `first_NE @ second_ME.T`.

    The truncated singular value decomposition (Eckart and Young), the values shared by both factors; as they are given
    where their rank is no lower.
    """
    if first_NE.shape[1] <= rank:
        return first_NE, second_ME
    # Through the small side: the products of a block are as wide as the model, and of the rank of a head.
    (left_NE, left_EE), (right_ME, right_EE) = np.linalg.qr(first_NE), np.linalg.qr(second_ME)
    turned, values, others = np.linalg.svd(left_EE @ right_EE.T)
    first = left_NE @ (turned[:, :rank] * np.sqrt(values[:rank]))
    second = right_ME @ (others[:rank].T * np.sqrt(values[:rank]))
    # Signs are fixed, so that equal weights give equal students.
    signs = np.sign(np.take_along_axis(first, np.abs(first).argmax(0)[None], axis=0)[0])
    return first * signs, second * signs
