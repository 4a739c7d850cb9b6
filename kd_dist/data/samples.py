"""The ordered list of a set's images, and the fingerprint that binds a cache to it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kd_dist.errors import UserError
from kd_dist.fingerprint import UNKNOWN, fingerprint_of

SPLITS = ("train", "val")
UNLABELLED = "unlabelled/"  # begins the paths of images without labels, which have a folder of their own


@dataclass(frozen=True, eq=False)
class SampleList:
    """The images of one split in their one order: sample i is row i of everything made from them.

    The order is by class, then by the path below the class's folder, both by code point. Images without a label come
    last in train; their paths begin with UNLABELLED.
    """

    split: str
    root: Path
    classes: tuple[str, ...]  # a label is a position in here
    paths: tuple[str, ...]  # relative to root, with "/": "train/n02086240/x.JPEG"
    labels_N: np.ndarray  # int64, UNKNOWN where there is none
    bytes_N: np.ndarray  # int64, file sizes
    sha256_N32: np.ndarray  # uint8, digests of the files' contents
    unlabelled: Path | None = None  # the folder of the images without labels

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, rows_M: np.ndarray, name: str) -> "SampleList":
        """The samples in these rows as a list of their own, with its own fingerprint; `name` is its split's."""
        paths = tuple(self.paths[row] for row in rows_M)
        return replace(
            self,
            split=name,
            paths=paths,
            labels_N=self.labels_N[rows_M],
            bytes_N=self.bytes_N[rows_M],
            sha256_N32=self.sha256_N32[rows_M],
        )

    def file(self, path: str) -> Path:
        """Where one of the listed images is on the disk."""
        if self.unlabelled is not None and path.startswith(UNLABELLED):
            return self.unlabelled / path.removeprefix(UNLABELLED)
        return self.root / path

    @cached_property
    def is_labelled_N(self) -> np.ndarray:
        """Which images have a label: bool."""
        return self.labels_N != UNKNOWN

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes with any byte, label, name or place in the order."""
        return fingerprint_of(self.paths, self.labels_N, self.sha256_N32)


@dataclass(frozen=True)
class Dataset:
    """Both splits of one set, with the same classes. `layout` says in a few words how it lies on the disk, `ignored` in
    a line each which files were not taken.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train: SampleList
    val: SampleList
    layout: str = "class folders in train/ and val/"
    ignored: tuple[str, ...] = ()

    def split(self, name: str) -> SampleList:
        """The sample list of "train" or "val"."""
        return {"train": self.train, "val": self.val}[name]

    def notes(self) -> list[str]:
        """What a user should know of the set, a line each: files not taken, and files with the same content."""
        return [*self.ignored, *_notes_on_copies(self.train, self.val)]


def _notes_on_copies(train: SampleList, val: SampleList) -> list[str]:
    """A line on files with the same content in both splits, and one on those in two classes."""
    paths, labels_N = train.paths + val.paths, np.concatenate([train.labels_N, val.labels_N])
    sha256_N32 = np.concatenate([train.sha256_N32, val.sha256_N32])
    in_both = [(a, b) for a, b in _copies(sha256_N32, np.arange(len(paths))) if a < len(train) <= b]
    labelled = _copies(sha256_N32, np.flatnonzero(labels_N != UNKNOWN))
    in_two_classes = [(a, b) for a, b in labelled if labels_N[a] != labels_N[b]]
    found = {"in train and in val": in_both, "in two classes": in_two_classes}
    return [
        f"warning: files with the same content {where}: {len(those):,}, such as {paths[those[0][0]]} and "
        f"{paths[those[0][1]]}"
        for where, those in found.items()
        if those
    ]


def _copies(sha256_N32: np.ndarray, rows_M: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of these rows that hold the same content, each row with the next one that does."""
    order_M = rows_M[np.argsort(sha256_N32[rows_M, :8].copy().view("<u8")[:, 0], kind="stable")]
    repeats = np.flatnonzero((sha256_N32[order_M[1:]] == sha256_N32[order_M[:-1]]).all(axis=1))
    return [(int(order_M[at]), int(order_M[at + 1])) for at in repeats]


def unreadable(path: Path, why: object) -> UserError:
    """The error for an image that cannot be read."""
    return UserError(f"cannot read the image {path} ({why}): put back a good copy of it, or take it out of the set.")
