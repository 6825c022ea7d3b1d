"""Where the words of a text begin among a tokenizer's pieces: what a token task is trained and scored on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..pipeline.errors import RefusedError
from ..pipeline.ragged import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pieces(Protocol):
    """What is asked of a `tokenizers.Encoding` (`BatchEncoding.encodings[i]` of a fast tokenizer)."""

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """First character and the one after the last, of every piece; equal for special tokens."""


def first_pieces(encoding: Pieces, text: str) -> npt.NDArray[np.int32]:
    """Per word of `text.split(" ")` the index of its first piece; -1 where truncation cut it or nothing is left of it.

    A piece belongs to the word of its first character that is no space: byte-level BPE and SentencePiece count the
    space before a word as part of its first piece, or as a piece of its own, which belongs to no word. A word that
    the tokenizer drops (a control character), or that a piece of the word before runs into, has none.

    Args:
        encoding: the text, encoded alone or as the first of several; special tokens and padding do no harm.
        text: words joined by single spaces.
    """
    is_space = np.frombuffer(text.encode("utf-32-le"), "<u4") == ord(" ")
    word_of = np.cumsum(is_space)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    pieces = np.flatnonzero(offsets[:, 0] < offsets[:, 1])
    starts, ends = offsets[pieces].T
    starts = starts + is_space[starts]
    pieces, starts = pieces[starts < ends], starts[starts < ends]
    first = np.full(word_of[-1] + 1, -1, np.int32)
    # The last one written stays: the first piece of each word.
    first[word_of[starts[::-1]]] = pieces[::-1]
    return first


def encode_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> tuple[dict[str, Any], Ragged]:
    """What the tokenizer gives for every text, cut to `max_length` tokens, and the `first_pieces` of its words, int32.

    Raises:
        RefusedError: the tokenizer does not say which characters a piece stands for.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    if not tokenizer.is_fast:
        raise RefusedError(
            f"the tokenizer {type(tokenizer).__name__} does not say where its pieces stand in the text",
            fix="save the model with the fast tokenizer of its kind (tokenizer.json)",
        )
    rows = [first_pieces(pieces, text) for pieces, text in zip(encoded.encodings, texts, strict=True)]
    return dict(encoded), Ragged.from_rows(rows, np.int32)
