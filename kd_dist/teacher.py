"""The teacher's job: train a teacher, then write its logits on the views of every image to the cache.

torchrun --nproc_per_node=4 -m kd_dist.teacher
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from kd_dist import job, label, models
from kd_dist.cache import check_top_k, open_cache
from kd_dist.cache.format import shards_folder_of
from kd_dist.config import OF_DATA, TeacherConfig, carried, command
from kd_dist.dist.endings import StopRequest, run_entry
from kd_dist.dist.runtime import Runtime, joined
from kd_dist.errors import UserError
from kd_dist.inference import compute_dtype
from kd_dist.job import Data, Supervision
from kd_dist.models.weights import read_weights, take_weights
from kd_dist.run.checkpoint import weights_digest
from kd_dist.run.events import Code
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import CACHE_SECONDS, note_cost, read_costs, read_metrics
from kd_dist.training import objectives

DESCRIPTION = """Train a teacher on all ranks, then write its logits on V views of every train and val image to one HDF5
file. Running the same command again resumes, both the training and the writing of the cache."""
EPILOG = """Example: torchrun --nproc_per_node=4 -m kd_dist.teacher --out runs/teacher --epochs 100. Without GPUs the
same command trains at a small size on the CPU. Next: torchrun --nproc_per_node=4 -m kd_dist.distill"""


def main() -> None:
    config = job.read_config(TeacherConfig, "kd_dist.teacher", DESCRIPTION, EPILOG)
    models.require_known(config.labelling.teacher, "--teacher")
    target = Path(config.labelling.cache) if config.labelling.cache else RunFolder(Path(config.out)).cache
    with joined(config.run.device) as runtime:
        data = job.open_data(config.data, runtime)
        torch.manual_seed(config.seed)
        model = models.build(config.labelling.teacher, len(data.samples.classes))
        initial = given_weights(config, model, len(data.samples.classes), runtime)
        job.require_trainable(config, data, model, runtime, name=config.labelling.teacher)
        initial |= job.start_from(model, config.init)
        if config.labelling.views:
            check_top_k(config.labelling.top_k, len(data.samples.classes))
            runtime.on_main(lambda: require_own_cache(config, target, data))
            if target.parent != Path(config.out):  # that folder is checked as it is claimed
                runtime.on_main(lambda: require_writable(target))
        folder = job.claim_folder(config, data, runtime, **initial)
        with job.running(folder, runtime) as stop:
            tell_what_passed(config, folder, runtime)
            if not runtime.on_main(folder.model.exists):
                train(config, data, model, folder, runtime, stop)
            if config.labelling.views:
                write(config, data, target, folder, runtime, stop)
            else:
                job.say(runtime, f"finished: {folder.model}; compare runs by {command('kd_dist.report', folder.path)}")


def given_weights(config: TeacherConfig, model: nn.Module, classes: int, runtime: Runtime) -> dict[str, str]:
    """Start from the weights that --weights names, and give what binds a run to them. Raises UserError."""
    if config.labelling.weights is None:
        return {}
    path = Path(config.labelling.weights)
    weights = read_weights(path)
    replaced = take_weights(model, weights, path, classes)
    head = f"; the head for {replaced} classes is replaced by a new head for {classes}" if replaced else ""
    job.say(runtime, f"initial weights from {path}{head}")
    return {"initial weights": weights_digest(weights)}


def require_writable(target: Path) -> None:
    """Raise UserError, before anything is trained, where the cache's folder cannot be made or written to."""
    missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        for folder in missing:  # a refused job leaves nothing behind, in the data folder least of all
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = error.strerror or error
        raise UserError(f"--cache {target} cannot be written ({reason}); choose a file in another folder.") from error


def require_own_cache(config: TeacherConfig, target: Path, data: Data) -> None:
    """Raise UserError where the cache's place is taken by anything but what this run would write there."""
    folder = RunFolder(Path(config.out))
    if not target.exists() or (config.run.start_over and target == folder.cache):
        return
    if config.run.start_over or not folder.model.exists():
        raise UserError(f"{target} already exists and is not of this run; choose another --cache, or move that file.")
    cache = open_cache(target)
    data.require_fit(cache)
    own = label.load_teacher(folder.model, torch.device("cpu")).row.sha256
    if [row.sha256 for row in cache.header.teachers] != [own]:
        raise UserError(
            f"{target} was labelled by the teacher {cache.header.teachers[0].sha256}, but the teacher in {folder.path} "
            f"is {own}; choose another --cache."
        )
    wanted = config.labelling
    if cache.header.top_k != (wanted.top_k or 0):
        kept = f"the top {cache.header.top_k}" if cache.header.top_k else "all"
        raise UserError(
            f"{target} holds {kept} logits of each soft label, but --top-k is {wanted.top_k or 'not given'}; choose "
            "another --cache."
        )
    if cache.views != wanted.views:
        longer = target.with_name(f"{target.stem}-{wanted.views}-views.h5")
        extend = command(
            "kd_dist.cache",
            *("extend", target),
            teacher=folder.model,
            views=wanted.views,
            output=longer,
            **carried(config, OF_DATA),
        )
        how = f"`{extend}` writes a cache with more views" if wanted.views > cache.views else "choose another --cache"
        raise UserError(f"{target} holds {cache.views} views, but --views is {wanted.views}; {how}.")
    if cache.header.mixed_share != wanted.mixed_views:
        raise UserError(
            f"{target} was written with --mixed-views {cache.header.mixed_share}, but --mixed-views is "
            f"{wanted.mixed_views}; choose another --cache."
        )


def train(
    config: TeacherConfig,
    data: Data,
    model: nn.Module,
    folder: RunFolder,
    runtime: Runtime,
    stop: StopRequest,
) -> None:
    """Train the teacher and keep its last weights (or their moving average), not the best on val."""

    def keep_middle(epoch: int, model: nn.Module, metrics: dict[str, float]) -> None:
        if epoch in config.labelling.keep_epochs:
            scores = {name: score for name, score in metrics.items() if name.endswith("_top1")}
            job.keep_model(
                folder.model_after(epoch), config, config.labelling.teacher, data, model, scores, epochs=epoch
            )

    loss = objectives.hard(len(data.samples.classes), config.optimisation.label_smoothing)
    crops = job.fresh_crops(config.augmentation, config.seed, data)
    supervision = Supervision(loss, crops)
    training = job.compose_training(config, data, runtime, folder, model, supervision, after_epoch=keep_middle)
    model, logits_MK = training.run(stop)
    runtime.on_main(lambda: job.keep(folder, config, config.labelling.teacher, data, model, logits_MK))


def tell_what_passed(config: TeacherConfig, folder: RunFolder, runtime: Runtime) -> None:
    """Print which weights cannot be kept any more, because their epochs have passed; the last epoch's are model.pt."""
    rows = runtime.on_main(lambda: read_metrics(folder))
    done = max((row["epoch"] for row in rows), default=0)
    passed = [epoch for epoch in config.labelling.keep_epochs if epoch <= done and epoch < config.optimisation.epochs]
    missing = runtime.on_main(lambda: [str(epoch) for epoch in passed if not folder.model_after(epoch).exists()])
    if missing:
        job.say(
            runtime,
            f"--keep-epochs {' '.join(missing)}: training is already past these epochs ({done} done), so their weights "
            "cannot be saved; to get them, train again in another --out",
        )


def write(
    config: TeacherConfig, data: Data, target: Path, folder: RunFolder, runtime: Runtime, stop: StopRequest
) -> None:
    """Write the cache, or resume writing it; a complete cache of this run is left as it is."""
    if runtime.on_main(target.exists):
        job.say(runtime, f"{target} already exists; `{command('kd_dist.cache', 'info', target)}` describes it")
        return
    teacher = label.load_teacher(folder.model, runtime.device)
    job.say(
        runtime,
        f"teacher trained {teacher.row.trained_on}; writing {config.labelling.views} views of every image to {target}",
    )
    job.emit(folder, runtime, Code.LABELLING_STARTED, views=config.labelling.views)
    dtype = compute_dtype(runtime.device, config.run.precision)
    own, crop_scale = config.labelling, config.augmentation.crop_scale
    rule = label.ViewRule(own.views, crop_scale, config.seed, own.mixed_views)
    plan = label.plan([teacher], data, rule, dtype, own.top_k)
    labeller = label.Labeller([teacher], data, plan.header, runtime.device)
    lines = job.progress_lines(runtime, "writing the cache, blocks")

    def block_written(done: int, total: int) -> None:
        job.emit(folder, runtime, Code.BLOCK_WRITTEN, done=done, total=total)
        lines(done, total)

    progress = job.heartbeat(folder, runtime, block_written)
    with clocked(folder, target, runtime, progress) as progress:
        label.write_cache(target, plan, labeller, runtime, stop, progress)
    job.emit(folder, runtime, Code.CACHE_PUBLISHED, path=str(target))
    job.say(runtime, f"wrote {target}. Next: {command('kd_dist.distill', cache=target, **carried(config))}")


@contextlib.contextmanager
def clocked(
    folder: RunFolder, target: Path, runtime: Runtime, progress: Callable[[int, int], None]
) -> Iterator[Callable[[int, int], None]]:
    """Note in the run's costs what writing the cache takes, interrupted attempts included, so that one can tell after
    how many students it pays. Gives `progress` as a function that notes it now and then: a kill costs that little.
    """
    begun = runtime.on_main(
        lambda: read_costs(folder).get(CACHE_SECONDS, 0.0) if shards_folder_of(target).exists() else 0.0
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
