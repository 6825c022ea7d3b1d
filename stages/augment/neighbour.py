"""Operator `neighbour`: a word becomes one of those nearest to it in the word table of a checkpoint.

TinyBERT (Jiao et al., 2020) takes GloVe for words of several pieces; here the table is the teacher's own, so nothing
more is needed than the teacher. A word's vector is the mean over its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .candidates import cased_like, is_content_word
from .vocabulary import whole_words, word_pieces

BLOCK = 512
"""Words compared with the vocabulary at once: memory is BLOCK times the vocabulary, whatever the corpus holds."""


def neighbour_lists(
    words: Sequence[str],
    table_VH: npt.NDArray[np.float32],
    tokenizer: Any,
    num_candidates: int,
    *,
    least_pieces: int = 1,
) -> list[list[str]]:
    """Per word the whole words of the vocabulary with the largest cosine, nearest first, without the word itself.

    Words that are not content words (`candidates.is_content_word`) and words unknown to the tokenizer have none.

    Args:
        words: in any case; neighbours get their capitals.
        table_VH: the word table of the checkpoint.
        tokenizer: its tokenizer.
        num_candidates: at most so many per word.
        least_pieces: words of fewer pieces have none.
    """
    lists: list[list[str]] = [[] for _ in words]
    asked = [number for number, word in enumerate(words) if is_content_word(word)]
    known = {number: word for number, word in whole_words(tokenizer).items() if is_content_word(word)}
    if not asked or not known:
        return lists
    names = [*known.values()]
    known_KH = _unit(table_VH[np.array([*known])])
    pieces = word_pieces(tokenizer, [words[number] for number in asked])
    for start in range(0, len(asked), BLOCK):
        block = range(start, min(start + BLOCK, len(asked)))
        mean_BH = np.stack(
            [table_VH[pieces[row]].mean(0) if pieces[row] else np.zeros_like(table_VH[0]) for row in block]
        )
        scores_BK = _unit(mean_BH) @ known_KH.T
        # A word's other spellings (its own capitals) are no neighbours; two more than asked leave room for them.
        count = min(num_candidates + 2, len(names))
        nearest_BC = np.argpartition(-scores_BK, count - 1, axis=1)[:, :count]
        for place, row in enumerate(block):
            word = words[asked[row]]
            if len(pieces[row]) < max(least_pieces, 1) or tokenizer.unk_token_id in pieces[row]:
                continue
            nearest = nearest_BC[place]
            order = nearest[np.lexsort((nearest, -scores_BK[place, nearest]))]
            others = [names[other] for other in order if names[other].lower() != word.lower()]
            lists[asked[row]] = [*dict.fromkeys(cased_like(other, word) for other in others[:num_candidates])]
    return lists


def _unit(rows_NH: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unit_NH: npt.NDArray[np.float32] = rows_NH / np.maximum(np.linalg.norm(rows_NH, axis=1, keepdims=True), 1e-12)
    return unit_NH
