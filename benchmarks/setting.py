"""What the rows are measured on: the data, the networks and settings of the machine's own preset, and its soft labels.

Everything is made by the jobs' own code. Only the teacher is untrained: what its logits are worth does not change what
they cost.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measure import Effort
from kd_dist import config, distill, job, label
from kd_dist.cache import BlockWriter, Cache
from kd_dist.config import DataConfig, DistillConfig, JobConfig, TeacherConfig
from kd_dist.dist.runtime import Runtime
from kd_dist.inference import compute_dtype
from kd_dist.job import Data, Supervision
from kd_dist.models import build
from kd_dist.run.folder import RunFolder
from kd_dist.training import Trainer

CACHED_VIEWS = 8
SMALL = {"image_size": 32, "batch_size": 16}
QUICK = Effort(seconds=0, least=2, most=2)
CALM = {"lr": 1e-4, "mixup": 0.0, "cutmix": 0.0, "seed": 0}  # an untrained teacher's logits must not make it diverge


def source_of(data: str | None, archive: str | None, folder: Path) -> DataConfig:
    """Where the images come from, first found: --data, $KD_DIST_DATA, --archive, $KD_DIST_IMAGEWOOF; else the drawn
    set.
    """
    named = data or os.environ.get("KD_DIST_DATA")
    archive = archive or os.environ.get("KD_DIST_IMAGEWOOF")
    if named:
        return DataConfig(data=named, pixels_dir=None)
    if archive:
        return DataConfig(data=str(folder / "data"), archive=archive)
    return DataConfig(data=str(folder / "data"), release="demo")


@dataclass(frozen=True)
class Bench:
    """The data on this rank, and how hard to measure. `quick` is for looking whether it runs at all."""

    data: Data
    runtime: Runtime
    folder: Path
    threads: int
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.runtime.device.type == "cuda"

    def effort(self, seconds: float, least: int = 5) -> Effort:
        """About so many seconds, or next to none when all is to be quick."""
        return QUICK if self.quick else Effort(seconds, least)

    def settings(self, kind: type[JobConfig], **changes: Any) -> Any:
        """The machine's own preset for a job of this kind, with changes."""
        small = SMALL if self.quick else {}
        # The preset follows from the device that is measured, not from the GPUs that the machine has besides.
        return config.resolve(kind, {**CALM, **small, **changes}, has_gpu=self.on_gpu)

    @cached_property
    def student(self) -> DistillConfig:
        """The distilled student's settings."""
        return self.settings(DistillConfig)

    @cached_property
    def teacher(self) -> TeacherConfig:
        """The teacher's settings."""
        return self.settings(TeacherConfig)

    @property
    def classes(self) -> int:
        return len(self.data.samples.classes)

    def network(self, name: str) -> nn.Module:
        """A teacher or a student of this name with fresh weights, always the same."""
        torch.manual_seed(0)
        return build(name, self.classes)

    @cached_property
    def untrained(self) -> label.Teacher:
        """The preset's teacher as a finished run would leave it, on this device."""
        folder = RunFolder(self.folder / f"teacher-{self.teacher.augmentation.image_size}px-{self.classes}")
        if not folder.model.exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            val_logits_NK = np.zeros((len(self.data.samples.val), self.classes), np.float32)
            model = self.network(self.teacher.labelling.teacher)
            job.keep(folder, self.teacher, self.teacher.labelling.teacher, self.data, model, val_logits_NK)
        return label.load_teacher(folder.model, self.runtime.device)

    @cached_property
    def soft_labels(self) -> Cache:
        """A cache of this data, complete and checked like any other, whose logits are drawn instead of computed."""
        dtype = compute_dtype(self.runtime.device)
        teacher = self.untrained
        rule = label.ViewRule(CACHED_VIEWS, self.teacher.augmentation.crop_scale, seed=0)
        plan = label.plan([teacher], self.data, rule, dtype)
        name = f"{self.data.samples.train.fingerprint[:12]}-{teacher.row.sha256[:12]}"
        target = self.folder / f"drawn-{name}-{plan.header.created[:19].replace(':', '')}.h5"
        if not target.exists():
            rng = np.random.default_rng(0)
            writer = BlockWriter(target, plan)
            for block in writer.missing():
                writer.put(block, (4 * rng.standard_normal((len(block), self.classes))).astype(np.float16))
            writer.publish()
        return distill.open_for(self.student.changed(cache=str(target)), self.runtime)

    def trainer(self, settings: JobConfig, model: nn.Module, supervision: Supervision) -> Trainer:
        """The jobs' own trainer under these settings."""
        name = f"{settings.kind}-{settings.augmentation.image_size}px-{id(model)}"
        folder = RunFolder(self.folder / "runs" / name)
        return job.compose_training(settings, self.data, self.runtime, folder, model, supervision).trainer

    def student_trainer(self, **changes: Any) -> Trainer:
        """A student's trainer: distilled from the drawn soft labels, or as `changes` say (alpha=0: the hard-label twin
        on the same cached crops).
        """
        settings = self.settings(DistillConfig, **{"crops": "cached", **changes})
        supervision = distill.supervision_of(settings, self.data, self.soft_labels)
        return self.trainer(settings, self.network(settings.distillation.student), supervision)
