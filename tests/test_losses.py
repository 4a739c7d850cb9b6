"""Losses against float64 formulas in plain Python, and the mistakes that a distillation loss must not make."""

import math

import numpy as np
import pytest
import torch

from kd_dist.training import losses
from kd_dist.training.losses import (
    NEED_LABELS,
    cross_entropy,
    hard_targets,
    kl,
    logit_mse,
    soft_cross_entropy,
    standardised_kl,
)

LABELS = (0, 4, 2, 2, 1, 3)


def with_labels(loss):
    """A loss of logits alone: one that needs labels gets LABELS, as many as there are rows."""
    if loss not in NEED_LABELS:
        return loss
    return lambda student_BK, teacher_BK, T: loss(student_BK, teacher_BK, T, torch.tensor(LABELS[: len(student_BK)]))


SOFT_LOSSES = {name: with_labels(loss) for name, loss in losses.SOFT_LOSSES.items()}
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)


def random_logits(seed: int, shape=(6, 5), scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape)


# ---------------------------------------------------------------------------------------------- formulas written out


def log_softmax_by_hand(row, temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    log_sum = max(scaled) + math.log(math.fsum(math.exp(value - max(scaled)) for value in scaled))
    return [value - log_sum for value in scaled]


def kl_by_hand(student_BK, teacher_BK, temperature: float) -> list[float]:
    losses = []
    for student, teacher in zip(student_BK, teacher_BK, strict=True):
        pairs = zip(log_softmax_by_hand(teacher, temperature), log_softmax_by_hand(student, temperature), strict=True)
        losses.append(temperature**2 * math.fsum(math.exp(p) * (p - q) for p, q in pairs))
    return losses


def ce_by_hand(student_BK, teacher_BK, temperature: float) -> list[float]:
    losses = []
    for student, teacher in zip(student_BK, teacher_BK, strict=True):
        pairs = zip(log_softmax_by_hand(teacher, temperature), log_softmax_by_hand(student, temperature), strict=True)
        losses.append(temperature**2 * math.fsum(-math.exp(p) * q for p, q in pairs))
    return losses


def mse_by_hand(student_BK, teacher_BK, temperature: float) -> list[float]:
    losses = []
    for student, teacher in zip(student_BK, teacher_BK, strict=True):
        difference = [s - t for s, t in zip(student, teacher, strict=True)]
        mean = math.fsum(difference) / len(difference)
        losses.append(math.fsum((value - mean) ** 2 for value in difference) / (2 * len(difference)))
    return losses


def std_by_hand(student_BK, teacher_BK, temperature: float) -> list[float]:
    return kl_by_hand(*([scaled_by_hand(row) for row in rows] for rows in (student_BK, teacher_BK)), temperature)


def scaled_by_hand(row) -> list[float]:
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / len(row))
    return [(value - mean) / deviation for value in row]


def dkd_by_hand(student_BK, teacher_BK, temperature: float) -> list[float]:
    losses = []
    for student, teacher, label in zip(student_BK, teacher_BK, LABELS, strict=True):
        q, p = ([math.exp(value) for value in log_softmax_by_hand(row, temperature)] for row in (student, teacher))
        rest_q, rest_p = (math.fsum(v for k, v in enumerate(row) if k != label) for row in (q, p))
        own = p[label] * math.log(p[label] / q[label]) + rest_p * math.log(rest_p / rest_q)
        among = [(p[k] / rest_p, q[k] / rest_q) for k in range(len(p)) if k != label]
        losses.append(temperature**2 * (own + 8 * math.fsum(a * math.log(a / b) for a, b in among)))
    return losses


BY_HAND = {"kl": kl_by_hand, "ce": ce_by_hand, "mse": mse_by_hand, "std": std_by_hand, "dkd": dkd_by_hand}


def test_every_soft_loss_is_checked_here():
    assert SOFT_LOSSES.keys() == BY_HAND.keys()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_soft_loss_is_its_formula(name, temperature):
    student_BK, teacher_BK = random_logits(0), random_logits(1)
    loss_B = SOFT_LOSSES[name](torch.tensor(student_BK), torch.tensor(teacher_BK), temperature)
    assert loss_B.dtype == torch.float64
    # 1e-11: dkd by hand takes probabilities apart that logarithms keep apart, at T = 0.5 down to 1e-12.
    np.testing.assert_allclose(loss_B, BY_HAND[name](student_BK, teacher_BK, temperature), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_half_precision_logits_are_reckoned_in_float32(name, dtype):
    student_BK = torch.tensor(random_logits(0)).to(dtype)
    teacher_BK = torch.tensor(random_logits(1)).to(torch.float16)  # as the cache stores them
    loss_B = SOFT_LOSSES[name](student_BK, teacher_BK, 4.0)
    assert loss_B.dtype == torch.float32
    expected = BY_HAND[name](student_BK.double().tolist(), teacher_BK.double().tolist(), 4.0)
    np.testing.assert_allclose(loss_B, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_largest_half_precision_logits_stay_finite(name):
    far_BK = torch.tensor([[60000.0, -60000.0, 0.0]], dtype=torch.float16)
    student_BK = (-far_BK).requires_grad_()
    loss_B = SOFT_LOSSES[name](student_BK, far_BK, 1.0)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert student_BK.grad.isfinite().all()
    assert loss_B.item() > (1000 if name != "std" else 1)  # not clipped away either


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_is_zero_for_equal_logits_and_for_shifted_ones(temperature):
    logits_BK = torch.tensor(random_logits(0))
    assert kl(logits_BK, logits_BK, temperature).abs().max() == 0
    assert kl(logits_BK + 7.0, logits_BK, temperature).abs().max() < 1e-12
    assert (kl(logits_BK.flip(1), logits_BK, temperature) > 1e-6).all()


def test_kl_goes_from_teacher_to_student():
    sure, flat = torch.tensor([[5.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert kl(flat, sure, 1.0).item() == pytest.approx(kl_by_hand(flat.tolist(), sure.tolist(), 1.0)[0], rel=1e-6)
    assert kl(flat, sure, 1.0).item() != pytest.approx(kl(sure, flat, 1.0).item(), rel=0.05)


def test_temperature_squared_keeps_the_gradient_from_vanishing():
    """Softening by T makes the gradient of the bare KL 1/T^2 as large; the factor gives it back."""
    student_BK, teacher_BK = torch.tensor(random_logits(0)), torch.tensor(random_logits(1))
    sizes = []
    for temperature in (50.0, 500.0):
        leaf_BK = student_BK.clone().requires_grad_()
        kl(leaf_BK, teacher_BK, temperature).sum().backward()
        sizes.append(leaf_BK.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["kl", "ce"])
def test_gradient_reaches_the_student(name, temperature):
    """A loss that is detached, or that takes probabilities for logits, has another gradient than T (q - p)."""
    student_BK, teacher_BK = random_logits(0), random_logits(1)
    leaf_BK = torch.tensor(student_BK, requires_grad=True)
    SOFT_LOSSES[name](leaf_BK, torch.tensor(teacher_BK), temperature).sum().backward()
    for gradient, student, teacher in zip(leaf_BK.grad, student_BK, teacher_BK, strict=True):
        q, p = (np.exp(log_softmax_by_hand(row, temperature)) for row in (student, teacher))
        np.testing.assert_allclose(gradient, temperature * (q - p), rtol=1e-9, atol=1e-12)
    assert leaf_BK.grad.norm() > 0.1


def test_gradient_of_mse_is_the_centred_difference():
    student_BK, teacher_BK = random_logits(0), random_logits(1)
    leaf_BK = torch.tensor(student_BK, requires_grad=True)
    logit_mse(leaf_BK, torch.tensor(teacher_BK), 4.0).sum().backward()
    difference_BK = student_BK - teacher_BK
    expected_BK = (difference_BK - difference_BK.mean(axis=1, keepdims=True)) / difference_BK.shape[1]
    np.testing.assert_allclose(leaf_BK.grad, expected_BK, rtol=1e-12)


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_cached_teacher_logits_take_part_without_a_gradient(name):
    teacher_BK = torch.tensor(random_logits(1)).half()
    before_BK = teacher_BK.clone()
    student_BK = torch.tensor(random_logits(0), dtype=torch.float32, requires_grad=True)
    SOFT_LOSSES[name](student_BK, teacher_BK, 4.0).sum().backward()
    assert student_BK.grad.norm() > 0
    assert teacher_BK.grad is None
    assert torch.equal(teacher_BK, before_BK)


def test_ce_is_kl_and_the_teachers_entropy():
    student_BK, teacher_BK = random_logits(0), random_logits(1)
    higher_B = soft_cross_entropy(torch.tensor(student_BK), torch.tensor(teacher_BK), 4.0) - kl(
        torch.tensor(student_BK), torch.tensor(teacher_BK), 4.0
    )
    logs = [log_softmax_by_hand(row, 4.0) for row in teacher_BK]
    np.testing.assert_allclose(higher_B, [-16 * math.fsum(math.exp(p) * p for p in row) for row in logs], rtol=1e-10)


def test_mse_ignores_shifts_and_temperature():
    student_BK, teacher_BK = torch.tensor(random_logits(0)), torch.tensor(random_logits(1))
    loss_B = logit_mse(student_BK, teacher_BK, 4.0)
    np.testing.assert_allclose(logit_mse(student_BK + 9.0, teacher_BK - 4.0, 4.0), loss_B, rtol=1e-12)
    assert torch.equal(logit_mse(student_BK, teacher_BK, 1.0), loss_B)
    assert (loss_B > 0.1).all()


def test_mse_is_what_kl_becomes_at_high_temperature():
    student_BK, teacher_BK = torch.tensor(random_logits(0)), torch.tensor(random_logits(1))
    mse_B = logit_mse(student_BK, teacher_BK, 1.0)
    gaps = [(kl(student_BK, teacher_BK, temperature) / mse_B - 1).abs().max().item() for temperature in (1e2, 1e3, 1e4)]
    assert gaps[2] < gaps[1] < gaps[0] < 0.2
    assert gaps[2] < 2e-3


def test_standardised_kl_ignores_the_size_of_logits_and_bears_equal_ones():
    student_BK, teacher_BK = torch.tensor(random_logits(0)), torch.tensor(random_logits(1))
    loss_B = standardised_kl(student_BK, teacher_BK, 2.0)
    np.testing.assert_allclose(standardised_kl(7 * student_BK + 3, teacher_BK / 9, 2.0), loss_B, rtol=1e-9)
    equal_BK = torch.ones(1, 5, requires_grad=True)
    standardised_kl(equal_BK, teacher_BK[:1].float(), 2.0).sum().backward()
    assert equal_BK.grad.isfinite().all()


def test_decoupled_kl_is_kl_where_its_weight_is_the_rests_probability(monkeypatch):
    """Zhao et al. 2022, equation 7: KL = KL of the label + (1 - p_label) * KL among the others."""
    student_BK, teacher_BK = torch.tensor(random_logits(0)), torch.tensor(random_logits(1))
    labels_B = torch.tensor(LABELS)
    rest_B = 1 - torch.softmax(teacher_BK / 3.0, dim=1)[torch.arange(6), labels_B]
    monkeypatch.setattr(losses, "OTHERS_WEIGHT", rest_B)
    np.testing.assert_allclose(
        losses.decoupled_kl(student_BK, teacher_BK, 3.0, labels_B), kl(student_BK, teacher_BK, 3.0), rtol=1e-10
    )


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_loss_of_a_sample_depends_on_its_own_row(name):
    student_BK, teacher_BK = torch.tensor(random_logits(0)), torch.tensor(random_logits(1))
    loss_B = SOFT_LOSSES[name](student_BK, teacher_BK, 2.0)
    assert loss_B.shape == (6,)
    student_BK[3] += torch.arange(5.0)
    changed_B = SOFT_LOSSES[name](student_BK, teacher_BK, 2.0) != loss_B
    assert changed_B.tolist() == [False, False, False, True, False, False]


# --------------------------------------------------------------------------------------------------------- hard labels


def targets_by_hand(labels, classes, smoothing, partners=None, weights=None) -> list[list[float]]:
    rows = []
    for i, label in enumerate(labels):
        row = [0.0] * classes
        share = 1.0 if weights is None else weights[i]
        row[label] += share
        if partners is not None:
            row[partners[i]] += 1 - share
        rows.append([(1 - smoothing) * value + smoothing / classes for value in row])
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("mixed", [False, True])
def test_hard_targets_are_their_formula(smoothing, mixed):
    labels, partners, weights = [0, 3, 2, 1], [1, 3, 0, 2], [0.25, 0.5, 1.0, 0.0]
    mix = (torch.tensor(partners), torch.tensor(weights)) if mixed else ()
    by_hand_BK = targets_by_hand(labels, 4, smoothing, *((partners, weights) if mixed else ()))
    targets_BK = hard_targets(torch.tensor(labels), 4, smoothing, *mix)
    np.testing.assert_allclose(targets_BK, by_hand_BK, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(targets_BK.sum(dim=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cross_entropy_is_its_formula(dtype):
    logits_BK = torch.tensor(random_logits(0)).to(dtype)
    targets_BK = np.random.default_rng(2).dirichlet(np.ones(5), 6)
    loss_B = cross_entropy(logits_BK, torch.tensor(targets_BK))
    logs = [log_softmax_by_hand(row, 1.0) for row in logits_BK.double().tolist()]
    by_hand_B = [-math.fsum(p * q for p, q in zip(*rows, strict=True)) for rows in zip(targets_BK, logs, strict=True)]
    np.testing.assert_allclose(loss_B, by_hand_B, rtol=1e-12 if dtype == torch.float64 else 1e-5)


def test_cross_entropy_with_labels_alone_is_minus_their_log_probability():
    logits_BK, labels = random_logits(0), [4, 0, 1, 1, 2, 3]
    loss_B = cross_entropy(torch.tensor(logits_BK), hard_targets(torch.tensor(labels), 5))
    by_hand_B = [-log_softmax_by_hand(row, 1.0)[label] for row, label in zip(logits_BK, labels, strict=True)]
    np.testing.assert_allclose(loss_B, by_hand_B, rtol=1e-12)
