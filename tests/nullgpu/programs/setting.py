"""What the programs share: images without content in a simulated GPU's memory, and a trainer for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import nullgpu
import numpy as np
import torch
from test_exactness import fresh_mixed_data, make_trainer, random_data

from kd_dist.cache.mixed import Mixed
from kd_dist.dist.runtime import Runtime
from kd_dist.images import views
from kd_dist.images.device import ResidentPixels
from kd_dist.images.store import Pixels
from kd_dist.models import STUDENTS, TEACHERS
from kd_dist.training import Trainer, objectives, watch
from kd_dist.training.batches import FreshCrops, TrainData
from kd_dist.training.losses import SOFT_LOSSES

K = 10
MODELS = {**TEACHERS, **STUDENTS}
HARD_LOSS = objectives.hard(K, 0.1)
DEVICE = torch.device("cuda", 0)
ALONE = Runtime(0, 1, 0, 1, DEVICE, None)


def never_diverge() -> None:
    """Let training take losses and weights for finite; its launches stay as they are."""
    watch.is_finite = lambda values: True


def resident_data(sizes_N2: np.ndarray, batch: int, size: int, mix: float = 0.0) -> TrainData:
    """Images of these heights and widths in the device's memory, shown by fresh crops; all share the same bytes."""
    n = len(sizes_N2)
    pixels = Pixels(torch.zeros(int(sizes_N2.prod(1).max()) * 6, dtype=torch.uint8), sizes_N2, np.zeros(n, np.int64))
    crops = FreshCrops(sizes_N2, (0.35, 1.0), 0)
    resident = ResidentPixels(pixels, DEVICE)
    return TrainData(resident, np.zeros(n, np.int64), crops, size, batch, 0, mixup=mix, cutmix=mix)


def imagewoof_like(n: int, batch: int, size: int, mix: float = 0.0) -> TrainData:
    """N images with a shorter side of 160 pixels, half of them upright."""
    return resident_data(np.tile(np.array([[160, 213], [213, 160]], np.int64), (n // 2, 1)), batch, size, mix)


def noise(n: int, batch: int, size: int, images: str = "plain", pixels: str = "device") -> TrainData:
    """The tests' noise images in the device's or the host's memory: cached views with logits for a soft loss, `plain`
    or half of them `mixed`, or `fresh` crops with mixup and CutMix for a hard one.
    """
    data = (fresh_mixed_data if images == "fresh" else random_data)(n, batch, size)
    if images == "mixed":
        columns = views.mixed_views(0, "train", n, range(4), 0.5)
        data = replace(data, views_of_epoch=replace(data.views_of_epoch, mixed=Mixed(*columns)))
    return replace(data, pixels=ResidentPixels(data.pixels, DEVICE)) if pixels == "device" else data


def soft_loss(name: str):
    """The project's loss with this soft term, at its usual weight and temperature."""
    return objectives.distilled(K, 0.0, SOFT_LOSSES[name], 0.9, 4.0)


@contextmanager
def trainer_of(model: str, data: TrainData, loss=HARD_LOSS, **how) -> Iterator[Trainer]:
    """A trainer of a model by its name, in a folder that is gone afterwards."""
    never_diverge()
    with TemporaryDirectory() as folder:
        yield make_trainer(ALONE, Path(folder), MODELS[model](K), data, loss, **how)


def launches() -> int:
    """Kernels, copies, memsets and cuBLAS calls since nullgpu.reset()."""
    kernels, calls = nullgpu.counts()
    return sum(kernels.values()) + sum(calls.values())
