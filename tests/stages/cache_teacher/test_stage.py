"""`cache-teacher` from corpus to view: computed once, refused in time, the same bytes whatever happened.

`bench`, `files`, `forwards` and `no_weights` are fixtures of conftest.py.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kd.pipeline.errors import KdError, RefusedError, UsageError
from kd.pipeline.store import Signal, open_store, open_view
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.cache_teacher import capture as capture_module
from kd.stages.cache_teacher.onednn import use_onednn
from kd.stages.cache_teacher.runner import plan_batches

Files = Callable[[Path], dict[str, str]]
ALL = "logits,hidden.cls@all,hidden.mean@all,hidden.tok@all"


def spoiled(teacher: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a teacher with other weights."""
    shutil.copytree(teacher, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# --- computed once -----------------------------------------------------------------------------------------------


def test_the_same_corpus_again_runs_nothing_loads_nothing_and_says_so(
    bench: Any, sentences: list[str], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = bench.corpus(sentences)
    first = bench.capture(corpus)
    assert (first.summary["rows"], first.summary["rows_new"], first.summary["rows_computed"]) == (200, 200, 200)
    before = files(bench.store)

    from kd.stages.cache_teacher import teacher

    monkeypatch.setattr(teacher, "_load", lambda *args: pytest.fail("the weights were loaded"))
    again = bench.capture(corpus, output_dir=str(bench.folder / "again"))
    assert not again.skipped
    assert {name: again.summary[name] for name in ("rows_new", "rows_known", "rows_computed", "bytes_written")} == {
        "rows_new": 0,
        "rows_known": 200,
        "rows_computed": 0,
        "bytes_written": 0,
    }
    assert again.summary["store_digest"] == first.summary["store_digest"]
    assert any("the teacher does not run" in text for text in bench.said)
    assert files(bench.store) == before

    assert bench.capture(corpus).skipped
    assert any("is already done" in text for text in bench.said)


def test_an_overlapping_corpus_costs_exactly_its_unseen_rows(
    bench: Any, sentences: list[str], forwards: list[int]
) -> None:
    bench.capture(bench.corpus(sentences[:100]))
    forwards.clear()
    outcome = bench.capture(bench.corpus(sentences[10:110], "second"), output_dir=str(bench.folder / "second"))
    assert sum(forwards) == outcome.summary["rows_computed"] == outcome.summary["rows_new"] == 10
    assert outcome.summary["rows_known"] == 90
    rows = [open_view(bench.folder / name).rows for name in ("view", "second")]
    assert np.array_equal(rows[0][10:], rows[1][:90])


def test_rows_that_look_alike_to_the_teacher_are_computed_once(bench: Any, forwards: list[int]) -> None:
    # Without a sidecar there is nothing to try out first.
    outcome = bench.capture(bench.corpus(["the cat", "a dog", "The CAT", "the cat ", "a dog"]), sidecars=("none",))
    assert (sum(forwards), outcome.summary["rows"], outcome.summary["duplicates"]) == (2, 5, 3)
    assert open_view(bench.folder / "view").rows.tolist() == [0, 1, 0, 0, 1]


def test_a_second_set_of_signals_rewrites_nothing(bench: Any, sentences: list[str], files: Files) -> None:
    corpus = bench.corpus(sentences)
    bench.capture(corpus, signals="logits")
    before = files(bench.store)
    outcome = bench.capture(corpus, signals="logits,hidden.tok@1", output_dir=str(bench.folder / "more"))
    after = files(bench.store)
    assert before.items() <= after.items()
    assert outcome.summary["rows_computed"] == 200
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"hidden.tok", "commits"}


def test_signals_of_another_corpus_fill_only_the_shards_it_touches(
    bench: Any, sentences: list[str], forwards: list[int]
) -> None:
    bench.capture(bench.corpus(sentences))
    forwards.clear()
    part = bench.corpus(sentences[:20], "part")
    outcome = bench.capture(part, signals="hidden.cls@2", output_dir=str(bench.folder / "part"))
    assert outcome.summary["shards_computed"] == 1
    assert sum(forwards) == outcome.summary["rows_computed"] + 1 == 65  # one row is the trial of the hooks


def test_a_view_whose_store_is_gone_or_elsewhere_is_made_again(bench: Any, sentences: list[str]) -> None:
    corpus = bench.corpus(sentences[:30])
    bench.capture(corpus)
    shutil.rmtree(bench.store)
    again = bench.capture(corpus)
    assert not again.skipped and again.summary["rows_computed"] == 30
    other = bench.capture(corpus, store=str(bench.folder / "other"))
    assert not other.skipped
    assert open_view(bench.folder / "view").store.files.address == str(bench.folder / "other")


# --- what is in the store ----------------------------------------------------------------------------------------


def test_every_signal_equals_plain_transformers_row_by_row(bench: Any, sentences: list[str]) -> None:
    bench.capture(bench.corpus(sentences[:60]), signals=ALL, hidden_dtype="float32")
    view = open_view(bench.folder / "view")
    model = AutoModelForSequenceClassification.from_pretrained(str(bench.teacher)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    read = view.reader
    for example in range(0, 60, 7):
        with torch.inference_mode():
            expected = model(**tokenizer(sentences[example], return_tensors="pt"), output_hidden_states=True)
        rows = view.rows[[example]]
        np.testing.assert_allclose(read.gather("logits", rows), expected.logits, rtol=1e-4, atol=1e-5)
        for layer, hidden_1TH in enumerate(expected.hidden_states):
            values, lengths = read.gather_tokens(Signal("hidden.tok", layer), rows)
            assert lengths.tolist() == [hidden_1TH.shape[1]]
            np.testing.assert_allclose(values, hidden_1TH, rtol=1e-4, atol=1e-5)
            cls, mean = (read.gather(Signal(name, layer), rows) for name in ("hidden.cls", "hidden.mean"))
            np.testing.assert_allclose(cls, hidden_1TH[:, 0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(mean, hidden_1TH.mean(1), rtol=1e-4, atol=1e-5)


def test_logits_are_bit_for_bit_those_of_a_live_teacher_on_the_stores_batches(bench: Any, sentences: list[str]) -> None:
    bench.capture(bench.corpus(sentences), batch_tokens=512)
    store = open_store(bench.store)
    model = AutoModelForSequenceClassification.from_pretrained(str(bench.teacher)).eval()
    use_onednn(model)
    for shard in range(4):
        read = store.read_tokens(shard)
        for slots in plan_batches(read.token_ids.lengths, store.layout.batch_tokens):
            ids = read.token_ids.take(slots)
            width = int(ids.lengths.max())
            padded = torch.from_numpy(ids.to_padded(0, length=width).astype(np.int64))
            mask = torch.from_numpy((np.arange(width) < ids.lengths[:, None]).astype(np.int64))
            with torch.inference_mode():
                expected = model(input_ids=padded, attention_mask=mask).logits.numpy()
            assert np.array_equal(store.reader().gather("logits", read.rows[slots]), expected)


def test_hidden_states_are_float16_of_what_float32_would_be(bench: Any, sentences: list[str]) -> None:
    corpus = bench.corpus(sentences[:40])
    bench.capture(corpus, signals="hidden.mean@2,hidden.tok@1")
    bench.capture(
        corpus,
        signals="hidden.mean@2,hidden.tok@1",
        hidden_dtype="float32",
        store=str(bench.folder / "exact"),
        output_dir=str(bench.folder / "exact-view"),
    )
    rows = np.arange(40)
    half, full = open_store(bench.store).reader(), open_store(bench.folder / "exact").reader()
    for name in ("hidden.mean@2", "hidden.tok@1"):
        gather = (lambda r: r.gather_tokens(name, rows)[0]) if "tok" in name else (lambda r: r.gather(name, rows))  # noqa: B023
        assert gather(half).dtype == np.float16
        assert np.array_equal(gather(half), gather(full).astype(np.float16))


def test_pairs_are_read_with_their_segments(bench: Any, sentences: list[str]) -> None:
    file = bench.folder / "pairs.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "other"], *zip(sentences[:20], sentences[20:40], strict=True)])
    bench.capture(str(file), text_pair_column="other", label_column=None)
    model = AutoModelForSequenceClassification.from_pretrained(str(bench.teacher)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    view = open_view(bench.folder / "view")
    for example in (0, 7, 19):
        with torch.inference_mode():
            inputs = tokenizer(sentences[example], sentences[20 + example], return_tensors="pt")
            assert inputs["token_type_ids"].any()
            expected = model(**inputs).logits
        np.testing.assert_allclose(view.reader.gather("logits", view.rows[[example]]), expected, rtol=1e-4, atol=1e-5)


def test_two_stores_of_one_corpus_are_equal_byte_for_byte(bench: Any, sentences: list[str], files: Files) -> None:
    corpus = bench.corpus(sentences)
    one = bench.capture(corpus, signals=ALL)
    two = bench.capture(corpus, signals=ALL, store=str(bench.folder / "two"), output_dir=str(bench.folder / "v2"))
    assert one.summary["store_digest"] == two.summary["store_digest"]
    assert files(bench.store) == files(bench.folder / "two")


def test_the_layout_of_a_store_is_fixed_and_other_flags_are_ignored_with_a_warning(
    bench: Any, sentences: list[str], files: Files
) -> None:
    corpus = bench.corpus(sentences)
    bench.capture(corpus, batch_tokens=512, rows_per_shard=50)
    flags = {"batch_tokens": 4096, "rows_per_shard": 10, "tokens_per_shard": 1000}
    bench.capture(corpus, signals="hidden.tok@2", output_dir=str(bench.folder / "v2"), **flags)
    assert [text for text in bench.said if "ignored" in text] == [
        f"--batch-tokens 4096 is ignored: store {bench.store} was made with 512",
        f"--rows-per-shard 10 is ignored: store {bench.store} was made with 50",
        f"--tokens-per-shard 1000 is ignored: store {bench.store} was made with 131072",
    ]
    bench.capture(
        corpus,
        signals="logits,hidden.tok@2",
        batch_tokens=512,
        rows_per_shard=50,
        store=str(bench.folder / "at once"),
        output_dir=str(bench.folder / "v3"),
    )
    tokens = {name: digest for name, digest in files(bench.store).items() if name.startswith("hidden.tok/")}
    assert tokens.items() <= files(bench.folder / "at once").items()


def test_cut_rows_are_counted(bench: Any, sentences: list[str]) -> None:
    outcome = bench.capture(bench.corpus(sentences), max_length=10)
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    expected = sum(len(tokenizer(text)["input_ids"]) > 10 for text in sentences)
    assert outcome.summary["truncated_rows"] == expected > 0


def test_more_tokens_than_the_teacher_takes_are_cut_to_what_it_takes(bench: Any) -> None:
    outcome = bench.capture(bench.corpus(["the cat " * 60, "a dog"]), max_length=512)
    assert outcome.summary["truncated_rows"] == 1
    assert open_store(bench.store).identity.capture["max_length"] == 64
    assert any("cut at 64 tokens" in text for text in bench.said)


# --- labels ------------------------------------------------------------------------------------------------------


def test_gold_labels_are_numbered_as_the_teacher_numbers_them(bench: Any, sentences: list[str]) -> None:
    order = ("positive", "negative", "neutral")
    bench.capture(bench.corpus(sentences[:6], labels=order))
    view = open_view(bench.folder / "view")
    assert view.info["label_names"] == ["negative", "neutral", "positive"]
    assert view.examples.column("label_gold").to_pylist() == [2, 0, 1, 2, 0, 1]


def test_a_label_the_teacher_does_not_know_is_refused(bench: Any, sentences: list[str], no_weights: None) -> None:
    with pytest.raises(RefusedError, match=r"'positiv' .*did you mean 'positive'"):
        bench.capture(bench.corpus(sentences[:6], labels=("negative", "positiv")))


def test_numbered_labels_are_taken_with_a_warning(bench: Any, sentences: list[str]) -> None:
    bench.capture(bench.corpus(sentences[:6], labels=("2", "0", "1")))
    assert any("by number, not by name" in text for text in bench.said)


def test_unlabelled_text_takes_the_teachers_names(bench: Any, sentences: list[str]) -> None:
    bench.capture(bench.corpus(sentences[:6]), label_column=None)
    view = open_view(bench.folder / "view")
    assert view.info["label_names"] == ["negative", "neutral", "positive"]
    assert view.examples.column("has_gold").to_pylist() == [False] * 6


# --- sidecars ----------------------------------------------------------------------------------------------------


def test_sidecars_hold_the_whole_teacher_under_the_names_of_its_checkpoint(bench: Any, sentences: list[str]) -> None:
    bench.capture(bench.corpus(sentences[:8]), sidecars=("embeddings", "layers", "head"))
    store = open_store(bench.store)
    parts = {name: store.sidecar(name) for name in ("embeddings", "layers", "head")}
    tensors = load_file(bench.teacher / "model.safetensors")
    assert {name for part in parts.values() for name in part} == set(tensors)
    assert sum(map(len, parts.values())) == len(tensors)
    assert "bert.embeddings.word_embeddings.weight" in parts["embeddings"]
    assert "bert.encoder.layer.1.output.dense.weight" in parts["layers"]
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(parts["head"])
    for part in parts.values():
        for name, value in part.items():
            assert np.array_equal(value, tensors[name].numpy())


def test_a_sidecar_can_be_added_later_and_nothing_else_is_written(
    bench: Any, sentences: list[str], files: Files
) -> None:
    corpus = bench.corpus(sentences[:8])
    bench.capture(corpus, sidecars=("none",))
    before = files(bench.store)
    assert not any("embeddings" in name for name in before)
    outcome = bench.capture(corpus, sidecars=("head",))
    assert outcome.summary["rows_computed"] == 0
    new = files(bench.store).keys() - before.keys()
    assert {Path(name).parent.as_posix() for name in new} == {"sidecars/head", "sidecars/head.proof"}


def test_the_stores_tokenizer_and_config_need_no_teacher(bench: Any, sentences: list[str], tmp_path: Path) -> None:
    bench.teacher = Path(shutil.copytree(bench.teacher, tmp_path / "teacher"))
    expected = AutoTokenizer.from_pretrained(str(bench.teacher))(sentences)["input_ids"]
    bench.capture(bench.corpus(sentences), max_length=12)
    shutil.rmtree(bench.teacher)
    store = open_store(bench.store)
    tokenizer = AutoTokenizer.from_pretrained(str(store.sidecar_folder("tokenizer")))
    assert tokenizer(sentences)["input_ids"] == expected
    config = AutoConfig.from_pretrained(str(store.sidecar_folder("config")))
    assert (config.num_hidden_layers, config.id2label[2]) == (2, "positive")


# --- refused in time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "x"}, "either --corpus or --dataset"),
        ({"dataset": None}, "either --corpus or --dataset"),
        ({"text_column": None}, "needs --text-column"),
        ({"dataset": None, "corpus": "x"}, "a corpus knows its columns"),
        ({"sidecars": ("embedings",)}, "unknown sidecar 'embedings' .did you mean 'embeddings'"),
        ({"max_bytes": "ten"}, "cannot read 'ten' as a size"),
        ({"workers": 0}, "at least one worker"),
        ({"cluster": "locl"}, "did you mean 'local'"),
        ({"max_length": 0}, "at least one token"),
    ],
)
def test_malformed_options_are_usage_errors_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    fields = {"dataset": "d.csv", "teacher": "/nowhere", "store": "s", "output_dir": "v", "text_column": "text"}
    with pytest.raises(UsageError, match=message):
        CacheTeacher(**(fields | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": "logit"}, "unknown signal 'logit' .did you mean 'logits'"),
        ({"signals": "hidden.cls@3"}, "the teacher has layers 0 to 2, got 3"),
        ({"signals": "hidden.cls"}, "needs a layer"),
        ({"device": "cuda:1"}, "device 'cuda:1' is not available here"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"text_column": "txt"}, "did you mean 'text'"),
        ({"teacher": "/no/such/teacher"}, "does not exist"),
    ],
)
def test_what_can_be_known_without_weights_is_refused_without_them(
    bench: Any, sentences: list[str], no_weights: None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KdError, match=message):
        bench.capture(bench.corpus(sentences[:3]), **options)
    assert not bench.store.exists()


def test_a_bare_encoder_gives_hidden_states_and_no_logits(bench: Any, sentences: list[str], tmp_path: Path) -> None:
    bench.teacher = Path(shutil.copytree(bench.teacher, tmp_path / "bare"))
    file = bench.teacher / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["BertModel"]}))
    corpus = bench.corpus(sentences[:5])
    with pytest.raises(RefusedError, match="has no classification head"):
        bench.capture(corpus)
    bench.capture(corpus, signals="hidden.mean@last", hidden_dtype="float32")
    view = open_view(bench.folder / "view")
    model = AutoModel.from_pretrained(str(bench.teacher)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    with torch.inference_mode():
        expected = model(**tokenizer(sentences[3], return_tensors="pt")).last_hidden_state.mean(1)
    np.testing.assert_allclose(view.reader.gather("hidden.mean@2", view.rows[[3]]), expected, rtol=1e-4, atol=1e-5)


def test_a_plan_over_the_budget_is_refused_with_nothing_written(
    bench: Any, sentences: list[str], forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = bench.corpus(sentences)
    with pytest.raises(RefusedError, match="--max-bytes: 1 KB") as caught:
        bench.capture(corpus, signals="hidden.tok@all", max_bytes="1KB")
    assert any(line.startswith("hidden.tok@") for line in caught.value.details)

    from kd.pipeline.store import plan

    monkeypatch.setattr(plan, "free_bytes", lambda url: 5000)
    with pytest.raises(RefusedError, match="free on its disk"):
        bench.capture(corpus)
    assert forwards == [] and not bench.store.exists()


def test_a_shard_smaller_than_a_row_is_a_usage_error(bench: Any, sentences: list[str]) -> None:
    with pytest.raises(UsageError, match="does not hold a row of 64 tokens"):
        bench.capture(bench.corpus(sentences), tokens_per_shard=32)


def test_missing_head_weights_are_refused_before_any_forward(
    bench: Any, sentences: list[str], tmp_path: Path, forwards: list[int]
) -> None:
    bench.teacher = spoiled(bench.teacher, tmp_path / "headless", lambda tensors: tensors.pop("classifier.weight"))
    with pytest.raises(RefusedError, match="lacks 1 tensors"):
        bench.capture(bench.corpus(sentences))
    assert forwards == [] and not bench.store.exists()


def test_a_hidden_dtype_other_than_the_stores_is_refused(bench: Any, sentences: list[str]) -> None:
    corpus = bench.corpus(sentences[:10])
    bench.capture(corpus, signals="hidden.cls@1")
    with pytest.raises(RefusedError, match=r"holds hidden\.cls@1 as float16, --hidden-dtype asks for float32"):
        bench.capture(corpus, signals="hidden.cls@1", hidden_dtype="float32", output_dir=str(bench.folder / "v2"))
    bench.capture(corpus, signals="hidden.cls@1:float32", output_dir=str(bench.folder / "v2"))
    assert open_view(bench.folder / "v2").reader.gather("hidden.cls@1", [0]).dtype == np.float32
    assert open_view(bench.folder / "view").reader.gather("hidden.cls@1", [0]).dtype == np.float16


BOTH = "hidden.tok@1:float32,hidden.tok@1:int8,hidden.tok@1:float16,logits:int8,logits"


def test_further_encodings_of_float32_need_no_teacher_and_have_its_bytes(
    bench: Any, sentences: list[str], files: Files, forwards: list[int]
) -> None:
    corpus = bench.corpus(sentences[:70])
    bench.capture(corpus, signals="logits,hidden.tok@1:float32")
    before = files(bench.store)
    forwards.clear()
    plan = bench.capture(corpus, signals=BOTH, output_dir=str(bench.folder / "v2"), dry_run=True).summary
    assert (plan["rows_to_compute"], plan["estimated_seconds"]) == (0, 0.0)
    summary = bench.capture(corpus, signals=BOTH, output_dir=str(bench.folder / "v2")).summary
    assert forwards == [] and summary["rows_computed"] == 0 and summary["rows_recoded"] == 70
    assert summary["bytes_written"] == plan["bytes_total"]
    after = files(bench.store)
    assert {name: after[name] for name in before if "views/" not in name} == {
        name: digest for name, digest in before.items() if "views/" not in name
    }
    assert any("encoded again from the store" in text for text in bench.said)
    view = open_view(bench.folder / "v2")
    assert [str(signal) for signal in view.signals] == [
        "hidden.tok@1:float32", "hidden.tok@1:int8", "hidden.tok@1:float16", "logits:int8", "logits:float32",
    ]  # fmt: skip
    again = bench.capture(corpus, signals=BOTH, output_dir=str(bench.folder / "v2"))
    assert again.skipped

    at_once = bench.folder / "at-once"
    order = "logits,hidden.tok@1:float32,hidden.tok@1:int8,hidden.tok@1:float16,logits:int8"
    bench.capture(corpus, signals=order, store=str(at_once), output_dir=str(bench.folder / "v3"))
    captured = files(at_once)
    arrays = [name for name in captured if "/c/" in name]
    assert len(arrays) == 9 * 2 and {name: captured[name] for name in arrays} == {
        name: digest for name, digest in after.items() if "/c/" in name
    }
    assert open_store(at_once).digest() == open_store(bench.store).digest()


def test_a_lossy_encoding_is_no_source_for_another(bench: Any, sentences: list[str], forwards: list[int]) -> None:
    corpus = bench.corpus(sentences[:10])
    bench.capture(corpus, signals="hidden.tok@1")
    forwards.clear()
    summary = bench.capture(corpus, signals="hidden.tok@1:int8", output_dir=str(bench.folder / "v2")).summary
    assert forwards and summary["rows_computed"] == 10 and summary["rows_recoded"] == 0
    exact = bench.folder / "exact"
    bench.capture(corpus, signals="hidden.tok@1:float32", store=str(exact), output_dir=str(bench.folder / "v3"))
    found, wanted = open_view(bench.folder / "v2"), open_view(bench.folder / "v3")
    values, lengths = found.reader.gather_tokens("hidden.tok@1", found.rows)
    expected, _ = wanted.reader.gather_tokens("hidden.tok@1", wanted.rows)
    assert (np.abs(values - expected) <= np.abs(expected).max(axis=-1, keepdims=True) / 254 * 1.001).all()
    assert values.dtype == np.float32 and (lengths > 0).all()


def test_a_teacher_that_changes_under_the_capture_is_refused(bench: Any, sentences: list[str]) -> None:
    bench.capture(bench.corpus(sentences[:4]))
    job = capture_module.CaptureJob(
        store=open_store(bench.store),
        teacher=str(bench.teacher),
        trust_remote_code=False,
        tensors="0" * 64,
        dtype="float32",
        device="cpu",
        specs=(),
    )
    with pytest.raises(RefusedError, match="changed while it was captured"):
        capture_module._loaded_teacher(job)


# --- bad values --------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_refused_by_signal_and_row(
    bench: Any, sentences: list[str], tmp_path: Path
) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        # "dinner" alone is poisoned, so the rows that have it are.
        tensors["bert.embeddings.word_embeddings.weight"][dinner] = float("nan")

    dinner = AutoTokenizer.from_pretrained(str(bench.teacher)).convert_tokens_to_ids("dinner")
    bench.teacher = spoiled(bench.teacher, tmp_path / "poisoned", poison)
    texts = [*[text for text in sentences if "dinner" not in text][:9], "my old friend likes a warm dinner"]
    with pytest.raises(RefusedError, match=r"logits of row 9 \(shard 0, slot 9\) is not finite: nan"):
        bench.capture(bench.corpus(texts), sidecars=("none",))
    assert open_store(bench.store).missing([Signal("logits")]) != {}
    assert not (bench.folder / "view" / "manifest.json").exists()


def test_float16_overflow_is_refused_by_signal_row_and_token_and_float32_takes_it(
    bench: Any, sentences: list[str], tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.encoder.layer.0.output.LayerNorm.weight"].mul_(1e6)

    bench.teacher = spoiled(bench.teacher, tmp_path / "large", enlarge)
    corpus = bench.corpus(sentences[:5])
    with pytest.raises(RefusedError, match=r"hidden\.tok@1 of row \d .*, token \d+\) does not fit float16") as caught:
        bench.capture(corpus, signals="hidden.tok@1")
    assert caught.value.fix == "capture this signal as float32"
    fresh = {"store": str(bench.folder / "fresh"), "output_dir": str(bench.folder / "v2")}
    bench.capture(corpus, signals="hidden.tok@1", hidden_dtype="float32", **fresh)


# --- dry run -----------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_knows_what_the_real_one_will_do(
    bench: Any, sentences: list[str], own_cache: Path
) -> None:
    corpus = bench.corpus(sentences + sentences[:5])
    options = {"signals": "logits,hidden.tok@1", "sidecars": ("embeddings", "layers", "head")}
    before = sorted(bench.folder.rglob("*"))
    plan = bench.capture(corpus, dry_run=True, **options).summary
    written = set(bench.folder.rglob("*")) - set(before)
    assert all(own_cache in (path, *path.parents) for path in written)
    assert (plan["rows"], plan["rows_new"], plan["duplicates"], plan["shards_to_compute"]) == (205, 200, 5, 4)
    assert plan["estimated_seconds"] >= 0 and plan["estimated_rows_per_s"] > 0

    real = bench.capture(corpus, **options).summary
    sizes: dict[str, int] = {}
    for file in bench.store.rglob("*"):
        if file.is_file() and "c" in file.relative_to(bench.store).parts:
            name = file.relative_to(bench.store).parts[0]
            sizes[name] = sizes.get(name, 0) + file.stat().st_size
    planned = plan["bytes_by_signal"]
    assert {"logits": planned["logits"], "hidden.tok": planned["hidden.tok@1"]} == {
        name: sizes[name] for name in ("logits", "hidden.tok")
    }
    assert real["bytes_written"] == planned["logits"] + planned["hidden.tok@1"]
    for name in options["sidecars"]:
        stored = (bench.store / "sidecars" / name / "tensors.safetensors").stat().st_size
        # Offsets of the tensors may have a digit more or less in another order.
        assert planned[f"sidecar {name}"] == pytest.approx(stored, abs=32)


def test_a_dry_run_on_a_full_store_plans_nothing_and_loads_nothing(
    bench: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch, files: Files
) -> None:
    corpus = bench.corpus(sentences)
    bench.capture(corpus)
    before = files(bench.store)

    from kd.stages.cache_teacher import teacher

    monkeypatch.setattr(teacher, "_load", lambda *args: pytest.fail("the weights were loaded"))
    plan = bench.capture(corpus, dry_run=True).summary
    assert (plan["rows_to_compute"], plan["bytes_total"], plan["estimated_seconds"]) == (0, 0, 0.0)
    assert files(bench.store) == before


def test_a_dry_run_over_the_budget_shows_the_plan_and_fails(bench: Any, sentences: list[str]) -> None:
    stage = bench.stage(bench.corpus(sentences))
    outcome = bench.capture(bench.corpus(sentences), dry_run=True, max_bytes="1KB")
    assert isinstance(outcome.failure, RefusedError)
    text = stage.report(outcome.summary)
    assert "200 new, 0 known" in text and "sidecar embeddings" in text


# --- interrupted -------------------------------------------------------------------------------------------------


def test_an_interrupted_capture_goes_on_where_it_stopped(
    bench: Any, sentences: list[str], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = bench.corpus(sentences)
    options = {"signals": "logits,hidden.tok@2", "rows_per_shard": 32}
    undisturbed = bench.capture(corpus, store=str(bench.folder / "whole"), **options)
    compute = capture_module.CaptureJob.compute

    def interrupted(self: Any, shard: int, advance: Any) -> Any:
        if shard == 3:
            raise KeyboardInterrupt
        return compute(self, shard, advance)

    with monkeypatch.context() as patch:
        patch.setattr(capture_module.CaptureJob, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.capture(corpus, output_dir=str(bench.folder / "v2"), **options)
    assert sorted(open_store(bench.store).missing([Signal("logits")])) == [3, 4, 5, 6]
    outcome = bench.capture(corpus, output_dir=str(bench.folder / "v2"), **options)
    assert outcome.summary["rows_computed"] == 200 - 3 * 32
    assert outcome.summary["store_digest"] == undisturbed.summary["store_digest"]
    assert files(bench.store) == files(bench.folder / "whole")


def test_a_view_is_in_the_register_of_its_store_as_soon_as_its_rows_are(
    bench: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.stages.cache_teacher import capture

    seen: list[Any] = []
    compute = capture.CaptureJob.compute
    monkeypatch.setattr(
        capture.CaptureJob,
        "compute",
        lambda job, *args: seen.append(open_store(bench.store).inspect()["views"]) or compute(job, *args),
    )
    outcome = bench.capture(bench.corpus(sentences[:20]), signals="logits,hidden.tok@1")
    (view,) = open_store(bench.store).inspect()["views"]
    assert seen == [[view]] and outcome.artifact is not None
    assert view["fingerprint"] == outcome.artifact.fingerprint
    assert (view["there"], view["rows"], view["signals"]) == (
        True,
        20,
        ["logits:float32", "hidden.tok@1:float16"],
    )
    assert view["shards"] == [[0, 0]] and view["corpus"].endswith("corpus.csv")
