"""Logits of a model on given views: one forward path for validation, the cache's rows and their re-check.

Images go through the network in fixed batches of FORWARD_BATCH, counted from the first of those asked for. Whoever
asks for fixed pieces of a split gets rows that do not depend on how many ranks there are or where a run was cut.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_dist.dist.runtime import Runtime
from kd_dist.images import views
from kd_dist.images.store import ImageStore

FORWARD_BATCH = 256


def compute_dtype(device: torch.device, precision: str = "auto") -> str:
    """The name of the type that convolutions run in: as --precision says, or bfloat16 on GPUs and float32 on CPUs.

    Most CPUs are many times slower in bfloat16; those with AVX512-BF16 or AMX are about twice as fast.
    """
    chosen = {"bf16": "bfloat16", "fp32": "float32"}
    return chosen.get(precision, "bfloat16" if device.type == "cuda" else "float32")


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """A context in which convolutions and linear layers run in the type of this name."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


@contextlib.contextmanager
def untimed_kernels() -> Iterator[None]:
    """Within, cuDNN chooses kernels by its rules and not by timing, and only deterministic ones: logits that are kept
    must not depend on what else the machine did. Plans that training timed are not taken over, as cuDNN's cache tells
    the deterministic ones apart.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """function(item) of every item, in order; with threads, that many are worked on before they are asked for."""
    if threads == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future] = deque()
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def input_dtype(model: nn.Module, device: torch.device, dtype: str) -> torch.dtype:
    """The type of a network's input: on a GPU the one that its convolutions run in, which saves a pass over it."""
    own = next(model.parameters()).dtype
    return torch.bfloat16 if device.type == "cuda" and dtype == "bfloat16" else own


class Forward:
    """A model in evaluation mode with the images of a split, rendered at `image_size` and normalised by `mean` and
    `std`.
    """

    def __init__(
        self,
        model: nn.Module,
        pixels: ImageStore,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: str | None = None,
        threads: int = 0,
    ):
        self.model, self.pixels, self.image_size, self.device = model, pixels, image_size, device
        self.compute_dtype = dtype or compute_dtype(device)
        self.threads = threads if pixels.drawn_by_host else 0
        self.normalise = views.Normalise(mean, std, input_dtype(model, device, self.compute_dtype), device)

    def logits(self, shown: views.Shown) -> np.ndarray:
        """Logits float32 [B, K] of these images, FORWARD_BATCH of them at a time, in their order."""
        return self._logits_of(shown.at(places) for places in forward_batches(len(shown)))

    def _logits_of(self, batches: Iterable[views.Shown]) -> np.ndarray:
        """Logits float32 [B, K] of all images of these batches. The host waits for the device once, at the end."""
        pieces = [self._batch(images_BCHW) for images_BCHW in ahead(self._draw, batches, self.threads)]
        return torch.cat(pieces).float().cpu().numpy()

    def of_images(self, images_BCHW: torch.Tensor) -> np.ndarray:
        """Logits float32 [B, K] of images uint8 [B, 3, S, S], as Pictures.show gives them, in one batch."""
        return self._batch(images_BCHW).float().cpu().numpy()

    def _draw(self, shown: views.Shown) -> torch.Tensor:
        return self.pixels.show(shown, self.image_size)

    @torch.inference_mode()
    def _batch(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if images_BCHW.device != self.device:
            images_BCHW = images_BCHW.pin_memory().to(self.device, non_blocking=True)
        inputs_BCHW = self.normalise(images_BCHW)
        was_training = self.model.training
        self.model.eval()
        with untimed_kernels(), autocast(self.device, self.compute_dtype):
            logits_BK = self.model(inputs_BCHW)
        self.model.train(was_training)
        return logits_BK

    def all_logits(self, shown: views.Shown, classes: int, runtime: Runtime) -> np.ndarray:
        """Logits float32 [B, K] of these images, each computed on one rank, the result on every rank."""
        mine = forward_batches(len(shown))[runtime.rank :: runtime.world_size]
        logits_BK = torch.zeros(len(shown), classes)
        if mine:
            places_B = np.concatenate([np.arange(len(shown))[places] for places in mine])
            logits_BK[places_B] = torch.from_numpy(self._logits_of(shown.at(places) for places in mine))
        return runtime.sum(logits_BK).numpy()


def forward_batches(count: int) -> list[slice]:
    """The places of each forward batch among `count` images."""
    return [slice(low, low + FORWARD_BATCH) for low in range(0, count, FORWARD_BATCH)]
