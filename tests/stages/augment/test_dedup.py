"""When texts count as the same, and which of equal variants stays."""

from __future__ import annotations

import numpy as np
import pytest

from kd.stages.augment.dedup import compare, forbidden_keys, text_keys


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I pay?", "how do i  pay ?"),
        ("cafe\u0301", "Café"),
        ("Straße", "STRASSE"),
        ("a\tb\n", "a b"),
    ],
)
def test_case_spacing_and_unicode_form_do_not_make_texts_different(one: str, other: str) -> None:
    assert text_keys([one]) == text_keys([other])


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("a", "a ."), ("\u200b", ""), ("\x01", "\x02")])
def test_other_words_make_other_texts(one: str, other: str) -> None:
    assert text_keys([one]) != text_keys([other])


def test_pairs_are_compared_as_pairs() -> None:
    assert text_keys(["a"], ["b c"]) != text_keys(["a b"], ["c"])
    assert text_keys(["a"], ["b"]) != text_keys(["b"], ["a"])


def test_a_forbidden_pair_is_forbidden_both_ways_round() -> None:
    forbidden = forbidden_keys(["a", "c"], ["b", "d"])
    assert {*text_keys(["b"], ["a"]), *text_keys(["c"], ["d"])} <= forbidden
    assert not {*text_keys(["a"], ["d"])} & forbidden


def test_the_smallest_parent_and_iteration_stays_whatever_the_order() -> None:
    keys = np.array([b"k" * 16, b"k" * 16, b"k" * 16, b"m" * 16, b"o" * 16], dtype="S16")
    parents = np.array([b"p2", b"p1", b"p1", b"p9", b"p1"], dtype="S16")
    iterations = np.array([0, 2, 1, 0, 0])
    for order in (np.arange(5), np.array([4, 2, 0, 3, 1]), np.arange(5)[::-1]):
        same, duplicate = compare(keys[order], parents[order], iterations[order], np.array([b"o" * 16], dtype="S16"))
        assert same.tolist() == (order == 4).tolist()
        assert (~(same | duplicate)).tolist() == np.isin(order, [2, 3]).tolist()


def test_nothing_compared_is_nothing_dropped() -> None:
    empty = np.array([], dtype="S16")
    same, duplicate = compare(empty, empty, np.array([], dtype=np.int16), empty)
    assert (len(same), len(duplicate)) == (0, 0)
