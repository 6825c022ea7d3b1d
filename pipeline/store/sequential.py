"""When enough rows were looked at: a sequential test on the share of bad ones. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CONFIDENCE = 0.95
NOISE_RATIO = 50
"""A share this many times smaller than the one that matters counts as none: a stray row, not a damaged store."""


@dataclass
class SequentialTest:
    """Wald's sequential probability ratio test of "no bad rows to speak of" against "a share of `bad_share` or more".

    Each row adds the logarithm of how much likelier it is under the second than under the first. It may be looked at
    after every row without losing its meaning: either statement is wrong in at most 5 % of the cases in which it is
    made. With `bad_share` 5 %, 59 good rows in a row are enough, and so is one bad row among the first 19, or two.

    Attributes:
        bad_share: the share of bad rows that must not be missed.
        good: rows found good.
        bad: rows found bad.
    """

    bad_share: float = 0.05
    good: int = 0
    bad: int = 0
    _evidence: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not 0.0001 <= self.bad_share <= 0.5:
            raise ValueError(f"a share of bad rows is 0.0001 to 0.5, got {self.bad_share}")

    def add(self, is_bad: bool) -> None:
        """Count one row; nothing once it is decided."""
        if self.verdict is not None:
            return
        little = self.bad_share / NOISE_RATIO
        if is_bad:
            self.bad += 1
            self._evidence += math.log(self.bad_share / little)
        else:
            self.good += 1
            self._evidence += math.log((1 - self.bad_share) / (1 - little))

    @property
    def verdict(self) -> bool | None:
        """False: at least `bad_share` is bad. True: less is. None: not known yet."""
        limit = math.log(CONFIDENCE / (1 - CONFIDENCE))
        if self._evidence >= limit:
            return False
        return True if self._evidence <= -limit else None

    @property
    def rows_needed(self) -> int:
        """Good rows in a row that decide it.

        >>> SequentialTest(0.05).rows_needed
        59
        """
        limit = math.log(CONFIDENCE / (1 - CONFIDENCE))
        little = self.bad_share / NOISE_RATIO
        return math.ceil(limit / -math.log((1 - self.bad_share) / (1 - little)))
