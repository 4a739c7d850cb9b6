"""Scanning: every image of a set gets its index, in one order, and a digest of its content."""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kd_dist.data.fetch import Progress
from kd_dist.data.layout import File, Ignored, Layout, lay_out, list_unlabelled
from kd_dist.data.samples import Dataset, SampleList, unreadable
from kd_dist.errors import UserError
from kd_dist.files import write_atomically

STORE_FOLDER = ".kd_dist"  # in the set's own folder: digests and decoded images


def default_folder(data: Path) -> Path:
    """Where a set's digests and decoded images go when nobody says: inside its folder, or in the user's cache folder
    when that is read-only. `data` is the folder, or the CSV file in it.
    """
    root = data.parent if data.is_file() else data
    if os.access(root, os.W_OK):
        return root / STORE_FOLDER
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kd_dist"


def scan(
    data: Path,
    *,
    val_share: float | None = None,
    unlabelled: Path | None = None,
    manifest_folder: Path | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Dataset:
    """List the images of a folder or a CSV file in their one order, with a digest of each.

    Classes are the sorted class folders, or labels; images are the files in a class folder, and in folders below it,
    with one of IMAGE_SUFFIXES, in any case. What starts with a dot is left out; other files, empty folders and
    STRAY_FOLDERS are left out with a note. `val_share` splits val off train, see in_val; the images of the folder
    `unlabelled` follow those of train. With `manifest_folder` the digests are kept there, and as long as no file's
    path, size or time stamps change, a later scan need not read the images. Raises UserError where the set is unusable.
    """
    if val_share is not None and not 0 < val_share < 1:
        raise UserError(f"--val-share {val_share:g} must lie between 0 and 1, such as 0.1.")
    ignored = Ignored()
    layout = lay_out(data, val_share, ignored)
    extra = [] if unlabelled is None else list_unlabelled(unlabelled, layout, ignored)
    files = [*layout.train, *(layout.val or ()), *extra]
    places = [data] if unlabelled is None else [data, unlabelled]
    sha256_N32 = _digests(places, files, manifest_folder, workers, progress)
    whole = _sample_list(layout, files, sha256_N32, unlabelled)
    in_val_N = np.zeros(len(files), bool)
    if layout.val is None:
        assert val_share is not None  # without it a layout without val is refused
        in_val_N[: len(layout.train)] = _split_off(layout, sha256_N32[: len(layout.train)], val_share)
    else:
        in_val_N[len(layout.train) : len(files) - len(extra)] = True
    train, val = (whole.at(np.flatnonzero(is_N), split) for split, is_N in (("train", ~in_val_N), ("val", in_val_N)))
    about = _about(layout, val_share, len(extra))
    return Dataset(layout.name, layout.root, layout.classes, train, val, about, ignored.lines())


def _about(layout: Layout, val_share: float | None, unlabelled: int) -> str:
    share = "" if val_share is None else f", --val-share {val_share:g}"
    return layout.about + share + (f", {unlabelled:,} images without labels" if unlabelled else "")


def _sample_list(layout: Layout, files: Sequence[File], sha256_N32: np.ndarray, unlabelled: Path | None) -> SampleList:
    return SampleList(
        split="all",
        root=layout.root,
        classes=layout.classes,
        paths=tuple(file.path for file in files),
        labels_N=np.array([file.label for file in files], dtype=np.int64),
        bytes_N=np.array([file.status.st_size for file in files], dtype=np.int64),
        sha256_N32=sha256_N32,
        unlabelled=unlabelled,
    )


# ----------------------------------------------------------------------------------------------------------- val share


def in_val(sha256_N32: np.ndarray, share: float) -> np.ndarray:
    """Which images are val's where a share of them is: bool [N].

    Those whose digest's last 8 bytes, read as a number in [0, 1), are below the share. So an image's side depends on
    its content alone: not on its name or class, nor on which other images there are; copies are on one side.
    """
    return _place_of(sha256_N32) < share


def _place_of(sha256_N32: np.ndarray) -> np.ndarray:
    """Each digest's last 8 bytes as a number in [0, 1). Folds go by the first bytes, and are independent of these."""
    return np.ascontiguousarray(sha256_N32[:, 24:]).view(">u8")[:, 0].astype(np.float64) / 2**64


def _split_off(layout: Layout, sha256_N32: np.ndarray, share: float) -> np.ndarray:
    """Which images are val's: bool [N]. Raises UserError where a class has none on one side."""
    place_N, in_val_N = _place_of(sha256_N32), in_val(sha256_N32, share)
    labels_N = np.array([file.label for file in layout.train])
    places = [place_N[labels_N == label] for label in range(len(layout.classes))]
    least = math.floor(1000 * max(place_M.min() for place_M in places) + 1) / 1000
    works = least <= min(place_M.max() for place_M in places)
    for label, name in enumerate(layout.classes):
        sides = set(in_val_N[labels_N == label].tolist())
        if sides == {True, False}:
            continue
        side = "train" if True in sides else "val"
        mend = "add images of it, or write the split into a CSV file of path,label,split"
        if works:
            mend = f"{least:g} is the least share that gives every class images on both sides"
        raise UserError(f"--val-share {share:g} leaves {side} no image of the class {name}: {mend}.")
    return in_val_N


# ------------------------------------------------------------------------------------------------------------- digests


def _digests(
    places: Sequence[Path], files: Sequence[File], manifest_folder: Path | None, workers: int, progress: Progress | None
) -> np.ndarray:
    """SHA-256 of each file's content, uint8 [N, 32], from the manifest where it still holds."""
    if manifest_folder is None:
        return _hash_files(files, workers, progress)
    where = b"\n".join(os.fsencode(place.resolve()) for place in places)
    key = _listing_key(where, files)
    manifest = manifest_folder / f"digests-{hashlib.sha256(where).hexdigest()[:16]}.npz"
    sha256_N32 = _read_manifest(manifest, key, len(files))
    if sha256_N32 is None:
        sha256_N32 = _hash_files(files, workers, progress)
        _write_manifest(manifest, key, sha256_N32)
    return sha256_N32


def _listing_key(where: bytes, files: Sequence[File]) -> str:
    """Hex SHA-256 over the set's places and each file's path, size and times of last change (content, and inode)."""
    lines = [f"{f.path}\0{f.status.st_size}\0{f.status.st_mtime_ns}\0{f.status.st_ctime_ns}\n" for f in files]
    return hashlib.sha256(where + b"\n" + "".join(lines).encode()).hexdigest()


def _read_manifest(manifest: Path, key: str, count: int) -> np.ndarray | None:
    """The digests kept for exactly this listing, or None: a manifest only saves time, so no fault of it is an error."""
    try:
        with np.load(manifest, allow_pickle=False) as kept:
            sha256_N32 = kept["sha256_N32"]
            valid = str(kept["key"]) == key and sha256_N32.shape == (count, 32) and sha256_N32.dtype == np.uint8
            return sha256_N32 if valid else None
    except Exception:  # np.load raises almost anything on broken bytes
        return None


def _write_manifest(manifest: Path, key: str, sha256_N32: np.ndarray) -> None:
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(manifest, lambda file: np.savez(file, key=key, sha256_N32=sha256_N32))
    except OSError:  # no place for it: the next scan reads the images again
        return


def _hash_files(files: Sequence[File], workers: int, progress: Progress | None) -> np.ndarray:
    sha256_N32 = np.empty((len(files), 32), dtype=np.uint8)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for i, digest in enumerate(pool.map(_content_digest, (Path(file.at) for file in files))):
            sha256_N32[i] = np.frombuffer(digest, dtype=np.uint8)
            if progress:
                progress("taking digests of the images", i + 1, len(files))
    return sha256_N32


def _content_digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unreadable(path, error.strerror) from error
