"""Masked text: which tokens a masked-LM teacher is asked for, and what it reads in their place.

A function of a row's key and a seed alone, so that it is stored nowhere and is the same in every batch and process.

Dimension key: B rows, T padded length, M slots of a row for tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..pipeline.errors import VerificationError
from ..pipeline.store.keys import Keys

MASKED, REPLACED = 0.8, 0.1
"""Of the chosen tokens: the shares that become the mask token, and any token; the rest stays (arXiv 1810.04805)."""
NOTHING = -1
"""The position in a slot that is not used."""
NO_LABEL = -100
"""The label in such a slot, as torch's cross-entropy knows it."""

_CHOICE, _FATE, _REPLACEMENT = range(3)
_STEP = np.uint64(0x9E3779B97F4A7C15)


class MaskedRows(NamedTuple):
    """Rows as the teacher and the student read them.

    Attributes:
        ids_BT: int64 token ids; after a row's end as they were given.
        positions_BM: int64, rising: the tokens asked for; `NOTHING` in the slots behind them.
        labels_BM: int64, what stood there; `NO_LABEL` in the slots behind them.
    """

    ids_BT: npt.NDArray[np.int64]
    positions_BM: npt.NDArray[np.int64]
    labels_BM: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Masking:
    """How rows are masked: part of a store's identity.

    Attributes:
        seed: another one chooses other tokens of the same rows.
        share: of a row's tokens, special ones left out; rounded, and one at least.
        slots: M, the most that a row has.
        mask_token_id: what stands for a masked token.
        vocabulary: replacements are drawn from the ids below it.
        special_ids: never chosen.
    """

    seed: int
    share: float
    slots: int
    mask_token_id: int
    vocabulary: int
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, *, share: float, seed: int, max_length: int) -> Masking:
        """For rows of at most `max_length` tokens of this tokenizer, which has a mask token."""
        return cls(
            seed=seed,
            share=share,
            slots=max(1, _rounded(share * max_length)),
            mask_token_id=int(tokenizer.mask_token_id),
            vocabulary=len(tokenizer),
            special_ids=tuple(sorted({*map(int, tokenizer.all_special_ids)})),
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in store.json, under `capture`."""
        return {**asdict(self), "special_ids": list(self.special_ids)}

    @classmethod
    def from_capture(cls, capture: Mapping[str, Any]) -> Masking | None:
        """That of a store, from the `capture` of its identity; None where texts were read as they are.

        Raises:
            VerificationError: what stands there masks nothing as kd does.
        """
        if "masking" not in capture:
            return None
        fields = capture["masking"]
        try:
            made = cls(**{**fields, "special_ids": tuple(fields["special_ids"])})
            ids = (made.mask_token_id, made.vocabulary - 1, *made.special_ids)
            if not all(type(number) is int for number in (made.seed, *ids)) or not 0 <= min(ids) <= max(ids) < 1 << 31:
                raise ValueError("its ids are not ids")
            if not 0 < made.share < 1 or made.slots != max(1, _rounded(made.share * capture["max_length"])):
                raise ValueError("its share and slots do not belong together")
        except (TypeError, KeyError, ValueError) as error:
            raise VerificationError(f"the store's identity does not say how its rows are masked: {error!r}") from None
        return made

    def alike(self, other: Masking) -> bool:
        """Whether rows of both can share a batch: all but the seed is equal."""
        return replace(self, seed=other.seed) == other

    def apply(self, ids_BT: npt.NDArray[Any], lengths_B: npt.NDArray[np.int64], keys_B: Keys) -> MaskedRows:
        """Mask rows.

        Args:
            ids_BT: token ids, padded with anything.
            lengths_B: tokens per row.
            keys_B: [B, 2] uint64, the row keys.
        """
        ids_BT = ids_BT.astype(np.int64)
        num_rows, width = ids_BT.shape
        free_BT = (np.arange(width) < lengths_B[:, None]) & ~np.isin(ids_BT, self.special_ids)
        num_free_B = free_BT.sum(1)
        wanted_B = np.minimum(np.floor(self.share * num_free_B + 0.5).astype(np.int64).clip(1), num_free_B)
        draws_BT = np.where(free_BT, self._draws(keys_B, np.arange(width), _CHOICE), np.uint64(2**64 - 1))
        first_BM = np.argsort(draws_BT, axis=1, kind="stable")[:, : self.slots]
        used_BM = np.arange(first_BM.shape[1]) < wanted_B[:, None]
        chosen_BM = np.sort(np.where(used_BM, first_BM, width), axis=1)
        positions_BM = np.full((num_rows, self.slots), NOTHING, np.int64)
        positions_BM[:, : chosen_BM.shape[1]] = np.where(chosen_BM < width, chosen_BM, NOTHING)
        labels_BM = np.full_like(positions_BM, NO_LABEL)
        rows, slots = np.nonzero(positions_BM >= 0)
        places = positions_BM[rows, slots]
        labels_BM[rows, slots] = ids_BT[rows, places]
        fates = (self._draws(keys_B, places, _FATE, rows) >> np.uint64(11)) * 2.0**-53
        replacements = (self._draws(keys_B, places, _REPLACEMENT, rows) % np.uint64(self.vocabulary)).astype(np.int64)
        ids_BT[rows, places] = np.select(
            [fates < MASKED, fates < MASKED + REPLACED], [self.mask_token_id, replacements], ids_BT[rows, places]
        )
        return MaskedRows(ids_BT, positions_BM, labels_BM)

    def _draws(
        self, keys_B: Keys, places: npt.NDArray[np.int64], stream: int, rows: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.uint64]:
        """uint64: of every row at every place [B, T], or of `rows` at as many places [P]."""
        start_B = keys_B[:, 0] ^ np.frombuffer(blake2b(b"%d" % self.seed, digest_size=8).digest(), np.uint64)[0]
        steps = (3 * places + stream + 1).astype(np.uint64)
        with np.errstate(over="ignore"):
            found = (start_B[:, None] if rows is None else start_B[rows]) + steps * _STEP
            # The finaliser of splitmix64.
            found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(found ^ (found >> np.uint64(31)))


def merged(parts: Sequence[tuple[MaskedRows, npt.NDArray[np.int64]]], width: int) -> MaskedRows:
    """Rows that were masked apart as one batch, each at its place; ids are padded with 0 to `width`."""
    if len(parts) == 1:
        return parts[0][0]
    count, slots = sum(len(places) for _, places in parts), parts[0][0].positions_BM.shape[1]
    whole = MaskedRows(*(np.zeros((count, size), np.int64) for size in (width, slots, slots)))
    for rows, places in parts:
        whole.ids_BT[places, : rows.ids_BT.shape[1]] = rows.ids_BT
        whole.positions_BM[places], whole.labels_BM[places] = rows.positions_BM, rows.labels_BM
    return whole


def _rounded(value: float) -> int:
    return int(np.floor(value + 0.5))
