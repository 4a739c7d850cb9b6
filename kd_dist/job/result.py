"""What a run leaves to be used: its weights, and its logits on the images that it is scored on."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from torch import nn

from kd_dist.config import MEAN, STD, NetworkConfig
from kd_dist.job.data import Data
from kd_dist.job.selection import scored_on
from kd_dist.job.validation import top1
from kd_dist.run import checkpoint
from kd_dist.run.folder import RunFolder
from kd_dist.run.results import write_val_logits
from kd_dist.version import software


def keep(
    folder: RunFolder,
    config: NetworkConfig,
    arch: str,
    data: Data,
    model: nn.Module,
    logits_MK: np.ndarray,
    **facts: object,
) -> None:
    """Write the result of a run, on rank 0: its logits on what it is scored on, then the weights with what one must
    know to use them.

    A run under --tune has no val_top1 but a tune_top1.
    """
    scored = scored_on(config.split, data)
    samples, score = scored.samples, top1(logits_MK, scored.samples.labels_N)
    write_val_logits(
        folder.val_logits, logits_MK, samples.labels_N, samples.paths, samples.fingerprint, top1=score, of=samples.split
    )
    keep_model(folder.model, config, arch, data, model, {f"{scored.head}_top1": score}, **facts)


def keep_model(
    path: Path,
    config: NetworkConfig,
    arch: str,
    data: Data,
    model: nn.Module,
    scores: Mapping[str, float],
    **facts: object,
) -> None:
    """Write weights, with their scores and what else one must know to use them."""
    fingerprints = {split: data.samples.split(split).fingerprint for split in ("train", "val")}
    split = config.split
    checkpoint.save_model(
        path,
        {
            "kind": config.kind,
            "arch": arch,
            "weights": {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
            "classes": list(data.samples.classes),
            "image_size": config.augmentation.image_size,
            "mean": list(MEAN),
            "std": list(STD),
            "seed": config.seed,
            **scores,
            "fold": None if split.fold is None else {"number": split.fold, "folds": split.folds},
            "data": {"name": data.samples.name, **fingerprints},
            "settings": config.stored(),
            "software": software(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
        },
    )
