"""Operator `mask`: a word becomes the teacher's mask token (Tang et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .draws import FloatArray, IntArray

MASK_TOKENS = ("[MASK]", "<mask>")
"""Mask tokens that the word tokeniser keeps whole: those of BERT-like and of RoBERTa-like tokenizers."""


@dataclass(frozen=True)
class Mask:
    """Replaces a word by the mask token, given by its number."""

    token: int

    def replace(self, words: IntArray, places: IntArray, draws: FloatArray) -> IntArray:
        """The mask token."""
        return np.full(len(words), self.token)
