"""The smallest set: against every other set, at the break-evens of the literature, and as the command says it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.pipeline.errors import UsageError
from kd.pipeline.store import Signal, open_view, parse_signals
from kd.pipeline.store.lattice import sources_of
from kd.pipeline.store.plan import ShardSize
from kd.pipeline.store.signal import Sizes
from kd.stages.cache_teacher.choice import Choice, entries_of, smallest

BERT_BASE = Sizes(label=3, hidden=768, head=12)
PROOFS = ["embeddings.proof", "head.proof", "attention.proof"]


def entries(lengths: list[int], times: int = 1) -> Any:
    sizes = [ShardSize(times, times * length, times * length**2) for length in lengths]
    return entries_of(sizes)


def choose(
    needed: str, length: int, *, rows: int = 1_000_000, sizes: Sizes = BERT_BASE, layers: int = 12, holds: Any = True
) -> Choice:
    """For a corpus of rows of one length, large enough that sidecars count for nothing."""
    return smallest(
        parse_signals(needed, layers),
        entries([length], rows),
        sizes,
        layers,
        holds=lambda name: bool(holds),
        sidecar_bytes=lambda name: 100,
    )


def names(choice: Choice) -> list[str]:
    return [*map(str, choice.signals), *choice.sidecars]


TINYBERT = "logits,hidden.tok@0+3+6+9+12,attention.score@3+6+9+12"


def test_tinybert_of_short_texts_stores_scores_and_of_long_ones_the_layer_below() -> None:
    """Section 15.4 of the specification: 24 n^2 against 1536 n, equal at 64."""
    scores = ["attention.score@3", "attention.score@6", "attention.score@9", "attention.score@12"]
    hidden = ["hidden.tok@3", "hidden.tok@6", "hidden.tok@9", "hidden.tok@12"]
    assert sorted(names(choose(TINYBERT, 63))) == sorted(["logits", *hidden, *scores, "embeddings"])
    below = ["hidden.tok@2", "hidden.tok@5", "hidden.tok@8", "hidden.tok@11"]
    maps = ["attn_in@3", "attn_in@6", "attn_in@9", "attn_in@12"]
    assert sorted(names(choose(TINYBERT, 65))) == sorted(["logits", *hidden, *below, *maps, "embeddings"])


@pytest.mark.parametrize(("length", "expected"), [(25, 213_612), (128, 1_572_876)])
def test_bytes_of_an_example_are_those_of_the_specification(length: int, expected: int) -> None:
    """Section 15.5, method 6; sidecars are once per teacher."""
    per_example = choose(TINYBERT, length, rows=1).bytes_of
    million = choose(TINYBERT, length).bytes_of
    assert sum(size for name, size in million.items() if not name.startswith("sidecar")) == 1_000_000 * expected
    assert set(per_example) >= {"logits"}


def test_break_evens_follow_the_teacher_and_not_a_constant() -> None:
    narrow = Sizes(label=3, hidden=384, head=12)  # MiniLM: heads of 32, so the two are equal at 32 tokens
    assert "attention.score@6" in names(choose("attention.score@6", 31, sizes=narrow, layers=6))
    assert names(choose("attention.score@6", 33, sizes=narrow, layers=6)) == ["hidden.tok@5", "attn_in@6"]


def test_hidden_states_in_float32_count_double() -> None:
    at = {"example": 1, "token": 100, "pair": 10_000}
    for dtype, expected in ((None, ["hidden.tok@1", "attn_in@2"]), ("float32", ["attention.score@2"])):
        choice = smallest(
            parse_signals("attention.score@2", 2), at, Sizes(2, 1_000, 12), 2,
            holds=lambda name: True, sidecar_bytes=lambda name: 1, hidden_dtype=dtype,
        )  # fmt: skip
        assert names(choice) == expected


def test_what_is_needed_anyway_pays_for_what_follows() -> None:
    """With the layer below stored for its own sake, scores cost nothing at any length."""
    assert names(choose("hidden.tok@5,attention.score@6", 8)) == ["hidden.tok@5", "attn_in@6"]


def test_where_the_shortcut_does_not_hold_all_is_stored() -> None:
    assert names(choose("hidden.tok@0,attention.qkv@12,attention.score@12", 128, holds=False)) == [
        "hidden.tok@0",
        "attention.qkv@12",
    ]


def test_a_small_corpus_is_not_given_a_large_sidecar() -> None:
    choice = smallest(
        parse_signals("attention.qkv@2", 2), {"example": 1, "token": 10, "pair": 100}, Sizes(2, 8, 2), 2,
        holds=lambda name: True, sidecar_bytes=lambda name: 10_000,
    )  # fmt: skip
    assert names(choice) == ["attention.qkv@2"]


MASKED_BASE = Sizes(label=0, hidden=768, head=12, mask=19, vocabulary=30_522)


@pytest.mark.parametrize(
    ("needed", "length", "options", "expected"),
    [
        ("mlm.logits", 128, {}, ["mlm.hidden", "head"]),
        ("mlm.logits", 128, {"holds": False}, ["mlm.logits"]),
        ("mlm.logits", 128, {"rows": 1}, ["mlm.hidden", "head"]),
        # The states of all tokens are needed for their own sake: those of the masked ones are among them.
        ("mlm.logits,hidden.tok@12", 128, {}, ["hidden.tok@12", "head"]),
        ("mlm.logits,mlm.hidden", 128, {"holds": False}, ["mlm.logits", "mlm.hidden"]),
        ("mlm.hidden", 128, {}, ["mlm.hidden"]),
        # Rows of fewer tokens than slots.
        ("mlm.logits", 18, {}, ["hidden.tok@12", "head"]),
    ],
)
def test_a_masked_lms_logits_are_states_and_one_head_where_they_follow(
    needed: str, length: int, options: dict[str, Any], expected: list[str]
) -> None:
    assert names(choose(needed, length, sizes=MASKED_BASE, **options)) == expected


def test_a_few_logits_are_less_than_a_head() -> None:
    choice = smallest(
        parse_signals("mlm.logits", 12), entries([128], 10), MASKED_BASE, 12,
        holds=lambda name: True, sidecar_bytes=lambda name: 96_000_000,
    )  # fmt: skip
    assert names(choice) == ["mlm.logits"]
    assert choice.bytes_of == {"mlm.logits": 10 * 19 * 30_522 * 2}


def test_what_the_store_holds_is_free_and_the_rest_of_it_is_not() -> None:
    """15.4 has scores of short texts smaller than the layer below; not when that layer is stored already."""
    at, length = {"example": 10, "token": 250, "pair": 6250}, {"hidden.tok@5": 38_400, "attention.score@6": 15_000}
    for held, expected in (
        (0, "attention.score@6"),
        (5, "attention.score@6"),
        (9, "hidden.tok@5"),
        (10, "hidden.tok@5"),
    ):
        choice = smallest(
            parse_signals("attention.score@6", 6), at, BERT_BASE, 6,
            holds=lambda name: True, sidecar_bytes=lambda name: 1,
            stored={Signal("hidden.tok", 5): entries([25], held)} if held else {},
        )  # fmt: skip
        assert str(choice.signals[0]) == expected
        assert choice.bytes_of[expected] == length[expected] * (10 - held * (expected == "hidden.tok@5"))


@pytest.fixture(scope="module")
def deeper_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """Four layers, so that a student of half as many has layers to map."""
    config = transformers.AutoConfig.from_pretrained(tiny_teacher, num_hidden_layers=4)
    folder = tmp_path_factory.mktemp("deeper")
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


ATOMS = [Signal(name, layer) for layer in range(3) for name in ("hidden.tok", "hidden.cls", "hidden.mean")] + [
    Signal(name, layer) for layer in (1, 2) for name in ("attention.qkv", "attention.score")
]
MAPS = ("embeddings", "attn_in@1", "attn_in@2")


@settings(deadline=None, max_examples=25)
@given(
    st.sets(st.sampled_from(ATOMS), min_size=1, max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.sets(st.sampled_from(MAPS)),
    st.integers(0, 3000),
    st.dictionaries(st.sampled_from(ATOMS), st.integers(1, 20), max_size=3),
)
def test_no_other_set_is_smaller(
    needed: set[Signal], lengths: list[int], holding: set[str], sidecar: int, stored_rows: dict[Signal, int]
) -> None:
    """Also where the store holds some signals of the corpus' first rows, which then cost nothing."""
    sizes, there_are = Sizes(label=2, hidden=8, head=2), entries(lengths)
    lacking = {signal: lengths[rows:] for signal, rows in stored_rows.items()}
    choice = smallest(
        needed, there_are, sizes, 2, holds=holding.__contains__, sidecar_bytes=lambda name: sidecar,
        stored={signal: entries(lengths[:rows]) for signal, rows in stored_rows.items()},
    )  # fmt: skip

    def cost_of(signal: Signal) -> int:
        left = lacking.get(signal, lengths)
        return sizes.of(signal, entries(left)) if left else 0

    there = {*choice.sidecars, *PROOFS}
    for signal in needed:
        assert sources_of(signal, set(choice.signals).__contains__, there, 2), f"{signal} does not follow"
    assert set(choice.sidecars) <= holding
    found = sum(choice.bytes_of.values())
    # The exhaustive search: all sidecars that hold, then every set of signals; cheap ones first, so that few are tried.
    useful = [atom for atom in ATOMS if atom in needed or atom.name in ("hidden.tok", "attention.qkv")]
    for count in range(len(holding) + 1):
        for sidecars in itertools.combinations(sorted(holding), count):
            for size in range(min(len(useful), 4) + 1):
                for stored in itertools.combinations(useful, size):
                    cost = sum(map(cost_of, stored)) + sidecar * len(sidecars)
                    if cost < found:
                        kept = {*sidecars, *PROOFS}
                        assert not all(sources_of(s, set(stored).__contains__, kept, 2) for s in needed), stored


def test_the_command_says_what_it_chose_what_it_costs_and_what_else_is_possible(bench: Any, sentences: Any) -> None:
    corpus = bench.corpus(sentences[:60])
    outcome = bench.capture(corpus, for_=("tinybert", "minilmv2"), student_layers=1, dry_run=True)
    chosen = outcome.summary["chosen"]
    assert chosen["for"] == ["tinybert", "minilmv2"] and chosen["student_layers"] == 1
    assert "also_possible" in chosen and "soft-target" in chosen["also_possible"]
    assert sum(chosen["bytes"].values()) > 0
    said = "\n".join(bench.said)
    assert "for tinybert, minilmv2, a student of 1 layers" in said and "also possible" in said
    bench.capture(corpus, for_=("tinybert", "minilmv2"), student_layers=1)
    view = open_view(bench.folder / "view")
    assert {str(signal.bare) for signal in view.signals} == set(map(str, parse_signals(chosen["signals"], 2)))
    bench.capture(corpus, for_=("tinybert", "minilmv2"), student_layers=1)
    assert "already done" in bench.said[-1]


def test_the_command_adds_the_least_to_what_its_store_holds(bench: Any, sentences: Any) -> None:
    """Of texts above 8 tokens the tiny teacher's scores are larger than the states that they follow from."""
    first, more = bench.corpus(sentences[:60]), bench.corpus(sentences[:70], name="more")
    options: dict[str, Any] = {"for_": ("ir-kd:cosine=false",), "student_layers": 1, "dry_run": True}
    chosen = bench.capture(first, **options).summary["chosen"]
    assert chosen["signals"] == "logits,hidden.tok@1" and chosen["already_stored"] == []
    assert set(chosen["bytes"]) == {"hidden.tok@1", "sidecar attn_in@2"} and min(chosen["bytes"].values()) > 0

    bench.capture(first, signals="logits,attention.score@2")
    summary = bench.capture(first, **options, overwrite=True).summary
    assert summary["chosen"]["signals"] == "logits,attention.score@2" and summary["bytes_total"] == 0
    assert summary["chosen"]["bytes"] == {"attention.score@2": 0}
    assert summary["chosen"]["already_stored"] == ["attention.score@2"]
    said = "\n".join(bench.said)
    assert "a student of 1 layers: nothing to add" in said
    assert "counted as free, for the store has it: attention.score@2" in said
    # Ten more rows: their scores against the states of all seventy.
    chosen = bench.capture(more, **options, overwrite=True).summary["chosen"]
    assert chosen["signals"] == "logits,attention.score@2" and chosen["already_stored"] == []
    assert 10 * 4 * 2 * 6**2 < chosen["bytes"]["attention.score@2"] < 10 * 4 * 2 * 20**2

    bench.capture(first, signals="logits,attention.score@2", sidecars=("attn_in@2",))
    bench.capture(first, signals="logits,attention.score@2,hidden.tok@1", output_dir=str(bench.folder / "both"))
    chosen = bench.capture(first, **options, overwrite=True).summary["chosen"]
    assert chosen["already_stored"] == ["hidden.tok@1", "sidecar attn_in@2"], "of equal ones, what makes more possible"


@pytest.mark.parametrize(
    ("profile", "possible"),
    [
        ("logits", {"soft-target", "logit-mse"}),
        ("sentence", {"pkd", "ckd", "alp-kd", "codir", "rail-kd"}),
        ("relation", {"minilm", "minilmv2"}),
        ("lastlayers", {"distilbert"}),
        ("full", {"tinybert", "minilm", "minilmv2", "fitnets", "fsp", "mobilebert", "ir-kd", "distilbert", "rail-kd"}),
    ],
)
def test_profiles_cover_what_the_specification_says(
    profile: str, possible: set[str], bench: Any, sentences: Any, deeper_teacher: Path
) -> None:
    corpus = bench.corpus(sentences[:30])
    chosen = bench.capture(corpus, teacher=str(deeper_teacher), profile=profile, dry_run=True).summary["chosen"]
    assert possible <= set(chosen["also_possible"])
    assert ("tinybert" in chosen["also_possible"]) == (profile == "full")


def test_unknown_methods_profiles_and_maps_are_refused_before_anything_runs(bench: Any, sentences: Any) -> None:
    corpus = bench.corpus(sentences[:4])
    for options, words in (
        ({"for_": ("tinybrt",)}, "did you mean 'tinybert'"),
        ({"profile": "tiny4"}, "teachers of 4 layers"),
        ({"sidecars": ("attn_in@3",)}, "layers 0 to 2, got 3"),
        ({"sidecars": ("attn_out@1",)}, "unknown sidecar 'attn_out@1'"),
        ({"student_layers": 2}, "--student-layers goes with --for"),
    ):
        with pytest.raises(UsageError, match=words):
            bench.capture(corpus, **options)
