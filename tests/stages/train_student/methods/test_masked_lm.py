"""DistilBERT's pretraining loss: soft targets and labels over the vocabulary at masked tokens, and the cosine there.

Dimension key: B examples, T positions, M slots for masked tokens, P masked tokens, V vocabulary, D features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

import kd
from kd.pipeline.errors import UsageError
from kd.pipeline.store.signal import Signal
from kd.stages.train_student import losses
from kd.stages.train_student.methods import Method, StudentOutputs, Targets

from . import reference
from .beside import Ready
from .worlds import World, grid, make, shapes

FORM = shapes(task="masked-lm", num_labels=0)
TRIPLE = "soft-target:5:temperature=2,hard:2,distilbert:1"
SPECS = ("soft-target:temperature=2", "hard", "distilbert:at=mask", "distilbert")
POSITIONS = torch.tensor([[0, 2, 3], [1, -1, -1], [0, 1, -1]])
VOCABULARY = 7


@dataclasses.dataclass(frozen=True)
class Masked:
    """A batch of masked text, as a student and its teacher show it; slots that are not used come last."""

    student: World
    teacher: World
    student_PV: Tensor
    teacher_PV: Tensor
    labels_P: Tensor
    positions_BM: Tensor

    @classmethod
    def made(cls, positions_BM: Tensor = POSITIONS) -> Masked:
        generator = torch.Generator().manual_seed(3)
        count = int((positions_BM >= 0).sum())
        logits = torch.randn(2, count, VOCABULARY, generator=generator, dtype=torch.float64)
        labels_P = torch.randint(VOCABULARY, (count,), generator=generator)
        worlds = World.student_of(FORM, lengths=(4, 2, 3)), World.teacher_of(FORM, lengths=(4, 2, 3))
        return cls(*worlds, logits[0], logits[1], labels_P, positions_BM)

    def rows(self, index: list[int]) -> Masked:
        owners_P = (self.positions_BM >= 0).nonzero()[:, 0]
        kept_P = torch.cat([(owners_P == row).nonzero()[:, 0] for row in index])
        return Masked(
            self.student.rows(index), self.teacher.rows(index), self.student_PV[kept_P], self.teacher_PV[kept_P],
            self.labels_P[kept_P], self.positions_BM[index],
        )  # fmt: skip

    def padded(self, extra: int) -> Masked:
        slots = self.positions_BM.new_full((len(self.positions_BM), extra), -1)
        return dataclasses.replace(
            self, student=self.student.padded(extra), teacher=self.teacher.padded(extra),
            positions_BM=torch.cat([self.positions_BM, slots], 1),
        )  # fmt: skip

    def outputs(self) -> StudentOutputs:
        return dataclasses.replace(self.student.outputs(), logits_BC=self.student_PV, positions_BM=self.positions_BM)

    def targets(self, method: Method) -> Targets:
        held = dataclasses.replace(self.teacher.outputs(), positions_BM=self.positions_BM)
        found = {"mlm.logits": self.teacher_PV, "mlm.hidden": held.masked(4), "hidden.tok@4": held.token(4)}
        signals = {str(signal): found[str(signal)] for signal in method.signals(FORM)}
        return Targets(signals, self.labels_P, torch.ones_like(self.labels_P, dtype=torch.bool))

    def loss(self, spec: str, projections: nn.ModuleDict | None = None) -> Tensor:
        method = make(spec)
        (value,) = method.loss(self.outputs(), self.targets(method), projections or maps(method), FORM).values()
        return value


def maps(method: Method) -> nn.ModuleDict:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return method.projections(FORM).double()


def example_losses(batch: Masked, spec: str) -> list[float]:
    """The loss of each example in numpy, from the formulas alone."""
    weights = {name: value.numpy() for name, value in maps(make(spec)).state_dict().items()}
    owners = (batch.positions_BM >= 0).nonzero()[:, 0].numpy()
    found = []
    for row, (own, other) in enumerate(zip(batch.student.examples(), batch.teacher.examples(), strict=True)):
        places = batch.positions_BM[row][batch.positions_BM[row] >= 0].numpy()
        mine, theirs = (logits.numpy()[owners == row] for logits in (batch.student_PV, batch.teacher_PV))
        if spec.startswith("soft-target"):
            values = 4 * reference.kl(theirs / 2, mine / 2)
        elif spec == "hard":
            said = reference.softmax(mine)
            values = -np.log(said[np.arange(len(places)), batch.labels_P.numpy()[owners == row]])
        else:
            at = places if spec.endswith("mask") else np.arange(len(own["states"][2]))
            projected = reference.mapped(weights, "2-4", own["states"][2])
            values = 1 - reference.cosine(projected, other["states"][4])[at]
        found.append(float(np.mean(values)))
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_each_term_is_the_published_formula_in_numpy(spec: str) -> None:
    batch = Masked.made()
    expected = example_losses(batch, spec)
    assert batch.loss(spec).item() == pytest.approx(sum(expected) / 3, rel=1e-9)
    assert len({round(value, 6) for value in expected}) == 3, "a case that tells nothing"


@pytest.mark.parametrize("spec", ["soft-target:temperature=2:reduction=token", "hard:reduction=token"])
def test_the_authors_mean_is_one_over_all_masked_tokens(spec: str) -> None:
    batch = Masked.made()
    each = [batch.rows([row]) for row in range(3)]
    weighed = [len(one.labels_P) * one.loss(spec).item() for one in each]
    assert batch.loss(spec).item() == pytest.approx(sum(weighed) / len(batch.labels_P), rel=1e-9)
    assert batch.loss(spec).item() != pytest.approx(batch.loss(spec.rpartition(":")[0]).item(), rel=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_changes_nothing_and_a_batch_is_the_mean_of_its_examples_in_any_order(spec: str) -> None:
    batch = Masked.made()
    loss = batch.loss(spec).item()
    assert batch.padded(3).loss(spec).item() == pytest.approx(loss, rel=1e-12)
    alone = [batch.rows([row]).loss(spec).item() for row in range(3)]
    assert loss == pytest.approx(sum(alone) / 3, rel=1e-9)
    assert batch.rows([2, 0, 1]).loss(spec).item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("spec", SPECS[:3])
def test_the_least_there_is(spec: str) -> None:
    batch = Masked.made()
    form = shapes(task="masked-lm", token_widths=(8,) * 5, sentence_widths=(8,) * 5)
    alike = dataclasses.replace(batch, student=batch.teacher, student_PV=batch.teacher_PV)
    method = make(spec)
    (value,) = method.loss(alike.outputs(), alike.targets(method), nn.ModuleDict(), form).values()
    if spec == "hard":
        assert value.item() > 0
    else:
        assert value.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_right_and_reach_neither_the_teacher_nor_other_tokens(spec: str) -> None:
    batch, method = Masked.made(), make(spec)
    projections = maps(method)
    state = batch.student.states[2].masked_fill(~batch.student.mask[..., None], 0.5).requires_grad_()
    logits = batch.student_PV.clone().requires_grad_()
    teacher = batch.teacher_PV.clone().requires_grad_()

    def loss(state_BTD: Tensor, logits_PV: Tensor) -> Tensor:
        world = dataclasses.replace(batch.student, states=(*batch.student.states[:2], state_BTD))
        changed = dataclasses.replace(batch, student=world, student_PV=logits_PV, teacher_PV=teacher)
        return changed.loss(spec, projections)

    assert torch.autograd.gradcheck(loss, (state, logits), fast_mode=True)
    loss(state, logits).backward()
    assert teacher.grad is None
    if spec.endswith("mask"):
        asked = torch.zeros_like(batch.student.mask)
        rows, slots = (POSITIONS >= 0).nonzero(as_tuple=True)
        asked[rows, POSITIONS[rows, slots]] = True
        assert state.grad is not None and not state.grad[~asked].any() and state.grad[asked].any(1).all()


def test_golden() -> None:
    """Section 1 of the specification per token, and its cosine, at positions that leave out padding."""
    teacher, student, label = 3 * grid((2, 3), 0.1), 3 * grid((2, 3), 1.3), torch.tensor([2, 0])
    kls = losses.soft_target_kls(student, teacher, temperature=2.0)
    assert (kls / 4).tolist() == pytest.approx([0.5074691657, 0.7099783714], abs=1e-9)
    masked = torch.tensor([[True], [True]])
    assert losses.over_masked(kls, masked).item() == pytest.approx(2.4348950742, abs=1e-9)
    found = losses.over_masked(losses.token_cross_entropies(student, label), masked)
    assert found.item() == pytest.approx(3.3672468073, abs=1e-9)


def test_masked_tokens_are_refused_where_there_are_none() -> None:
    with pytest.raises(UsageError, match="masked text"):
        make("distilbert:at=mask").signals(shapes())
    with pytest.raises(UsageError, match="last layer"):
        make("distilbert:at=mask:layer_map=1-2").signals(FORM)


# --- the store beside the live teacher ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "float16"])
def view(
    request: pytest.FixtureRequest, masked_lm: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    pq.write_table(pa.table({"text": sentences[:24]}), folder / "text.parquet")
    kd.cache_teacher(
        teacher=str(masked_lm),
        mask_share=0.15,
        dataset=str(folder / "text.parquet"),
        text_column="text",
        store=str(folder / "store"),
        signals="mlm.logits,mlm.hidden",
        for_=("distilbert",),
        hidden_dtype=request.param,
        output_dir=str(folder / "view"),
    )
    return request.param, folder / "view"


@pytest.mark.parametrize("spec", [TRIPLE, "soft-target:5:temperature=2,hard:2,distilbert:1:at=mask"])
def test_the_stores_signals_train_as_the_live_teacher_would(spec: str, view: tuple[str, Path], masked_lm: Path) -> None:
    dtype, folder = view
    ready = Ready.over(folder, "bert:num_layers=1:hidden_size=16", *spec.split(","))
    batch = ready.rows.batch(np.arange(3, 11))

    teacher = AutoModelForMaskedLM.from_pretrained(masked_lm).eval()
    with torch.no_grad():
        shown = teacher(**batch["inputs"], output_hidden_states=True)
    positions_BM = batch["positions"]
    rows, slots = (positions_BM >= 0).nonzero(as_tuple=True)
    last = shown.hidden_states[-1]
    at_masked = last.new_zeros(*positions_BM.shape, last.shape[-1])
    at_masked[rows, slots] = last[rows, positions_BM[rows, slots]]
    live: dict[str, Any] = {
        "mlm.logits": shown.logits[rows, positions_BM[rows, slots]],
        "mlm.hidden": at_masked,
        "hidden.tok@2": last,
    }
    (offline, gradient), (online, expected) = ready.step(batch), ready.step(batch, signals={**batch["signals"], **live})
    assert offline == pytest.approx(online, rel=1e-6 if dtype == "float32" else 1e-3)
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) >= 0.9999
    assert Signal("mlm.logits") in ready.prepared.signals
