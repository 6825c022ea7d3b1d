"""Augmenting token tasks: words keep their tags in step, entities are replaced by entities, and nothing by chance."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.artifact import read_manifest
from kd.pipeline.errors import RefusedError
from kd.pipeline.ragged import Ragged
from kd.pipeline.stage import execute
from kd.stages.augment import Augment
from kd.stages.augment import augment as augment_module
from kd.stages.augment.draws import Draws
from kd.stages.augment.mention import Mentions, ReplaceMentions, Spans, count_mentions, rebuilt
from kd.stages.augment.operators import REPLACING, WORD_OPERATORS
from kd.stages.augment.pools import Pools
from kd.stages.augment.regenerate import regenerate
from kd.stages.augment.rules import RuleAugmenter, Rules, Tagged, Variants
from kd.stages.corpus import Corpus, DatasetSource, load_corpus, open_corpus
from kd.stages.entities import BioTags

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
BIO = BioTags.of(NAMES)
assert BIO is not None
WORDS = [f"w{i}" for i in range(30)]
Text = tuple[list[str], list[str] | None]
"""Words and their tags; None without gold."""


def make_text(number: int) -> Text:
    rng = random.Random(number)
    words, tags = [], []
    while len(words) < rng.randrange(1, 14):
        kind, length = rng.choice(["O", "O", "PER", "LOC"]), rng.randrange(1, 4)
        words += [rng.choice(WORDS) for _ in range(length)]
        tags += ["O"] * length if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
    return words, None if number % 7 == 0 else tags


def id_of(number: int) -> bytes:
    return blake2b(b"%d" % number, digest_size=16).digest()


def spans_of(tags: list[str] | None) -> list[tuple[int, int, str]]:
    """The entities of well-formed tags, in plain Python."""
    starts = [place for place, tag in enumerate(tags or []) if tag[0] == "B"]
    found = []
    for start in starts:
        end = start + 1
        while tags is not None and end < len(tags) and tags[end] == f"I-{tags[start][2:]}":
            end += 1
        found.append((start, end, (tags or [])[start][2:]))
    return found


def vary(texts: list[Text], rules: Rules, count: int, seed: int = 3) -> tuple[Variants, Pools]:
    """Variants with their tags, and the vocabulary."""
    pools = Pools.of(Counter({(0, word): 1 for word in WORDS}))
    numbers = {word: number for number, word in enumerate(pools.words)}
    words = Ragged.from_rows([[numbers[word] for word in words] for words, _ in texts], "int64")
    rows = [[-1] * len(words) if tags is None else [NAMES.index(tag) for tag in tags] for words, tags in texts]
    tags = Ragged.from_rows(rows, "int64")
    spelled = [words for words, _ in texts]
    assert BIO is not None
    mentions = Mentions.of(count_mentions(tags, spelled, BIO), numbers)
    replace = ReplaceMentions(rules.mention, mentions, Spans.of(tags, spelled, BIO, mentions.pools))
    augmenter = RuleAugmenter(
        rules,
        pools,
        seed,
        mask_word=len(pools.words),
        tagged=Tagged(tags, BIO),
        mentions=replace if rules.mention else None,
        keep_tags=True,
    )
    return augmenter.variants([id_of(number) for number in range(len(texts))], [words], count), pools


def oracle(text: Text, number: int, iteration: int, rules: Rules, pool: dict[str, list[str]]) -> Text:
    """Words and tags of a variant, one word after the other."""
    (words, tags), n = text, len(text[0])
    spans = spans_of(tags)
    found, starts = Draws(3, rules.config_hash).of([id_of(number)], [iteration], np.array([5 + 2 * n + 2 * len(spans)]))
    draws = found[starts[0] + 2 :].tolist()
    xs, ys, window, rest = draws[:n], draws[n : 2 * n], draws[2 * n : 2 * n + 3], draws[2 * n + 3 :]
    slots: list[list[tuple[str, str | None]]] = [[(word, tags and tags[place])] for place, word in enumerate(words)]
    blocked = set()
    for which, (start, end, kind) in enumerate(spans):
        if rest[which] < rules.mention:
            drawn = pool[kind][math.floor(rest[len(spans) + which] * len(pool[kind]))]
            blocked |= {*range(start, end)}
            if drawn != " ".join(words[start:end]):
                slots[start:end] = [[]] * (end - start)
                slots[start] = [(word, f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(drawn.split(" "))]
    swaps = []
    for place, (x, y) in enumerate(zip(xs, ys, strict=True)):
        chosen, limit = None, 0.0
        for name in WORD_OPERATORS:
            limit += getattr(rules, name)
            if x < limit:
                chosen = name
                break
        if place in blocked or (chosen in REPLACING and tags and tags[place] != "O"):
            continue
        if chosen == "mask":
            slots[place] = [("[MASK]", slots[place][0][1])]
        elif chosen == "pos":
            slots[place] = [(sorted(WORDS)[math.floor(y * len(WORDS))], slots[place][0][1])]
        elif chosen == "delete":
            slots[place] = []
        elif chosen == "swap":
            swaps.append((place, math.floor(y * n)))
    for a, b in swaps:
        slots[a], slots[b] = slots[b], slots[a]
    items = [item for slot in slots for item in slot]
    length = 1 + math.floor(window[1] * 5)
    if window[0] < rules.ngram and length < len(items):
        start = math.floor(window[2] * (len(items) - length + 1))
        items = items[start : start + length]
    if tags is None:
        return [word for word, _ in items], None
    new: list[str] = []
    for _, tag in items:
        assert tag is not None
        goes_on = bool(new) and new[-1][1:] == tag[1:] and tag[0] == "I"
        new.append(f"B{tag[1:]}" if tag[0] == "I" and not goes_on else tag)
    return [word for word, _ in items], new


ALL = Rules(mask=0.1, pos=0.2, delete=0.15, swap=0.15, ngram=0.4, mention=0.6)


def test_an_independent_oracle_agrees_on_words_and_tags() -> None:
    texts = [make_text(number) for number in range(150)]
    pool: dict[str, list[str]] = {"PER": [], "LOC": []}
    for words, tags in texts:
        for start, end, kind in spans_of(tags):
            pool[kind].append(" ".join(words[start:end]))
    pool = {kind: sorted(mentions) for kind, mentions in pool.items()}
    variants, pools = vary(texts, ALL, 4)
    names = [*pools.words, "[MASK]"]
    side = variants.changed[0]
    assert side.tags is not None
    for i, (row, iteration) in enumerate(zip(variants.rows.tolist(), variants.iterations.tolist(), strict=True)):
        words, tags = oracle(texts[row], row, iteration, ALL, pool)
        assert [names[word] for word in side.words[i]] == words
        assert side.tags[i].tolist() == ([-1] * len(words) if tags is None else [NAMES.index(tag) for tag in tags])


probabilities = st.sampled_from([0.0, 0.15, 0.3])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 10_000).filter(lambda n: n % 7 > 0), min_size=1, max_size=8),
    st.fixed_dictionaries({name: probabilities for name in ("mask", "delete", "swap")}),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0]),
)
def test_every_word_of_a_variant_has_a_tag_and_tags_are_well_formed(
    numbers: list[int], used: dict[str, float], mention: float, ngram: float
) -> None:
    assert BIO is not None
    variants, _ = vary([make_text(number) for number in numbers], Rules(**used, mention=mention, ngram=ngram), 3)
    side = variants.changed[0]
    assert side.tags is not None
    assert np.array_equal(side.tags.offsets, side.words.offsets)
    assert BIO.well_formed(side.tags).all()


@given(st.lists(st.lists(st.sampled_from(range(5)), max_size=6), min_size=1, max_size=4))
def test_rebuilt_tags_mark_the_same_entities(rows: list[list[int]]) -> None:
    assert BIO is not None
    tags = Ragged.from_rows(rows, "int64")
    again = rebuilt(tags, BIO)
    assert BIO.well_formed(again).all()
    for old, new in zip(BIO.spans(tags), BIO.spans(again), strict=True):
        assert old.tolist() == new.tolist()


# The command -----------------------------------------------------------------------------------------------------


def stage(dataset: Path | str, output: Path, **fields: Any) -> Augment:
    options = {"text_column": "words", "label_column": "tags", "tagger": "heuristic", "num_variants": 4, **fields}
    return Augment(dataset=str(dataset), output_dir=str(output), **options)


def run(dataset: Path | str, output: Path, **fields: Any) -> Corpus:
    execute(stage(dataset, output, **fields))
    return open_corpus(output)


def in_parts(corpus: Corpus) -> tuple[dict[bytes, dict[str, Any]], list[dict[str, Any]]]:
    """Originals by id, and variants."""
    rows = corpus.table.to_pylist()
    return {row["example_id"]: row for row in rows if row["parent_id"] is None}, [
        row for row in rows if row["parent_id"] is not None
    ]


def test_variants_of_words_are_words_without_gold(tagged: Path, tmp_path: Path) -> None:
    operators = ("mask", "pos", "delete", "swap", "ngram", "mention")
    corpus = run(tagged / "train.jsonl", tmp_path / "c", operators=operators)
    originals, variants = in_parts(corpus)
    plain = load_corpus(DatasetSource(dataset=str(tagged / "train.jsonl"), text_column="words", label_column="tags"))
    assert corpus.info == plain.info
    assert {(row["text_a"], *row["tags"]) for row in originals.values()} == {
        (row["text_a"], *row["tags"]) for row in plain.table.to_pylist()
    }
    assert len(variants) > 400
    for row in variants:
        assert (row["tags"], row["has_gold"], row["task"]) == (None, False, "token")
        assert row["n_words_a"] == len(row["text_a"].split(" ")) and "" not in row["text_a"].split(" ")
    used = Counter(name for row in variants for name in row["aug_op"].split("+"))
    assert set(used) == set(operators)
    summary = (read_manifest(tmp_path / "c") or {})["summary"]
    assert summary["changes"]["mention"]["mentions"] > summary["changes"]["mention"]["stayed"] > 0
    assert "| mention |" in (tmp_path / "c" / "report.md").read_text()


def test_other_words_replace_words_outside_of_entities_alone(tagged: Path, tmp_path: Path) -> None:
    corpus = run(tagged / "train.jsonl", tmp_path / "c", operators=("pos",), pos_probability=0.9)
    originals, variants = in_parts(corpus)
    entities = {
        word
        for row in originals.values()
        for word, tag in zip(row["text_a"].split(" "), row["tags"], strict=True)
        if corpus.info.label_names[tag] != "O"
    }
    outside = {
        word
        for row in originals.values()
        for word, tag in zip(row["text_a"].split(" "), row["tags"], strict=True)
        if corpus.info.label_names[tag] == "O"
    }
    assert entities - outside
    for row in variants:
        parent = originals[row["parent_id"]]
        slots = zip(parent["text_a"].split(" "), row["text_a"].split(" "), parent["tags"], strict=True)
        assert all(old == new or corpus.info.label_names[tag] == "O" for old, new, tag in slots)
        assert all(new in outside for old, new, _ in slots if old != new)


def test_mentions_are_those_of_labelled_rows_of_the_same_type(tagged: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"operators": ("mention",), "mention_probability": 1.0, "labels_total": 20}
    corpus = run(tagged / "train.jsonl", tmp_path / "c", **fields)
    originals, variants = in_parts(corpus)
    names = corpus.info.label_names
    labelled = {key: row for key, row in originals.items() if row["tags"] is not None}
    assert len(labelled) == 20
    known: dict[str, set[tuple[str, ...]]] = {}
    spans = {key: spans_of([names[tag] for tag in row["tags"]]) for key, row in labelled.items()}
    for key, row in labelled.items():
        for start, end, kind in spans[key]:
            known.setdefault(kind, set()).add(tuple(row["text_a"].split(" ")[start:end]))
    assert variants
    for row in variants:
        # One of the known mentions in every place of one, and the words between them as they were.
        words, before, pattern = labelled[row["parent_id"]]["text_a"].split(" "), 0, []
        for start, end, kind in spans[row["parent_id"]]:
            pattern += [re.escape(word) for word in words[before:start]]
            pattern.append("(" + "|".join(re.escape(" ".join(mention)) for mention in sorted(known[kind])) + ")")
            before = end
        assert re.fullmatch(" ".join([*pattern, *map(re.escape, words[before:])]), row["text_a"])
    said = (read_manifest(tmp_path / "c") or {})["content"]["augmentation"]["mentions"]
    assert (said["types"], said["mentions"]) == (len(known), sum(map(len, known.values())))


def shuffled(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("train", "test"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        (target / f"{name}.jsonl").write_text("\n".join(random.Random(1).sample(lines, len(lines))))
    return target / "train.jsonl"


def test_order_of_rows_and_size_of_chunks_change_no_byte(
    tagged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"operators": ("mask", "pos", "swap", "ngram", "mention")}
    whole = run(tagged / "train.jsonl", tmp_path / "whole", **fields)
    run(shuffled(tagged, tmp_path / "other"), tmp_path / "shuffled", **fields)
    [a], [b] = ([*(tmp_path / name / "data").glob("*.parquet")] for name in ("whole", "shuffled"))
    assert a.read_bytes() == b.read_bytes()
    monkeypatch.setattr(augment_module, "VARIANTS_PER_CHUNK", 30)
    parts = run(tagged / "train.jsonl", tmp_path / "parts", **fields)
    assert parts.table.to_pylist() == whole.table.to_pylist()


def test_variants_are_made_again_from_their_provenance(tagged: Path, tmp_path: Path) -> None:
    corpus = run(tagged / "train.jsonl", tmp_path / "c", operators=("pos", "delete", "ngram", "mention"))
    _, variants = in_parts(corpus)
    chosen = random.Random(2).sample(variants, 30)
    again = regenerate(tmp_path / "c", [row["example_id"] for row in chosen])
    assert again == [(row["text_a"], None) for row in chosen]


def test_no_variant_is_a_test_text(tmp_path: Path) -> None:
    rows = [{"words": words, "tags": ["O"] * len(words)} for words in (["a", "b", "c"], ["a", "x-y", "c"])]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"words": ["A", "B"], "tags": ["O", "O"]}))
    corpus = run(tmp_path / "train.jsonl", tmp_path / "c", operators=("ngram",), ngram_probability=1.0, num_variants=40)
    texts = set(corpus.texts()[0])
    assert {"x-y", "a", "a x-y"} <= texts and "a b" not in texts


def test_mention_is_for_entities(tagged: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"words": ["a"], "tags": ["NOUN"], "text": "a", "label": "b"}))
    with pytest.raises(RefusedError, match=r"needs words with BIO tags(?s:.*)labels: NOUN(?s:.*)expected: O, and B-X"):
        stage(tmp_path / "x.jsonl", tmp_path / "c", operators=("mention",)).inputs()
    with pytest.raises(RefusedError, match=r"needs words with BIO tags(?s:.*)task: 'single-label'"):
        stage(
            tmp_path / "x.jsonl", tmp_path / "c", operators=("mention",), text_column="text", label_column="label"
        ).inputs()


def test_edits_of_a_mention_are_all_its_words(tagged: Path, tmp_path: Path) -> None:
    corpus = run(
        tagged / "train.jsonl", tmp_path / "c", operators=("mention",), mention_probability=1.0, keep_edits=True
    )
    originals, _ = in_parts(corpus)
    [file] = (tmp_path / "c" / "data").glob("*.parquet")
    for row in pq.read_table(file).slice(len(originals)).to_pylist():
        parent = originals[row["parent_id"]]
        edited = {edit["pos"] for edit in row["aug_edits"]}
        spans = spans_of([corpus.info.label_names[tag] for tag in parent["tags"]])
        assert edited and all(
            {*range(start, end)} <= edited or not {*range(start, end)} & edited for start, end, _ in spans
        )
        assert edited <= {place for start, end, _ in spans for place in range(start, end)}
