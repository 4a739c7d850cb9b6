"""Entry 1: train a teacher, then write its logits on views of every image to the cache.

torchrun --nproc_per_node=4 -m kd_dist.teacher
"""

from pathlib import Path

import torch

from kd_dist import job, label, objectives
from kd_dist.cache import open_cache
from kd_dist.checkpoint import RunFolder
from kd_dist.config import TeacherSettings
from kd_dist.errors import UserError
from kd_dist.job import Data, DataSource
from kd_dist.models import TEACHERS
from kd_dist.runtime import Runtime, joined, run_entry

DESCRIPTION = """Train a teacher on all ranks, then write its logits on V views of every train and val image to one HDF5
file. Running the same command again resumes, in the training and in the writing."""
EPILOG = """Example: torchrun --nproc_per_node=4 -m kd_dist.teacher --out runs/teacher --epochs 100. Without GPUs the
same command trains at a small size on the CPU. Next: torchrun --nproc_per_node=4 -m kd_dist.distill"""


def main() -> None:
    settings = job.read_settings(TeacherSettings, "kd_dist.teacher", DESCRIPTION, EPILOG)
    if settings.teacher not in TEACHERS:
        raise UserError(f"--teacher {settings.teacher} is not known; choose from {', '.join(TEACHERS)}.")
    with joined(settings.device) as runtime:
        folder = job.claim(settings, runtime)
        with job.recorded(folder, runtime):
            data = job.open_data(DataSource(**settings.source()), runtime)
            if not runtime.on_main(folder.model.exists):
                train(settings, data, folder, runtime)
            write(settings, data, folder, runtime)


def train(settings: TeacherSettings, data: Data, folder: RunFolder, runtime: Runtime) -> None:
    """Train the teacher and keep its last weights (or their moving average), not the best on val."""
    classes = len(data.samples.classes)
    torch.manual_seed(settings.seed)
    model = TEACHERS[settings.teacher](classes)
    loss = objectives.hard(classes, settings.label_smoothing)
    crops = job.fresh_crops(settings, data)
    model, val_logits_NK = job.train(settings, data, runtime, folder, model, loss, crops, identity={})
    runtime.on_main(lambda: job.keep(folder, settings, settings.teacher, data, model, val_logits_NK))


def write(settings: TeacherSettings, data: Data, folder: RunFolder, runtime: Runtime) -> None:
    """Write the cache, or go on with it; a whole one is left as it is."""
    target = Path(settings.cache) if settings.cache else folder.cache
    if runtime.on_main(target.exists):
        job.say(runtime, f"{target} is there already; `python -m kd_dist.cache info {target}` describes it")
        return
    teacher = label.load_teacher(folder.model, runtime.device)
    job.say(
        runtime,
        f"teacher: top-1 {teacher.row.val_top1:.4f} on val; writing {settings.views} views of every image to {target}",
    )
    header, tables = label.plan(teacher, data, settings.views, settings.crop_scale, settings.seed, runtime.device)
    label.write_cache(
        target, teacher, data, header, tables, runtime, job.progress_lines(runtime, "writing the cache, blocks")
    )
    cache = runtime.on_main(lambda: open_cache(target).val_top1)
    job.say(
        runtime, f"wrote {target}; val top-1 of its rows {cache:.4f}. Next: python -m kd_dist.distill --cache {target}"
    )


if __name__ == "__main__":
    run_entry(main)
