"""The arms of a study: the ways to teach one student. Each control arm takes one ingredient away from what the cache
offers, so that a difference between two arms has one cause.

An arm is what it changes in the settings and, where settings cannot say it, a function that makes other soft labels
from the cached ones, or another loss. Students of one seed start from the same weights and see the images in the same
order; those on cached crops, the same crops.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from kd_dist.config import DistillConfig, StudentConfig
from kd_dist.distill import Loss, Rows
from kd_dist.errors import UserError
from kd_dist.training import LossTerms, objectives

WITHIN, VIEW, ALL = range(3)  # one random stream for each way to shuffle
LEAST_SMOOTHING = 1e-9


@dataclass(frozen=True)
class Arm:
    """One way to teach the student. `needs_views` counts the evaluation view; `needs_teacher`: besides the cache;
    `needs_labels`: of every image, --label-fraction cannot use fewer.

    A variant is a built-in arm (`base`) with settings of its own (`own`), under another name.
    """

    name: str
    isolates: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    soft_labels: Rows | None = None
    loss: Loss | None = None
    settings: type[StudentConfig] = DistillConfig
    needs_views: int = 1
    needs_teacher: bool = False
    needs_labels: bool = False
    base: str | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def definition(self) -> str:
        """The base and settings of a variant: "distilled,temperature=8.0"."""
        return ",".join([str(self.base), *(f"{name}={value}" for name, value in self.own.items())])


def drawn_views(logits_NVK: np.ndarray) -> np.ndarray:
    """The logits of the views that students are shown [N, V', K]: all but the evaluation view, number 0. Where that is
    the only view, its logits.
    """
    return logits_NVK[:, min(1, logits_NVK.shape[1] - 1) :]


# ---- soft labels that replace the cached ones: (logits_NVK, labels_N, settings) -> logits_NVK


def smoothed_labels(logits_NVK: np.ndarray, labels_N: np.ndarray, settings: StudentConfig) -> np.ndarray:
    """Logits whose softmax at the study's temperature is a smoothed label with the mean entropy of the cache's.

    With smoothing e, the label has probability 1 - e + e/K and each other class e/K (Szegedy et al. 2016). e is chosen
    so that the entropy is the mean entropy of softmax(cached logits / T) over the random views. The entropy grows with
    e from 0 to log K, so one e exists. The logits are T times the log of these probabilities.
    """
    classes = logits_NVK.shape[2]
    smoothing = smoothing_of_entropy(mean_entropy(drawn_views(logits_NVK), settings.distillation.temperature), classes)
    probabilities_KK = np.eye(classes) * (1 - smoothing) + smoothing / classes
    class_KK = (settings.distillation.temperature * np.log(probabilities_KK)).astype(np.float32)
    return np.broadcast_to(class_KK[labels_N][:, None], logits_NVK.shape)


def mean_entropy(logits_NVK: np.ndarray, temperature: float) -> float:
    """Mean over images and views of the entropy, in nats, of softmax(logits / T)."""
    from scipy import special  # an extra, which launching a study does without

    per_view = []
    for view in range(logits_NVK.shape[1]):  # one view at a time: float64 copies of a whole cache would be large
        probabilities_NK = special.softmax(logits_NVK[:, view].astype(np.float64) / temperature, axis=1)
        per_view.append(-special.xlogy(probabilities_NK, probabilities_NK).sum(axis=1).mean())
    return float(np.mean(per_view))


def smoothing_of_entropy(entropy: float, classes: int) -> float:
    """The label smoothing in (0, 1] whose target has this entropy in nats."""
    from scipy import optimize, special

    def excess(smoothing: float) -> float:
        other, own = smoothing / classes, 1 - smoothing + smoothing / classes
        return -special.xlogy(own, own) - (classes - 1) * special.xlogy(other, other) - entropy

    if excess(LEAST_SMOOTHING) >= 0:
        return LEAST_SMOOTHING
    return 1.0 if excess(1.0) <= 0 else optimize.brentq(excess, LEAST_SMOOTHING, 1.0)


def class_means(logits_NVK: np.ndarray, labels_N: np.ndarray, _settings: StudentConfig) -> np.ndarray:
    """For every image the mean of the cached logits of its class, over images and random views."""
    drawn_NVK = drawn_views(logits_NVK)
    one_hot_NK = np.eye(logits_NVK.shape[2])[labels_N]
    sums_KK = sum(one_hot_NK.T @ drawn_NVK[:, view].astype(np.float64) for view in range(drawn_NVK.shape[1]))
    counts_K1 = np.maximum(one_hot_NK.sum(axis=0)[:, None], 1) * drawn_NVK.shape[1]
    class_KK = (sums_KK / counts_K1).astype(np.float32)
    return np.broadcast_to(class_KK[labels_N][:, None], logits_NVK.shape)


def shuffled_within(logits_NVK: np.ndarray, labels_N: np.ndarray, settings: StudentConfig) -> np.ndarray:
    """The logits of another image of the same class, all its views together."""
    return logits_NVK[others(labels_N, np.random.default_rng([settings.seed, WITHIN]))]


def shuffled_all(logits_NVK: np.ndarray, labels_N: np.ndarray, settings: StudentConfig) -> np.ndarray:
    """The logits of another image of any class, all its views together."""
    return logits_NVK[others(np.zeros_like(labels_N), np.random.default_rng([settings.seed, ALL]))]


def require_shuffled(arm: Arm, classes: Sequence[str], labels_N: np.ndarray) -> None:
    """Raise UserError where an arm shuffles soft labels within each class, and a class has only one training image."""
    alone = np.flatnonzero(np.bincount(labels_N, minlength=len(classes)) == 1)
    if arm.soft_labels is shuffled_within and len(alone):
        raise UserError(
            f"class {classes[alone[0]]} has only one training image, so its soft labels cannot be shuffled within the "
            f"class; omit the arm {arm.name} with --arms."
        )


def others(groups_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every sample another one of its group, each taken once: one random circle through each group. A group has
    two samples or more, see `require_shuffled`.
    """
    other_N = np.empty(len(groups_N), np.int64)
    for group in np.unique(groups_N):
        circle = rng.permutation(np.flatnonzero(groups_N == group))
        other_N[circle] = np.roll(circle, 1)
    return other_N


def shuffled_views(logits_NVK: np.ndarray, _labels_N: np.ndarray, settings: StudentConfig) -> np.ndarray:
    """The logits of another random view of the same image: each image's views are rotated by a number of its own."""
    n, views, _ = logits_NVK.shape
    drawn = views - 1
    shift_N1 = np.random.default_rng([settings.seed, VIEW]).integers(1, drawn, (n, 1))
    source_NV = np.concatenate([np.zeros((n, 1), np.int64), 1 + (np.arange(drawn) + shift_N1) % drawn], axis=1)
    return np.take_along_axis(logits_NVK, source_NV[:, :, None], axis=1)


def first_view(logits_NVK: np.ndarray, _labels_N: np.ndarray, _settings: StudentConfig) -> np.ndarray:
    """The logits of the first random view, whatever crop is shown."""
    return np.broadcast_to(logits_NVK[:, 1:2], logits_NVK.shape)


# ---- other losses: (settings, classes) -> loss terms


def no_gradient_loss(settings: StudentConfig, classes: int) -> LossTerms:
    """alpha * hard + (1 - alpha) * KLDivLoss()(softmax(teacher / T), softmax(student / T)).detach().

    The loss of the project that this one descends from, as written there: alpha weighs the hard term, the logarithm is
    missing, the arguments are swapped, and the soft term has no gradient.
    """
    return objectives.distilled(
        classes,
        settings.optimisation.label_smoothing,
        no_gradient_soft_term,
        1 - settings.distillation.alpha,
        settings.distillation.temperature,
    )


def no_gradient_soft_term(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """torch's kl_div of probabilities where it wants their logarithm, the mean over classes of each sample [B]; a
    constant to the optimizer.
    """
    student_BK, teacher_BK = (torch.softmax(logits.float() / temperature, dim=1) for logits in (student_BK, teacher_BK))
    return kl_div(teacher_BK, student_BK, reduction="none").mean(dim=1).detach()


_BUILT_IN = (
    Arm("baseline", "hard labels only, a new crop every time", {"alpha": 0.0, "crops": "fresh"}),
    Arm(
        "baseline-cached",
        "hard labels only, on the cache's crops: the cost of having only V crops",
        {"alpha": 0.0, "crops": "cached"},
    ),
    Arm(
        "smooth",
        "a smoothed label of the cache's mean entropy: is the gain only smoothing?",
        soft_labels=smoothed_labels,
        needs_labels=True,
    ),
    Arm(
        "class-mean",
        "the mean soft label of the class: class similarity without the image",
        soft_labels=class_means,
        needs_labels=True,
    ),
    Arm(
        "shuffled-within",
        "soft labels of another image of the class: the worth of knowing the image",
        soft_labels=shuffled_within,
        needs_labels=True,
    ),
    Arm(
        "shuffled-view",
        "the soft label of another view of the image: the worth of consistent crops",
        soft_labels=shuffled_views,
        needs_views=3,
    ),
    Arm("shuffled-all", "soft labels of any other image: a bug check, it must not help", soft_labels=shuffled_all),
    Arm(
        "one-view",
        "one view's soft label for every crop of the image: the worth of caching several views",
        soft_labels=first_view,
        needs_views=2,
    ),
    Arm("distilled", "the soft label of the crop that is shown: the method"),
    Arm(
        "online",
        "the teacher in the loop on fresh crops: the cost of caching",
        {"crops": "fresh"},
        settings=StudentConfig,
        needs_teacher=True,
    ),
    Arm(
        "no-gradient",
        "a soft term without a gradient, as this project's predecessor had it: nothing is distilled",
        loss=no_gradient_loss,
        needs_labels=True,
    ),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in _BUILT_IN}
BASELINES, DISTILLED, ONLINE, BUG_CHECK = ("baseline", "baseline-cached"), "distilled", "online", "shuffled-all"
"""The arms that a study's table knows by name."""
