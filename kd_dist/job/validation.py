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
        self.dtype = compute_dtype(runtime.device, precision)
        box_M4 = views.evaluation_boxes(self.pixels.sizes_N2[rows_M])
        self.shown = views.Shown.plain(rows_M, box_M4, np.zeros(len(rows_M), np.uint8))

    def logits(self, model: nn.Module) -> np.ndarray:
        """Logits float32 [M, K], the same on every rank."""
        forward = Forward(
            model,
            self.pixels,
            self.image_size,
            mean=MEAN,
            std=STD,
            device=self.runtime.device,
            dtype=self.dtype,
            threads=self.threads,
        )
        return forward.all_logits(self.shown, len(self.scored.samples.classes), self.runtime)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """val_top1, val_loss (cross-entropy in nats), and val_agreement with the teacher's top class where a teacher is
        cached; "tune_" heads the names where it is not val.
        """
        return self.metrics_of(self.logits(model))

    def metrics_of(self, logits_MK: np.ndarray) -> dict[str, float]:
        """The metrics of given logits."""
        labels_M = self.scored.samples.labels_N
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits_MK).double(), torch.from_numpy(labels_M))
        metrics = {"top1": top1(logits_MK, labels_M), "loss": float(loss)}
        if self.teacher_MK is not None:
            metrics["agreement"] = top1(logits_MK, self.teacher_MK.argmax(axis=1))
        return {f"{self.scored.head}_{name}": value for name, value in metrics.items()}


def top1(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose highest logit is their label's, in [0, 1]."""
    return float((logits_NK.argmax(axis=1) == labels_N).mean())
