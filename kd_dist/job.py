"""What both jobs do alike around training: read the command line, find and decode the data, claim the run folder,
train, keep the result.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from kd_dist.cache import Cache, SoftLabels
from kd_dist.config import (
    MEAN,
    RULE_HOLDS_TO,
    STD,
    AugmentationConfig,
    DataConfig,
    JobConfig,
    LabelUse,
    SplitConfig,
    flags_of,
    origin_of_lr,
    parser_for,
    read_command_line,
    resolve,
)
from kd_dist.data.folds import Fold, fold_of, labelled_rows
from kd_dist.data.releases import locate
from kd_dist.data.samples import SPLITS, Dataset, SampleList
from kd_dist.data.scan import default_folder, scan
from kd_dist.dist import endings
from kd_dist.dist.cores import available_cores
from kd_dist.dist.endings import Interrupted, StopRequest, launched_rank
from kd_dist.dist.runtime import Runtime, launched_world_size
from kd_dist.errors import Failure, UserError
from kd_dist.images import device as resident
from kd_dist.images import views
from kd_dist.images.device import free_bytes
from kd_dist.images.store import Pictures, Pixels, build_pixels, measure_files, open_files, open_pixels
from kd_dist.inference import Forward, compute_dtype
from kd_dist.models import count_weights, require_usable
from kd_dist.models.weights import misfits
from kd_dist.run import checkpoint, events
from kd_dist.run.claim import claim, read_settings
from kd_dist.run.events import Code, Reason
from kd_dist.run.folder import RunFolder
from kd_dist.run.results import write_val_logits
from kd_dist.run.state import read_state, write_state
from kd_dist.training import HEARTBEAT_SECONDS, Execution, LossTerms, Optimisation, Trainer
from kd_dist.training.batches import CachedCrops, FreshCrops, TrainData, steps_in_epoch
from kd_dist.training.losses import UNKNOWN
from kd_dist.version import software

AfterEpoch = Callable[[int, nn.Module, dict[str, float]], None]
"""Called on rank 0 at the end of an epoch: how many are done, the evaluated model, its metrics."""

Kind = TypeVar("Kind", bound=JobConfig)

PROGRESS_SECONDS = 10.0
GPU_WORKERS = 8
ALL_LABELS = LabelUse()
FEWEST_IMAGES_A_GPU = 128  # in a step; with fewer a GPU waits for its kernels to be launched
RESIDENT_SHARE = 0.4  # of a GPU's free memory that pictures may take unasked; the network needs the rest


def read_config(kind: type[Kind], prog: str, description: str, epilog: str) -> Kind:
    """The config that this process was started with. --help prints once, however many ranks.

    A resume at another number of ranks keeps the batch size that the run's folder holds. All ranks look there before
    the rendezvous; rank 0 writes the file of a new run after it.
    """
    parser = parser_for(kind, prog, description, epilog)
    if {"-h", "--help"} & set(sys.argv[1:]) and launched_rank() != 0:
        sys.exit(0)
    typed = read_command_line(parser)
    folder = RunFolder(Path(str(typed.get("out", flags_of(kind)["out"].default))))
    stored = read_settings(folder)[1] if folder.settings.exists() else None
    return resolve(kind, typed, torch.cuda.is_available(), launched_world_size(), stored)


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

    def split(self, name: str) -> tuple[SampleList, Pictures]:
        """(sample list, pixels) of "train" or "val"."""
        return self.samples.split(name), self.pixels[name]


def fold_for(split: SplitConfig, data: Data) -> Fold | None:
    """The fold of train that is left out, None where none is. Raises UserError."""
    if split.fold is None or split.folds is None:
        return None
    train = data.samples.train
    return fold_of(train.labels_N, train.sha256_N32, split.fold, split.folds)


def members_of(split: SplitConfig, labels: LabelUse, data: Data) -> np.ndarray | None:
    """The rows of train that are trained on, int64 and sorted; None for all. Raises UserError as fold_for does."""
    if labels.fraction < 1 and labels.alone:
        return labelled_of(split, labels, data)
    fold = fold_for(split, data)
    return None if fold is None else fold.train_M


def labelled_of(split: SplitConfig, labels: LabelUse, data: Data) -> np.ndarray:
    """The rows of train whose labels are used, int64 and sorted: --label-fraction of what --fold leaves."""
    train, fold = data.samples.train, fold_for(split, data)
    rows_M = np.arange(len(train)) if fold is None else fold.train_M
    return rows_M[labelled_rows(train.labels_N[rows_M], train.sha256_N32[rows_M], labels.fraction)]


@dataclass(frozen=True, eq=False)
class Scored:
    """The images that a run is scored on: rows of a split, and the same as a list with its own fingerprint.

    `head` begins the names of the scores: "val", or "tune" where it is a part of train and must not pass for val.
    """

    head: str
    split: str
    rows_M: np.ndarray
    samples: SampleList


def scored_on(split: SplitConfig, data: Data) -> Scored:
    """val, or under --tune the part of train that is left out."""
    if not split.tune:
        return Scored("val", "val", np.arange(len(data.samples.val)), data.samples.val)
    fold = fold_for(split, data)
    assert fold is not None  # --tune without --fold is refused
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


def open_data(source: DataConfig, runtime: Runtime) -> Data:
    """Find the data (fetching it where that is allowed), list it, and decode it, each once a node; then place the
    pictures.

    Raises UserError on every rank for data that is not there, damaged, or cannot be fetched or decoded.
    """
    threads = max(1, available_cores() // 2)
    root = Path(runtime.once_a_node("find data", lambda: str(_find(source, runtime))))
    store = Path(source.pixels_dir) if source.pixels_dir else default_folder(root)

    from_files = source.pixels == "off"
    make, what = (measure_files, "measuring") if from_files else (build_pixels, "decoding")

    def prepare() -> None:
        samples = scan(root, val_share=source.val_share, manifest_folder=store, workers=threads)
        written = 0
        for split in SPLITS:
            written += make(samples.split(split), store, threads, progress_lines(runtime, f"{what} {split} images"))
        if written:
            kept = "sizes of the images" if from_files else "decoded images"
            say(runtime, f"wrote {kept} to {store}: {written / 1e6:,.1f} MB; a later job reads them there")

    runtime.once_a_node("decode data", prepare)
    samples = scan(root, val_share=source.val_share, manifest_folder=store)
    for note in samples.notes() if runtime.is_main else ():
        say(runtime, note)
    opened = {split: (open_files if from_files else open_pixels)(samples.split(split), store) for split in SPLITS}
    pixels = {split: found for split, found in opened.items() if found is not None}
    if len(pixels) < len(SPLITS):
        raise UserError(
            f"the decoded pictures in {store} vanished or belong to other data; run the same command again."
        )
    stored = {split: found for split, found in pixels.items() if isinstance(found, Pixels)}
    return Data(samples, _placed(stored, source.pixels, runtime) if stored else {**pixels}, spare_cores(runtime))


def _placed(pixels: dict[str, Pixels], where: str, runtime: Runtime) -> dict[str, Pictures]:
    """The decoded pictures in the host's memory or on the device, on all ranks alike."""
    needed = sum(len(split.bytes_) for split in pixels.values())
    free = min(runtime.gather(free_bytes(runtime.device)))
    if where == "auto":
        where = "device" if runtime.device.type == "cuda" and needed < RESIDENT_SHARE * free else "memory"
    if where == "memory":
        return {**pixels}
    if needed > free:
        raise UserError(
            f"--pixels device needs {needed / 1e9:.1f} GB for the decoded pictures, {runtime.device} has "
            f"{free / 1e9:.1f} GB free; use --pixels memory."
        )
    on_device, fault = resident.place(pixels, runtime.device)
    fault = next(filter(None, runtime.gather(fault)), None)
    if fault and runtime.is_main:
        print(f"kd_dist: {fault}; the host draws all images instead, as with --pixels memory", flush=True)
    return {**pixels} if fault else {**on_device}


def _find(source: DataConfig, runtime: Runtime) -> Path:
    typed = source.data or os.environ.get("KD_DIST_DATA")
    progress = _progress_by_name(runtime)
    data, named = Path(typed or "data"), (source.release, source.archive, source.sha256)
    return locate(data, *named, explicit=bool(typed), val_share=source.val_share, progress=progress)


def _progress_by_name(runtime: Runtime) -> Callable[[str, int, int], None]:
    """As progress_lines, for work that names its own steps: a callback (what, done, all)."""
    lines: dict[str, Callable[[int, int], None]] = {}

    def progress(what: str, done: int, total: int) -> None:
        lines.setdefault(what, progress_lines(runtime, what))(done, total)

    return progress


def claim_folder(config: JobConfig, data: Data, runtime: Runtime, **identity: str) -> RunFolder:
    """Take the run folder for this run; raises UserError on every rank where it holds something else.

    The data's fingerprints and `identity` are kept with the config, so that a run is not gone on with on other data.
    Claim when all else has been checked: a typo must not bind the folder, nor a refusal mark a finished run as failed.
    """
    folder = RunFolder(Path(config.out))
    stored = stored_settings(config, data, **identity)
    start_over = config.run.start_over
    runtime.on_main(lambda: claim(folder, config.kind, stored, config.may_change, start_over, config.completed))
    return folder


def stored_settings(config: JobConfig, data: Data, **identity: str) -> dict[str, object]:
    """What a run folder keeps of the config, and what else its run is bound to."""
    fingerprints = {f"{split} data": data.samples.split(split).fingerprint for split in ("train", "val")}
    return {**config.stored(), **fingerprints, **identity}


@contextlib.contextmanager
def running(folder: RunFolder, runtime: Runtime, stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """From here on a signal is a request, and the run folder's state says how the run stands and how it ended.

    `stop` is the request of a command that does several runs and listens already.
    """
    _note(folder, runtime, "running", "")
    emit(folder, runtime, Code.DATA_READY)
    try:
        with (
            endings.noting(lambda failure: _note_failure(folder, failure)),
            contextlib.nullcontext(stop) if stop else StopRequest() as stop,
        ):
            yield stop
    except (Interrupted, KeyboardInterrupt) as error:
        lost = runtime.failure  # the launcher stops the ranks that are left when one has failed
        if lost and runtime.is_main:
            _note_failure(folder, lost)
        elif not lost:
            _note(folder, runtime, "interrupted", str(error), code=Reason.STOPPED)
            emit(folder, runtime, Code.RUN_INTERRUPTED, reason=Reason.STOPPED, message=str(error))
        raise
    except BaseException as error:
        failure = endings.failure_of(error)
        if runtime.world_size > 1:  # a rank that trains alone may go on with another run
            endings.tell(failure)
        if runtime.is_main:
            _note_failure(folder, failure)
        raise
    _note(folder, runtime, "finished", "")
    emit(folder, runtime, Code.RUN_FINISHED)


def _note_failure(folder: RunFolder, failure: Failure) -> None:
    reason = Reason.of_exit_code(failure.code)
    _write_state(folder, "failed", failure.sentence, code=reason)
    events.emit(folder.path, Code.RUN_FAILED, reason=reason, message=failure.sentence)


def emit(folder: RunFolder, runtime: Runtime, code: Code, **facts: object) -> None:
    """Append an event of the run, on rank 0."""
    if runtime.is_main:
        events.emit(folder.path, code, **facts)


def _note(folder: RunFolder, runtime: Runtime, status: str, message: str, **facts: object) -> None:
    if runtime.is_main:
        _write_state(folder, status, message, **facts)


def _write_state(folder: RunFolder, status: str, message: str, **facts: object) -> None:
    with contextlib.suppress(UserError):  # a full disk must not hide the reason
        last = read_state(folder) or {}
        reached = {name: last[name] for name in ("step", "epoch", "epochs") if name in last}
        write_state(folder, status, **reached, message=message, **facts)


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


def workers_for(workers: int | None, runtime: Runtime) -> int:
    """Loader processes of a rank: `workers`, else none on a CPU, which has no core to spare, and up to 8 on a GPU."""
    return spare_cores(runtime) if workers is None else workers


def spare_cores(runtime: Runtime) -> int:
    """Cores that a rank may use besides its own: none on a CPU, up to 8 on a GPU."""
    if runtime.device.type == "cpu":
        return 0
    return min(GPU_WORKERS, max(1, available_cores() // runtime.local_world_size - 1))


def fresh_crops(augmentation: AugmentationConfig, seed: int, data: Data) -> FreshCrops:
    """A new crop of every training image in every epoch."""
    return FreshCrops(data.pixels["train"].sizes_N2, augmentation.crop_scale, seed)


@dataclass(frozen=True)
class Training:
    """A trainer as its config says, and the validation it calls."""

    config: JobConfig
    trainer: Trainer
    validation: "Validation"
    stop: StopRequest

    def run(self) -> tuple[nn.Module, np.ndarray]:
        """Train to the end of the schedule, resuming what the folder holds: the resulting model, and its logits float32
        [M, K] of the images it is scored on, val unless the config says otherwise.
        """
        runtime, folder = self.trainer.runtime, self.trainer.folder
        epochs = self.config.optimisation.epochs
        say(runtime, _introduction(self.config, self.trainer))
        for warning in batch_warnings(self.config.optimisation.batch_size, runtime.world_size, runtime.device.type):
            say(runtime, f"warning: {warning}")
        emit(folder, runtime, Code.TRAINING_STARTED, epochs=epochs, ranks=runtime.world_size)
        self.trainer.run(self.stop)
        model = self.trainer.evaluated_model
        return model, self.validation.logits(model)


def training(
    config: JobConfig,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    model: nn.Module,
    loss_terms: LossTerms,
    views_of_epoch: FreshCrops | CachedCrops,
    *,
    logits_NVK: SoftLabels | None = None,
    labels: LabelUse = ALL_LABELS,
    stop: StopRequest,
    cache: Cache | None = None,
    after_epoch: AfterEpoch | None = None,
) -> Training:
    """What trains this model on this data as `config` says, ready to run.

    `cache` adds agreement with the teacher to the metrics.
    """
    train_data = _train_data(config, labels, data, views_of_epoch, logits_NVK)
    image_size, precision = config.augmentation.image_size, config.run.precision
    validation = Validation(scored_on(config.split, data), data, runtime, image_size, precision, cache)

    def evaluate(epoch: int, model: nn.Module) -> dict[str, float]:
        metrics = validation.metrics(model) if config.is_evaluated_after(epoch) else {}
        if after_epoch:
            runtime.on_main(lambda: after_epoch(epoch, model, metrics))
        emit(folder, runtime, Code.EPOCH_FINISHED, epoch=epoch, epochs=config.optimisation.epochs, **metrics)
        return metrics

    own, execution = optimisation_of(config), execution_of(config, runtime)
    trainer = Trainer(model, train_data, loss_terms, evaluate, own, execution, runtime, folder)
    return Training(config, trainer, validation, stop)


def _train_data(
    config: JobConfig,
    labels: LabelUse,
    data: Data,
    views_of_epoch: FreshCrops | CachedCrops,
    logits_NVK: SoftLabels | None,
) -> TrainData:
    samples, pixels = data.split("train")
    labels_N = samples.labels_N
    if labels.fraction < 1:
        labels_N = np.full_like(samples.labels_N, UNKNOWN)
        used_M = labelled_of(config.split, labels, data)
        labels_N[used_M] = samples.labels_N[used_M]
    return TrainData(
        pixels=pixels,
        labels_N=labels_N,
        views_of_epoch=views_of_epoch,
        image_size=config.augmentation.image_size,
        batch_size=config.optimisation.batch_size,
        seed=config.seed,
        mixup=config.augmentation.mixup,
        cutmix=config.augmentation.cutmix,
        logits_NVK=logits_NVK,
        members_M=members_of(config.split, labels, data),
        blended_epochs=config.mixed_epochs,
    )


def optimisation_of(config: JobConfig) -> Optimisation:
    """How long and how fast to train."""
    own = config.optimisation
    return Optimisation(own.epochs, own.lr, own.weight_decay, own.warmup_epochs, own.ema, config.seed)


def execution_of(config: JobConfig, runtime: Runtime) -> Execution:
    """How the work is done, as the config says and this machine allows."""
    own = config.run
    return Execution(
        MEAN,
        STD,
        workers=workers_for(own.workers, runtime),
        precision=own.precision,
        checkpoint_minutes=own.checkpoint_minutes,
        profile=own.profile,
    )


def _introduction(config: JobConfig, trainer: Trainer) -> str:
    data, runtime = trainer.data, trainer.runtime
    unknown = int((data.labels_N == UNKNOWN).sum())
    labels = f" ({len(data.labels_N) - unknown:,} labels used)" if unknown else ""
    own, origin = config.optimisation, origin_of_lr(config)
    return (
        f"{config.kind}: {count_weights(trainer.model):,} weights, {len(data):,} images{labels} at "
        f"{data.image_size} px, {own.epochs} epochs of {data.steps_per_epoch} steps, batch {own.batch_size} "
        f"({own.batch_size / runtime.world_size:g} images a rank), learning rate {own.lr:g}"
        f"{f' ({origin})' if origin else ''}, "
        f"{runtime.world_size} ranks on {runtime.device.type} in {trainer.compute_dtype} (preset {config.preset})"
        f"{f', initial weights from {config.init}, a new schedule' if config.init else ''}"
    )


def batch_warnings(batch_size: int, ranks: int, device: str) -> list[str]:
    """What speaks against a batch of so many images over all ranks: too few on each GPU, or more than the rule for the
    learning rate was shown for.
    """
    warnings = []
    if device == "cuda" and batch_size / ranks < FEWEST_IMAGES_A_GPU:
        warnings.append(
            f"{batch_size / ranks:g} images a rank keep no GPU busy, {FEWEST_IMAGES_A_GPU} or more do; use fewer GPUs "
            "or a larger --batch-size"
        )
    if batch_size > RULE_HOLDS_TO:
        warnings.append(
            f"linear scaling of the learning rate was shown up to {RULE_HOLDS_TO} images a step, this is "
            f"{batch_size}; try other values of --lr"
        )
    return warnings


def start_from(model: nn.Module, init: str | None) -> dict[str, str]:
    """Take over the weights of a run or a model.pt where --init names one, and give what binds a run to them.

    Raises UserError where they are not there, are not ours, or do not fit the network.
    """
    if init is None:
        return {}
    path = Path(init)
    path = RunFolder(path).model if path.is_dir() else path
    given = checkpoint.load_model(path)["weights"]
    if wrong := misfits(model.state_dict(), given):
        raise UserError(f"--init {path} does not fit this network: {wrong}; name the weights of the same network.")
    model.load_state_dict(given)
    return {"initial weights": checkpoint.weights_digest(given)}


def require_trainable(
    config: JobConfig,
    data: Data,
    model: nn.Module,
    runtime: Runtime,
    labels: LabelUse = ALL_LABELS,
    name: str = "the network",
) -> None:
    """Raise UserError where the batch does not suit the data and the ranks, or the network (of this name) the task and
    the image size.
    """
    members_M = members_of(config.split, labels, data)
    images, ranks = len(data.samples.train if members_M is None else members_M), runtime.world_size
    batch_size = config.optimisation.batch_size
    if batch_size > images:
        raise UserError(
            f"--batch-size {batch_size} is larger than the {images} training images"
            f"{f' that --label-fraction {labels.fraction:g} leaves' if labels.fraction < 1 else ''}; use --batch-size "
            f"{images} or less."
        )
    steps = steps_in_epoch(images, batch_size)
    if images // steps < 2 * ranks:
        raise UserError(
            f"--batch-size {batch_size} over {ranks} ranks leaves some with fewer than two of the {images} "
            "images a step; use a larger --batch-size or fewer ranks."
        )
    require_usable(name, model, len(data.samples.classes), config.augmentation.image_size)


class Validation:
    """The images a run is scored on in their evaluation view: each counted once, at any number of ranks."""

    def __init__(
        self, scored: Scored, data: Data, runtime: Runtime, image_size: int, precision: str, cache: Cache | None = None
    ):
        self.scored, self.runtime, self.image_size = scored, runtime, image_size
        self.threads = data.threads
        self.pixels, rows_M = data.pixels[self.scored.split], self.scored.rows_M
        self.teacher_MK = cache.split(self.scored.split).logits_NVK[rows_M, 0] if cache else None
        self.dtype = compute_dtype(runtime.device, precision)
        box_M4 = views.evaluation_boxes(self.pixels.sizes_N2[rows_M])
        self.shown = views.Shown.plain(rows_M, box_M4, np.zeros(len(rows_M), np.uint8))

    def logits(self, model: nn.Module) -> np.ndarray:
        """Logits float32 [M, K], the same on every rank."""
        normalised = (MEAN, STD, self.runtime.device, self.dtype)
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
    config: JobConfig,
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
    config: JobConfig,
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
