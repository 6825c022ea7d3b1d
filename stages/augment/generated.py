"""Variants that a model writes: what is common to `back-translate` and `lm`.

Such a variant is one of its own: no rule acts on it. It is numbered after the rule variants of its original, and stands
in the corpus after all of them. A chunk of them is kept in the working folder as `<operator>-<chunk>.arrow`, made like
`variants-<chunk>.arrow`, with two more columns: what the model was given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...pipeline.fingerprint import fingerprint
from .dedup import joined, text_key
from .draws import AUG_VERSION, Draws, FloatArray
from .generate import COUNTS, KEY_COLUMN, Plan, corpus_rows, forbidden_of, read_arrow, write_arrow
from .words import split_words

GENERATED = "generated.parquet"
"""In the folder of the corpus: per variant that a model wrote, what it was given."""
GIVEN = ("given_a", "given_b")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How one operator has a model write variants.

    Attributes:
        operator: "back-translate" or "lm".
        models: the folder and the hash of the files of each model, in the order in which they are asked.
        num_variants: per original.
        first: number of its first variant among those of an original.
        temperature, top_k: of sampling.
        prefixes: per model, what stands before a text.
        separator: between the two texts of a pair that a language model sees as one.
        pair_sides: which text of a pair a variant changes.
    """

    operator: str
    models: tuple[tuple[str, str], ...]
    num_variants: int
    first: int
    temperature: float
    top_k: int
    prefixes: tuple[str, ...] = ()
    separator: str = ""
    pair_sides: str = ""

    @cached_property
    def config_hash(self) -> bytes:
        """8 bytes: what of the configuration decides over a variant; seed and models apart."""
        ignored = ("models", "num_variants", "first")
        used = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ignored}
        return bytes.fromhex(fingerprint({"aug_version": AUG_VERSION, **used}))[:8]

    def computed_on(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Originals by device and dtype, such as {"cpu float32": 54}, from the counts of chunks."""
        start = f"{self.operator} on "
        return {name.removeprefix(start): count for name, count in sorted(counts.items()) if name.startswith(start)}

    def draws(self, seed: int, stream: str, example_id: bytes, iteration: int, count: int) -> FloatArray:
        """`count` draws of one purpose (`stream`): the key is that of `Draws`, after the configuration the purpose."""
        draws = Draws(seed, self.config_hash + stream.encode())
        return draws.of([example_id], [iteration], np.array([count]))[0][:count]


@dataclass(frozen=True)
class Written:
    """A variant that a model wrote, or why there is none.

    Attributes:
        row: of the chunk, its original.
        iteration: 0 .. num_variants - 1.
        side: which text of a pair changed; None for single texts.
        texts: of the variant.
        given: per text what the model wrote it from; None where it did not write.
        fault: why it is left out.
    """

    row: int
    iteration: int
    side: str | None
    texts: tuple[str, ...] = ()
    given: tuple[str | None, ...] = ()
    fault: str | None = None


Writer = Callable[[Generation, Plan, pa.Table], tuple[list[Written], str]]
"""Has models write the variants of some originals; also says what they were computed on."""


@dataclass(frozen=True)
class GenerateJob:
    """Has models write the variants of a chunk; drops those that can be judged alone."""

    plan: Plan
    generation: Generation

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[int, pa.Table]:
        rows = self.plan.originals(shard)
        written, computed_on = _writer(self.generation.operator)(self.generation, self.plan, rows)
        advance(len(rows))
        counts: Counter[str] = Counter(made=len(written))
        counts[f"{self.generation.operator} on {computed_on}"] = len(rows)
        return shard, _table(self.plan, self.generation, rows, written, counts)

    def finish(self, computed: tuple[int, pa.Table]) -> int:
        chunk, table = computed
        write_arrow(table, self.plan.file(self.generation.operator, chunk))
        return chunk


def _writer(operator: str) -> Writer:
    if operator == "lm":
        from .lm import continuations

        return continuations
    from .back_translate import back_translations

    return back_translations


def _table(
    plan: Plan, generation: Generation, originals: pa.Table, written: Sequence[Written], counts: Counter[str]
) -> pa.Table:
    """The variants that stay as rows of a corpus with text keys and what was given, counts in the metadata."""
    name = generation.operator
    counts[name] = len(written)
    texts = [originals[f"text_{letter}"].to_pylist() for letter in plan.letters()]
    original_keys = [text_key(*map(joined, row)) for row in zip(*texts, strict=True)]
    kept, keys = [], []
    for variant in written:
        key = text_key(*map(joined, variant.texts)) if variant.fault is None else None
        fault = "unchanged" if key == original_keys[variant.row] else variant.fault
        if fault is None:
            kept.append(variant)
            keys.append(key)
        else:
            counts[f"dropped_{name}_{fault}"] += 1
    leaks = np.isin(np.array(keys, dtype="S16"), forbidden_of(plan))
    counts["dropped_leak"] += int(leaks.sum())
    number, is_pair = len(kept), plan.is_pair
    texts_a, given_a = [v.texts[0] for v in kept], [v.given[0] for v in kept]
    texts_b, given_b = ([v.texts[1] for v in kept], [v.given[1] for v in kept]) if is_pair else ([], [])
    no_text, no_count = pa.nulls(number, pa.string()), pa.nulls(number, pa.int32())
    made = pa.table(
        {
            "row": pa.array([v.row for v in kept], pa.int64()),
            "text_a": pa.array(texts_a, pa.string()),
            "text_b": pa.array(texts_b, pa.string()) if is_pair else no_text,
            "aug_op": pa.array([name] * number, pa.string()),
            "aug_iter": pa.array([generation.first + v.iteration for v in kept], pa.int16()),
            "aug_side": pa.array([v.side for v in kept], pa.string()),
            "n_words_a": pa.array([len(split_words(text)) for text in texts_a], pa.int32()),
            "n_words_b": pa.array([len(split_words(t)) for t in texts_b], pa.int32()) if is_pair else no_count,
            KEY_COLUMN: pa.array(keys, pa.binary(16)),
        }
    )
    table = corpus_rows(plan, originals, made, generation.config_hash)
    table = table.append_column(GIVEN[0], pa.array(given_a, pa.string()))
    table = table.append_column(GIVEN[1], pa.array(given_b, pa.string()) if is_pair else no_text)
    return table.filter(pa.array(~leaks)).replace_schema_metadata({COUNTS: json.dumps(dict(sorted(counts.items())))})


def model_record(plan: Plan, made: Mapping[str, int]) -> dict[str, Any]:
    """For the manifest, per operator: what is needed to write a variant again, and what it was computed on.

    Args:
        plan: of the corpus.
        made: the counts of all chunks.
    """
    return {
        generation.operator: {
            "config_hash": generation.config_hash.hex(),
            "num_variants": generation.num_variants,
            "first_variant": generation.first,
            "models": [digest for _, digest in generation.models],
            "computed_on": generation.computed_on(made),
        }
        for generation in plan.generations
    }


def given_rows(plan: Plan, kept: Sequence[npt.NDArray[np.bool_]]) -> Iterator[pa.Table]:
    """The variants of a corpus that a model wrote, of those that `kept` says per file of `plan.files_of_variants()`."""
    for (_, file), keep in zip(plan.files_of_variants(), kept, strict=True):
        table = read_arrow(file)
        if GIVEN[0] in table.column_names:
            yield table.filter(pa.array(keep))


def write_given(tables: Iterator[pa.Table], folder: Path) -> None:
    """Keep what models were given for the variants of the corpus: `example_id, aug_op, given_a, given_b`.

    Args:
        tables: chunks of variants that stay.
        folder: of the corpus.
    """
    names = ("example_id", "aug_op", *GIVEN)
    schema = pa.schema([("example_id", pa.binary(16)), *((name, pa.string()) for name in names[1:])])
    with pq.ParquetWriter(folder / GENERATED, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.select(names).cast(schema))
