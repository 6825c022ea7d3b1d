"""Parts of speech: HanTa's own results, a model that cannot run code, and what happens without it."""

from __future__ import annotations

import gzip
import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kd.pipeline.errors import RefusedError, UsageError
from kd.stages.augment import tagger as tagger_module
from kd.stages.augment.tagger import FUSED_TAGS, HeuristicTagger, load_tagger, read_model, tagger_identity
from kd.stages.augment.words import split_words

needs_hanta = pytest.mark.skipif(importlib.util.find_spec("HanTa") is None, reason="HanTa is an extra")


def without_hanta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tagger_module, "_model_file", lambda language: None)


@needs_hanta
def test_words_get_the_tags_that_hanta_gives_them(sentences: list[str]) -> None:
    from HanTa.HanoverTagger import HanoverTagger

    odd = ["I saw the saw .", "U.S. troops don't @user 3.5 [MASK] zzzyx", "...", "Ünïcode 😀 北京", "a" * 200]
    tagger, hanta = load_tagger("hanta"), HanoverTagger("morphmodel_en.pgz")
    for text in [*sentences[:80], *odd]:
        words = split_words(text)
        expected = [FUSED_TAGS.get(tag, tag) for tag in hanta.tag_sent(words, taglevel=0)]
        assert [tagger.names[tag] for tag in tagger.tag(words)] == expected, text


@needs_hanta
def test_tags_of_a_text_do_not_depend_on_what_was_tagged_before(sentences: list[str]) -> None:
    from kd.stages.augment.tagger import HantaTagger

    fresh, used = HantaTagger(), HantaTagger()
    for text in sentences[:50]:
        used.tag(split_words(text))
    for text in sentences[50:70]:
        assert fresh.tag(split_words(text)) == used.tag(split_words(text))


@needs_hanta
def test_no_words_have_no_tags_and_odd_words_have_one_each() -> None:
    tagger = load_tagger("hanta")
    assert tagger.tag([]) == []
    for words in (["\u0301"], ["'", "'", "'"], ["é"] * 50, ["x" * 300], ["0"], ["__"]):
        assert len(tagger.tag(words)) == len(words)


@needs_hanta
def test_homographs_are_told_apart() -> None:
    tagger = load_tagger("hanta")
    words = split_words("They book a room and read the book .")
    tags = [tagger.names[tag] for tag in tagger.tag(words)]
    assert tags[1].startswith("VV")
    assert tags[7].startswith("NN")


@needs_hanta
def test_german_has_its_own_model() -> None:
    tagger = load_tagger("hanta", "de")
    assert [tagger.names[tag] for tag in tagger.tag(["Der", "Hund", "schläft", "."])][:2] == ["ART", "NN"]
    assert tagger_identity("hanta", "de")["model"] == "morphmodel_ger.pgz"


def test_a_model_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with gzip.open(tmp_path / "model.pgz", "wb") as file:
        file.write(pickle.dumps({"words": Attack()}))
    with pytest.raises(RefusedError, match=r"wants to load (posix|nt)\.system"):
        read_model(tmp_path / "model.pgz")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_numbers_and_text_is_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, "x"], "b": np.float64(0.5), "c": {(1, 2): None}}
    with gzip.open(tmp_path / "model.pgz", "wb") as file:
        file.write(pickle.dumps(content))
    assert read_model(tmp_path / "model.pgz") == content


def test_without_hanta_auto_is_the_heuristic_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_hanta(monkeypatch)
    assert tagger_identity("auto")["name"] == "heuristic"
    with pytest.raises(RefusedError, match=r"'hanta' is not installed\n  fix: pip install .*\[offline\]"):
        tagger_identity("hanta")


@needs_hanta
def test_the_identity_of_a_tagger_names_version_and_model() -> None:
    assert {*tagger_identity("auto")} == {"name", "version", "model", "model_digest"}
    assert tagger_identity("heuristic")["name"] == "heuristic"


def test_unknown_taggers_and_languages_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="did you mean 'hanta'"):
        tagger_identity("hantaa")
    with pytest.raises(UsageError, match="language 'fr' has no tagger"):
        tagger_identity("auto", "fr")


def test_the_heuristic_by_hand() -> None:
    tagger = HeuristicTagger()
    words = split_words("The painter quickly painted 3 beautiful houses for them .")
    assert [tagger.names[tag] for tag in tagger.tag(words)] == [
        *("DET", "NOUN", "ADV", "VERB", "NUM", "ADJ", "NOUN", "PREP", "PRON", "PUNCT")
    ]
