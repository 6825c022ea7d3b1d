"""First pieces of words, in the kinds of tokenizers there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kd.stages.words import first_pieces

TEXT = ["the unaffable world 's end , said the old world", "Ünder 12 words 世界 endless ends"] * 5


def byte_level() -> Tokenizer:
    """As RoBERTa's: the space before a word is in its piece, and not in its offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<mask>"]
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=True)
    return backend


def untrimmed() -> Tokenizer:
    """As GPT-2's: offsets with the space."""
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def sentence_piece() -> Tokenizer:
    """As XLM-R's: a space is a character of its own, at the head of a word or alone."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=70, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


BACKENDS = {maker.__name__: maker() for maker in (byte_level, untrimmed, sentence_piece, word_piece)}


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*" ".join(TEXT[:2]).split(), "'s", "(U.S.)", "don't", "zzz"]), min_size=1, max_size=9))
def test_first_pieces_are_those_of_words_given_one_by_one(name: str, words: list[str]) -> None:
    expected: dict[int, int] = {}
    for piece, word in enumerate(BACKENDS[name].encode(words, is_pretokenized=True).word_ids):
        if word is not None:
            expected.setdefault(word, piece)
    encoding = BACKENDS[name].encode(" ".join(words))
    for word, found in enumerate(first_pieces(encoding, " ".join(words)).tolist()):
        # A space that is a piece alone belongs to the word after it there, and to none here.
        assert found == expected[word] or (encoding.tokens[expected[word]] in "▁Ġ" and found == expected[word] + 1)


def test_words_that_are_cut_or_vanish_have_no_piece(tiny_teacher: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_teacher)

    def found(text: str, **options: Any) -> list[int]:
        return first_pieces(tokenizer([text], **options).encodings[0], text).tolist()

    assert found("the film \x07 likes") == [1, 2, -1, 3]
    assert found("zz film zz", truncation=True, max_length=5) == [1, 3, -1]  # [CLS] z ##z film [SEP]
    assert found("the film", padding="max_length", max_length=9) == [1, 2]
    assert found("the [MASK] film") == [1, 2, 3]
