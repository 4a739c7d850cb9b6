"""Whether a cache was made of the data at hand: the first difference, with both values."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kd_dist.cache.format import first_true
from kd_dist.errors import UserError

MEND = "pass the cache's own data set with --data, or write a new cache (see `python -m kd_dist.cache write --help`)"


class Samples(Protocol):
    """The ordered images of one split."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def labels_N(self) -> np.ndarray: ...

    @property
    def sha256_N32(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Pair:
    """What two things that are compared are called, and what to do where they differ."""

    cached: str
    given: str
    mend: str = MEND

    def refuse(self, cached: str, given: str) -> None:
        """Raise UserError with both values."""
        raise UserError(f"{self.cached} has {cached}, but {self.given} has {given}: {self.mend}.")


def check_classes(names: Pair, cached: tuple[str, ...], given: tuple[str, ...]) -> None:
    """Raise UserError unless both have the same classes in the same order."""
    if len(cached) != len(given):
        names.refuse(f"{len(cached)} classes", f"{len(given)}")
    for label, (ours, theirs) in enumerate(zip(cached, given, strict=True)):
        if ours != theirs:
            names.refuse(f"{ours} as class {label}", theirs)


def check_samples(names: Pair, split: str, cached: Samples, given: Samples) -> None:
    """Raise UserError unless both list the same files with the same labels and contents in the same order."""
    if len(cached.paths) != len(given.paths):
        names.refuse(f"{len(cached.paths)} {split} images", f"{len(given.paths)}")
    for row, (ours, theirs) in enumerate(zip(cached.paths, given.paths, strict=True)):
        if ours != theirs:
            names.refuse(f"{ours} as {split} image {row}", theirs)
    place = first_true(cached.labels_N != given.labels_N)
    if place is not None:
        names.refuse(f"label {cached.labels_N[place]} for {cached.paths[place]}", f"label {given.labels_N[place]}")
    place = first_true((cached.sha256_N32 != given.sha256_N32).any(axis=1))
    if place is not None:
        ours, theirs = (samples.sha256_N32[place].tobytes().hex() for samples in (cached, given))
        names.refuse(f"SHA-256 {ours} for the content of {cached.paths[place]}", theirs)
