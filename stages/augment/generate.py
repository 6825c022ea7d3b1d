"""The work of `kd augment`, chunk by chunk: split and tag the originals, then make their variants.

Every step reads and writes files of one working folder, so that a chunk can be done by any process, and what is done
stays done when the run is killed:

- `originals.arrow`: the originals, in the schema of a corpus; `forbidden.bin`: 16-byte keys of texts to avoid;
- `words-<chunk>.arrow`: the words of every row and text, as numbers of the chunk's `counts-<chunk>.arrow`, which says
  how often each word had which part of speech;
- `synonym.arrow`, `neighbour.arrow`: candidates of every word of the corpus; `pieces.arrow`: of those that a masked LM
  has in several pieces; `mlm-<chunk>.arrow`: of every place;
- `recombine.arrow`: the texts of either side of all pairs;
- `mentions-<chunk>.arrow`: how often each named entity is marked in the chunk;
- `variants-<chunk>.arrow`: variants in the schema of a corpus and their text keys; counts in the metadata;
  `back-translate-<chunk>.arrow`: the same of variants that a model wrote (`generated.py`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from ...pipeline.ragged import Ragged
from ..corpus.corpus import Corpus
from ..corpus.schema import EDITS_FIELD, CorpusInfo, example_id, normalised, schema
from ..entities import BioTags
from .candidates import from_column
from .dedup import joined, text_key
from .draws import AUG_VERSION
from .mention import Mentions, ReplaceMentions, Spans, count_mentions
from .operators import OPERATORS
from .pairs import SIDES
from .pools import Pools
from .recombine import Recombine, Texts, read_texts
from .rules import Changed, RuleAugmenter, Rules, Tagged, Variants
from .tagger import load_tagger
from .words import splitter

if TYPE_CHECKING:
    from .generated import Generation

ORIGINALS = "originals.arrow"
FORBIDDEN = "forbidden.bin"
PIECES = "pieces.arrow"
RECOMBINE = "recombine.arrow"
KEY_COLUMN = "text_key"
WORDS_PER_BATCH = 1 << 17
"""Words of variants made at once: what is worked on stays in the caches of the processor."""
COUNTS = b"kd.counts"
_LETTERS = ("a", "b")


@dataclass(frozen=True)
class Plan:
    """What is made in a working folder. Picklable and small: it is all that a worker gets.

    Attributes:
        folder: the working folder.
        digest: hash of the originals, the forbidden keys and the tagger; names what may be remembered of them.
        num_rows: rows of `originals.arrow`.
        rows_per_chunk: originals per chunk.
        info: what the rows of the corpus mean, which fixes its schema.
        tagger: name of the tagger; None when no operator needs tags.
        language: of the text, for the tagger.
        rules: what the operators do.
        num_variants: per original.
        seed: of all draws.
        keep_all_masked: whether variants of nothing but mask tokens are kept.
        keep_all_changed: whether variants of single texts that keep no word are kept.
        keep_edits: whether a variant says at which words it was changed.
        generations: what models write besides.
    """

    folder: Path
    digest: str
    num_rows: int
    rows_per_chunk: int
    info: CorpusInfo
    tagger: str | None
    language: str
    rules: Rules
    num_variants: int
    seed: int
    keep_all_masked: bool
    keep_all_changed: bool = True
    keep_edits: bool = False
    generations: tuple[Generation, ...] = ()

    @property
    def task(self) -> str:
        """Task of the corpus."""
        return self.info.task

    @property
    def is_pair(self) -> bool:
        """Whether a row is two texts."""
        return self.info.is_pair

    @property
    def num_chunks(self) -> int:
        """Chunks of originals."""
        return -(-self.num_rows // self.rows_per_chunk)

    def file(self, kind: str, chunk: int) -> Path:
        """The file of a chunk: kind is "words", "counts", "mentions", "mlm", "variants" or an operator whose model
        writes."""
        return self.folder / f"{kind}-{chunk:06d}.arrow"

    def files_of_variants(self) -> list[tuple[int, Path]]:
        """Chunk and file of all variants, in the order in which they stand in the corpus."""
        kinds = [*(["variants"] if self.num_variants else []), *(entry.operator for entry in self.generations)]
        return [(chunk, self.file(kind, chunk)) for kind in kinds for chunk in range(self.num_chunks)]

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

    def tagged(self, chunk: int) -> Tagged:
        """The tags of a chunk of a token task."""
        return Tagged(Corpus(self.originals(chunk), self.info).tags()[0], BioTags.of(self.info.label_names))

    def letters(self) -> tuple[str, ...]:
        """The sides of a row."""
        return _LETTERS if self.is_pair else _LETTERS[:1]

    def texts(self, chunk: int) -> list[Ragged]:
        """Per side the words of the originals of a chunk, as entries of `pools_of`."""
        pairs = read_arrow(self.file("counts", chunk))
        numbers = pools_of(self).numbers
        found = [numbers[pair] for pair in zip(pairs["tag"].to_pylist(), pairs["word"].to_pylist(), strict=True)]
        entries = np.array(found, dtype=np.int64)
        table = read_arrow(self.file("words", chunk))
        texts = []
        for letter in self.letters():
            column = table[letter].combine_chunks()
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            texts.append(Ragged.from_lengths(entries[column.flatten().to_numpy()], lengths))
        return texts


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def read_arrow(path: Path) -> pa.Table:
    """A memory-mapped Arrow file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def with_keys(originals: pa.Table, task: str) -> tuple[pa.Table, list[bytes]]:
    """The table with its word counts filled in, and the text key of every row."""
    split_words = splitter(task)
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
    return Counter(json.loads(table.schema.metadata[COUNTS]))


# Pass 1 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordsJob:
    """Splits the originals of a chunk into words, tags them where that is asked for, and counts words per tag."""

    plan: Plan

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[int, dict[str, pa.Table]]:
        plan = self.plan
        tag = load_tagger(plan.tagger, plan.language).tag if plan.tagger is not None else None
        rows, split = plan.originals(shard), splitter(plan.task)
        # Named entities are known words and never drawn in the place of another.
        drawn = iter((~plan.tagged(shard).in_mention).tolist()) if plan.task == "token" else repeat(True)
        counts: Counter[tuple[int, str]] = Counter()
        number: dict[tuple[int, str], int] = {}
        columns: dict[str, list[list[int]]] = {}
        for letter in plan.letters():
            column = columns[letter] = []
            for text in rows[f"text_{letter}"].to_pylist():
                words = split(text)
                pairs = [*zip([0] * len(words) if tag is None else tag(words), words, strict=True)]
                counts.update(compress(pairs, drawn))
                column.append([number.setdefault(pair, len(number)) for pair in pairs])
                if letter == "a":
                    advance(1)
        tables = {"counts": _as_table({pair: counts[pair] for pair in number})}
        if plan.rules.mention:
            tagged = plan.tagged(shard)
            assert tagged.bio is not None
            texts = map(split, rows["text_a"].to_pylist())
            tables["mentions"] = _as_table(count_mentions(tagged.tags, texts, tagged.bio))
        # The last to be written says that a chunk is done.
        tables["words"] = pa.table({name: pa.array(c, pa.list_(pa.int32())) for name, c in columns.items()})
        return shard, tables

    def finish(self, computed: tuple[int, dict[str, pa.Table]]) -> int:
        chunk, tables = computed
        for kind, table in tables.items():
            write_arrow(table, self.plan.file(kind, chunk))
        return chunk


def _as_table(counts: Mapping[tuple[int, str], int]) -> pa.Table:
    return pa.table(
        {
            "tag": pa.array([tag for tag, _ in counts], pa.int16()),
            "word": pa.array([word for _, word in counts], pa.string()),
            "count": pa.array([*counts.values()], pa.int64()),
        }
    )


def _all_counts(plan: Plan, kind: str) -> Counter[tuple[int, str]]:
    """The counts of all chunks together, as `_as_table` wrote them."""
    counts: Counter[tuple[int, str]] = Counter()
    for chunk in range(plan.num_chunks):
        table = read_arrow(plan.file(kind, chunk))
        pairs = zip(table["tag"].to_pylist(), table["word"].to_pylist(), strict=True)
        counts.update(dict(zip(pairs, table["count"].to_pylist(), strict=True)))
    return counts


@lru_cache(maxsize=1)
def pools_of(plan: Plan) -> Pools:
    """The pools of all originals; every chunk must have its words."""
    return Pools.of(_all_counts(plan, "counts"))


@lru_cache(maxsize=1)
def mentions_of(plan: Plan) -> Mentions | None:
    """The mentions of all originals; None where `mention` does nothing."""
    if not plan.rules.mention:
        return None
    numbers: dict[str, int] = {}
    for number, word in enumerate(pools_of(plan).words):
        numbers.setdefault(word, number)
    return Mentions.of(_all_counts(plan, "mentions"), numbers)


# Pass 2 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The strings of the numbers that operators work with: the words of the pools, the mask token, candidates.

    Attributes:
        words: V strings.
        folded: V strings, as they count for equality of texts.
        candidates: of `synonym` and `neighbour`, per word of the pools.
    """

    words: pa.Array
    folded: pa.Array
    candidates: dict[str, Ragged]

    @classmethod
    def of(cls, plan: Plan, pools: Pools) -> Vocabulary:
        """What is the same for all chunks."""
        parts, candidates = [pa.array([*pools.words, plan.rules.mask_token], pa.string())], {}
        for name in ("synonym", "neighbour"):
            if plan.rules.probabilities[name]:
                table = read_arrow(plan.folder / f"{name}.arrow")
                candidates[name], words = from_column(table, sum(map(len, parts)))
                parts.append(words)
        words = pa.concat_arrays(parts)
        return cls(words, _folded(words), candidates)

    def extended(self, words: pa.Array) -> Vocabulary:
        """With more words at the end."""
        joined_words, folded = pa.concat_arrays([self.words, words]), pa.concat_arrays([self.folded, _folded(words)])
        return Vocabulary(joined_words, folded, self.candidates)


def _folded(words: pa.Array) -> pa.Array:
    return pa.array([normalised(word).casefold() for word in words.to_pylist()], pa.string())


@lru_cache(maxsize=1)
def _vocabulary(plan: Plan) -> Vocabulary:
    return Vocabulary.of(plan, pools_of(plan))


@dataclass(frozen=True)
class VariantJob:
    """Makes the variants of a chunk; drops those that can be judged alone."""

    plan: Plan

    def compute(self, shard: int, advance: Callable[[int], None]) -> tuple[int, pa.Table]:
        table, counts = variants_of(self.plan, shard, advance=advance)
        return shard, table.replace_schema_metadata({COUNTS: json.dumps(dict(sorted(counts.items())))})

    def finish(self, computed: tuple[int, pa.Table]) -> int:
        chunk, table = computed
        write_arrow(table, self.plan.file("variants", chunk))
        return chunk


def variants_of(
    plan: Plan, chunk: int, of: Iterable[range] | None = None, advance: Callable[[int], None] = lambda rows: None
) -> tuple[pa.Table, Counter[str]]:
    """`(variants, counts)`: those of a chunk that can stand alone, as rows of a corpus with their text keys.

    Args:
        plan: what is made; the chunk has its words and candidates.
        chunk: its number.
        of: runs of its rows that are done together; all when not given.
        advance: is told of rows that are done.
    """
    rows, texts, pools = plan.originals(chunk), plan.texts(chunk), pools_of(plan)
    vocabulary, places = _vocabulary(plan), []
    if plan.rules.mlm:
        table = read_arrow(plan.file("mlm", chunk))
        for letter in plan.letters():
            found, words = from_column(table.filter(pc.equal(table["side"], letter)), len(vocabulary.words))
            places.append(found)
            vocabulary = vocabulary.extended(words)
    tagged = plan.tagged(chunk) if plan.task == "token" else None
    augmenter = RuleAugmenter(
        plan.rules,
        pools,
        plan.seed,
        mask_word=len(pools.words),
        candidates=vocabulary.candidates,
        places=places,
        recombine=_recombine(plan, rows),
        tagged=tagged,
        mentions=_replace_mentions(plan, texts[0], tagged),
        keep_edits=plan.keep_edits,
    )
    made = _Made(plan, rows, texts, vocabulary)
    ids = rows["example_id"].to_pylist()
    for batch in _batches(texts, plan.num_variants) if of is None else of:
        made.add(augmenter.variants(ids, texts, plan.num_variants, of=batch))
        advance(len(batch))
    return made.table(), made.counts + augmenter.counts


def _replace_mentions(plan: Plan, texts: Ragged, tagged: Tagged | None) -> ReplaceMentions | None:
    mentions = mentions_of(plan)
    if mentions is None:
        return None
    assert tagged is not None and tagged.bio is not None
    words = pools_of(plan).words
    spelled = ([words[number] for number in row] for row in texts)
    spans = Spans.of(tagged.tags, spelled, tagged.bio, mentions.pools)
    return ReplaceMentions(plan.rules.mention, mentions, spans)


def texts_of(plan: Plan) -> tuple[Texts, ...]:
    """What `recombine` draws from, per side; () where it does nothing."""
    return read_texts(plan.folder / RECOMBINE, plan.digest) if plan.rules.recombine else ()


def _recombine(plan: Plan, rows: pa.Table) -> Recombine | None:
    sides = texts_of(plan)
    if not sides:
        return None
    own = [
        side.numbers(rows[f"text_{letter}"].combine_chunks())
        for letter, side in zip(plan.letters(), sides, strict=True)
    ]
    return Recombine(plan.rules.recombine, tuple(own), tuple(len(side.texts) for side in sides))


def _batches(texts: list[Ragged], num_variants: int) -> Iterator[range]:
    """Runs of rows whose variants have about `WORDS_PER_BATCH` words, and at least one row."""
    ends = np.cumsum(sum(text.lengths for text in texts) + 1) * num_variants
    start, done = 0, 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, done + WORDS_PER_BATCH, side="right")))
        yield range(start, stop)
        start, done = stop, int(ends[stop - 1])


class _Made:
    """Collects variants as rows of a corpus, with their text keys, and counts why others are left out."""

    def __init__(self, plan: Plan, originals: pa.Table, texts: list[Ragged], vocabulary: Vocabulary) -> None:
        self.counts: Counter[str] = Counter()
        self._plan = plan
        self._originals = originals.combine_chunks()
        self._lengths = [text.lengths for text in texts]
        self._vocabulary = vocabulary
        self._forbidden = forbidden_of(plan)
        self._texts = [originals[f"text_{letter}"].combine_chunks() for letter in plan.letters()]
        split = splitter(plan.task)
        self._folded = [
            pa.array([joined(text, split=split) for text in column.to_pylist()], pa.string()) for column in self._texts
        ]
        self._tables: list[pa.Table] = []

    def add(self, variants: Variants) -> None:
        """Take variants, or count why not."""
        sides, is_pair = variants.changed, self._plan.is_pair
        self.counts["made"] += len(variants.rows)
        kept = np.flatnonzero(self._worth_keeping(variants))
        parents = pa.array(variants.rows[kept])
        texts, folded = (
            [
                _texts(side, original.take(parents), strings, kept)
                for side, original in zip(sides, originals, strict=True)
            ]
            for originals, strings in (
                (self._texts, self._vocabulary.words),
                (self._folded, self._vocabulary.folded),
            )
        )
        lengths = [
            np.where(side.is_new, side.words.lengths, of_original[variants.rows])[kept]
            for side, of_original in zip(sides, self._lengths, strict=True)
        ]
        for number, other in enumerate(texts_of(self._plan)):
            chosen = variants.recombined[number][kept]
            texts[number] = _replaced(texts[number], other.texts, chosen)
            folded[number] = _replaced(folded[number], other.folded, chosen)
            lengths[number] = np.where(chosen >= 0, other.lengths[chosen], lengths[number])
        if is_pair:
            turned = variants.exchanged[kept]
            texts, folded = [_turned(turned, *texts), _turned(turned, *folded)]
            lengths = [np.where(turned, *lengths[::-1]), np.where(turned, *lengths)]
        keys = [text_key(*parts) for parts in zip(*(column.to_pylist() for column in folded), strict=True)]
        leaks = np.isin(np.array(keys, dtype="S16"), self._forbidden)
        self.counts["dropped_leak"] += int(leaks.sum())
        number = len(kept)
        table = pa.table(
            {
                "row": variants.rows[kept],
                "text_a": texts[0],
                "text_b": texts[1] if is_pair else pa.nulls(number, pa.string()),
                "aug_op": _operator_names(variants.operators[kept]),
                "aug_iter": pa.array(variants.iterations[kept], pa.int16()),
                "aug_side": _named(variants.side[kept], SIDES) if is_pair else pa.nulls(number, pa.string()),
                "n_words_a": pa.array(lengths[0], pa.int32()),
                "n_words_b": pa.array(lengths[1], pa.int32()) if is_pair else pa.nulls(number, pa.int32()),
                KEY_COLUMN: pa.array(keys, pa.binary(16)),
            }
        )
        if variants.edits is not None:
            table = table.append_column(EDITS_FIELD.name, variants.edits.column(kept, len(variants.rows)))
        self._tables.append(table.filter(pa.array(~leaks)) if leaks.any() else table)

    def table(self) -> pa.Table:
        """The variants as rows of a corpus, in the order in which they were added, with their text keys."""
        made = pa.concat_tables(self._tables, promote_options="permissive").combine_chunks()
        return corpus_rows(self._plan, self._originals, made, self._plan.rules.config_hash)

    def _worth_keeping(self, variants: Variants) -> npt.NDArray[np.bool_]:
        """Which variants say something that their originals do not; counts the others by reason."""
        plan, sides = self._plan, variants.changed
        is_new = np.logical_or.reduce([side.is_new for side in sides])
        mask_word = len(pools_of(plan).words)
        is_recombined = np.logical_or.reduce([text >= 0 for text in variants.recombined])
        reasons = {"unchanged": ~is_new & ~variants.exchanged & ~is_recombined}
        reasons["empty"] = np.logical_or.reduce([side.is_new & (side.words.lengths == 0) for side in sides])
        if not plan.keep_all_masked:
            reasons["all_masked"] = np.logical_or.reduce([_all_masked(side, mask_word) for side in sides])
        if not plan.keep_all_changed and not plan.is_pair:
            reasons["all_changed"] = sides[0].all_new
        keep = np.ones(len(variants.rows), dtype=bool)
        for reason, named in reasons.items():
            self.counts[f"dropped_{reason}"] += int((keep & named).sum())
            keep &= ~named
        return keep


def corpus_rows(plan: Plan, originals: pa.Table, made: pa.Table, config_hash: bytes) -> pa.Table:
    """Variants in the schema of a corpus, with their text keys.

    Args:
        plan: of the corpus.
        originals: what they were made from.
        made: `row` (of `originals`), their texts and word counts, `aug_op`, `aug_iter`, `aug_side` and text key.
        config_hash: 8 bytes, of what made them.
    """
    number = len(made)
    parents = originals.take(made["row"])
    columns = {
        # No two variants that are kept have the same text, nor that of an original: none is a duplicate.
        "example_id": pa.array(map(example_id, made["text_a"].to_pylist(), made["text_b"].to_pylist()), pa.binary(16)),
        "parent_id": parents["example_id"],
        "has_gold": pa.repeat(pa.scalar(False), number),
        "aug_version": pa.repeat(pa.scalar(AUG_VERSION), number),
        "aug_config_hash": pa.repeat(pa.scalar(config_hash, pa.binary(8)), number),
        "seed": pa.repeat(pa.scalar(plan.seed, pa.int64()), number),
        **{name: parents[name] for name in ("task", "split", "source")},
    }
    wanted = schema(plan.task, edits=plan.keep_edits)
    arrays = []
    for field in wanted:
        if field.name in made.column_names:
            arrays.append(made[field.name].cast(field.type))
        else:
            arrays.append(columns.get(field.name, pa.nulls(number, field.type)).cast(field.type))
    return pa.Table.from_arrays(arrays, schema=wanted).append_column(KEY_COLUMN, made[KEY_COLUMN])


def _texts(side: Changed, originals: pa.Array, strings: pa.Array, kept: npt.NDArray[np.int64]) -> pa.Array:
    """The texts of one side of the kept variants: new words joined by spaces, or the original as it stands."""
    lists = pa.LargeListArray.from_arrays(pa.array(side.words.offsets), strings.take(pa.array(side.words.values)))
    new = pc.binary_join(lists, " ").cast(pa.string()).take(pa.array(kept))
    return pc.if_else(pa.array(side.is_new[kept]), new, originals)


def _replaced(texts: pa.Array, others: pa.Array, chosen: npt.NDArray[np.int64]) -> pa.Array:
    """The texts, and in their place others by number where that is not below 0."""
    return pc.if_else(pa.array(chosen >= 0), others.take(pa.array(np.maximum(chosen, 0))), texts)


def _turned(turned: npt.NDArray[np.bool_], a: pa.Array, b: pa.Array) -> list[pa.Array]:
    """Both texts of pairs, the other way round where `turned` says so."""
    return [pc.if_else(pa.array(turned), b, a), pc.if_else(pa.array(turned), a, b)]


def _all_masked(side: Changed, mask_word: int) -> npt.NDArray[np.bool_]:
    """Which variants have nothing but mask tokens left on a side that changed."""
    lengths = side.words.lengths
    of_word = np.repeat(np.arange(len(lengths)), lengths)
    others = np.bincount(of_word[side.words.values != mask_word], minlength=len(lengths))
    found: npt.NDArray[np.bool_] = side.is_new & (lengths > 0) & (others == 0)
    return found


def _named(numbers: npt.NDArray[Any], names: Sequence[str]) -> pa.Array:
    """A dictionary column of names by number."""
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(names, pa.string()))


def _operator_names(bits: npt.NDArray[np.uint16]) -> pa.Array:
    """Per variant the operators that changed it, joined by "+" in their order."""
    found, numbers = np.unique(bits, return_inverse=True)
    names = ["+".join(name for i, name in enumerate(OPERATORS) if value >> i & 1) for value in found.tolist()]
    return _named(numbers, names)


@lru_cache(maxsize=1)
def forbidden_of(plan: Plan) -> npt.NDArray[np.bytes_]:
    return np.frombuffer((plan.folder / FORBIDDEN).read_bytes(), dtype="S16")
