"""Numbers of an independent float64 program that the methods' losses have to give, and invariants of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.stages.train_student import losses

from .worlds import grid

LENGTHS = (3, 2)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def ragged(make: Callable[[int, int], Tensor], *, token_axes: tuple[int, ...]) -> Tensor:
    """[2, ...]: `make(row, length)` of two examples, padded with zeros to three tokens along some axes."""
    rows = []
    for row, length in enumerate(LENGTHS):
        values = make(row, length)
        for axis in token_axes:
            shape = list(values.shape)
            shape[axis] = max(LENGTHS) - length
            values = torch.cat([values, values.new_zeros(shape)], dim=axis)
        rows.append(values)
    return torch.stack(rows)


def states(start: float, step: float) -> Tensor:
    return ragged(lambda b, n: grid((n, 4), start + step * b), token_axes=(0,))


def scores(start: float) -> Tensor:
    return ragged(lambda b, n: grid((2, n, n), start + b), token_axes=(1, 2))


TEACHER, STUDENT = states(0.1, 0.1), states(1.1, 0.1)


def test_fitnets() -> None:
    assert losses.token_mse(STUDENT, TEACHER, MASK, pooling="token").item() == pytest.approx(0.4319803533, abs=1e-9)
    assert losses.half_squared_distance(STUDENT, TEACHER, MASK).item() == pytest.approx(2.1599017665, abs=1e-9)


def test_fsp() -> None:
    own = losses.flow_matrix(STUDENT, states(3.1, 1.0), MASK)
    other = losses.flow_matrix(TEACHER, states(2.1, 1.0), MASK)
    assert losses.flow_distance(own, other).item() == pytest.approx(0.0891505569, abs=1e-9)
    assert losses.flow_distance(own, other, reduction="sum").item() == pytest.approx(1.4264089108, abs=1e-9)


def test_flow_matrices_do_not_see_the_order_of_tokens_and_turn_with_their_layers() -> None:
    lower, upper = TEACHER[:1], states(2.1, 1.0)[:1]
    flow = losses.flow_matrix(lower, upper, MASK[:1])
    order = [2, 0, 1]
    torch.testing.assert_close(losses.flow_matrix(lower[:, order], upper[:, order], MASK[:1]), flow)
    torch.testing.assert_close(losses.flow_matrix(upper, lower, MASK[:1]), flow.transpose(1, 2))


def test_distilbert() -> None:
    assert losses.token_cosine(STUDENT, TEACHER, MASK, pooling="token").item() == pytest.approx(0.4195357543, abs=1e-9)


def test_tinybert() -> None:
    own, other = scores(1.1), scores(0.1)
    assert losses.score_mse(own, other, MASK, pooling="token").item() == pytest.approx(0.4322834964, abs=1e-9)
    diluted = losses.score_mse(own, other, MASK, pooling="padded").item()
    assert diluted == pytest.approx(0.3122047477, abs=1e-9)
    assert losses.score_mse(own + 1.0, other, MASK).item() != pytest.approx(losses.score_mse(own, other, MASK).item())


def test_tinyberts_prediction_loss_is_soft_targets_at_temperature_one_plus_the_teachers_entropy() -> None:
    teacher, student = 3 * grid((2, 3), 0.1), 3 * grid((2, 3), 1.3)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    soft = losses.soft_target_kl(student, teacher, temperature=1.0)
    assert (soft + entropy).item() == pytest.approx(2.5396836884, abs=1e-9)
    assert (soft + entropy).item() / 3 == pytest.approx(0.8465612295, abs=1e-9)


def test_ir_kd() -> None:
    own, other = 5 * scores(1.1), 5 * scores(0.1)
    assert losses.attention_kl(own, other, MASK, pooling="token").item() == pytest.approx(1.4223420526, abs=1e-9)
    assert losses.attention_kl(own, other, MASK).item() == pytest.approx(1.3369440198, abs=1e-9)
    shifted = losses.attention_kl(own + grid((2, 2, 3, 1), 0.5), other, MASK)
    assert shifted.item() == pytest.approx(1.3369440198, abs=1e-9)
    cosine = losses.vector_cosine(grid((2, 2, 4), 1.1)[:, 0], grid((2, 2, 4), 0.1)[:, 0])
    assert cosine.item() == pytest.approx(0.4758892147, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.token_mse, 0.4319803533),
        (losses.normalized_mse, 0.7158527480),
        (losses.mean_mse, 0.1310679096),
        (losses.variance_l1, 0.2514629541),
    ],
)
def test_mobilebert(loss: Callable[..., Tensor], expected: float) -> None:
    assert loss(STUDENT, TEACHER, MASK, pooling="token").item() == pytest.approx(expected, abs=1e-9)


def test_a_squared_distance_is_that_of_the_means_and_that_of_the_centred_vectors() -> None:
    centred = [values - values.mean(-1, keepdim=True) for values in (STUDENT, TEACHER)]
    parts = losses.mean_mse(STUDENT, TEACHER, MASK) + losses.token_mse(centred[0], centred[1], MASK)
    assert parts.item() == pytest.approx(losses.token_mse(STUDENT, TEACHER, MASK).item())
    scaled = losses.normalized_mse(3 * STUDENT - 1, 0.2 * TEACHER + 4, MASK)
    assert scaled.item() == pytest.approx(losses.normalized_mse(STUDENT, TEACHER, MASK).item())


def test_cross_entropy_of_attention_is_its_kl_plus_the_teachers_entropy() -> None:
    own, other = scores(1.1), scores(0.1)
    entropy = losses.attention_kl(other, other, MASK, cross_entropy=True)
    crossed = losses.attention_kl(own, other, MASK, cross_entropy=True)
    assert (crossed - entropy).item() == pytest.approx(losses.attention_kl(own, other, MASK).item())


def test_ckd() -> None:
    teacher = [grid((5, 4), 0.1 + k) for k in range(3)]
    lifted = grid((5, 4), 1.1) @ (grid((12, 4), 0.5) / 2).T + grid((12,), 0.9) / 4
    distances = losses.squared_distances(lifted, losses.joined(teacher, normalize=False), normalize=True)
    assert distances.sum().item() == pytest.approx(9.6753080752, abs=1e-9)
    assert distances.mean().item() == pytest.approx(1.9350616150, abs=1e-9)


def test_ckd_of_one_layer_is_pkd() -> None:
    own, other = grid((5, 4), 1.1), grid((5, 4), 0.1)
    joined = losses.joined([other], normalize=False)
    ckd = losses.squared_distances(own, joined, normalize=True).mean()
    assert ckd.item() == pytest.approx(losses.vector_distance(own, other, normalize=True).item())


def test_alp_kd() -> None:
    teachers, student = grid((2, 4, 4), 0.1), grid((2, 4), 1.1)
    weights = losses.layer_weights(student, teachers, scaled=False)
    expected = [0.2355450809, 0.0118137438, 0.6849964064, 0.0676447688]
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert weights.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    assert losses.attended_mse(student, teachers).item() == pytest.approx(0.0487739536, abs=1e-9)
    assert losses.attended_mse(student, teachers, scaled=True).item() == pytest.approx(0.1646657479, abs=1e-9)


def test_alp_kd_of_one_layer_or_of_equal_layers_is_plain_mse() -> None:
    teachers, student = grid((2, 4, 4), 0.1), grid((2, 4), 1.1)
    plain = losses.vector_distance(student, teachers[:, 2], normalize=False, reduction="mean").item()
    assert losses.attended_mse(student, teachers[:, 2:3]).item() == pytest.approx(plain)
    assert losses.attended_mse(student, teachers[:, 2:3].expand(2, 3, 4)).item() == pytest.approx(plain)


def test_alp_kds_weights_are_constants_on_request() -> None:
    student = grid((2, 4), 1.1).requires_grad_()
    teachers = grid((2, 4, 4), 0.1)
    losses.attended_mse(student, teachers, through_weights=False).backward()
    mix = (losses.layer_weights(student, teachers, scaled=False)[:, None] @ teachers)[:, 0]
    torch.testing.assert_close(student.grad, 2 * (student - mix) / student.numel())


def test_codir() -> None:
    anchors, bank = losses.direction(grid((2, 4), 1.1)), losses.direction(grid((2, 5, 4), 0.1))
    positive, negatives, usable = bank[:, 0], bank[:, 1:], torch.ones(2, 4, dtype=torch.bool)
    found = losses.info_nce(anchors, positive, negatives, usable, temperature=0.07)
    assert found.item() == pytest.approx(15.9314308428, abs=1e-8)
    order = [3, 1, 0, 2]
    permuted = losses.info_nce(anchors, positive, negatives[:, order], usable, temperature=0.07)
    assert permuted.item() == pytest.approx(found.item())
    own, others = losses.similarities(anchors, positive, negatives)
    scale = (torch.cat([own[:, None], others], 1) / 0.07).exp().mean()
    noise = losses.noise_contrastive(anchors, positive, negatives, usable, temperature=0.07, scale=scale, eps=20 * 1e-7)
    assert noise.item() == pytest.approx(17.2539513135, abs=1e-8)


def test_a_row_without_usable_negatives_has_no_contrast() -> None:
    anchors, bank = losses.direction(grid((2, 4), 1.1)), losses.direction(grid((3, 4), 0.1))
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    assert losses.info_nce(anchors, anchors, bank, nobody, temperature=0.07).item() == 0
    scale = torch.tensor(1.0, dtype=torch.float64)
    assert losses.noise_contrastive(anchors, anchors, bank, nobody, temperature=1.0, scale=scale).item() == 0


def test_rail_kd() -> None:
    def pooled(start: float) -> Tensor:
        return torch.stack([grid((n, 4), start).mean(0) for n in LENGTHS])

    teacher, student = ([pooled(start + layer) for layer in (0, 1)] for start in (0.1, 1.1))
    maps = grid((3, 4), 0.3), grid((3, 4), 0.7)
    layers = [
        losses.unit_distance(own @ maps[1].T, other @ maps[0].T) for own, other in zip(student, teacher, strict=True)
    ]
    assert sum(layers).item() == pytest.approx(0.8587478436, abs=1e-9)  # type: ignore[union-attr]
    joined = [losses.joined(side, normalize=False) for side in (student, teacher)]
    found = losses.unit_distance(joined[0] @ grid((3, 8), 0.7).T, joined[1] @ grid((3, 8), 0.3).T)
    assert found.item() == pytest.approx(1.9085809876, abs=1e-9)


def vectors(width: int, start: float) -> Tensor:
    return ragged(lambda b, n: grid((n, width), start + b), token_axes=(0,))


def relation_kl(first: int, second: int, heads: int) -> float:
    """Of parts 0, 1, 2 (queries, keys, values) of the teacher, 8 wide, and the student, 4 wide."""
    teacher, student = [vectors(8, 0.1 + i) for i in range(3)], [vectors(4, 1.1 + i) for i in range(3)]
    found = [losses.relation_scores(side[first], side[second], MASK, heads=heads) for side in (student, teacher)]
    return losses.attention_kl(found[0], found[1], MASK).item()


def test_minilm() -> None:
    assert relation_kl(0, 1, 2) == pytest.approx(0.3019724188, abs=1e-9)
    assert relation_kl(2, 2, 2) == pytest.approx(0.0634912931, abs=1e-9)
    assert relation_kl(0, 1, 2) + relation_kl(2, 2, 2) == pytest.approx(0.3654637118, abs=1e-9)


@pytest.mark.parametrize(("heads", "expected"), [(1, 0.1459125895), (2, 0.1700962683), (4, 0.2747506818)])
def test_minilmv2(heads: int, expected: float) -> None:
    assert sum(relation_kl(part, part, heads) for part in range(3)) == pytest.approx(expected, abs=1e-9)


def test_a_rotation_inside_a_head_changes_no_relation_and_one_across_heads_does() -> None:
    values = vectors(8, 0.1)
    inside = torch.block_diag(*(torch.linalg.qr(grid((4, 4), start))[0] for start in (0.2, 0.9)))
    across = torch.linalg.qr(grid((8, 8), 0.4) + torch.eye(8))[0]
    plain, turned, mixed = (
        losses.relation_scores(moved, moved, MASK, heads=2) for moved in (values, values @ inside, values @ across)
    )
    torch.testing.assert_close(turned, plain)
    assert (mixed - plain).abs().max() > 0.1
