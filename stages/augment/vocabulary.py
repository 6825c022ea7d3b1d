"""What a tokenizer's vocabulary has to do with words: the pieces of a word, and the pieces that are words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ...pipeline.errors import RefusedError


def word_pieces(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """The token ids of every word as it stands within a text.

    Byte-level vocabularies (RoBERTa, GPT-2) have other pieces for a word after a space than for one at the start.
    """
    if not words:
        return []
    texts = [f" {word}" for word in words] if _is_byte_level(tokenizer) else [*words]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return rows


@lru_cache(maxsize=2)
def _is_byte_level(tokenizer: Any) -> bool:
    return any(piece.startswith("Ġ") for piece in tokenizer.get_vocab())


def whole_words(tokenizer: Any) -> dict[int, str]:
    """The pieces of a vocabulary that are words by themselves, of at least two letters and nothing else, by id.

    A piece is a word when its text, standing within another, becomes that piece again. This holds for vocabularies that
    mark what continues a word (`##`, BERT) as for those that mark what begins one (`Ġ`, RoBERTa; `▁`, SentencePiece),
    and leaves out what a tokenizer never makes.

    Raises:
        RefusedError: no piece is a word, such as of characters, or where the ends of words are marked (`</w>`): what
            ends one is then no other piece than what is one.
    """
    found = {}
    for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = piece.removeprefix("Ġ").removeprefix("▁")
        if not word.isascii():
            # Byte-level pieces spell other letters in characters that stand for bytes.
            word = tokenizer.convert_tokens_to_string([piece]).strip()
        if len(word) > 1 and word.isalpha():
            found[number] = word
    rows = word_pieces(tokenizer, [*found.values()])
    words = {number: word for (number, word), row in zip(found.items(), rows, strict=True) if row == [number]}
    if not words:
        raise RefusedError(
            f"the vocabulary of {tokenizer.name_or_path or 'a tokenizer'} has no pieces that are words by themselves",
            fix="give a checkpoint with a WordPiece, byte-level BPE or SentencePiece vocabulary (BERT, RoBERTa, XLM-R)",
        )
    return words
