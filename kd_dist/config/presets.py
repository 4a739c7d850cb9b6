"""Named sets of defaults, one table for all jobs, and how the defaults for one GPU become those for several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_dist.config.jobs import JobConfig

RULE_HOLDS_TO = 8192  # images a step


@dataclass(frozen=True)
class Preset:
    """A named set of defaults by flag name: what it is for, and what it changes in either job.

    `per_gpu`: its batch size is that of each GPU, and its learning rate is the one for that many images; see `scaled`.
    """

    about: str
    teacher: dict[str, Any]
    distill: dict[str, Any]
    per_gpu: bool = False

    def of(self, kind: type[JobConfig]) -> dict[str, Any]:
        """What it changes in jobs of this kind; a study consists of students."""
        return self.teacher if kind.kind == "teacher" else self.distill


def scaled(
    preset: Preset, kind: type[JobConfig], typed: Mapping[str, Any], gpus: int, kept: int | None = None
) -> dict[str, Any]:
    """Batch size and learning rate of a preset for each GPU, over all GPUs together; `kept` is the batch size of the
    run that is resumed.

    The linear scaling rule of Goyal et al. 2017 ("Accurate, Large Minibatch SGD", with a warm-up of five epochs): k
    times the images a step, k times the learning rate. They showed it on ImageNet up to RULE_HOLDS_TO images.
    """
    if not preset.per_gpu:
        return {}
    own = preset.of(kind)
    batch_size = typed.get("batch_size", kept or own["batch_size"] * gpus)
    return {"batch_size": batch_size, "lr": own["lr"] * batch_size / own["batch_size"]}


def origin_of_lr(config: JobConfig) -> str:
    """Where a learning rate comes from that was not typed for this batch size, in words; else nothing."""
    if config.preset not in PRESETS:
        return ""
    preset = PRESETS[config.preset]
    own, optimisation = preset.of(type(config)), config.optimisation
    lr, images = own["lr"], own["batch_size"]
    if preset.per_gpu and optimisation.lr == lr * optimisation.batch_size / images:
        return f"the preset's {lr:g} for {images} images, scaled linearly with the batch size"
    if not preset.per_gpu and optimisation.lr == lr and optimisation.batch_size != images:
        return f"the preset's for batch size {images}; --batch-size {optimisation.batch_size} does not change it"
    return ""


# Each preset is headed by what it is for; measured scores stand in the README beside their commands.
PRESETS: dict[str, Preset] = {
    # A starting point for GPUs of any kind; its time and its scores are not measured yet. The learning rate is that of
    # Goyal et al. 2017, 0.1 for 256 images.
    "gpu-128px": Preset(
        about="for GPUs: 128 px, long schedules; batch size per GPU, learning rate scaled linearly; not measured yet",
        per_gpu=True,
        teacher={
            "image_size": 128,
            "epochs": 250,
            "lr": 0.2,
            "batch_size": 512,
            "views": 200,
            "ema": 0.999,
            "mixup": 0.25,
            "cutmix": 0.25,
            "no_mix_epochs": 25,
            "evaluate_every": 5,
        },
        distill={
            "student": "cnn5_wide",
            "image_size": 128,
            "epochs": 300,
            "lr": 0.2,
            "batch_size": 512,
            "ema": 0.999,
            "temperature": 2.0,
            "evaluate_every": 5,
        },
    ),
    # A CPU box: the teacher sees 96 px, the student the same boxes at 64 px. `make imagewoof-cpu`, two cores with
    # AVX512-BF16 (Zen 4) and --precision bf16: teacher 77.0 % in 65 minutes, a student 73.5 +- 0.4 % in 4, the
    # hard-label baseline 69.9 +- 0.7 %, 70.8 +- 0.7 % with a weight decay of 0.002 (three seeds each,
    # docs/results/imagewoof-cpu.md). In float32 about twice as long.
    "cpu-64px": Preset(
        about="for a CPU box: teacher at 96 px, an hour or two on two cores; student at 64 px, 4 to 8 minutes",
        teacher={
            "image_size": 96,
            "epochs": 45,
            "lr": 0.05,
            "batch_size": 64,
            "warmup_epochs": 2.0,
            "views": 8,
            "ema": 0.998,
        },
        distill={"image_size": 64, "epochs": 12, "lr": 0.05, "batch_size": 64, "warmup_epochs": 2.0},
    ),
    # The generated set, in minutes. Students get few epochs: with many, a small network needs no teacher on this set.
    "demo": Preset(
        about="for the data set of `make demo`: teacher at 48 px, student at 32 px, a few minutes on two cores",
        teacher={
            "release": "demo",
            "image_size": 48,
            "epochs": 14,
            "lr": 0.05,
            "batch_size": 32,
            "warmup_epochs": 1.0,
            "views": 8,
            "ema": 0.99,
        },
        distill={"release": "demo", "image_size": 32, "epochs": 3, "lr": 0.05, "batch_size": 32, "warmup_epochs": 0.5},
    ),
}
