"""Decode once: every image of a split as uint8 RGB in one file, mapped read-only and shared by all ranks of a node.

Two files a split, named after the split's fingerprint, so a store of other data is never picked up:
`<split>-<fingerprint>.u8` holds the images one after another as [H, W, 3] bytes, `<split>-<fingerprint>.npy` their
heights and widths, int64 [N, 2]. The sizes are written last; where both are and agree, the images are whole. A set
larger than memory has the sizes alone, and its images are decoded each time they are shown. In the set's own folder,
DATA/.kd_dist, the files of earlier states of the split are deleted; a folder that several sets may share is left alone.
"""

import contextlib
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch

from kd_dist.data.samples import SampleList
from kd_dist.data.scan import STORE_FOLDER
from kd_dist.errors import UserError
from kd_dist.files import disk_full, write_atomically
from kd_dist.images import views
from kd_dist.images.decode import decode, decoded_size

DECODED_TOGETHER = 256
ABANDONED_SECONDS = 24 * 3600  # after which a temporary file that nobody writes to is of a killed process


class ImageStore(Protocol):
    """The images of a split, wherever they are. `sizes_N2` holds heights and widths, int64.

    `renderer` is the name of the rule by which they are shown, for a cache's header. `drawn_by_host` says whether
    showing them is work for the host's cores, which loader processes can share.
    """

    @property
    def renderer(self) -> str: ...

    @property
    def drawn_by_host(self) -> bool: ...

    @property
    def sizes_N2(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def show(self, shown: views.Shown, size: int) -> torch.Tensor:
        """uint8 [B, 3, size, size], channels_last in memory."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The decoded images of a split in memory. `sizes_N2`: heights and widths; indexing gives uint8 [H, W, 3]."""

    renderer: ClassVar[str] = views.RENDERER
    drawn_by_host: ClassVar[bool] = True

    bytes_: torch.Tensor
    sizes_N2: np.ndarray
    starts_N: np.ndarray
    path: Path | None = None  # of the mapped file

    def __reduce__(self) -> tuple[Callable[..., "Pixels"], tuple[object, ...]]:
        """Who unpickles mapped images maps the same file again."""
        if self.path is None:
            return Pixels, (self.bytes_, self.sizes_N2, self.starts_N)
        return _mapped, (self.path, len(self.bytes_), self.sizes_N2, self.starts_N)

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def __getitem__(self, index: int) -> torch.Tensor:
        height, width = self.sizes_N2[index].tolist()
        return self.bytes_.as_strided((height, width, 3), (width * 3, 3, 1), int(self.starts_N[index]))

    def crops(self, index_B: np.ndarray, box_B4: np.ndarray) -> Iterator[torch.Tensor]:
        """Of each of these images one box, uint8 [1, 3, h, w], where it lies in memory."""
        top_B, left_B, height_B, width_B = box_B4.astype(np.int64).T
        row_B = self.sizes_N2[index_B, 1] * 3
        start_B = self.starts_N[index_B] + top_B * row_B + left_B * 3
        places = zip(*(column_B.tolist() for column_B in (height_B, width_B, row_B, start_B)), strict=True)
        for height, width, row, start in places:  # plain numbers: this loop is as fast as the resizing lets it be
            yield self.bytes_.as_strided((1, 3, height, width), (height * row, 1, row, 3), start)

    def show(self, shown: views.Shown, size: int) -> torch.Tensor:
        """uint8 [B, 3, size, size] on the CPU."""
        return views.show(self, shown, size)

    def at(self, rows_M: np.ndarray) -> "Pixels":
        """Some of the images, where they are."""
        return replace(self, sizes_N2=self.sizes_N2[rows_M], starts_N=self.starts_N[rows_M])


@dataclass(frozen=True)
class ImageFiles:
    """The images of a split as the files they came in, decoded each time: for sets larger than memory.

    Indexing gives uint8 [H, W, 3]; raises UserError naming the file where it cannot be read.
    """

    renderer: ClassVar[str] = views.RENDERER
    drawn_by_host: ClassVar[bool] = True

    samples: SampleList
    sizes_N2: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.samples.file(self.samples.paths[index])
        image_HWC = torch.from_numpy(decode(path))
        if image_HWC.shape[:2] != tuple(self.sizes_N2[index]):
            height, width = self.sizes_N2[index]
            raise UserError(
                f"{path} is {image_HWC.shape[0]} x {image_HWC.shape[1]} pixels now, it was {height} x {width} when the "
                "set was listed; leave the images alone while a job runs, and start it again."
            )
        return image_HWC

    def crops(self, index_B: np.ndarray, box_B4: np.ndarray) -> Iterator[torch.Tensor]:
        """Of each of these images one box, uint8 [1, 3, h, w]."""
        for index, (top, left, height, width) in zip(index_B.tolist(), box_B4.tolist(), strict=True):
            yield self[index][top : top + height, left : left + width].permute(2, 0, 1)[None]

    def show(self, shown: views.Shown, size: int) -> torch.Tensor:
        """uint8 [B, 3, size, size] on the CPU."""
        return views.show(self, shown, size)


def _paths(samples: SampleList, folder: Path) -> tuple[Path, Path]:
    stem = f"{samples.split}-{samples.fingerprint[:16]}"
    return folder / f"{stem}.u8", folder / f"{stem}.npy"


def open_pixels(samples: SampleList, folder: Path) -> Pixels | None:
    """Map a split's store, or None where there is no whole one for exactly this data."""
    images_path, sizes_path = _paths(samples, folder)
    try:
        sizes_N2 = np.load(sizes_path)
        sizes_N = sizes_N2.prod(axis=1) * 3
        whole = len(sizes_N2) == len(samples) and images_path.stat().st_size == sizes_N.sum()
    except (OSError, ValueError, EOFError):
        return None
    if not whole:
        return None
    return _mapped(images_path, int(sizes_N.sum()), sizes_N2, np.concatenate([[0], np.cumsum(sizes_N)[:-1]]))


def _mapped(path: Path, size: int, sizes_N2: np.ndarray, starts_N: np.ndarray) -> Pixels:
    """Map a store's file of `size` bytes, which other processes then keep."""
    images = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    _keep_in_use(path, images)
    return Pixels(images, sizes_N2, starts_N, path)


def build_pixels(samples: SampleList, folder: Path, workers: int, progress: Callable[[int, int], None]) -> int:
    """Decode a split into `folder` unless it is there already, and give the bytes written. `progress` is called with
    (images done, images in all).

    Raises UserError naming an image that cannot be decoded, or the folder where it cannot be written.
    """
    remove_stale(samples, folder)
    if open_pixels(samples, folder) is not None:
        return 0
    images_path, sizes_path = _paths(samples, folder)
    sizes = []

    def write_images(file):
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for start in range(0, len(samples), DECODED_TOGETHER):
                paths = samples.paths[start : start + DECODED_TOGETHER]
                for image_HWC in pool.map(lambda path: decode(samples.file(path)), paths):
                    file.write(np.ascontiguousarray(image_HWC).data)
                    sizes.append(image_HWC.shape[:2])
                progress(len(sizes), len(samples))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(images_path, write_images)
        _write_sizes(sizes_path, sizes)
        return images_path.stat().st_size
    except OSError as error:
        reason = "the disk is full" if disk_full(error) else error.strerror
        raise UserError(
            f"cannot write the decoded images to {folder} ({reason}); name a folder with {_needed(samples)} free "
            "by --pixels-dir."
        ) from error


def remove_stale(samples: SampleList, folder: Path) -> None:
    """Delete the files of other states of this split from the set's own folder, and abandoned temporary files.

    What another process has mapped stays: on a network disk its pages would be gone with the file. Errors are passed
    over, since such files only take space.
    """
    if folder.resolve() != (samples.root / STORE_FOLDER).resolve():
        return
    current = {path.name for path in _paths(samples, folder)}
    for path in sorted(folder.glob(f"{samples.split}-*"), reverse=True):  # .u8 before .npy
        if path.suffix in (".u8", ".npy") and path.name not in current:
            with contextlib.suppress(OSError):
                _delete_unused(path)
    for path in folder.glob(f".{samples.split}-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _delete_unused(path: Path) -> None:
    """Delete a file of a store, and raise OSError where a process has it mapped or that cannot be found out."""
    if path.with_suffix(".u8").exists():
        with open(path.with_suffix(".u8"), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.unlink()


def _keep_in_use(path: Path, mapped: torch.Tensor) -> None:
    """Hold a shared lock on a mapped file as long as the tensor lives, for `remove_stale` to see."""
    descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(mapped, os.close, descriptor)
    with contextlib.suppress(OSError):  # a filesystem without locks, where nothing is deleted either
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _write_sizes(path: Path, sizes: list[tuple[int, int]]) -> None:
    write_atomically(path, lambda file: np.save(file, np.array(sizes, np.int64)))


def open_files(samples: SampleList, folder: Path) -> ImageFiles | None:
    """A split whose images stay in their files, or None where `measure_files` has not been through them."""
    try:
        sizes_N2 = np.load(_paths(samples, folder)[1])
    except (OSError, ValueError, EOFError):
        return None
    return ImageFiles(samples, sizes_N2) if sizes_N2.shape == (len(samples), 2) else None


def measure_files(samples: SampleList, folder: Path, workers: int, progress: Callable[[int, int], None]) -> int:
    """Write every image's size, read from its header, into `folder` unless that is there already; gives the bytes
    written.

    Raises UserError naming an image that cannot be read, or the folder where it cannot be written.
    """
    remove_stale(samples, folder)
    if open_files(samples, folder) is not None:
        return 0
    sizes = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for size in pool.map(lambda path: decoded_size(samples.file(path)), samples.paths):
            sizes.append(size)
            progress(len(sizes), len(samples))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sizes_path = _paths(samples, folder)[1]
        _write_sizes(sizes_path, sizes)
        return sizes_path.stat().st_size
    except OSError as error:
        reason = "the disk is full" if disk_full(error) else error.strerror
        raise UserError(
            f"cannot write the images' sizes to {folder} ({reason}); name another folder by --pixels-dir."
        ) from error


def _needed(samples: SampleList) -> str:
    return f"about {max(1, int(samples.bytes_N.sum() * 16 / 1e6)):,} MB"
