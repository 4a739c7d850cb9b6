"""FFCV's side of row 3, run by the peers' own Python: `ffcv_child.py TRAIN_FOLDER STORE THREADS`, then a line {"size":
PX} a question.
"""

import sys
import time
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

from benchmarks.children import serve, take_standard_output
from kd_dist.config import MEAN, STD

BATCH = 64
CROP_SCALE = (0.35, 1.0)


def store(train: Path, target: Path) -> None:
    """Write the images raw, once."""
    if not target.exists():
        temporary = target.with_suffix(".part")
        writer = DatasetWriter(
            str(temporary), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=2
        )
        writer.from_indexed_dataset(ImageFolder(train))
        temporary.rename(target)


def loader(stored: Path, size: int, threads: int) -> Loader:
    """The pipeline of FFCV's own ImageNet example, normalised to float32. On a CPU the table of NormalizeImage has to
    come before ToTensor: after it, FFCV no longer compiles, and Python visits every pixel.
    """
    mean, std = (np.array(values) * 255 for values in (MEAN, STD))
    image = [
        RandomResizedCropRGBImageDecoder((size, size), scale=CROP_SCALE),
        RandomHorizontalFlip(),
        NormalizeImage(mean, std, np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    return Loader(
        str(stored),
        batch_size=BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )


def main() -> None:
    train, stored, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    answers = take_standard_output()
    loaders: dict[int, Loader] = {}
    store(train, stored)

    def answer(question: dict) -> dict:
        size = question["size"]
        if size not in loaders:
            loaders.clear()
            loaders[size] = loader(stored, size, threads)
        started, images = time.perf_counter(), 0
        for images_BCHW, _ in loaders[size]:
            images += len(images_BCHW)
        return {"seconds": (time.perf_counter() - started) / images, "images": images}

    serve(answer, answers)


if __name__ == "__main__":
    main()
