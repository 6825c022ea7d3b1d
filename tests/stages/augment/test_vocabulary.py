"""Whole words and their pieces in vocabularies of other kinds than BERT's, and the operators that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForMaskedLM

from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment
from kd.stages.augment.candidates import is_content_word
from kd.stages.augment.checkpoint import load_tokenizer, load_word_table
from kd.stages.augment.mlm import MaskedLM
from kd.stages.augment.neighbour import neighbour_lists
from kd.stages.augment.vocabulary import whole_words, word_pieces
from kd.stages.augment.words import split_words
from kd.stages.corpus import open_corpus

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
MORE = [
    "voil\u00e0 le caf\u00e9 d\u00e9j\u00e0 vu",
    "\u043d\u043e\u0432\u044b\u0439 \u0444\u0438\u043b\u044c\u043c",
    "Film films filming the Book booking",
]


def byte_level(texts: list[str]) -> Tokenizer:
    """As RoBERTa has it: a piece that begins a word within a text begins with \u0120."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return backend


def unigram(texts: list[str]) -> Tokenizer:
    """As XLM-R and T5 have it: a piece that begins a word begins with \u2581. "ghost" is a piece that is never best."""
    words = sorted({word for text in texts for word in split_words(text)} - {"films", "booking"})
    letters = sorted({letter for text in texts for letter in text.replace(" ", "\u2581") + "gh"})
    pieces = [*((f"\u2581{word}", -6.0) for word in words), ("ing", -7.0), ("\u2581ghost", -99.0)]
    backend = Tokenizer(
        models.Unigram([*((token, 0.0) for token in SPECIAL), *pieces, *((letter, -9.0) for letter in letters)], 3)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def save(backend: Tokenizer, folder: Path) -> Path:
    begin, end = (backend.token_to_id(token) for token in ("<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", **names)
    # As many positions as there are embeddings but for the two that this kind of model leaves out; the tokenizer says
    # nothing of it.
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = XLMRobertaForMaskedLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {"byte-level": byte_level, "unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    backend = KINDS[request.param]([*sentences, *MORE * 20])
    return save(backend, tmp_path_factory.mktemp(request.param))


def test_whole_words_are_those_that_one_piece_stands_for_within_a_text(checkpoint: Path, sentences: list[str]) -> None:
    tokenizer = load_tokenizer(checkpoint)
    found = whole_words(tokenizer)
    for number, word in found.items():
        assert word.isalpha() and len(word) > 1
        ids = tokenizer(f"a {word} a", add_special_tokens=False)["input_ids"]
        assert ids.count(number) == 1
        assert tokenizer.decode([number]).strip() == word
    # Every word of the texts that is one piece within them is among them, and all are words of the texts.
    words = {word for text in [*sentences, *MORE] for word in split_words(text) if word.isalpha() and len(word) > 1}
    single = {word for word, row in zip(words, word_pieces(tokenizer, [*words]), strict=True) if len(row) == 1}
    assert single <= {*found.values()}
    assert len(single) > 20 and single & {"voil\u00e0", "d\u00e9j\u00e0", "\u0444\u0438\u043b\u044c\u043c", "caf\u00e9"}
    assert not {"ing", "ilms", "ghost"} & {*found.values()}


def test_a_vocabulary_that_does_not_mark_where_words_begin_is_refused(sentences: list[str]) -> None:
    """Its "ing</w>" is a word and the end of others (XLM, FlauBERT)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(sentences, trainer)
    with pytest.raises(RefusedError, match="has no pieces that are words by themselves"):
        whole_words(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


def test_pieces_of_a_word_are_those_that_it_has_within_a_text(checkpoint: Path, sentences: list[str]) -> None:
    tokenizer = load_tokenizer(checkpoint)
    for text in [*sentences[:10], *MORE]:
        words = split_words(text)
        before, *of_words = word_pieces(tokenizer, ["a", *words])
        whole = tokenizer(" ".join(["a", *words]), add_special_tokens=False)["input_ids"]
        assert [piece for row in of_words for piece in row] == whole[-sum(map(len, of_words)) :]
        assert before


def test_neighbours_and_candidates_are_whole_words_and_never_the_word_itself(
    checkpoint: Path, sentences: list[str]
) -> None:
    table_VH, tokenizer = load_word_table(checkpoint)
    names = {*whole_words(tokenizer).values()}
    spellings = {name.lower() for name in names}
    words = ["film", "Film", "book", "caf\u00e9", "dinner"]
    for word, neighbours in zip(words, neighbour_lists(words, table_VH, tokenizer, 6), strict=True):
        assert len(neighbours) > 3
        assert {other.lower() for other in neighbours} <= spellings - {word.lower()}
    model = MaskedLM(str(checkpoint), 6)
    texts = [split_words(text) for text in [*sentences[:6], *MORE]]
    blanks = [blank for number, text in enumerate(texts) for blank in model.blanks(text, 100 * number)]
    lists = model.fill(blanks)
    asked = {place: texts[place // 100][place % 100] for place in lists}
    assert len(lists) == len(blanks) > 15 and any(word[0].isupper() for word in asked.values())
    for place, candidates in lists.items():
        assert len(candidates) >= 4 and {*candidates} <= names
        assert asked[place].lower() not in {other.lower() for other in candidates}


def test_blanks_stand_where_the_tokenizer_would_have_the_mask(checkpoint: Path, sentences: list[str]) -> None:
    model, tokenizer = MaskedLM(str(checkpoint), 3), load_tokenizer(checkpoint)
    words = ["a", *split_words(sentences[0])][:6]
    before = tokenizer(" ".join(words))["input_ids"]
    for blank in model.blanks(words, 0):
        second = len(blank.token_ids) - blank.num_first
        assert blank.token_ids[blank.masked_at] == tokenizer.mask_token_id
        restored = [*blank.token_ids]
        restored[blank.masked_at] = blank.piece
        pair = tokenizer(" ".join(words), " ".join(words))["input_ids"]
        # A byte-level tokenizer has another piece for the first word of a text; here all stand within one.
        assert restored[2 : len(before)] == pair[2 : len(before)]
        assert restored[-second:].count(tokenizer.sep_token_id) == 1 and len(restored) == len(pair)


def test_positions_that_the_model_leaves_out_are_not_used(checkpoint: Path) -> None:
    model = MaskedLM(str(checkpoint), 3)
    blanks = [*model.blanks(["film", "book"] * 40, 0)]
    assert max(len(blank.token_ids) for blank in blanks) == 64
    assert len(model.fill(blanks)) == len(blanks)


def test_a_corpus_of_words_from_such_a_checkpoint(checkpoint: Path, tmp_path: Path, sentences: list[str]) -> None:
    pq.write_table(pa.table({"text": sentences[:12]}), tmp_path / "x.parquet")
    fields: dict[str, Any] = {"operators": ("mlm", "neighbour"), "neighbour_probability": 0.4, "num_variants": 2}
    fields |= {"masked_lm": str(checkpoint), "word_table": str(checkpoint), "num_candidates": 5}
    execute(Augment(dataset=str(tmp_path / "x.parquet"), text_column="text", output_dir=str(tmp_path / "c"), **fields))
    rows = {row["example_id"]: row for row in open_corpus(tmp_path / "c").table.to_pylist()}
    changes = [
        pair
        for row in rows.values()
        if row["parent_id"] is not None
        for pair in zip(split_words(rows[row["parent_id"]]["text_a"]), split_words(row["text_a"]), strict=True)
        if pair[0] != pair[1]
    ]
    names = {name.lower() for name in whole_words(load_tokenizer(checkpoint)).values()}
    assert len(changes) > 20
    assert all(is_content_word(old) and new.lower() in names and new.lower() != old.lower() for old, new in changes)


def test_a_model_without_a_mask_token_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkpoint, tmp_path / "copy")
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.mask_token = tokenizer.cls_token = None
    tokenizer.save_pretrained(tmp_path / "copy")
    with pytest.raises(RefusedError, match="no mask token, no cls token"):
        MaskedLM(str(tmp_path / "copy"), 3)
