"""The images that a run is scored on, and its scores."""

import numpy as np
import torch
from torch import nn

from kd_dist.cache import Cache
from kd_dist.config import MEAN, STD
from kd_dist.dist.runtime import Runtime
from kd_dist.images import views
from kd_dist.inference import Forward, compute_dtype
from kd_dist.job.data import Data
from kd_dist.job.selection import Scored


class Validation:
    """The images a run is scored on in their evaluation view: each counted once, at any number of ranks."""

    def __init__(
        self, scored: Scored, data: Data, runtime: Runtime, image_size: int, precision: str, cache: Cache | None = None
    ):
        self.scored, self.runtime, self.image_size = scored, runtime, image_size
        self.threads = data.threads
        self.pixels, rows_M = data.pixels[self.scored.split], self.scored.rows_M
        self.teacher_MK = cache.split(self.scored.split).logits_NVK[rows_M, 0] if cache else None
        # A mean of probabilities is known at its own temperature alone.
        self.temperature = (cache.header.temperature if cache else None) or 1.0
        self.dtype = compute_dtype(runtime.device, precision)
        box_M4 = views.evaluation_boxes(self.pixels.sizes_N2[rows_M])
        self.shown = views.Shown.plain(rows_M, box_M4, np.zeros(len(rows_M), np.uint8))

    def forward(self, model: nn.Module) -> Forward:
        """The model in evaluation mode, with these images."""
        return Forward(
            model,
            self.pixels,
            self.image_size,
            mean=MEAN,
            std=STD,
            device=self.runtime.device,
            dtype=self.dtype,
            threads=self.threads,
        )

    def logits(self, model: nn.Module) -> np.ndarray:
        """Logits float32 [M, K], the same on every rank."""
        return self.forward(model).all_logits(self.shown, len(self.scored.samples.classes), self.runtime)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """val_top1 and val_loss (cross-entropy in nats). Where a teacher is cached also val_agreement with its top
        class, val_kl, the mean KL divergence from its probabilities in nats, and its own val_teacher_top1. "tune_"
        heads the names where it is not val.
        """
        return self.metrics_of(self.logits(model))

    def metrics_of(self, logits_MK: np.ndarray) -> dict[str, float]:
        """The metrics of given logits."""
        labels_M = self.scored.samples.labels_N
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits_MK).double(), torch.from_numpy(labels_M))
        metrics = {"top1": top1(logits_MK, labels_M), "loss": float(loss)}
        if self.teacher_MK is not None:
            metrics["agreement"] = top1(logits_MK, self.teacher_MK.argmax(axis=1))
            metrics["kl"] = mean_kl(self.teacher_MK, logits_MK, self.temperature)
            metrics["teacher_top1"] = top1(self.teacher_MK, labels_M)
        return {f"{self.scored.head}_{name}": value for name, value in metrics.items()}


def mean_kl(teacher_NK: np.ndarray, logits_NK: np.ndarray, temperature: float) -> float:
    """The mean of KL(teacher || network) over samples, in nats, of the probabilities at a temperature."""
    of_teacher_NK, of_network_NK = (
        torch.from_numpy(values_NK.astype(np.float64) / temperature).log_softmax(dim=1)
        for values_NK in (teacher_NK, logits_NK)
    )
    return float((of_teacher_NK.exp() * (of_teacher_NK - of_network_NK)).sum(dim=1).mean())


def top1(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Fraction of samples whose highest logit is their label's, in [0, 1]."""
    return float((logits_NK.argmax(axis=1) == labels_N).mean())
