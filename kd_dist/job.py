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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_dist import checkpoint, config, events, views
from kd_dist.batches import CachedCrops, FreshCrops, TrainData, steps_in_epoch
from kd_dist.cache import Cache, SoftLabels
from kd_dist.checkpoint import RunFolder
from kd_dist.config import Settings
from kd_dist.dataset import SPLITS, Dataset, SampleList, locate, scan
from kd_dist.engine import HEARTBEAT_SECONDS, AfterEpoch, LossTerms, Schedule, Trainer
from kd_dist.errors import UserError
from kd_dist.events import Code, Reason
from kd_dist.folds import Fold, fold_of, labelled_rows
from kd_dist.inference import Forward, compute_dtype
from kd_dist.losses import UNKNOWN
from kd_dist.models import count_weights
from kd_dist.pixels import Pictures, Pixels, build_pixels, default_folder, measure_files, open_files, open_pixels
from kd_dist.resident import ResidentPixels, free_bytes
from kd_dist.runtime import Interrupted, Runtime, StopRequest, launched_rank, peer_is_gone

PROGRESS_SECONDS = 10.0
GPU_WORKERS = 8
RESIDENT_SHARE = 0.4  # of a GPU's free memory that pictures may take unasked; the network needs the rest


def read_settings(kind: type[Settings], prog: str, description: str, epilog: str) -> Settings:
    """The settings this process was started with. --help prints once, however many ranks."""
    parser = config.parser_for(kind, prog, description, epilog)
    if {"-h", "--help"} & set(sys.argv[1:]) and launched_rank() != 0:
        sys.exit(0)
    return config.resolve(kind, config.read_command_line(parser), torch.cuda.is_available())


@dataclass(frozen=True)
class Data:
    """A data set with its pictures. `threads` of a rank may draw them ahead of a forward pass."""

    samples: Dataset
    pixels: dict[str, Pictures]
    threads: int = 0

    def require_fit(self, cache: Cache) -> None:
        """Raise UserError, naming both values, where a cache was made of anything but this data."""
        samples = self.samples
        cache.check_fits(samples.name, samples.classes, {"train": samples.train, "val": samples.val})

    def split(self, name: str):
        """(sample list, pixels) of "train" or "val"."""
        return self.samples.split(name), self.pixels[name]


def fold_for(settings: Settings, data: Data) -> Fold | None:
    """The part of train that the settings leave out, None where they leave none out. Raises UserError."""
    if settings.fold is None:
        return None
    train = data.samples.train
    return fold_of(train.labels_N, train.sha256_N32, settings.fold, settings.folds)


def members_of(settings: Settings, data: Data) -> np.ndarray | None:
    """The rows of train that are trained on, int64 and sorted; None for all. Raises UserError as fold_for does."""
    if settings.labelled < 1 and settings.learns_from_labels_alone:
        return labelled_of(settings, data)
    fold = fold_for(settings, data)
    return None if fold is None else fold.train_M


def labelled_of(settings: Settings, data: Data) -> np.ndarray:
    """The rows of train whose labels are used, int64 and sorted: --labelled of what --fold leaves."""
    train, fold = data.samples.train, fold_for(settings, data)
    rows_M = np.arange(len(train)) if fold is None else fold.train_M
    return rows_M[labelled_rows(train.labels_N[rows_M], train.sha256_N32[rows_M], settings.labelled)]


@dataclass(frozen=True, eq=False)
class Scored:
    """The images that a run is scored on: rows of a split, and the same as a list with its own fingerprint.

    `head` begins the names of the scores: "val", or "tune" where it is a part of train and must not pass for val.
    """

    head: str
    split: str
    rows_M: np.ndarray
    samples: SampleList


def scored_on(settings: Settings, data: Data) -> Scored:
    """val, or under --tune the part of train that is left out."""
    if not settings.tune:
        return Scored("val", "val", np.arange(len(data.samples.val)), data.samples.val)
    fold = fold_for(settings, data)
    return Scored("tune", "train", fold.held_out_M, data.samples.train.at(fold.held_out_M, fold.name))


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
    pixels: str = "auto"
    pixels_dir: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> "DataSource":
        """The fields are settings of the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})


def open_data(source: DataSource, runtime: Runtime) -> Data:
    """Find the data (fetching it where that is allowed), list it, and decode it, each once a node; then place the
    pictures.

    Raises UserError on every rank for data that is not there, damaged, or cannot be fetched or decoded.
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    root = Path(runtime.once_a_node("find data", lambda: str(_find(source, runtime))))
    store = Path(source.pixels_dir) if source.pixels_dir else default_folder(root)

    from_files = source.pixels == "off"
    make, what = (measure_files, "measuring") if from_files else (build_pixels, "decoding")

    def prepare() -> None:
        samples = scan(root, manifest_folder=store, workers=threads)
        for split in SPLITS:
            make(samples.split(split), store, threads, progress_lines(runtime, f"{what} {split} images"))

    runtime.once_a_node("decode data", prepare)
    samples = scan(root, manifest_folder=store)
    pixels = {split: (open_files if from_files else open_pixels)(samples.split(split), store) for split in SPLITS}
    if None in pixels.values():
        raise UserError(
            f"the decoded pictures in {store} vanished or belong to other data; run the same command again."
        )
    return Data(samples, pixels if from_files else _placed(pixels, source.pixels, runtime), spare_cores(runtime))


def _placed(pixels: dict[str, Pixels], where: str, runtime: Runtime) -> dict[str, Pictures]:
    """The decoded pictures in the host's memory or on the device, on all ranks alike."""
    needed = sum(len(split.bytes_) for split in pixels.values())
    free = min(runtime.gather(free_bytes(runtime.device)))
    if where == "auto":
        where = "device" if runtime.device.type == "cuda" and needed < RESIDENT_SHARE * free else "memory"
    if where == "memory":
        return pixels
    if needed > free:
        raise UserError(
            f"--pixels device needs {needed / 1e9:.1f} GB for the decoded pictures, {runtime.device} has "
            f"{free / 1e9:.1f} GB free; use --pixels memory."
        )
    return {name: ResidentPixels(split, runtime.device) for name, split in pixels.items()}


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
    runtime.on_main(
        lambda: checkpoint.claim(
            folder, settings.kind, stored, settings.may_change, settings.start_over, settings.completed
        )
    )
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
    emit(folder, runtime, Code.DATA_READY)
    try:
        with contextlib.nullcontext(stop) if stop else StopRequest() as stop:
            yield stop
    except (Interrupted, KeyboardInterrupt) as error:
        lost = runtime.announced()  # the launcher stops the ranks that are left when one has failed
        if lost:
            _note_end(folder, runtime, "failed", Reason.PEER_LOST, lost)
        else:
            _note_end(folder, runtime, "interrupted", Reason.STOPPED, str(error))
        raise
    except BaseException as error:
        announced = runtime.announced()
        message = announced or str(error) or type(error).__name__
        runtime.announce(message)
        _note_end(folder, runtime, "failed", _reason_of(error, announced), message)
        raise
    _note(folder, runtime, "finished", "")
    emit(folder, runtime, Code.RUN_FINISHED)


def _reason_of(error: BaseException, announced: str | None) -> Reason:
    if isinstance(error, UserError):
        return Reason.USER_ERROR
    return Reason.PEER_LOST if announced or peer_is_gone(error) else Reason.DEFECT


def emit(folder: RunFolder, runtime: Runtime, code: Code, **facts: object) -> None:
    """Append an event of the run, on rank 0."""
    if runtime.is_main:
        events.emit(folder.path, code, **facts)


def _note_end(folder: RunFolder, runtime: Runtime, status: str, reason: Reason, message: str) -> None:
    _note(folder, runtime, status, message, code=reason)
    code = Code.RUN_FAILED if status == "failed" else Code.RUN_INTERRUPTED
    emit(folder, runtime, code, reason=reason, message=message)


def _note(folder: RunFolder, runtime: Runtime, status: str, message: str, **facts: object) -> None:
    if runtime.is_main:
        with contextlib.suppress(UserError):  # a full disk must not hide the reason
            last = checkpoint.read_state(folder) or {}
            reached = {name: last[name] for name in ("step", "epoch", "epochs") if name in last}
            checkpoint.write_state(folder, status, **reached, message=message, **facts)


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
    return spare_cores(runtime) if settings.workers is None else settings.workers


def spare_cores(runtime: Runtime) -> int:
    """Cores that a rank may use besides its own: none on a CPU, up to 8 on a GPU."""
    if runtime.device.type == "cpu":
        return 0
    return min(GPU_WORKERS, max(1, (os.cpu_count() or 1) // runtime.local_world_size - 1))


def software() -> str:
    """What wrote a file, in one line."""
    return f"kd_dist, torch {torch.__version__}, Python {platform.python_version()}"


def fresh_crops(settings: Settings, data: Data) -> FreshCrops:
    """A new crop of every training image in every epoch."""
    return FreshCrops(data.pixels["train"].sizes_N2, settings.crop_scale, settings.seed)


@dataclass(frozen=True)
class Training:
    """A run of the engine with all that the settings say put into it, and the validation it calls."""

    settings: Settings
    trainer: Trainer
    validation: "Validation"

    def run(self) -> tuple[nn.Module, np.ndarray]:
        """Train to the end of the schedule, resuming what the folder holds: the resulting model, and its logits float32
        [M, K] of the images it is scored on, val unless the settings say otherwise.
        """
        runtime, folder = self.trainer.runtime, self.trainer.folder
        say(runtime, _introduction(self.settings, self.trainer))
        emit(folder, runtime, Code.TRAINING_STARTED, epochs=self.settings.epochs, ranks=runtime.world_size)
        self.trainer.run()
        model = self.trainer.evaluated_model
        return model, self.validation.logits(model)


def training(
    settings: Settings,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    model: nn.Module,
    loss_terms: LossTerms,
    views_of_epoch: FreshCrops | CachedCrops,
    *,
    logits_NVK: SoftLabels | None = None,
    stop: StopRequest,
    cache: Cache | None = None,
    after_epoch: AfterEpoch | None = None,
) -> Training:
    """What trains this model on this data under these settings, ready to run.

    `cache` adds agreement with the teacher to the metrics.
    """
    train_data = _train_data(settings, data, views_of_epoch, logits_NVK)
    validation = Validation(settings, data, runtime, cache)

    def epoch_finished(epoch: int, model: nn.Module, metrics: dict[str, float]) -> None:
        if after_epoch:
            after_epoch(epoch, model, metrics)
        emit(folder, runtime, Code.EPOCH_FINISHED, epoch=epoch, epochs=settings.epochs, **metrics)

    trainer = Trainer(
        model,
        train_data,
        loss_terms,
        validation.metrics,
        schedule_of(settings),
        runtime,
        folder,
        stop=stop,
        mean=config.MEAN,
        std=config.STD,
        workers=workers_for(settings, runtime),
        precision=settings.precision,
        compile_model=settings.compile,
        trace=settings.profile,
        after_epoch=epoch_finished,
    )
    return Training(settings, trainer, validation)


def _train_data(
    settings: Settings, data: Data, views_of_epoch: FreshCrops | CachedCrops, logits_NVK: SoftLabels | None
) -> TrainData:
    samples, pixels = data.split("train")
    labels_N = samples.labels_N
    if settings.labelled < 1:
        labels_N = np.full_like(samples.labels_N, UNKNOWN)
        used_M = labelled_of(settings, data)
        labels_N[used_M] = samples.labels_N[used_M]
    return TrainData(
        pixels=pixels,
        labels_N=labels_N,
        views_of_epoch=views_of_epoch,
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        logits_NVK=logits_NVK,
        members_M=members_of(settings, data),
        blended_epochs=settings.blended_epochs,
    )


def schedule_of(settings: Settings) -> Schedule:
    """The schedule's fields are settings of the same names."""
    return Schedule(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Schedule)})


def _introduction(settings: Settings, trainer: Trainer) -> str:
    data, runtime = trainer.data, trainer.runtime
    unknown = int((data.labels_N == UNKNOWN).sum())
    labels = f" ({len(data.labels_N) - unknown:,} labels used)" if unknown else ""
    return (
        f"{settings.kind}: {count_weights(trainer.model):,} weights, {len(data):,} images{labels} at "
        f"{data.image_size} px, {settings.epochs} epochs of {data.steps_per_epoch} steps, "
        f"{runtime.world_size} ranks on {runtime.device.type} in {trainer.compute_dtype} (preset {settings.preset})"
    )


def require_trainable(settings: Settings, data: Data, model: nn.Module, runtime: Runtime) -> None:
    """Raise UserError where the batch does not suit the data and the ranks, or the picture size the network."""
    members_M = members_of(settings, data)
    images, ranks = len(data.samples.train if members_M is None else members_M), runtime.world_size
    if settings.batch_size > images:
        raise UserError(
            f"--batch-size {settings.batch_size} is larger than the {images} training images"
            f"{f' that --labelled {settings.labelled:g} leaves' if settings.labelled < 1 else ''}; use --batch-size "
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
        reason = str(error).splitlines()[0]
        other = "smaller" if "allocate memory" in reason else "larger"
        raise UserError(
            f"--image-size {settings.image_size} does not suit this network ({reason}); choose a {other} one."
        ) from error


class Validation:
    """The images a run is scored on in their evaluation view: each counted once, at any number of ranks."""

    def __init__(self, settings: Settings, data: Data, runtime: Runtime, cache: Cache | None = None):
        self.scored, self.runtime, self.image_size = scored_on(settings, data), runtime, settings.image_size
        self.threads = data.threads
        self.pixels, rows_M = data.pixels[self.scored.split], self.scored.rows_M
        self.teacher_MK = cache.split(self.scored.split).logits_NVK[rows_M, 0] if cache else None
        self.dtype = compute_dtype(runtime.device, settings.precision)
        box_M4 = views.evaluation_boxes(self.pixels.sizes_N2[rows_M])
        self.shown = views.Shown.plain(rows_M, box_M4, np.zeros(len(rows_M), np.uint8))

    def logits(self, model: nn.Module) -> np.ndarray:
        """Logits float32 [M, K], the same on every rank."""
        normalised = (config.MEAN, config.STD, self.runtime.device, self.dtype)
        forward = Forward(model, self.pixels, self.image_size, *normalised, self.threads)
        return forward.all_logits(self.shown, len(self.scored.samples.classes), self.runtime)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """val_top1, val_loss (cross-entropy in nats), and val_agreement with the teacher's top class where a teacher is
        cached; "tune_" heads the names where it is not val.
        """
        return self.metrics_of(self.logits(model))

    def metrics_of(self, logits_MK: np.ndarray) -> dict[str, float]:
        """The metrics of given logits."""
        labels_M = self.scored.samples.labels_N
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits_MK).double(), torch.from_numpy(labels_M))
        metrics = {"top1": top1(logits_MK, labels_M), "loss": float(loss)}
        if self.teacher_MK is not None:
            metrics["agreement"] = top1(logits_MK, self.teacher_MK.argmax(axis=1))
        return {f"{self.scored.head}_{name}": value for name, value in metrics.items()}


def top1(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose highest logit is their label's, in [0, 1]."""
    return float((logits_NK.argmax(axis=1) == labels_N).mean())


def keep(
    folder: RunFolder,
    settings: Settings,
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
    scored = scored_on(settings, data)
    samples, score = scored.samples, top1(logits_MK, scored.samples.labels_N)
    checkpoint.write_val_logits(
        folder.val_logits, logits_MK, samples.labels_N, samples.paths, samples.fingerprint, top1=score, of=samples.split
    )
    keep_model(folder.model, settings, arch, data, model, {f"{scored.head}_top1": score}, **facts)


def keep_model(
    path: Path,
    settings: Settings,
    arch: str,
    data: Data,
    model: nn.Module,
    scores: Mapping[str, float],
    **facts: object,
) -> None:
    """Write weights, with their scores and what else one must know to use them."""
    fingerprints = {split: data.samples.split(split).fingerprint for split in ("train", "val")}
    checkpoint.save_model(
        path,
        {
            "kind": settings.kind,
            "arch": arch,
            "weights": {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
            "classes": list(data.samples.classes),
            "image_size": settings.image_size,
            "mean": list(config.MEAN),
            "std": list(config.STD),
            "seed": settings.seed,
            **scores,
            "fold": None if settings.fold is None else {"number": settings.fold, "folds": settings.folds},
            "data": {"name": data.samples.name, **fingerprints},
            "settings": settings.stored(),
            "software": software(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
        },
    )
