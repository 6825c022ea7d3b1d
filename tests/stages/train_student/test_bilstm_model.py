"""The BiLSTM as a transformers model: equal to torch's packed LSTM, blind to padding, safe, saved and loaded whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification

from kd.stages.train_student import bilstm_model
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


POOLINGS = ["max", "mean", "last", "attention"]


class Oracle:
    """The model in float64 numpy, one text and one token at a time, from its tensors by name."""

    def __init__(self, model: BiLstmForSequenceClassification) -> None:
        self.config = model.config
        self.tensors = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def logits(self, ids: list[int]) -> np.ndarray:
        if not self.config.pair:
            sentence = self.sentence(ids)
        else:
            cut = ids.index(SEP)
            first, second = ([i for i in side if i not in (CLS, SEP)] for side in (ids[:cut], ids[cut:]))
            u, v = self.sentence(first), self.sentence(second)
            sentence = np.concatenate([u, v, abs(u - v), u * v])
        if self.config.head_size:
            sentence = np.maximum(self.linear("head", sentence), 0.0)
        return self.linear("classifier", sentence)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.tensors[f"{name}.weight"] @ x + self.tensors[f"{name}.bias"]

    def sentence(self, ids: list[int]) -> np.ndarray:
        tables = ["static_embeddings", "embeddings"] if self.config.multichannel else ["embeddings"]
        states = [np.concatenate([self.tensors[f"{table}.weight"][i] for table in tables]) for i in ids]
        for layer in range(self.config.num_hidden_layers):
            there = self.direction(f"layers.{layer}.forward_lstm", states)
            back = self.direction(f"layers.{layer}.backward_lstm", states[::-1])[::-1]
            states = [np.concatenate(both) for both in zip(there, back, strict=True)]
        if self.config.pooling == "last":
            return np.concatenate([there[-1], back[0]])
        if self.config.pooling == "attention":
            weights = np.exp([(self.tensors["attention.weight"] @ np.tanh(state)).item() for state in states])
            return np.asarray(weights / weights.sum() @ np.stack(states))
        return {"max": np.max, "mean": np.mean}[self.config.pooling](np.stack(states), axis=0)

    def direction(self, name: str, states: list[np.ndarray]) -> list[np.ndarray]:
        of_input, of_state, bias, bias_2 = (
            self.tensors[f"{name}.{kind}_l0"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = np.zeros(self.config.hidden_size)
        found = []
        for state in states:
            i, f, g, o = np.split(of_input @ state + of_state @ h + bias + bias_2, 4)
            c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
            h = np.tanh(c) / (1 + np.exp(-o))
            found.append(h)
        return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_are_those_of_the_equations(
    pooling: str, pair: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bilstm_model, "PACKED_COST", 0.0 if packed else 1e9)
    layers, head = (2, 5) if pair else (1, 0)
    model = make(pooling=pooling, pair=pair, num_hidden_layers=layers, head_size=head, multichannel=pair)
    rows = [[CLS, 11, 12, 13, 14, SEP, 20, SEP], [CLS, 31, SEP, 32, 33, SEP], [CLS, 40, SEP, 41, SEP]]
    ids = torch.zeros(3, 8, dtype=torch.int64)
    for row, its in enumerate(rows):
        ids[row, : len(its)] = torch.tensor(its)
    expected = np.stack([Oracle(model).logits(row) for row in rows])
    found = model(ids, (ids != 0).long()).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
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


def mostly_padding(pair: bool) -> tuple[Tensor, Tensor]:
    """One long text, three short ones and one without tokens."""
    ids, mask = batch([12, 2, 3, 4, 0], width=14)
    if pair:
        ids[:4, 0], ids[0, 9], ids[1:4, 1] = CLS, SEP, SEP
    return ids, mask


@pytest.mark.parametrize("pair", [False, True])
def test_a_batch_of_mostly_padding_is_packed_and_comes_out_the_same(
    pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    original = bilstm_model.pack_padded_sequence
    monkeypatch.setattr(
        bilstm_model, "pack_padded_sequence", lambda *args, **kw: packed.append(1) or original(*args, **kw)
    )
    model = make(pair=pair, num_hidden_layers=2, dropout=0.0).train()
    ids, mask = mostly_padding(pair)
    labels = torch.tensor([0, 1, 2, 0, 1])

    def outcome() -> list[Tensor]:
        model.zero_grad()
        output = model(ids, mask, labels=labels, output_hidden_states=True)
        output.loss.backward()
        return [output.logits, *output.hidden_states, *(p.grad for p in model.parameters() if p.grad is not None)]

    there = outcome()
    assert len(packed) == 4  # two layers, two directions
    monkeypatch.setattr(bilstm_model, "PACKED_COST", 1e9)
    for ours, theirs in zip(there, outcome(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert len(packed) == 4


def test_batches_of_one_length_and_single_texts_are_not_packed() -> None:
    masks = [torch.arange(9) < torch.tensor(lengths)[:, None] for lengths in ([9, 8, 8], [3], [9, 5, 5])]
    assert all(bilstm_model._lengths_to_pack(mask) is None for mask in masks)
    few = bilstm_model._lengths_to_pack(torch.arange(9) < torch.tensor([9, 2, 0])[:, None])
    assert few is not None and few.tolist() == [9, 2, 1]


def test_a_graph_that_is_traced_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert bilstm_model._lengths_to_pack(torch.arange(9) < torch.tensor([9, 2, 0])[:, None]) is None


def test_attention_that_has_learned_nothing_is_the_mean() -> None:
    model, ids_and_mask = make(pooling="attention"), batch([7, 3])
    mean = make(pooling="mean")
    mean.load_state_dict({n: v for n, v in model.state_dict().items() if n != "attention.weight"})
    with torch.no_grad():
        model.attention.weight.zero_()
    torch.testing.assert_close(model(*ids_and_mask).logits, mean(*ids_and_mask).logits)


def test_the_second_channel_is_not_trained() -> None:
    model = make(multichannel=True).train()
    ids, mask = batch([5, 3])
    model(ids, mask).logits.sum().backward()
    assert model.static_embeddings.weight.grad is None and model.embeddings.weight.grad.any()
    output = model(ids, mask, output_hidden_states=True)
    assert output.hidden_states[0].shape[-1] == 16 == model.config.input_size


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
    both = make(vocab_size=10, embedding_size=300, hidden_size=150, num_labels=2, multichannel=True)
    assert count(both.layers) == 902_400
    pair = make(vocab_size=10, embedding_size=300, hidden_size=150, head_size=200, num_labels=3, pair=True)
    assert count(pair.head) + count(pair.classifier) == 240_803


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pair": True, "num_hidden_layers": 2, "multichannel": True},
        {"head_size": 0, "pooling": "last"},
        {"pooling": "attention"},
    ],
)
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


def test_a_folder_of_before_there_were_further_fields_opens_as_it_was(tmp_path: Path) -> None:
    model = make(head_size=0, pooling="last")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["multichannel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, missing = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(missing[name] for name in ("missing_keys", "unexpected_keys"))
    ids, mask = batch([5, 3])
    assert torch.equal(model(ids, mask).logits, again.eval()(ids, mask).logits)


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
