"""Operator `swap`: a word trades places with another one of its text (Wei and Zou, 2019: "random swap")."""

from __future__ import annotations

import numpy as np

from .draws import IntArray


def trade_places(words: IntArray, at: IntArray, partners: IntArray, texts: IntArray) -> None:
    """Swap `words[at[i]]` with `words[partners[i]]`, in place, one after the other as `at` rises.

    Args:
        words: the words of many texts, one text after another.
        at: places, rising.
        partners: places in the same texts; a place that is its own partner stays.
        texts: the text that each of `at` belongs to.
    """
    if not len(at):
        return
    # The first swap of every text, then the second of every text, ...: within a round no two touch the same text.
    rank = np.arange(len(at)) - np.searchsorted(texts, texts, side="left")
    for round_ in range(int(rank.max()) + 1):
        chosen = rank == round_
        here, there = at[chosen], partners[chosen]
        words[here], words[there] = words[there], words[here]
