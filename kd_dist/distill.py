"""Entry 2: train a student from cached soft labels and hard labels. No teacher is imported, built or read.

torchrun --nproc_per_node=4 -m kd_dist.distill
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_dist import job, models
from kd_dist.cache import Cache, SoftLabels, TopK, open_cache, require_temperature
from kd_dist.config import (
    OF_DATA,
    DistillationConfig,
    DistillConfig,
    StudentConfig,
    StudyConfig,
    carried,
    command,
)
from kd_dist.dist.endings import StopRequest, run_entry
from kd_dist.dist.runtime import Runtime, joined
from kd_dist.errors import UserError
from kd_dist.images.views import require_renderer
from kd_dist.job import Data, Supervision
from kd_dist.run.folder import RunFolder
from kd_dist.training import LossTerms, objectives
from kd_dist.training.batches import CachedCrops, FreshCrops
from kd_dist.training.losses import NEED_LABELS, require_usable_loss, soft_loss

CacheReader = StudentConfig | StudyConfig
"""The config of a job that reads a cache: one student's, or a whole study's."""

DESCRIPTION = """Train a student from a cache of soft labels and the hard labels: total = alpha * soft + (1 - alpha) *
hard. The teacher is not loaded; only its cache is read. Running the same command again resumes."""
EPILOG = """Examples: torchrun --nproc_per_node=4 -m kd_dist.distill --cache runs/teacher/logits.h5 --alpha 0.9
--temperature 4; for the hard-label baseline of the same student, which needs no cache, add --alpha 0 --out
runs/baseline."""

Rows = Callable[[np.ndarray, np.ndarray, StudentConfig], np.ndarray]
"""(cached logits_NVK, labels_N, config) -> the soft labels [N, V, K] to learn from in their place."""

Loss = Callable[[StudentConfig, int], LossTerms]
"""(config, classes) -> what training minimises."""


def main() -> None:
    config = job.read_config(DistillConfig, "kd_dist.distill", DESCRIPTION, EPILOG)
    require_known(config.distillation)
    with joined(config.run.device) as runtime:
        cache, data = open_inputs(config, runtime)
        folder = run(config, data, cache, runtime)
        report = command("kd_dist.report", folder.path)
        job.say(runtime, f"finished: {folder.model}; compare runs by {report}")


def require_known(distillation: DistillationConfig) -> None:
    """Raise UserError for a student or a loss that is not known, or a loss that needs labels which are not used."""
    models.require_known(distillation.student, "--student")
    loss, fraction = distillation.loss, distillation.label_fraction
    if soft_loss(loss) in NEED_LABELS and fraction < 1 and distillation.alpha:
        raise UserError(
            f"--loss {loss} needs every image's label, --label-fraction {fraction} uses fewer; choose another --loss."
        )


def require_labels(distillation: DistillationConfig, data: Data) -> None:
    """Raise UserError where the soft loss needs labels that some images do not have."""
    loss = distillation.loss
    if distillation.alpha and soft_loss(loss) in NEED_LABELS and not data.samples.train.is_labelled_N.all():
        raise UserError(f"--loss {loss} needs every image's label, --unlabelled has none; choose another --loss.")


def open_inputs(config: CacheReader, runtime: Runtime) -> tuple[Cache | None, Data]:
    """The cache that is read, if any, and the data that it was made of. Raises UserError where one cannot be used."""
    cache = open_for(config, runtime)
    data = job.open_data(config.data, runtime)
    if config.distillation.alpha:
        require_usable_loss(config.distillation.loss, config.distillation.temperature, len(data.samples.classes))
    if cache is not None:
        require_cache_fits(config, data, cache)
        warn_missing_checksum(cache, runtime)
    return cache, data


def require_cache_fits(config: CacheReader, data: Data, cache: Cache) -> None:
    """Raise UserError unless a cache is of this data, and of parts of it that it may be of."""
    data.require_fit(cache)
    require_unseen(config, data, cache)
    require_own_partners(config, data, cache)


def warn_missing_checksum(cache: Cache, runtime: Runtime) -> None:
    """Print a warning where a cache has no checksum file beside it."""
    if not cache.has_checksum:
        job.say(runtime, f"{cache.path} came without its .sha256 file; its own checksums hold")


def run(
    config: StudentConfig,
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

    `rows` makes soft labels from the cache's, `loss` replaces the one that the config names; `identity` tells this
    run from others of the same config. Raises UserError, and Interrupted when `stop` or a signal asked for it.
    """
    model = require_student(config, data, runtime)
    initial = job.start_from(model, config.init)
    folder = job.claim_folder(config, data, runtime, **learned_from(config, cache), **initial, **identity)
    with job.running(folder, runtime, stop) as stop:
        if not runtime.on_main(folder.model.exists):
            supervision = supervision_of(config, data, cache, rows, loss)
            train(config, data, cache, model, supervision, folder, runtime, stop)
    return folder


def require_student(config: StudentConfig, data: Data, runtime: Runtime) -> nn.Module:
    """The student with its first weights. Raises UserError where batch, images, ranks and network do not fit, or a
    loss needs labels that some images do not have.
    """
    require_labels(config.distillation, data)
    torch.manual_seed(config.seed)
    name = config.distillation.student
    model = models.build(name, len(data.samples.classes))
    job.require_trainable(config, data, model, runtime, config.distillation.labels, name)
    return model


def learned_from(config: StudentConfig, cache: Cache | None) -> dict[str, str]:
    """What binds a run to its cache. On fresh crops one is read for the agreement alone: no weight depends on it."""
    if config.uses_fresh_crops:
        return {}
    assert cache is not None  # cached crops are a cache's
    return {"cache digest": cache.digest}


def open_for(config: CacheReader, runtime: Runtime) -> Cache | None:
    """The cache this run reads, verified; None where it reads none. Raises UserError where it cannot be used."""
    if config.distillation.cache is None:
        return None
    path = Path(config.distillation.cache)
    if not path.exists():
        write = command("kd_dist.teacher", cache=path, **carried(config))
        raise UserError(f"there is no cache {path}; `{write}` trains a teacher and writes it.")
    cache = open_cache(path, runtime.once_a_node)
    require_use(config, cache)
    return cache


def require_use(config: CacheReader, cache: Cache) -> None:
    """Raise UserError where a run cannot use a cache as its config wants to."""
    own = config.distillation
    if cache.header.top_k and own.alpha:
        require_temperature(temperature_of(own), cache.path)
    require_renderer(cache.header.renderer, cache.path)
    if own.alpha:
        cache.check_loss(own.loss, own.temperature)
    require_plain_views(config, cache)
    if own.views is not None and own.views > cache.views:
        raise UserError(
            f"--views {own.views}, but {cache.path} holds {cache.views}; use --views {cache.views} or less, or add "
            f"views by {_extending(config, cache)}."
        )


def _extending(config: CacheReader, cache: Cache) -> str:
    """The command that writes a cache with the views that are missing, where the teacher's weights are beside it."""
    teacher = RunFolder(cache.path.parent).model
    if not teacher.exists():
        return "`python -m kd_dist.cache extend`, which needs the teacher's model.pt"
    views = config.distillation.views
    longer = cache.path.with_name(f"{cache.path.stem}-{views}-views.h5")
    flags = {"teacher": teacher, "views": views, "output": longer, **carried(config, OF_DATA)}
    return f"`{command('kd_dist.cache', 'extend', cache.path, **flags)}`"


def require_plain_views(config: CacheReader, cache: Cache) -> None:
    """Raise UserError where the last epochs are to show plain views of a cache whose drawn views are all mixed."""
    mixed = cache.split("train").mixed
    if mixed is None or not config.augmentation.no_mix_epochs or config.uses_fresh_crops:
        return
    drawn = min(config.distillation.views or cache.views, cache.views) - 1
    if 0 < drawn == len(mixed.first(drawn + 1).mixed_views()):
        raise UserError(
            f"--no-mix-epochs {config.augmentation.no_mix_epochs}, but all drawn views of {cache.path} that are used "
            "are mixed; use --no-mix-epochs 0, or a cache with plain views."
        )


def require_unseen(config: CacheReader, data: Data, cache: Cache) -> None:
    """Under --tune the soft labels have to come from teachers that never saw the part that the student is scored on.

    Raises UserError otherwise.
    """
    fold = job.fold_for(config.split, data)
    if not config.split.tune or config.distillation.alpha == 0:
        return
    assert fold is not None  # --tune without --fold is refused
    for number in np.unique(cache.split("train").teacher_N[fold.train_M]):
        row = cache.header.teachers[number]
        if (row.fold, row.folds) != (fold.number, fold.folds):
            saw = "may have seen" if row.trained_on == "elsewhere" else "saw"
            raise UserError(
                f"{cache.path} has labels of a teacher trained {row.trained_on}, but --tune scores on {fold.name}, "
                f"which it {saw}; name the cache of a teacher trained with --folds {fold.folds} --fold {fold.number}."
            )


def require_own_partners(config: CacheReader, data: Data, cache: Cache) -> None:
    """Raise UserError where a part of train is left out and a cached mixed view would show an image of it."""
    fold, mixed = job.fold_for(config.split, data), cache.split("train").mixed
    if fold is None or mixed is None or config.uses_fresh_crops:
        return
    for view in mixed.mixed_views():
        if np.isin(mixed.in_view(view)[0][fold.train_M], fold.held_out_M).any():
            raise UserError(
                f"{cache.path} has mixed views that show images of {fold.name}, which is left out here; name the cache "
                f"of a teacher trained with --folds {fold.folds} --fold {fold.number}."
            )


def supervision_of(
    config: StudentConfig, data: Data, cache: Cache | None, rows: Rows | None = None, loss: Loss | None = None
) -> Supervision:
    """What the student learns from, as the config says or, where they are given, from other soft labels and losses."""
    crops, logits_NVK = crops_of(config, data, cache)
    if rows is not None:
        assert logits_NVK is not None  # other soft labels are made of cached ones
        logits_NVK = _made_of_members(rows, logits_NVK, data, config)
    loss_terms = (loss or loss_of)(config, len(data.samples.classes))
    return Supervision(loss_terms, crops, logits_NVK, config.distillation.labels)


def train(
    config: StudentConfig,
    data: Data,
    cache: Cache | None,
    model: nn.Module,
    supervision: Supervision,
    folder: RunFolder,
    runtime: Runtime,
    stop: StopRequest,
) -> None:
    """Train the student, and keep its weights, its logits and the name of the cache it learned from."""
    unchanged = None if cache is None else lambda epoch, model, metrics: cache.require_unchanged()
    training = job.compose_training(config, data, runtime, folder, model, supervision, cache, after_epoch=unchanged)
    model, logits_MK = training.run(stop)
    facts = {"cache": described(cache)} if cache else {}
    runtime.on_main(lambda: job.keep(folder, config, config.distillation.student, data, model, logits_MK, **facts))


def _made_of_members(rows: Rows, logits_NVK: SoftLabels, data: Data, config: StudentConfig) -> np.ndarray:
    """Soft labels [N, V, K] made from the rows that are trained on; a part of train that is left out has zeros."""
    labels_N, fold = data.samples.train.labels_N, job.fold_for(config.split, data)
    logits_NVK = logits_NVK[:]  # of the top k all logits are made
    if fold is None:
        return rows(logits_NVK, labels_N, config)
    made_MVK = rows(logits_NVK[fold.train_M], labels_N[fold.train_M], config)
    all_NVK = np.zeros((len(labels_N), *made_MVK.shape[1:]), made_MVK.dtype)
    all_NVK[fold.train_M] = made_MVK
    return all_NVK


def loss_of(config: StudentConfig, classes: int) -> LossTerms:
    """The loss that the config names; at alpha 0 the soft term is not computed."""
    own, smoothing = config.distillation, config.optimisation.label_smoothing
    if own.alpha == 0:
        return objectives.hard(classes, smoothing)
    return objectives.distilled(classes, smoothing, soft_loss(own.loss), own.alpha, own.temperature)


def crops_of(
    config: StudentConfig, data: Data, cache: Cache | None
) -> tuple[FreshCrops | CachedCrops, SoftLabels | None]:
    """The rule for crops, and the soft labels [N, V, K] that go with them (None where no soft loss is computed)."""
    if config.uses_fresh_crops:
        return job.fresh_crops(config.augmentation, config.seed, data), None
    assert cache is not None  # cached crops are a cache's
    rows = cache.split("train")
    used = slice(config.distillation.views)
    mixed = rows.mixed and rows.mixed.first(config.distillation.views)
    crops = CachedCrops(rows.box_NV4[:, used], rows.flip_NV[:, used], config.seed, mixed, config.mixed_epochs)
    if not config.distillation.alpha:
        return crops, None
    logits_NVK = rows.logits_NVK[:, used]
    return crops, logits_NVK.at(temperature_of(config.distillation)) if isinstance(logits_NVK, TopK) else logits_NVK


def temperature_of(distillation: DistillationConfig) -> float:
    """The temperature at which the soft loss looks at the teacher: `mse` is the limit of the others for infinity."""
    return math.inf if distillation.loss == "mse" else distillation.temperature


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
