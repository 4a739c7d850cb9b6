"""Loss functions of logits, one value per sample.

Everything is computed in float32 or better, whatever the logits came in. `total = alpha * soft + (1 - alpha) * hard`:
alpha weighs the soft loss. A new soft loss is a function (student_logits_BK, teacher_logits_BK, temperature) -> loss_B
and a line in SOFT_LOSSES.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def hard_targets(
    labels_B: Tensor,
    classes: int,
    smoothing: float = 0.0,
    partners_B: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Target probabilities [B, K]: one-hot labels, blended with a partner's (mixup, CutMix) and smoothed (Szegedy et
    al. 2016).

    weight_B is the share of the sample's own label in [0, 1]; partners_B holds the partners' labels.
    """
    targets_BK = one_hot(labels_B, classes).float()
    if partners_B is not None:
        targets_BK = torch.lerp(one_hot(partners_B, classes).float(), targets_BK, weight_B[:, None])
    return targets_BK * (1 - smoothing) + smoothing / classes


def cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """-sum_k targets * log softmax(logits): [B]."""
    return -(targets_BK * log_softmax(_at_least_float32(logits_BK), dim=1)).sum(dim=1)


def kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)): [B]  (Hinton, Vinyals, Dean 2015, with the T^2 of their
    section 2.1).
    """
    log_student_BK = log_softmax(_at_least_float32(student_BK) / temperature, dim=1)
    log_teacher_BK = log_softmax(_at_least_float32(teacher_BK) / temperature, dim=1)
    return temperature**2 * (log_teacher_BK.exp() * (log_teacher_BK - log_student_BK)).sum(dim=1)


def soft_cross_entropy(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 * -sum_k softmax(teacher / T) * log softmax(student / T): [B]; KL's gradient, its value higher by the
    teacher's entropy.
    """
    log_student_BK = log_softmax(_at_least_float32(student_BK) / temperature, dim=1)
    teacher_probabilities_BK = torch.softmax(_at_least_float32(teacher_BK) / temperature, dim=1)
    return temperature**2 * -(teacher_probabilities_BK * log_student_BK).sum(dim=1)


def logit_mse(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Half the squared distance of centred logits, summed over classes and divided by K: [B].

    The limit of `kl` for T -> infinity (Hinton et al. 2015, section 2.1), so the temperature does not enter.
    """
    difference_BK = _at_least_float32(student_BK) - _at_least_float32(teacher_BK)
    centred_BK = difference_BK - difference_BK.mean(dim=1, keepdim=True)
    return centred_BK.square().mean(dim=1) / 2


SoftLoss = Callable[[Tensor, Tensor, float], Tensor]
SOFT_LOSSES: dict[str, SoftLoss] = {"kl": kl, "ce": soft_cross_entropy, "mse": logit_mse}
