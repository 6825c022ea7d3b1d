"""Training and evaluation rows as batches: token ids, gold labels and teacher signals of the same examples.

Rows of several views stand one after another; each keeps its own store. A batch is gathered by row number, so every
student row meets its own teacher row whatever the order.

Where a store's rows are masked, they are masked here too, as the teacher read them.

Dimension key: N rows, B rows of a batch, T padded length, C labels, M slots of a row for masked tokens or words, P
masked tokens or words of a batch, W words of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ...pipeline.ragged import Ragged
from ...pipeline.store.reader import StoreReader
from ...pipeline.store.scratch import passed
from ...pipeline.store.signal import SEGMENT_IDS, TOKEN_IDS, Signal
from ..derivation import NUM_TOKENS, POSITIONS, taken_at
from ..masking import MaskedRows, Masking, merged
from .methods.base import FAMILY, OF_WORDS

Batch = dict[str, Any]


class TokenSource(Protocol):
    """Where the student's token ids come from."""

    @property
    def lengths(self) -> np.ndarray:
        """ints [N] tokens per row."""
        ...

    def gather(self, index_B: np.ndarray, *, segments: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Padded ids [B, T] (0 after the end), lengths [B], and segment ids [B, T] if asked for."""
        ...


@dataclass(frozen=True)
class StoreRows:
    """Rows of one or several stores, one after another.

    Attributes:
        readers: one per store.
        rows: per reader, int64 row numbers in its store.
        maskings: per reader, how its rows are masked; empty where they are not.
    """

    readers: Sequence[StoreReader]
    rows: Sequence[np.ndarray]
    maskings: Sequence[Masking] = ()
    _starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.cumsum([0, *map(len, self.rows)]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def parts(self, index_B: np.ndarray) -> Iterator[tuple[StoreReader, np.ndarray, np.ndarray]]:
        """Per store that the batch touches: its reader, the rows in it, and their places in the batch."""
        if len(self.readers) == 1:
            yield self.readers[0], self.rows[0][index_B], np.arange(len(index_B))
            return
        source_B = np.searchsorted(self._starts, index_B, side="right") - 1
        for source in np.unique(source_B).tolist():
            places = np.flatnonzero(source_B == source)
            yield self.readers[source], self.rows[source][index_B[places] - self._starts[source]], places

    def gather(self, signal: Signal, index_B: np.ndarray) -> np.ndarray:
        """[B, ...] a signal with one entry per row."""
        return _merged([(reader.gather(signal, rows), places) for reader, rows, places in self.parts(index_B)])

    def gather_padded(self, signal: Signal, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, T, ...] a signal of tokens or [B, T, T, ...] of pairs, zeros beyond a row's, and lengths int64 [B].

        Token ids are those that the teacher read: masked, where it read them so.
        """
        if signal == TOKEN_IDS and self.maskings:
            masked, lengths = self.masked(index_B)
            return masked.ids_BT, lengths
        of_tokens = signal.kind.axis == "token"
        found = [
            (*(reader.gather_tokens if of_tokens else reader.gather_pairs)(signal, rows), places)
            for reader, rows, places in self.parts(index_B)
        ]
        lengths = _merged([(lengths, places) for _, lengths, places in found])
        width, axes = int(lengths.max(initial=0)), (1,) if of_tokens else (1, 2)
        return _merged([(_widened(values, width, axes), places) for values, _, places in found]), lengths

    def masked(self, index_B: np.ndarray) -> tuple[MaskedRows, np.ndarray]:
        """Rows as they were masked for the teacher, and lengths int64 [B]."""
        found, lengths_B = [], np.zeros(len(index_B), np.int64)
        of_reader = dict(zip(map(id, self.readers), self.maskings, strict=True))
        for reader, rows, places in self.parts(index_B):
            ids_BT, lengths_B[places] = reader.gather_tokens(TOKEN_IDS, rows)
            masking = of_reader[id(reader)]
            found.append((masking.apply(ids_BT, lengths_B[places], reader.row_keys(rows)), places))
        return merged(found, int(lengths_B.max(initial=0))), lengths_B

    def tensors(
        self, signals: Sequence[Signal], index_B: np.ndarray, *, to_derive: bool = False
    ) -> dict[str, torch.Tensor]:
        """Signals of some rows by `str(signal)`, in the stored dtype: [B, ...], [B, T, ...] or, of pairs, [B, H, T, T].

        Args:
            to_derive: others are derived from them: where there are tokens or pairs, `NUM_TOKENS` stands beside them.
        """
        found: dict[str, torch.Tensor] = {}
        for signal in signals:
            if signal.kind.axis == "example":
                found[str(signal)] = torch.from_numpy(self.gather(signal, index_B))
                continue
            values, lengths = self.gather_padded(signal, index_B)
            tensor = torch.from_numpy(values)
            found[str(signal)] = tensor if signal.kind.axis == "token" else tensor.permute(0, 3, 1, 2)
            if to_derive:
                found[NUM_TOKENS] = torch.from_numpy(lengths)
        return found


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0][0]
    merged = np.empty(
        (sum(len(places) for _, places in parts), *parts[0][0].shape[1:]), np.result_type(*(v for v, _ in parts))
    )
    for values, places in parts:
        merged[places] = values
    return merged


def _widened(values: np.ndarray, width: int, axes: tuple[int, ...]) -> np.ndarray:
    """`values` with zeros after their end, `width` long along the axes of tokens."""
    if all(values.shape[axis] == width for axis in axes):
        return values
    wide = np.zeros([width if axis in axes else size for axis, size in enumerate(values.shape)], values.dtype)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide


@dataclass(frozen=True)
class StoredTokens:
    """The token ids that the teacher read, from the store: nothing is tokenised again."""

    stored: StoreRows
    lengths: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # In the narrowest type that holds them: at ten million rows every byte is ten megabytes.
        parts = [np.empty(0, np.uint8)]
        for reader, rows in zip(self.stored.readers, self.stored.rows, strict=True):
            for _, part in passed(rows):
                found = reader.lengths(part)
                parts.append(found.astype(np.min_scalar_type(found.max())))
            reader.index.release()
        lengths = np.concatenate(parts)
        object.__setattr__(self, "lengths", lengths)

    def gather(self, index_B: np.ndarray, *, segments: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        ids, lengths = self.stored.gather_padded(TOKEN_IDS, index_B)
        return ids, lengths, self.stored.gather_padded(SEGMENT_IDS, index_B)[0] if segments else None


@dataclass(frozen=True)
class TokensInMemory:
    """Token ids of the student's own tokenizer."""

    token_ids: Ragged
    segment_ids: Ragged

    @property
    def lengths(self) -> np.ndarray:
        return self.token_ids.lengths

    def gather(self, index_B: np.ndarray, *, segments: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        ids = self.token_ids.take(index_B)
        return ids.to_padded(), ids.lengths, self.segment_ids.take(index_B).to_padded() if segments else None


@dataclass(frozen=True)
class Words:
    """The words of N rows, of a token task.

    Attributes:
        student: ints, per row and word which of the student's tokens it begins with; below 0 where it has none.
        teacher: the same of the teacher's tokens; the student's own where no teacher is asked.
        tags: int64, the gold tags; below 0 where there are none.
    """

    student: Ragged
    teacher: Ragged
    tags: Ragged

    def take(self, index: np.ndarray) -> Words:
        """Those of some rows."""
        return Words(*(part.take(index) for part in (self.student, self.teacher, self.tags)))

    @property
    def seen(self) -> np.ndarray:
        """bool [W]: which of them have a token of both."""
        return np.asarray((self.student.values >= 0) & (self.teacher.values >= 0))

    def batch(self, index_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(student's positions, teacher's positions, tags) int64 [B, M], all -1 where a word has no token of either."""
        padded = [part.take(index_B).to_padded(-1) for part in (self.student, self.teacher, self.tags)]
        # Of a word that either did not see whole nothing is learned: zeros in its place would be a target.
        seen_BM = (padded[0] >= 0) & (padded[1] >= 0)
        student, teacher, tags = (torch.from_numpy(np.where(seen_BM, part, -1).astype(np.int64)) for part in padded)
        return student, teacher, tags


@dataclass(frozen=True)
class Rows:
    """What a student learns from or is evaluated on.

    Attributes:
        tokens: its input.
        labels: int64 [N], float32 [N] or float32 [N, C] by task; anything where there is no gold.
        has_gold: bool [N].
        pad_token_id: what fills up the input.
        with_segments: whether the model takes segment ids.
        stored: where the teacher's signals are; None when no method needs one.
        signals: the signals of a batch, or what they are derived from.
        to_derive: whether some are derived.
        masks: where masked tokens and what stood there come from; None where texts are read as they are.
        row_signals: those among them that signals with one entry per row come from; None: those that have one.
        families: int64 [N], alike for all variants of a text; None where no method contrasts rows.
        words: of a token task, whose `labels` are not used; None of other tasks.
    """

    tokens: TokenSource
    labels: np.ndarray
    has_gold: np.ndarray
    pad_token_id: int
    with_segments: bool = False
    stored: StoreRows | None = None
    signals: tuple[Signal, ...] = ()
    row_signals: tuple[Signal, ...] | None = None
    masks: StoreRows | None = None
    to_derive: bool = False
    families: np.ndarray | None = None
    words: Words | None = None

    def __len__(self) -> int:
        return len(self.has_gold)

    def batch(self, index_B: np.ndarray) -> Batch:
        """One batch as torch tensors on the CPU.

        Returns:
            `inputs` (keyword arguments of the student: ids and masks int64 [B, T]), `labels`, `has_gold` [B] and
            `signals` (teacher tensors by `str(signal)`, in the stored dtype; token states [B, T, ...] and scores
            [B, H, T, T] are zero after a row's end). Of masked rows also `positions` int64 [B, M] (see `MaskedRows`);
            `labels` and `has_gold` are then [P], of the masked tokens row by row. The same of words, with the student's
            positions; the teacher's stand among the signals.
        """
        ids, lengths, segments = self.tokens.gather(index_B, segments=self.with_segments)
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        ids = ids.astype(np.int64)
        if self.pad_token_id:
            ids[~mask] = self.pad_token_id
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if segments is not None:
            inputs["token_type_ids"] = torch.from_numpy(segments.astype(np.int64))
        if self.masks is not None:
            masked, _ = self.masks.masked(index_B)
            labels_P = torch.from_numpy(masked.labels_BM[masked.positions_BM >= 0])
            positions = torch.from_numpy(masked.positions_BM)
            signals = self._signals(index_B)
            if signals:
                if "mlm.logits" in signals:
                    signals = {**signals, "mlm.logits": signals["mlm.logits"][positions >= 0]}
                signals = {**signals, POSITIONS: positions}
            return {
                "inputs": inputs,
                "labels": labels_P,
                "has_gold": torch.ones_like(labels_P, dtype=torch.bool),
                "signals": signals,
                "positions": positions,
            }
        if self.words is not None:
            positions, of_teacher, tags = self.words.batch(index_B)
            labels_P = tags[positions >= 0]
            signals = self._signals(index_B)
            if signals:
                if str(OF_WORDS) in signals:
                    signals = {**signals, str(OF_WORDS): taken_at(signals[str(OF_WORDS)], of_teacher)}
                signals = {**signals, POSITIONS: of_teacher}
            return {
                "inputs": inputs,
                "labels": labels_P,
                "has_gold": labels_P >= 0,
                "signals": signals,
                "positions": positions,
            }
        return {
            "inputs": inputs,
            "labels": torch.from_numpy(self.labels[index_B]),
            "has_gold": torch.from_numpy(self.has_gold[index_B]),
            "signals": self._signals(index_B),
        }

    def _signals(self, index_B: np.ndarray) -> Mapping[str, torch.Tensor]:
        return {} if self.stored is None else self._read(self.signals, index_B)

    def sentence_signals(self, index: np.ndarray) -> Mapping[str, torch.Tensor]:
        """Of any rows what the signals with one entry per row come from, as in `batch`."""
        wanted = self.row_signals
        if wanted is None:
            wanted = tuple(signal for signal in self.signals if signal.kind.axis == "example")
        return self._read(wanted, index)

    def _read(self, signals: Sequence[Signal], index: np.ndarray) -> Mapping[str, torch.Tensor]:
        assert self.stored is not None
        found = self.stored.tensors(signals, index, to_derive=self.to_derive)
        return found if self.families is None else {**found, FAMILY: torch.from_numpy(self.families[index])}

    def seen_tokens(self, index: np.ndarray, vocab_size: int, *, rows_at_once: int = 4096) -> np.ndarray:
        """Ids that occur in the rows `index`, rising."""
        seen = np.zeros(vocab_size, bool)
        by_length = index[np.argsort(self.tokens.lengths[index], kind="stable")]
        for start in range(0, len(by_length), rows_at_once):
            ids, lengths, _ = self.tokens.gather(by_length[start : start + rows_at_once], segments=False)
            seen[ids[np.arange(ids.shape[1]) < lengths[:, None]]] = True
        return np.flatnonzero(seen)
