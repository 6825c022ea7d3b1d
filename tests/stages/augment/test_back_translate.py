"""Back-translation: what is left out and why, the same bytes every time, and models that cannot do it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import RefusedError, UsageError
from kd.pipeline.stage import execute
from kd.stages.augment import Augment, generated
from kd.stages.augment import augment as augment_module
from kd.stages.augment.checkpoint import checkpoint_digest
from kd.stages.augment.generator import Generator, check_generator
from kd.stages.augment.regenerate import regenerate
from kd.stages.augment.scripts import main_script
from kd.stages.corpus import Corpus, open_corpus


@pytest.fixture(scope="module")
def there(make_translator: Callable[..., Path]) -> Path:
    return make_translator(1)


@pytest.fixture(scope="module")
def back(make_translator: Callable[..., Path]) -> Path:
    return make_translator(2)


def augmented(texts: Sequence[str], folder: Path, **fields: Any) -> Corpus:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": texts}), folder / "x.parquet")
    options = {"operators": ("back-translate",), "tagger": "heuristic", **fields}
    stage = Augment(dataset=str(folder / "x.parquet"), text_column="text", output_dir=str(folder / "c"), **options)
    execute(stage)
    return open_corpus(folder / "c")


def summary_of(folder: Path) -> dict[str, Any]:
    return (read_manifest(folder / "c") or {})["summary"]


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / "c").rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def given_of(folder: Path) -> dict[bytes, dict[str, Any]]:
    rows = pq.read_table(folder / "c" / "generated.parquet").to_pylist()
    return {row["example_id"]: row for row in rows}


# A made-up translator --------------------------------------------------------------------------------------------


class Phrasebook:
    """Translates what it knows, and spells all else backwards. Text that it knows as None has no end."""

    room, computed_on = 40, "cpu float32"

    def __init__(self, phrases: dict[str, str | None]) -> None:
        self.phrases = phrases
        self.asked: list[tuple[str, bool]] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*map(ord, text)] for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def write(self, prompts: Any, most_new: Any, *, draws: Any = None, **_: Any) -> list[tuple[list[int], bool]]:
        found = []
        for number, prompt in enumerate(prompts):
            text = self.decode(prompt)
            self.asked.append((text, draws is not None))
            answer = self.phrases.get(text, text[::-1])
            if draws is not None:
                answer = f"{answer} {int(draws[number][0] * 10)}"
            found.append(([] if answer is None else [*map(ord, answer)], answer is not None))
        return found


@pytest.fixture
def phrasebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """`phrasebooks(there, back)`: options that name them."""

    def make(*books: Phrasebook) -> dict[str, str]:
        monkeypatch.setattr("kd.stages.augment.generator.check_generator", lambda folder, kind: None)
        by_folder = {}
        for name, book in zip(("translation_model", "back_translation_model"), books, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text("{}")
            by_folder[str(tmp_path / name)] = book
        monkeypatch.setattr("kd.stages.augment.back_translate.load_generator", lambda folder, *_: by_folder[folder])
        return {Path(folder).name: folder for folder in by_folder}

    return make


def test_what_came_back_is_a_variant_unless_something_is_wrong_with_it(
    tmp_path: Path, phrasebooks: Callable[..., dict[str, str]]
) -> None:
    texts = ["a fine film", "the same again", "it gets short", "it is Russian", "it never ends", "it is empty now"]
    texts += ["it leaks now", "a " * 30, "it goes on and on", "never comes back"]
    pq.write_table(pa.table({"text": ["It  LEAKED now"]}), tmp_path / "test.parquet")
    answers: dict[str, str | None] = {
        "a fine film": "  one  good movie ",
        "the same again": "The same  again",
        "it gets short": "brief",
        "it is Russian": "это по-русски",
        "it is empty now": " ",
        "it leaks now": "it leaked now",
        "it goes on and on": "it goes on and on and on and on and on",
    }
    there = Phrasebook({"it never ends": None})
    back = Phrasebook({text[::-1]: answer for text, answer in answers.items()} | {"kcab semoc reven": None})
    options = phrasebooks(there, back)
    corpus = augmented(texts, tmp_path, exclude_dataset=(str(tmp_path / "test.parquet"),), **options)
    originals = {row["example_id"]: row for row in corpus.table.to_pylist()[:10]}
    (variant,) = corpus.table.to_pylist()[10:]
    assert (variant["text_a"], originals[variant["parent_id"]]["text_a"]) == ("one good movie", "a fine film")
    assert (variant["aug_op"], variant["aug_iter"], variant["has_gold"]) == ("back-translate", 0, False)
    assert (variant["n_words_a"], variant["aug_side"], variant["seed"]) == (3, None, 42)
    assert given_of(tmp_path) == {
        variant["example_id"]: {
            **{"example_id": variant["example_id"], "aug_op": "back-translate"},
            **{"given_a": "mlif enif a", "given_b": None},
        }
    }
    summary = summary_of(tmp_path)
    faults = {"unchanged": 1, "empty": 1, "too_long": 1, "no_end": 2, "length": 2, "script": 1}
    dropped = {f"back-translate_{fault}": count for fault, count in faults.items()}
    assert {name: count for name, count in summary["variants_dropped"].items() if count} == {**dropped, "leak": 1}
    assert (summary["variants_made"], summary["variants"]) == (10, 1)
    assert "| a fine film | one good movie |" in (tmp_path / "c" / "report.md").read_text()
    # What never ended, or did not fit, does not go on.
    assert len(there.asked) == 9 and len(back.asked) == 8


def test_the_first_variant_goes_by_beam_search_and_others_by_draws(
    tmp_path: Path, phrasebooks: Callable[..., dict[str, str]]
) -> None:
    back = Phrasebook({text[::-1]: f"was {text}" for text in ("one film", "two films")})
    options = phrasebooks(Phrasebook({}), back)
    corpus = augmented(["one film", "two films"], tmp_path, num_generated=3, **options)
    rows = {(row["aug_iter"], row["text_a"][:8]): row["text_a"] for row in corpus.table.to_pylist()[2:]}
    assert sorted(text for (iteration, _), text in rows.items() if iteration == 0) == ["was one film", "was two films"]
    assert Counter(is_drawn for _, is_drawn in back.asked) == {False: 2, True: 4}


def test_variants_of_pairs_take_the_sides_in_turn_and_share_translations(
    tmp_path: Path, phrasebooks: Callable[..., dict[str, str]]
) -> None:
    texts = {"one film": "a film", "two films": "both films", "a book": "one book", "my books": "our books"}
    there, back = Phrasebook({}), Phrasebook({text[::-1]: answer for text, answer in texts.items()})
    table = pa.table({"text": ["one film", "two films"], "other": ["a book", "my books"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    fields = {"text_column": "text", "text_pair_column": "other", "operators": ("back-translate",), "num_generated": 3}
    execute(
        Augment(
            dataset=str(tmp_path / "pairs.parquet"),
            output_dir=str(tmp_path / "c"),
            **fields,
            **phrasebooks(there, back),
        )
    )
    rows = open_corpus(tmp_path / "c").table.to_pylist()
    originals = {row["example_id"]: row for row in rows[:2]}
    given = given_of(tmp_path)
    assert len(rows) == 8
    for row in rows[2:]:
        parent, side = originals[row["parent_id"]], ("a", "b", "both")[row["aug_iter"]]
        a, b = parent["text_a"], parent["text_b"]
        assert row["aug_side"] == side
        assert row["text_a"] == (a if side == "b" else texts[a])
        assert row["text_b"] == (b if side == "a" else texts[b])
        assert given[row["example_id"]]["given_a"] == (None if side == "b" else a[::-1])
        assert given[row["example_id"]]["given_b"] == (None if side == "a" else b[::-1])
    assert len(there.asked) == len(back.asked) == 4 and not any(drawn for _, drawn in back.asked)


def test_prefixes_stand_before_what_a_model_is_given(
    tmp_path: Path, phrasebooks: Callable[..., dict[str, str]]
) -> None:
    there, back = Phrasebook({"to de: a film": "ein Film"}), Phrasebook({"to en: ein Film": "one film"})
    prefixes = {"translation_prefix": "to de: ", "back_translation_prefix": "to en: "}
    corpus = augmented(["a film"], tmp_path, **prefixes, **phrasebooks(there, back))
    assert corpus.texts()[0] == ["a film", "one film"]
    (given,) = given_of(tmp_path).values()
    assert given["given_a"] == "ein Film"


def test_scripts_of_texts() -> None:
    assert main_script("\u042d\u0442\u043e film \u043b\u0443\u0447\u0448\u0435") == "CYRILLIC"
    assert main_script("\u826f\u3044\u6620\u753b\u3067\u3059") == main_script("\u6620\u753b") == "CJK"
    assert main_script("\uff26ilm") == "LATIN"
    assert main_script("1, 2 \u20ac!") is None


# Models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(
    there: Path, back: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A corpus of rules and models, and the options that made it."""
    folder = tmp_path_factory.mktemp("written")
    fields = {"translation_model": str(there), "back_translation_model": str(back), "num_generated": 3}
    fields |= {"operators": ("mask", "ngram", "back-translate"), "num_variants": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(augment_module, "GENERATED_PER_CHUNK", 24)
        augmented(sentences[:30], folder, **fields)
    return folder, fields


def test_models_write_beside_the_rules_and_change_none_of_their_variants(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, sentences: list[str]
) -> None:
    folder, fields = written
    corpus = open_corpus(folder / "c")
    rules = augmented(sentences[:30], tmp_path, operators=("mask", "ngram"), num_variants=2)
    is_written = pc.equal(corpus.table["aug_op"].cast("string"), "back-translate")
    others = corpus.table.filter(pc.invert(is_written))
    assert others.to_pylist() == rules.table.to_pylist()
    rows = corpus.table.filter(is_written).to_pylist()
    assert rows == corpus.table.to_pylist()[len(others) :]
    assert len(rows) >= 8 and {3, 4} <= {row["aug_iter"] for row in rows} <= {2, 3, 4}
    content = (read_manifest(folder / "c") or {})["content"]["augmentation"]
    assert content["generated"]["back-translate"] == {
        "config_hash": rows[0]["aug_config_hash"].hex(),
        "num_variants": 3,
        "first_variant": 2,
        "models": [checkpoint_digest(fields[name]) for name in ("translation_model", "back_translation_model")],
        "computed_on": {"cpu float32": 30},
    }
    summary = summary_of(folder)
    assert summary["variants_made"] == 30 * 5 == summary["variants"] + sum(summary["variants_dropped"].values())
    assert len(given_of(folder)) == len(rows)


def test_order_and_interruption_change_no_byte_and_no_text_is_translated_again(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fields = written
    monkeypatch.setattr(augment_module, "GENERATED_PER_CHUNK", 24)
    finish, done = generated.GenerateJob.finish, []

    def stop(self: Any, computed: Any) -> int:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(computed[0])
        return finish(self, computed)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generated.GenerateJob, "finish", stop)
        augmented(sentences[29::-1], tmp_path, **fields)
    again = []
    monkeypatch.setattr(
        generated.GenerateJob, "finish", lambda self, computed: again.append(computed[0]) or finish(self, computed)
    )
    augmented(sentences[:30], tmp_path, **fields)
    assert (done, again) == ([0, 1], [2, 3])
    assert files_of(tmp_path) == files_of(folder)


def test_variants_of_rules_are_made_again_without_the_models_and_those_of_models_are_not(
    written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = written
    monkeypatch.setattr("kd.stages.augment.back_translate.load_generator", lambda *_: pytest.fail("asked a model"))
    rows = [row for row in open_corpus(folder / "c").table.to_pylist() if row["parent_id"] is not None]
    by_rules = [row for row in rows if row["aug_op"] != "back-translate"][:5]
    found = regenerate(folder / "c", [row["example_id"] for row in by_rules])
    assert found == [(row["text_a"], None) for row in by_rules]
    with pytest.raises(RefusedError, match=r"a model wrote these variants of corpus .* \(back-translate\)"):
        regenerate(folder / "c", [row["example_id"] for row in rows])


def one_by_one(folder: Path, token_ids: list[int], most_new: int, draws: Sequence[float] | None) -> list[int]:
    """What a translation model writes, its end included: transformers' own beam search, or a plain loop over draws."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    model.generation_config.forced_eos_token_id = None
    inputs = torch.tensor([token_ids])
    with torch.inference_mode():
        if draws is None:
            return model.generate(inputs, num_beams=4, max_new_tokens=most_new)[0, 1:].tolist()
        ids = [model.config.decoder_start_token_id]
        for draw in draws[:most_new]:
            logits_V = model(input_ids=inputs, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            if model.generation_config.bad_words_ids:
                logits_V[[word for (word,) in model.generation_config.bad_words_ids]] = -torch.inf
            best = logits_V.argsort(descending=True)[:5]
            ends = np.cumsum(torch.softmax(logits_V[best].double() / 0.8, 0).numpy())
            ids.append(int(best[np.searchsorted(ends, draw * ends[-1], side="right")]))
            if ids[-1] == model.config.eos_token_id:
                break
        return ids[1:]


@pytest.mark.parametrize("by_beam", [True, False])
def test_a_batch_writes_what_each_text_alone_would_get(there: Path, sentences: list[str], by_beam: bool) -> None:
    """And the model's forced end at the limit does not hide that there was none."""
    model = Generator(str(there), "seq2seq")
    prompts = model.encode(sentences[:8])
    limits = [len(prompt) + 2 for prompt in prompts]
    draws = None if by_beam else [np.random.default_rng(row).random(limit) for row, limit in enumerate(limits)]
    found = model.write(prompts, limits, draws=draws, temperature=0.8, top_k=5)
    has_ends = set()
    for row, (token_ids, has_end) in enumerate(found):
        expected = one_by_one(
            there, prompts[row], limits[row] if draws else max(limits), None if draws is None else draws[row]
        )
        expected = expected[: limits[row]]
        assert [*token_ids, *[1] * has_end] == expected
        has_ends.add(has_end)
    assert has_ends == {True, False} or by_beam


def test_t5_translates_too(t5: Path, sentences: list[str]) -> None:
    check_generator(t5, "seq2seq")
    generator = Generator(str(t5), "seq2seq")
    prompts = generator.encode(sentences[:4])
    draws = [np.random.default_rng(row).random(12) for row in range(4)]
    found = generator.write(prompts, [12] * 4, draws=draws)
    assert [generator.write([prompts[row]], [12], draws=[draws[row]])[0] for row in range(4)] == found
    assert len({generator.decode(ids) for ids, _ in found}) > 1


# Refusals --------------------------------------------------------------------------------------------------------


def test_checkpoints_that_are_no_translation_models_are_refused_before_the_data_is_read(
    there: Path, tiny_teacher: Path, tmp_path: Path, make_translator: Callable[..., Path]
) -> None:
    def attempt(folder: Path | str) -> None:
        fields = {"translation_model": str(there), "back_translation_model": str(folder), "text_column": "text"}
        execute(
            Augment(
                dataset=str(tmp_path / "absent.csv"),
                output_dir=str(tmp_path / "c"),
                operators=("back-translate",),
                **fields,
            )
        )

    with pytest.raises(RefusedError, match="is no checkpoint: there is no such folder"):
        attempt(tmp_path / "absent")
    with pytest.raises(RefusedError, match="no such checkpoint on the hub"):
        attempt("somebody/opus-mt-absent")
    with pytest.raises(RefusedError, match="is no translation model: it is a BertForSequenceClassification"):
        attempt(tiny_teacher)
    with pytest.raises(RefusedError, match="takes no more than 8 tokens at once"):
        attempt(make_translator(0, model_max_length=8))
    bare = tmp_path / "bare"
    shutil.copytree(there, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(RefusedError, match=r"there is no tokenizer in .*bare"):
        attempt(bare)


def test_a_tokenizer_that_needs_sentencepiece_says_so(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("\nMarianTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(
        RefusedError, match=r"not installed\n  MarianTokenizer requires the (.|\n)*kd-pipeline\[translate\]"
    ):
        check_generator(there, "seq2seq")


def test_words_with_tags_are_not_translated(tmp_path: Path, there: Path, back: Path) -> None:
    table = pa.table({"text": [["a", "film"]], "tags": [["O", "B-X"]]})
    pq.write_table(table, tmp_path / "x.parquet")
    models = {"translation_model": str(there), "back_translation_model": str(back), "operators": ("back-translate",)}
    stage = Augment(
        dataset=str(tmp_path / "x.parquet"),
        text_column="text",
        label_column="tags",
        output_dir=str(tmp_path / "c"),
        **models,
    )
    with pytest.raises(RefusedError, match="operator 'back-translate' writes other words than those of"):
        execute(stage)


def test_missing_weights_are_refused(there: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(there, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "decoder.layers.0.fc1.weight" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"weights that are not there: .*fc1\.weight"):
        Generator(str(folder), "seq2seq")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"back_translation_model": None}, "operator 'back-translate' needs --back-translation-model"),
        ({"operators": ("mask",)}, "--translation-model is given, and operator 'back-translate' is not"),
        ({"num_variants": 4}, "--num-variants counts variants of rules(.|\n)*--num-generated 4"),
        ({"num_generated": -1}, "--num-generated is -1"),
        ({"num_generated": 1 << 15}, "32768 variants of each original"),
        ({"sampling_temperature": 0.0}, "--sampling-temperature is 0.0"),
        ({"sampling_top_k": -1}, "--sampling-top-k is -1"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    models = {"translation_model": "x", "back_translation_model": "y"}
    with pytest.raises(UsageError, match=message):
        augmented(["a film"], tmp_path, **{**models, **fields})


def test_what_is_not_used_is_no_part_of_the_identity(tmp_path: Path) -> None:
    plain = Augment(dataset="d", text_column="text", output_dir="c")
    other = Augment(
        dataset="d",
        text_column="text",
        output_dir="c",
        num_generated=5,
        sampling_temperature=0.5,
        translation_prefix="x",
    )
    assert plain.identity_config() == other.identity_config()
    assert not {"num_generated", "sampling_top_k", "translation_model"} & plain.identity_config().keys()
    assert json.dumps(plain.identity_config())
