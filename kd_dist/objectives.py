"""What the engine minimises: functions (model, batch) -> named losses of every sample, composed from `losses`."""

from torch import Tensor, nn

from kd_dist.batches import Batch
from kd_dist.engine import LossTerms
from kd_dist.losses import SoftLoss, cross_entropy, hard_targets


def hard(classes: int, smoothing: float) -> LossTerms:
    """Cross-entropy with the labels, blended as the batch says and smoothed: {"total", "hard"}."""

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
        soft_B = soft_loss(logits_BK, batch.teacher_logits_BK, temperature)
        hard_B = _hard(logits_BK, batch, classes, smoothing)
        return {"total": alpha * soft_B + (1 - alpha) * hard_B, "soft": soft_B, "hard": hard_B}

    return terms


def _hard(logits_BK: Tensor, batch: Batch, classes: int, smoothing: float) -> Tensor:
    targets_BK = hard_targets(batch.labels_B, classes, smoothing, batch.partner_labels_B, batch.weights_B)
    return cross_entropy(logits_BK, targets_BK)
