"""`kd augment` end to end: provenance, determinism, leakage, interruption, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import IncompleteError, RefusedError, UsageError
from kd.pipeline.ragged import Ragged
from kd.pipeline.stage import NullProgress, StageContext, execute
from kd.stages.augment import Augment, generate, operators, tagger
from kd.stages.augment import augment as augment_module
from kd.stages.augment.dedup import text_keys
from kd.stages.augment.pools import Pools
from kd.stages.augment.rules import RuleAugmenter, Rules
from kd.stages.augment.words import split_words
from kd.stages.corpus import Corpus, DatasetSource, hide_labels, load_corpus, open_corpus


def write_dataset(folder: Path, sentences: list[str], *, order: list[int] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*range(len(sentences))] if order is None else order
    train, test = [i for i in rows if i % 10], [i for i in rows if i % 10 == 0]
    for name, part in (("train", train), ("test", test)):
        table = pa.table({"text": [sentences[i] for i in part], "label": ["good" if i % 3 else "bad" for i in part]})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


@pytest.fixture
def dataset(tmp_path: Path, sentences: list[str]) -> Path:
    return write_dataset(tmp_path / "films", sentences[:60])


def stage(dataset: Path | str, output: Path, **fields: Any) -> Augment:
    options = {"text_column": "text", "label_column": "label", "tagger": "heuristic", "num_variants": 4, **fields}
    return Augment(dataset=str(dataset), output_dir=str(output), **options)


def run(dataset: Path | str, output: Path, **fields: Any) -> Corpus:
    execute(stage(dataset, output, **fields))
    return open_corpus(output)


def small_chunks(monkeypatch: pytest.MonkeyPatch, variants: int = 40) -> None:
    monkeypatch.setattr(augment_module, "VARIANTS_PER_CHUNK", variants)


class Messages(NullProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str, **fields: Any) -> None:
        self.warnings.append(text)


# What comes out --------------------------------------------------------------------------------------------------


def test_originals_come_first_with_their_labels_then_variants_without(dataset: Path, tmp_path: Path) -> None:
    corpus = run(dataset, tmp_path / "corpus")
    originals = load_corpus(DatasetSource(dataset=str(dataset), text_column="text", label_column="label"))
    rows = corpus.table.to_pylist()
    ids = [row["example_id"] for row in rows[:54]]
    assert ids == sorted(ids)
    assert sorted(row["text_a"] for row in rows[:54]) == sorted(originals.texts()[0])
    labels = dict(zip(originals.texts()[0], originals.labels()[0].tolist(), strict=True))
    assert [labels[row["text_a"]] for row in rows[:54]] == corpus.labels()[0][:54].tolist()
    assert corpus.info == originals.info
    assert all(row["aug_op"] == "orig" and row["parent_id"] is None and row["has_gold"] for row in rows[:54])
    by_id = {row["example_id"]: row for row in rows}
    assert len(by_id) == len(rows) > 150
    for row in rows[54:]:
        parent = by_id[row["parent_id"]]
        assert parent["aug_op"] == "orig"
        assert (row["has_gold"], row["label_gold"]) == (False, None)
        assert set(row["aug_op"].split("+")) <= {"mask", "pos", "ngram"}
        assert row["aug_iter"] in range(4)
        assert (row["seed"], row["split"], row["source"]) == (42, "train", "films")
        assert row["text_a"] == " ".join(split_words(row["text_a"]))
    assert all(row["n_words_a"] == len(split_words(row["text_a"])) for row in rows)


def test_the_manifest_adds_up(dataset: Path, tmp_path: Path) -> None:
    execute(stage(dataset, tmp_path / "corpus"))
    manifest = read_manifest(tmp_path / "corpus")
    assert manifest is not None
    summary = manifest["summary"]
    assert summary["variants_made"] == 54 * 4 == summary["variants"] + sum(summary["variants_dropped"].values())
    assert summary["rows"] == summary["originals"] + summary["variants"] == len(open_corpus(tmp_path / "corpus"))
    assert summary["labelled"] + summary["unlabelled"] == summary["originals"] == 54
    augmentation = manifest["content"]["augmentation"]
    assert augmentation["tagger"] == {"name": "heuristic", "version": "1"}
    assert augmentation["settings"]["ngram"] == 0.25
    assert augmentation["pools"]["words"] > 10
    assert not (tmp_path / "corpus" / "work").exists()


@pytest.mark.parametrize("pair", [False, True])
def test_every_variant_can_be_made_again_from_its_row_and_the_manifest(
    tmp_path: Path, sentences: list[str], pair: bool
) -> None:
    pq.write_table(pa.table({"text": sentences[:30], "other": sentences[40:70]}), tmp_path / "x.parquet")
    fields = {"text_pair_column": "other", "operators": ("mask", "pos", "swap", "ngram", "exchange")} if pair else {}
    corpus = run(tmp_path / "x.parquet", tmp_path / "corpus", label_column=None, num_variants=5, seed=7, **fields)
    said = (read_manifest(tmp_path / "corpus") or {})["content"]["augmentation"]
    rows = corpus.table.to_pylist()
    originals = {row["example_id"]: row for row in rows if row["parent_id"] is None}
    names = ("text_a", "text_b") if pair else ("text_a",)
    tag = tagger.load_tagger(said["tagger"]["name"]).tag
    pairs = {
        key: [[*zip(tag(words), words, strict=True)] for words in (split_words(row[name]) for name in names)]
        for key, row in originals.items()
    }
    pools = Pools.of(Counter(entry for sides in pairs.values() for side in sides for entry in side))
    assert pools.digest == said["pools"]["digest"]
    settings = {field.name: said["settings"][field.name] for field in dataclasses.fields(Rules)}
    rules = Rules(**settings if pair else {**settings, "pair_sides": "cycle"})
    augmenter = RuleAugmenter(rules, pools, said["seed"], mask_word=len(pools.words))
    strings = [*pools.words, rules.mask_token]
    assert len(rows) > 100
    for row in rows[30:]:
        assert row["aug_config_hash"].hex() == said["config_hash"] == rules.config_hash.hex()
        sides = [[pools.numbers[entry] for entry in side] for side in pairs[row["parent_id"]]]
        texts = [Ragged.from_rows([side], "int64") for side in sides]
        made = augmenter.variants([row["parent_id"]], texts, row["aug_iter"] + 1)
        new = [
            " ".join(strings[number] for number in side.words[row["aug_iter"]])
            if side.is_new[row["aug_iter"]]
            else originals[row["parent_id"]][name]
            for side, name in zip(made.changed, names, strict=True)
        ]
        assert [row[name] for name in names] == (new[::-1] if made.exchanged[row["aug_iter"]] else new)


def test_the_report_has_numbers_and_examples_of_each_operator(dataset: Path, tmp_path: Path) -> None:
    corpus = run(dataset, tmp_path / "corpus", operators=("mask", "delete", "ngram"))
    report = (tmp_path / "corpus" / "report.md").read_text()
    summary = (read_manifest(tmp_path / "corpus") or {})["summary"]
    used = [row["aug_op"].split("+") for row in corpus.table.to_pylist()[54:]]
    assert summary["rows_by_operator"] == {n: sum(n in names for names in used) for n in ("mask", "delete", "ngram")}
    for name in ("mask", "delete", "ngram"):
        changes = summary["changes"][name]
        places = changes.get("words", changes.get("texts"))
        assert f"| {name} | {summary['rows_by_operator'][name]} | {places} | 0 |" in report
    texts = {row["text_a"]: row for row in corpus.table.to_pylist()}
    section = report.split("## mask\n\n| original | variant |\n|---|---|\n")[1].split("\n\n")[0]
    shown = [line.strip("| ").split(" | ") for line in section.splitlines()]
    assert len(shown) == 3
    for old, new in shown:
        assert texts[new]["parent_id"] == texts[old]["example_id"]
        assert texts[new]["aug_op"] == "mask" and "[MASK]" in new
    assert f"| duplicate | {summary['variants_dropped']['duplicate']} |" in report


def test_datasets_opens_a_corpus(dataset: Path, tmp_path: Path) -> None:
    import datasets

    corpus = run(dataset, tmp_path / "corpus")
    loaded = datasets.load_dataset(str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == len(corpus)


def test_pairs_change_sides_in_turn_and_keep_the_other(tmp_path: Path, sentences: list[str]) -> None:
    pq.write_table(pa.table({"text": sentences[:40], "other": sentences[40:80]}), tmp_path / "x.parquet")
    fields = {"text_pair_column": "other", "label_column": None, "num_variants": 6}
    corpus = run(tmp_path / "x.parquet", tmp_path / "corpus", **fields)
    rows = corpus.table.to_pylist()
    by_id = {row["example_id"]: row for row in rows}
    seen = set()
    for row in rows[40:]:
        parent, side = by_id[row["parent_id"]], row["aug_side"]
        seen.add(side)
        assert side == ("a", "b", "both")[row["aug_iter"] % 3]
        assert side != "a" or row["text_b"] == parent["text_b"]
        assert side != "b" or row["text_a"] == parent["text_a"]
        assert row["n_words_b"] == len(split_words(row["text_b"]))
    assert seen == {"a", "b", "both"}


def test_zero_probabilities_only_import(dataset: Path, tmp_path: Path) -> None:
    """Every variant equals its original and is dropped: output is input."""
    plain = run(dataset, tmp_path / "plain", operators=("none",))
    zero = run(dataset, tmp_path / "zero", mask_probability=0.0, pos_probability=0.0, ngram_probability=0.0)
    assert plain.fingerprint == zero.fingerprint
    assert len(plain) == 54


def test_a_variant_that_changes_nothing_is_dropped_though_its_spacing_would_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["Well, is it?", "No (really)!"]}), tmp_path / "x.parquet")
    fields = {"label_column": None, "mask_probability": 1e-12, "operators": ("mask",)}
    execute(stage(tmp_path / "x.parquet", tmp_path / "corpus", **fields))
    summary = (read_manifest(tmp_path / "corpus") or {})["summary"]
    assert (summary["variants"], summary["variants_dropped"]["unchanged"]) == (0, 8)


def test_variants_of_nothing_but_masks_go_unless_they_are_asked_for(dataset: Path, tmp_path: Path) -> None:
    fields = {"operators": ("mask",), "mask_probability": 1.0, "num_variants": 1}
    assert len(run(dataset, tmp_path / "without", **fields)) == 54
    kept = run(dataset, tmp_path / "with", keep_all_masked=True, **fields)
    lengths = {row["n_words_a"] for row in kept.table.to_pylist() if row["parent_id"] is not None}
    assert len(kept) == 54 + len(lengths)  # texts of masks differ by their length alone


def test_each_operator_works_alone(dataset: Path, tmp_path: Path) -> None:
    masked = run(dataset, tmp_path / "mask", operators=("mask",), mask_probability=0.5)
    replaced = run(dataset, tmp_path / "pos", operators=("pos",), pos_probability=0.5)
    cut = run(dataset, tmp_path / "ngram", operators=("ngram",), ngram_probability=1.0)
    originals = {row["example_id"]: split_words(row["text_a"]) for row in masked.table.to_pylist()[:54]}
    vocabulary = {word for words in originals.values() for word in words}

    def variants(corpus: Corpus) -> list[tuple[list[str], list[str]]]:
        return [
            (split_words(r["text_a"]), originals[r["parent_id"]]) for r in corpus.table.to_pylist() if r["parent_id"]
        ]

    for new, old in variants(masked):
        assert len(new) == len(old)
        assert all(word in (before, "[MASK]") for word, before in zip(new, old, strict=True))
    for new, old in variants(replaced):
        assert len(new) == len(old) and set(new) <= vocabulary
    for new, old in variants(cut):
        assert len(new) <= 5 and any(old[i : i + len(new)] == new for i in range(len(old)))


def test_a_corpus_is_golden(tmp_path: Path) -> None:
    """The format: another value here means raising AUG_VERSION, WORDS_VERSION or HEURISTIC_VERSION."""
    texts = [
        f"It's the {i}th film, isn't it? {word} well-made for $1,000!" for i, word in enumerate(["Very", "Not", "So"])
    ]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    corpus = run(tmp_path / "x.parquet", tmp_path / "corpus", label_column=None)
    assert corpus.texts()[0][3:6] == [
        "Very isn't for $ 1,000",
        "It's the 0th [MASK] , well-made it ? Very film for $ 1,000 !",
        "It's the 1,000 film , isn't it ? Very well-made [MASK] $ 1,000 !",
    ]
    assert corpus.fingerprint == "251fa63477d99fe8222799fe47ad7af5"


# Determinism -----------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a corpus but its manifest, which says how long it took."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_the_order_of_the_rows_changes_no_byte(tmp_path: Path, sentences: list[str]) -> None:
    """Nor do texts that are there twice, with another label each time."""
    texts = [*sentences[:60], *sentences[1:9]]
    forward = write_dataset(tmp_path / "films", texts)
    backward = write_dataset(tmp_path / "again" / "films", texts, order=[*reversed(range(68))])
    one, other = run(forward, tmp_path / "one"), run(backward, tmp_path / "other")
    assert one.counts["conflicting_labels"] > 0
    assert one.fingerprint == other.fingerprint
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_the_size_of_chunks_changes_nothing(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(dataset, tmp_path / "whole")
    for variants in (4, 36):
        small_chunks(monkeypatch, variants)
        assert run(dataset, tmp_path / f"{variants}").table == whole.table


def test_the_order_in_which_chunks_are_done_changes_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.pipeline import executor

    small_chunks(monkeypatch)
    in_order = run(dataset, tmp_path / "in_order")
    map_shards = executor.map_shards
    monkeypatch.setattr(
        "kd.stages.augment.augment.map_shards", lambda job, shards, **kw: map_shards(job, shards[::-1], **kw)
    )
    assert run(dataset, tmp_path / "backwards").table == in_order.table


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    run(dataset, tmp_path / "alone")
    for workers in (3, 2):
        execute(stage(dataset, tmp_path / "together", workers=workers), StageContext(overwrite=True))
        assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    assert execute(stage(dataset, tmp_path / "together", workers=1)).skipped


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("job", [generate.WordsJob, generate.VariantJob])
def test_an_interrupted_run_goes_on_where_it_was_and_ends_the_same(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: type, after: int
) -> None:
    small_chunks(monkeypatch)
    undisturbed = run(dataset, tmp_path / "undisturbed")
    finish, done = job.finish, []

    def stop(self: Any, computed: Any) -> int:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(computed[0])
        return finish(self, computed)  # type: ignore[no-any-return]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "finish", stop)
        run(dataset, tmp_path / "resumed")
    # Whoever reorders the source between the two attempts changes nothing either.
    write_dataset(dataset, load_all(dataset), order=[*reversed(range(60))])
    computed: list[int] = []

    def count(self: Any, result: Any) -> int:
        computed.append(result[0])
        return finish(self, result)  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(job, "finish", count)
        resumed = run(dataset, tmp_path / "resumed")
    assert resumed.table == undisturbed.table
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "undisturbed")
    assert not set(computed) & set(done)


def load_all(dataset: Path) -> list[str]:
    """The sentences of `write_dataset` in their first order."""
    train, test = (pq.read_table(dataset / f"{name}.parquet")["text"].to_pylist() for name in ("train", "test"))
    texts = iter(train), iter(test)
    return [next(texts[1]) if i % 10 == 0 else next(texts[0]) for i in range(60)]


def test_a_failing_chunk_is_reported_and_the_others_are_kept(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.pipeline import executor

    small_chunks(monkeypatch)

    def one_fails(job: Any, shards: Any, **_: Any) -> Any:
        for shard in shards:
            if shard == 1:
                yield executor.ShardOutcome(1, None, "its worker died")
            else:
                yield executor.ShardOutcome(shard, job.finish(job.compute(shard, lambda rows: None)))

    with monkeypatch.context() as patched, pytest.raises(IncompleteError, match="1 of 6 chunks failed\n  chunk 1: its"):
        patched.setattr("kd.stages.augment.augment.map_shards", one_fails)
        run(dataset, tmp_path / "corpus")
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    assert run(dataset, tmp_path / "corpus").table == run(dataset, tmp_path / "other").table


def test_a_finished_corpus_is_not_made_again_and_other_settings_are_refused(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "corpus")
    assert execute(stage(dataset, tmp_path / "corpus")).skipped
    with pytest.raises(RefusedError, match=r"mask_probability: 0\.1 → 0\.2"):
        run(dataset, tmp_path / "corpus", mask_probability=0.2)
    with pytest.raises(RefusedError, match=r"inputs\.dataset"):
        run(dataset, tmp_path / "corpus", labels_total=5)


def test_where_the_dataset_lies_and_unused_settings_do_not_count(
    dataset: Path, tmp_path: Path, sentences: list[str]
) -> None:
    run(dataset, tmp_path / "corpus")
    moved = write_dataset(tmp_path / "elsewhere", sentences[:60])
    assert execute(stage(moved, tmp_path / "corpus")).skipped
    assert execute(stage(dataset, tmp_path / "corpus", preset="tang", workers=1)).skipped
    run(dataset, tmp_path / "plain", operators=("none",))
    assert execute(stage(dataset, tmp_path / "plain", operators=("none",), seed=7, tagger="auto")).skipped


def test_overwriting_in_one_process_does_not_mix_old_pools_or_test_texts(
    dataset: Path, tmp_path: Path, sentences: list[str]
) -> None:
    run(dataset, tmp_path / "corpus")
    other = write_dataset(tmp_path / "others", sentences[60:120])
    execute(stage(other, tmp_path / "corpus"), StageContext(overwrite=True))
    assert open_corpus(tmp_path / "corpus").table == run(other, tmp_path / "fresh").table


# Labels and transfer text ----------------------------------------------------------------------------------------


def test_hidden_labels_are_those_that_the_same_flags_hide_elsewhere(dataset: Path, tmp_path: Path) -> None:
    corpus = run(dataset, tmp_path / "corpus", labels_per_class=3, label_seed=5, num_variants=1)
    source = DatasetSource(dataset=f"{dataset}:train", text_column="text", label_column="label")
    elsewhere = hide_labels(load_corpus(source), labels_per_class=3, label_seed=5)
    kept = set(corpus.table.filter(corpus.table["has_gold"])["example_id"].to_pylist())
    assert kept == set(elsewhere.table.filter(elsewhere.table["has_gold"])["example_id"].to_pylist())
    assert len(kept) == 6
    summary = (read_manifest(tmp_path / "corpus") or {})["summary"]
    assert (summary["labelled"], summary["unlabelled"], summary["labels_hidden"]) == (6, 48, 48)


def test_transfer_text_is_augmented_too(dataset: Path, tmp_path: Path, sentences: list[str]) -> None:
    pq.write_table(pa.table({"body": [*sentences[60:80], sentences[1]]}), tmp_path / "more.parquet")
    fields = {"transfer_dataset": (str(tmp_path / "more.parquet"),), "transfer_text_column": "body"}
    corpus = run(dataset, tmp_path / "corpus", **fields)
    rows = corpus.table.to_pylist()
    joined = [row for row in rows if row["source"] == "more.parquet"]
    assert {row["text_a"] for row in joined if row["parent_id"] is None} == set(sentences[60:80])
    assert any(row["parent_id"] for row in joined)
    assert not any(row["has_gold"] for row in joined)
    summary = (read_manifest(tmp_path / "corpus") or {})["summary"]
    assert (summary["transfer_rows"], summary["transfer_known"], summary["originals"]) == (20, 1, 74)


def test_transfer_text_is_sampled_by_ratio_whatever_its_order(
    dataset: Path, tmp_path: Path, sentences: list[str]
) -> None:
    """What the dataset or a test split holds, in whatever spelling, is not sampled from."""
    (tmp_path / "again").mkdir()
    body = [*sentences[60:160], *(text.upper() for text in sentences[:20])]
    for folder, texts in ((tmp_path, body), (tmp_path / "again", body[::-1])):
        pq.write_table(pa.table({"body": texts}), folder / "more.parquet")
        options = {"transfer_dataset": (str(folder / "more.parquet"),), "transfer_text_column": "body"}
        run(dataset, folder / "corpus", num_variants=1, transfer_ratio=0.5, **options)
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "again" / "corpus")
    joined = {
        r["text_a"] for r in open_corpus(tmp_path / "corpus").table.to_pylist()[:81] if r["source"] == "more.parquet"
    }
    assert len(joined) == 27 and joined <= set(sentences[60:160])
    summary = (read_manifest(tmp_path / "corpus") or {})["summary"]
    names = ("transfer_rows", "transfer_known", "transfer_leaks", "transfer_not_sampled")
    assert [summary[name] for name in names] == [27, 18, 2, 73]
    other = run(dataset, tmp_path / "seed", num_variants=1, transfer_ratio=0.5, transfer_seed=1, **options)
    assert not joined >= {r["text_a"] for r in other.table.to_pylist()[:81] if r["source"] == "more.parquet"}


def test_every_line_of_a_transfer_text_can_be_a_text(dataset: Path, tmp_path: Path, sentences: list[str]) -> None:
    """As if each line had come as a row, whatever ends it; what is known, a leak or blank is left out line by line."""
    (tmp_path / "rows").mkdir()
    lines = sentences[60:80]
    documents = ["\n".join([*lines[:8], " ", sentences[0]]), "\r\n".join([f"  {line}" for line in lines[8:]])]
    for folder, texts, fields in ((tmp_path, documents, {"transfer_lines": True}), (tmp_path / "rows", lines, {})):
        pq.write_table(pa.table({"body": texts}), folder / "more.parquet")
        options = {"transfer_dataset": (str(folder / "more.parquet"),), "transfer_text_column": "body"}
        run(dataset, folder / "corpus", **options, **fields)
    made, expected = (open_corpus(folder / "corpus").table for folder in (tmp_path, tmp_path / "rows"))
    assert made.equals(expected)
    summary = (read_manifest(tmp_path / "corpus") or {})["summary"]
    assert (summary["transfer_rows"], summary["transfer_known"] + summary["transfer_leaks"]) == (20, 1)


# Leakage ---------------------------------------------------------------------------------------------------------


def test_no_row_and_no_variant_repeats_a_test_text(tmp_path: Path) -> None:
    words = ["good", "bad", "films", "plots", "end"]
    train = [f"{a} {b} {c}" for a in words for b in words for c in words]
    test = [text.upper() for text in train[::7]] + [f"{a} {b}" for a in words for b in words]
    folder = tmp_path / "films"
    folder.mkdir()
    pq.write_table(pa.table({"text": train}), folder / "train.parquet")
    pq.write_table(pa.table({"text": test}), folder / "test.parquet")
    pq.write_table(pa.table({"text": ["bad"]}), folder / "dev.parquet")
    corpus = run(folder, tmp_path / "corpus", label_column=None, num_variants=20)
    assert not set(text_keys(*corpus.texts())) & set(text_keys([*test, "bad"]))
    manifest = read_manifest(tmp_path / "corpus") or {}
    assert manifest["summary"]["leaks_dropped"] == len(train[::7])
    assert manifest["summary"]["variants_dropped"]["leak"] > 0
    assert [(r["dataset"], r["rows"], r["given"]) for r in manifest["content"]["excluded"]] == [
        ("films:dev", 1, False),
        ("films:test", len(test), False),
    ]


def test_the_check_is_not_made_against_the_split_in_use(dataset: Path, tmp_path: Path) -> None:
    assert len(run(f"{dataset}:test", tmp_path / "corpus", operators=("none",))) == 6


def test_further_datasets_can_be_excluded(dataset: Path, tmp_path: Path, sentences: list[str]) -> None:
    (tmp_path / "other.csv").write_text("text\n" + "\n".join(f'"{s}"' for s in sentences[1:4]) + "\n")
    corpus = run(dataset, tmp_path / "corpus", exclude_dataset=(str(tmp_path / "other.csv"),))
    assert not set(text_keys(*corpus.texts())) & set(text_keys(sentences[1:4]))
    with pytest.raises(RefusedError, match="no column 'text'"):
        (tmp_path / "bad.csv").write_text("sentence\nx\n")
        run(dataset, tmp_path / "again", exclude_dataset=(str(tmp_path / "bad.csv"),))
    with pytest.raises(RefusedError, match=r"every row .* also stands in"):
        run(dataset, tmp_path / "again", exclude_dataset=(f"{dataset}:train",))
    assert not (tmp_path / "again").exists()


def test_a_split_that_cannot_be_checked_is_named(dataset: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"sentence": ["x"]}), dataset / "validation.parquet")
    messages = Messages()
    execute(stage(dataset, tmp_path / "corpus"), StageContext(progress=messages))
    assert len(messages.warnings) == 1
    assert "films:validation is not checked for leakage" in messages.warnings[0]
    excluded = (read_manifest(tmp_path / "corpus") or {})["content"]["excluded"]
    assert ["not_checked" in record for record in excluded] == [False, True]


def test_a_new_test_split_makes_another_corpus(dataset: Path, tmp_path: Path, sentences: list[str]) -> None:
    run(dataset, tmp_path / "corpus")
    pq.write_table(pa.table({"text": sentences[100:110]}), dataset / "validation.parquet")
    with pytest.raises(RefusedError, match=r"inputs\.exclude_dataset"):
        run(dataset, tmp_path / "corpus")


# Taggers ---------------------------------------------------------------------------------------------------------


def test_without_hanta_the_heuristic_is_used_warned_of_and_recorded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dataset, tmp_path / "hanta", tagger="auto")
    monkeypatch.setattr(tagger, "_model_file", lambda language: None)
    messages = Messages()
    execute(stage(dataset, tmp_path / "corpus", tagger="auto"), StageContext(progress=messages))
    assert "HanTa is not installed" in messages.warnings[0]
    manifest = read_manifest(tmp_path / "corpus") or {}
    assert manifest["content"]["augmentation"]["tagger"]["name"] == "heuristic"
    assert execute(stage(dataset, tmp_path / "corpus", tagger="heuristic")).skipped
    with pytest.raises(RefusedError, match=r"inputs\.tagger"):
        run(dataset, tmp_path / "hanta", tagger="auto")


def test_without_the_pos_operator_no_tagger_is_needed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tagger, "_model_file", lambda language: None)
    run(dataset, tmp_path / "corpus", tagger="hanta", operators=("mask", "ngram"))
    assert (read_manifest(tmp_path / "corpus") or {})["content"]["augmentation"]["tagger"] is None


# Configuration ---------------------------------------------------------------------------------------------------


def test_presets_fill_in_what_is_not_given() -> None:
    def resolved(**fields: Any) -> dict[str, Any]:
        return stage("x", Path("y"), **{"num_variants": None, **fields}).resolved

    plain = resolved()
    used = {name: plain[name] for name in operators.OPERATORS if plain[name]}
    assert (plain["num_variants"], plain["pair_sides"], used) == (3, "cycle", {"mask": 0.1, "pos": 0.1, "ngram": 0.25})
    assert resolved(preset="tang") == {**plain, "num_variants": 20}
    assert resolved(preset="tang", text_pair_column="other")["num_variants"] == 10
    assert resolved(preset="dbert-code") == {
        **{**plain, "ngram": 0.0, "num_variants": 20},
        **{"pair_sides": "random", "drop_all_changed": True},
    }
    tinybert = resolved(preset="tinybert", masked_lm="x")
    assert tinybert == {
        **{**plain, "mask": 0.0, "pos": 0.0, "ngram": 0.0, "mlm": 0.4, "num_variants": 20},
        **{"pair_sides": "alternate", "num_candidates": 15},
    }
    assert resolved(preset="tang", num_variants=2, ngram_probability=0.0)["ngram"] == 0.0
    assert resolved(operators=("ngram", "mask"))["pos"] == 0.0
    assert resolved(operators=("none",))["num_variants"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operators": ("mask", "poz")}, r"operator 'poz' does not exist \(did you mean 'pos'\?\)"),
        ({"operators": ("mask", "none")}, "'none' stands alone"),
        ({"preset": "tangg"}, "did you mean 'tang'"),
        ({"mask_probability": 1.5}, "--mask-probability is 1.5; expected a number from 0 to 1"),
        ({"mask_probability": float("nan")}, "expected a number from 0 to 1"),
        ({"mask_probability": 0.6, "pos_probability": 0.6}, r"mask 0\.6, pos 0\.6 sum to more than 1"),
        ({"operators": ("synonym",)}, "operator 'synonym' needs --wordnet"),
        ({"operators": ("neighbour",)}, "operator 'neighbour' needs --word-table"),
        ({"masked_lm": "x"}, "--masked-lm is given, and operator 'mlm' is not among --operators"),
        ({"operators": ("exchange",)}, "'exchange' needs pairs"),
        ({"operators": ("recombine",)}, "'recombine' needs pairs"),
        ({"num_candidates": 0}, "--num-candidates is 0"),
        ({"transfer_ratio": 1.0}, "--transfer-ratio is 1.0; expected 0 or more, and --transfer-dataset"),
        ({"transfer_lines": True}, "--transfer-lines needs single texts and --transfer-dataset"),
        ({"operators": ("mask",), "pos_probability": 0.6}, "add pos to --operators"),
        ({"num_variants": -1}, "--num-variants is -1"),
        ({"num_variants": 1 << 15}, "expected a number from 0 to 32767"),
        ({"seed": 1 << 63}, "does not fit into 64 bits"),
        ({"labels_per_class": 2, "labels_total": 2}, "exclude each other"),
        ({"workers": 0}, "at least one worker"),
        ({"language": "fr"}, "language 'fr' has no tagger"),
    ],
)
def test_settings_that_make_no_sense_are_usage_errors(
    dataset: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(dataset, tmp_path / "corpus", **fields)
    assert not (tmp_path / "corpus").exists()


def test_the_manifest_is_plain_json_without_paths_of_the_machine(dataset: Path, tmp_path: Path) -> None:
    execute(stage(dataset, tmp_path / "corpus"))
    manifest = read_manifest(tmp_path / "corpus") or {}
    assert str(tmp_path) not in json.dumps({"content": manifest["content"], "identity": manifest["identity"]})


def test_every_field_has_help() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(Augment))
