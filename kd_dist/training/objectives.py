"""What training minimises: functions (model, batch) -> named losses of every sample, composed from `losses`."""

import torch
from torch import Tensor, nn

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


def _main_labels(batch: Batch) -> Tensor:
    """The label with the larger share in each image: [B]."""
    return torch.where(batch.weights_B < 0.5, batch.partner_labels_B, batch.labels_B)


def _hard(logits_BK: Tensor, batch: Batch, classes: int, smoothing: float) -> Tensor:
    partners = (batch.partner_labels_B, batch.weights_B) if batch.is_mixed else ()
    return cross_entropy(logits_BK, hard_targets(batch.labels_B, classes, smoothing, *partners))
