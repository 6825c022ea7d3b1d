"""Tokenised rows for a `Trainer`. Dimension key: B rows of a batch, T padded length, C labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase


class TextRows(Dataset[dict[str, Any]]):
    """Tokenised rows with their labels, and how they become a batch."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts_a: list[str],
        texts_b: list[str] | None,
        labels: np.ndarray,
        task: str,
        max_length: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoded = dict(tokenizer(texts_a, texts_b, truncation=True, max_length=max_length))
        self._dtype = torch.int64 if task == "single-label" else torch.float32
        self._max_length = max_length
        self.labels = labels
        self.lengths = np.array([len(ids) for ids in self._encoded["input_ids"]])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self._encoded.items()} | {"labels": self.labels[row]}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A padded batch: input tensors [B, T] and `labels` [B] or [B, C]."""
        labels = torch.as_tensor(np.array([row["labels"] for row in rows]), dtype=self._dtype)
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        multiple = 8 if self._max_length % 8 == 0 else None
        return {**self._tokenizer.pad(inputs, return_tensors="pt", pad_to_multiple_of=multiple), "labels": labels}
