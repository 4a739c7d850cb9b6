"""Which images of a set a run trains on, whose labels it uses, and which images it is scored on."""

from dataclasses import dataclass

import numpy as np

from kd_dist.config import LabelUse, SplitConfig
from kd_dist.data.folds import Fold, fold_of, labelled_rows
from kd_dist.data.samples import SampleList
from kd_dist.job.data import Data


def fold_for(split: SplitConfig, data: Data) -> Fold | None:
    """The fold of train that is left out, None where none is. Raises UserError."""
    if split.fold is None or split.folds is None:
        return None
    train = data.samples.train
    return fold_of(train.labels_N, train.sha256_N32, split.fold, split.folds)


def members_of(split: SplitConfig, labels: LabelUse, data: Data) -> np.ndarray | None:
    """The rows of train that are trained on, int64 and sorted; None for all. Raises UserError as fold_for does."""
    if labels.alone and (labels.fraction < 1 or not data.samples.train.is_labelled_N.all()):
        return labelled_of(split, labels, data)
    fold = fold_for(split, data)
    return None if fold is None else fold.train_M


def labelled_of(split: SplitConfig, labels: LabelUse, data: Data) -> np.ndarray:
    """The rows of train whose labels are used, int64 and sorted: --label-fraction of those that have one, of what
    --fold leaves.
    """
    train, fold = data.samples.train, fold_for(split, data)
    rows_M = np.arange(len(train)) if fold is None else fold.train_M
    return rows_M[labelled_rows(train.labels_N[rows_M], train.sha256_N32[rows_M], labels.fraction)]


@dataclass(frozen=True, eq=False)
class Scored:
    """The images that a run is scored on: rows of a split, and the same as a list with its own fingerprint.

    `head` begins the names of the scores: "val", or "tune" where it is a part of train and must not pass for val.
    """

    head: str
    split: str
    rows_M: np.ndarray
    samples: SampleList


def scored_on(split: SplitConfig, data: Data) -> Scored:
    """val, or under --tune the part of train that is left out."""
    if not split.tune:
        return Scored("val", "val", np.arange(len(data.samples.val)), data.samples.val)
    fold = fold_for(split, data)
    assert fold is not None  # --tune without --fold is refused
    train = data.samples.train
    rows_M = fold.held_out_M[train.is_labelled_N[fold.held_out_M]]
    return Scored("tune", "train", rows_M, train.at(rows_M, fold.name))
