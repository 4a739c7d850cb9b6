"""Entry 1: train a teacher, then write its logits on views of every image to the cache.

torchrun --nproc_per_node=4 -m kd_dist.teacher
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from kd_dist import job, label, objectives, views
from kd_dist.cache import open_cache
from kd_dist.cache.format import parts_folder_of
from kd_dist.checkpoint import CACHE_SECONDS, RunFolder, note_cost, read_costs, read_metrics
from kd_dist.config import TeacherSettings
from kd_dist.errors import UserError
from kd_dist.events import Code
from kd_dist.inference import compute_dtype
from kd_dist.job import Data, DataSource
from kd_dist.models import TEACHERS
from kd_dist.runtime import Runtime, StopRequest, joined, run_entry

DESCRIPTION = """Train a teacher on all ranks, then write its logits on V views of every train and val image to one HDF5
file. Running the same command again resumes, in the training and in the writing."""
EPILOG = """Example: torchrun --nproc_per_node=4 -m kd_dist.teacher --out runs/teacher --epochs 100. Without GPUs the
same command trains at a small size on the CPU. Next: torchrun --nproc_per_node=4 -m kd_dist.distill"""


def main() -> None:
    settings = job.read_settings(TeacherSettings, "kd_dist.teacher", DESCRIPTION, EPILOG)
    if settings.teacher not in TEACHERS:
        raise UserError(f"--teacher {settings.teacher} is not known; choose from {', '.join(TEACHERS)}.")
    target = Path(settings.cache) if settings.cache else RunFolder(Path(settings.out)).cache
    with joined(settings.device) as runtime:
        data = job.open_data(DataSource.of(settings), runtime)
        torch.manual_seed(settings.seed)
        model = TEACHERS[settings.teacher](len(data.samples.classes))
        job.require_trainable(settings, data, model, runtime)
        if settings.views:
            runtime.on_main(lambda: require_own_cache(settings, target, data))
        folder = job.claim(settings, data, runtime)
        with job.running(folder, runtime) as stop:
            tell_what_passed(settings, folder, runtime)
            if not runtime.on_main(folder.model.exists):
                train(settings, data, model, folder, runtime, stop)
            if settings.views:
                write(settings, data, target, folder, runtime, stop)


def require_own_cache(settings: TeacherSettings, target: Path, data: Data) -> None:
    """Raise UserError where the cache's place is taken by anything but what this run would write there."""
    folder = RunFolder(Path(settings.out))
    if not target.exists() or (settings.start_over and target == folder.cache):
        return
    if settings.start_over or not folder.model.exists():
        raise UserError(f"{target} exists already, and is not of this run; name another --cache, or move that file.")
    cache = open_cache(target)
    data.require_fit(cache)
    own = label.load_teacher(folder.model, torch.device("cpu")).row.sha256
    if [row.sha256 for row in cache.header.teachers] != [own]:
        raise UserError(
            f"{target} was labelled by the teacher {cache.header.teachers[0].sha256}, the one in {folder.path} is "
            f"{own}; name another --cache."
        )
    if cache.header.top_k != (settings.top_k or 0):
        kept = f"the top {cache.header.top_k}" if cache.header.top_k else "all"
        raise UserError(
            f"{target} holds {kept} logits of a row, --top-k asks for {settings.top_k or 'all'}; name another --cache."
        )
    if cache.views != settings.views:
        raise UserError(
            f"{target} holds {cache.views} views, --views asks for {settings.views}; `python -m kd_dist.cache extend` "
            "writes a longer one from it."
        )
    share = views.mixed_share_of(cache.header.view_sampler)
    if share != settings.mixed_views:
        raise UserError(
            f"{target} was written with --mixed-views {share}, this is --mixed-views {settings.mixed_views}; name "
            "another --cache."
        )


def train(
    settings: TeacherSettings,
    data: Data,
    model: nn.Module,
    folder: RunFolder,
    runtime: Runtime,
    stop: StopRequest,
) -> None:
    """Train the teacher and keep its last weights (or their moving average), not the best on val."""

    def keep_middle(epoch: int, model: nn.Module, metrics: dict[str, float]) -> None:
        if epoch in settings.keep_epochs:
            scores = {name: score for name, score in metrics.items() if name.endswith("_top1")}
            job.keep_model(folder.model_after(epoch), settings, settings.teacher, data, model, scores, epochs=epoch)

    loss = objectives.hard(len(data.samples.classes), settings.label_smoothing)
    crops = job.fresh_crops(settings, data)
    training = job.training(settings, data, runtime, folder, model, loss, crops, stop=stop, after_epoch=keep_middle)
    model, logits_MK = training.run()
    runtime.on_main(lambda: job.keep(folder, settings, settings.teacher, data, model, logits_MK))


def tell_what_passed(settings: TeacherSettings, folder: RunFolder, runtime: Runtime) -> None:
    """Say which weights cannot be kept any more, because their epochs have passed; the last epoch's are model.pt's."""
    rows = runtime.on_main(lambda: read_metrics(folder))
    done = max((row["epoch"] for row in rows), default=0)
    passed = [epoch for epoch in settings.keep_epochs if epoch <= done and epoch < settings.epochs]
    missing = runtime.on_main(lambda: [str(epoch) for epoch in passed if not folder.model_after(epoch).exists()])
    if missing:
        job.say(
            runtime,
            f"--keep-epochs {' '.join(missing)}: {done} epochs are done already, so those weights are gone; train in "
            "another --out to have them",
        )


def write(
    settings: TeacherSettings, data: Data, target: Path, folder: RunFolder, runtime: Runtime, stop: StopRequest
) -> None:
    """Write the cache, or go on with it; this run's whole one is left as it is."""
    if runtime.on_main(target.exists):
        job.say(runtime, f"{target} is there already; `python -m kd_dist.cache info {target}` describes it")
        return
    teacher = label.load_teacher(folder.model, runtime.device)
    job.say(
        runtime,
        f"teacher trained {teacher.row.trained_on}; writing {settings.views} views of every image to {target}",
    )
    job.emit(folder, runtime, Code.LABELLING_STARTED, views=settings.views)
    dtype = compute_dtype(runtime.device, settings.precision)
    header, tables = label.plan(teacher, data, settings.views, settings.crop_scale, settings.seed, dtype)
    header, tables = label.mixed(label.shortened(header, settings.top_k), tables, settings.mixed_views)
    lines = job.progress_lines(runtime, "writing the cache, blocks")

    def block_written(done: int, total: int) -> None:
        job.emit(folder, runtime, Code.BLOCK_WRITTEN, done=done, total=total)
        lines(done, total)

    progress = job.heartbeat(folder, runtime, block_written)
    with clocked(folder, target, runtime, progress) as progress:
        label.write_cache(target, [teacher], data, header, tables, runtime, stop, progress)
    job.emit(folder, runtime, Code.CACHE_PUBLISHED, path=str(target))
    job.say(runtime, f"wrote {target}. Next: python -m kd_dist.distill --cache {target}")


@contextlib.contextmanager
def clocked(
    folder: RunFolder, target: Path, runtime: Runtime, progress: Callable[[int, int], None]
) -> Iterator[Callable[[int, int], None]]:
    """Note in the run's costs what writing the cache takes, interrupted attempts included, so that one can tell after
    how many students it pays. Gives `progress` as a function that notes it now and then: a kill costs that little.
    """
    begun = runtime.on_main(
        lambda: read_costs(folder).get(CACHE_SECONDS, 0.0) if parts_folder_of(target).exists() else 0.0
    )
    started = noted_at = time.monotonic()

    def note() -> None:
        nonlocal noted_at
        noted_at = time.monotonic()
        if runtime.is_main:
            with contextlib.suppress(UserError):  # a full disk must not hide what the writing itself has to say
                note_cost(folder, CACHE_SECONDS, begun + noted_at - started)

    def noting(done: int, total: int) -> None:
        if time.monotonic() - noted_at > job.PROGRESS_SECONDS:
            note()
        progress(done, total)

    try:
        yield noting
    finally:
        note()


if __name__ == "__main__":
    run_entry(main)
