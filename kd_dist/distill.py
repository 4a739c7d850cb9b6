"""Entry 2: train a student from cached soft labels and hard labels. No teacher is imported, built or read.

torchrun --nproc_per_node=4 -m kd_dist.distill
"""

from pathlib import Path

import torch

from kd_dist import job, objectives
from kd_dist.batches import CachedCrops
from kd_dist.cache import Cache, open_cache
from kd_dist.checkpoint import RunFolder
from kd_dist.config import DistillSettings
from kd_dist.engine import LossTerms
from kd_dist.errors import UserError
from kd_dist.job import Data, DataSource
from kd_dist.losses import SOFT_LOSSES
from kd_dist.models import STUDENTS
from kd_dist.runtime import Runtime, joined, run_entry
from kd_dist.views import RENDERER

DESCRIPTION = """Train a student from a cache of soft labels and the hard labels: total = alpha * soft + (1 - alpha) *
hard. The teacher is not loaded; only its cache is read. Running the same command again resumes."""
EPILOG = """Examples: torchrun --nproc_per_node=4 -m kd_dist.distill --cache runs/teacher/logits.h5 --alpha 0.9
--temperature 4; the hard-label twin of the same student, no cache needed: add --alpha 0 --out runs/twin."""


def main() -> None:
    settings = job.read_settings(DistillSettings, "kd_dist.distill", DESCRIPTION, EPILOG)
    for name, table in (("student", STUDENTS), ("loss", SOFT_LOSSES)):
        if getattr(settings, name) not in table:
            raise UserError(f"--{name} {getattr(settings, name)} is not known; choose from {', '.join(table)}.")
    with joined(settings.device) as runtime:
        cache = open_for(settings)
        folder = job.claim(settings, runtime)
        with job.recorded(folder, runtime):
            data = job.open_data(DataSource(**settings.source()), runtime)
            if cache is not None:
                samples = data.samples
                cache.check_fits(samples.name, samples.classes, {"train": samples.train, "val": samples.val})
            if not runtime.on_main(folder.model.exists):
                train(settings, data, cache, folder, runtime)
            job.say(runtime, f"finished: {folder.model}; compare runs by python -m kd_dist.report {folder.path}")


def open_for(settings: DistillSettings) -> Cache | None:
    """The cache this run reads, checked; None where it reads none. Raises UserError where it cannot be used."""
    if settings.cache is None:
        return None
    cache = open_cache(Path(settings.cache))
    if cache.header.renderer != RENDERER:
        raise UserError(
            f"{cache.path} was rendered by {cache.header.renderer}, this version renders by {RENDERER}: the student "
            "would see other crops; "
            "write the cache anew or use the version that wrote it."
        )
    if settings.views is not None and settings.views > cache.views:
        raise UserError(
            f"--views {settings.views}, but {cache.path} holds {cache.views}; use --views {cache.views} or less, or "
            "add views by "
            f"`python -m kd_dist.cache extend {cache.path} --views {settings.views}`."
        )
    return cache


def train(settings: DistillSettings, data: Data, cache: Cache | None, folder: RunFolder, runtime: Runtime) -> None:
    """Train the student, and keep its weights, its val logits and the name of the cache it learned from."""
    torch.manual_seed(settings.seed)
    model = STUDENTS[settings.student](len(data.samples.classes))
    crops, logits_NVK = crops_of(settings, data, cache)
    origin = {"cache": cache.digest} if cache else {}
    model, val_logits_NK = job.train(
        settings,
        data,
        runtime,
        folder,
        model,
        loss_of(settings, len(data.samples.classes)),
        crops,
        logits_NVK=logits_NVK,
        identity=origin,
        teacher_val_NK=cache.split("val").logits_NVK[:, 0] if cache else None,
    )
    facts = {"cache": described(cache)} if cache else {}
    runtime.on_main(lambda: job.keep(folder, settings, settings.student, data, model, val_logits_NK, **facts))


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
    crops = CachedCrops(rows.box_NV4[:, used], rows.flip_NV[:, used], settings.seed)
    return crops, rows.logits_NVK[:, used] if settings.alpha else None


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
