"""`kd signals` against the sizes of the specification, and against what a capture writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from kd.pipeline.errors import UsageError
from kd.pipeline.stage import StageContext
from kd.pipeline.store import SIGNALS
from kd.stages.listings import NEEDS, ListSignals


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> str:
    """A folder with BERT-base's config: sizes need no weights, a file that stands for them is enough."""
    folder = tmp_path_factory.mktemp("bert-base")
    transformers.AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    config = transformers.BertConfig(num_labels=3, architectures=["BertForSequenceClassification"])
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def listed(**options: Any) -> dict[str, Any]:
    summary = ListSignals(**options).run(StageContext()).summary
    return {signal["name"]: signal for signal in summary["signals"]} | {"sidecars": summary.get("sidecars")}


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (
            25,
            {
                "logits": 12,
                "hidden.cls": 1_536,
                "hidden.tok": 38_400,
                "attention.score": 15_000,
                "attention.qkv": 115_200,
            },
        ),
        (128, {"hidden.mean": 1_536, "hidden.tok": 196_608, "attention.score": 393_216, "attention.qkv": 589_824}),
    ],
)
def test_bytes_of_an_example_are_those_of_the_specification(
    bert_base: str, length: int, expected: dict[str, int]
) -> None:
    """Section 0.2 of the specification: one layer of BERT-base."""
    found = listed(teacher=bert_base, length=length)
    assert {name: found[name]["bytes"] for name in expected} == expected
    assert (found["hidden.tok"]["layers"], found["attention.score"]["layers"]) == (13, 12)
    assert found["attention.qkv"]["bytes_all_layers"] == 12 * found["attention.qkv"]["bytes"]
    # In float32, as the checkpoint is: the table of 30522 words, 512 places and 2 segments; three maps with biases.
    assert found["sidecars"]["embeddings"] == pytest.approx(4 * 768 * (30_522 + 512 + 2 + 2), rel=1e-3)
    assert found["sidecars"]["attn_in@LAYER"] == pytest.approx(4 * 3 * (768 * 768 + 768), rel=1e-3)


def test_every_signal_says_its_shape_what_it_follows_from_and_what_it_needs() -> None:
    found = listed()
    assert set(NEEDS) == set(SIGNALS) == set(found) - {"sidecars"}
    assert found["attention.score"]["shape"] == "[n, n, head]" and "bytes" not in found["attention.score"]
    assert found["attention.qkv"]["follows_from"] == "hidden.tok of the layer below with sidecar attn_in@LAYER"
    assert found["hidden.mean"]["follows_from"] == "hidden.tok of its layer"
    assert found["hidden.tok"]["follows_from"].endswith("with sidecar embeddings (layer 0 only)")
    report = ListSignals().report(ListSignals().run(StageContext()).summary)
    assert "attention.score@LAYERS" in report and "follows from attention.qkv of its layer" in report


def test_what_a_bare_encoder_does_not_give_is_said(tmp_path: Path, bert_base: str) -> None:
    for file in Path(bert_base).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    transformers.BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    stage = ListSignals(teacher=str(tmp_path), length=10)
    assert "not of this teacher" in stage.report(stage.run(StageContext()).summary)


def test_a_masked_lm_is_asked_for_a_share_of_its_tokens(tmp_path: Path, bert_base: str) -> None:
    for file in Path(bert_base).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    found = listed(teacher=str(tmp_path), length=40)
    assert found["mlm.hidden"]["bytes"] == 6 * 768 * 2 and found["mlm.logits"]["bytes"] == 6 * 30_522 * 2
    assert found["mlm.logits"]["follows_from"] == "mlm.hidden with sidecar head"
    assert found["mlm.hidden"]["follows_from"] == "hidden.tok of the last layer"
    # Section 0.2 of the specification, in float32: a transform and the word table it is tied to.
    assert found["sidecars"]["head"] == pytest.approx(4 * (768 * 768 + 768 * 30_522 + 2 * 30_522), rel=1e-3)
    assert found["logits"]["bytes"] is None
    assert listed(teacher=bert_base)["mlm.hidden"]["bytes"] is None


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="--length 0"):
        ListSignals(length=0)
