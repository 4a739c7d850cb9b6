"""Entry 2: train a student from cached soft labels and hard labels. No teacher is imported, built or read.

torchrun --nproc_per_node=4 -m kd_dist.distill
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_dist import job, objectives
from kd_dist.batches import CachedCrops
from kd_dist.cache import Cache, SoftLabels, TopK, open_cache, require_temperature
from kd_dist.checkpoint import RunFolder
from kd_dist.config import DistillSettings
from kd_dist.engine import LossTerms
from kd_dist.errors import UserError
from kd_dist.job import Data, DataSource
from kd_dist.losses import NEED_LABELS, SOFT_LOSSES
from kd_dist.models import STUDENTS
from kd_dist.runtime import Runtime, StopRequest, joined, run_entry
from kd_dist.views import require_renderer

DESCRIPTION = """Train a student from a cache of soft labels and the hard labels: total = alpha * soft + (1 - alpha) *
hard. The teacher is not loaded; only its cache is read. Running the same command again resumes."""
EPILOG = """Examples: torchrun --nproc_per_node=4 -m kd_dist.distill --cache runs/teacher/logits.h5 --alpha 0.9
--temperature 4; the hard-label twin of the same student, no cache needed: add --alpha 0 --out runs/twin."""

Rows = Callable[[np.ndarray, np.ndarray, DistillSettings], np.ndarray]
"""(cached logits_NVK, labels_N, settings) -> the soft labels [N, V, K] to learn from in their place."""

Loss = Callable[[DistillSettings, int], LossTerms]
"""(settings, classes) -> what the engine minimises."""


def main() -> None:
    settings = job.read_settings(DistillSettings, "kd_dist.distill", DESCRIPTION, EPILOG)
    require_known(settings)
    with joined(settings.device) as runtime:
        cache, data = open_inputs(settings, runtime)
        folder = run(settings, data, cache, runtime)
        job.say(runtime, f"finished: {folder.model}; compare runs by python -m kd_dist.report {folder.path}")


def require_known(settings: DistillSettings) -> None:
    """Raise UserError for a student or a loss that no table has, or a loss that needs labels which are not used."""
    for name, table in (("student", STUDENTS), ("loss", SOFT_LOSSES)):
        if getattr(settings, name) not in table:
            raise UserError(f"--{name} {getattr(settings, name)} is not known; choose from {', '.join(table)}.")
    if settings.labelled < 1 and settings.alpha and SOFT_LOSSES[settings.loss] in NEED_LABELS:
        raise UserError(
            f"--loss {settings.loss} needs every image's label, --labelled {settings.labelled} uses fewer; choose "
            f"another --loss."
        )


def open_inputs(settings: DistillSettings, runtime: Runtime) -> tuple[Cache | None, Data]:
    """The cache that is read, if any, and the data that it was made of. Raises UserError where one cannot be used."""
    cache = open_for(settings, runtime)
    data = job.open_data(DataSource.of(settings), runtime)
    if cache is not None:
        require_cache_fits(settings, data, cache)
        warn_missing_checksum(cache, runtime)
    return cache, data


def require_cache_fits(settings: DistillSettings, data: Data, cache: Cache) -> None:
    """Raise UserError unless a cache is of this data, and of parts of it that it may be of."""
    data.require_fit(cache)
    require_unseen(settings, data, cache)
    require_own_partners(settings, data, cache)


def warn_missing_checksum(cache: Cache, runtime: Runtime) -> None:
    """Print a warning where a cache has no checksum file beside it."""
    if not cache.has_checksum:
        job.say(runtime, f"{cache.path} came without its .sha256 file; its own checksums hold")


def run(
    settings: DistillSettings,
    data: Data,
    cache: Cache | None,
    runtime: Runtime,
    *,
    rows: Rows | None = None,
    loss: Loss | None = None,
    stop: StopRequest | None = None,
    **identity: str,
) -> RunFolder:
    """Train one student in its folder, or go on with it; one that is trained already is left as it is.

    `rows` makes soft labels from the cache's, `loss` replaces the one that the settings name; `identity` tells this
    run from others of the same settings. Raises UserError, and Interrupted when `stop` or a signal asked for it.
    """
    model = require_student(settings, data, runtime)
    folder = job.claim(settings, data, runtime, **learned_from(settings, cache), **identity)
    with job.running(folder, runtime, stop) as stop:
        if not runtime.on_main(folder.model.exists):
            train(settings, data, cache, model, folder, runtime, stop, rows, loss or loss_of)
    return folder


def require_student(settings: DistillSettings, data: Data, runtime: Runtime) -> nn.Module:
    """The student with its first weights. Raises UserError where batch, pictures, ranks and network do not fit."""
    torch.manual_seed(settings.seed)
    model = STUDENTS[settings.student](len(data.samples.classes))
    job.require_trainable(settings, data, model, runtime)
    return model


def learned_from(settings: DistillSettings, cache: Cache | None) -> dict[str, str]:
    """What binds a run to its cache. On fresh crops one is read for the agreement alone: no weight depends on it."""
    return {} if settings.uses_fresh_crops else {"cache digest": cache.digest}


def open_for(settings: DistillSettings, runtime: Runtime) -> Cache | None:
    """The cache this run reads, verified; None where it reads none. Raises UserError where it cannot be used."""
    if settings.cache is None:
        return None
    cache = open_cache(Path(settings.cache), runtime.once_a_node)
    require_use(settings, cache)
    return cache


def require_use(settings: DistillSettings, cache: Cache) -> None:
    """Raise UserError where a run cannot use a cache as its settings want to."""
    if cache.header.top_k and settings.alpha:
        require_temperature(temperature_of(settings), cache.path)
    require_renderer(cache.header.renderer, cache.path)
    if settings.alpha:
        cache.check_loss(settings.loss, settings.temperature)
    require_plain_views(settings, cache)
    if settings.views is not None and settings.views > cache.views:
        raise UserError(
            f"--views {settings.views}, but {cache.path} holds {cache.views}; use --views {cache.views} or less, or "
            "add views by "
            f"`python -m kd_dist.cache extend {cache.path} --views {settings.views}`."
        )


def require_plain_views(settings: DistillSettings, cache: Cache) -> None:
    """Raise UserError where the last epochs are to show plain views of a cache whose drawn views are all mixed."""
    mixed = cache.split("train").mixed
    if mixed is None or not settings.plain_epochs or settings.uses_fresh_crops:
        return
    drawn = min(settings.views or cache.views, cache.views) - 1
    if 0 < drawn == len(mixed.first(drawn + 1).mixed_views()):
        raise UserError(
            f"--plain-epochs {settings.plain_epochs}, but all drawn views of {cache.path} that are used are mixed; use "
            "--plain-epochs 0, or a cache with plain views."
        )


def require_unseen(settings: DistillSettings, data: Data, cache: Cache) -> None:
    """Under --tune the soft labels have to come from teachers that never saw the part that the student is scored on.

    Raises UserError otherwise.
    """
    fold = job.fold_for(settings, data)
    if not settings.tune or settings.alpha == 0:
        return
    for number in np.unique(cache.split("train").teacher_N[fold.train_M]):
        row = cache.header.teachers[number]
        if (row.fold, row.folds) != (fold.number, fold.folds):
            raise UserError(
                f"{cache.path} has labels of a teacher trained {row.trained_on}, but --tune scores on {fold.name}, "
                f"which it saw; name the cache of a teacher trained with --folds {fold.folds} --fold {fold.number}."
            )


def require_own_partners(settings: DistillSettings, data: Data, cache: Cache) -> None:
    """Raise UserError where a part of train is left out and a cached mixed view would show an image of it."""
    fold, mixed = job.fold_for(settings, data), cache.split("train").mixed
    if fold is None or mixed is None or settings.uses_fresh_crops:
        return
    for view in mixed.mixed_views():
        if np.isin(mixed.in_view(view)[0][fold.train_M], fold.held_out_M).any():
            raise UserError(
                f"{cache.path} has mixed views that show images of {fold.name}, which is left out here; name the cache "
                f"of a teacher trained with --folds {fold.folds} --fold {fold.number}."
            )


def train(
    settings: DistillSettings,
    data: Data,
    cache: Cache | None,
    model: nn.Module,
    folder: RunFolder,
    runtime: Runtime,
    stop: StopRequest,
    rows: Rows | None,
    loss: Loss,
) -> None:
    """Train the student, and keep its weights, its logits and the name of the cache it learned from."""
    crops, logits_NVK = crops_of(settings, data, cache)
    if rows is not None:
        logits_NVK = _made_of_members(rows, logits_NVK, data, settings)
    training = job.training(
        settings,
        data,
        runtime,
        folder,
        model,
        loss(settings, len(data.samples.classes)),
        crops,
        logits_NVK=logits_NVK,
        stop=stop,
        cache=cache,
        after_epoch=None if cache is None else lambda epoch, model, metrics: cache.require_unchanged(),
    )
    model, logits_MK = training.run()
    facts = {"cache": described(cache)} if cache else {}
    runtime.on_main(lambda: job.keep(folder, settings, settings.student, data, model, logits_MK, **facts))


def _made_of_members(rows: Rows, logits_NVK: SoftLabels, data: Data, settings: DistillSettings) -> np.ndarray:
    """Soft labels [N, V, K] made from the rows that are trained on; a part of train that is left out has zeros."""
    labels_N, fold = data.samples.train.labels_N, job.fold_for(settings, data)
    logits_NVK = logits_NVK[:]  # of the top k all logits are made
    if fold is None:
        return rows(logits_NVK, labels_N, settings)
    made_MVK = rows(logits_NVK[fold.train_M], labels_N[fold.train_M], settings)
    all_NVK = np.zeros((len(labels_N), *made_MVK.shape[1:]), made_MVK.dtype)
    all_NVK[fold.train_M] = made_MVK
    return all_NVK


def loss_of(settings: DistillSettings, classes: int) -> LossTerms:
    """The loss that the settings name; at alpha 0 the soft term is not computed."""
    if settings.alpha == 0:
        return objectives.hard(classes, settings.label_smoothing)
    soft_loss = SOFT_LOSSES[settings.loss]
    return objectives.distilled(classes, settings.label_smoothing, soft_loss, settings.alpha, settings.temperature)


def crops_of(settings: DistillSettings, data: Data, cache: Cache | None):
    """The rule for crops, and the soft labels [N, V, K] that go with them (None where no soft loss is computed)."""
    if settings.uses_fresh_crops:
        return job.fresh_crops(settings, data), None
    rows = cache.split("train")
    used = slice(settings.views)
    mixed = rows.mixed and rows.mixed.first(settings.views)
    crops = CachedCrops(rows.box_NV4[:, used], rows.flip_NV[:, used], settings.seed, mixed, settings.blended_epochs)
    if not settings.alpha:
        return crops, None
    logits_NVK = rows.logits_NVK[:, used]
    return crops, logits_NVK.at(temperature_of(settings)) if isinstance(logits_NVK, TopK) else logits_NVK


def temperature_of(settings: DistillSettings) -> float:
    """The temperature at which the soft loss looks at the teacher: `mse` is the limit of the others for infinity."""
    return math.inf if settings.loss == "mse" else settings.temperature


def described(cache: Cache) -> dict:
    """What a student's file says of the cache it learned from."""
    return {
        "path": str(cache.path),
        "sha256": cache.digest,
        "teachers": [row.sha256 for row in cache.header.teachers],
        "fingerprints": {split: cache.fingerprint(split) for split in ("train", "val")},
    }


if __name__ == "__main__":
    run_entry(main)
