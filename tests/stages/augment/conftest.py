"""A small WordNet, and tiny models that write text: random weights, words as tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

END, PAD = 1, 0
"""Tokens of the models."""

LICENCE = "  1 This software and database is being provided to you\n"
SYNSETS = {
    "noun": [["film", "movie", "picture"], ["film", "photographic_film"], ["film", "cinema"], ["dog", "Rover"]],
    "verb": [["film", "shoot", "take"], ["see", "watch"]],
    "adj": [["good", "fine(p)"], ["small", "little"]],
    "adv": [["well", "good"]],
}


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the format of wndb(5WN)."""
    folder = tmp_path_factory.mktemp("dict")
    for name, synsets in SYNSETS.items():
        data, places = LICENCE, {}
        for words in synsets:
            offset = len(data)
            for word in words:
                places.setdefault(word.partition("(")[0].lower(), []).append(offset)
            members = " ".join(f"{word} 0" for word in words)
            data += f'{offset:08d} 03 {name[0]} {len(words):02x} {members} 000 | a gloss; "with words"\n'
        (folder / f"data.{name}").write_text(data)
        lines = [
            f"{lemma} {name[0]} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{offset:08d}' for offset in at)}  \n"
            for lemma, at in sorted(places.items())
        ]
        (folder / f"index.{name}").write_text(LICENCE + "".join(lines))
    return folder


def save_tokenizer(folder: Path, sentences: list[str], *, ends: bool, **fields: Any) -> int:
    """Write a tokenizer whose tokens are words; returns how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in sentences for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64, **fields}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return len(words)


def spread(model: Any, seed: int) -> None:
    """Weights from which another input gives another output."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def make_translator(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Callable[..., Path]:
    """`make_translator(seed, end)`: folder of a Marian model that says any words; `end` is the logit of the end."""

    def make(seed: int, end: float = 3.0, **fields: Any) -> Path:
        import torch
        from transformers import MarianConfig, MarianMTModel

        folder = tmp_path_factory.mktemp("marian")
        size = save_tokenizer(folder, sentences, ends=True, **fields)
        config = MarianConfig(
            vocab_size=size,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=64,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
            forced_eos_token_id=END,
            bos_token_id=None,
        )
        with torch.random.fork_rng():
            model = MarianMTModel(config).eval()
        spread(model, seed)
        model.final_logits_bias[0, END] = end
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """Folder of a T5 model that says any words."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    size = save_tokenizer(folder, sentences, ends=True)
    config = T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=PAD
    )
    with torch.random.fork_rng():
        model = T5ForConditionalGeneration(config).eval()
    spread(model, 3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """Folder of a GPT-2 model that says any words; its tokenizer has no pad token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    size = save_tokenizer(folder, sentences, ends=False, pad_token=None)
    config = GPT2Config(
        vocab_size=size, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END
    )
    with torch.random.fork_rng():
        model = GPT2LMHeadModel(config).eval()
    spread(model, 4)
    model.save_pretrained(folder)
    return folder
