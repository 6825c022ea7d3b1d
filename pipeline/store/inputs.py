"""The inputs of a corpus and where they go in a store, with a few thousand rows in memory however many there are.

Inputs are kept in temporary files. To find those that a store holds, and those that are equal, the keys of both are
dealt into parts by their value, since equal keys meet in one part; what is found is dealt back into the order of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError
from ..ragged import IntArray, Ragged, offsets_of
from .keys import Keys, first_occurrences, match_keys, row_keys
from .layout import StoreLayout
from .plan import PlannedShard, plan_shards
from .scratch import BLOCK_ROWS, Appended, Partitions, blocks, column, passed, release

STEP_ROWS = 4096
"""Rows whose ids are in memory at once; long ones may have hundreds of tokens."""
PART_KEYS = 1 << 16
"""Keys that are joined at once, about."""
_KEYED = np.dtype([("key", np.uint64, 2), ("number", np.int64)])
_FOUND = np.dtype([("position", np.int64), ("place", np.int64)])


class InputRows:
    """What a teacher is to read for N rows, in order. Rows are added; nothing is taken away.

    Args:
        layout: of the store they are for.
    """

    def __init__(self, layout: StoreLayout) -> None:
        self.layout = layout
        self.num_rows = 0
        self._ids, self._segments = (Appended(spec.dtype) for spec in layout.input_specs)
        self._lengths, self._keys = Appended(np.uint32), Appended(np.uint64)
        self._first_tokens = [0]
        """Of every STEP_ROWS-th row."""

    @classmethod
    def of(cls, layout: StoreLayout, token_ids: Ragged, segment_ids: Ragged | None = None) -> InputRows:
        """Those with these rows."""
        inputs = cls(layout)
        inputs.add(token_ids, segment_ids)
        return inputs

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return len(self._ids)

    def add(self, token_ids: Ragged, segment_ids: Ragged | None = None) -> None:
        """Add rows.

        Args:
            token_ids: what the teacher reads, special tokens included.
            segment_ids: of the same lengths; None is all zero.

        Raises:
            RefusedError: an id that does not fit the store, or other lengths.
        """
        if segment_ids is not None and not np.array_equal(segment_ids.offsets, token_ids.offsets):
            raise RefusedError("segment ids and token ids have different lengths")
        at = 0
        while at < len(token_ids):
            # Up to the next row whose first token is to be remembered.
            stop = min(at + STEP_ROWS - self.num_rows % STEP_ROWS, len(token_ids))
            self._add(token_ids.slice(at, stop), None if segment_ids is None else segment_ids.slice(at, stop))
            at = stop

    def _add(self, ids: Ragged, segments: Ragged | None) -> None:
        for ragged, spec in zip((ids, segments), self.layout.input_specs, strict=True):
            if ragged is not None:
                # The highest value of the dtype fills the slots that hold no token.
                self._refuse_above(ragged, int(np.iinfo(spec.dtype).max) - 1, str(spec.signal), spec.dtype)
        self._keys.append(row_keys(ids, segments).reshape(-1))
        self._ids.append(ids.values)
        self._segments.append(np.zeros(len(ids.values), np.uint8) if segments is None else segments.values)
        self._lengths.append(ids.lengths)
        self.num_rows += len(ids)
        if self.num_rows % STEP_ROWS == 0:
            self._first_tokens.append(len(self._ids))

    def _refuse_above(self, ragged: Ragged, limit: int, signal: str, dtype: str) -> None:
        values = ragged.values
        if values.size and (int(values.min()) < 0 or int(values.max()) > limit):
            bad = int(np.argmax((values < 0) | (values > limit)))
            row = self.num_rows + int(np.searchsorted(ragged.offsets, bad, side="right")) - 1
            raise RefusedError(
                f"{signal} of row {row}: {int(values[bad])} is not 0 to {limit}",
                fix=f"the store keeps {signal} as {dtype}; is this the teacher's tokenizer?",
            )

    def keys(self, rows: slice) -> Keys:
        """[n, 2] row keys of some rows."""
        return self._keys.read(2 * rows.start, 2 * rows.stop).reshape(-1, 2)

    def lengths(self, rows: slice) -> IntArray:
        """int64 [n] tokens of some rows."""
        return self._lengths.read(rows.start, rows.stop).astype(np.int64)

    def steps(self) -> Iterator[tuple[slice, Ragged, Ragged]]:
        """All rows in order, STEP_ROWS at a time: which, their token ids and their segment ids, as stored."""
        for number, rows in enumerate(blocks(self.num_rows, STEP_ROWS)):
            lengths = self.lengths(rows)
            start = self._first_tokens[number]
            stop = start + int(lengths.sum())
            ids, segments = (file.read(start, stop) for file in (self._ids, self._segments))
            yield rows, Ragged.from_lengths(ids, lengths), Ragged.from_lengths(segments, lengths)

    def first_step(self) -> tuple[Ragged, Ragged]:
        """Token ids and segment ids of the first rows: at most STEP_ROWS, at least one."""
        _, ids, segments = next(self.steps())
        return ids, segments


@dataclass(frozen=True)
class Matches:
    """Which of N inputs a store holds, and which are equal.

    Attributes:
        places: int64 [N] row number in the store; of those that it does not hold, -1 less the position of the first
            input that equals this one (which may be this one).
        num_known: distinct inputs that the store holds.
    """

    places: IntArray
    num_known: int

    def is_new(self, rows: slice) -> npt.NDArray[np.bool_]:
        """[n] which of some inputs are new to the store and the first of their kind."""
        new = self.places[rows] == -1 - np.arange(rows.start, rows.stop)
        # Rows are asked for in order, each once in a pass.
        release(self.places)
        return new

    @cached_property
    def _new(self) -> tuple[npt.NDArray[np.uint64], IntArray]:
        """Which inputs are new, a bit each in words of 64; and how many are before each word, and in all."""
        words = np.zeros(-(-len(self.places) // 64), dtype="<u8")
        for rows in blocks(len(self.places), BLOCK_ROWS):
            bits = np.packbits(self.is_new(rows), bitorder="little")
            words.view(np.uint8)[rows.start // 8 :][: len(bits)] = bits
        return words, offsets_of(np.bitwise_count(words))

    @property
    def num_new(self) -> int:
        """Distinct inputs that the store does not hold."""
        return int(self._new[1][-1])

    def ordinals(self, positions: IntArray) -> IntArray:
        """int64 [n] how many new inputs stand before each of these positions."""
        words, before = self._new
        word, bit = positions >> 6, (positions & 63).astype(np.uint64)
        below = words[word] & ((np.uint64(1) << bit) - np.uint64(1))
        return before[word] + np.bitwise_count(below)


def match_inputs(inputs: InputRows, stored: Iterable[tuple[Keys, IntArray]], num_stored: int) -> Matches:
    """Find the inputs that are stored, and those that are equal.

    Args:
        stored: keys and row numbers of the store, in any blocks.
        num_stored: how many there are.
    """
    count = max(1, (inputs.num_rows + num_stored) // PART_KEYS)
    mine, theirs = (Partitions(_KEYED, count) for _ in range(2))
    for rows in blocks(inputs.num_rows, BLOCK_ROWS):
        _deal(mine, inputs.keys(rows), np.arange(rows.start, rows.stop))
    if inputs.num_rows:
        for keys, numbers in _in_blocks(stored):
            _deal(theirs, keys, numbers)
    found, num_known = Partitions(_FOUND, -(-inputs.num_rows // BLOCK_ROWS)), 0
    for part in range(count):
        wanted, known = mine.read(part), theirs.read(part)
        first, distinct = first_occurrences(wanted["key"])
        at = match_keys(known["key"], wanted["key"][first])
        num_known += int((at >= 0).sum())
        place = -1 - wanted["number"][first]
        place[at >= 0] = known["number"][at[at >= 0]]
        records = np.empty(len(wanted), dtype=_FOUND)
        records["position"], records["place"] = wanted["number"], place[distinct]
        if len(records):
            found.add(records["position"] // BLOCK_ROWS, records)
    return Matches(column(_in_order(found), np.int64), num_known)


def _in_blocks(stored: Iterable[tuple[Keys, IntArray]]) -> Iterator[tuple[Keys, IntArray]]:
    """The same in fewer blocks, of BLOCK_ROWS about: every block is a read of every part."""
    waiting: list[tuple[Keys, IntArray]] = []
    for block in stored:
        waiting.append(block)
        if sum(len(keys) for keys, _ in waiting) >= BLOCK_ROWS:
            yield np.concatenate([keys for keys, _ in waiting]), np.concatenate([numbers for _, numbers in waiting])
            waiting.clear()
    if waiting:
        yield np.concatenate([keys for keys, _ in waiting]), np.concatenate([numbers for _, numbers in waiting])


def _deal(parts: Partitions, keys: Keys, numbers: IntArray) -> None:
    records = np.empty(len(keys), dtype=_KEYED)
    records["key"], records["number"] = keys, numbers
    # Keys are hashes: any bits of them deal evenly.
    parts.add((keys[:, 1] % np.uint64(parts.count)).astype(np.int64), records)


def _in_order(found: Partitions) -> Iterator[IntArray]:
    for part in range(found.count):
        records = found.read(part)
        places = np.empty(len(records), dtype=np.int64)
        places[records["position"] - part * BLOCK_ROWS] = records["place"]
        yield places


def plan_new(inputs: InputRows, matches: Matches) -> tuple[PlannedShard, ...]:
    """Pack the new inputs, in order, into shards.

    Raises:
        RefusedError: one of them has no tokens, or more than a shard.
    """
    new = (inputs.lengths(rows)[matches.is_new(rows)] for rows in blocks(inputs.num_rows, BLOCK_ROWS))
    return tuple(plan_shards(column(new, np.uint32), inputs.layout))


def new_shards(
    inputs: InputRows, matches: Matches, planned: Iterable[PlannedShard]
) -> Iterator[tuple[Keys, Ragged, Ragged]]:
    """Keys, token ids and segment ids of the new inputs, shard by shard as planned."""
    waiting: list[tuple[Keys, Ragged, Ragged]] = []
    steps = inputs.steps()
    for shard in planned:
        while sum(len(keys) for keys, _, _ in waiting) < shard.rows:
            rows, ids, segments = next(steps)
            new = np.flatnonzero(matches.is_new(rows))
            waiting.append((inputs.keys(rows)[new], ids.take(new), segments.take(new)))
        keys = np.concatenate([keys for keys, _, _ in waiting])
        ids = Ragged.concatenate([ids for _, ids, _ in waiting])
        segments = Ragged.concatenate([segments for _, _, segments in waiting])
        count = shard.rows
        yield keys[:count], ids.slice(0, count), segments.slice(0, count)
        waiting = [(keys[count:], ids.slice(count, len(keys)), segments.slice(count, len(keys)))]


def row_numbers(matches: Matches, planned: Iterable[PlannedShard], first_shard: int, rows_per_shard: int) -> IntArray:
    """int64 [N] row number of every input once the new ones stand in the planned shards, from `first_shard` on."""
    starts = np.array([shard.start for shard in planned], dtype=np.int64)

    def numbered() -> Iterator[IntArray]:
        for _, places in passed(matches.places, BLOCK_ROWS):
            numbers = places.copy()
            new = numbers < 0
            ordinals = matches.ordinals(-1 - numbers[new])
            shards = np.searchsorted(starts, ordinals, side="right") - 1
            numbers[new] = (first_shard + shards) * rows_per_shard + ordinals - starts[shards]
            yield numbers

    return column(numbered(), np.int64)


def shards_of(rows: IntArray, rows_per_shard: int) -> tuple[int, ...]:
    """The shards that hold some rows, rising; rows below 0 are none."""
    there = np.zeros(0, dtype=bool)
    for _, part in passed(rows):
        shards = part[part >= 0] // rows_per_shard
        if len(shards) and shards.max() >= len(there):
            there = np.concatenate([there, np.zeros(int(shards.max()) + 1 - len(there), dtype=bool)])
        there[shards] = True
    return tuple(np.flatnonzero(there).tolist())
