"""The data set of a job, opened: found or fetched, listed, decoded once a node, and placed in memory or on a GPU."""

import os
from dataclasses import dataclass
from pathlib import Path

from kd_dist.cache import Cache
from kd_dist.config import DataConfig
from kd_dist.data.releases import locate
from kd_dist.data.samples import SPLITS, Dataset, SampleList
from kd_dist.data.scan import default_folder, scan
from kd_dist.dist.cores import available_cores, spare_cores
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.images import device as resident
from kd_dist.images.device import free_bytes
from kd_dist.images.store import ImageStore, Pixels, build_pixels, measure_files, open_files, open_pixels
from kd_dist.job.progress import progress_by_name, progress_lines, say

RESIDENT_SHARE = 0.4  # of a GPU's free memory that images may take unasked; the network needs the rest


@dataclass(frozen=True)
class Data:
    """A data set with its images. `threads` of a rank may draw them ahead of a forward pass."""

    samples: Dataset
    pixels: dict[str, ImageStore]
    threads: int = 0

    def require_fit(self, cache: Cache) -> None:
        """Raise UserError, naming both values, where a cache was made of anything but this data."""
        samples = self.samples
        cache.check_fits(samples.name, samples.classes, {"train": samples.train, "val": samples.val})

    def split(self, name: str) -> tuple[SampleList, ImageStore]:
        """(sample list, pixels) of "train" or "val"."""
        return self.samples.split(name), self.pixels[name]


def open_data(source: DataConfig, runtime: Runtime) -> Data:
    """Find the data (fetching it where that is allowed), list it, and decode it, each once a node; then place the
    images.

    Raises UserError on every rank for data that is not there, damaged, or cannot be fetched or decoded.
    """
    root = Path(runtime.once_a_node("find data", lambda: str(_find(source, runtime))))
    store = Path(source.pixels_dir) if source.pixels_dir else default_folder(root)
    runtime.once_a_node("decode data", lambda: _prepare(root, store, source, runtime))
    samples = _scan(root, store, source)
    for note in samples.notes() if runtime.is_main else ():
        say(runtime, note)
    find = open_files if source.pixels == "off" else open_pixels
    opened = {split: find(samples.split(split), store) for split in SPLITS}
    pixels = {split: found for split, found in opened.items() if found is not None}
    if len(pixels) < len(SPLITS):
        raise UserError(f"the decoded images in {store} vanished or belong to other data; run the same command again.")
    stored = {split: found for split, found in pixels.items() if isinstance(found, Pixels)}
    placed: dict[str, ImageStore] = _placed(stored, source.pixels, runtime) if stored else {**pixels}
    return Data(samples, placed, spare_cores(runtime.device.type, runtime.local_world_size))


def _prepare(root: Path, store: Path, source: DataConfig, runtime: Runtime) -> None:
    """Digest and decode the images where that is not done yet, or measure them where they are read from their files."""
    workers = max(1, available_cores() // 2)
    from_files = source.pixels == "off"
    make, what = (measure_files, "measuring") if from_files else (build_pixels, "decoding")
    samples = _scan(root, store, source, workers)
    written = 0
    for split in SPLITS:
        written += make(samples.split(split), store, workers, progress_lines(runtime, f"{what} {split} images"))
    if written:
        kept = "sizes of the images" if from_files else "decoded images"
        say(runtime, f"wrote {kept} to {store}: {written / 1e6:,.1f} MB; a later job reads them there")


def _scan(root: Path, store: Path, source: DataConfig, workers: int = 1) -> Dataset:
    unlabelled = Path(source.unlabelled) if source.unlabelled else None
    return scan(root, val_share=source.val_share, unlabelled=unlabelled, manifest_folder=store, workers=workers)


def _find(source: DataConfig, runtime: Runtime) -> Path:
    typed = source.data or os.environ.get("KD_DIST_DATA")
    progress = progress_by_name(runtime)
    data, named = Path(typed or "data"), (source.release, source.archive, source.sha256)
    return locate(data, *named, explicit=bool(typed), val_share=source.val_share, progress=progress)


def _placed(pixels: dict[str, Pixels], where: str, runtime: Runtime) -> dict[str, ImageStore]:
    """The decoded images in the host's memory or on the device, on all ranks alike."""
    needed = sum(len(split.bytes_) for split in pixels.values())
    free = min(runtime.gather(free_bytes(runtime.device)))
    if where == "auto":
        where = "device" if runtime.device.type == "cuda" and needed < RESIDENT_SHARE * free else "memory"
    if where == "memory":
        return {**pixels}
    if needed > free:
        raise UserError(
            f"--pixels device needs {needed / 1e9:.1f} GB for the decoded images, {runtime.device} has "
            f"{free / 1e9:.1f} GB free; use --pixels memory."
        )
    on_device, fault = resident.place(pixels, runtime.device)
    fault = next(filter(None, runtime.gather(fault)), None)
    if fault and runtime.is_main:
        print(f"kd_dist: {fault}; the host draws all images instead, as with --pixels memory", flush=True)
    return {**pixels} if fault else {**on_device}
