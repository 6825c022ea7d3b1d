from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kd.pipeline.errors import RefusedError
from kd.pipeline.stage import NullProgress
from kd.stages import teacher_head
from kd.stages.teacher_head import (
    align,
    head_inputs,
    output_layer,
    sentence_states,
    set_pass_through,
    start_head,
    tanh_layer,
    unexplained,
)
from kd.stages.teacher_training import load_encoder
from kd.stages.text_rows import TextRows


@pytest.fixture
def model(tiny_teacher: Path):
    return load_encoder(str(tiny_teacher), "single-label", ("a", "b"))[0]


@pytest.fixture
def rows(tiny_teacher: Path, sentences: list[str]) -> TextRows:
    from transformers import AutoTokenizer

    labels = np.array(["cat" in text for text in sentences[:90]], np.int64)
    return TextRows(AutoTokenizer.from_pretrained(tiny_teacher), sentences[:90], None, labels, "single-label", 32)


def test_states_come_in_the_order_of_the_rows_and_padding_does_not_count(model, rows) -> None:
    chosen = np.arange(5, 85)
    first, mean = sentence_states(model, rows, chosen, NullProgress(), bf16=False)
    for place in (0, 40, 79):
        batch = rows.collate([rows[int(chosen[place])]])
        batch.pop("labels")
        with torch.inference_mode():
            hidden = model.base_model.eval()(**batch).last_hidden_state[0][batch["attention_mask"][0] > 0]
        torch.testing.assert_close(first[place], hidden[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mean[place], hidden.mean(0), atol=1e-4, rtol=1e-4)


def test_what_the_tanh_layer_reads_is_the_first_token(model, rows) -> None:
    chosen = np.arange(len(rows))
    first, _ = sentence_states(model, rows, chosen, NullProgress(), bf16=False)
    read = head_inputs(model, tanh_layer(model), rows, chosen, NullProgress(), bf16=False)
    torch.testing.assert_close(read, first, atol=1e-4, rtol=1e-4)
    set_pass_through(tanh_layer(model), first)
    given = head_inputs(model, output_layer(model), rows, chosen, NullProgress(), bf16=False)
    torch.testing.assert_close(given, torch.tanh(0.5 * (first - first.mean(0)) / first.std()), atol=1e-4, rtol=1e-3)


def test_left_out_rows_tell_what_predicts_from_what_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 20, generator=generator)
    targets = torch.stack([features[:, 0], features[:, 1] - features[:, 2]], 1)
    assert unexplained(features, targets) < 0.05
    assert unexplained(torch.randn(200, 20, generator=generator), targets) > 0.9


def test_left_out_residuals_equal_those_of_leaving_each_row_out() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 3, generator=generator).double()
    targets = (features @ torch.randn(3, 1, generator=generator).double()) + torch.randn(12, 1).double()
    errors = []
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        strength = penalty * torch.linalg.svdvals(features - features.mean(0))[0] ** 2
        residuals = []
        for row in range(12):
            keep = torch.arange(12) != row
            # With all rows centred once, a free intercept is the mean of those kept; the closed form has the same.
            inputs, wanted = features[keep], targets[keep]
            centre, level = inputs.mean(0), wanted.mean(0)
            gram = (inputs - centre).T @ (inputs - centre) + strength * torch.eye(3)
            weight = torch.linalg.solve(gram, (inputs - centre).T @ (wanted - level))
            residuals.append(targets[row] - level - (features[row] - centre) @ weight)
        errors.append(float(torch.stack(residuals).square().mean() / targets.var(unbiased=False)))
    assert unexplained(features, targets) == pytest.approx(min(errors), rel=1e-6)


def test_aligning_brings_the_first_token_to_the_mean_of_all(model, rows, monkeypatch) -> None:
    monkeypatch.setattr(teacher_head, "ALIGN_EPOCHS", 10)
    # Random weights answer dropout with more noise than sentences make; pretrained ones do not.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    chosen = np.arange(len(rows))
    first, mean = sentence_states(model, rows, chosen, NullProgress(), bf16=False)
    set_pass_through(tanh_layer(model), first)
    target = torch.tanh(0.5 * (mean - mean.mean(0)) / mean.std())

    def distance() -> float:
        given = head_inputs(model, output_layer(model), rows, chosen, NullProgress(), bf16=False)
        return float((given - target).square().mean())

    before = distance()
    align(model, tanh_layer(model), rows, learning_rate=1e-3, bf16=False, seed=0, progress=NullProgress())
    assert distance() < 0.8 * before


@pytest.mark.parametrize("head", ["auto", "aligned", "fitted"])
def test_every_start_predicts_the_training_labels_better_than_chance(model, rows, head: str) -> None:
    torch.manual_seed(0)
    done = start_head(
        model,
        rows,
        "single-label",
        lambda: rows,
        head=head,
        learning_rate=1e-3,
        bf16=False,
        seed=0,
        progress=NullProgress(),
    )
    assert done in ("aligned", "fitted")
    assert head == "auto" or done == head
    batch = rows.collate([rows[row] for row in range(len(rows))])
    labels = batch.pop("labels")
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model.eval()(**batch).logits, labels)
    share = labels.float().mean()
    chance = -(share * share.log() + (1 - share) * (1 - share).log())
    assert loss < chance


def test_an_architecture_without_a_tanh_layer_cannot_be_aligned(rows) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=200, dim=32, n_layers=1, n_heads=2, hidden_dim=32, num_labels=2)
    model = DistilBertForSequenceClassification(config)
    assert tanh_layer(model) is None
    arguments = {"learning_rate": 1e-3, "bf16": False, "seed": 0, "progress": NullProgress()}
    with pytest.raises(RefusedError, match="--head aligned"):
        start_head(model, rows, "single-label", lambda: rows, head="aligned", **arguments)
