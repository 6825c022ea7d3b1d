"""A masked-LM teacher over masked text: states and head stand for its logits, or the logits themselves are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM

from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import StageContext, execute
from kd.pipeline.store import Signal, open_view
from kd.stages.derivation import POSITIONS, derivation_of
from kd.stages.masking import Masking
from kd.stages.store.audit import AuditStore
from kd.stages.store.export import ExportStore
from kd.stages.store.plan import PlanStore
from kd.stages.store.repair import RepairStore
from kd.stages.store.verify import VerifyStore
from kd.stages.train_student.rows import StoreRows


@pytest.fixture
def masked(bench: Any, masked_lm: Path, sentences: list[str]) -> Any:
    """`masked(**options)`: a capture of forty rows of masked text; `bench` in `masked.bench`."""
    bench.teacher = masked_lm
    corpus = bench.corpus(sentences[:40])

    def capture(**options: Any) -> Any:
        given = {"mask_share": 0.15, "label_column": None, "rows_per_shard": 16, **options}
        return bench.capture(corpus, **given)

    capture.bench = bench  # type: ignore[attr-defined]
    return capture


def rows_of(view: Any) -> StoreRows:
    masking = Masking.from_capture(view.store.identity.capture)
    assert masking is not None
    return StoreRows([view.reader], [view.rows], [masking])


def live_logits(teacher: Path, rows: StoreRows) -> np.ndarray:
    """[P, V] what transformers gives at the masked tokens, row by row."""
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    found, lengths = rows.masked(np.arange(len(rows)))
    logits = []
    for row, length in enumerate(lengths.tolist()):
        with torch.inference_mode():
            shown = model(input_ids=torch.from_numpy(found.ids_BT[row : row + 1, :length])).logits[0]
        logits.append(shown[found.positions_BM[row][found.positions_BM[row] >= 0]].numpy())
    return np.concatenate(logits)


def kept_logits(view: Any, rows: StoreRows, source: str) -> np.ndarray:
    """[P, V] what a student would learn from."""
    index = np.arange(len(rows))
    positions = torch.from_numpy(rows.masked(index)[0].positions_BM)
    stored = rows.tensors([s.bare for s in view.signals if s.name == source], index, to_derive=True)
    if source == "mlm.logits":
        return stored[source][positions >= 0].float().numpy()
    return derivation_of(view.store).of({**stored, POSITIONS: positions})["mlm.logits"].numpy()


def test_states_and_one_copy_of_the_head_give_the_teachers_logits(masked: Any, masked_lm: Path) -> None:
    masked()
    bench = masked.bench
    view = open_view(bench.folder / "view")
    # 10 = 0.15 * 64, so that the longest row fits; positions and labels follow from the row, and take nothing.
    assert [str(signal) for signal in view.signals] == ["mlm.hidden:float16"]
    assert view.reader.spec("mlm.hidden").shape == (10, 32)
    assert any("mlm.logits follows from sidecar head: largest difference" in text for text in bench.said)
    rows = rows_of(view)
    expected = live_logits(masked_lm, rows)
    found = kept_logits(view, rows, "mlm.hidden")
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.99


def test_in_float32_they_are_the_teachers_to_the_last_bits(masked: Any, masked_lm: Path) -> None:
    masked(hidden_dtype="float32")
    view = open_view(masked.bench.folder / "view")
    rows = rows_of(view)
    np.testing.assert_allclose(kept_logits(view, rows, "mlm.hidden"), live_logits(masked_lm, rows), atol=2e-5)


def test_states_of_all_tokens_stand_for_those_of_the_masked_ones(masked: Any, masked_lm: Path) -> None:
    masked(for_=("distilbert",), hidden_dtype="float32")
    view = open_view(masked.bench.folder / "view")
    assert [str(signal) for signal in view.signals] == ["hidden.tok@2:float32"]
    rows = rows_of(view)
    np.testing.assert_allclose(kept_logits(view, rows, "hidden.tok"), live_logits(masked_lm, rows), atol=2e-5)
    derivable = {one["signal"] for one in view.store.inspect()["derivable"]}
    assert {"mlm.hidden", "mlm.logits"} <= derivable


def test_logits_are_stored_where_the_head_is_asked_not_to_stand_for_them(masked: Any, masked_lm: Path) -> None:
    masked(signals="mlm.logits:float32")
    view = open_view(masked.bench.folder / "view")
    rows = rows_of(view)
    np.testing.assert_allclose(kept_logits(view, rows, "mlm.logits"), live_logits(masked_lm, rows), atol=2e-5)
    used = rows.masked(np.arange(len(rows)))[0].positions_BM >= 0
    assert not rows.gather(view.signals[0].bare, np.arange(len(rows)))[~used].any()


@pytest.fixture
def pre_norm(tmp_path: Path, masked_lm: Path) -> Path:
    """A masked LM that normalises what comes out of its last block, before the head."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked_lm)
    config = transformers.RobertaPreLayerNormConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.RobertaPreLayerNormForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) / 5)
    model.save_pretrained(tmp_path / "pre-norm")
    tokenizer.save_pretrained(tmp_path / "pre-norm")
    return tmp_path / "pre-norm"


def test_where_they_do_not_follow_the_logits_are_stored_and_the_run_says_so(masked: Any, pre_norm: Path) -> None:
    masked.bench.teacher = pre_norm
    masked()
    view = open_view(masked.bench.folder / "view")
    assert [str(signal) for signal in view.signals] == ["mlm.logits:float16"]
    (said,) = [text for text in masked.bench.said if "does not follow from sidecar head" in text]
    assert said.endswith("it is stored instead")
    rows = rows_of(view)
    expected = live_logits(pre_norm, rows)
    assert np.abs(kept_logits(view, rows, "mlm.logits") - expected).max() < 1e-3 * np.abs(expected).max()
    with pytest.raises(RefusedError, match=r"mlm\.logits:head is asked for"):
        masked(signals="mlm.logits:head", output_dir=str(masked.bench.folder / "strict"))


def test_bytes_are_counted_before_and_are_those_written(masked: Any) -> None:
    summary = masked(dry_run=True).summary
    bench = masked.bench
    assert not bench.store.exists()
    planned = summary["bytes_by_signal"]
    assert planned["mlm.hidden"] >= 40 * 10 * 32 * 2
    masked()
    held = open_view(bench.folder / "view").store.inspect()["signals"]["mlm.hidden"]["bytes"]
    assert held == planned["mlm.hidden"]
    head = json.loads((bench.store / "sidecars/head/record.json").read_text())["files"]["tensors.safetensors"]["bytes"]
    assert head == planned["sidecar head"]


def test_another_seed_is_another_store_and_the_same_one_has_every_row(masked: Any) -> None:
    masked()
    assert masked(output_dir=str(masked.bench.folder / "again")).summary["rows_computed"] == 0
    with pytest.raises(RefusedError, match="masking"):
        masked(mask_seed=1, output_dir=str(masked.bench.folder / "other"))


def test_a_store_of_masked_text_is_verified_and_audited(masked: Any, masked_lm: Path) -> None:
    masked(signals="mlm.logits,hidden.tok@0")
    store = str(masked.bench.store)
    assert execute(VerifyStore(store=store), StageContext()).summary["ok"]
    audit = execute(AuditStore(store=store, teacher=str(masked_lm)), StageContext())
    assert audit.failure is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_share": 0.0, "signals": "mlm.hidden"}, "--mask-share"),
        ({"signals": "logits,mlm.hidden"}, "no classification head"),
        ({"mask_share": 1.5}, "expected a share"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(
    masked: Any, no_weights: None, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        masked(**options)


def test_a_classifier_is_no_masked_lm(bench: Any, sentences: list[str], no_weights: None) -> None:
    with pytest.raises(RefusedError, match="no masked-LM head"):
        bench.capture(bench.corpus(sentences[:10]), mask_share=0.15)


def test_an_export_has_rows_as_the_teacher_read_them_and_what_was_masked(masked: Any, tmp_path: Path) -> None:
    masked(signals="mlm.logits:float32")
    view = open_view(masked.bench.folder / "view")
    for source in (view.path, masked.bench.store):
        execute(ExportStore(source=str(source), output_dir=str(tmp_path / source.name / "export")), StageContext())
        table = pq.read_table(tmp_path / source.name / "export/data")
        rows = rows_of(view)
        if source == masked.bench.store:
            rows = StoreRows(rows.readers, [np.arange(40)], rows.maskings)
        found, lengths = rows.masked(np.arange(40))
        for row, length in enumerate(lengths.tolist()):
            assert table["input_ids"][row].as_py() == found.ids_BT[row, :length].tolist()
            places = found.positions_BM[row][found.positions_BM[row] >= 0]
            labels = np.full(length, -100)
            labels[places] = found.labels_BM[row, : len(places)]
            assert table["labels"][row].as_py() == labels.tolist()
        logits = np.array(table["mlm_logits"].to_pylist(), np.float32)
        np.testing.assert_array_equal(logits, rows.gather(Signal("mlm.logits"), np.arange(40)))


def test_what_a_store_of_masked_text_costs_is_planned_with_its_teacher(masked: Any, masked_lm: Path) -> None:
    masked(hidden_dtype="float32")
    store, corpus = str(masked.bench.store), masked.bench.folder / "corpus.csv"
    said = execute(PlanStore(store=store, teacher=str(masked_lm), signals="mlm.logits:float32"), StageContext()).summary
    assert said["asked"]["bytes_by_part"]["mlm.logits"] >= 40 * 10 * 133 * 4 and said["tokens_per_s"] > 0
    texts = {"teacher": str(masked_lm), "dataset": str(corpus), "text_column": "text", "max_length": 64}
    again = execute(PlanStore(store=store, time=False, mask_share=0.15, **texts), StageContext()).summary
    assert (again["asked"]["signals"], again["rows_new"]) == ("mlm.hidden:float32", 0)
    with pytest.raises(RefusedError, match=r"no classification head, so it gives no logits[^\0]*mlm\.logits"):
        execute(PlanStore(store=store), StageContext())


@pytest.mark.parametrize("place", ["mlm.logits/c/1/0/0", "mlm.hidden/c/1/0/0", "token_ids/c/1", "store.json"])
def test_a_store_of_masked_text_is_repaired_byte_for_byte(masked: Any, masked_lm: Path, files: Any, place: str) -> None:
    masked(signals="mlm.logits:float16,mlm.hidden")
    store = masked.bench.store
    file = store / place
    before, data = files(store), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    outcome = execute(RepairStore(store=str(store), teacher=str(masked_lm), device="cpu"), StageContext())
    assert outcome.failure is None and files(store) == before
