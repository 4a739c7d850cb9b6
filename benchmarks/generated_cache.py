"""A valid cache of any size, of generated rows, in seconds and with flat memory: what benchmarks of reading need.

    python -m benchmarks.generated_cache /tmp/logits.h5 --images 1000000 --views 10

Rows are noise, with the label's class raised so that top-1 is above chance; the same arguments give the same bytes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kd_dist.cache import BLOCK_SAMPLES, TOP_K, Block, CachePlan, Header, Table, TeacherRow
from kd_dist.cache.assemble import assemble
from kd_dist.cache.format import SPLITS, checksum_file_of
from kd_dist.cache.topk import shorten
from kd_dist.files import publish

VAL_IMAGES = 1024


@dataclass(frozen=True)
class Made:
    """A column over N and V that is made piece by piece when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (samples [B, 1], views [V]) -> rows [B, V, ...]

    def __getitem__(self, samples: slice) -> np.ndarray:
        return self.make(np.arange(samples.start, samples.stop)[:, None], np.arange(self.shape[1])).astype(self.dtype)


def write(path: Path, images: int, views: int, classes: int = 10, top_k: int = 0, val_images: int = VAL_IMAGES) -> Path:
    """Write a finished cache of `images` x `views` generated train rows, with its digest file, over what is there.

    val has `val_images` images in one view. Memory grows with the number of images (about 200 bytes each, mostly their
    paths), not with views or classes.
    """
    header = _header(classes, top_k)
    tables = {"train": _table("train", images, views, classes), "val": _table("val", val_images, 1, classes)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        digest = assemble(temporary, CachePlan(header, tables), partial(_rows, header, tables))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    checksum_file_of(path).write_text(f"{digest}  {path.name}\n")
    return path


def _header(classes: int, top_k: int) -> Header:
    teacher = TeacherRow("ab" * 32, "noise", seed=0, fold=-1, image_size=64, val_top1=0.5)
    return Header(
        classes=tuple(f"class{label:05d}" for label in range(classes)),
        dataset="generated rows",
        image_size=64,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        renderer="generated/1",
        compute_dtype="float32",
        view_rule="generated/1",
        crop_scale=(0.35, 1.0),
        seed=0,
        created="2026-01-01T00:00:00+00:00",
        software="benchmarks.generated_cache",
        teachers=(teacher,),
        features=(TOP_K,) if top_k else (),
        top_k=top_k,
    )


def _table(split: str, images: int, views: int, classes: int) -> Table:
    def boxes(index_B1: np.ndarray, view_V: np.ndarray) -> np.ndarray:
        both_BV, index_BV = index_B1 + view_V, index_B1 + 0 * view_V
        return np.stack([index_BV % 7, both_BV % 5, index_BV % 3 + 90, both_BV % 4 + 80], axis=2)

    labels_N = np.arange(images) % classes
    return Table(
        paths=tuple(f"{split}/{label:05d}/{index:09d}.JPEG" for index, label in enumerate(labels_N)),
        labels_N=labels_N,
        bytes_N=np.arange(images) + 1,
        sha256_N32=np.random.default_rng(len(split)).integers(0, 256, (images, 32), dtype=np.uint8),
        teacher_N=np.zeros(images, np.int16),
        box_NV4=Made((images, views, 4), np.dtype("<i2"), boxes),
        flip_NV=Made((images, views), np.dtype("u1"), lambda index_B1, view_V: (index_B1 + view_V) % 2),
    )


def _rows(header: Header, tables: dict[str, Table], block: Block) -> tuple[np.ndarray, ...]:
    """What a teacher might have given for a block: a function of its place alone."""
    rng = np.random.default_rng([SPLITS.index(block.split), block.view, block.start // BLOCK_SAMPLES])
    logits_BK = 2 * rng.standard_normal((len(block), len(header.classes)), np.float32)
    logits_BK[np.arange(len(block)), tables[block.split].labels_N[block.start : block.stop]] += 4
    logits_BK = logits_BK.astype(np.float16)
    return shorten(logits_BK, header.top_k) if header.top_k else (logits_BK,)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generated_cache", description=write.__doc__)
    parser.add_argument("path", type=Path, help="the cache to write")
    parser.add_argument("--images", type=int, required=True, help="of train")
    parser.add_argument("--views", type=int, default=10, help="of each train image [10]")
    parser.add_argument("--classes", type=int, default=10, help="[10]")
    parser.add_argument("--top-k", type=int, default=0, help="keep the K largest logits of a row [0: all]")
    options = parser.parse_args()
    write(options.path, options.images, options.views, options.classes, options.top_k)


if __name__ == "__main__":
    main()
