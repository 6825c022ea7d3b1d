"""The rule operators against an independent oracle, their rates, and what they may depend on."""

from __future__ import annotations

import math
import random
import struct
from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest

from kd.stages.augment.draws import Draws
from kd.stages.augment.ngram import Window
from kd.stages.augment.pools import Pools
from kd.stages.augment.rules import Example, RuleAugmenter, Rules, Variant

WORDS = [f"w{i}" for i in range(60)]
NUM_TAGS = 5


def make_example(number: int, *, pair: bool = False, length: int | None = None) -> Example:
    rng = random.Random(number)

    def side() -> tuple[list[str], list[int]]:
        count = rng.randrange(1, 20) if length is None else length
        words = [rng.choice(WORDS) for _ in range(count)]
        return words, [hash_tag(word) for word in words]

    words_a, tags_a = side()
    words_b, tags_b = side() if pair else (None, ())
    return Example(blake2b(b"%d" % number, digest_size=16).digest(), words_a, tags_a, words_b, tags_b)


def hash_tag(word: str) -> int:
    return int(word[1:]) % NUM_TAGS


def make_pools(examples: list[Example]) -> Pools:
    counts: Counter[tuple[int, str]] = Counter()
    for example in examples:
        counts.update(zip(example.tags_a, example.words_a, strict=True))
        counts.update(zip(example.tags_b, example.words_b or (), strict=True))
    return Pools.of(counts)


def oracle(
    example: Example, iteration: int, seed: int, rules: Rules, all_words: dict[int, list[str]]
) -> tuple[list[str] | None, list[str] | None]:
    """Both sides of a variant, in plain Python: every occurrence in a sorted list, one numpy generator per variant."""
    key = blake2b(
        struct.pack("<q", seed) + rules.config_hash + example.example_id + struct.pack("<I", iteration), digest_size=16
    ).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    def changed(words: list[str], tags: list[int]) -> list[str]:
        result = []
        for word, tag in zip(words, tags, strict=True):
            x = rng.random()
            if x < rules.mask_probability:
                word = rules.mask_token
            elif x < rules.mask_probability + rules.pos_probability:
                pool = all_words.get(tag, [])
                place = rng.random()
                word = pool[math.floor(place * len(pool))] if pool else word
            result.append(word)
        if rng.random() < rules.ngram_probability:
            n, start = 1 + math.floor(rng.random() * 5), rng.random()
            if n < len(result):
                first = math.floor(start * (len(result) - n + 1))
                result = result[first : first + n]
        return result

    if example.words_b is None:
        return changed([*example.words_a], [*example.tags_a]), None
    if rules.pair_sides == "cycle":
        sides = ("a", "b", "ab")[iteration % 3]
    else:
        sides = ("a", "b", "ab")[math.floor(rng.random() * 3)]
    new_a = changed([*example.words_a], [*example.tags_a]) if "a" in sides else [*example.words_a]
    new_b = changed([*example.words_b], [*example.tags_b]) if "b" in sides else [*example.words_b]
    return new_a, new_b


def result(example: Example, variant: Variant) -> tuple[list[str] | None, list[str] | None]:
    new_a = [*example.words_a] if variant.words_a is None else variant.words_a
    return new_a, [*example.words_b] if variant.words_b is None and example.words_b is not None else variant.words_b


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("pair_sides", ["cycle", "random"])
def test_an_independent_oracle_agrees_on_a_thousand_texts(pair: bool, pair_sides: str) -> None:
    examples = [make_example(i, pair=pair) for i in range(250)]
    rules = Rules(mask_probability=0.2, pos_probability=0.3, ngram_probability=0.5, pair_sides=pair_sides)
    all_words: dict[int, list[str]] = {}
    for example in examples[:200]:
        for word in [*example.words_a, *(example.words_b or ())]:
            all_words.setdefault(hash_tag(word), []).append(word)
    all_words = {tag: sorted(words) for tag, words in all_words.items()}
    del all_words[2]
    pools = make_pools(examples[:200])
    pools = Pools({t: w for t, w in pools.words.items() if t != 2}, {t: n for t, n in pools.totals.items() if t != 2})
    augmenter = RuleAugmenter(rules, pools, seed=7)
    for example in examples:
        for variant in augmenter.variants(example, 4):
            assert result(example, variant) == oracle(example, variant.iteration, 7, rules, all_words)


def test_variants_follow_from_seed_configuration_id_and_iteration_alone() -> None:
    examples = [make_example(i) for i in range(50)]
    pools = make_pools(examples)
    forward = {
        (example.example_id, variant.iteration): variant
        for augmenter in [RuleAugmenter(Rules(), pools, 1)]
        for example in examples
        for variant in augmenter.variants(example, 5)
    }
    for example in reversed(examples):
        for variant in RuleAugmenter(Rules(), pools, 1).variants(example, 3):
            assert forward[example.example_id, variant.iteration] == variant


def test_another_seed_or_configuration_gives_other_variants() -> None:
    example = make_example(1, length=200)
    pools = make_pools([example])

    def first(rules: Rules, seed: int) -> list[str] | None:
        return next(RuleAugmenter(rules, pools, seed).variants(example, 1)).words_a

    reference = first(Rules(ngram_probability=0.0), 1)
    assert first(Rules(ngram_probability=0.0), 1) == reference
    assert first(Rules(ngram_probability=0.0), -1) != reference
    assert first(Rules(ngram_probability=1e-9), 1) != reference


def test_an_unrelated_example_with_frozen_pools_changes_nothing() -> None:
    examples = [make_example(i) for i in range(20)]
    pools = make_pools(examples)
    alone = [[*RuleAugmenter(Rules(), pools, 1).variants(example, 3)] for example in examples]
    augmenter = RuleAugmenter(Rules(), pools, 1)
    together = [[*augmenter.variants(example, 3)] for example in [make_example(99), *examples]]
    assert together[1:] == alone


def test_with_all_probabilities_zero_nothing_changes() -> None:
    augmenter = RuleAugmenter(Rules(mask_probability=0, pos_probability=0, ngram_probability=0), Pools({}, {}), 0)
    for pair in (False, True):
        for variant in augmenter.variants(make_example(3, pair=pair), 9):
            assert (variant.words_a, variant.words_b, variant.all_masked) == (None, None, False)


def test_with_mask_probability_one_everything_is_masked() -> None:
    rules = Rules(mask_probability=1.0, pos_probability=0.0, ngram_probability=0.0, mask_token="<mask>")
    for variant in RuleAugmenter(rules, Pools({}, {}), 0).variants(make_example(3, length=7), 5):
        assert (variant.words_a, variant.all_masked) == (["<mask>"] * 7, True)


def test_rates_are_those_asked_for() -> None:
    """Over a million words; bounds are five standard errors."""
    examples = [make_example(i, length=100) for i in range(1000)]
    pools = make_pools(examples)
    augmenter = RuleAugmenter(Rules(), pools, seed=3)
    for example in examples:
        for _ in augmenter.variants(example, 10):
            pass
    counts = augmenter.counts
    words = counts["words"]
    assert words == 1_000_000
    bound = 5 * math.sqrt(0.1 * 0.9 / words)
    assert abs(counts["mask"] / words - 0.1) < bound
    assert abs(counts["pos"] / words - 0.1) < bound
    assert abs(counts["ngram"] / counts["sides"] - 0.25) < 5 * math.sqrt(0.25 * 0.75 / counts["sides"])
    expected = pools.identical_rate()
    spread = math.sqrt(expected * (1 - expected) / counts["pos"])
    assert abs(counts["pos_identical"] / counts["pos"] - expected) < 5 * spread


def test_pairs_change_first_second_and_both_in_turn() -> None:
    rules = Rules(mask_probability=1.0, pos_probability=0.0)
    variants = [*RuleAugmenter(rules, Pools({}, {}), 0).variants(make_example(1, pair=True), 6)]
    assert [v.side for v in variants] == ["a", "b", "both"] * 2
    assert [(v.words_a is None, v.words_b is None) for v in variants[:3]] == [
        (False, True),
        (True, False),
        (False, False),
    ]


def test_pairs_change_sides_by_chance_when_asked() -> None:
    rules = Rules(pair_sides="random")
    augmenter = RuleAugmenter(rules, Pools({}, {}), 0)
    sides = Counter(v.side for i in range(300) for v in augmenter.variants(make_example(i, pair=True), 10))
    assert set(sides) == {"a", "b", "both"}
    assert all(abs(number - 1000) < 5 * math.sqrt(3000 * 2 / 9) for number in sides.values())


# Windows ---------------------------------------------------------------------------------------------------------


def windows(num_words: int, count: int) -> list[tuple[int, int] | None]:
    rng = random.Random(0)
    return [Window(1.0).bounds(num_words, rng.random) for _ in range(count)]


def chi_square(observed: list[int]) -> float:
    expected = sum(observed) / len(observed)
    return sum((number - expected) ** 2 / expected for number in observed)


def test_windows_of_long_texts_have_uniform_length_and_start() -> None:
    found = [bounds for bounds in windows(12, 40_000) if bounds is not None]
    assert len(found) == 40_000
    lengths = Counter(stop - start for start, stop in found)
    assert sorted(lengths) == [1, 2, 3, 4, 5]
    assert chi_square([*lengths.values()]) < 23.5  # 99.99 % quantile, 4 degrees of freedom
    starts = Counter(start for start, stop in found if stop - start == 3)
    assert sorted(starts) == [*range(10)]  # the last window is possible, unlike in castorini/d-bert
    assert chi_square([*starts.values()]) < 33.7  # 9 degrees of freedom


def test_a_window_as_long_as_the_text_keeps_it() -> None:
    assert windows(1, 50) == [None] * 50
    assert {bounds for bounds in windows(3, 500) if bounds} == {(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)}
    assert sum(bounds is None for bounds in windows(3, 5000)) == pytest.approx(3000, abs=200)


# Draws and pools -------------------------------------------------------------------------------------------------


def test_a_draw_is_golden() -> None:
    """The format: changing these numbers means raising AUG_VERSION."""
    assert Draws(42, bytes(8)).of(bytes(16), 0, 3) == [0.4190244114562418, 0.3720327977155926, 0.13221012504456076]


def test_draws_do_not_depend_on_how_many_are_taken_or_what_came_before() -> None:
    draws = Draws(1, b"12345678")
    long = draws.of(b"a" * 16, 0, 100)
    draws.of(b"b" * 16, 0, 7)
    assert draws.of(b"a" * 16, 0, 10) == long[:10]
    assert draws.of(b"a" * 16, 1, 10) != long[:10]


def test_pools_are_drawn_from_as_often_as_words_occur() -> None:
    pools = Pools.of({(0, "rare"): 1, (0, "often"): 3, (1, "only"): 2})
    assert [pools.word(0, draw) for draw in (0.0, 0.7499, 0.75, 0.9999999)] == ["often", "often", "rare", "rare"]
    assert (pools.word(1, 0.3), pools.word(2, 0.3)) == ("only", None)
    assert pools.identical_rate() == pytest.approx((9 / 4 + 1 / 4 + 2) / 6)


def test_pools_do_not_depend_on_the_order_of_the_corpus() -> None:
    counts = {(i % 3, f"w{i}"): i + 1 for i in range(30)}
    backwards = dict(reversed(counts.items()))
    assert Pools.of(counts) == Pools.of(backwards)
    assert Pools.of(counts).digest == Pools.of(backwards).digest
    assert Pools.of({**counts, (0, "w0"): 2}).digest != Pools.of(counts).digest
