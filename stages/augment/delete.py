"""Operator `delete`: a word is left out (Wei and Zou, 2019: "random deletion")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .draws import FloatArray, IntArray

DELETED = -1
"""The number of a word that is not there any more."""


@dataclass(frozen=True)
class Delete:
    """Leaves a word out; a text of which nothing is left makes no variant."""

    def replace(self, words: IntArray, places: IntArray, draws: FloatArray) -> IntArray:
        """`DELETED`."""
        return np.full(len(words), DELETED)
