"""When two texts count as the same, and which of several equal variants stays.

Texts are the same when their words are, without regard to case, spacing and Unicode form: that is what an uncased
teacher sees, and for a check against test data it is better to find too much than too little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from ..corpus.schema import normalised
from .words import split_words

Split = Callable[[str], list[str]]


def joined(text: str, words: Sequence[str] | None = None, split: Split = split_words) -> str:
    """The text as it counts for equality; `words`, if known, are its words."""
    found = split(text) if words is None else words
    return normalised(" ".join(found or text.split())).casefold()


def text_key(joined_a: str, joined_b: str | None = None) -> bytes:
    """16 bytes: BLAKE2b-128 of one or two texts that `joined` made."""
    content = joined_a if joined_b is None else f"{joined_a}\x1f{joined_b}"
    return blake2b(content.encode(), digest_size=16).digest()


def text_keys(texts_a: Sequence[str], texts_b: Sequence[str] | None = None, split: Split = split_words) -> list[bytes]:
    """The key of every row; `split` gives the words of a text."""
    if texts_b is None:
        return [text_key(joined(text, split=split)) for text in texts_a]
    return [text_key(joined(a, split=split), joined(b, split=split)) for a, b in zip(texts_a, texts_b, strict=True)]


def forbidden_keys(
    texts_a: Sequence[str], texts_b: Sequence[str] | None = None, split: Split = split_words
) -> set[bytes]:
    """The keys that training text may not have; of a pair also that of its two texts the other way round."""
    keys = set(text_keys(texts_a, texts_b, split))
    return keys if texts_b is None else keys | set(text_keys(texts_b, texts_a))


def compare(
    keys: np.ndarray, parent_ids: np.ndarray, iterations: np.ndarray, original_keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`(same_as_original, duplicate)`: bool [N] each, which variants equal an original and which another variant.

    Among equal variants the one with the smallest (parent_id, iteration) is no duplicate, wherever and in whatever
    order they were made.

    Args:
        keys: S16 [N] text keys of the variants.
        parent_ids: S16 [N].
        iterations: int [N].
        original_keys: S16 [M] text keys of the originals.
    """
    same = np.isin(keys, original_keys)
    rest = np.flatnonzero(~same)
    order = rest[np.lexsort((iterations[rest], parent_ids[rest], keys[rest]))]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = keys[order][1:] == keys[order][:-1]
    duplicate = np.zeros(len(keys), dtype=bool)
    duplicate[order[again]] = True
    return same, duplicate
