"""The operators together: from the words of many examples to those of their variants, by look-ups in tables.

Every draw has its place, part of the format (`AUG_VERSION`): first the side of a pair and whether its texts trade
places; then per text of n words n draws that decide between the word operators (each owns a band of [0, 1), in the
order of `WORD_OPERATORS`) and keeping the word, n that such an operator chooses by, and three of the window. What one
operator draws therefore does not depend on what others did.

Word operators see the words of the original; then words that `swap` chose trade places, deleted ones go, and the window
is cut from what is left. They leave a text alone that `recombine` replaces by another row's; its draws come last. So do
those of `mention`, which comes before the word operators, and whose words they leave alone.

Of a token task every word has a tag, which goes where its word goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...pipeline.fingerprint import fingerprint
from ...pipeline.ragged import Ragged, offsets_of, ranges
from ..entities import BioTags
from .candidates import ReplaceByCandidate
from .delete import DELETED, Delete
from .draws import AUG_VERSION, Draws, FloatArray, IntArray
from .edits import WHOLE, Edits
from .mask import Mask
from .mention import ReplaceMentions, entry_of, number_of, rebuilt
from .ngram import Window
from .operators import OPERATORS, REPLACING, WORD_OPERATORS
from .pairs import sides
from .pools import Pools
from .pos import ReplaceByPos
from .recombine import RECOMBINE_DRAWS, Recombine
from .swap import trade_places
from .words import WORDS_VERSION

TEXT_DRAWS = 2
"""Draws of a variant before those of its texts."""
WINDOW_DRAWS = 3

_EXCHANGE, _MENTION, _NGRAM, _RECOMBINE, _SWAP = (
    OPERATORS.index(name) for name in ("exchange", "mention", "ngram", "recombine", "swap")
)
_KEEP = len(WORD_OPERATORS)
_REPLACES = np.array([name in REPLACING for name in WORD_OPERATORS] + [False])


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Configuration of the operators: their probabilities, and what a variant of a pair changes.

    A probability of 0 switches an operator off; the others then draw the same numbers, under another `config_hash`.
    """

    mask: float = 0.0
    pos: float = 0.0
    synonym: float = 0.0
    neighbour: float = 0.0
    mlm: float = 0.0
    delete: float = 0.0
    swap: float = 0.0
    ngram: float = 0.0
    exchange: float = 0.0
    recombine: float = 0.0
    mention: float = 0.0
    mask_token: str = "[MASK]"
    pair_sides: str = "cycle"

    @cached_property
    def probabilities(self) -> dict[str, float]:
        """Of every operator, in the order of `OPERATORS`."""
        return {name: getattr(self, name) for name in OPERATORS}

    @cached_property
    def config_hash(self) -> bytes:
        """8 bytes: what of the configuration decides over a variant; seed, pools and candidates apart."""
        used = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        return bytes.fromhex(fingerprint({"aug_version": AUG_VERSION, "words_version": WORDS_VERSION, **used}))[:8]


class WordOperator(Protocol):
    """Replaces words, seen as numbers of a vocabulary. How often is not its business."""

    def replace(self, words: IntArray, places: IntArray, draws: FloatArray) -> IntArray:
        """The new words: int64 [K]; `DELETED` for none.

        Args:
            words: int64 [K].
            places: int64 [K] where each stands among all words of its side.
            draws: float64 [K] in [0, 1).
        """


@dataclass(frozen=True, eq=False)
class Changed:
    """One side of V variants.

    Attributes:
        words: V rows of words; a side that a variant leaves alone has none.
        is_new: bool [V] whether the words are not those of the original.
        all_new: bool [V] whether none of the words stayed in its place, before the window.
        tags: V rows of tags, where they are asked for: those of the original, gone where its words went, `mention` and
            what was cut made good, below 0 where the original has none.
    """

    words: Ragged
    is_new: npt.NDArray[np.bool_]
    all_new: npt.NDArray[np.bool_]
    tags: Ragged | None = None


@dataclass(frozen=True, eq=False)
class Tagged:
    """What is to be known of the tags of N texts.

    Attributes:
        tags: int64, N rows, a tag per word; below 0 where a text has no gold.
        bio: what they say; None where they are not BIO.
    """

    tags: Ragged
    bio: BioTags | None

    @cached_property
    def in_mention(self) -> npt.NDArray[np.bool_]:
        """bool [W]: words that belong to a named entity, which other words do not replace."""
        values = self.tags.values
        found = np.zeros(len(values), bool) if self.bio is None else (values >= 0) & (self.bio.type_of[values] >= 0)
        return found


@dataclass(frozen=True, eq=False)
class Variants:
    """V variants.

    Attributes:
        rows: int64 [V] the example each is made from.
        iterations: int64 [V] 0 .. num_variants - 1.
        side: int64 [V] index into `pairs.SIDES`; 0 for single texts.
        exchanged: bool [V] whether the two texts of the pair trade places.
        recombined: per side int64 [V] number of the text that takes its place (`recombine.Texts`); -1 for none.
        operators: uint16 [V] bit i: operator i changed something.
        changed: per side.
        edits: what was changed where; None where that is not asked for.
    """

    rows: IntArray
    iterations: IntArray
    side: IntArray
    exchanged: npt.NDArray[np.bool_]
    recombined: tuple[IntArray, ...]
    operators: npt.NDArray[np.uint16]
    changed: tuple[Changed, ...]
    edits: Edits | None = None


class RuleAugmenter:
    """Makes variants of examples.

    Args:
        rules: the configuration.
        pools: the vocabulary, and what `pos` draws from.
        seed: of all draws.
        mask_word: the number of the mask token in the vocabulary.
        candidates: of `synonym` and `neighbour`, per word of the vocabulary.
        places: of `mlm`, per side and place.
        recombine: the operator of that name, about the N examples that variants are made of.
        tagged: the tags of these, of a token task.
        mentions: operator `mention`, about the same.
        keep_tags: whether `Changed.tags` is wanted.
        keep_edits: whether `Variants.edits` is wanted.

    Attributes:
        counts: what was done so far: `words` seen, of every word operator words chosen under its name and those that
            stayed what they were as `<name>_identical`, texts changed as `sides`, windows cut as `ngram`, pairs turned
            round as `exchange` and pairs made anew as `recombine`; mentions like words.
    """

    def __init__(
        self,
        rules: Rules,
        pools: Pools,
        seed: int,
        *,
        mask_word: int,
        candidates: Mapping[str, Ragged] | None = None,
        places: Sequence[Ragged] = (),
        recombine: Recombine | None = None,
        tagged: Tagged | None = None,
        mentions: ReplaceMentions | None = None,
        keep_edits: bool = False,
        keep_tags: bool = False,
    ) -> None:
        self._rules = rules
        self._draws = Draws(seed, rules.config_hash)
        self._limits = np.cumsum([rules.probabilities[name] for name in WORD_OPERATORS])
        self._window = Window(rules.ngram)
        self._operators: dict[str, WordOperator] = {
            "mask": Mask(mask_word),
            "pos": ReplaceByPos(pools),
            "delete": Delete(),
            **{name: ReplaceByCandidate(rows) for name, rows in (candidates or {}).items()},
        }
        self._by_place = [ReplaceByCandidate(rows, by_place=True) for rows in places]
        self._recombine = recombine
        self._tagged = tagged
        self._mentions = mentions
        self._keep_tags = keep_tags
        self._keep_edits = keep_edits
        self.counts: Counter[str] = Counter()

    def variants(
        self, example_ids: Sequence[bytes], texts: Sequence[Ragged], num_variants: int, *, of: range | None = None
    ) -> Variants:
        """Iterations 0 .. num_variants - 1 of examples, one example after another.

        Args:
            example_ids: N ids.
            texts: one or two sides of N rows of words.
            num_variants: per example.
            of: which of the N examples; all when not given.
        """
        chosen = range(len(example_ids)) if of is None else of
        rows = np.repeat(np.asarray(chosen, dtype=np.int64), num_variants)
        iterations = np.tile(np.arange(num_variants), len(chosen))
        lengths = [text.lengths[rows] for text in texts]
        ends = TEXT_DRAWS + sum(2 * length + WINDOW_DRAWS for length in lengths)
        counts = ends if self._recombine is None else ends + RECOMBINE_DRAWS
        counts = counts if self._mentions is None else counts + self._mentions.num_draws(rows)
        repeated = [example_ids[row] for row in chosen for _ in range(num_variants)]
        draws, starts = self._draws.of(repeated, iterations.tolist(), np.asarray(counts))
        operators = np.zeros(len(rows), dtype=np.uint16)
        edits = Edits() if self._keep_edits else None
        side, exchanged = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=bool)
        if len(texts) == 2:
            side = sides(iterations, self._rules.pair_sides, draws[starts])
            exchanged = draws[starts + 1] < self._rules.exchange
            operators |= (exchanged << _EXCHANGE).astype(np.uint16)
            self.counts["exchange"] += int(exchanged.sum())
            if edits is not None:
                edits.note(np.flatnonzero(exchanged), WHOLE, WHOLE, _EXCHANGE)
        recombined = [np.full(len(rows), -1)] * len(texts)
        if self._recombine is not None:
            recombined = self._recombine.texts(rows, side, draws[(starts + ends)[:, None] + np.arange(RECOMBINE_DRAWS)])
            is_new_pair = np.logical_or.reduce([others >= 0 for others in recombined])
            operators |= (is_new_pair << _RECOMBINE).astype(np.uint16)
            self.counts["recombine"] += int(is_new_pair.sum())
            for number, others in enumerate(recombined):
                if edits is not None:
                    edits.note(np.flatnonzero(others >= 0), number, WHOLE, _RECOMBINE)
        starts = starts + TEXT_DRAWS
        changed = []
        for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            is_chosen = np.ones(len(rows), dtype=bool) if len(texts) == 1 else (side == number) | (side == 2)
            is_chosen &= recombined[number] < 0
            changed.append(self._changed(number, text, rows, is_chosen, draws, starts, operators, edits))
            starts = starts + 2 * length + WINDOW_DRAWS
        return Variants(rows, iterations, side, exchanged, tuple(recombined), operators, tuple(changed), edits)

    def _changed(
        self,
        side: int,
        text: Ragged,
        rows: IntArray,
        is_chosen: npt.NDArray[np.bool_],
        draws: FloatArray,
        starts: IntArray,
        operators: npt.NDArray[np.uint16],
        edits: Edits | None,
    ) -> Changed:
        """One side of the variants that `is_chosen` names; sets the bits of what changed them in `operators`, and notes
        the places in `edits`."""
        lengths = np.where(is_chosen, text.lengths[rows], 0)
        offsets = offsets_of(lengths)
        variant = np.repeat(np.arange(len(rows)), lengths)
        deciding = draws[ranges(starts, lengths)]
        choosing = draws[ranges(starts + lengths, lengths)]
        places = ranges(text.offsets[rows], lengths)
        old = text.values[places]
        new = old.copy()
        chosen = np.searchsorted(self._limits, deciding, side="right")
        if self._tagged is not None:
            chosen[self._tagged.in_mention[places] & _REPLACES[chosen]] = _KEEP
        self.counts["words"] += len(old)
        self.counts["sides"] += int(is_chosen.sum())

        def count(number: int, at: IntArray) -> None:
            """Count what an operator was to change, and mark the variants it did change."""
            name, is_other = OPERATORS[number], new[at] != old[at]
            self.counts[name] += len(at)
            self.counts[f"{name}_identical"] += len(at) - int(is_other.sum())
            operators[variant[at[is_other]]] |= np.uint16(1 << number)

        def note(number: int, at: IntArray) -> None:
            """Note what an operator changed, if anybody wants to know."""
            if edits is not None:
                edits.note(variant[at], side, at - offsets[variant[at]], number)

        if self._mentions is not None:
            spans, first = self._mentions.spans, starts + 2 * text.lengths[rows] + WINDOW_DRAWS
            which, span, entries = self._mentions.choose(rows, draws, first)
            at = offsets[which] + spans.starts[span] - text.offsets[rows[which]]
            size = (spans.ends - spans.starts)[span]
            chosen[ranges(at, size)] = _KEEP
            is_other = entries != spans.entries[span]
            self.counts["mention"] += len(at)
            self.counts["mention_identical"] += len(at) - int(is_other.sum())
            operators[which[is_other]] |= np.uint16(1 << _MENTION)
            at, changed = at[is_other], ranges(at[is_other], size[is_other])
            new[changed] = DELETED
            new[at] = number_of(entries[is_other])
            note(_MENTION, changed)

        for number, name in enumerate(WORD_OPERATORS[:_SWAP]):
            at = np.flatnonzero(chosen == number)
            if not len(at):
                continue
            operator = self._by_place[side] if name == "mlm" else self._operators[name]
            new[at] = operator.replace(old[at], places[at], choosing[at])
            count(number, at)
            note(number, at[new[at] != old[at]])
        at = np.flatnonzero(chosen == _SWAP)
        partners = offsets[variant[at]] + (choosing[at] * lengths[variant[at]]).astype(np.int64)
        before = new.copy() if edits is not None else new
        trade_places(new, at, partners, variant[at])
        origin = np.arange(len(new) if self._keep_tags else 0)
        if self._keep_tags:
            trade_places(origin, at, partners, variant[at])
        count(_SWAP, at)
        note(_SWAP, np.flatnonzero(new != before))

        num_new = np.bincount(variant[new != old], minlength=len(rows))
        is_new, all_new = num_new > 0, (num_new == lengths) & (num_new > 0)
        kept = np.flatnonzero(new != DELETED)
        words = new[kept]
        if self._mentions is not None:
            words, items = self._mentions.spelled_out(words)
            kept = kept[items]
        lengths = np.bincount(variant[kept], minlength=len(rows))
        window = draws[(starts + 2 * text.lengths[rows])[:, None] + np.arange(WINDOW_DRAWS)]
        first, last = self._window.bounds(lengths, window)
        is_cut = is_chosen & (last - first < lengths)
        first, last = np.where(is_chosen, first, 0), np.where(is_chosen, last, 0)
        operators[is_cut] |= np.uint16(1 << _NGRAM)
        self.counts["ngram"] += int(is_cut.sum())
        inside = ranges(offsets_of(lengths)[:-1] + first, last - first)
        if edits is not None:
            note(_NGRAM, np.setdiff1d(kept, kept[inside]))
        made = Ragged.from_lengths(words[inside], last - first)
        tags = None
        if self._keep_tags:
            tags = self._tags(new[kept[inside]], places[origin[kept[inside]]], kept[inside], made)
        return Changed(made, is_new | is_cut, all_new, tags)

    def _tags(self, items: IntArray, places: IntArray, slots: IntArray, words: Ragged) -> Ragged:
        """The tags of the words of variants.

        Args:
            items: int64 [W] the number that each word comes of, below `DELETED` for a mention.
            places: int64 [W] the place among the words of all texts that it comes from.
            slots: int64 [W] a number that the words of one item share.
            words: the words.
        """
        assert self._tagged is not None
        values, bio = self._tagged.tags.values[places], self._tagged.bio
        if self._mentions is not None and bio is not None:
            at = np.flatnonzero(items < DELETED)
            types = self._mentions.mentions.pools.tags[entry_of(items[at])]
            is_first = np.ones(len(slots), bool)
            is_first[1:] = slots[1:] != slots[:-1]
            values[at] = np.where(is_first[at], bio.begin[types], bio.inside[types])
        tags = Ragged(values, words.offsets)
        return tags if bio is None else rebuilt(tags, bio)
