"""What training minimises: functions (model, batch) -> named losses of every sample, composed from `losses`."""

import torch
from torch import Tensor, nn

from kd_dist.training import losses
from kd_dist.training.batches import Batch
from kd_dist.training.losses import NEED_LABELS, SoftLoss, cross_entropy, hard_targets
from kd_dist.training.trainer import LossTerms


def hard(classes: int, smoothing: float) -> LossTerms:
    """Cross-entropy with the labels, mixed as the batch says and smoothed: {"total", "hard"}."""

    def terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        hard_B = _hard(model(batch.images_BCHW), batch, classes, smoothing)
        return {"total": hard_B, "hard": hard_B}

    return terms


def distilled(classes: int, smoothing: float, soft_loss: SoftLoss, alpha: float, temperature: float) -> LossTerms:
    """alpha * soft + (1 - alpha) * hard, the soft loss against the batch's cached teacher logits: {"total", "soft",
    "hard"}.
    """

    def terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits_BK = model(batch.images_BCHW)
        labels = [_main_labels(batch)] if soft_loss in NEED_LABELS else []
        soft_B = soft_loss(logits_BK, batch.teacher_logits_BK, temperature, *labels)
        hard_B = _hard(logits_BK, batch, classes, smoothing)
        return {"total": alpha * soft_B + (1 - alpha) * hard_B, "soft": soft_B, "hard": hard_B}

    return terms


def distillation_loss(
    student_BK: Tensor,
    teacher_BK: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
    loss: str = "kl",
) -> Tensor:
    """The mean over a batch of alpha * soft + (1 - alpha) * hard, for a training loop of your own.

    `labels` are classes, int64 [B], -1 where an image has none and counts by its soft loss alone, or the probabilities
    of the classes, float [B, K]; `loss` is a name that --loss takes. Raises UserError for a name that is not known.
    """
    soft_loss = losses.soft_loss(loss)
    targets_BK = hard_targets(labels, student_BK.shape[1]) if labels.dim() == 1 else labels
    own = [labels if labels.dim() == 1 else labels.argmax(dim=1)] if soft_loss in NEED_LABELS else []
    soft_B = soft_loss(student_BK, teacher_BK, temperature, *own)
    return (alpha * soft_B + (1 - alpha) * cross_entropy(student_BK, targets_BK)).mean()


def _main_labels(batch: Batch) -> Tensor:
    """The label with the larger share in each image: [B]."""
    return torch.where(batch.weights_B < 0.5, batch.partner_labels_B, batch.labels_B)


def _hard(logits_BK: Tensor, batch: Batch, classes: int, smoothing: float) -> Tensor:
    partners = (batch.partner_labels_B, batch.weights_B) if batch.is_mixed else ()
    return cross_entropy(logits_BK, hard_targets(batch.labels_B, classes, smoothing, *partners))
