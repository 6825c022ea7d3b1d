"""Losses against golden numbers of an independent float64 program, formulas in numpy, and laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.stages.train_student import losses


def grid(shape: tuple[int, ...], start: float) -> Tensor:
    """sin(start), sin(start + 1), ... in C order, float64: the inputs that the golden numbers were computed from."""
    count = math.prod(shape)
    return torch.sin(start + torch.arange(count, dtype=torch.float64)).reshape(shape)


TEACHER, STUDENT = 3 * grid((2, 3), 0.1), 3 * grid((2, 3), 1.3)
LABELS, ALL_GOLD = torch.tensor([2, 0]), torch.tensor([True, True])


def test_soft_target_golden_numbers() -> None:
    loss = losses.soft_target_kl(STUDENT, TEACHER, temperature=2.0)
    assert loss.item() == pytest.approx(2.4348950742, abs=1e-9)
    per_example = [losses.soft_target_kl(STUDENT[i : i + 1], TEACHER[i : i + 1], temperature=2.0) / 4 for i in (0, 1)]
    assert [value.item() for value in per_example] == pytest.approx([0.5074691657, 0.7099783714], abs=1e-9)
    hard = losses.gold_cross_entropy(STUDENT, LABELS, ALL_GOLD)
    assert hard.item() == pytest.approx(3.3672468073, abs=1e-9)
    assert (0.7 * loss + 0.3 * hard).item() == pytest.approx(2.7146005942, abs=1e-9)


def test_soft_target_gradient_is_temperature_times_the_difference_of_probabilities() -> None:
    student = STUDENT.clone().requires_grad_()
    losses.soft_target_kl(student, TEACHER, temperature=2.0).backward()
    assert student.grad is not None
    assert student.grad[0, 0].item() == pytest.approx(0.3895448990, abs=1e-9)
    expected = 2.0 * ((STUDENT / 2).softmax(-1) - (TEACHER / 2).softmax(-1)) / 2
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize(("temperature", "expected"), [(10, 2.67656), (100, 2.68826), (1000, 2.68853)])
def test_soft_target_tends_to_half_the_mean_squared_centred_distance(temperature: float, expected: float) -> None:
    loss = losses.soft_target_kl(STUDENT, TEACHER, temperature=temperature).item()
    assert loss == pytest.approx(expected, abs=1e-5)

    def centred(logits_BC: Tensor) -> Tensor:
        return logits_BC - logits_BC.mean(-1, keepdim=True)

    limit = losses.logit_mse(centred(STUDENT), centred(TEACHER), reduction="sum_class").item() / (2 * 3)
    assert limit == pytest.approx(2.6885490761, abs=1e-9)
    assert abs(loss - limit) < 0.2 / temperature


@pytest.mark.filterwarnings("ignore:reduction")
def test_the_wrong_reduction_of_kl_would_be_seen() -> None:
    wrong = 4 * torch.nn.functional.kl_div((STUDENT / 2).log_softmax(-1), (TEACHER / 2).softmax(-1), reduction="mean")
    assert wrong.item() == pytest.approx(0.8116316914, abs=1e-9)
    assert losses.soft_target_kl(STUDENT, TEACHER, temperature=2.0).item() == pytest.approx(3 * wrong.item())


def test_vector_distance_golden_numbers() -> None:
    teacher, student = grid((2, 2, 4), 0.1), grid((2, 2, 4), 1.1)
    layers = [losses.vector_distance(student[:, m], teacher[:, m], normalize=True) for m in (0, 1)]
    assert sum(layers).item() == pytest.approx(1.9170299375, abs=1e-9)
    means = [losses.vector_distance(student[:, m], teacher[:, m], normalize=True, reduction="mean") for m in (0, 1)]
    assert sum(means).item() / 2 == pytest.approx(0.2396287422, abs=1e-9)


def test_token_mse_golden_numbers() -> None:
    teacher, student = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for row, length in ((0, 3), (1, 2)):
        teacher[row, :length] = grid((length, 4), 0.1 + 0.1 * row)
        student[row, :length] = grid((length, 4), 1.1 + 0.1 * row)
    pooled = losses.token_mse(student, teacher, mask, pooling="token")
    assert pooled.item() == pytest.approx(0.4319803533, abs=1e-9)
    per_row = [losses.token_mse(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
    half_sums = sum(value.item() * length * 4 / 2 for value, length in zip(per_row, (3, 2), strict=True)) / 2
    assert half_sums == pytest.approx(2.1599017665, abs=1e-9)
    assert losses.token_mse(student, teacher, mask).item() == pytest.approx(sum(per_row).item() / 2)


def test_bernoulli_kl_against_numpy() -> None:
    student, teacher = grid((3, 4), 0.3).numpy(), 2 * grid((3, 4), 2.0).numpy()
    p, q = (1 / (1 + np.exp(-logits / 3.0)) for logits in (teacher, student))
    expected = 9.0 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    found = losses.bernoulli_kl(torch.tensor(student), torch.tensor(teacher), temperature=3.0)
    assert found.item() == pytest.approx(expected)


def test_bernoulli_kl_of_two_opposite_logits_is_that_of_two_classes() -> None:
    teacher, student = torch.tensor([[1.2]]), torch.tensor([[-0.4]])
    two = [torch.cat([logits / 2, -logits / 2], 1) for logits in (student, teacher)]
    one = losses.bernoulli_kl(student, teacher, temperature=1.5)
    assert one.item() == pytest.approx(losses.soft_target_kl(*two, temperature=1.5).item(), rel=1e-5)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_huge_logits_give_finite_losses_and_gradients(size: float) -> None:
    student = torch.tensor([[size, -size]], requires_grad=True)
    teacher = torch.tensor([[-size, size]])
    total = (
        losses.soft_target_kl(student, teacher, temperature=1.0)
        + losses.bernoulli_kl(student, teacher, temperature=1.0)
        + losses.gold_cross_entropy(student, torch.tensor([1]), torch.tensor([True]))
        + losses.gold_binary_cross_entropy(student, torch.tensor([[0.0, 1.0]]), torch.tensor([True]))
    )
    total.backward()
    assert total.isfinite() and student.grad is not None and student.grad.isfinite().all()


def masked(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.token_mse(student, teacher, torch.tensor([[True, True, False], [True, False, False]]))


OF_TWO: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "soft target": ((2, 3), lambda s, t: losses.soft_target_kl(s, t, temperature=2.5)),
    "bernoulli": ((2, 3), lambda s, t: losses.bernoulli_kl(s, t, temperature=2.5)),
    "logits, sum": ((2, 3), lambda s, t: losses.logit_mse(s, t, reduction="sum_class")),
    "logits, mean": ((2, 3), lambda s, t: losses.logit_mse(s, t, reduction="mean_all")),
    "vectors": ((2, 3), lambda s, t: losses.vector_distance(s, t, normalize=False)),
    "directions": ((2, 3), lambda s, t: losses.vector_distance(s, t, normalize=True)),
    "tokens": ((2, 3, 4), masked),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_a_student_equal_to_its_teacher_has_no_loss(name: str) -> None:
    shape, loss = OF_TWO[name]
    assert loss(grid(shape, 0.4), grid(shape, 0.4)).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", OF_TWO)
def test_gradients_are_right_and_stop_at_the_teacher(name: str) -> None:
    shape, loss = OF_TWO[name]
    student, teacher = grid(shape, 0.4).requires_grad_(), grid(shape, 1.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,))
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", OF_TWO)
def test_a_batch_is_the_mean_of_its_examples_in_any_order(name: str) -> None:
    shape, _ = OF_TWO[name]
    student, teacher = grid(shape, 0.4), grid(shape, 1.7)
    if name == "tokens":
        mask = torch.tensor([[True, True, False], [True, False, False]])
        alone = [losses.token_mse(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
        swapped = losses.token_mse(student.flip(0), teacher.flip(0), mask.flip(0))
        together = losses.token_mse(student, teacher, mask)
    else:
        loss = OF_TWO[name][1]
        alone = [loss(student[i : i + 1], teacher[i : i + 1]) for i in (0, 1)]
        together, swapped = loss(student, teacher), loss(student.flip(0), teacher.flip(0))
    assert together.item() == pytest.approx(sum(value.item() for value in alone) / 2)
    assert swapped.item() == pytest.approx(together.item())


@pytest.mark.parametrize("name", OF_TWO)
def test_rolling_the_teacher_by_one_example_raises_the_loss(name: str) -> None:
    shape, loss = OF_TWO[name]
    student = grid(shape, 0.4)
    assert loss(student, student.roll(1, 0)).item() > 1e-3


@pytest.mark.parametrize("pooling", ["kd", "token"])
def test_padding_changes_nothing_and_gets_no_gradient(pooling: losses.Pooling) -> None:
    student, teacher = grid((2, 3, 4), 0.4), grid((2, 3, 4), 1.7)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = losses.token_mse(student, teacher, mask, pooling=pooling)
    garbage = torch.full((2, 5, 4), float("nan"), dtype=torch.float64)
    long_student = torch.cat([student, garbage], 1).requires_grad_()
    long_mask = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], 1)
    padded = losses.token_mse(long_student, torch.cat([teacher, garbage], 1), long_mask, pooling=pooling)
    assert padded.item() == pytest.approx(loss.item(), abs=1e-12)
    padded.backward()
    assert long_student.grad is not None
    assert (long_student.grad[~long_mask] == 0).all() and (long_student.grad[mask.nonzero(as_tuple=True)] != 0).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_a_constant_added_to_a_row_changes_the_soft_target_loss_by_nothing(
    temperature: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = losses.soft_target_kl(student, teacher, temperature=temperature)
    moved = losses.soft_target_kl(student + shift, teacher - shift, temperature=temperature)
    assert moved.item() == pytest.approx(loss.item(), abs=1e-9)
    assert loss.item() >= 0


def test_scaling_either_side_does_not_change_the_distance_of_directions() -> None:
    student, teacher = grid((2, 3), 0.4), grid((2, 3), 1.7)
    loss = losses.vector_distance(student, teacher, normalize=True)
    scaled = losses.vector_distance(7 * student, 0.01 * teacher, normalize=True)
    assert scaled.item() == pytest.approx(loss.item())
    assert losses.vector_distance(torch.zeros(1, 3), torch.ones(1, 3), normalize=True).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (losses.gold_cross_entropy, torch.tensor([1, -1])),
        (losses.gold_binary_cross_entropy, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])),
        (losses.gold_squared_error, torch.tensor([0.5, 0.0])),
    ],
)
def test_a_row_without_gold_adds_nothing_and_gets_no_gradient(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor
) -> None:
    width = 1 if loss is losses.gold_squared_error else 3
    student = grid((2, width), 0.4).requires_grad_()
    both = loss(student, labels, torch.tensor([True, False]))
    alone = loss(student[:1], labels[:1], torch.tensor([True]))
    assert both.item() == pytest.approx(alone.item() / 2)
    both.backward()
    assert student.grad is not None and (student.grad[1] == 0).all() and (student.grad[0] != 0).any()
    none = loss(student, labels, torch.tensor([False, False]))
    assert none.item() == 0


def test_low_precision_inputs_are_compared_in_float32() -> None:
    student, teacher = grid((4, 5), 0.4).float(), grid((4, 5), 1.7).float()
    wide = losses.soft_target_kl(student.bfloat16().float(), teacher, temperature=2.0)
    narrow = losses.soft_target_kl(student.bfloat16(), teacher, temperature=2.0)
    assert narrow.dtype == torch.float32 and narrow.item() == wide.item()
