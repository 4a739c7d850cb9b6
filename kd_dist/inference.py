"""Logits of a model on given views: one forward path for validation, the cache's rows and their re-check.

Pictures go through the network in fixed batches of FORWARD_BATCH consecutive samples, counted from the first of the
split, so that a row does not depend on how many ranks there are or where a run was cut.
"""

import contextlib
import itertools

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

    def logits(self, box_N4: np.ndarray, flip_N: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Logits float32 [stop - start, K] of samples start..stop of the split in the given views. `start` is a
        multiple of FORWARD_BATCH.
        """
        edges = [*range(start, stop, FORWARD_BATCH), stop]
        pieces = [self._batch(box_N4, flip_N, low, high) for low, high in itertools.pairwise(edges)]
        return torch.cat(pieces).float().cpu().numpy()

    @torch.inference_mode()
    def _batch(self, box_N4: np.ndarray, flip_N: np.ndarray, low: int, high: int) -> torch.Tensor:
        shown = views.Shown.plain(np.arange(low, high), box_N4[low:high], flip_N[low:high])
        images_BCHW = views.show(self.pixels, shown, self.image_size)
        inputs_BCHW = self.normalise(images_BCHW.to(self.device))
        was_training = self.model.training
        self.model.eval()
        with autocast(self.device, self.compute_dtype):
            logits_BK = self.model(inputs_BCHW)
        self.model.train(was_training)
        return logits_BK

    def all_logits(self, box_N4: np.ndarray, flip_N: np.ndarray, classes: int, runtime: Runtime) -> np.ndarray:
        """Logits float32 [N, K] of a whole split, each sample computed on one rank, the result on every rank."""
        n = len(self.pixels)
        logits_NK = torch.zeros(n, classes)
        for batch in runtime.shard(-(-n // FORWARD_BATCH)):
            start, stop = batch * FORWARD_BATCH, min(n, (batch + 1) * FORWARD_BATCH)
            logits_NK[start:stop] = torch.from_numpy(self.logits(box_N4, flip_N, start, stop))
        return runtime.sum(logits_NK).numpy()
