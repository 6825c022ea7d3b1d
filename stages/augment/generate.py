"""The work of `kd augment`, chunk by chunk: tag the originals, then make their variants.

Both halves read and write files of one working folder, so that a chunk can be done by any process, and what is done
stays done when the run is killed:

- `originals.arrow`: the originals, in the schema of a corpus; `forbidden.bin`: 16-byte keys of texts to avoid;
- `tags-<chunk>.arrow`: parts of speech, one list per row and text; `counts-<chunk>.arrow`: how often each word had
  which tag;
- `variants-<chunk>.arrow`: variants in the schema of a corpus and their text keys; counts in the metadata.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from ..corpus.schema import example_id, schema
from .dedup import joined, text_key
from .draws import AUG_VERSION
from .pools import Pools
from .rules import Example, RuleAugmenter, Rules, Variant
from .tagger import load_tagger
from .words import split_words

ORIGINALS = "originals.arrow"
FORBIDDEN = "forbidden.bin"
KEY_COLUMN = "text_key"
_COUNTS = b"kd.counts"


@dataclass(frozen=True)
class Plan:
    """What is made in a working folder. Picklable and small: it is all that a worker gets.

    Attributes:
        folder: the working folder.
        digest: hash of the originals, the forbidden keys and the tagger; names what may be remembered of them.
        num_rows: rows of `originals.arrow`.
        rows_per_chunk: originals per chunk.
        task: task of the corpus, which fixes its schema.
        tagger: name of the tagger; None when no operator needs tags.
        language: of the text, for the tagger.
        rules: what the operators do.
        num_variants: per original.
        seed: of all draws.
        keep_all_masked: whether variants of nothing but mask tokens are kept.
    """

    folder: Path
    digest: str
    num_rows: int
    rows_per_chunk: int
    task: str
    tagger: str | None
    language: str
    rules: Rules
    num_variants: int
    seed: int
    keep_all_masked: bool

    @property
    def num_chunks(self) -> int:
        """Chunks of originals."""
        return -(-self.num_rows // self.rows_per_chunk)

    def file(self, kind: str, chunk: int) -> Path:
        """The file of a chunk: kind is "tags", "counts" or "variants"."""
        return self.folder / f"{kind}-{chunk:06d}.arrow"

    def missing(self, kind: str) -> list[int]:
        """Chunks that are still to be done."""
        return [chunk for chunk in range(self.num_chunks) if not self.file(kind, chunk).exists()]

    def rows_of(self, chunk: int) -> int:
        """Originals in a chunk."""
        return min(self.rows_per_chunk, self.num_rows - chunk * self.rows_per_chunk)

    def originals(self, chunk: int) -> pa.Table:
        """The originals of a chunk."""
        start = chunk * self.rows_per_chunk
        return read_arrow(self.folder / ORIGINALS).slice(start, self.rows_per_chunk)


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def read_arrow(path: Path) -> pa.Table:
    """A memory-mapped Arrow file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def with_keys(originals: pa.Table) -> tuple[pa.Table, list[bytes]]:
    """The table with its word counts filled in, and the text key of every row."""
    keys, lengths_a, lengths_b = [], [], []
    for text_a, text_b in zip(originals["text_a"].to_pylist(), originals["text_b"].to_pylist(), strict=True):
        words_a = split_words(text_a)
        words_b = None if text_b is None else split_words(text_b)
        lengths_a.append(len(words_a))
        lengths_b.append(None if words_b is None else len(words_b))
        keys.append(text_key(joined(text_a, words_a), None if words_b is None else joined(text_b, words_b)))
    for name, lengths in (("n_words_a", lengths_a), ("n_words_b", lengths_b)):
        index = originals.schema.get_field_index(name)
        originals = originals.set_column(index, originals.schema.field(name), pa.array(lengths, pa.int32()))
    return originals, keys


def fixed_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """S16 [N] over the memory of a column of 16-byte values without nulls."""
    parts = [np.frombuffer(c.buffers()[1], dtype="S16")[c.offset : c.offset + len(c)] for c in column.chunks if len(c)]
    return np.concatenate([*parts, np.empty(0, dtype="S16")])


def read_counts(table: pa.Table) -> Counter[str]:
    """The counts that came with a chunk of variants."""
    return Counter(json.loads(table.schema.metadata[_COUNTS]))


# Pass 1 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TagJob:
    """Tags the originals of a chunk and counts words per tag."""

    plan: Plan

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[int, pa.Table, Counter[tuple[int, str]]]:
        assert self.plan.tagger is not None
        tag = load_tagger(self.plan.tagger, self.plan.language).tag
        rows = self.plan.originals(shard)
        counts: Counter[tuple[int, str]] = Counter()
        columns: dict[str, pa.Array] = {}
        for side in ("a", "b"):
            tags: list[list[int] | None] = []
            for text in rows[f"text_{side}"].to_pylist():
                words = [] if text is None else split_words(text)
                found = tag(words)
                counts.update(zip(found, words, strict=True))
                tags.append(found)
                if side == "a":
                    advance(1)
            columns[side] = pa.array(tags, pa.list_(pa.int16()))
        return shard, pa.table(columns), counts

    def finish(self, computed: tuple[int, pa.Table, Counter[tuple[int, str]]]) -> int:
        chunk, tags, counts = computed
        pairs = sorted(counts)
        table = pa.table(
            {
                "tag": pa.array([tag for tag, _ in pairs], pa.int16()),
                "word": pa.array([word for _, word in pairs], pa.string()),
                "count": pa.array([counts[pair] for pair in pairs], pa.int64()),
            }
        )
        write_arrow(table, self.plan.file("counts", chunk))
        write_arrow(tags, self.plan.file("tags", chunk))
        return chunk


@lru_cache(maxsize=1)
def pools_of(plan: Plan) -> Pools:
    """The pools of all originals; every chunk must be tagged."""
    counts: Counter[tuple[int, str]] = Counter()
    if plan.tagger is not None:
        for chunk in range(plan.num_chunks):
            table = read_arrow(plan.file("counts", chunk))
            pairs = zip(table["tag"].to_pylist(), table["word"].to_pylist(), strict=True)
            counts.update(dict(zip(pairs, table["count"].to_pylist(), strict=True)))
    return Pools.of(counts)


# Pass 2 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VariantJob:
    """Makes the variants of a chunk; drops those that can be judged alone."""

    plan: Plan

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[int, pa.Table]:
        plan = self.plan
        rows = plan.originals(shard)
        augmenter = RuleAugmenter(plan.rules, pools_of(plan), plan.seed)
        forbidden = _forbidden(plan)
        made = _Made()
        for row, example, keys in self._examples(shard, rows):
            for variant in augmenter.variants(example, plan.num_variants):
                made.add(row, example, variant, keys, forbidden, plan.keep_all_masked)
            advance(1)
        counts = made.counts + augmenter.counts
        table = made.table(rows, plan)
        return shard, table.replace_schema_metadata({_COUNTS: json.dumps(dict(sorted(counts.items())))})

    def finish(self, computed: tuple[int, pa.Table]) -> int:
        chunk, table = computed
        write_arrow(table, self.plan.file("variants", chunk))
        return chunk

    def _examples(self, chunk: int, rows: pa.Table) -> Iterator[tuple[int, Example, tuple[str, str | None]]]:
        """Row number, example, and its texts as they count for equality."""
        ids = rows["example_id"].to_pylist()
        texts_b = rows["text_b"].to_pylist()
        if self.plan.tagger is None:
            tags_a = tags_b = None
        else:
            tags = read_arrow(self.plan.file("tags", chunk))
            tags_a, tags_b = tags["a"].to_pylist(), tags["b"].to_pylist()
        for row, text_a in enumerate(rows["text_a"].to_pylist()):
            words_a = split_words(text_a)
            words_b = None if texts_b[row] is None else split_words(texts_b[row])
            example = Example(
                ids[row],
                words_a,
                [0] * len(words_a) if tags_a is None else tags_a[row],
                words_b,
                () if words_b is None else [0] * len(words_b) if tags_b is None else tags_b[row],
            )
            yield row, example, (joined(text_a, words_a), None if words_b is None else joined(texts_b[row], words_b))


class _Made:
    """Collects the columns of variants."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._rows: list[int] = []
        self._iterations: list[int] = []
        self._sides: list[str | None] = []
        self._new: dict[str, list[str | None]] = {"a": [], "b": []}
        self._lengths: dict[str, list[int]] = {"a": [], "b": []}
        self._keys: list[bytes] = []

    def add(
        self,
        row: int,
        example: Example,
        variant: Variant,
        originals: tuple[str, str | None],
        forbidden: frozenset[bytes],
        keep_all_masked: bool,
    ) -> None:
        """Take a variant, or count why not."""
        self.counts["made"] += 1
        words_a, words_b = variant.words_a, variant.words_b
        if words_a is None and words_b is None:
            self.counts["dropped_unchanged"] += 1
            return
        if variant.all_masked and not keep_all_masked:
            self.counts["dropped_all_masked"] += 1
            return
        text_a = None if words_a is None else " ".join(words_a)
        text_b = None if words_b is None else " ".join(words_b)
        key = text_key(
            originals[0] if text_a is None else joined(text_a, words_a),
            originals[1] if text_b is None else joined(text_b, words_b),
        )
        if key in forbidden:
            self.counts["dropped_leak"] += 1
            return
        self._rows.append(row)
        self._iterations.append(variant.iteration)
        self._sides.append(variant.side)
        self._new["a"].append(text_a)
        self._new["b"].append(text_b)
        self._lengths["a"].append(len(example.words_a if words_a is None else words_a))
        self._lengths["b"].append(len((example.words_b or ()) if words_b is None else words_b))
        self._keys.append(key)

    def table(self, originals: pa.Table, plan: Plan) -> pa.Table:
        """The variants as rows of a corpus, in the order in which they were added, with their text keys."""
        number = len(self._rows)
        parents = originals.take(pa.array(self._rows, pa.int64()))
        is_pair = originals["text_b"].null_count < len(originals)
        parent_ids = parents["example_id"].to_pylist()
        texts = {
            side: [old if new is None else new for old, new in zip(column, self._new[side], strict=True)]
            for side, column in (("a", parents["text_a"].to_pylist()), ("b", parents["text_b"].to_pylist()))
        }
        columns: dict[str, Any] = {
            # No two variants that are kept have the same text, nor that of an original: none is a duplicate.
            "example_id": [example_id(a, b) for a, b in zip(texts["a"], texts["b"], strict=True)],
            "parent_id": parent_ids,
            "text_a": texts["a"],
            "text_b": texts["b"],
            "has_gold": np.zeros(number, dtype=bool),
            "aug_op": ["rule"] * number,
            "aug_iter": self._iterations,
            "aug_side": self._sides,
            "aug_version": [AUG_VERSION] * number,
            "aug_config_hash": [plan.rules.config_hash] * number,
            "seed": np.full(number, plan.seed, dtype=np.int64),
            "n_words_a": self._lengths["a"],
            "n_words_b": self._lengths["b"] if is_pair else [None] * number,
        }
        arrays = []
        wanted = schema(plan.task)
        for field in wanted:
            if field.name in columns:
                array = pa.array(columns[field.name])
            elif field.name in ("task", "split", "source"):
                array = parents[field.name].combine_chunks()
            else:
                array = pa.nulls(number, field.type)
            arrays.append(array.cast(field.type))
        table = pa.Table.from_arrays(arrays, schema=wanted)
        return table.append_column(KEY_COLUMN, pa.array(self._keys, pa.binary(16)))


@lru_cache(maxsize=1)
def _forbidden(plan: Plan) -> frozenset[bytes]:
    data = (plan.folder / FORBIDDEN).read_bytes()
    return frozenset(data[i : i + 16] for i in range(0, len(data), 16))
