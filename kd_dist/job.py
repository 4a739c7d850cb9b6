"""What both jobs do alike around the engine: read the command line, find and decode the data, claim the run folder,
train, keep the result.
"""

import contextlib
import copy
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_dist import checkpoint, config, views
from kd_dist.batches import CachedCrops, FreshCrops, TrainData, steps_in_epoch
from kd_dist.cache import Cache
from kd_dist.checkpoint import RunFolder
from kd_dist.config import Settings
from kd_dist.dataset import Dataset, locate, scan
from kd_dist.engine import HEARTBEAT_SECONDS, LossTerms, Schedule, Trainer
from kd_dist.errors import UserError
from kd_dist.inference import Forward, compute_dtype
from kd_dist.models import count_weights
from kd_dist.pixels import Pixels, build_pixels, default_folder, open_pixels
from kd_dist.runtime import Interrupted, Runtime, StopRequest, launched_rank

PROGRESS_SECONDS = 10.0
GPU_WORKERS = 8


def read_settings(kind: type[Settings], prog: str, description: str, epilog: str) -> Settings:
    """The settings this process was started with. --help prints once, however many ranks."""
    parser = config.parser_for(kind, prog, description, epilog)
    if {"-h", "--help"} & set(sys.argv[1:]) and launched_rank() != 0:
        sys.exit(0)
    return config.resolve(kind, config.read_command_line(parser), torch.cuda.is_available())


@dataclass(frozen=True)
class Data:
    """A data set with its decoded pictures."""

    samples: Dataset
    pixels: dict[str, Pixels]

    def require_fit(self, cache: Cache) -> None:
        """Raise UserError, naming both values, where a cache was made of anything but this data."""
        samples = self.samples
        cache.check_fits(samples.name, samples.classes, {"train": samples.train, "val": samples.val})

    def split(self, name: str):
        """(sample list, pixels) of "train" or "val"."""
        return self.samples.split(name), self.pixels[name]


def say(runtime: Runtime, text: str) -> None:
    """One line of progress from rank 0, headed by the time of day."""
    if runtime.is_main:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def progress_lines(runtime: Runtime, what: str) -> Callable[[int, int], None]:
    """A callback (done, all) that prints a line now and then on rank 0."""
    said_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > PROGRESS_SECONDS:
            said_at = time.monotonic()
            say(runtime, f"{what}: {done:,} of {total:,}")

    return progress


@dataclass(frozen=True)
class DataSource:
    """Where the data is, or is to be fetched from, as the flags of the same names say."""

    data: str | None = None
    release: str | None = None
    archive: str | None = None
    sha256: str | None = None
    pixels_dir: str | None = None


def open_data(source: DataSource, runtime: Runtime) -> Data:
    """Find the data (fetching it where that is allowed), list it, and decode it, each once a node.

    Raises UserError on every rank for data that is not there, damaged, or cannot be fetched or decoded.
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    root = Path(runtime.once_a_node("find data", lambda: str(_find(source, runtime))))
    store = Path(source.pixels_dir) if source.pixels_dir else default_folder(root)

    def prepare() -> None:
        samples = scan(root, manifest_folder=store, workers=threads)
        for split in ("train", "val"):
            build_pixels(samples.split(split), store, threads, progress_lines(runtime, f"decoding {split} images"))

    runtime.once_a_node("decode data", prepare)
    samples = scan(root, manifest_folder=store)
    pixels = {split: open_pixels(samples.split(split), store) for split in ("train", "val")}
    if None in pixels.values():
        raise UserError(
            f"the decoded pictures in {store} vanished or belong to other data; run the same command again."
        )
    return Data(samples, pixels)


def _find(source: DataSource, runtime: Runtime) -> Path:
    typed = source.data or os.environ.get("KD_DIST_DATA")
    progress = _progress_by_name(runtime)
    return locate(
        Path(typed or "data"), source.release, source.archive, source.sha256, explicit=bool(typed), progress=progress
    )


def _progress_by_name(runtime: Runtime):
    """As progress_lines, for work that names its own steps: a callback (what, done, all)."""
    lines: dict[str, Callable[[int, int], None]] = {}

    def progress(what: str, done: int, total: int) -> None:
        lines.setdefault(what, progress_lines(runtime, what))(done, total)

    return progress


def claim(settings: Settings, data: Data, runtime: Runtime, **identity: str) -> RunFolder:
    """Take the run folder for this run; raises UserError on every rank where it holds something else.

    The data's fingerprints and `identity` are kept with the settings, so that a run is not gone on with on other data.
    Claim when all else has been checked: a typo must not bind the folder, nor a refusal mark a finished run as failed.
    """
    folder = RunFolder(Path(settings.out))
    stored = stored_settings(settings, data, **identity)
    runtime.on_main(lambda: checkpoint.claim(folder, settings.kind, stored, settings.may_change, settings.start_over))
    return folder


def stored_settings(settings: Settings, data: Data, **identity: str) -> dict[str, object]:
    """What a run folder keeps of the settings, and what else its run is bound to."""
    fingerprints = {f"{split} data": data.samples.split(split).fingerprint for split in ("train", "val")}
    return {**settings.stored(), **fingerprints, **identity}


@contextlib.contextmanager
def running(folder: RunFolder, runtime: Runtime, stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """From here on a signal is a request, and the run folder's state says how the run stands and how it ended.

    `stop` is the request of a command that does several runs and listens already.
    """
    _note(folder, runtime, "running", "")
    try:
        with contextlib.nullcontext(stop) if stop else StopRequest() as stop:
            yield stop
    except (Interrupted, KeyboardInterrupt) as error:
        lost = runtime.announced()  # the launcher stops the ranks that are left when one has failed
        _note(folder, runtime, "failed" if lost else "interrupted", lost or str(error))
        raise
    except BaseException as error:
        reason = runtime.announced() or str(error) or type(error).__name__
        runtime.announce(reason)
        _note(folder, runtime, "failed", reason)
        raise
    _note(folder, runtime, "finished", "")


def _note(folder: RunFolder, runtime: Runtime, status: str, message: str) -> None:
    if runtime.is_main:
        with contextlib.suppress(UserError):  # a full disk must not hide the reason
            last = checkpoint.read_state(folder) or {}
            reached = {name: last[name] for name in ("step", "epoch", "epochs") if name in last}
            checkpoint.write_state(folder, status, **reached, message=message)


def heartbeat(folder: RunFolder, runtime: Runtime, then: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A progress callback that shows the run's state to be alive now and then, and passes on to `then`."""
    beat_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal beat_at
        if time.monotonic() - beat_at > HEARTBEAT_SECONDS:
            beat_at = time.monotonic()
            _note(folder, runtime, "running", "")
        then(done, total)

    return progress


def workers_for(settings: Settings, runtime: Runtime) -> int:
    """Loader processes of a rank: as typed, else none on a CPU, which has no core to spare, and up to 8 on a GPU."""
    if settings.workers is not None:
        return settings.workers
    if runtime.device.type == "cpu":
        return 0
    return min(GPU_WORKERS, max(1, (os.cpu_count() or 1) // runtime.local_world_size - 1))


def software() -> str:
    """What wrote a file, in one line."""
    return f"kd_dist, torch {torch.__version__}, Python {platform.python_version()}"


def fresh_crops(settings: Settings, data: Data) -> FreshCrops:
    """A new crop of every training image in every epoch."""
    return FreshCrops(data.pixels["train"].sizes_N2, settings.crop_scale, settings.seed)


def train(
    settings: Settings,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    model: nn.Module,
    loss_terms: LossTerms,
    views_of_epoch: FreshCrops | CachedCrops,
    *,
    logits_NVK: np.ndarray | None = None,
    stop: StopRequest,
    teacher_val_NK: np.ndarray | None = None,
) -> tuple[nn.Module, np.ndarray]:
    """Train to the end of the schedule, resuming what the folder holds: the resulting model, and its val logits float32
    [N, K].

    `teacher_val_NK` adds agreement with the teacher to the metrics.
    """
    samples, pixels = data.split("train")
    train_data = TrainData(
        pixels=pixels,
        labels_N=samples.labels_N,
        views_of_epoch=views_of_epoch,
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        logits_NVK=logits_NVK,
    )
    validation = Validation(data, settings.image_size, settings.precision, runtime, teacher_val_NK)
    # The schedule's fields are settings of the same names.
    schedule = Schedule(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Schedule)})
    trainer = Trainer(
        model,
        train_data,
        loss_terms,
        validation.metrics,
        schedule,
        runtime,
        folder,
        stop=stop,
        mean=config.MEAN,
        std=config.STD,
        workers=workers_for(settings, runtime),
        precision=settings.precision,
    )
    say(runtime, _introduction(settings, model, trainer))
    trainer.run()
    return trainer.evaluated_model, validation.logits(trainer.evaluated_model)


def _introduction(settings: Settings, model: nn.Module, trainer: Trainer) -> str:
    data, runtime = trainer.data, trainer.runtime
    return (
        f"{settings.kind}: {count_weights(model):,} weights, {len(data.labels_N):,} images at {data.image_size} px, "
        f"{settings.epochs} epochs of {data.steps_per_epoch} steps, {runtime.world_size} ranks on "
        f"{runtime.device.type} in {trainer.compute_dtype} (preset {settings.preset})"
    )


def require_fit(settings: Settings, data: Data, model: nn.Module, runtime: Runtime) -> None:
    """Raise UserError where the batch does not suit the data and the ranks, or the picture size the network."""
    images, ranks = len(data.samples.train), runtime.world_size
    if settings.batch_size > images:
        raise UserError(
            f"--batch-size {settings.batch_size} is larger than the {images} training images; use --batch-size "
            f"{images} or less."
        )
    steps = steps_in_epoch(images, settings.batch_size)
    if images // steps < 2 * ranks:
        raise UserError(
            f"--batch-size {settings.batch_size} over {ranks} ranks leaves some with fewer than two of the {images} "
            "images a step; use a larger --batch-size or fewer ranks."
        )
    try:
        with torch.inference_mode():
            copy.deepcopy(model).eval()(torch.zeros(1, 3, settings.image_size, settings.image_size))
    except RuntimeError as error:
        raise UserError(
            f"--image-size {settings.image_size} does not suit this network ({str(error).splitlines()[0]}); choose a "
            "larger one."
        ) from error


class Validation:
    """The val split in its evaluation view: each image counted once, at any number of ranks."""

    def __init__(
        self, data: Data, image_size: int, precision: str, runtime: Runtime, teacher_val_NK: np.ndarray | None = None
    ):
        self.samples, self.pixels = data.split("val")
        self.image_size, self.runtime, self.teacher_val_NK = image_size, runtime, teacher_val_NK
        self.dtype = compute_dtype(runtime.device, precision)
        box_N4 = views.evaluation_boxes(self.pixels.sizes_N2)
        self.shown = views.Shown.plain(np.arange(len(box_N4)), box_N4, np.zeros(len(box_N4), np.uint8))

    def logits(self, model: nn.Module) -> np.ndarray:
        """Logits float32 [N, K], the same on every rank."""
        forward = Forward(model, self.pixels, self.image_size, config.MEAN, config.STD, self.runtime.device, self.dtype)
        return forward.all_logits(self.shown, len(self.samples.classes), self.runtime)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """val_top1, val_loss (cross-entropy in nats), and val_agreement with the teacher's top class where a teacher is
        cached.
        """
        return self.metrics_of(self.logits(model))

    def metrics_of(self, logits_NK: np.ndarray) -> dict[str, float]:
        """The metrics of given val logits."""
        loss = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits_NK).double(), torch.from_numpy(self.samples.labels_N)
        )
        metrics = {"val_top1": top1(logits_NK, self.samples.labels_N), "val_loss": float(loss)}
        if self.teacher_val_NK is not None:
            metrics["val_agreement"] = top1(logits_NK, self.teacher_val_NK.argmax(axis=1))
        return metrics


def top1(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose highest logit is their label's, in [0, 1]."""
    return float((logits_NK.argmax(axis=1) == labels_N).mean())


def keep(
    folder: RunFolder,
    settings: Settings,
    arch: str,
    data: Data,
    model: nn.Module,
    val_logits_NK: np.ndarray,
    **facts: object,
) -> None:
    """Write the result of a run, on rank 0: its val logits, then the weights with what one must know to use them."""
    val = data.samples.val
    val_top1 = top1(val_logits_NK, val.labels_N)
    checkpoint.write_val_logits(
        folder.val_logits, val_logits_NK, val.labels_N, val.paths, val.fingerprint, top1=val_top1
    )
    checkpoint.save_model(
        folder,
        {
            "kind": settings.kind,
            "arch": arch,
            "weights": {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
            "classes": list(data.samples.classes),
            "image_size": settings.image_size,
            "mean": list(config.MEAN),
            "std": list(config.STD),
            "seed": settings.seed,
            "val_top1": val_top1,
            "data": {"name": data.samples.name, "train": data.samples.train.fingerprint, "val": val.fingerprint},
            "settings": settings.stored(),
            "software": software(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
        },
    )
