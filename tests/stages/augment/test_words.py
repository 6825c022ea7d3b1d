"""The word tokeniser: what a word is, its two laws, and that `tokenizers` agrees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.stages.augment.words import WORD_PATTERN, split_words

# Characters that Python 3.11 does not know yet are newer than one of the two libraries, or both.
TEXTS = st.text(st.characters(exclude_categories=("Cn", "Cs"))) | st.text(
    alphabet="ab.'’-1@#:/[]<>MASK`,_lrbs é\u0301\u200b\n😀北htps\x1f\xa0", max_size=40
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I don't know, really?", ["I", "don't", "know", ",", "really", "?"]),
        ("the movie 's n't", ["the", "movie", "'s", "n't"]),
        ("-lrb- 3.5 -rrb- ...", ["-lrb-", "3.5", "-rrb-", "..."]),
        ("a well-known 1,000.50 at 7:30", ["a", "well-known", "1,000.50", "at", "7:30"]),
        ("@user #tag C#", ["@user", "#tag", "C", "#"]),
        ("U.S. troops, e.g. A.", ["U.S.", "troops", ",", "e.g.", "A", "."]),
        ("see https://t.co/ab?c=d now", ["see", "https://t.co/ab?c=d", "now"]),
        ("a [MASK] b <mask>.", ["a", "[MASK]", "b", "<mask>", "."]),
        ("[mask]", ["[", "mask", "]"]),
        ("``ok'' -- yes", ["``", "ok", "''", "--", "yes"]),
        ("cafe\u0301 naïve 😀😀", ["cafe\u0301", "naïve", "😀", "😀"]),
        (" \t\n", []),
        ("", []),
    ],
)
def test_words_by_hand(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_words_joined_by_spaces_split_into_the_same_words(text: str) -> None:
    words = split_words(text)
    assert split_words(" ".join(words)) == words
    assert not any(character.isspace() for word in words for character in word)


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_the_tokenizers_library_finds_the_same_words(text: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    assert [word for word, _ in split.pre_tokenize_str(text)] == split_words(text)


@given(TEXTS)
def test_nothing_but_white_space_and_controls_is_lost(text: str) -> None:
    import regex

    assert "".join(split_words(text)) == regex.sub(r"[\p{Z}\p{C}]", "", text) or "://" in text
