"""Training batches: which images in which order, in which view, mixed with which other, and on which rank.

All of it is a function of (seed, epoch, image), so an interrupted run goes on from one integer, at any number of ranks,
and the ranks' parts of a batch put together are the batch a single process would have had.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kd_dist.cache import SoftLabels
from kd_dist.dist.endings import ignore_stop_signals
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.images.store import ImageStore
from kd_dist.images.transfer import to_device

ORDER, CROPS, FLIPS, VIEW_CHOICE, BLEND, PLAIN_VIEW_CHOICE = range(6)
CHOICE_CELLS = 1 << 20  # numbers of views permuted at once
AHEAD_BYTES = 32 << 20  # of soft labels read at once


@dataclass(frozen=True)
class Batch:
    """One rank's part of one step. Images leave here as uint8 and are normalised on the device, where resident ones
    are already.

    `global_size` counts the images of the step over all ranks. `weights_B` is the share of each image's own label; the
    rest belongs to `partner_labels_B` (1 and the own label where nothing was mixed). `teacher_logits_BK` is None
    where no cache is read. `shown` describes the images, for those who render them at another size.
    """

    index_B: torch.Tensor
    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    partner_labels_B: torch.Tensor
    weights_B: torch.Tensor
    teacher_logits_BK: torch.Tensor | None
    global_size: int
    shown: views.Shown | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether any image may be mixed with another one; known without looking at the device."""
        return self.shown is None or bool((self.shown.weight_B < 1).any())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device. The host waits for nothing: pinned images travel by a copy of their own, all
        else by one together.
        """
        small = {name: value for name, value in self._on_host().items() if name != "images_BCHW"}
        moved: dict[str, Any] = dict(zip(small, to_device(list(small.values()), device), strict=True))
        return replace(self, **moved, images_BCHW=self.images_BCHW.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader that feeds a GPU. What is small is pinned when it is packed, by `to`."""
        on_host = "images_BCHW" in self._on_host()
        return replace(self, images_BCHW=self.images_BCHW.pin_memory()) if on_host else self

    def _on_host(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.tensors().items() if value.device.type == "cpu"}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class EpochViews:
    """The view that every image is seen in during one epoch; `choice_N` is its number in the cache, None for a fresh
    crop. `mixed_N` is what all N show where the cache has mixed views.
    """

    box_N4: np.ndarray
    flip_N: np.ndarray
    choice_N: np.ndarray | None = None
    mixed_N: views.Shown | None = None


@dataclass(frozen=True)
class FreshCrops:
    """A new random crop of every image in every epoch."""

    sizes_N2: np.ndarray
    crop_scale: tuple[float, float]
    seed: int

    def __call__(self, epoch: int) -> EpochViews:
        box_N4 = views.draw_boxes(_rng(self.seed, epoch, CROPS), self.sizes_N2, self.crop_scale)
        return EpochViews(box_N4, views.draw_flips(_rng(self.seed, epoch, FLIPS), len(box_N4)))


@dataclass(frozen=True)
class CachedCrops:
    """The cache's own views: in each epoch every image gets one of its views, without replacement until all have been
    seen. A mixed view is shown with its mix, in the first `mixed_epochs` (None: in all); after these, plain views
    alone are shown.

    With more than one view the evaluation view, number 0, is left out.
    """

    box_NV4: np.ndarray
    flip_NV: np.ndarray
    seed: int
    mixed: views.Mixed | None = None
    mixed_epochs: int | None = None

    def __call__(self, epoch: int) -> EpochViews:
        n, all_views = self.flip_NV.shape
        numbers, stream = np.arange(min(1, all_views - 1), all_views, dtype=np.int32), VIEW_CHOICE
        if self.mixed is not None and self.mixed_epochs is not None and epoch >= self.mixed_epochs:
            numbers, stream = np.setdiff1d(numbers, self.mixed.mixed_views()), PLAIN_VIEW_CHOICE
            epoch -= self.mixed_epochs
        cycle, turn = divmod(epoch, len(numbers))
        rng, rows = _rng(self.seed, cycle, stream), max(1, CHOICE_CELLS // len(numbers))
        # Piece by piece the generator gives what it would give at once, without memory for all views of all images.
        pieces = [
            rng.permuted(np.tile(numbers, (min(rows, n - start), 1)), axis=1)[:, turn].copy()
            for start in range(0, n, rows)
        ]
        choice_N = np.concatenate(pieces)
        shown_N = views.shown_in(self, np.arange(n), choice_N)
        return EpochViews(shown_N.box_B4, shown_N.flip_B, choice_N, shown_N if self.mixed is not None else None)


def _rng(*words: int) -> np.random.Generator:
    return np.random.default_rng(words)


def order_of(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits the images: a permutation of range(n)."""
    return _rng(seed, epoch, ORDER).permutation(n)


def steps_in_epoch(n: int, batch_size: int) -> int:
    """Steps that one pass takes. Each image is visited once; batches differ by one image at most and never exceed
    batch_size.
    """
    return -(-n // batch_size)


@dataclass(frozen=True)
class TrainData:
    """Everything batches are made of: images, labels, a rule for views, and soft labels where there is a cache.

    members_M: the rows that are trained on, int64 and sorted; None for all. Views are drawn for all N, so that an
    image's do not depend on who else is trained on; partners in mixes are members. mixed_epochs: mixes are drawn in
    so many epochs, the first ones; None for all.
    """

    pixels: ImageStore
    labels_N: np.ndarray
    views_of_epoch: FreshCrops | CachedCrops
    image_size: int
    batch_size: int
    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0
    logits_NVK: SoftLabels | None = None
    members_M: np.ndarray | None = None
    mixed_epochs: int | None = None

    def __len__(self) -> int:
        return len(self.labels_N if self.members_M is None else self.members_M)

    @property
    def steps_per_epoch(self) -> int:
        return steps_in_epoch(len(self), self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order in which they are visited."""
        order_M = order_of(self.seed, epoch, len(self))
        return order_M if self.members_M is None else self.members_M[order_M]

    def epoch(self, epoch: int, runtime: Runtime, workers: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from `first_step` on. Raises UserError for an image that cannot be read."""
        steps = range(first_step, self.steps_per_epoch)
        workers = min(workers, len(steps)) if self.pixels.drawn_by_host else 0
        loader = DataLoader(
            _Guarded(EpochBatches(self, epoch, runtime.rank, runtime.world_size)),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # the images are mapped, not sent
            pin_memory=runtime.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )
        return map(_raised, loader)


class EpochBatches(Dataset):
    """One epoch as seen by one rank: item i is the rank's part of step i."""

    def __init__(self, data: TrainData, epoch: int, rank: int, world_size: int):
        self.data, self.rank, self.world_size = data, rank, world_size
        self.batches = np.array_split(data.order(epoch), data.steps_per_epoch)
        self.views = data.views_of_epoch(epoch)
        self.mixes = mixes_of(data, epoch)
        self._ahead: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        whole_batch = self.batches[step]
        mine_B = self._mine(step)
        shown = self.shown(mine_B)
        return Batch(
            index_B=torch.from_numpy(mine_B),
            images_BCHW=self.data.pixels.show(shown, self.data.image_size),
            labels_B=torch.from_numpy(self.data.labels_N[mine_B]),
            partner_labels_B=torch.from_numpy(self.data.labels_N[shown.partner_B]),
            weights_B=torch.from_numpy(shown.weight_B),
            teacher_logits_BK=self.soft_labels(step),
            global_size=len(whole_batch),
            shown=shown,
        )

    def _mine(self, step: int) -> np.ndarray:
        return np.array_split(self.batches[step], self.world_size)[self.rank]

    def soft_labels(self, step: int) -> torch.Tensor | None:
        """The cached logits [B, K] of the rank's part of a step, in the views of this epoch; None without a cache."""
        logits_NVK = self.data.logits_NVK
        if logits_NVK is None:
            return None
        ahead = self._ahead
        if step not in ahead:
            ahead = self._ahead = self._read_ahead(logits_NVK, step)
        return torch.from_numpy(ahead[step])

    def _read_ahead(self, logits_NVK: SoftLabels, first: int) -> dict[int, np.ndarray]:
        """Soft labels of this and later steps of this process, read together: sorted, rows of a file lie close."""
        worker, choice_N = get_worker_info(), self.views.choice_N
        assert choice_N is not None  # soft labels come with the cache's own views
        wanted = AHEAD_BYTES // (logits_NVK.shape[2] * logits_NVK.dtype.itemsize)
        mine, count = {}, 0
        for step in range(first, len(self), worker.num_workers if worker else 1):
            mine[step] = self._mine(step)
            count += len(mine[step])
            if count >= wanted:
                break
        index_R = np.concatenate(list(mine.values()))
        rows_RK = logits_NVK[index_R, choice_N[index_R]]
        ends = np.cumsum([len(index_B) for index_B in mine.values()])[:-1]
        return dict(zip(mine, np.split(rows_RK, ends), strict=True))

    def shown(self, index_B: np.ndarray) -> views.Shown:
        """What these images show in this epoch."""
        if self.views.mixed_N is not None:
            return self.views.mixed_N.at(index_B)
        box_N4, flip_N = self.views.box_N4, self.views.flip_N
        plain = views.Shown.plain(index_B, box_N4[index_B], flip_N[index_B])
        if self.mixes is None:
            return plain
        weight_B = self.mixes.weight_N[index_B].astype(np.float32)
        partner_B = np.where(weight_B < 1, self.mixes.partner_N[index_B], index_B)
        return replace(
            plain,
            partner_B=partner_B,
            partner_box_B4=box_N4[partner_B],
            partner_flip_B=flip_N[partner_B],
            weight_B=weight_B,
            paste_B4=self.mixes.paste_N4[index_B].astype(np.float32),
        )


class _Guarded(Dataset):
    """Batches, with a UserError in the place of one that could not be made: a loader process would wrap its sentence
    in a traceback.
    """

    def __init__(self, batches: EpochBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def _raised(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def mixes_of(data: TrainData, epoch: int) -> views.Mixes | None:
    """The mixes of every image in one epoch; None where none are asked for."""
    is_plain = data.mixed_epochs is not None and epoch >= data.mixed_epochs
    if is_plain or not (data.mixup or data.cutmix):
        return None
    rng = _rng(data.seed, epoch, BLEND)
    return views.draw_mixes(rng, len(data.labels_N), data.mixup, data.cutmix, data.members_M)
