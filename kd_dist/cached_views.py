"""Images with the teacher's cached logits, for a training loop of your own: `kd_dist.CachedViews`."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_dist import job
from kd_dist.cache import Cache, SoftLabels, TopK, open_cache, require_temperature
from kd_dist.config import MEAN, STD, DataConfig
from kd_dist.data.samples import SPLITS
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.fetch import local_file
from kd_dist.images import views as rendering
from kd_dist.lock import locked
from kd_dist.training.batches import CachedCrops
from kd_dist.training.losses import hard_targets

Channels = tuple[float, float, float]


class CachedView(NamedTuple):
    """One image in one view; a DataLoader makes the same of a batch, with a first axis B.

    `label` is the class, int64 [], or -1 for an image without a label. Where the cache has mixed views it is the
    probabilities of the K classes, float32 [K]: shared between the two labels as the images are.
    """

    image: Tensor  # float32 [3, S, S] normalised, or uint8
    label: Tensor
    teacher_logits: Tensor  # float32 [K], of exactly this view


class CachedViews(Dataset[CachedView]):
    """The images of a split in the views that a cache holds: item i is image i as the student's job would show it.

    cache, data, split: the file of soft labels; the folder it was made of, as --data; "train" or "val".
    image_size: side of the images in pixels.
    view: the number of one view for all images, and for all epochs. None is view 0, the evaluation view, for val; for
        train it is the training rule, by which each epoch shows one of the random views of each image, none twice
        before all were shown: call `set_epoch` before each epoch.
    seed: of the training rule, as --seed.
    temperature: of your loss. It is needed for a cache of the top k logits, and for one of mean probabilities.
    normalise: mean and deviation of each channel, for float32 images; None gives uint8 images.
    source: other flags of the jobs that say where the images are, such as pixels="off" or pixels_dir="/local".

    It works with any sampler, and with loader processes that are forked or spawned: they map the cache and the decoded
    images, and take the epoch from the process that sets it. Raises UserError where the cache is damaged, or is not of
    this data.
    """

    def __init__(
        self,
        cache: str | Path,
        data: str | Path,
        split: str = "train",
        *,
        image_size: int,
        view: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        normalise: tuple[Channels, Channels] | None = (MEAN, STD),
        **source: Any,
    ):
        if split not in SPLITS:
            raise UserError(f"split={split!r} is not known; pass {' or '.join(map(repr, SPLITS))}.")
        self._cache = open_cache(local_file(cache))
        if not self._cache.has_checksum:
            warnings.warn(f"{cache} has no .sha256 file beside it; its own checksums match", stacklevel=2)
        rendering.require_renderer(self._cache.header.renderer, self._cache.path)
        opened = _opened(data, source)
        opened.require_fit(self._cache)
        samples, self._pixels = opened.split(split)
        self.split, self.image_size, self.seed, self.temperature = split, image_size, seed, temperature
        self.classes: tuple[str, ...] = samples.classes
        self.labels_N: np.ndarray = samples.labels_N
        self.view = 0 if view is None and split == "val" else _within(view, self._cache.split(split).views)
        self._normalise = normalise and rendering.Normalise(*normalise, torch.float32, torch.device("cpu"))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader processes that stay read it
        self._map()

    def _map(self) -> None:
        """What the cache holds of the split, where it lies in the mapped file."""
        table = self._cache.split(self.split)
        self._crops = CachedCrops(table.box_NV4, table.flip_NV, self.seed, table.mixed)
        self._logits_NVK = _soft_labels(self._cache, self.split, self.temperature)
        self._chosen: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_crops", "_logits_NVK", "_chosen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return len(self.labels_N)

    def set_epoch(self, epoch: int) -> None:
        """Show the views of this epoch from now on, in loader processes too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> CachedView:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[CachedView]:
        """Several items at once, as a DataLoader asks for them: they are rendered and read together."""
        index_B = np.asarray(indices, np.int64)
        labels_B, view_B = self.labels_N[index_B], self._views_of(index_B)
        shown = rendering.shown_in(self._crops, index_B, view_B)
        images_BCHW = self._pixels.show(shown, self.image_size)
        if self._normalise:
            images_BCHW = self._normalise(images_BCHW)
        teacher_BK = torch.from_numpy(self._logits_NVK[index_B, view_B].astype(np.float32))
        targets_B = torch.from_numpy(labels_B)
        if self._crops.mixed is not None:
            partners_B, weight_B = torch.from_numpy(self.labels_N[shown.partner_B]), torch.from_numpy(shown.weight_B)
            targets_B = hard_targets(targets_B, len(self.classes), 0.0, partners_B, weight_B)
        return [CachedView(*item) for item in zip(images_BCHW, targets_B, teacher_BK, strict=True)]

    def _views_of(self, index_B: np.ndarray) -> np.ndarray:
        """The number of the view that each of these images is shown in now."""
        if self.view is not None:
            return np.full(len(index_B), self.view)
        epoch = int(self._epoch)
        if self._chosen is None or self._chosen[0] != epoch:
            choice_N = self._crops(epoch).choice_N
            assert choice_N is not None  # cached crops have numbers
            self._chosen = (epoch, choice_N)
        return self._chosen[1][index_B]


def _opened(data: str | Path, source: dict[str, Any]) -> job.Data:
    """The data as a job of one process opens it; the first process of a machine decodes it, the others wait."""
    config = DataConfig(**{"data": str(data), "pixels": "memory", **source})
    if config.pixels == "device":
        raise UserError("CachedViews renders images on the CPU; pass pixels='memory', or pixels='off'.")
    with locked(Path(tempfile.gettempdir(), f"kd_dist-{os.getuid()}.lock")):
        return job.open_data(config, Runtime(0, 1, 0, 1, torch.device("cpu"), None))


def _within(view: int | None, views: int) -> int | None:
    """The number of a view. Raises UserError where there is none of this number."""
    if view is not None and not 0 <= view < views:
        raise UserError(f"view={view}, but the views are 0 to {views - 1}; pass one of these, or None.")
    return view


def _soft_labels(cache: Cache, split: str, temperature: float | None) -> SoftLabels:
    """The logits [N, V, K] at this temperature. Raises UserError where the cache does not hold them at it."""
    logits_NVK, own = cache.split(split).logits_NVK, cache.header.temperature
    if own is not None and temperature != own:
        raise UserError(
            f"{cache.path} holds means of probabilities at temperature {own:g}; pass temperature={own:g}, and use it "
            "in your loss."
        )
    if not isinstance(logits_NVK, TopK):
        return logits_NVK
    if temperature is None:
        raise UserError(
            f"{cache.path} holds the {cache.header.top_k} largest logits, and the tail for each temperature; "
            "pass that of your loss, such as temperature=4."
        )
    require_temperature(temperature, cache.path)
    return logits_NVK.at(temperature)
