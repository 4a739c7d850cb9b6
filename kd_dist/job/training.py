"""A trainer, composed from a config."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from kd_dist.cache import Cache, SoftLabels
from kd_dist.config import MEAN, STD, AugmentationConfig, LabelUse, NetworkConfig, origin_of_lr
from kd_dist.dist.cores import spare_cores
from kd_dist.dist.endings import StopRequest
from kd_dist.dist.runtime import Runtime
from kd_dist.job.about import describe
from kd_dist.job.checks import ALL_LABELS, batch_warnings
from kd_dist.job.data import Data
from kd_dist.job.lifecycle import emit
from kd_dist.job.pictures import is_pictured, pictures_of
from kd_dist.job.progress import say
from kd_dist.job.selection import labelled_of, members_of, scored_on
from kd_dist.job.validation import Validation
from kd_dist.models import count_weights
from kd_dist.run.curves import Description
from kd_dist.run.events import Code
from kd_dist.run.folder import RunFolder
from kd_dist.tables import counted
from kd_dist.training import Execution, LossTerms, Optimisation, Trainer
from kd_dist.training.batches import CachedCrops, FreshCrops, TrainData
from kd_dist.training.losses import UNKNOWN

AfterEpoch = Callable[[int, nn.Module, dict[str, float]], None]
"""Called on rank 0 at the end of an epoch: how many are done, the evaluated model, its metrics."""


@dataclass(frozen=True, eq=False)
class Supervision:
    """What a network learns from: its losses, the views that each epoch shows, the soft labels [N, V, K] that go with
    them (None where no loss needs any), and the hard labels that are used.
    """

    loss_terms: LossTerms
    views_of_epoch: FreshCrops | CachedCrops
    logits_NVK: SoftLabels | None = None
    labels: LabelUse = ALL_LABELS


@dataclass(frozen=True)
class Training:
    """A trainer as configured, and the validation it calls."""

    config: NetworkConfig
    trainer: Trainer
    validation: Validation
    description: Description

    def run(self, stop: StopRequest) -> tuple[nn.Module, np.ndarray]:
        """Train to the end of the schedule, resuming what the folder holds: the resulting model, and its logits float32
        [M, K] of the images it is scored on, val unless configured otherwise.
        """
        runtime, folder = self.trainer.runtime, self.trainer.folder
        epochs = self.config.optimisation.epochs
        say(runtime, _introduction(self.config, self.trainer))
        for warning in batch_warnings(self.config.optimisation.batch_size, runtime.world_size, runtime.device.type):
            say(runtime, f"warning: {warning}")
        emit(folder, runtime, Code.TRAINING_STARTED, epochs=epochs, ranks=runtime.world_size)
        self.trainer.run(stop, self.description)
        model = self.trainer.evaluated_model
        return model, self.validation.logits(model)


def compose_training(
    config: NetworkConfig,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    model: nn.Module,
    supervision: Supervision,
    cache: Cache | None = None,
    after_epoch: AfterEpoch | None = None,
) -> Training:
    """What trains this model on this data as configured by `config`, ready to run.

    `cache` adds agreement with the teacher to the metrics.
    """
    image_size, precision = config.augmentation.image_size, config.run.precision
    validation = Validation(scored_on(config.split, data), data, runtime, image_size, precision, cache)

    def evaluate(epoch: int, model: nn.Module) -> dict[str, float]:
        metrics = {}
        if config.is_evaluated_after(epoch):
            logits_MK = validation.logits(model)
            metrics = validation.metrics_of(logits_MK)
            if is_pictured(epoch, config.optimisation.epochs, config.run.evaluate_every):
                _draw(trainer, validation, model, logits_MK, epoch)
        if after_epoch:
            runtime.on_main(lambda: after_epoch(epoch, model, metrics))
        emit(folder, runtime, Code.EPOCH_FINISHED, epoch=epoch, epochs=config.optimisation.epochs, **metrics)
        return metrics

    trainer = Trainer(
        model=model,
        data=_train_data(config, data, supervision),
        loss_terms=supervision.loss_terms,
        evaluate=evaluate,
        optimisation=optimisation_of(config),
        execution=execution_of(config, runtime),
        runtime=runtime,
        folder=folder,
    )
    return Training(config, trainer, validation, describe(config, data.samples, cache, runtime))


def _draw(trainer: Trainer, validation: Validation, model: nn.Module, logits_MK: np.ndarray, epoch: int) -> None:
    """Let rank 0 add pictures to TensorBoard."""
    draw = partial(pictures_of, trainer, validation, model, logits_MK, epoch)
    trainer.runtime.on_main(lambda: trainer.monitor.pictures(trainer.images_seen, draw))


def _train_data(config: NetworkConfig, data: Data, supervision: Supervision) -> TrainData:
    samples, pixels = data.split("train")
    labels, labels_N = supervision.labels, samples.labels_N
    if labels.fraction < 1:
        labels_N = np.full_like(samples.labels_N, UNKNOWN)
        used_M = labelled_of(config.split, labels, data)
        labels_N[used_M] = samples.labels_N[used_M]
    return TrainData(
        pixels=pixels,
        labels_N=labels_N,
        views_of_epoch=supervision.views_of_epoch,
        image_size=config.augmentation.image_size,
        batch_size=config.optimisation.batch_size,
        seed=config.seed,
        mixup=config.augmentation.mixup,
        cutmix=config.augmentation.cutmix,
        logits_NVK=supervision.logits_NVK,
        members_M=members_of(config.split, labels, data),
        mixed_epochs=config.mixed_epochs,
    )


def fresh_crops(augmentation: AugmentationConfig, seed: int, data: Data) -> FreshCrops:
    """A new crop of every training image in every epoch."""
    return FreshCrops(data.pixels["train"].sizes_N2, augmentation.crop_scale, seed)


def optimisation_of(config: NetworkConfig) -> Optimisation:
    """How long and how fast to train."""
    own = config.optimisation
    return Optimisation(own.epochs, own.lr, own.weight_decay, own.warmup_epochs, own.ema, config.seed)


def execution_of(config: NetworkConfig, runtime: Runtime) -> Execution:
    """How the work is done, as configured and as this machine allows."""
    own = config.run
    return Execution(
        MEAN,
        STD,
        workers=spare_cores(runtime.device.type, runtime.local_world_size) if own.workers is None else own.workers,
        precision=own.precision,
        checkpoint_minutes=own.checkpoint_minutes,
        profile=own.profile,
    )


def _introduction(config: NetworkConfig, trainer: Trainer) -> str:
    data, runtime = trainer.data, trainer.runtime
    unknown = int((data.labels_N == UNKNOWN).sum())
    labels = f" ({len(data.labels_N) - unknown:,} labels used)" if unknown else ""
    own, origin = config.optimisation, origin_of_lr(config)
    return (
        f"{config.kind}: {count_weights(trainer.model):,} parameters; {len(data):,} images{labels} at "
        f"{data.image_size} px; {counted(own.epochs, 'epoch')} of {counted(data.steps_per_epoch, 'step')}; batch size "
        f"{own.batch_size} ({own.batch_size / runtime.world_size:g} per rank); learning rate {own.lr:g}"
        f"{f' ({origin})' if origin else ''}; "
        f"{counted(runtime.world_size, 'rank')} ({runtime.device.type}, {trainer.compute_dtype}); "
        f"preset {config.preset}"
        f"{f'; initial weights from {config.init}, a new schedule' if config.init else ''}"
    )
