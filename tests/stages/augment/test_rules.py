"""The operators against an independent oracle, their rates, and what they may depend on."""

from __future__ import annotations

import math
import random
import struct
from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest

from kd.pipeline.ragged import Ragged
from kd.stages.augment.draws import Draws
from kd.stages.augment.ngram import Window
from kd.stages.augment.operators import OPERATORS, WORD_OPERATORS
from kd.stages.augment.pools import Pools
from kd.stages.augment.rules import RuleAugmenter, Rules

WORDS = [f"w{i}" for i in range(60)]
NUM_TAGS = 5
TANG = Rules(mask=0.1, pos=0.1, ngram=0.25)
Example = tuple[bytes, list[list[str]]]


def make_example(number: int, *, pair: bool = False, length: int | None = None) -> Example:
    rng = random.Random(number)
    sides = [
        [rng.choice(WORDS) for _ in range(rng.randrange(1, 20) if length is None else length)] for _ in range(1 + pair)
    ]
    return blake2b(b"%d" % number, digest_size=16).digest(), sides


def tag_of(word: str) -> int:
    return int(word[1:]) % NUM_TAGS


def make_pools(examples: list[Example]) -> Pools:
    """Pools of these examples; all other words are known too, and never drawn."""
    counts = Counter({(tag_of(word), word): 0 for word in WORDS})
    counts.update((tag_of(word), word) for _, sides in examples for side in sides for word in side)
    return Pools.of(counts)


def make_augmenter(rules: Rules, pools: Pools, seed: int = 1, **fields: Any) -> RuleAugmenter:
    return RuleAugmenter(rules, pools, seed, mask_word=len(pools.words), **fields)


def numbered(examples: list[Example], pools: Pools) -> list[Ragged]:
    columns = zip(*(sides for _, sides in examples), strict=True)
    return [
        Ragged.from_rows([[pools.numbers[tag_of(word), word] for word in side] for side in column], "int64")
        for column in columns
    ]


Made = list[tuple[list[list[str] | None], str, bool]]


def made(augmenter: RuleAugmenter, examples: list[Example], pools: Pools, count: int, names: list[str]) -> Made:
    """Per variant: the words of each side or None where they are the original's, the operators, whether exchanged."""
    variants = augmenter.variants([number for number, _ in examples], numbered(examples, pools), count)
    result: Made = []
    for i in range(len(variants.rows)):
        assert (variants.rows[i], variants.iterations[i]) == divmod(i, count)
        sides = [[names[n] for n in side.words[i]] if side.is_new[i] else None for side in variants.changed]
        bits = int(variants.operators[i])
        used = "+".join(name for k, name in enumerate(OPERATORS) if bits >> k & 1)
        result.append((sides, used, bool(variants.exchanged[i])))
    return result


def draws_of(example_id: bytes, iteration: int, seed: int, rules: Rules, count: int) -> list[float]:
    key = blake2b(
        struct.pack("<q", seed) + rules.config_hash + example_id + struct.pack("<I", iteration), digest_size=16
    ).digest()
    numbers = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)
    return numbers.tolist()  # type: ignore[no-any-return]


def oracle(
    example: Example, iteration: int, seed: int, rules: Rules, pool: dict[int, list[str]], others: dict[str, list[str]]
) -> tuple[list[list[str]], bool]:
    """The sides of a variant and whether they trade places, in plain Python from numpy's own generator."""
    example_id, sides = example
    draws = draws_of(example_id, iteration, seed, rules, 2 + sum(2 * len(side) + 3 for side in sides))
    which = {"cycle": iteration % 3, "alternate": iteration % 2, "random": math.floor(draws[0] * 3)}[rules.pair_sides]
    place, result = 2, []
    for number, side in enumerate(sides):
        n = len(side)
        xs, ys, window = draws[place : place + n], draws[place + n : place + 2 * n], draws[place + 2 * n :][:3]
        place += 2 * n + 3
        if len(sides) == 2 and which not in (number, 2):
            result.append(side)
            continue
        new: list[str | None] = []
        swaps = []
        for i, (word, x, y) in enumerate(zip(side, xs, ys, strict=True)):
            chosen, limit = None, 0.0
            for name in WORD_OPERATORS:
                limit += getattr(rules, name)
                if x < limit:
                    chosen = name
                    break
            replaced: str | None = word
            if chosen == "mask":
                replaced = rules.mask_token
            elif chosen == "pos" and pool.get(tag_of(word)):
                replaced = pool[tag_of(word)][math.floor(y * len(pool[tag_of(word)]))]
            elif chosen == "neighbour" and others.get(word):
                replaced = others[word][math.floor(y * len(others[word]))]
            elif chosen == "delete":
                replaced = None
            elif chosen == "swap":
                swaps.append((i, math.floor(y * n)))
            new.append(replaced)
        for i, j in swaps:
            new[i], new[j] = new[j], new[i]
        words = [word for word in new if word is not None]
        length = 1 + math.floor(window[1] * 5)
        if window[0] < rules.ngram and length < len(words):
            start = math.floor(window[2] * (len(words) - length + 1))
            words = words[start : start + length]
        result.append(words)
    return result, len(sides) == 2 and draws[1] < rules.exchange


@pytest.mark.parametrize("pair_sides", ["single", "cycle", "alternate", "random"])
def test_an_independent_oracle_agrees_on_a_thousand_texts(pair_sides: str) -> None:
    pair = pair_sides != "single"
    examples = [make_example(i, pair=pair) for i in range(250)]
    probabilities = {"mask": 0.1, "pos": 0.2, "neighbour": 0.1, "delete": 0.1, "swap": 0.1, "ngram": 0.5}
    rules = Rules(**probabilities, exchange=0.4 if pair else 0.0, pair_sides=pair_sides if pair else "cycle")
    in_pools = [(i, [[w for w in side if tag_of(w) != 2] for side in sides]) for i, sides in examples[:200]]
    pools = make_pools(in_pools)
    pool: dict[int, list[str]] = {}
    for _, sides in in_pools:
        for word in (word for side in sides for word in side):
            pool.setdefault(tag_of(word), []).append(word)
    pool = {tag: sorted(words) for tag, words in pool.items()}
    others = {word: [f"{word}-{k}" for k in range(int(word[1:]) % 4)] for word in WORDS}
    names = [*pools.words, "[MASK]", *(other for word in pools.words for other in others[word])]
    lengths = [len(others[word]) for word in pools.words]
    candidates = Ragged.from_lengths(np.arange(len(pools.words) + 1, len(names)), lengths)
    augmenter = make_augmenter(rules, pools, 7, candidates={"neighbour": candidates})
    for i, (sides, used, exchanged) in enumerate(made(augmenter, examples, pools, 4, names)):
        example = examples[i // 4]
        found = [old if new is None else new for old, new in zip(example[1], sides, strict=True)]
        assert (found, exchanged) == oracle(example, i % 4, 7, rules, pool, others)
        assert bool(used) or (found == example[1] and not exchanged)


def test_variants_follow_from_seed_configuration_id_and_iteration_alone() -> None:
    examples = [make_example(i) for i in range(50)]
    pools = make_pools(examples)
    names = [*pools.words, "[MASK]"]
    forward = made(make_augmenter(TANG, pools), examples, pools, 5, names)
    backward = made(make_augmenter(TANG, pools), examples[::-1], pools, 3, names)
    for i in range(50):
        assert forward[5 * i : 5 * i + 3] == backward[3 * (49 - i) : 3 * (50 - i)]


def test_some_of_the_examples_have_the_variants_they_have_among_all() -> None:
    examples = [make_example(i) for i in range(9)]
    pools = make_pools(examples)
    ids, texts = [number for number, _ in examples], numbered(examples, pools)
    together = make_augmenter(TANG, pools).variants(ids, texts, 4)
    part = make_augmenter(TANG, pools).variants(ids, texts, 4, of=range(3, 6))
    assert part.rows.tolist() == together.rows[12:24].tolist()
    assert [part.changed[0].words[i].tolist() for i in range(12)] == [
        together.changed[0].words[i].tolist() for i in range(12, 24)
    ]


def test_another_seed_or_configuration_gives_other_variants() -> None:
    examples = [make_example(1, length=200)]
    pools = make_pools(examples)
    names = [*pools.words, "[MASK]"]

    def first(rules: Rules, seed: int) -> Any:
        return made(make_augmenter(rules, pools, seed), examples, pools, 1, names)[0]

    reference = first(Rules(mask=0.1, pos=0.1), 1)
    assert first(Rules(mask=0.1, pos=0.1), 1) == reference
    assert first(Rules(mask=0.1, pos=0.1), -1) != reference
    assert first(Rules(mask=0.1, pos=0.1, ngram=1e-9), 1) != reference


def test_an_unrelated_example_with_frozen_pools_changes_nothing() -> None:
    examples = [make_example(i) for i in range(20)]
    pools = make_pools(examples)
    names = [*pools.words, "[MASK]"]
    alone = made(make_augmenter(TANG, pools), examples, pools, 3, names)
    together = made(make_augmenter(TANG, pools), [make_example(99), *examples], pools, 3, names)
    assert together[3:] == alone


def test_with_all_probabilities_zero_nothing_changes() -> None:
    for pair in (False, True):
        examples = [make_example(3, pair=pair)]
        pools = make_pools(examples)
        for sides, used, exchanged in made(make_augmenter(Rules(), pools), examples, pools, 9, [*pools.words]):
            assert (sides, used, exchanged) == ([None] * (1 + pair), "", False)


def test_with_mask_probability_one_everything_is_masked() -> None:
    examples = [make_example(3, length=7)]
    pools = make_pools(examples)
    augmenter = make_augmenter(Rules(mask=1.0), pools)
    for sides, used, _ in made(augmenter, examples, pools, 5, [*pools.words, "<mask>"]):
        assert (sides, used) == ([["<mask>"] * 7], "mask")


def test_with_delete_probability_one_nothing_is_left() -> None:
    examples = [make_example(3, length=7)]
    pools = make_pools(examples)
    assert (
        made(make_augmenter(Rules(delete=1.0), pools), examples, pools, 2, [*pools.words])
        == [([[]], "delete", False)] * 2
    )


def test_swapped_words_are_all_still_there() -> None:
    examples = [make_example(i, length=8) for i in range(30)]
    pools = make_pools(examples)
    found = made(make_augmenter(Rules(swap=0.5), pools), examples, pools, 2, [*pools.words])
    assert sum(sides[0] is not None for sides, _, _ in found) > 50
    for i, (sides, _, _) in enumerate(found):
        assert sides[0] is None or sorted(sides[0]) == sorted(examples[i // 2][1][0])


def test_rates_are_those_asked_for() -> None:
    """Over a million words; bounds are five standard errors."""
    examples = [make_example(i, length=100) for i in range(1000)]
    pools = make_pools(examples)
    rules = Rules(mask=0.1, pos=0.1, delete=0.05, swap=0.02, ngram=0.25)
    augmenter = make_augmenter(rules, pools, 3)
    augmenter.variants([number for number, _ in examples], numbered(examples, pools), 10)
    counts = augmenter.counts
    words = counts["words"]
    assert words == 1_000_000
    for name in ("mask", "pos", "delete", "swap"):
        rate = rules.probabilities[name]
        assert abs(counts[name] / words - rate) < 5 * math.sqrt(rate * (1 - rate) / words), name
    assert abs(counts["ngram"] / counts["sides"] - 0.25) < 5 * math.sqrt(0.25 * 0.75 / counts["sides"])
    expected = pools.identical_rate()
    spread = math.sqrt(expected * (1 - expected) / counts["pos"])
    assert abs(counts["pos_identical"] / counts["pos"] - expected) < 5 * spread


@pytest.mark.parametrize(
    ("pair_sides", "order"), [("cycle", ["a", "b", "ab"] * 2), ("alternate", ["a", "b"] * 3), ("random", None)]
)
def test_pairs_change_sides_as_asked(pair_sides: str, order: list[str] | None) -> None:
    examples = [make_example(i, pair=True) for i in range(300)]
    pools = make_pools(examples)
    augmenter = make_augmenter(Rules(mask=1.0, pair_sides=pair_sides), pools)
    found = made(augmenter, examples, pools, 6, [*pools.words, "[MASK]"])
    changed = ["".join(name for name, side in zip("ab", sides, strict=True) if side) for sides, _, _ in found]
    if order is not None:
        assert changed == order * 300
    numbers = Counter(changed)
    if order is None:
        assert all(abs(numbers[name] - 600) < 5 * math.sqrt(1800 * 2 / 9) for name in ("a", "b", "ab"))


# Windows ---------------------------------------------------------------------------------------------------------


def windows(num_words: int, count: int) -> list[tuple[int, int]]:
    draws = np.random.default_rng(0).random((count, 3))
    first, last = Window(1.0).bounds(np.full(count, num_words), draws)
    return [*zip(first.tolist(), last.tolist(), strict=True)]


def chi_square(observed: list[int]) -> float:
    expected = sum(observed) / len(observed)
    return sum((number - expected) ** 2 / expected for number in observed)


def test_windows_of_long_texts_have_uniform_length_and_start() -> None:
    found = windows(12, 40_000)
    lengths = Counter(stop - start for start, stop in found)
    assert sorted(lengths) == [1, 2, 3, 4, 5]
    assert chi_square([*lengths.values()]) < 23.5  # 99.99 % quantile, 4 degrees of freedom
    starts = Counter(start for start, stop in found if stop - start == 3)
    assert sorted(starts) == [*range(10)]  # the last window is possible, unlike in castorini/d-bert
    assert chi_square([*starts.values()]) < 33.7  # 9 degrees of freedom


def test_a_window_as_long_as_the_text_keeps_it() -> None:
    assert windows(1, 50) == [(0, 1)] * 50
    assert {bounds for bounds in windows(3, 500) if bounds != (0, 3)} == {(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)}
    assert sum(bounds == (0, 3) for bounds in windows(3, 5000)) == pytest.approx(3000, abs=200)


# Draws and pools -------------------------------------------------------------------------------------------------


def test_a_draw_is_golden() -> None:
    """The format: changing these numbers means raising AUG_VERSION."""
    draws, starts = Draws(42, bytes(8)).of([bytes(16)], [0], np.array([3]))
    assert draws[:3].tolist() == [0.4190244114562418, 0.3720327977155926, 0.13221012504456076]
    assert starts.tolist() == [0]


def test_draws_are_those_of_numpy_for_every_variant_and_count() -> None:
    ids = [blake2b(b"%d" % i, digest_size=16).digest() for i in range(40)]
    counts = np.arange(40) % 11
    draws, starts = Draws(1, TANG.config_hash).of(ids, [*range(40)], counts)
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        assert draws[start : start + count].tolist() == draws_of(ids[i], i, 1, TANG, count)


def test_pools_are_drawn_from_as_often_as_words_occur() -> None:
    pools = Pools.of({(0, "rare"): 1, (0, "often"): 3, (1, "only"): 2, (2, "known"): 0})
    draws = np.array([0.0, 0.7499, 0.75, 0.9999999])
    assert [pools.words[i] for i in pools.draw(np.zeros(4, np.int64), draws)] == ["often", "often", "rare", "rare"]
    assert pools.draw(np.array([2, 3]), np.array([0.3, 0.3])).tolist() == [2, 3]
    assert pools.identical_rate() == pytest.approx((9 / 4 + 1 / 4 + 2) / 6)


def test_pools_do_not_depend_on_the_order_of_the_corpus() -> None:
    counts = {(i % 3, f"w{i}"): i + 1 for i in range(30)}
    backwards = dict(reversed(counts.items()))
    assert Pools.of(counts).digest == Pools.of(backwards).digest
    assert Pools.of({**counts, (0, "w0"): 2}).digest != Pools.of(counts).digest
