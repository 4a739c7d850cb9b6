"""Logits of a model on given views: one forward path for validation, the cache's rows and their re-check.

Pictures go through the network in fixed batches of FORWARD_BATCH, counted from the first of those asked for. Whoever
asks for fixed pieces of a split gets rows that do not depend on how many ranks there are or where a run was cut.
"""

import contextlib

import numpy as np
import torch
from torch import nn

from kd_dist import views
from kd_dist.pixels import Pixels
from kd_dist.runtime import Runtime

FORWARD_BATCH = 256


def compute_dtype(device: torch.device, precision: str = "auto") -> str:
    """The name of the type that convolutions run in: as --precision says, or bfloat16 on GPUs and float32 on CPUs.

    Most CPUs are many times slower in bfloat16; those with AVX512-BF16 or AMX are about twice as fast.
    """
    chosen = {"bf16": "bfloat16", "fp32": "float32"}
    return chosen.get(precision, "bfloat16" if device.type == "cuda" else "float32")


def autocast(device: torch.device, dtype: str):
    """A context in which convolutions and linear layers run in the type of this name."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


class Forward:
    """A model in evaluation mode with the pictures of a split, rendered at `image_size` and normalised by `mean` and
    `std`.
    """

    def __init__(
        self,
        model: nn.Module,
        pixels: Pixels,
        image_size: int,
        mean,
        std,
        device: torch.device,
        dtype: str | None = None,
    ):
        self.model, self.pixels, self.image_size, self.device = model, pixels, image_size, device
        self.compute_dtype = dtype or compute_dtype(device)
        self.normalise = views.Normalise(mean, std, next(model.parameters()).dtype, device)

    def logits(self, shown: views.Shown) -> np.ndarray:
        """Logits float32 [B, K] of these pictures, FORWARD_BATCH of them at a time, in their order."""
        pieces = [self._batch(shown.at(slice(low, low + FORWARD_BATCH))) for low in range(0, len(shown), FORWARD_BATCH)]
        return torch.cat(pieces).float().cpu().numpy()

    @torch.inference_mode()
    def _batch(self, shown: views.Shown) -> torch.Tensor:
        images_BCHW = views.show(self.pixels, shown, self.image_size)
        inputs_BCHW = self.normalise(images_BCHW.to(self.device))
        was_training = self.model.training
        self.model.eval()
        with autocast(self.device, self.compute_dtype):
            logits_BK = self.model(inputs_BCHW)
        self.model.train(was_training)
        return logits_BK

    def all_logits(self, shown: views.Shown, classes: int, runtime: Runtime) -> np.ndarray:
        """Logits float32 [B, K] of these pictures, each computed on one rank, the result on every rank."""
        logits_BK = torch.zeros(len(shown), classes)
        for batch in runtime.shard(-(-len(shown) // FORWARD_BATCH)):
            places = slice(batch * FORWARD_BATCH, (batch + 1) * FORWARD_BATCH)
            logits_BK[places] = torch.from_numpy(self.logits(shown.at(places)))
        return runtime.sum(logits_BK).numpy()
