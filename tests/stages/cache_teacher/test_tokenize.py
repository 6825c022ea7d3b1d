"""Texts become exactly the token ids that transformers gives, and what was cut is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from kd.pipeline.errors import RefusedError
from kd.stages.cache_teacher import tokenize as tokenize_module
from kd.stages.cache_teacher.tokenize import encode, encode_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_teacher))


def test_ids_and_segments_equal_one_call_per_text(tokenizer: Any, sentences: list[str]) -> None:
    ids, segments = encode(tokenizer, sentences, None, 64)
    assert (ids.values.dtype, segments.values.dtype) == (np.int64, np.uint8)
    for row, text in enumerate(sentences):
        assert ids[row].tolist() == tokenizer(text)["input_ids"]
        assert segments[row].tolist() == tokenizer(text)["token_type_ids"]


def test_pairs_have_two_segments_and_lose_from_the_longer_side(tokenizer: Any) -> None:
    ids, segments = encode(tokenizer, ["the cat", "the film"], ["a dog likes the book"] * 2, 64)
    assert segments[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    short, _ = encode(tokenizer, ["the cat"], ["a dog likes the book"], 8)
    assert tokenizer.decode(short[0]) == "[CLS] the cat [SEP] a dog likes [SEP]"
    assert len(ids[0]) == 10


def test_chunks_make_no_difference(tokenizer: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(tokenizer, sentences, None, 64)
    monkeypatch.setattr(tokenize_module, "CHUNK_ROWS", 7)
    done: list[int] = []
    parts = encode_rows(tokenizer, sentences, None, 64, advance=done.append)
    assert (parts.token_ids, parts.segment_ids) == whole
    assert (sum(done), len(done)) == (200, 29)


def test_only_rows_that_lost_something_count_as_cut(tokenizer: Any) -> None:
    texts = ["the cat", "the cat likes the book", "the cat likes the book today"]
    lengths = encode(tokenizer, texts, None, 64)[0].lengths.tolist()
    assert lengths == [4, 7, 8]
    assert encode_rows(tokenizer, texts, None, 7).truncated.tolist() == [False, False, True]
    assert encode_rows(tokenizer, texts, None, 8).truncated.tolist() == [False, False, False]


def test_cut_rows_are_counted_for_tokenizers_written_in_python(letters: type[Any]) -> None:
    encoded = encode_rows(letters(), ["abc", "abcd", "abcde"], None, 4)
    assert encoded.token_ids.lengths.tolist() == [3, 4, 4]
    assert encoded.truncated.tolist() == [False, False, True]
    assert not encoded.segment_ids.values.any()


def test_padding_and_truncation_in_the_tokenizers_file_do_not_count(tokenizer: Any) -> None:
    expected = encode(tokenizer, ["the cat"], None, 64)
    tokenizer(["a"], padding="max_length", max_length=3, truncation=True)
    assert encode(tokenizer, ["the cat"], None, 64) == expected


def test_no_texts_give_no_rows(tokenizer: Any) -> None:
    ids, segments = encode(tokenizer, [], None, 64)
    assert (len(ids), len(segments)) == (0, 0)


def test_a_length_without_room_for_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RefusedError, match="no room for text beside 3 special tokens"):
        encode(tokenizer, ["a"], ["b"], 3)
