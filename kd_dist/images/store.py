"""Decode once: every picture of a split as uint8 RGB in one file, mapped read-only and shared by all ranks of a node.

Two files a split, named after the split's fingerprint, so a store of other data is never picked up:
`<split>-<fingerprint>.u8` holds the pictures one after another as [H, W, 3] bytes, `<split>-<fingerprint>.npy` their
heights and widths, int64 [N, 2]. The sizes are written last; where both are and agree, the pictures are whole. A set
larger than memory has the sizes alone, and its images are decoded each time they are shown.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch

from kd_dist.dataset import SampleList, decode, decoded_size
from kd_dist.errors import UserError
from kd_dist.files import disk_full, write_atomically
from kd_dist.images import views

DECODED_TOGETHER = 256


class Pictures(Protocol):
    """The pictures of a split, wherever they are. `sizes_N2` holds heights and widths, int64.

    `renderer` is the name of the rule by which they are shown, for a cache's header. `drawn_by_host` says whether
    showing them is work for the host's cores, which loader processes can share.
    """

    renderer: str
    drawn_by_host: bool
    sizes_N2: np.ndarray

    def __len__(self) -> int: ...

    def show(self, shown: views.Shown, size: int) -> torch.Tensor:
        """uint8 [B, 3, size, size], channels_last in memory."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The decoded pictures of a split in memory. `sizes_N2`: heights and widths; indexing gives uint8 [H, W, 3]."""

    renderer: ClassVar[str] = views.RENDERER
    drawn_by_host: ClassVar[bool] = True

    bytes_: torch.Tensor
    sizes_N2: np.ndarray
    starts_N: np.ndarray

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
        """Some of the pictures, where they are."""
        return replace(self, sizes_N2=self.sizes_N2[rows_M], starts_N=self.starts_N[rows_M])


@dataclass(frozen=True)
class ImageFiles:
    """The pictures of a split as the files they came in, decoded each time: for sets larger than memory.

    Indexing gives uint8 [H, W, 3]; raises UserError naming the file where it cannot be read.
    """

    renderer: ClassVar[str] = views.RENDERER
    drawn_by_host: ClassVar[bool] = True

    samples: SampleList
    sizes_N2: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.samples.root / self.samples.paths[index]
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
    pictures_path, sizes_path = _paths(samples, folder)
    try:
        sizes_N2 = np.load(sizes_path)
        sizes_N = sizes_N2.prod(axis=1) * 3
        whole = len(sizes_N2) == len(samples) and pictures_path.stat().st_size == sizes_N.sum()
    except (OSError, ValueError, EOFError):
        return None
    if not whole:
        return None
    pictures = torch.from_file(str(pictures_path), shared=False, size=int(sizes_N.sum()), dtype=torch.uint8)
    return Pixels(pictures, sizes_N2, np.concatenate([[0], np.cumsum(sizes_N)[:-1]]))


def build_pixels(samples: SampleList, folder: Path, workers: int, progress: Callable[[int, int], None]) -> None:
    """Decode a split into `folder` unless it is there already. `progress` is told (pictures done, pictures in all).

    Raises UserError naming a picture that cannot be decoded, or the folder where it cannot be written.
    """
    if open_pixels(samples, folder) is not None:
        return
    pictures_path, sizes_path = _paths(samples, folder)
    sizes = []

    def write_pictures(file):
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for start in range(0, len(samples), DECODED_TOGETHER):
                paths = samples.paths[start : start + DECODED_TOGETHER]
                for image_HWC in pool.map(lambda path: decode(samples.root / path), paths):
                    file.write(np.ascontiguousarray(image_HWC).data)
                    sizes.append(image_HWC.shape[:2])
                progress(len(sizes), len(samples))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(pictures_path, write_pictures)
        _write_sizes(sizes_path, sizes)
    except OSError as error:
        reason = "the disk is full" if disk_full(error) else error.strerror
        raise UserError(
            f"cannot write the decoded pictures to {folder} ({reason}); name a folder with {_needed(samples)} free "
            "by --pixels-dir."
        ) from error


def _write_sizes(path: Path, sizes: list[tuple[int, int]]) -> None:
    write_atomically(path, lambda file: np.save(file, np.array(sizes, np.int64)))


def open_files(samples: SampleList, folder: Path) -> ImageFiles | None:
    """A split whose images stay in their files, or None where `measure_files` has not been through them."""
    try:
        sizes_N2 = np.load(_paths(samples, folder)[1])
    except (OSError, ValueError, EOFError):
        return None
    return ImageFiles(samples, sizes_N2) if sizes_N2.shape == (len(samples), 2) else None


def measure_files(samples: SampleList, folder: Path, workers: int, progress: Callable[[int, int], None]) -> None:
    """Note every image's size in `folder`, read from its header, unless that is there already. No picture is kept.

    Raises UserError naming an image that cannot be read, or the folder where it cannot be written.
    """
    if open_files(samples, folder) is not None:
        return
    sizes = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for size in pool.map(lambda path: decoded_size(samples.root / path), samples.paths):
            sizes.append(size)
            progress(len(sizes), len(samples))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_sizes(_paths(samples, folder)[1], sizes)
    except OSError as error:
        reason = "the disk is full" if disk_full(error) else error.strerror
        raise UserError(
            f"cannot write the images' sizes to {folder} ({reason}); name another folder by --pixels-dir."
        ) from error


def _needed(samples: SampleList) -> str:
    return f"about {max(1, int(samples.bytes_N.sum() * 16 / 1e6)):,} MB"


def default_folder(root: Path) -> Path:
    """Where a data set's store goes when nobody says: inside the data folder, or the user's cache folder when that is
    read-only.
    """
    if os.access(root, os.W_OK):
        return root / ".kd_dist"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kd_dist"
