"""Derived against stored: every signal that the lattice leads to, on encoders for which it holds and on one other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kd.pipeline.errors import RefusedError, VerificationError
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import Signal, open_view
from kd.pipeline.store.lattice import sources_of
from kd.pipeline.store.sidecar import list_sidecars
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.derivation import NUM_TOKENS, Derivation, derivation_of
from kd.stages.train_student import TrainStudent
from kd.stages.train_student.rows import StoreRows

BODY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
NAMES: dict[str, Any] = {"id2label": {0: "negative", 1: "neutral", 2: "positive"},
                         "label2id": {"negative": 0, "neutral": 1, "positive": 2}}  # fmt: skip
KINDS: dict[str, Any] = {
    "roberta": lambda size: transformers.RobertaConfig(vocab_size=size, pad_token_id=0, **BODY, **NAMES),
    "electra": lambda size: transformers.ElectraConfig(vocab_size=size, embedding_size=16, **BODY, **NAMES),
    "distilbert": lambda size: transformers.DistilBertConfig(
        vocab_size=size, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64, **NAMES
    ),
    "prelayernorm": lambda size: transformers.RobertaPreLayerNormConfig(
        vocab_size=size, pad_token_id=0, **BODY, **NAMES
    ),
    "rotary": lambda size: transformers.RoFormerConfig(vocab_size=size, pad_token_id=0, **BODY, **NAMES),
}
DERIVED = ("hidden.tok@0", "hidden.cls@1", "hidden.mean@2", "attention.qkv@1", "attention.qkv@2",
           "attention.score@1", "attention.score@2", "logits")  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path):
    """`teachers(kind)`: a folder of a tiny classifier of that kind, with the tiny teacher's tokenizer."""
    made: dict[str, Path] = {"bert": tiny_teacher}

    def make(kind: str) -> Path:
        if kind not in made:
            tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_teacher)
            folder = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = transformers.AutoModelForSequenceClassification.from_config(KINDS[kind](len(tokenizer)))
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.ndim == 2:
                            parameter.normal_(0.0, 0.25)
                        else:
                            parameter.add_(torch.randn_like(parameter) / 10)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def capture(tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch):
    """`capture(teacher, name, **options)`: a view of forty rows; `capture.said` is what the command said."""
    monkeypatch.setenv("KD_CACHE_HOME", str(tmp_path / "cache"))
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(f'"{text}"\n' for text in sentences[:40]))

    class Said:
        def __init__(self) -> None:
            self.said: list[str] = []

        def task(self, *_: Any, **__: Any) -> Any:
            return self

        advance = done = task

        def info(self, text: str, **_: Any) -> None:
            self.said.append(text)

        warn = estimate = info

        def __call__(self, teacher: Path, name: str, **options: Any) -> Path:
            self.said.clear()
            view = tmp_path / name / "view"
            stage = CacheTeacher(
                teacher=str(teacher), dataset=str(texts), text_column="text", store=str(tmp_path / name / "store"),
                output_dir=str(view), rows_per_shard=16, max_length=64, **options,
            )  # fmt: skip
            execute(stage, StageContext(progress=self))
            return view

    return Said()


def sources(view: Any, signal: Signal) -> tuple[Signal, ...] | None:
    sidecars = list_sidecars(view.store.files)
    return sources_of(signal, lambda s: bool(view.reader.has(s, view.rows).all()), sidecars, 2)


def derived(view: Any, signal: Signal) -> np.ndarray:
    found = sources(view, signal)
    assert found is not None and found != (signal,), f"{signal} cannot be derived"
    rows = StoreRows([view.reader], [view.rows])
    batch = derivation_of(view.store).of(rows.tensors(found, np.arange(len(view)), to_derive=True))
    value = batch[str(signal)]
    assert value.dtype == torch.float32 and not value.requires_grad and batch[str(signal)] is value
    return value.numpy()


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
def test_what_is_derived_is_what_would_have_been_stored(kind: str, teachers: Any, capture: Any) -> None:
    stored = open_view(capture(teachers(kind), "stored", signals=",".join(DERIVED)))
    options = {"signals": "hidden.tok@1+2", "sidecars": ("embeddings", "head", "attn_in@all")}
    exact = open_view(capture(teachers(kind), "exact", hidden_dtype="float32", **options))
    half = open_view(capture(teachers(kind), "half", **options))
    rows = StoreRows([stored.reader], [stored.rows])
    for name in DERIVED:
        signal = Signal.parse(name)
        own = rows.tensors([signal], np.arange(40))[name].float().numpy()
        largest = np.abs(own).max()
        for view, allowed in ((exact, 1e-3), (half, 4e-3)):  # stored in float16: 2**-11 of it are its own
            if signal == Signal("hidden.cls", 1):
                found = view.reader.gather(signal, view.rows)
            else:
                found = derived(view, signal)
            assert found.shape == own.shape
            assert float(np.abs(found - own).max()) <= allowed * largest, (name, kind)
            if signal.kind.axis != "example":
                assert not found[own == 0].any(), "beyond a row's tokens all is zero"


def test_what_derivation_saves_is_known_and_inspect_says_what_follows(teachers: Any, capture: Any) -> None:
    stored = open_view(capture(teachers("bert"), "stored", signals="hidden.tok@1,attention.qkv@2,attention.score@2"))
    lengths = stored.reader.lengths(stored.rows)
    bytes_of = {spec.label: spec.entry_bytes * stored.store.catalogue().allocations[0].entries(spec)
                for spec in stored.store.catalogue().specs.values()}  # fmt: skip
    first = lengths[:16]
    assert bytes_of["hidden.tok@1"] == 2 * 32 * first.sum() == bytes_of["attention.qkv@2"] / 3
    assert bytes_of["attention.score@2"] == 2 * 4 * (first**2).sum()
    kept = open_view(capture(teachers("bert"), "kept", signals="hidden.tok@1", sidecars=("attn_in@2",)))
    said = {one["signal"]: one for one in kept.store.inspect()["derivable"]}
    assert said["attention.score@2"]["from"] == "hidden.tok@1" and said["attention.score@2"]["sidecars"] == [
        "attn_in@2"
    ]
    assert "attention.score@1" not in said


def test_where_the_layer_normalises_first_nothing_is_derived_and_all_is_stored(teachers: Any, capture: Any) -> None:
    teacher = teachers("prelayernorm")
    with pytest.raises(RefusedError, match="queries, keys and values do not follow") as refusal:
        capture(teacher, "asked", signals="hidden.tok@1", sidecars=("attn_in@2",))
    assert "--signals attention.qkv@2" in str(refusal.value.fix)

    view = open_view(capture(teacher, "chosen", for_=("minilmv2",)))
    assert any("does not follow from sidecar attn_in@2" in text and "stored instead" in text for text in capture.said)
    assert [str(signal.bare) for signal in view.signals if signal.name != "logits"] == ["attention.qkv@2"]
    assert sources(view, Signal("attention.qkv", 2)) == (Signal("attention.qkv", 2),)
    # Positions are absolute, so scores do follow from what is stored.
    stored = open_view(capture(teacher, "scores", signals="attention.score@2"))
    own = StoreRows([stored.reader], [stored.rows]).tensors([Signal("attention.score", 2)], np.arange(40))
    own_BHTT = own["attention.score@2"].float().numpy()
    found_BHTT = derived(view, Signal("attention.score", 2))
    assert float(np.abs(found_BHTT - own_BHTT).max()) <= 4e-3 * np.abs(own_BHTT).max()


def test_rotary_attention_is_no_ones_scores_and_what_would_fit_is_named(teachers: Any, capture: Any) -> None:
    """Rotation comes behind the maps: queries times keys are not the attention, yet they have relations."""
    teacher = teachers("rotary")
    for methods, named in ((("minilm",), "method 'minilm'"), (("tinybert",), "attention.score@2")):
        with pytest.raises(RefusedError, match="attention scores are needed") as refusal:
            capture(teacher, "refused", for_=methods)
        assert named in refusal.value.what and "minilmv2" in str(refusal.value.fix)
        assert "rotary or relative positions" in str(refusal.value.details)
    view = capture(teacher, "chosen", for_=("minilmv2",))
    assert not any("also possible" in text and "minilm," in text for text in capture.said)

    def prepared(method: str) -> Any:
        return TrainStudent(
            view=(str(view),), student="bert:heads=4", method=(method,), output_dir=str(view / "run")
        ).prepared

    with pytest.raises(RefusedError, match="method 'minilm' compares attention") as refusal:
        _ = prepared("minilm")
    assert "minilmv2" in str(refusal.value.fix) and "kd cache-teacher --for minilm" in str(refusal.value.fix)
    with pytest.raises(RefusedError, match="method 'minilmv2' compares attention"):
        _ = prepared("minilmv2:relations=q-k+v-v")
    assert prepared("minilmv2").signals == (Signal("attention.qkv", 2),)


def test_a_head_that_reads_otherwise_and_a_table_alone_prove_nothing(teachers: Any, capture: Any) -> None:
    view = open_view(capture(teachers("bert"), "bert", signals="hidden.cls@2", sidecars=("embeddings", "head")))
    assert sources(view, Signal("logits")) == (Signal("hidden.cls", 2),)
    folder = Path(view.store.url) / "sidecars"
    assert (folder / "head.proof").is_dir() and (folder / "embeddings.proof").is_dir()
    without = [name for name in list_sidecars(view.store.files) if name != "head.proof"]
    assert sources_of(Signal("logits"), lambda s: s == Signal("hidden.cls", 2), without, 2) is None


def test_repair_makes_maps_and_proofs_again(teachers: Any, capture: Any) -> None:
    from kd.stages.store.repair import RepairStore

    view = open_view(capture(teachers("bert"), "bert", signals="hidden.tok@1", sidecars=("embeddings", "attn_in@2")))
    folder = Path(view.store.url) / "sidecars"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in ("attn_in@2/tensors.safetensors", "embeddings.proof/derives.json"):
        (folder / name).write_bytes(b"damaged")
    assert len(view.store.verify().problems) == 2
    execute(RepairStore(store=view.store.url, teacher=str(teachers("bert"))), StageContext())
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_the_maps_are_computed_in_float32_whatever_the_student_trains_in(teachers: Any, capture: Any) -> None:
    view = open_view(capture(teachers("bert"), "bert", signals="hidden.tok@1", sidecars=("attn_in@2",)))
    rows = StoreRows([view.reader], [view.rows]).tensors([Signal("hidden.tok", 1)], np.arange(40), to_derive=True)
    assert rows[NUM_TOKENS].tolist() == view.reader.lengths(view.rows).tolist()
    derivation = derivation_of(view.store)
    plain = derivation.of(rows)["attention.score@2"]
    with torch.autocast("cpu", torch.bfloat16):
        under = derivation.of(rows)["attention.score@2"]
    assert torch.equal(plain, under)


@pytest.mark.parametrize("forged", ["transposed", "lacking", "renamed", "empty"])
def test_tensors_that_do_not_fit_are_named_and_never_filled_up_with_random_ones(
    forged: str, tiny_teacher: Path
) -> None:
    """A sidecar's checksum is right for whoever wrote it, and so may be what it says of the teacher."""
    from kd.stages.cache_teacher.sidecars import tensors_of

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_teacher)
    batch = {
        "hidden.tok@1": torch.randn(2, 5, 32), "hidden.cls@2": torch.randn(2, 32), NUM_TOKENS: torch.tensor([5, 3]),
        "token_ids": torch.ones(2, 5, dtype=torch.int32), "segment_ids": torch.zeros(2, 5, dtype=torch.int32),
    }  # fmt: skip

    def tensors(sidecar: str) -> dict[str, np.ndarray]:
        found = dict(tensors_of(model, sidecar))
        first = next(name for name, tensor in found.items() if tensor.ndim == 2)
        value = found.pop(first)
        return (
            found
            | {
                "transposed": {first: value[:, :-1].T},
                "lacking": {},
                "renamed": {"x": value},
                "empty": {first: value[:0]},
            }[forged]
        )

    sound = Derivation(model.config, "sequence-classification", lambda sidecar: dict(tensors_of(model, sidecar)))
    for signal in ("attention.score@2", "hidden.tok@0", "logits"):
        assert sound.of(batch)[signal].isfinite().all()
        with pytest.raises(VerificationError, match="does not fit the teacher's config"):
            Derivation(model.config, "sequence-classification", tensors).of(batch)[signal]
