"""Which places of their originals variants were changed at, and by which operator: column `aug_edits` of a corpus."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...pipeline.ragged import offsets_of, ranges
from .draws import IntArray

WHOLE = -1
"""In the place of a side or a word, for what an operator does to both texts, or to a text as a whole."""


class Edits:
    """The edits of V variants, noted operator by operator."""

    def __init__(self) -> None:
        self._parts: list[tuple[IntArray, ...]] = []

    def note(self, variants: IntArray, side: int, places: IntArray | int, operator: int) -> None:
        """An operator changed these variants at these places.

        Args:
            variants: int64 [K] numbers of variants, one for every place.
            side: 0 or 1, the text of the original; `WHOLE` where it is both.
            places: int64 [K] which word of it; `WHOLE` for the text.
            operator: its number in `operators.OPERATORS`.
        """
        shape = np.zeros(len(variants), dtype=np.int64)
        self._parts.append((variants, shape + side, shape + places, shape + operator))

    def column(self, kept: IntArray, num_variants: int) -> pa.Array:
        """list<struct<side, pos, op>> of some variants, in the order of side, place and operator.

        Args:
            kept: int64 [K] numbers of variants.
            num_variants: of all.
        """
        none = (np.zeros(0, dtype=np.int64),) * 4
        variants, sides, places, operators = (np.concatenate(parts) for parts in zip(none, *self._parts, strict=True))
        order = np.lexsort((operators, places, sides, variants))
        lengths = np.bincount(variants, minlength=num_variants)
        chosen = order[ranges(offsets_of(lengths)[kept], lengths[kept])]
        columns: list[npt.NDArray[np.signedinteger]] = [
            sides[chosen].astype(np.int8),
            places[chosen].astype(np.int32),
            operators[chosen].astype(np.int8),
        ]
        edits = pa.StructArray.from_arrays([*map(pa.array, columns)], names=["side", "pos", "op"])
        return pa.ListArray.from_arrays(pa.array(offsets_of(lengths[kept]), pa.int32()), edits)
