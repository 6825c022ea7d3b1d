"""Attention as it is captured, against what transformers itself reports: eager attention is a softmax of the scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kd.pipeline.errors import RefusedError
from kd.pipeline.ragged import Ragged
from kd.pipeline.store import Signal
from kd.stages.cache_teacher.runner import Runner, plan_batches

SMALL: dict[str, Any] = {"vocab_size": 90, "num_labels": 3}
BODY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(**BODY, **SMALL),
    "roberta": lambda: transformers.RobertaConfig(pad_token_id=1, **BODY, **SMALL),
    "electra": lambda: transformers.ElectraConfig(embedding_size=8, **BODY, **SMALL),
    "distilbert": lambda: transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **SMALL),
    "roberta-prelayernorm": lambda: transformers.RobertaPreLayerNormConfig(pad_token_id=1, **BODY, **SMALL),
    "mpnet": lambda: transformers.MPNetConfig(**BODY, **SMALL),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=16, **BODY, **SMALL
    ),
    "albert": lambda: transformers.AlbertConfig(embedding_size=8, **BODY, **SMALL),
}
POST_LN = ["bert", "roberta", "electra", "distilbert"]


def model_of(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[kind]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
    return model


def captured(model: Any, rows: Ragged, *signals: str, batch_tokens: int = 64) -> dict[str, list[np.ndarray]]:
    """Per signal, each row's entries."""
    wanted = {Signal.parse(signal): "float32" for signal in signals}
    runner = Runner(model, wanted, pad_token_id=model.config.pad_token_id)
    zeros = Ragged.from_lengths(np.zeros(len(rows.values), np.uint8), rows.lengths)
    found: dict[str, dict[int, np.ndarray]] = {signal: {} for signal in signals}
    for batch in runner.run(rows, zeros, plan_batches(rows.lengths, batch_tokens)):
        for signal, values in batch.values.items():
            lengths = rows.lengths[batch.slots] ** {"example": 0, "token": 1, "pair": 2}[signal.kind.axis]
            for slot, part in zip(batch.slots.tolist(), np.split(values, np.cumsum(lengths)[:-1]), strict=True):
                found[str(signal)][slot] = part
    runner.close()
    return {signal: [parts[row] for row in range(len(rows))] for signal, parts in found.items()}


def some_rows() -> Ragged:
    lengths = [5, 1, 9, 3, 8, 12]
    return Ragged.from_lengths(np.random.default_rng(0).integers(3, 90, size=sum(lengths)), lengths)


@pytest.mark.parametrize("kind", [*POST_LN, "roberta-prelayernorm"])
def test_the_softmax_of_captured_scores_is_the_attention_that_transformers_reports(kind: str) -> None:
    model, rows = model_of(kind), some_rows()
    found = captured(model, rows, "attention.score@1", "attention.score@2")
    eager = model_of(kind)
    eager.set_attn_implementation("eager")
    for row, ids in enumerate(rows):
        with torch.inference_mode():
            ids_1T = torch.from_numpy(ids)[None]
            expected = eager(ids_1T, attention_mask=torch.ones_like(ids_1T), output_attentions=True).attentions
        for layer in (1, 2):
            scores_TTH = torch.from_numpy(found[f"attention.score@{layer}"][row].reshape(len(ids), len(ids), 2))
            attention_HTT = scores_TTH.permute(2, 0, 1).softmax(-1)
            assert float((attention_HTT - expected[layer - 1][0]).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", POST_LN)
def test_scores_are_query_times_key_over_the_root_of_the_head_width(kind: str) -> None:
    rows = some_rows()
    found = captured(model_of(kind), rows, "attention.score@2", "attention.qkv@2")
    for row, length in enumerate(rows.lengths.tolist()):
        query, key, _ = found["attention.qkv@2"][row].astype(np.float64).transpose(1, 0, 2).reshape(3, length, 2, 8)
        expected = np.einsum("qhd,khd->qkh", query, key) / math.sqrt(8)
        np.testing.assert_allclose(found["attention.score@2"][row].reshape(length, length, 2), expected, atol=1e-5)


def test_queries_keys_and_values_are_the_linear_maps_of_the_layer_below() -> None:
    model, rows = model_of("bert"), some_rows()
    found = captured(model, rows, "hidden.tok@1", "attention.qkv@2")
    attention = model.bert.encoder.layer[1].attention.self
    for below, maps in zip(found["hidden.tok@1"], found["attention.qkv@2"], strict=True):
        for place, linear in enumerate((attention.query, attention.key, attention.value)):
            expected = linear(torch.from_numpy(below)).detach().numpy()
            np.testing.assert_allclose(maps[:, place], expected, atol=1e-6)


def test_the_fast_kernel_stays() -> None:
    model = model_of("bert")
    captured(model, some_rows(), "attention.score@1")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2"])
def test_scores_of_relative_positions_are_refused_by_the_name_of_the_model(kind: str) -> None:
    model = model_of(kind)
    with pytest.raises(RefusedError, match=f"{type(model).__name__} are not query times key") as refusal:
        Runner(model, {Signal("attention.score", 1): "float32"})
    assert "attention.qkv" in str(refusal.value.fix)


def test_a_model_without_such_maps_is_refused_by_its_name() -> None:
    with pytest.raises(RefusedError, match="AlbertForSequenceClassification"):
        Runner(model_of("albert"), {Signal("attention.qkv", 1): "float32"})
