"""Float32 layers through oneDNN: the same numbers but for the last bits, in every shape a model asks for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from kd.stages.cache_teacher import onednn
from kd.stages.cache_teacher.onednn import use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (2, 7, 5), (2, 3, 2, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_what_it_gave_in_every_shape(shape: tuple[int, ...], bias: bool) -> None:
    layer, rows = nn.Linear(5, 3, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        expected = layer(rows)
        assert use_onednn(layer) == 1
        found = layer(rows)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_views_that_are_not_contiguous_are_read_as_they_are() -> None:
    layer, hidden_BTH = nn.Linear(5, 3), torch.randn(4, 6, 5)
    views = (hidden_BTH[:, 0], hidden_BTH.transpose(0, 1), torch.randn(5, 4).T, hidden_BTH[::2, 1:4])
    with torch.inference_mode():
        expected = [layer(view) for view in views]
        use_onednn(layer)
        for view, wanted in zip(views, expected, strict=True):
            np.testing.assert_allclose(layer(view), wanted, rtol=1e-5, atol=1e-6)


def test_every_layer_of_a_teacher_takes_part_and_its_parameters_stay() -> None:
    model = bert()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert use_onednn(model) == 2 * 6 + 2  # of two layers, the pooler's and the head's
        found = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, again)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_other_dtypes_and_subclasses_stay_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert use_onednn(copy.deepcopy(bert()).bfloat16()) == 0
    assert use_onednn(nn.Sequential(Scaled(3, 3), nn.Linear(3, 3))) == 1


def test_a_torch_without_the_operator_keeps_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(onednn, "_linear", gone)
    model = bert()
    assert use_onednn(model) == 0
    with torch.inference_mode():
        assert model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3)


def test_switched_off_it_stays_off() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert use_onednn(bert()) == 0
