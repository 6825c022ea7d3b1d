"""Watching a student's attention: what is seen is what the model works on, and the model does not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kd.pipeline.errors import RefusedError
from kd.stages.train_student.attention_watch import watch_attention
from kd.stages.train_student.methods import StudentOutputs

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SIZES))


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES))


def distilbert() -> PreTrainedModel:
    config = DistilBertConfig(vocab_size=50, dim=24, n_layers=2, n_heads=3, hidden_dim=32)
    return DistilBertForSequenceClassification(config)


def mobilebert() -> PreTrainedModel:
    config = MobileBertConfig(**{**SIZES, "hidden_size": 36}, embedding_size=16, intra_bottleneck_size=24)
    return MobileBertForSequenceClassification(config)


def batch() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": torch.arange(10).view(2, 5) % 7 + 1, "attention_mask": mask}


@pytest.mark.parametrize("make", [bert, roberta, distilbert, mobilebert])
def test_scores_are_those_behind_the_attention_that_transformers_returns(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    inputs = batch()
    plain = model(**inputs).logits
    watch = watch_attention(model, heads=3, width=24, described="it")
    with watch:
        watched = model(**inputs).logits
    assert torch.equal(watched, plain), "watching changed the model"
    assert model.config._attn_implementation == "sdpa"

    model.set_attn_implementation("eager")
    shown = model(**inputs, output_attentions=True).attentions
    mask = inputs["attention_mask"].bool()
    outputs = StudentOutputs(plain, mask, heads=watch.heads())
    for layer, attention in enumerate(shown, 1):
        scores = outputs.score(layer)
        assert scores.shape == (2, 3, 5, 5)
        found = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        torch.testing.assert_close(found, attention, atol=1e-6, rtol=1e-5)
        assert outputs.qkv(layer).shape == (2, 5, 3, 24)


def test_queries_keys_and_values_are_outputs_of_the_linear_maps_head_after_head() -> None:
    torch.manual_seed(0)
    model = bert().eval()
    seen: dict[str, torch.Tensor] = {}
    attention = model.bert.encoder.layer[1].attention.self
    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    watch = watch_attention(model, heads=3, width=24, described="it")
    inputs = batch()
    with watch:
        logits = model(**inputs).logits
    qkv = StudentOutputs(logits, inputs["attention_mask"].bool(), heads=watch.heads()).qkv(2)
    torch.testing.assert_close(qkv, torch.stack([seen["query"], seen["key"], seen["value"]], dim=2))


def test_gradient_flows_through_what_was_watched_and_dropout_does_not_touch_it() -> None:
    torch.manual_seed(0)
    model = bert().train()
    watch = watch_attention(model, heads=3, width=24, described="it")
    assert model.training
    inputs = batch()
    with watch:
        logits = model(**inputs).logits
    outputs = StudentOutputs(logits, inputs["attention_mask"].bool(), heads=watch.heads())
    outputs.score(2).square().mean().backward()
    attention = model.bert.encoder.layer[1].attention.self
    assert attention.query.weight.grad.any() and attention.value.weight.grad is None


def test_the_kernel_is_given_back_when_the_model_fails() -> None:
    model = bert().eval()
    watch = watch_attention(model, heads=3, width=24, described="it")
    with pytest.raises(IndexError), watch:
        model(input_ids=torch.tensor([[99]]))
    assert model.config._attn_implementation == "sdpa"
    with watch:
        model(**batch())
    assert len(watch.heads()) == 2


@pytest.mark.parametrize(
    ("make", "heads", "words"),
    [
        (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES)), 3, "found: 0 calls"),
        (bert, 4, "shapes [(1, 3, 2, 8)]"),
    ],
)
def test_a_model_that_cannot_be_watched_is_refused(make: Callable[[], Any], heads: int, words: str) -> None:
    with pytest.raises(RefusedError, match="'some/model' cannot be watched") as error:
        watch_attention(make(), heads=heads, width=24, described="some/model")
    assert words in str(error.value)
