"""Row 3: images a second out of our input path, torchvision's and FFCV's, the same work on all sides: every training
image once, RandomResizedCrop(0.35-1), flip, float32 normalised, batches of 64 on the device.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.children import Child
from benchmarks.measure import Arm, Goal, Row, images_per_second, interleaved, row
from benchmarks.setting import Bench
from benchmarks.steps import synchronise
from kd_dist import config, job
from kd_dist.config import DistillConfig
from kd_dist.training import objectives

BATCH = 64
CROP_SCALE = (0.35, 1.0)
OVER_TORCHVISION = {64: Goal(5), 128: Goal(3), 160: Goal(2)}
OVER_FFCV = Goal(1.0)
WORKERS = (0, 1, 2, 4)
TRIAL_IMAGES = 1600  # of torchvision's, to find its best number of workers


def loaders(bench: Bench) -> Iterator[Row]:
    """Our path against the others at each size, all of them in turns."""
    with peers.ffcv_child(bench) as ffcv:
        for size in (32,) if bench.quick else OVER_TORCHVISION:
            yield from _at_size(bench, size, ffcv)


def _at_size(bench: Bench, size: int, ffcv: Child | None) -> Iterator[Row]:
    if ffcv is not None:
        ffcv.ask(size=size)  # it stores the images and compiles now, not beside the others' trials
    our_workers = best_workers(lambda workers: OurPath(bench, size, workers), bench)
    their_workers = best_workers(lambda workers: TorchvisionPath(bench, size, workers, TRIAL_IMAGES), bench)
    arms = {"ours": OurPath(bench, size, our_workers), "torchvision": TorchvisionPath(bench, size, their_workers)}
    if ffcv is not None:
        arms["FFCV raw"] = lambda: ffcv.ask(size=size)["seconds"]
    taken = interleaved(arms, bench.effort(30, least=3))
    facts = {**images_per_second(taken), "workers of ours": our_workers, "workers of torchvision": their_workers}
    goal = OVER_TORCHVISION.get(size)
    yield row(f"3 input path / torchvision, {size} px", taken["torchvision"] / taken["ours"], goal=goal, facts=facts)
    name = f"3 input path / FFCV raw, {size} px"
    if ffcv is None:
        yield Row(name, None, goal=OVER_FFCV, note=peers.HOW_TO_INSTALL)
    else:
        yield row(name, taken["FFCV raw"] / taken["ours"], goal=OVER_FFCV, facts=facts)


def best_workers(arm_with: Callable[[int], Arm], bench: Bench) -> int:
    """The number of loader processes at which an arm is fastest here; the second of two passes counts."""
    seconds = {}
    for workers in (0, 2) if bench.quick else WORKERS:
        arm = arm_with(workers)
        arm()
        seconds[workers] = arm()
    return min(seconds, key=seconds.get)


class OurPath:
    """An arm: an epoch of batches as the trainer gets and prepares them; gives the seconds an image took."""

    def __init__(self, bench: Bench, size: int, workers: int):
        settings = bench.settings(
            DistillConfig, image_size=size, batch_size=BATCH, alpha=0.0, workers=workers, crop_scale=CROP_SCALE
        )
        crops = job.fresh_crops(settings.augmentation, settings.seed, bench.data)
        supervision = job.Supervision(objectives.hard(bench.classes, 0.0), crops)
        self.trainer = bench.trainer(settings, bench.network(settings.distillation.student), supervision)
        self.epoch = 0

    def __call__(self) -> float:
        trainer, images = self.trainer, 0
        self.epoch += 1
        started = time.perf_counter()
        for batch in trainer.data.epoch(self.epoch, trainer.runtime, trainer.execution.workers, 0):
            images += len(trainer.prepare(batch).images_BCHW)
        synchronise(trainer.runtime.device)
        return (time.perf_counter() - started) / images


class TorchvisionPath:
    """An arm: an epoch of torchvision's ImageFolder with v2 transforms on uint8 tensors, out of a DataLoader whose
    workers stay between epochs, as its documentation recommends.
    """

    def __init__(self, bench: Bench, size: int, workers: int, images: int | None = None):
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        transforms = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(size, scale=CROP_SCALE, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.MEAN, config.STD),
            ]
        )
        self.device = bench.runtime.device
        images = ImageFolder(Path(bench.data.samples.root) / "train", transforms)
        some = None if images is None else torch.randperm(len(images))[:images].tolist()
        self.loader = torch.utils.data.DataLoader(
            images if some is None else torch.utils.data.Subset(images, some),
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=bench.on_gpu,
        )

    def __call__(self) -> float:
        images = 0
        started = time.perf_counter()
        for images_BCHW, _ in self.loader:
            images += len(images_BCHW.to(self.device, non_blocking=True))
        synchronise(self.device)
        return (time.perf_counter() - started) / images
