"""Teacher blocks at a smaller width: what is lost is what a truncated SVD loses, and nothing where nothing is left out.

Dimension key: V words, D the teacher's width, d the student's, e and f the widths of a head.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from kd.pipeline.store import open_view
from kd.stages.train_student.students import Task, TeacherFacts, parse_start, parse_student
from kd.stages.train_student.students.narrowed import Directions, narrowed, nearest_factors

TASK = Task("single-label", ("negative", "neutral", "positive"), pair=False)
ATTENTION = "encoder.layer.0.attention."


def random_block(wide: int = 12, vocabulary: int = 40, inner: int = 20) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).normal
    sizes = {
        "embeddings.word_embeddings.weight": (vocabulary, wide),
        "embeddings.LayerNorm.weight": (wide,),
        "embeddings.LayerNorm.bias": (wide,),
        **{f"{ATTENTION}self.{name}.weight": (wide, wide) for name in ("query", "key", "value")},
        **{f"{ATTENTION}self.{name}.bias": (wide,) for name in ("query", "key", "value")},
        f"{ATTENTION}output.dense.weight": (wide, wide),
        f"{ATTENTION}output.dense.bias": (wide,),
        "encoder.layer.0.intermediate.dense.weight": (inner, wide),
        "encoder.layer.0.intermediate.dense.bias": (inner,),
        "encoder.layer.0.output.dense.weight": (wide, inner),
        "encoder.layer.0.output.dense.bias": (wide,),
    }
    return {name: draw(size=shape).astype(np.float32) for name, shape in sizes.items()}


def with_bias(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """[D + 1, D]: what a state and a one beside it are multiplied with."""
    return np.vstack([tensors[f"{ATTENTION}self.{name}.weight"].T, tensors[f"{ATTENTION}self.{name}.bias"]])


def test_the_directions_are_the_mean_and_the_leading_ones_of_the_rest() -> None:
    table = np.random.default_rng(1).normal(size=(50, 10)) * np.arange(1, 11) + 3.0
    found = Directions.of(table, 4)
    basis = found.basis_Dd
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    np.testing.assert_allclose((table @ basis).mean(1) * 4**0.5, table.mean(1) * 10**0.5, atol=1e-10)
    centred = table - table.mean(1, keepdims=True)
    values = np.linalg.svd(centred, compute_uv=False)
    assert np.square(table - table @ basis @ basis.T).sum() == pytest.approx(np.square(values[3:]).sum())
    assert found.share == pytest.approx(np.square(values[:3]).sum() / np.square(values).sum())


def test_the_nearest_factors_lose_what_a_truncated_svd_loses() -> None:
    first, second = (np.random.default_rng(seed).normal(size=(9, 5)) for seed in (2, 3))
    for rank in range(1, 6):
        one, other = nearest_factors(first, second, rank)
        lost = np.linalg.norm(first @ second.T - one @ other.T)
        values = np.linalg.svd(first @ second.T, compute_uv=False)
        assert one.shape == other.shape == (9, rank)
        assert lost == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), abs=1e-9)


@pytest.mark.parametrize("heads", [2, 4])
def test_every_heads_products_lose_what_their_truncated_svds_lose(heads: int) -> None:
    tensors, wide, width = random_block(), 12, 8
    directions = Directions.of(tensors["embeddings.word_embeddings.weight"], width)
    found = narrowed(tensors, directions, heads=heads)
    along = np.block([[directions.basis_Dd, np.zeros((wide, 1))], [np.zeros((1, width)), np.ones((1, 1))]])
    size, rank = wide // heads, width // heads
    out, narrow_out = (its[f"{ATTENTION}output.dense.weight"].astype(float) for its in (tensors, found))
    for head in range(heads):
        old, new = slice(head * size, (head + 1) * size), slice(head * rank, (head + 1) * rank)
        products = [
            (
                along.T @ with_bias(tensors, "query")[:, old] @ with_bias(tensors, "key")[:, old].T @ along / size**0.5,
                with_bias(found, "query")[:, new] @ with_bias(found, "key")[:, new].T / rank**0.5,
            ),
            (
                along.T @ with_bias(tensors, "value")[:, old] @ out[:, old].T @ directions.basis_Dd,
                with_bias(found, "value")[:, new] @ narrow_out[:, new].T,
            ),
        ]
        for wanted, narrow in products:
            lost = np.square(np.linalg.svd(wanted, compute_uv=False)[rank:]).sum()
            assert lost > 1e-3
            assert np.square(wanted - narrow).sum() == pytest.approx(lost, rel=1e-4)


def facts(view: Any) -> TeacherFacts:
    store = open_view(view.path).store
    return TeacherFacts(store, json.loads((store.sidecar_folder("config") / "config.json").read_text()))


def built(view: Any, student: str, start: str) -> Any:
    its, beginning, teacher = parse_student(student), parse_start(start), facts(view)
    its.check(beginning, teacher, TASK)
    torch.manual_seed(0)
    return its.build(beginning, teacher, TASK, teacher.tokenizer)


def test_at_full_width_it_is_the_plain_start(view: Any) -> None:
    plain, named = built(view, "bert", "layers:2+1"), built(view, "bert:hidden_size=32:heads=4", "layers:2+1")
    assert plain.start == named.start and "table_kept" not in plain.start
    states = [its.model.state_dict() for its in (plain, named)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_every_tensor_of_a_narrower_student_but_its_head_is_the_teachers(view: Any) -> None:
    narrow = built(view, "bert:hidden_size=16", "layers:1+2")
    parameters = [name for name, _ in narrow.model.named_parameters()]
    in_head = [name for name in parameters if name.startswith(("classifier", "bert.pooler"))]
    assert narrow.start["tensors_from_teacher"] == len(parameters) - len(in_head) == 37
    assert 0.5 < narrow.start["table_kept"] < 1
    config = narrow.model.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (16, 4, 64)


def test_a_teacher_of_few_directions_is_reproduced(tmp_path: Any) -> None:
    """Its states have 7 directions and no mean, its heads products of rank 2 at most: 8 features hold all of it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    common = {"vocab_size": 30, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, **sizes}
    teacher = BertModel(BertConfig(hidden_size=16, **common), add_pooling_layer=False).eval()
    student = BertModel(BertConfig(hidden_size=8, **common), add_pooling_layer=False).eval()
    inside = torch.linalg.qr(torch.cat([torch.ones(16, 1), torch.randn(16, 7)], 1))[0][:, 1:]
    onto = inside @ inside.T
    with torch.no_grad():
        for name, value in teacher.named_parameters():
            if name.endswith("LayerNorm.weight"):
                value.fill_(1.5)
            elif name.endswith(("LayerNorm.bias", "output.dense.bias")):
                value.copy_(onto @ torch.randn(16))
            elif name.endswith("embeddings.weight"):
                value.copy_(torch.randn_like(value) @ onto)
            elif name.endswith("output.dense.weight"):
                value.copy_(onto @ torch.randn_like(value))
            else:
                value.normal_(std=0.4)
            if ".self." in name:
                # Two of the four features of each head.
                value.view(4, 4, -1)[:, 2:] = 0.0
    tensors = {name: value.detach().numpy() for name, value in teacher.named_parameters()}
    directions = Directions.of(tensors["embeddings.word_embeddings.weight"], 8)
    assert directions.share == pytest.approx(1)
    found = narrowed(tensors, directions, heads=4)
    student.load_state_dict({name: torch.from_numpy(value) for name, value in found.items()})
    inputs = {"input_ids": torch.arange(24).reshape(2, 12), "attention_mask": torch.ones(2, 12)}
    inputs["attention_mask"][1, 8:] = 0
    states = [its(**inputs, output_hidden_states=True).hidden_states for its in (teacher, student)]
    basis = torch.from_numpy(directions.basis_Dd).float()
    for wide, narrow in zip(*states, strict=True):
        torch.testing.assert_close(narrow, wide @ basis, atol=2e-5, rtol=1e-4)
