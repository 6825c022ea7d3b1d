"""The script that a text is written in, as far as Unicode's names of its letters tell."""

from __future__ import annotations

import unicodedata
from collections import Counter

_EAST_ASIAN = frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"})
"""Japanese mixes them, and which of them prevails says nothing."""


def main_script(text: str) -> str | None:
    """The script of most letters of a text, by the first word of their Unicode names; None without letters.

    >>> main_script("a good film, 1999"), main_script("фильм (film)"), main_script("良い映画"), main_script("42!")
    ('LATIN', 'CYRILLIC', 'CJK', None)
    """
    counts: Counter[str] = Counter()
    for letter, count in Counter(unicodedata.normalize("NFKC", text)).items():
        if letter.isalpha():
            name = unicodedata.name(letter, "UNNAMED").split()[0]
            counts["CJK" if name in _EAST_ASIAN else name] += count
    return min(counts, key=lambda name: (-counts[name], name), default=None)
