"""The K folds of the training images, of which one is held out, and the share of images whose labels are used.

The folds are a function of the images alone (labels and contents), not of a seed or of names. Every class is spread
evenly over the folds, and files of the same content stay together: a teacher that was not trained on a fold was trained
on no copy of its images.
"""

import math
from dataclasses import dataclass

import numpy as np

from kd_dist.errors import UserError
from kd_dist.fingerprint import UNKNOWN

ROUNDING = 1e-9  # 0.07 * 100 is a little over 7 in floating point


@dataclass(frozen=True, eq=False)
class Fold:
    """Fold `number` of `folds` (counted from 0) is held out of train.

    train_M: the rows that are trained on; held_out_M: those that are not; both int64, in the order of the split.
    """

    number: int
    folds: int
    train_M: np.ndarray
    held_out_M: np.ndarray

    @property
    def name(self) -> str:
        """What the held-out rows are, in words: "fold 0 of 10 of train"."""
        return f"fold {self.number} of {self.folds} of train"


def fold_of(labels_N: np.ndarray, sha256_N32: np.ndarray, number: int, folds: int) -> Fold:
    """Hold fold `number` out. Raises UserError as fold_numbers does."""
    fold_N = fold_numbers(labels_N, sha256_N32, folds)
    return Fold(number, folds, np.flatnonzero(fold_N != number), np.flatnonzero(fold_N == number))


def fold_numbers(labels_N: np.ndarray, sha256_N32: np.ndarray, folds: int) -> np.ndarray:
    """The fold of every image: int64 [N] in 0..folds-1.

    Images of the same content form a group. The groups, the largest first and then by the digest of their content,
    which is as good as a shuffle, each go to the fold that has the fewest images of their classes so far; of equal
    ones to the smallest, then to the first. Images without a label count as one more class. Raises UserError where a
    class has fewer groups than there are folds.
    """
    group_N, groups = _groups(sha256_N32)
    is_labelled_N = labels_N != UNKNOWN
    _require_groups(labels_N[is_labelled_N], group_N[is_labelled_N], folds)
    labels_N = np.where(is_labelled_N, labels_N, labels_N.max() + 1)
    rows = np.split(np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N))[:-1])
    of_class_KF = np.zeros((int(labels_N.max()) + 1, folds), np.int64)
    in_all_F = np.zeros(folds, np.int64)
    fold_N = np.empty(len(labels_N), np.int64)
    for group in sorted(range(groups), key=lambda group: -len(rows[group])):  # stable: by digest among equals
        labels_G = labels_N[rows[group]]
        fold = np.lexsort((in_all_F, of_class_KF[labels_G].sum(axis=0)))[0]
        fold_N[rows[group]] = fold
        np.add.at(of_class_KF[:, fold], labels_G, 1)
        in_all_F[fold] += len(labels_G)
    return fold_N


def labelled_rows(labels_N: np.ndarray, sha256_N32: np.ndarray, share: float) -> np.ndarray:
    """The rows whose labels are used where only a share of them is: int64, sorted.

    Of each class the share in (0, 1], rounded up, of its different images, first by digest, and all copies of these. A
    smaller share's rows are among a larger one's.
    """
    group_N, _ = _groups(sha256_N32)
    used_N = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N[labels_N != UNKNOWN]):
        groups = np.unique(group_N[labels_N == label])
        used_N |= (labels_N == label) & np.isin(group_N, groups[: math.ceil(share * len(groups) - ROUNDING)])
    return np.flatnonzero(used_N)


def _groups(sha256_N32: np.ndarray) -> tuple[np.ndarray, int]:
    """The group of every image, counted in the order of the digests, and how many there are."""
    digest_N = np.ascontiguousarray(sha256_N32).view("V32")[:, 0]
    numbers = {digest: number for number, digest in enumerate(sorted({value.tobytes() for value in digest_N}))}
    return np.array([numbers[value.tobytes()] for value in digest_N]), len(numbers)


def _require_groups(labels_N: np.ndarray, group_N: np.ndarray, folds: int) -> None:
    pairs = np.unique(np.stack([labels_N, group_N], axis=1), axis=0)
    fewest = int(np.bincount(pairs[:, 0]).min())
    if fewest < folds:
        raise UserError(
            f"--folds {folds}, but a class of train has only {fewest} different images; use --folds {fewest} or less."
        )
