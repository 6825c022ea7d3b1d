"""Tokenised rows for a `Trainer`. Dimension key: N rows, B rows of a batch, T padded length, C labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..pipeline.ragged import Ragged
from .words import encode_words

NOT_SCORED = -100
"""The label of tokens that are not the first of a word; losses and metrics leave them out."""


class TextRows(Dataset[dict[str, Any]]):
    """Tokenised rows with their labels, and how they become a batch.

    Args:
        labels: [N] or [N, C]; of a token task a row of tags per text, one per word, which its first piece gets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts_a: list[str],
        texts_b: list[str] | None,
        labels: np.ndarray | Ragged,
        task: str,
        max_length: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._dtype = torch.int64 if task in ("single-label", "token") else torch.float32
        self.labels: Any = labels
        if isinstance(labels, Ragged):
            self._encoded, pieces = encode_words(tokenizer, texts_a, max_length)
            self.labels = [
                _at_pieces(len(ids), row, tags)
                for ids, row, tags in zip(self._encoded["input_ids"], pieces, labels, strict=True)
            ]
        else:
            self._encoded = dict(tokenizer(texts_a, texts_b, truncation=True, max_length=max_length))
        self.lengths = np.array([len(ids) for ids in self._encoded["input_ids"]])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self._encoded.items()} | {"labels": self.labels[row]}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A padded batch: input tensors [B, T] and `labels` [B], [B, C] or, of words, [B, T]."""
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        multiple = 8 if self._max_length % 8 == 0 else None
        of_words = isinstance(self.labels, list)
        side = "right" if of_words else None
        batch = self._tokenizer.pad(inputs, return_tensors="pt", pad_to_multiple_of=multiple, padding_side=side)
        labels: Any = [row["labels"] for row in rows]
        if of_words:
            labels = Ragged.from_rows(labels, np.int64).to_padded(NOT_SCORED, length=batch["input_ids"].shape[1])
        return {**batch, "labels": torch.as_tensor(np.array(labels), dtype=self._dtype)}


def _at_pieces(length: int, pieces: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """int64 [length]: the tag of a word at its first piece, `NOT_SCORED` elsewhere."""
    labels = np.full(length, NOT_SCORED, np.int64)
    labels[pieces[pieces >= 0]] = tags[pieces >= 0]
    return labels
