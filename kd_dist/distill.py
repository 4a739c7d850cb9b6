"""Entry 2: train a student from cached soft labels and hard labels. No teacher is imported, built or read.

torchrun --nproc_per_node=4 -m kd_dist.distill
"""

from pathlib import Path

import torch
from torch import nn

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
from kd_dist.runtime import Runtime, StopRequest, joined, run_entry
from kd_dist.views import require_renderer

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
        data = job.open_data(DataSource(**settings.source()), runtime)
        if cache is not None:
            data.require_fit(cache)
        torch.manual_seed(settings.seed)
        model = STUDENTS[settings.student](len(data.samples.classes))
        job.require_fit(settings, data, model, runtime)
        # A run on fresh crops reads a cache for the agreement alone: its weights do not depend on which.
        learned_from = {} if settings.uses_fresh_crops else {"cache digest": cache.digest}
        folder = job.claim(settings, data, runtime, **learned_from)
        if cache is not None and not cache.noted:
            job.say(runtime, f"{cache.path} came without its digest file; its own checks hold")
        with job.running(folder, runtime) as stop:
            if not runtime.on_main(folder.model.exists):
                train(settings, data, cache, model, folder, runtime, stop)
            job.say(runtime, f"finished: {folder.model}; compare runs by python -m kd_dist.report {folder.path}")


def open_for(settings: DistillSettings) -> Cache | None:
    """The cache this run reads, checked; None where it reads none. Raises UserError where it cannot be used."""
    if settings.cache is None:
        return None
    cache = open_cache(Path(settings.cache))
    require_renderer(cache.header.renderer, cache.path)
    if settings.views is not None and settings.views > cache.views:
        raise UserError(
            f"--views {settings.views}, but {cache.path} holds {cache.views}; use --views {cache.views} or less, or "
            "add views by "
            f"`python -m kd_dist.cache extend {cache.path} --views {settings.views}`."
        )
    return cache


def train(
    settings: DistillSettings,
    data: Data,
    cache: Cache | None,
    model: nn.Module,
    folder: RunFolder,
    runtime: Runtime,
    stop: StopRequest,
) -> None:
    """Train the student, and keep its weights, its val logits and the name of the cache it learned from."""
    crops, logits_NVK = crops_of(settings, data, cache)
    model, val_logits_NK = job.train(
        settings,
        data,
        runtime,
        folder,
        model,
        loss_of(settings, len(data.samples.classes)),
        crops,
        logits_NVK=logits_NVK,
        stop=stop,
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
