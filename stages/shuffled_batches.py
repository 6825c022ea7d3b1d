"""Shuffled batches of rows of similar length: any of them is found by its number, and no epoch's order is kept.

Dimension key: N rows, P places in an order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

POOL_BATCHES = 50
"""About so many batches are sorted by length together: rows of a batch are alike, batches still differ by epoch."""
ROUNDS = 4
"""Double rounds of a shuffle."""


class Shuffle:
    """A permutation of 0..count-1 any part of which is computed when asked for; it keeps some sqrt(count) numbers.

    A place is a cell of a near-square table. Its column and its row are shifted in turn, each by a random amount that
    depends on the other (a Feistel network with random functions: Luby and Rackoff, 1988). The table has a few cells
    more than there are rows: who lands on one of them goes through again until it does not, which leaves a permutation
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        count: how many.
        seed: integers from 0; others give another permutation.
    """

    def __init__(self, count: int, *seed: int) -> None:
        self._count = count
        self._columns = max(2, math.isqrt(count))
        self._rows = -(-count // self._columns)
        generator = np.random.default_rng(seed)
        self._rounds = [
            (generator.integers(self._rows, size=self._columns), generator.integers(self._columns, size=self._rows))
            for _ in range(ROUNDS if count else 0)
        ]

    def at(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start] what stands at these places."""
        found_P = self._once(np.arange(start, stop))
        while len(beyond := np.flatnonzero(found_P >= self._count)):
            found_P[beyond] = self._once(found_P[beyond])
        return found_P

    def _once(self, cell_P: np.ndarray) -> np.ndarray:
        row_P, column_P = np.divmod(cell_P, self._columns)
        for row_shift, column_shift in self._rounds:
            row_P = _wrapped(row_P + row_shift[column_P], self._rows)
            column_P = _wrapped(column_P + column_shift[row_P], self._columns)
        return row_P * self._columns + column_P


def _wrapped(values: np.ndarray, size: int) -> np.ndarray:
    """Values from 0 to below 2 * size, modulo size: a tenth of the time that the remainder of a mask takes."""
    # Without a sign, what would be negative is greater than everything else.
    lower = np.minimum(values.view(np.uint64), (values - size).view(np.uint64))
    return lower.view(np.int64)


def length_grouped_batches(
    lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[np.ndarray]:
    """The batches of an epoch: rows shuffled, and those of a batch of similar length.

    Shuffled rows are cut into pools of about 50 batches, sorted by length inside each pool, cut into batches, and the
    batches of a pool are shuffled; only the last batch may be short. Depends on the arguments alone, and reads no more
    of `lengths` than the pools it gives.

    Args:
        lengths: [N] ints of any kind, any unit.
        batch_size: rows per batch.
        seed: of the run.
        epoch: counted from 0; each has its own order.
        first: batches to leave out at the beginning, at no cost.

    Yields:
        int64 [batch_size] row numbers; over all batches, each of 0..N-1 once.
    """
    rows = Shuffle(len(lengths), seed, epoch)
    # The short batch is of rows that no pool has: every other batch is then full and free to stand anywhere.
    num_full = len(lengths) // batch_size
    # Pools of equal size: a small last one would have nothing to sort.
    num_pools = -(-num_full // POOL_BATCHES)
    bounds = [pool * num_full // num_pools for pool in range(num_pools)] + [num_full]
    for pool, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop <= first:
            continue
        pooled = rows.at(start * batch_size, stop * batch_size)
        batches = pooled[np.argsort(lengths[pooled], kind="stable")].reshape(-1, batch_size)
        order = np.random.default_rng([seed, epoch, pool]).permutation(stop - start)
        yield from batches[order[max(0, first - start) :]]
    if len(lengths) % batch_size and first <= num_full:
        yield rows.at(num_full * batch_size, len(lengths))
