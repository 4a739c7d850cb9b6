"""Decode once: every picture of a split as uint8 RGB in one file, mapped read-only and shared by all ranks of a node.

Two files a split, named after the split's fingerprint, so a store of other data is never picked up:
`<split>-<fingerprint>.u8` holds the pictures one after another as [H, W, 3] bytes, `<split>-<fingerprint>.npy` their
heights and widths, int64 [N, 2]. The sizes are written last: where they are, the pictures are whole.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kd_dist.dataset import SampleList, decode
from kd_dist.errors import UserError
from kd_dist.files import disk_full, write_atomically

DECODED_TOGETHER = 256


@dataclass(frozen=True)
class Pixels:
    """The decoded pictures of a split. `sizes_N2` holds heights and widths; indexing gives uint8 [H, W, 3]."""

    bytes_: torch.Tensor
    sizes_N2: np.ndarray
    starts_N: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def __getitem__(self, index: int) -> torch.Tensor:
        height, width = self.sizes_N2[index].tolist()
        return self.bytes_.as_strided((height, width, 3), (width * 3, 3, 1), int(self.starts_N[index]))


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
        write_atomically(sizes_path, lambda file: np.save(file, np.array(sizes, np.int64)))
    except OSError as error:
        reason = "the disk is full" if disk_full(error) else error.strerror
        raise UserError(
            f"cannot write the decoded pictures to {folder} ({reason}); name a folder with {_needed(samples)} free "
            "by --pixels-dir."
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
