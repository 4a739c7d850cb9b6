"""Folds: even over classes, copies together, disjoint, covering, and a function of the images alone."""

import numpy as np
import pytest

from kd_dist.data.folds import fold_numbers, fold_of
from kd_dist.errors import UserError


@pytest.fixture(scope="module")
def images():
    """211 images of three uneven classes; rows 10 to 12 show one image, as do rows 0 and 210, of two classes."""
    rng = np.random.default_rng(0)
    sha256_N32 = rng.integers(0, 256, (211, 32), dtype=np.uint8)
    sha256_N32[11] = sha256_N32[12] = sha256_N32[10]
    sha256_N32[210] = sha256_N32[0]
    return np.repeat([0, 1, 2], [100, 90, 21]), sha256_N32


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_every_class_is_spread_evenly(images, folds):
    labels_N, sha256_N32 = images
    part_N = fold_numbers(labels_N, sha256_N32, folds)
    counts_KP = np.stack([np.bincount(part_N[labels_N == label], minlength=folds) for label in range(3)])
    assert (np.ptp(counts_KP, axis=1) <= 1).all() and np.ptp(counts_KP.sum(axis=0)) <= 2
    assert len({part_N[row] for row in (10, 11, 12)}) == 1 and part_N[0] == part_N[210]


def test_folds_cover_train_and_share_nothing(images):
    folds = [fold_of(*images, number, 5) for number in range(5)]
    assert np.array_equal(np.sort(np.concatenate([fold.held_out_M for fold in folds])), np.arange(211))
    for fold in folds:
        assert np.array_equal(np.sort(np.concatenate([fold.train_M, fold.held_out_M])), np.arange(211))
        assert (np.diff(fold.train_M) > 0).all() and fold.train_M.dtype == fold.held_out_M.dtype == np.int64
        seen, unseen = ({images[1][row].tobytes() for row in rows} for rows in (fold.train_M, fold.held_out_M))
        assert not seen & unseen
    assert folds[3].name == "fold 3 of 5 of train"


def test_a_part_follows_the_images_not_their_order(images):
    labels_N, sha256_N32 = images
    order_N = np.random.default_rng(1).permutation(211)
    part_N = fold_numbers(labels_N, sha256_N32, 5)
    assert np.array_equal(fold_numbers(labels_N[order_N], sha256_N32[order_N], 5), part_N[order_N])
    assert not np.array_equal(part_N, np.sort(part_N))


def test_more_parts_than_a_class_has_images_are_refused(images):
    with pytest.raises(
        UserError, match="--folds 22, but a class of train has only 21 different images; use --folds 21"
    ):
        fold_numbers(*images, 22)
