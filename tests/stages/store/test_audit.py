"""`kd store audit`: finds what checksums cannot, on stores that verify says are sound."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load, save

from kd.pipeline.errors import RefusedError, UsageError, VerificationError
from kd.pipeline.executor import ShardOutcome
from kd.pipeline.fingerprint import canonical_json, fingerprint
from kd.pipeline.ragged import Ragged
from kd.pipeline.stage import Outcome, StageContext, execute
from kd.pipeline.store import open_store, verify_store
from kd.stages.cache_teacher import CacheTeacher
from kd.stages.cache_teacher.capture import CaptureJob
from kd.stages.derivation import Derivation, derivation_of
from kd.stages.store.audit import AuditStore
from kd.stages.train_student.students import TeacherFacts

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNALS = "logits,hidden.cls@1,hidden.tok@2"
ROWS = 32
"""In each shard."""


@pytest.fixture
def make_store(tmp_path: Path, tiny_teacher: Path, sentences: list[str]) -> Callable[..., Path]:
    """`make_store(count, signals, teacher)`: a captured store beside its view."""

    def make(count: int = 96, signals: str = SIGNALS, teacher: Path = tiny_teacher, dtype: str = "float32") -> Path:
        texts = tmp_path / "texts.csv"
        with texts.open("w", newline="") as stream:
            csv.writer(stream).writerows([["text"], *([text] for text in sentences[:count])])
        stage = CacheTeacher(
            teacher=str(teacher),
            dataset=str(texts),
            text_column="text",
            store=str(tmp_path / "store"),
            signals=signals,
            sidecars=("none",),
            rows_per_shard=ROWS,
            max_length=48,
            dtype=dtype,
            output_dir=str(tmp_path / "view"),
        )
        execute(stage, StageContext())
        assert verify_store(str(tmp_path / "store")).ok
        return tmp_path / "store"

    return make


def audit(store: Path, teacher: Path, **options: Any) -> Outcome:
    return execute(AuditStore(store=str(store), teacher=str(teacher), device="cpu", **options), StageContext())


def test_a_sound_store_passes_at_59_rows_with_its_error_beside_the_noise(
    make_store: Callable[..., Path], tiny_teacher: Path
) -> None:
    summary = audit(make_store(), tiny_teacher).summary
    assert summary["ok"] and summary["rows"] == 64 and summary["rows_in_store"] == 96
    assert summary["verdict"] == "at 95 % confidence, fewer than 0.05 of its rows are bad"
    assert summary["texts"]["checked"] == 59 and summary["texts"]["bad"] == []
    logits, tokens = summary["signals"]["logits"], summary["signals"]["hidden.tok@2"]
    # Bit for bit in its own batch.
    assert logits["error_max"] == 0.0 and logits["kl"] == pytest.approx(0.0, abs=1e-12) and logits["same_label"] == 1.0
    assert logits["noise_max"] < 1e-4
    # Stored as float16: half a unit in the last place, and no more.
    assert 0.0 < tokens["error_max"] <= tokens["encoding_error"] <= tokens["largest_number"] / 2048


def test_what_the_company_in_a_batch_changes_is_noise_and_no_error(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher whose numbers move by a thousandth per row of the batch: the same in capture and audit."""
    from kd.stages.cache_teacher import runner
    from kd.stages.cache_teacher.runner import Runner

    original = Runner.run
    monkeypatch.setattr(runner, "BATCH_COST", 1)  # all 32 rows are one batch

    def run(self: Any, *args: Any) -> Iterator[Any]:
        for batch in original(self, *args):
            yield type(batch)(
                batch.slots,
                {signal: values + 1e-3 * len(batch.slots) for signal, values in batch.values.items()},
            )

    monkeypatch.setattr(Runner, "run", run)
    summary = audit(make_store(32, "logits:float32"), tiny_teacher, max_rows=8).summary
    logits = summary["signals"]["logits"]
    assert summary["ok"] and logits["error_max"] == 0.0
    assert logits["noise_max"] == pytest.approx(1e-3 * (32 - 8), rel=1e-2)
    assert logits["noise_mean"] == pytest.approx(1e-3 * (32 - 8), rel=1e-2)


@pytest.mark.parametrize("signal", ["logits", "hidden.tok@2:int8", "hidden.cls@1:float32", "hidden.mean@1"])
def test_every_encoding_passes_with_its_own_error(
    make_store: Callable[..., Path], tiny_teacher: Path, signal: str
) -> None:
    summary = audit(make_store(40, signal), tiny_teacher, max_rows=8).summary
    (figures,) = summary["signals"].values()
    assert summary["ok"] and figures["error_max"] <= figures["encoding_error"] * (1 + 1e-6) + 1e-12


def test_rounds_that_end_in_another_order_elsewhere_say_the_same(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(40, "logits,attention.score@1")
    here = audit(store, tiny_teacher).summary

    def mapped(job: Any, rounds: Any, **how: Any) -> Iterator[ShardOutcome[Any]]:
        assert how["workers"] == 2
        there = pickle.loads(pickle.dumps(job))
        for number in reversed(rounds):
            yield ShardOutcome(number, there.finish(there.compute(number, lambda rows: None)))

    monkeypatch.setattr("kd.stages.store.audit.map_shards", mapped)
    assert audit(store, tiny_teacher, workers=2).summary == here
    assert [*here["signals"]] == ["attention.score@1", "logits"] and here["rows"] == 40


def test_rows_whose_worker_died_are_named_and_not_vouched_for(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped(job: Any, rounds: Any, **how: Any) -> Iterator[ShardOutcome[Any]]:
        yield ShardOutcome(0, None, "its worker process died 3 times")
        yield ShardOutcome(1, job.compute(1, lambda rows: None))

    monkeypatch.setattr("kd.stages.store.audit.map_shards", mapped)
    outcome = audit(make_store(16, "logits"), tiny_teacher)
    assert outcome.failure is not None and outcome.failure.exit_code == 5
    assert "worker process died" in outcome.failure.details[0] and outcome.summary["rows"] == 8
    assert outcome.summary["verdict"].startswith("none of these is bad")


def test_a_store_that_is_smaller_than_the_sample_is_looked_at_whole(
    make_store: Callable[..., Path], tiny_teacher: Path
) -> None:
    summary = audit(make_store(20), tiny_teacher).summary
    assert summary["rows"] == 20 and summary["verdict"] == "every row is what the teacher says"


def test_a_shift_by_one_row_is_found_in_the_first_round(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CaptureJob.fill

    def shifted(self: Any, writer: Any, specs: Any, advance: Any) -> Any:
        done = original(self, writer, specs, advance)
        writer._buffers["logits"][:] = np.roll(writer._buffers["logits"], 1, axis=0)
        return done

    monkeypatch.setattr(CaptureJob, "fill", shifted)
    store = make_store()
    monkeypatch.undo()
    outcome = audit(store, tiny_teacher)
    assert isinstance(outcome.failure, VerificationError) and outcome.failure.exit_code == 4
    assert outcome.summary["rows"] <= 64 and {bad["signal"] for bad in outcome.summary["bad_rows"]} == {"logits"}
    assert outcome.failure.details[0].startswith("row ") and "logits differs by" in outcome.failure.details[0]


def test_the_values_of_another_shard_are_found(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CaptureJob.fill

    def other_rows(self: Any, writer: Any, specs: Any, advance: Any) -> Any:
        read = self.store.read_tokens
        swapped = {0: 1, 1: 0}
        self.store.read_tokens = lambda shard: read(swapped.get(shard, shard))
        try:
            return original(self, writer, specs, advance)
        finally:
            del self.store.read_tokens

    monkeypatch.setattr(CaptureJob, "fill", other_rows)
    store = make_store(signals="logits,hidden.cls@1")
    monkeypatch.undo()
    outcome = audit(store, tiny_teacher)
    assert outcome.failure is not None and outcome.summary["rows"] <= 64
    assert {bad["shard"] for bad in outcome.summary["bad_rows"]} <= {0, 1}


def with_other_tokenizer(monkeypatch: pytest.MonkeyPatch, exchange: Callable[[np.ndarray], np.ndarray]) -> None:
    """Captures read token ids as a tokenizer gives them whose vocabulary stands in another order."""
    from kd.stages.cache_teacher import tokenize

    original = tokenize.encode_rows

    def encode_rows(*args: Any, **kwargs: Any) -> Any:
        encoded = original(*args, **kwargs)
        ids = Ragged(exchange(encoded.token_ids.values), encoded.token_ids.offsets)
        return tokenize.Encoded(ids, encoded.segment_ids, encoded.truncated)

    monkeypatch.setattr(tokenize, "encode_rows", encode_rows)


def test_a_swapped_tokenizer_is_found_by_the_texts_of_the_view(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity says the right one; the ids are another's, and all signals are what the teacher says of them."""
    with_other_tokenizer(monkeypatch, lambda ids: np.where(ids >= 5, 5 + (ids - 5 + 7) % 60, ids))
    store = make_store()
    monkeypatch.undo()
    outcome = audit(store, tiny_teacher)
    assert outcome.failure is not None and outcome.summary["bad_rows"] == []
    assert outcome.summary["verdict"] == "the tokenizer is another one"
    assert 1 <= outcome.summary["texts"]["checked"] <= 64 and "view" in outcome.failure.details[0]
    again = audit(store, tiny_teacher, view=(str(store.parent / "view"),))
    assert again.failure is not None and again.summary["texts"] == outcome.summary["texts"]


def test_without_a_view_a_swapped_tokenizer_is_found_by_turning_ids_into_text_and_back(
    make_store: Callable[..., Path], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = make_store(40)
    shutil.rmtree(sound.parent / "view")
    summary = audit(sound, tiny_teacher).summary
    assert summary["ok"] and summary["texts"]["checked"] == 40 and "no view" in summary["texts"]["by"]
    shutil.rmtree(sound)

    with_other_tokenizer(monkeypatch, lambda ids: (ids + 3) % 90)
    store = make_store(40)
    monkeypatch.undo()
    shutil.rmtree(store.parent / "view")
    outcome = audit(store, tiny_teacher)
    assert outcome.failure is not None and outcome.summary["verdict"] == "the tokenizer is another one"


def test_another_teacher_is_refused_field_by_field(
    make_store: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_store(20, "logits")
    with pytest.raises(RefusedError) as refused:
        audit(store, make_model(tmp_path / "other", noise=0.01))
    assert [line.split(":")[0] for line in refused.value.details] == ["teacher.tensors"]


def test_bfloat16_noise_is_not_called_damage(make_store: Callable[..., Path], tiny_teacher: Path) -> None:
    summary = audit(make_store(40, "logits", dtype="bfloat16"), tiny_teacher, max_rows=16).summary
    assert summary["ok"], summary["bad_rows"]


def test_a_share_or_a_number_that_is_none_is_refused() -> None:
    for options in ({"max_rows": 0}, {"bad_share": 0.9}):
        with pytest.raises(UsageError):
            AuditStore(store="s", teacher="t", **options)


def test_the_command_prints_error_beside_noise(
    make_store: Callable[..., Path], tiny_teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from kd.cli import main

    store = make_store(20, "logits")
    assert main(["store", "audit", str(store), "--teacher", str(tiny_teacher), "--max-rows", "8"]) == 0
    text = capfd.readouterr().out
    assert "8 of 20 rows compared: none of these is bad" in text and "same label 100.0% (noise 100.0%)" in text
    assert main(["store", "audit", str(store), "--teacher", str(tiny_teacher), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 20


@pytest.fixture
def with_sidecars(make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store from whose last hidden states the logits are derived."""
    original = CacheTeacher.__init__

    def init(self: Any, **options: Any) -> None:
        original(self, **options | {"sidecars": ("embeddings", "head", "attn_in@1")})

    monkeypatch.setattr(CacheTeacher, "__init__", init)
    return make_store(40, "hidden.cls@2")


def forge(store: Path, name: str, edit: Callable[[Path], None]) -> None:
    """Edit the files of a sidecar, and make its record fit them."""
    folder = store / "sidecars" / name
    edit(folder)
    record = json.loads((folder / "record.json").read_bytes())
    for file in record["files"]:
        data = (folder / file).read_bytes()
        record["files"][file] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    del record["digest"]
    record["digest"] = fingerprint(record)
    (folder / "record.json").write_bytes(canonical_json(record) + b"\n")


def of_another_teacher(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    tensors = load(file.read_bytes())
    file.write_bytes(save({name: value + np.float32(0.01) for name, value in tensors.items()}))


def with_another_activation(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_eps": 0.5}))


def with_words_exchanged(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"@@"').replace('"dog"', '"cat"').replace('"@@"', '"dog"'))


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("head", of_another_teacher, "sidecar head is not this teacher's"),
        ("attn_in@1", of_another_teacher, "sidecar attn_in@1 is not this teacher's: key.bias"),
        ("config", with_another_activation, "sidecar config is not this teacher's: layer_norm_eps: 1e-12 → 0.5"),
        ("tokenizer", with_words_exchanged, "sidecar tokenizer is not this teacher's"),
    ],
)
def test_a_sidecar_that_is_not_this_teachers_is_found(
    with_sidecars: Path, tiny_teacher: Path, name: str, edit: Callable[[Path], None], said: str
) -> None:
    forge(with_sidecars, name, edit)
    assert verify_store(str(with_sidecars)).ok
    outcome = audit(with_sidecars, tiny_teacher)
    assert said in outcome.summary["sidecars"]["bad"][0] and not outcome.summary["bad_rows"]
    assert isinstance(outcome.failure, VerificationError) and said in str(outcome.failure)
    store = open_store(str(with_sidecars))
    if name == "config":
        with pytest.raises(VerificationError, match="not its teacher's, and signals are derived by it"):
            derivation_of(store)
    if name == "tokenizer":
        with pytest.raises(VerificationError, match="not the one that its rows were made with"):
            _ = TeacherFacts(store, {}).tokenizer


def test_a_proof_is_tried_again(with_sidecars: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody had put the proof of another teacher there: this one's head does something else."""
    assert audit(with_sidecars, tiny_teacher).summary["sidecars"]["bad"] == []
    monkeypatch.setattr(Derivation, "_logits", lambda self, first_BD: first_BD[:, :3])
    outcome = audit(with_sidecars, tiny_teacher)
    assert "logits does not follow from sidecar head" in outcome.summary["sidecars"]["bad"][0]
    assert outcome.summary["verdict"] == "what it keeps of the teacher is not the teacher's"
