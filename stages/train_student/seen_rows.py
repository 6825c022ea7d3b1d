"""An embedding table in training that holds only the rows training can reach.

Dimension key: V rows of the vocabulary, S rows that are seen, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class SeenRows(nn.Module):
    """Stands in for an `nn.Embedding` while only some of its rows can get a gradient.

    A token that no training row holds gets no gradient, so Adam never moves its row but by weight decay. Keeping those
    rows out of the parameters gives the same training, with rows that are not seen left as they are, at the cost of the
    seen ones: gradient, norm, optimiser and checkpoint of a BERT vocabulary over a few thousand sentences shrink about
    tenfold. The other rows are a buffer outside the checkpoint, there in evaluation and in the export (`full`).

    Args:
        table: the embedding [V, D].
        seen_S: int64, rising: ids that occur in training.
    """

    slot_V: Tensor
    start_VD: Tensor

    def __init__(self, table: nn.Embedding, seen_S: np.ndarray) -> None:
        super().__init__()
        weight_VD = table.weight.detach()
        index_S = torch.from_numpy(seen_S)
        slot_V = torch.full((table.num_embeddings,), -1, dtype=torch.int64)
        slot_V[index_S] = torch.arange(len(index_S))
        pad = table.padding_idx
        self.padding_slot = None if pad is None or slot_V[pad] < 0 else int(slot_V[pad])
        self.padding_idx = pad
        self.weight = nn.Parameter(weight_VD[index_S].clone())
        self.register_buffer("slot_V", slot_V, persistent=False)
        self.register_buffer("start_VD", weight_VD.clone(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., D] rows of the ids; in training all of them must be seen or padding."""
        slots = self.slot_V[ids]
        known = slots >= 0
        states = functional.embedding(slots.clamp(min=0), self.weight, self.padding_slot)
        return torch.where(known[..., None], states, functional.embedding(ids, self.start_VD))

    def full(self) -> nn.Embedding:
        """The whole table, with the seen rows as they are now."""
        rows, width = self.start_VD.shape
        table = nn.Embedding(rows, width, padding_idx=self.padding_idx, device=self.weight.device)
        with torch.no_grad():
            table.weight.copy_(self.start_VD)
            table.weight[self.slot_V >= 0] = self.weight
        return table
