"""Groups of flags, each a frozen dataclass that checks its own values. A field's name is its flag's, with dashes.

Each package receives only its own group, never the whole command line. Nothing but Python's own library is imported
here, so that a login node reads a command line fast.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kd_dist.errors import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PIXELS = ("auto", "memory", "device", "off")


def flag(default: Any, help: str, metavar: str | None = None, may_change: bool = False) -> Any:
    """A field with its default and its help text; `may_change`: a resumed run may have another value."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "may_change": may_change})


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and where their decoded pixels are kept."""

    title: ClassVar[str] = "data"

    data: str | None = flag(
        None,
        "Data set: a folder with train/ and val/ (also valid/, validation/ or test/), each with class folders; with "
        "--val-share, a folder of class folders; or a CSV file of path,label,split. The release is downloaded into a "
        "folder that holds no data set [$KD_DIST_DATA or data].",
        "DIR",
        may_change=True,
    )
    val_share: float | None = flag(
        None, "Hold out this fraction of the images as val, chosen by their content; for data without val.", "FRACTION"
    )
    unlabelled: str | None = flag(
        None,
        "Folder of more training images, without labels: the teacher labels them, and the student learns from its soft "
        "labels alone.",
        "DIR",
        may_change=True,
    )
    release: str | None = flag(
        None, "Data set to download if the folder does not hold one yet [imagewoof2-160].", "NAME"
    )
    archive: str | None = flag(
        None,
        "Local file or URL to read the data set from instead of its default URL.",
        "FILE_OR_URL",
        may_change=True,
    )
    sha256: str | None = flag(None, "SHA-256 that the archive must have.", "HEX", may_change=True)
    pixels: str = flag(
        "auto",
        "Where to keep decoded images: memory (host), device (GPU), off (decode on every access, for sets larger than "
        "memory), or auto (device if they fit, else memory).",
        "WHERE",
        may_change=True,
    )
    pixels_dir: str | None = flag(
        None,
        "Folder for the file of decoded images, for example on a node's own disk [inside the data folder].",
        "DIR",
        may_change=True,
    )

    def __post_init__(self):
        one_of("pixels", self.pixels, PIXELS)
        check_val_share(self.val_share)


@dataclass(frozen=True)
class SplitConfig:
    """Which training images are left out, and what the run is scored on."""

    title: ClassVar[str] = "folds"

    folds: int | None = flag(
        None, "Split the training images into K folds and train without the fold given by --fold [no folds].", "K"
    )
    fold: int | None = flag(None, "Number of the fold that is left out, 0 to K - 1.", "k")
    tune: bool = flag(False, "Evaluate on the fold that is left out; the val images are not used.")

    def __post_init__(self):
        require(self.folds is None or self.folds >= 2, "folds", self.folds, "must be at least 2")
        if (self.folds is None) != (self.fold is None):
            raise UserError("--folds and --fold go together: --folds 10 --fold 0 leaves out the first tenth of train.")
        if self.folds is not None and self.fold is not None:
            in_range = 0 <= self.fold < self.folds
            require(in_range, "fold", self.fold, f"must be at least 0 and below --folds {self.folds}")
        if self.tune and self.fold is None:
            raise UserError("--tune evaluates on a fold of train that is left out; add --folds 10 --fold 0.")


@dataclass(frozen=True)
class OptimisationConfig:
    """How long and how fast a network learns, and how far its hard labels are smoothed."""

    title: ClassVar[str] = "optimisation"

    epochs: int = flag(100, "Number of passes over the training images.", "N")
    batch_size: int = flag(
        256,
        "Global batch size, over all ranks; the gpu-128px default is per GPU and is multiplied by the number of GPUs.",
        "N",
    )
    lr: float = flag(
        0.2,
        "Peak learning rate of SGD with Nesterov momentum 0.9. The gpu-128px default is scaled linearly with the batch "
        "size; a value given here is used unchanged.",
        "LR",
    )
    weight_decay: float = flag(
        5e-4, "Weight decay of convolutional and linear weights; not applied to normalisation layers and biases.", "WD"
    )
    warmup_epochs: float = flag(
        5.0, "Epochs of linear warm-up before cosine decay; unless set, at most a fifth of --epochs.", "N"
    )
    label_smoothing: float = flag(
        0.0, "Fraction of the hard label's probability that is spread evenly over all classes.", "FRACTION"
    )
    ema: float = flag(
        0.0,
        "Decay of the exponential moving average (EMA) of the weights; if set, the averaged weights are evaluated and "
        "saved. 0 disables it.",
        "DECAY",
    )

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(0 < self.lr < math.inf, "lr", self.lr, "must be above 0")
        for name in ("weight_decay", "warmup_epochs"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must not be negative")
        for name in ("label_smoothing", "ema"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
        short = self.warmup_epochs < self.epochs
        require(short, "warmup_epochs", self.warmup_epochs, f"must be below --epochs {self.epochs}")


@dataclass(frozen=True)
class AugmentationConfig:
    """What the network sees of an image."""

    title: ClassVar[str] = "augmentation"

    image_size: int = flag(128, "Side of the square images that the network sees, in pixels.", "PX")
    crop_scale: tuple[float, float] = flag(
        (0.35, 1.0), "Smallest and largest area of a random crop, as fractions of the image area."
    )
    mixup: float = flag(
        0.0,
        "Fraction of the images that mixup mixes with another, lambda from Beta(0.2, 0.2); fresh crops only.",
        "FRACTION",
    )
    cutmix: float = flag(
        0.0, "Fraction of the images into which CutMix pastes a box of another; fresh crops only.", "FRACTION"
    )
    no_mix_epochs: int = flag(
        0,
        "Disable mixup, CutMix and cached mixed views in the last N epochs; unless set, at most a tenth of --epochs.",
        "N",
    )

    def __post_init__(self):
        require(self.image_size >= 8, "image_size", self.image_size, "must be at least 8")
        for name in ("mixup", "cutmix"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie in [0, 1]")
        together = self.mixup + self.cutmix <= 1
        require(together, "mixup", self.mixup, f"and --cutmix {self.cutmix} must not exceed 1 together")
        check_crop_scale(self.crop_scale)


@dataclass(frozen=True)
class LabellingConfig:
    """The teacher's network, and the cache of soft labels that it writes."""

    title: ClassVar[str] = "teacher and its soft labels"

    teacher: str = flag(
        "resnet18",
        "Network to train: resnet18, resnet18_s1 (stride-1 stem, for small images), torchvision:NAME, timm:NAME, or "
        "my_module:function, a function that takes the number of classes and returns the network.",
        "NAME",
    )
    weights: str | None = flag(
        None,
        "Initialise from this file (.safetensors or .pt state dict); a classification head with another number of "
        "classes is re-initialised [random weights].",
        "FILE",
        may_change=True,
    )
    cache: str | None = flag(
        None, "Output: the file to which the soft labels are written [OUT/logits.h5].", "FILE", may_change=True
    )
    views: int = flag(
        16,
        "Views of every image in the cache: the evaluation view and V - 1 random views; 0 writes no cache.",
        "V",
        may_change=True,
    )
    mixed_views: float = flag(
        0.0,
        "Fraction of the cached random views of train that are mixed, half by mixup and half by CutMix.",
        "FRACTION",
        may_change=True,
    )
    top_k: int | None = flag(
        None,
        "Keep only the K largest logits of each soft label and the total probability of the other classes; saves space "
        "with many classes [all].",
        "K",
        may_change=True,
    )
    keep_epochs: tuple[int, ...] = flag(
        (),
        "Also save the weights after these epochs, as OUT/model-epoch-N.pt: an earlier checkpoint may be a better "
        "teacher.",
        may_change=True,
    )

    def __post_init__(self):
        require(self.views >= 0, "views", self.views, "must be at least 1, or 0 for no cache")
        check_mixed_views(self.mixed_views, self.views)
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "must be at least 1")


@dataclass(frozen=True)
class LabelUse:
    """How many of the hard labels a run uses, as a fraction in every class; `alone`: images without one are left
    out."""

    fraction: float = 1.0
    alone: bool = True


@dataclass(frozen=True)
class DistillationConfig:
    """The student's network, and what it learns from."""

    title: ClassVar[str] = "student and distillation"

    student: str = flag(
        "cnn5",
        "Network to train: cnn5, cnn5_wide (higher-resolution features, slower), reference_cnn (5.28 M parameters, "
        "from the predecessor project), torchvision:NAME, timm:NAME, or my_module:function, a function that takes the "
        "number of classes and returns the network.",
        "NAME",
    )
    cache: str | None = flag(
        None,
        "Input: the file of soft labels that the teacher's job wrote [runs/teacher/logits.h5].",
        "FILE",
        may_change=True,
    )
    views: int | None = flag(None, "Use only the first V views of the cache [all].", "V")
    alpha: float = flag(
        0.9, "Weight of the soft loss: total = alpha * soft + (1 - alpha) * hard; 0 uses hard labels only."
    )
    temperature: float = flag(4.0, "Temperature that softens both distributions in the soft loss.", "T")
    loss: str = flag(
        "kl",
        "Soft loss: kl (times T squared), ce (cross-entropy with the soft label), mse (of logits), std (KL of "
        "standardised logits), dkd (decoupled KD), or my_module:function, a function (student_logits_BK, "
        "teacher_logits_BK, temperature) -> loss_B.",
        "NAME",
    )
    label_fraction: float = flag(
        1.0,
        "Fraction of the hard labels to use, the same in every class. The other images are trained with soft labels "
        "only; with --alpha 0 they are not used.",
        "FRACTION",
    )

    def __post_init__(self):
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "must lie in [0, 1]")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "must be above 0")
        require(self.views is None or self.views >= 1, "views", self.views, "must be at least 1")
        share = self.label_fraction
        require(0 < share <= 1, "label_fraction", share, "must be above 0 and at most 1")

    @property
    def labels(self) -> LabelUse:
        """The labels that are used, and whether images without one are left out."""
        return LabelUse(self.label_fraction, alone=self.alpha == 0)


@dataclass(frozen=True)
class RunConfig:
    """How a job runs on its machines. Of these, only the device and the precision can change a result."""

    title: ClassVar[str] = "this run"

    workers: int | None = flag(
        None,
        "Data-loading workers per rank; 0 loads in the training process [0 on a CPU, up to 8 on a GPU].",
        "N",
        True,
    )
    device: str = flag("auto", "cpu, cuda, or auto: one GPU per rank if there are any, else the CPU.", "NAME", True)
    precision: str = flag(
        "auto", "fp32, bf16, or auto: bf16 on GPUs and fp32 on CPUs, most of which are slow in bf16.", "NAME"
    )
    checkpoint_minutes: float = flag(2.0, "Minutes between checkpoints; a stopped run saves at once.", "M", True)
    evaluate_every: int = flag(1, "Evaluate every E epochs, and after the last one.", "E", True)
    profile: bool = flag(
        False, "Write a trace of some steps to OUT/trace.json, for https://ui.perfetto.dev.", None, True
    )
    start_over: bool = flag(
        False,
        "Delete the results in --out and start from scratch. In a study: of all requested runs, or of the whole study "
        "if its settings differ.",
        None,
        True,
    )

    def __post_init__(self):
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "must be at least 0")
        minutes = self.checkpoint_minutes
        require(0 < minutes < math.inf, "checkpoint_minutes", minutes, "must be above 0")
        require(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, "must be at least 1")
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))


# ---- checks of single values


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """Raise UserError "--name value rule." unless it holds."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value} {rule}.")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise UserError unless a value is one of the known."""
    require(value in known, name, value, f"is not known; choose from {', '.join(known)}")


def check_seed(seed: int) -> None:
    """Raise UserError unless a seed suits both random generators and the cache's int64."""
    require(0 <= seed < 2**63, "seed", seed, "must be at least 0 and below 2^63")


def check_val_share(share: float | None) -> None:
    """Raise UserError unless it is None or leaves both splits some images."""
    require(share is None or 0 < share < 1, "val_share", share, "must lie between 0 and 1, such as 0.1")


def check_mixed_views(share: float, views: int) -> None:
    """Raise UserError unless it is a fraction that comes to at least one view, or 0."""
    require(0 <= share <= 1, "mixed_views", share, "must lie in [0, 1]")
    comes_to_one = share == 0 or (views - 1) * share >= 1
    rule = f"of the random views ({max(0, views - 1)}) is less than one view; use a larger --views"
    require(comes_to_one, "mixed_views", share, rule)


def check_crop_scale(crop_scale: tuple[float, float]) -> None:
    """Raise UserError unless these are a smallest and a largest fraction of the area."""
    low, high = crop_scale
    rule = "must be two fractions with 0 < smallest <= largest <= 1"
    require(0 < low <= high <= 1, "crop_scale", f"{low} {high}", rule)
