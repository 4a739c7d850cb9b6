"""Whether a cache was made of the data at hand: the first difference, with both values."""

from typing import Protocol

import numpy as np

from kd_dist.cache.format import first_true
from kd_dist.errors import UserError

MEND = "name the data it was made from with --data, or write a cache of this data with `python -m kd_dist.cache write`"


class Samples(Protocol):
    """The ordered images of one split."""

    paths: tuple[str, ...]
    labels_N: np.ndarray
    sha256_N32: np.ndarray


def check_classes(names: tuple[str, str], cached: tuple[str, ...], given: tuple[str, ...]) -> None:
    """Raise UserError unless both have the same classes in the same order; `names` says what the two are."""
    if len(cached) != len(given):
        _refuse(names, f"{len(cached)} classes", f"{len(given)}")
    for label, (ours, theirs) in enumerate(zip(cached, given, strict=True)):
        if ours != theirs:
            _refuse(names, f"{ours} as class {label}", theirs)


def check_samples(names: tuple[str, str], split: str, cached: Samples, given: Samples) -> None:
    """Raise UserError unless both list the same files with the same labels and contents in the same order."""
    if len(cached.paths) != len(given.paths):
        _refuse(names, f"{len(cached.paths)} {split} images", f"{len(given.paths)}")
    for row, (ours, theirs) in enumerate(zip(cached.paths, given.paths, strict=True)):
        if ours != theirs:
            _refuse(names, f"{ours} as {split} image {row}", theirs)
    row = first_true(cached.labels_N != given.labels_N)
    if row is not None:
        _refuse(names, f"label {cached.labels_N[row]} for {cached.paths[row]}", f"label {given.labels_N[row]}")
    row = first_true((cached.sha256_N32 != given.sha256_N32).any(axis=1))
    if row is not None:
        ours, theirs = (samples.sha256_N32[row].tobytes().hex() for samples in (cached, given))
        _refuse(names, f"SHA-256 {ours} for the content of {cached.paths[row]}", theirs)


def _refuse(names: tuple[str, str], cached: str, given: str) -> None:
    raise UserError(f"{names[0]} has {cached}, {names[1]} has {given}: {MEND}.")
