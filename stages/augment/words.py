"""The one word tokeniser of the project: a regular expression.

It splits what POS tagging, the rule operators and word-level students call words. The pattern means the same in the
`regex` module used here and in Oniguruma, which the `tokenizers` library uses: `tokenizers.Regex(WORD_PATTERN)` with
`pre_tokenizers.Split(..., behavior="removed", invert=True)` gives the same words, as long as both know the characters
(each has the Unicode tables of its version).

Laws: a word holds no white space, and splitting words joined by single spaces gives the same words again.
"""

from __future__ import annotations

from collections.abc import Callable

import regex

WORDS_VERSION = "1"
"""Raised when the pattern changes: it is part of the format of augmented corpora and of word vocabularies."""

_WORD_CHARACTERS = r"[\p{L}\p{M}\p{N}_]"
WORD_PATTERN = "|".join(
    (
        r"\[MASK\]|<mask>",  # mask tokens stay whole
        r"https?://[^\p{Z}\p{C}]+",
        r"-[lr][rcs]b-",  # the brackets of Penn Treebank text
        r"(?:\p{L}\.){2,}(?![\p{L}\p{M}\p{N}_])",  # U.S.
        # don't, well-known, 1,000.50, 7:30, @user, #tag
        rf"[@#]?{_WORD_CHARACTERS}+(?:['’-]{_WORD_CHARACTERS}+|(?<=\p{{N}})[.,:/](?=\p{{N}}){_WORD_CHARACTERS}+)*",
        rf"['’](?:s|d|m|t|re|ve|ll|em)(?!{_WORD_CHARACTERS})",  # clitics that the source split off
        r"\.{2,}|-{2,}|`{2}|'{2}",
        r"[\p{P}\p{S}]",
    )
)

_words = regex.compile(WORD_PATTERN)
_find_words = _words.findall


def split_words(text: str) -> list[str]:
    """The words of `text`, in order; punctuation marks are words.

    >>> split_words("I don't know, really?")
    ['I', "don't", 'know', ',', 'really', '?']
    """
    return _find_words(text)  # type: ignore[no-any-return]


def word_ends(text: str) -> list[int]:
    """Where each of the words of `text` ends.

    >>> word_ends("Well, yes")
    [4, 5, 9]
    """
    return [found.end() for found in _words.finditer(text)]


def splitter(task: str) -> Callable[[str], list[str]]:
    """What splits the texts of a corpus into words: those of a token task are joined by single spaces."""
    return _given_words if task == "token" else split_words


def _given_words(text: str) -> list[str]:
    return text.split(" ")
