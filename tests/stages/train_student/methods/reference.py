"""Every method's loss once more: one example at a time, in numpy, from the published formulas and nothing of kd.

A reference takes a student's and a teacher's example (`World.examples`) and the projections' weights by name, and
returns the loss of that example. Students have 2 blocks and teachers 4, as `worlds.shapes` says, unless a case says
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Example = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]
SKIP = ((1, 2), (2, 4))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Over the last axis, of scores."""
    p, q = softmax(teacher), softmax(student)
    return (p * np.log(p / q)).sum(-1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (unit(one) * unit(other)).sum(-1)


def mapped(weights: Weights, name: str, values: np.ndarray) -> np.ndarray:
    if f"{name}.weight" not in weights:
        return values
    return values @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def scores(example: Example, layer: int) -> np.ndarray:
    query, key = example["q"][layer], example["k"][layer]
    return np.einsum("hid,hjd->hij", query, key) / np.sqrt(query.shape[-1])


def regrouped(example: Example, part: str, layer: int, heads: int) -> np.ndarray:
    """[A, n, d / A]: vectors of all attention heads side by side, cut into relation heads."""
    whole = np.concatenate([*example[part][layer]], axis=-1)
    return np.stack(np.split(whole, heads, axis=-1))


def relation(vectors: np.ndarray) -> np.ndarray:
    return np.einsum("aid,ajd->aij", vectors, vectors) / np.sqrt(vectors.shape[-1])


def soft_target(s: Example, t: Example, w: Weights, temperature: float = 2.0) -> float:
    return float(temperature**2 * kl(t["logits"] / temperature, s["logits"] / temperature))


def logit_mse(s: Example, t: Example, w: Weights) -> float:
    return float(np.mean((s["logits"] - t["logits"]) ** 2))


def fitnets(s: Example, t: Example, w: Weights) -> float:
    return float(np.mean((mapped(w, "1-2", s["states"][1]) - t["states"][2]) ** 2))


def fsp(s: Example, t: Example, w: Weights) -> float:
    total = 0.0
    for (own_low, own_high), (low, high) in (((0, 1), (0, 2)), ((1, 2), (2, 4))):
        flows = [
            a.T @ b / len(a)
            for a, b in (
                (mapped(w, f"{own_low}", s["states"][own_low]), mapped(w, f"{own_high}", s["states"][own_high])),
                (t["states"][low], t["states"][high]),
            )
        ]
        total += float(np.mean((flows[0] - flows[1]) ** 2))
    return total


def pkd(s: Example, t: Example, w: Weights) -> float:
    return float(2 - 2 * cosine(mapped(w, "linear", s["states"][1][0]), t["states"][2][0]))


def distilbert(s: Example, t: Example, w: Weights) -> float:
    return float(np.mean(1 - cosine(mapped(w, "2-4", s["states"][2]), t["states"][4])))


def tinybert(s: Example, t: Example, w: Weights) -> float:
    attention = sum(np.mean((scores(s, own) - scores(t, other)) ** 2) for own, other in SKIP)
    states = ((0, 0), *SKIP)
    return float(
        attention + sum(np.mean((mapped(w, "linear", s["states"][a]) - t["states"][b]) ** 2) for a, b in states)
    )


def ir_kd(s: Example, t: Example, w: Weights) -> float:
    return float(
        sum(
            np.mean(kl(scores(t, other), scores(s, own)))
            + 1
            - cosine(mapped(w, f"{own}-{other}", s["states"][own][0]), t["states"][other][0])
            for own, other in SKIP
        )
    )


def mobilebert(s: Example, t: Example, w: Weights) -> float:
    total = 0.0
    for own, other in SKIP:
        mine, theirs = mapped(w, "linear", s["states"][own]), t["states"][other]
        normal = [(x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (mine, theirs)]
        total += 100 * np.mean((normal[0] - normal[1]) ** 2)
        total += 5000 * np.mean((mine.mean(-1) - theirs.mean(-1)) ** 2)
        total += 5 * np.mean(np.abs(mine.var(-1) - theirs.var(-1)))
        total += np.mean(kl(scores(t, other), scores(s, own)))
    return float(total / len(SKIP))


def ckd(s: Example, t: Example, w: Weights) -> float:
    total = 0.0
    for own, others in ((1, (1, 2)), (2, (3, 4))):
        joined = np.concatenate([t["states"][other][0] for other in others])
        total += float(np.sum((unit(mapped(w, f"{own}", s["states"][own][0])) - unit(joined)) ** 2))
    return total


def ckd_tokens(s: Example, t: Example, w: Weights) -> float:
    total = 0.0
    for own, others in ((1, (1, 2, 3)), (2, (2, 3, 4))):
        joined = np.concatenate([t["states"][other] for other in others], axis=-1)
        total += float(np.mean(np.sum((unit(mapped(w, f"{own}", s["states"][own])) - unit(joined)) ** 2, axis=-1)))
    return total


def alp_kd(s: Example, t: Example, w: Weights) -> float:
    layers = np.stack([t["states"][layer][0] for layer in (1, 2, 3, 4)])
    total = 0.0
    for own in (1, 2):
        vector = mapped(w, "linear", s["states"][own][0])
        total += float(np.mean((vector - softmax(layers @ vector) @ layers) ** 2))
    return total


def minilm(s: Example, t: Example, w: Weights) -> float:
    values = kl(relation(t["v"][4]), relation(s["v"][2]))
    return float(np.mean(kl(scores(t, 4), scores(s, 2))) + np.mean(values))


def minilmv2(s: Example, t: Example, w: Weights) -> float:
    relations = ([relation(regrouped(of, part, layer, 2)) for of, layer in ((t, 4), (s, 2))] for part in "qkv")
    return float(sum(np.mean(kl(theirs, mine)) for theirs, mine in relations))


def rail_kd(s: Example, t: Example, w: Weights, drawn: int) -> float:
    own, other = s["states"][1].mean(0), t["states"][drawn].mean(0)
    return float(np.sum((unit(mapped(w, "student", own)) - unit(mapped(w, "teacher", other))) ** 2))


def codir(s: Example, t: Example, w: Weights, negatives: list[Example]) -> float:
    own = unit(mapped(w, "student", np.concatenate([s["states"][1][0], s["states"][2][0]])))
    others = [row for row in negatives if row["logits"].argmax() != t["logits"].argmax()]
    vectors = [
        unit(mapped(w, "teacher", np.concatenate([row["states"][1][0], row["states"][3][0]]))) for row in (t, *others)
    ]
    return float(-np.log(softmax(np.array([own @ vector for vector in vectors]) / 0.07)[0]))
