"""What every method's loss has to satisfy, over one table of methods: a new one joins with its line in `CASES`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.stages.train_student.methods import Method, Shapes, methods

from .cases import CASES, Case
from .worlds import World, alike, make, shapes

BANK = World.made((8,) * 5, 2, lengths=(2,) * 6, seed=5)
"""A teacher's other rows, for methods that compare with them."""


def run(
    method: Method,
    student: World,
    teacher: World,
    form: Shapes,
    projections: nn.ModuleDict | None = None,
    **fields: Any,
) -> Tensor:
    """Sum of the method's terms."""
    if projections is None:
        projections = projections_of(method, form)
    signals = method.signals(form)
    bank = fields.pop("bank", BANK)
    if method.num_negatives(form):
        bank = bank.targets([s for s in signals if s.kind.axis == "example"])
        fields["negatives"] = bank.signals
    with torch.no_grad():
        targets = teacher.targets(signals, **{"seed": 7, "epoch": 3, **fields})
    terms = method.loss(student.outputs(), targets, projections, form)
    assert all(value.ndim == 0 for value in terms.values())
    return torch.stack([*terms.values()]).sum()


def projections_of(method: Method, form: Shapes) -> nn.ModuleDict:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return method.projections(form).double()


def pair(form: Shapes, **changes: Any) -> tuple[World, World]:
    return World.student_of(form, **changes), World.teacher_of(form, **changes)


table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)


def test_every_method_with_a_teacher_is_in_the_table() -> None:
    assert {case.name for case in CASES} | {"hard"} == {*methods}


@table
def test_the_loss_is_the_published_formula_in_numpy(case: Case) -> None:
    form, method = shapes(), case.method
    student, teacher = pair(form, lengths=(4, 2, 3))
    projections = projections_of(method, form)
    weights = {name: value.numpy() for name, value in projections.state_dict().items()}
    extra: dict[str, Any] = {}
    if case.name == "rail-kd":
        ((_, extra["drawn"]),) = method.draw(7, 3, form)  # type: ignore[attr-defined]
    if case.name == "codir":
        extra["negatives"] = BANK.examples()
    rows = zip(student.examples(), teacher.examples(), strict=True)
    expected = [case.reference(own, other, weights, **extra) for own, other in rows]
    assert run(method, student, teacher, form, projections).item() == pytest.approx(sum(expected) / 3, rel=1e-9)
    assert min(expected) > 1e-3, "a case that tells nothing"


@table
def test_a_student_equal_to_its_teacher_has_the_least_loss_there_is(case: Case) -> None:
    if case.least is None:
        pytest.skip("contrasts rows: there is no least value to reach")
    form = alike()
    method = make(case.identical or case.spec)
    world = World.teacher_of(form)
    projections = projections_of(method, form)
    for module in projections.values():
        _make_identity(module)
    assert run(method, world, world, form, projections).item() == pytest.approx(case.least, abs=1e-12)
    other = World.teacher_of(form, seed=9)
    assert run(method, other, world, form, projections).item() > case.least + 1e-4


def _make_identity(module: nn.Module) -> None:
    assert isinstance(module, nn.Linear)
    with torch.no_grad():
        module.weight.copy_(torch.eye(*module.weight.shape))
        if module.bias is not None:
            module.bias.zero_()


@table
def test_padding_changes_nothing(case: Case) -> None:
    form, method = shapes(), case.method
    student, teacher = pair(form, dtype=torch.float32)
    projections = projections_of(method, form).float()
    bank = BANK.changed(lambda values, axis: values.float())
    short, long = (
        run(method, student.padded(extra), teacher.padded(extra), form, projections, bank=bank) for extra in (0, 5)
    )
    assert long.item() == pytest.approx(short.item(), rel=1e-6)


@table
def test_a_batch_is_the_mean_of_its_examples_in_any_order(case: Case) -> None:
    form, method = shapes(), case.method
    student, teacher = pair(form, lengths=(3, 1, 4))
    projections = projections_of(method, form)
    together = run(method, student, teacher, form, projections).item()
    alone = [run(method, student.rows([i]), teacher.rows([i]), form, projections).item() for i in range(3)]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-9)
    order = (2, 0, 1)
    assert run(method, student.rows(order), teacher.rows(order), form, projections).item() == pytest.approx(together)


@table
def test_heads_may_change_places_in_both_models_together_only(case: Case) -> None:
    form, method = shapes(), case.method
    reads_heads = any(name.startswith(("score", "qkv")) for name in method.reads(form))
    student, teacher = pair(form)
    projections = projections_of(method, form)
    loss = run(method, student, teacher, form, projections).item()
    both = run(method, student.heads_permuted((1, 0)), teacher.heads_permuted((1, 0)), form, projections).item()
    one = run(method, student.heads_permuted((1, 0)), teacher, form, projections).item()
    assert both == pytest.approx(loss, rel=1e-9)
    assert (abs(one - loss) > 1e-6) == reads_heads


@table
def test_gradients_are_right_and_none_reaches_the_teacher_or_padding(case: Case) -> None:
    form, method = alike(layers=2, width=4), case.method
    if case.name == "alp-kd":
        method = dataclasses.replace(method, scaled=True)  # type: ignore[type-var]
    student, teacher = pair(form)
    student = student.changed(lambda values, axis: values.requires_grad_())
    projections = projections_of(method, form)
    bank = World.made((4,) * 3, 2, lengths=(2,) * 3, seed=5)
    teacher = teacher.changed(lambda values, axis: values.requires_grad_())
    targets = teacher.targets(method.signals(form), seed=7, epoch=3)
    if method.num_negatives(form):
        negatives = bank.targets([s for s in method.signals(form) if s.kind.axis == "example"])
        targets = dataclasses.replace(targets, negatives=negatives.signals)

    def loss(*leaves: Tensor) -> Tensor:
        outputs = student.of_leaves(leaves).outputs()
        return torch.stack([*method.loss(outputs, targets, projections, form).values()]).sum()

    leaves = student.leaves()
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    loss(*leaves).backward()
    assert all(leaf.grad is None for leaf in teacher.leaves()), "gradient reached the teacher"
    reached = 0
    for state in student.states:
        if state.grad is not None:
            assert not state.grad[~student.mask].any()
            reached += bool(state.grad.any())
    for block in student.heads.values():
        for part in block[:3]:
            if part.grad is not None:
                assert not part.grad.transpose(1, 2)[~student.mask].any()
                reached += bool(part.grad.any())
    assert reached or student.logits.grad is not None
    assert all(parameter.grad is not None for parameter in projections.parameters())


@table
def test_another_rows_teacher_raises_the_loss(case: Case) -> None:
    form = alike()
    method = make(case.identical or case.spec)
    world = World.teacher_of(form, lengths=(3, 3, 3))
    # A student near its teacher: with the teacher's rows in another order, it is far from all of them.
    noise = World.teacher_of(form, lengths=(3, 3, 3), seed=2)
    near = world.of_leaves([a + 0.01 * b for a, b in zip(world.leaves(), noise.leaves(), strict=True)])
    projections = projections_of(method, form)
    for module in projections.values():
        _make_identity(module)
    bank = World.made((8,) * 4, 2, lengths=(3,) * 6, seed=5)
    aligned = run(method, near, world, form, projections, bank=bank).item()
    rolled = run(method, near, world.rows([2, 0, 1]), form, projections, bank=bank).item()
    assert rolled > aligned + 1e-3


@table
def test_signals_in_float16_are_compared_in_float32(case: Case) -> None:
    form, method = shapes(), case.method
    student, teacher = pair(form, dtype=torch.float32)
    projections = projections_of(method, form).float()
    bank = BANK.changed(lambda values, axis: values.float())
    half = teacher.changed(lambda values, axis: values.half())
    whole = run(method, student, teacher, form, projections, bank=bank)
    narrow = run(method, student, half, form, projections, bank=bank.changed(lambda values, axis: values.half()))
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(whole.item(), rel=5e-3)
