"""Texts that a language model goes on with: where it starts and ends, pairs, the same bytes every time, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment, generated
from kd.stages.augment import augment as augment_module
from kd.stages.augment.generator import Generator, check_generator
from kd.stages.augment.words import split_words, word_ends
from kd.stages.corpus import Corpus, open_corpus


def augmented(rows: dict[str, list[str]], folder: Path, **fields: Any) -> Corpus:
    pq.write_table(pa.table(rows), folder / "x.parquet")
    options = {"operators": ("lm",), "num_generated": 2, "text_column": "text", **fields}
    if "other" in rows:
        options["text_pair_column"] = "other"
    execute(Augment(dataset=str(folder / "x.parquet"), output_dir=str(folder / "c"), **options))
    return open_corpus(folder / "c")


def dropped(folder: Path) -> dict[str, int]:
    counts = (read_manifest(folder / "c") or {})["summary"]["variants_dropped"]
    return {reason: count for reason, count in counts.items() if count}


# A made-up model -------------------------------------------------------------------------------------------------


class Parrot:
    """Tokens are words; what it says after a prompt is fixed."""

    room, computed_on = 24, "cpu float32"

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.words: list[str] = []
        self.most_new: list[int] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._number(word) for word in text.split(" ") if word] for text in texts]

    def _number(self, word: str) -> int:
        self.words += [word] * (word not in self.words)
        return self.words.index(word)

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[number] for number in token_ids)

    def write(self, prompts: Any, most_new: Any, *, draws: Any, **_: Any) -> list[tuple[list[int], bool]]:
        assert [len(row) for row in draws] == [*most_new]
        self.most_new += most_new
        return [(self.encode([self.answer])[0], True) for _ in prompts]


@pytest.fixture
def parrot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`parrot(answer)`: the model, and the option that names it."""

    def make(answer: str) -> tuple[Parrot, dict[str, str]]:
        model = Parrot(answer)
        monkeypatch.setattr("kd.stages.augment.generator.check_generator", lambda folder, kind: None)
        monkeypatch.setattr("kd.stages.augment.lm.load_generator", lambda folder, kind, digest: model)
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text("{}")
        return model, {"language_model": str(tmp_path / "model")}

    return make


def test_a_variant_keeps_some_first_words_and_goes_on_to_the_end_of_the_line(tmp_path: Path, parrot: Any) -> None:
    model, options = parrot("and  more\nof this")
    text = "One (very) good film , they say"
    corpus = augmented({"text": [text, "short", "..."]}, tmp_path, num_generated=30, **options)
    rows = corpus.table.to_pylist()
    ids = {row["text_a"]: row["example_id"] for row in rows[:3]}
    made = [row for row in rows[3:] if row["parent_id"] == ids[text]]
    words = split_words(text)
    prefixes = {text[: word_ends(text)[count - 1]] for count in range(1, len(words))}
    assert {row["text_a"] for row in made} == {f"{prefix} and more" for prefix in prefixes}
    assert {row["text_a"] for row in rows[3:]} >= {"short and more", "... and more"}
    given = {row["example_id"]: row for row in pq.read_table(tmp_path / "c" / "generated.parquet").to_pylist()}
    assert all(row["text_a"] == f"{given[row['example_id']]['given_a']} and more" for row in rows[3:])
    assert {(row["aug_op"], row["aug_side"], row["has_gold"]) for row in rows[3:]} == {("lm", None, False)}
    # At most twice the length of the original in all, at least 16 tokens, and what the model takes.
    assert max(model.most_new) == 15 and min(model.most_new) >= 9


def test_pairs_are_split_where_the_model_puts_the_separator(tmp_path: Path, parrot: Any) -> None:
    _, options = parrot("then || so it ends || never seen")
    pairs = {"text": ["a b c d"], "other": ["e f g h"]}
    corpus = augmented(pairs, tmp_path, num_generated=40, pair_separator=" || ", **options)
    found = {(row["text_a"], row["text_b"], row["aug_side"]) for row in corpus.table.to_pylist()[1:]}
    first = {(f"{prefix} then", "so it ends", "both") for prefix in ("a", "a b", "a b c", "a b c d")}
    assert found == first | {("a b c d", f"{prefix} then", "both") for prefix in ("e", "e f", "e f g")}
    _, options = parrot("and nothing else")
    (tmp_path / "again").mkdir()
    corpus = augmented(pairs, tmp_path / "again", num_generated=40, pair_separator=" || ", **options)
    assert {row["text_a"] for row in corpus.table.to_pylist()} == {"a b c d"}
    assert dropped(tmp_path / "again")["lm_no_separator"] > 5


def test_what_the_model_adds_nothing_to_or_has_no_room_for_is_left_out(tmp_path: Path, parrot: Any) -> None:
    _, options = parrot("\nthe next text")
    augmented({"text": ["a good film"]}, tmp_path, num_generated=3, **options)
    assert dropped(tmp_path) == {"lm_empty": 3}
    _, options = parrot("more")
    (tmp_path / "long").mkdir()
    augmented({"text": ["a " * 400]}, tmp_path / "long", num_generated=20, **options)
    assert dropped(tmp_path / "long")["lm_too_long"] > 10


def test_words_end_where_they_end() -> None:
    text = "Isn't it, then? <mask> 1,000"
    assert [text[:end].split(" ")[-1] for end in word_ends(text)] == [
        "Isn't",
        "it",
        "it,",
        "then",
        "then?",
        "<mask>",
        "1,000",
    ]
    assert word_ends(" ") == []


# Models ----------------------------------------------------------------------------------------------------------


def test_a_batch_writes_what_each_text_alone_would_get(gpt2: Path, sentences: list[str]) -> None:
    """Prompts of several lengths are padded on the left, and the model has no pad token."""
    import torch
    from transformers import AutoModelForCausalLM

    check_generator(gpt2, "causal")
    model, plain = Generator(str(gpt2), "causal"), AutoModelForCausalLM.from_pretrained(gpt2).eval()
    assert model.tokenizer.pad_token_id is None
    prompts = [row[: 2 + number % 4] for number, row in enumerate(model.encode(sentences[:8]))]
    draws = [np.random.default_rng(row).random(14) for row in range(8)]
    found = model.write(prompts, [14] * 8, draws=draws, top_k=0)
    end = model.tokenizer.eos_token_id
    for prompt, row_draws, (token_ids, has_end) in zip(prompts, draws, found, strict=True):
        ids = [*prompt]
        for draw in row_draws:
            with torch.inference_mode():
                probabilities_V = plain(torch.tensor([ids])).logits[0, -1].double().softmax(0)
            order = probabilities_V.argsort(descending=True)
            ends = probabilities_V[order].cumsum(0).numpy()
            ids.append(int(order[min(np.searchsorted(ends, draw * ends[-1], side="right"), len(ends) - 1)]))
            if ids[-1] == end:
                break
        assert [*token_ids, *[end] * has_end] == ids[len(prompt) :]
    assert {has_end for _, has_end in found} == {True, False}


def test_tokens_come_as_often_as_the_model_says() -> None:
    import torch

    from kd.stages.augment.generator import _ByDraws

    logits_V = torch.tensor([2.0, 0.0, 1.0, -1.0, 3.0])
    draws_BL = torch.from_numpy(np.random.default_rng(0).random((20_000, 1)))
    picked = _ByDraws(draws_BL, 0.7, 3)(torch.zeros(20_000, 1), logits_V.expand(20_000, 5)).argmax(1)
    counts = np.bincount(picked.numpy(), minlength=5) / 20_000
    kept = [0, 2, 4]
    expected = np.zeros(5)
    expected[kept] = torch.softmax(logits_V[kept] / 0.7, 0).numpy()
    assert np.abs(counts - expected).max() < 0.01 and counts[[1, 3]].sum() == 0


def test_order_and_interruption_change_no_byte(
    gpt2: Path, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment_module, "GENERATED_PER_CHUNK", 16)
    fields = {"language_model": str(gpt2), "operators": ("mask", "lm"), "num_variants": 1, "tagger": "heuristic"}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = augmented({"text": sentences[:20]}, tmp_path / "one", **fields)
    written = [row for row in whole.table.to_pylist() if row["aug_op"] == "lm"]
    assert len(written) > 20 and {row["aug_iter"] for row in written} == {1, 2}
    texts = {row["example_id"]: row["text_a"] for row in whole.table.to_pylist()[:20]}
    assert all(row["text_a"].split()[0] == texts[row["parent_id"]].split()[0] for row in written)
    finish, done = generated.GenerateJob.finish, []

    def stop(self: Any, computed: Any) -> int:
        if done:
            raise KeyboardInterrupt
        done.append(computed[0])
        return finish(self, computed)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generated.GenerateJob, "finish", stop)
        augmented({"text": sentences[19::-1]}, tmp_path / "two", **fields)
    again: Counter[int] = Counter()
    monkeypatch.setattr(
        generated.GenerateJob, "finish", lambda self, computed: again.update([computed[0]]) or finish(self, computed)
    )
    augmented({"text": sentences[:20]}, tmp_path / "two", **fields)
    assert (done, sorted(again)) == ([0], [1, 2])
    for name in ("data", "generated.parquet", "report.md"):
        files = [
            sorted([place] if place.is_file() else place.rglob("*.parquet"))
            for place in (tmp_path / "one/c" / name, tmp_path / "two/c" / name)
        ]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]] != []


# Refusals --------------------------------------------------------------------------------------------------------


def test_checkpoints_that_are_no_language_models_are_refused(
    masked_lm: Path, tiny_teacher: Path, t5: Path, tmp_path: Path
) -> None:
    for folder, kind in ((masked_lm, "BertForMaskedLM"), (tiny_teacher, "BertFor"), (t5, "T5ForConditionalGeneration")):
        with pytest.raises(RefusedError, match=rf"is no language model: it is a {kind}"):
            augmented({"text": ["a film"]}, tmp_path, language_model=str(folder))
    with pytest.raises(UsageError, match="operator 'lm' needs --language-model"):
        augmented({"text": ["a film"]}, tmp_path)
    with pytest.raises(UsageError, match="--pair-separator is empty"):
        augmented({"text": ["a film"]}, tmp_path, language_model=str(t5), pair_separator=" ")
