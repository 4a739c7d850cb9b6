"""Loss functions of logits, one value per sample.

Everything is computed in float32 or better, whatever the logits came in. `total = alpha * soft + (1 - alpha) * hard`:
alpha weighs the soft loss. A new soft loss is a function (student_logits_BK, teacher_logits_BK, temperature) -> loss_B,
named on the command line as `my_module:function`, or by a line in SOFT_LOSSES; one of ours that needs the labels_B too
takes them as a fourth argument and stands in NEED_LABELS.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from kd_dist.errors import UserError
from kd_dist.fingerprint import UNKNOWN
from kd_dist.functions import cause, function_of, near

LEAST_VARIANCE = 1e-12  # of a row of logits: equal ones have no direction to scale
OTHERS_WEIGHT = 8.0
MOST_TABLED = 4096  # classes whose targets are kept in a table, of 64 MB


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def hard_targets(
    labels_B: Tensor,
    classes: int,
    smoothing: float = 0.0,
    partners_B: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Target probabilities [B, K]: one-hot labels, mixed with a partner's (mixup, CutMix) and smoothed (Szegedy et
    al. 2016).

    weight_B is the share of the sample's own label in [0, 1]; partners_B holds the partners' labels. A label that is
    not known (UNKNOWN) has a row of zeros, which no loss and no gradient comes from; in a mix, only its share has.
    """
    targets_BK = _targets(labels_B, classes, smoothing)
    if partners_B is None or weight_B is None:
        return targets_BK
    return torch.lerp(_targets(partners_B, classes, smoothing), targets_BK, weight_B[:, None])


def _targets(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    if classes > MOST_TABLED:
        return _smoothed(labels_B, classes, smoothing)
    return _table(classes, smoothing, labels_B.device)[labels_B]  # UNKNOWN, -1, names the last row


@cache
def _table(classes: int, smoothing: float, device: torch.device) -> Tensor:
    """The targets of every label and, in the last row, of UNKNOWN: [K + 1, K]. One kernel a step then looks them up."""
    with torch.inference_mode(False):
        return _smoothed(torch.tensor([*range(classes), UNKNOWN], device=device), classes, smoothing)


def _smoothed(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    targets_BK = one_hot(labels_B.clamp(min=0), classes) * (1 - smoothing) + smoothing / classes
    return targets_BK * (labels_B != UNKNOWN)[:, None]


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


def standardised_kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """`kl` of logits that were shifted and scaled to mean 0 and deviation 1 in each row: [B]  (Sun et al. 2024, Logit
    Standardization in Knowledge Distillation). The student need not match the size of the teacher's logits.
    """
    return kl(_standardised(student_BK), _standardised(teacher_BK), temperature)


def _standardised(logits_BK: Tensor) -> Tensor:
    centred_BK = _at_least_float32(logits_BK)
    centred_BK = centred_BK - centred_BK.mean(dim=1, keepdim=True)
    return centred_BK * (centred_BK.square().mean(dim=1, keepdim=True) + LEAST_VARIANCE).rsqrt()


def decoupled_kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float, labels_B: Tensor) -> Tensor:
    """T^2 * (KL of the label against all the rest + OTHERS_WEIGHT * KL among the other classes): [B]  (Zhao et al.
    2022, Decoupled Knowledge Distillation, with their weights 1 and 8 for CIFAR-100).

    `kl` weighs the second part by the teacher's probability of the rest, so that it all but vanishes where the teacher
    is sure.
    """
    others = torch.arange(student_BK.shape[1] - 1, device=student_BK.device)
    others_BK = others + (others >= labels_B[:, None])
    student, teacher = (
        _decoupled(logits_BK, temperature, labels_B, others_BK) for logits_BK in (student_BK, teacher_BK)
    )
    label_B, among_B = (
        (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
        for log_student, log_teacher in zip(student, teacher, strict=True)
    )
    return temperature**2 * (label_B + OTHERS_WEIGHT * among_B)


def _decoupled(logits_BK: Tensor, temperature: float, labels_B: Tensor, others_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, rest) [B, 2], and of the other classes among themselves [B, K - 1]."""
    log_BK = log_softmax(_at_least_float32(logits_BK) / temperature, dim=1)
    among_BK = log_BK.gather(1, others_BK)
    rest_B1 = among_BK.logsumexp(dim=1, keepdim=True)
    return torch.cat([log_BK.gather(1, labels_B[:, None]), rest_B1], dim=1), among_BK - rest_B1


SoftLoss = Callable[..., Tensor]
SOFT_LOSSES: dict[str, SoftLoss] = {
    "kl": kl,
    "ce": soft_cross_entropy,
    "mse": logit_mse,
    "std": standardised_kl,
    "dkd": decoupled_kl,
}
NEED_LABELS = frozenset({decoupled_kl})


def soft_loss(name: str) -> SoftLoss:
    """The soft loss of this name, or the user's function that `my_module:function` names. Raises UserError."""
    if name in SOFT_LOSSES:
        return SOFT_LOSSES[name]
    if ":" not in name:
        raise UserError(
            f"--loss {name} is not known{near(name, SOFT_LOSSES)}; choose from {', '.join(SOFT_LOSSES)}, or name a "
            "function as my_module:function."
        )
    return function_of(name)


def require_usable_loss(name: str, temperature: float, classes: int) -> None:
    """Raise UserError unless a user's function gives one finite loss a sample with a gradient for the student.

    It is tried on random logits float32 [3, K]; torch's random numbers are left as they are.
    """
    if name in SOFT_LOSSES:
        return
    own, samples = soft_loss(name), 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student_BK, teacher_BK = torch.randn(samples, classes, requires_grad=True), torch.randn(samples, classes)
        try:
            loss_B = own(student_BK, teacher_BK, temperature)
        except Exception as error:
            raise UserError(f"--loss {name} raises {cause(error)}.") from error
    if not isinstance(loss_B, Tensor) or tuple(loss_B.shape) != (samples,):
        given = f"the shape {list(loss_B.shape)}" if isinstance(loss_B, Tensor) else f"a {type(loss_B).__name__}"
        raise UserError(f"--loss {name} gives {given} for {samples} samples; a loss of each, [{samples}], is needed.")
    if not (loss_B.is_floating_point() and loss_B.isfinite().all()):
        raise UserError(f"--loss {name} gives losses that are not finite numbers of a floating type.")
    if not loss_B.requires_grad:
        raise UserError(f"--loss {name} gives losses without a gradient for the student's logits.")
    loss_B.sum().backward()
    if student_BK.grad is None or not student_BK.grad.isfinite().all():
        raise UserError(f"--loss {name} gives the student's logits no gradient, or one that is not finite.")
