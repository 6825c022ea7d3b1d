"""The rule operators together: from the words of an example to those of a variant.

Draw order, part of the format (`AUG_VERSION`): the side of a pair, when it is drawn; then per changed side, for every
word one draw, which decides between the word operators (each owns a band of [0, 1), in the order mask, pos) and
keeping the word, followed by what the operator itself draws; after the words what the window draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...pipeline.fingerprint import fingerprint
from .draws import AUG_VERSION, Draws
from .mask import Mask
from .ngram import Window
from .pairs import side
from .pools import Pools
from .pos import ReplaceByPos
from .words import WORDS_VERSION


@dataclass(frozen=True)
class Example:
    """An original as the operators see it; `words_b` is None for single texts, tags are numbers of the tagger."""

    example_id: bytes
    words_a: Sequence[str]
    tags_a: Sequence[int]
    words_b: Sequence[str] | None = None
    tags_b: Sequence[int] = ()


@dataclass(frozen=True)
class Variant:
    """What became of an example. A side is None where its words are those of the original.

    Attributes:
        iteration: 0 .. num_variants - 1.
        side: "a", "b", "both", or None for single texts.
        words_a, words_b: the new words of a side that changed.
        all_masked: whether a changed side has nothing but mask tokens left.
    """

    iteration: int
    side: str | None
    words_a: list[str] | None
    words_b: list[str] | None
    all_masked: bool


@dataclass(frozen=True)
class Rules:
    """Configuration of the rule operators. A probability of 0 switches an operator off and draws the same numbers."""

    mask_probability: float = 0.1
    pos_probability: float = 0.1
    ngram_probability: float = 0.25
    mask_token: str = "[MASK]"
    pair_sides: str = "cycle"

    @cached_property
    def config_hash(self) -> bytes:
        """8 bytes: what of the configuration decides over a variant, seed and pools apart."""
        return bytes.fromhex(
            fingerprint(
                {
                    "aug_version": AUG_VERSION,
                    "words_version": WORDS_VERSION,
                    "mask": [self.mask_probability, self.mask_token],
                    "pos": self.pos_probability,
                    "ngram": self.ngram_probability,
                    "pair_sides": self.pair_sides,
                }
            )
        )[:8]


class RuleAugmenter:
    """Makes variants of examples.

    Attributes:
        counts: what was done so far: `words` seen, `mask` and `pos` words replaced, `pos_identical` of the latter by
            the same word, `sides` changed and `ngram` windows cut.
    """

    def __init__(self, rules: Rules, pools: Pools, seed: int) -> None:
        self._draws = Draws(seed, rules.config_hash)
        self._pair_sides = rules.pair_sides
        self._mask_token = rules.mask_token
        self._window = Window(rules.ngram_probability)
        self._mask = Mask(rules.mask_probability, rules.mask_token)
        self._pos = ReplaceByPos(rules.pos_probability, pools)
        self._mask_limit = rules.mask_probability
        self._pos_limit = rules.mask_probability + rules.pos_probability
        self.counts: Counter[str] = Counter()

    def variants(self, example: Example, num_variants: int) -> Iterator[Variant]:
        """Iterations 0 .. num_variants - 1 of an example."""
        words_b = example.words_b
        most = 2 * (len(example.words_a) + len(words_b or ())) + 7
        for iteration in range(num_variants):
            draw = iter(self._draws.of(example.example_id, iteration, most)).__next__
            if words_b is None:
                changed = self._changed(example.words_a, example.tags_a, draw)
                yield Variant(iteration, None, changed, None, self._is_masked(changed))
                continue
            which = side(iteration, self._pair_sides, draw)
            changed_a = self._changed(example.words_a, example.tags_a, draw) if which != "b" else None
            changed_b = self._changed(words_b, example.tags_b, draw) if which != "a" else None
            masked = self._is_masked(changed_a) or self._is_masked(changed_b)
            yield Variant(iteration, which, changed_a, changed_b, masked)

    def _changed(self, words: Sequence[str], tags: Sequence[int], draw: Callable[[], float]) -> list[str] | None:
        """The words after all operators; None when they are what they were."""
        mask_limit, pos_limit, counts = self._mask_limit, self._pos_limit, self.counts
        result = [*words]
        is_changed = False
        for position, word in enumerate(words):
            place = draw()
            if place < pos_limit:
                operator = self._mask if place < mask_limit else self._pos
                new = operator.replace(word, tags[position], draw)
                counts[operator.name] += 1
                if new != word:
                    result[position] = new
                    is_changed = True
                elif operator is self._pos:
                    counts["pos_identical"] += 1
        counts["words"] += len(words)
        counts["sides"] += 1
        bounds = self._window.bounds(len(words), draw)
        if bounds is not None:
            counts["ngram"] += 1
            return result[bounds[0] : bounds[1]]
        return result if is_changed else None

    def _is_masked(self, words: list[str] | None) -> bool:
        return words is not None and all(word == self._mask_token for word in words)
