"""Operator `mask`: a word becomes the teacher's mask token (Tang et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MASK_TOKENS = ("[MASK]", "<mask>")
"""Mask tokens that the word tokeniser keeps whole: those of BERT-like and of RoBERTa-like tokenizers."""


@dataclass(frozen=True)
class Mask:
    """Replaces a word by the mask token with this probability; draws nothing of its own."""

    probability: float
    token: str = "[MASK]"
    name: str = "mask"

    def replace(self, word: str, tag: int, draw: Callable[[], float]) -> str:
        """The mask token."""
        return self.token
