"""What is minimised: the soft and the hard loss in their shares, each from the right part of a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kd_dist.training import objectives
from kd_dist.training.batches import Batch
from kd_dist.training.losses import SOFT_LOSSES

CLASSES = 5


@pytest.fixture
def batch() -> Batch:
    """Four images: the second and fourth mixed with a partner of another class."""
    rng = np.random.default_rng(0)
    return Batch(
        index_B=torch.arange(4),
        images_BCHW=torch.tensor(rng.normal(0, 1, (4, 3, 2, 2))),
        labels_B=torch.tensor([0, 1, 2, 3]),
        partner_labels_B=torch.tensor([0, 4, 2, 0]),
        weights_B=torch.tensor([1.0, 0.25, 1.0, 0.5]),
        teacher_logits_BK=torch.tensor(rng.normal(0, 2, (4, CLASSES))).half(),
        global_size=4,
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).double()


def log_softmax(logits_BK: np.ndarray) -> np.ndarray:
    return logits_BK - np.log(np.exp(logits_BK).sum(axis=1, keepdims=True))


def hard_by_hand(logits_BK: np.ndarray, smoothing: float = 0.0) -> list[float]:
    """Cross-entropy with the labels of `batch`, its two mixed images spelled out."""
    logs_BK = log_softmax(logits_BK)
    plain = [
        -logs_BK[0, 0],
        -(0.25 * logs_BK[1, 1] + 0.75 * logs_BK[1, 4]),
        -logs_BK[2, 2],
        -(0.5 * logs_BK[3, 3] + 0.5 * logs_BK[3, 0]),
    ]
    return [(1 - smoothing) * p - smoothing * logs_BK[i].mean() for i, p in enumerate(plain)]


def kl_by_hand(logits_BK: np.ndarray, teacher_BK: np.ndarray, temperature: float) -> np.ndarray:
    log_p_BK, log_q_BK = log_softmax(teacher_BK / temperature), log_softmax(logits_BK / temperature)
    return temperature**2 * (np.exp(log_p_BK) * (log_p_BK - log_q_BK)).sum(axis=1)


def logits_of(model: nn.Module, batch: Batch) -> np.ndarray:
    return model(batch.images_BCHW).detach().numpy()


def weight_gradient(model: nn.Module, total_B: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(total_B.sum(), model[1].weight)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_is_cross_entropy_with_mixed_labels(model, batch, smoothing):
    terms = objectives.hard(CLASSES, smoothing)(model, batch)
    assert terms.keys() == {"total", "hard"}
    np.testing.assert_allclose(terms["total"].detach(), hard_by_hand(logits_of(model, batch), smoothing), rtol=1e-6)
    assert torch.equal(terms["total"], terms["hard"])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, 1.0])
def test_alpha_is_the_share_of_the_soft_loss(model, batch, alpha):
    """Alpha on the hard term would be seen at 0.25 and 0.9."""
    terms = objectives.distilled(CLASSES, 0.1, SOFT_LOSSES["kl"], alpha, 3.0)(model, batch)
    logits_BK = logits_of(model, batch)
    soft_B = kl_by_hand(logits_BK, batch.teacher_logits_BK.double().numpy(), 3.0)
    hard_B = np.array(hard_by_hand(logits_BK, 0.1))
    assert terms.keys() == {"total", "soft", "hard"}
    np.testing.assert_allclose(terms["soft"].detach(), soft_B, rtol=1e-5)
    np.testing.assert_allclose(terms["hard"].detach(), hard_B, rtol=1e-6)
    np.testing.assert_allclose(terms["total"].detach(), alpha * soft_B + (1 - alpha) * hard_B, rtol=1e-5)


def test_teacher_moves_the_student(model, batch):
    """The soft term must have a gradient: another teacher gives another one, another label at alpha 1 does not."""
    terms = objectives.distilled(CLASSES, 0.0, SOFT_LOSSES["kl"], 1.0, 2.0)
    gradient = weight_gradient(model, terms(model, batch)["total"])
    other_teacher = replace(batch, teacher_logits_BK=batch.teacher_logits_BK.flip(1))
    other_labels = replace(batch, labels_B=batch.labels_B.flip(0))
    assert gradient.norm() > 0.1
    assert not torch.allclose(weight_gradient(model, terms(model, other_teacher)["total"]), gradient, rtol=0.1)
    assert torch.equal(weight_gradient(model, terms(model, other_labels)["total"]), gradient)


def test_loss_and_temperature_are_handed_on(model, batch):
    totals = {
        (name, temperature): objectives.distilled(CLASSES, 0.0, SOFT_LOSSES[name], 1.0, temperature)(model, batch)[
            "total"
        ]
        for name, temperature in (("kl", 1.0), ("kl", 4.0), ("ce", 4.0))
    }
    for (name, temperature), total_B in totals.items():
        expected_B = SOFT_LOSSES[name](model(batch.images_BCHW), batch.teacher_logits_BK, temperature)
        assert torch.equal(total_B, expected_B)
    assert not torch.allclose(totals["kl", 1.0], totals["kl", 4.0])


def test_network_runs_once_a_batch(model, batch):
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    objectives.distilled(CLASSES, 0.0, SOFT_LOSSES["kl"], 0.5, 2.0)(model, batch)
    assert len(runs) == 1
