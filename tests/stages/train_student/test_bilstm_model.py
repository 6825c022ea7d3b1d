"""The BiLSTM as a transformers model: equal to torch's packed LSTM, blind to padding, safe, saved and loaded whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification

from kd.stages.train_student.bilstm_model import BiLstmConfig, BiLstmForSequenceClassification

SEP, CLS = 3, 2


def make(**changes: object) -> BiLstmForSequenceClassification:
    values: dict[str, object] = {
        "vocab_size": 50,
        "embedding_size": 8,
        "hidden_size": 6,
        "head_size": 5,
        "num_labels": 3,
        "sep_token_id": SEP,
        "cls_token_id": CLS,
        "problem_type": "single_label_classification",
    }
    torch.manual_seed(0)
    return BiLstmForSequenceClassification(BiLstmConfig(**{**values, **changes})).eval()


def batch(lengths: list[int], width: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randint(4, 50, (len(lengths), width), generator=generator) * mask, mask.long()


POOLINGS = ["max", "mean", "last"]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_states_and_pooling_equal_a_packed_bidirectional_lstm(pooling: str) -> None:
    model = make(pooling=pooling, head_size=0)
    lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
    layer = model.layers[0]
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            side = layer.backward_lstm if name.endswith("_reverse") else layer.forward_lstm
            parameter.copy_(getattr(side, name.removesuffix("_reverse")))
    ids, mask = batch([7, 1, 4])
    output = model(ids, mask, output_hidden_states=True)
    packed = pack_padded_sequence(model.embeddings(ids), mask.sum(1), batch_first=True, enforce_sorted=False)
    states, (final, _) = lstm(packed)
    states, _ = pad_packed_sequence(states, batch_first=True)
    torch.testing.assert_close(output.hidden_states[1], states)
    expected = {
        "last": final.transpose(0, 1).reshape(3, 12),
        "mean": states.sum(1) / mask.sum(1, keepdim=True),
        "max": torch.stack([row[:length].amax(0) for row, length in zip(states, mask.sum(1).tolist(), strict=True)]),
    }[pooling]
    torch.testing.assert_close(output.sentence_states[1], expected)
    torch.testing.assert_close(output.logits, model.classifier(expected))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_and_neighbours_change_no_logit(pooling: str, pair: bool, layers: int) -> None:
    model = make(pooling=pooling, pair=pair, num_hidden_layers=layers)
    ids, mask = batch([9, 2, 5])
    if pair:
        ids[:, 0], ids[0, 4], ids[1, 1], ids[2, 2] = CLS, SEP, SEP, SEP
    together = model(ids, mask).logits
    wide_ids, wide_mask = torch.zeros(3, 19, dtype=torch.int64), torch.zeros(3, 19, dtype=torch.int64)
    wide_ids[:, :9], wide_mask[:, :9] = ids, mask
    wide_ids[:, 9:] = 17  # whatever stands in the padding
    torch.testing.assert_close(model(wide_ids, wide_mask).logits, together, atol=1e-6, rtol=1e-5)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length]).logits
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pair", [False, True])
def test_rows_without_tokens_are_safe_and_alike(pooling: str, pair: bool) -> None:
    model = make(pooling=pooling, pair=pair).train()
    ids, mask = batch([4, 0, 0], width=4)
    ids[1] = 17
    logits = model.eval()(ids, mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], logits[2])
    model.train()(ids, mask, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_gets_no_gradient() -> None:
    model = make().train()
    ids, mask = batch([5, 3])
    ids[1, 3:] = 40
    model(ids, mask).logits.sum().backward()
    grad = model.embeddings.weight.grad
    assert grad is not None
    used = set(ids[mask.bool()].tolist())
    assert {row for row in range(50) if grad[row].any()} == used - {0}


def test_a_pair_is_compared_in_four_blocks_and_swapping_it_changes_two_of_them() -> None:
    model = make(pair=True)
    first, second = [11, 12, 13], [20, 21]
    ab = torch.tensor([[CLS, *first, SEP, *second, SEP]])
    ba = torch.tensor([[CLS, *second, SEP, *first, SEP]])
    u, v, apart, product = model(ab, output_hidden_states=True).sentence_states[-1].chunk(4, dim=1)
    u2, v2, apart2, product2 = model(ba, output_hidden_states=True).sentence_states[-1].chunk(4, dim=1)
    torch.testing.assert_close(apart, (u - v).abs())
    torch.testing.assert_close(product, u * v)
    for ours, swapped in ((u, v2), (v, u2), (apart, apart2), (product, product2)):
        torch.testing.assert_close(ours, swapped)
    single = make(pair=False)
    single.load_state_dict(model.state_dict() | {"head.weight": single.head.weight}, strict=True)
    alone = single(torch.tensor([first]), output_hidden_states=True).sentence_states[-1]
    torch.testing.assert_close(u, alone)


@pytest.mark.parametrize("special", [[CLS, SEP, SEP], [CLS, SEP, SEP, SEP]])
def test_states_of_a_pair_stand_where_their_tokens_stood(special: list[int]) -> None:
    """Three special tokens as BERT writes them, four as RoBERTa does."""
    model = make(pair=True)
    first, second = [11, 12, 13], [20, 21]
    middle = [SEP] * (len(special) - 2)
    ids = torch.tensor([[CLS, *first, *middle, *second, SEP, 0, 0]])
    output = model(ids, (ids != 0).long(), output_hidden_states=True)
    expected = (ids != 0) & (ids != CLS) & (ids != SEP)
    assert torch.equal(output.encoded_mask, expected)
    assert not output.hidden_states[0][~expected].any()
    torch.testing.assert_close(output.hidden_states[0][expected], model.embeddings(ids[expected]))
    single = make(pair=False)
    single.load_state_dict(model.state_dict() | {"head.weight": single.head.weight}, strict=True)
    for text in (first, second):
        alone = single(torch.tensor([text]), output_hidden_states=True).hidden_states[1][0]
        places = torch.tensor([ids[0].tolist().index(token) for token in text])
        torch.testing.assert_close(output.hidden_states[1][0, places], alone)


def test_parameters_are_counted_as_in_the_paper() -> None:
    def count(module: nn.Module | None) -> int:
        assert module is not None
        return sum(parameter.numel() for parameter in module.parameters())

    model = make(vocab_size=10, embedding_size=300, hidden_size=150, head_size=200, num_labels=2)
    assert count(model.layers) == 542_400
    assert count(model.head) + count(model.classifier) == 60_602
    pair = make(vocab_size=10, embedding_size=300, hidden_size=150, head_size=200, num_labels=3, pair=True)
    assert count(pair.head) + count(pair.classifier) == 240_803


@pytest.mark.parametrize("changes", [{}, {"pair": True, "num_hidden_layers": 2}, {"head_size": 0, "pooling": "last"}])
def test_a_saved_model_opens_with_the_auto_classes_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    model = make(id2label={0: "a", 1: "b", 2: "c"}, **changes)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, BiLstmForSequenceClassification)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BiLstmConfig)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    ids, mask = batch([5, 3])
    assert torch.equal(model(ids, mask).logits, again(ids, mask).logits)


def test_labels_give_the_loss_of_the_problem_type() -> None:
    ids, mask = batch([5, 3])
    model = make()
    labels = torch.tensor([2, 0])
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    regression = make(num_labels=1, problem_type="regression")
    scores = torch.tensor([0.5, 2.0])
    output = regression(ids, mask, labels=scores)
    torch.testing.assert_close(output.loss, nn.functional.mse_loss(output.logits[:, 0], scores))


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout=0.5)
    ids, mask = batch([5, 3])
    assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)
    model.train()
    assert not torch.equal(model(ids, mask).logits, model(ids, mask).logits)


def test_autocast_to_bfloat16_stays_close() -> None:
    model = make()
    ids, mask = batch([7, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(ids, mask).logits.float()
    assert np.abs((narrow - model(ids, mask).logits).detach().numpy()).max() < 0.05
