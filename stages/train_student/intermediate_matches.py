"""A list in TextBrewer's keys (`intermediate_matches`) as methods of kd.

    - {layer_T: 10, layer_S: 3, feature: hidden, loss: hidden_mse, weight: 1, proj: [linear, 312, 768]}
    - {layer_T: 3, layer_S: 0, feature: attention, loss: attention_mse, weight: 1}

Hidden layers count from the embeddings on both sides; attention counts its first block 0 there, and 1 in kd. Losses
are means over all true tokens or pairs of a batch, as TextBrewer takes them with a mask. Projections follow from the
widths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...pipeline.errors import UsageError, near_match
from ...pipeline.settings import is_positive, read_yaml
from .registry import spelled

SUFFIXES = (".yaml", ".yml", ".json")
KEYS = ("layer_T", "layer_S", "feature", "loss", "weight", "proj")


def _one(options: str, feature: str) -> Callable[[str, Mapping[str, Any]], tuple[str, str]]:
    """A loss between one layer of each model: a method with `options`, and its layer map."""
    first = 1 if feature == "attention" else 0

    def mapped(where: str, match: Mapping[str, Any]) -> tuple[str, str]:
        layers = [_number(where, name, match[name]) + first for name in ("layer_S", "layer_T")]
        return options, f"{layers[0]}-{layers[1]}"

    return mapped


def _flow(where: str, match: Mapping[str, Any]) -> tuple[str, str]:
    sides = [match[name] for name in ("layer_S", "layer_T")]
    if not all(isinstance(side, list) and len(side) == 2 for side in sides):
        raise UsageError(f"{where}: fsp takes two layers of each model", fix="layer_T: [0, 4], layer_S: [0, 1]")
    points = [
        "-".join(str(_number(where, name, layer)) for name, layer in zip(("layer_S", "layer_T"), point, strict=True))
        for point in zip(*sides, strict=True)
    ]
    return "fsp", "+".join(points)


LOSSES: Mapping[tuple[str, str], Callable[[str, Mapping[str, Any]], tuple[str, str]]] = {
    ("hidden", "hidden_mse"): _one("fitnets:reduction=token", "hidden"),
    ("hidden", "cos"): _one("distilbert:reduction=token", "hidden"),
    ("hidden", "pkd"): _one("pkd", "hidden"),
    ("hidden", "fsp"): _flow,
    ("attention", "attention_mse"): _one("tinybert:hidden=false:embedding=false:reduction=token", "attention"),
    ("attention", "attention_ce"): _one("ir-kd:cosine=false:reduction=token", "attention"),
}
"""What each feature and loss of TextBrewer is in kd."""

WITHOUT: Mapping[str, str] = {
    "attention_mse_sum": "it compares sums over heads; `attention_mse` compares head by head",
    "attention_ce_mean": "it compares means over heads; `attention_ce` compares head by head",
    "mmd": "kd has no method on products between tokens of hidden states; minilmv2 compares those of queries and keys",
    "nst": "kd has no method on products between tokens of hidden states; minilmv2 compares those of queries and keys",
    "gram": "kd has no method on products between tokens of hidden states; minilmv2 compares those of queries and keys",
}
"""Losses of TextBrewer that no method of kd is, and why."""


def is_matches_file(method: str) -> bool:
    """Whether an entry of `--method` names such a file."""
    return method.endswith(SUFFIXES)


def expand_matches(methods: Sequence[str]) -> list[str]:
    """`--method` with every file of matches replaced by the methods it means, in the form `parse_methods` reads.

    Raises:
        UsageError: no such file, not such a list, or a match that kd has no counterpart for.
    """
    expanded = []
    for method in (piece.strip() for text in methods for piece in text.split(",")):
        expanded += _read(method) if is_matches_file(method) else [method]
    return expanded


def _read(path: str) -> list[str]:
    content = read_yaml(os.path.expanduser(path))
    if isinstance(content, dict) and [*content] == ["intermediate_matches"]:
        content = content["intermediate_matches"]
    if not isinstance(content, list) or not content:
        raise UsageError(
            f"--method {path} holds no list of matches",
            fix="- {layer_T: 10, layer_S: 3, feature: hidden, loss: hidden_mse, weight: 1}",
        )
    return [_method(f"match {number} of {path}", match) for number, match in enumerate(content, 1)]


def _method(where: str, match: Any) -> str:
    if not isinstance(match, dict):
        raise UsageError(f"{where} is {match!r}; expected keys {', '.join(KEYS)}")
    for key in match:
        if key not in KEYS:
            raise UsageError(f"{where}: unknown key {key!r}{near_match(str(key), KEYS)}")
    missing = [key for key in KEYS[:4] if key not in match]
    if missing:
        raise UsageError(f"{where} lacks {' and '.join(missing)}")
    feature, loss = str(match["feature"]), str(match["loss"])
    if loss in WITHOUT:
        raise UsageError(f"{where}: loss {loss!r} has no counterpart in kd: {WITHOUT[loss]}")
    if (feature, loss) not in LOSSES:
        known = [f"{loss} of {feature}" for feature, loss in LOSSES]
        raise UsageError(f"{where}: no loss {loss!r} of feature {feature!r}", details=[f"known: {', '.join(known)}"])
    _check_projection(where, match.get("proj"))
    options, layer_map = LOSSES[feature, loss](where, match)
    weight = match.get("weight", 1)
    if not is_positive(weight):
        raise UsageError(f"{where}: weight is {weight!r}; expected a number above 0")
    name, _, rest = options.partition(":")
    return ":".join(filter(None, [name, spelled(float(weight)), rest, f"layer_map={layer_map}"]))


def _check_projection(where: str, projection: Any) -> None:
    """Ours are linear, and there where widths differ: another kind cannot be had, and sizes need not be said."""
    if projection is None:
        return
    if not isinstance(projection, list) or not projection or projection[0] != "linear":
        raise UsageError(
            f"{where}: proj is {projection!r}, and kd's projections are linear", fix="proj: [linear, 312, 768]"
        )
    if len(projection) > 3:
        raise UsageError(f"{where}: proj has options of its own {projection[3]!r}; kd trains all at one learning rate")


def _number(where: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{where}: {name} is {value!r}; expected a layer's number")
    return value
