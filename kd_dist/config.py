"""Settings of the two jobs: frozen dataclasses, presets, and the flat flags that fill them.

A setting is a field of a dataclass; its flag is its name with dashes. The value a run uses is, first found: what was
typed, what the preset says, the field's default. No torch is imported here, so that a login node reads the settings
fast.
"""

import argparse
import dataclasses
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from kd_dist.errors import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


PIXELS = ("auto", "memory", "device", "off")

DATA, NETWORK, TRAINING, CROPS, RUN = "data", "network and loss", "training", "crops and blends", "this run"


def flag(group: str, default: Any, help: str, metavar: str | None = None) -> Any:
    """A setting with its default, and where --help lists it and what it says there."""
    return field(default=default, metadata={"group": group, "help": help, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """What both jobs are told. Raises UserError where a value is out of its range."""

    kind: ClassVar[str]
    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "data",
            "out",
            "cache",
            "workers",
            "device",
            "checkpoint_minutes",
            "pixels",
            "pixels_dir",
            "compile",
            "profile",
            "archive",
            "sha256",
            "preset",
            "start_over",
        }
    )

    not_typed: ClassVar[frozenset[str]] = frozenset()
    labelled: ClassVar[float] = 1.0  # a student may have fewer labels, a teacher has them all
    learns_from_labels_alone: ClassVar[bool] = True

    preset: str | None = flag(
        RUN, None, "a named set of defaults, see below [h100 on a GPU, cpu-64px on a CPU]", "NAME"
    )
    data: str | None = flag(
        DATA, None, "folder with train/ and val/, or one to fetch the release into [$KD_DIST_DATA or data]", "DIR"
    )
    release: str | None = flag(DATA, None, "data set to fetch when it is not there yet [imagewoof2-160]", "NAME")
    archive: str | None = flag(DATA, None, "fetch the release from this file or address instead", "FILE")
    sha256: str | None = flag(DATA, None, "digest that the archive must have", "HEX")
    out: str = flag(RUN, "runs", "folder of this run; running the same command again resumes it", "DIR")
    cache: str | None = flag(DATA, None, "the file of soft labels", "FILE")
    image_size: int = flag(NETWORK, 128, "side of the square pictures the network sees, in pixels", "PX")
    epochs: int = flag(TRAINING, 100, "passes over the training images", "N")
    batch_size: int = flag(TRAINING, 256, "images a step, over all ranks together", "N")
    lr: float = flag(TRAINING, 0.2, "peak learning rate of SGD with Nesterov momentum 0.9")
    weight_decay: float = flag(TRAINING, 5e-4, "on convolution and linear weights, not on norms and biases")
    warmup_epochs: float = flag(TRAINING, 5.0, "epochs of linear warm-up before the cosine decay")
    label_smoothing: float = flag(NETWORK, 0.0, "share of the hard target spread over all classes")
    ema: float = flag(NETWORK, 0.0, "decay of the moving average of weights that is evaluated and kept; 0: none")
    crop_scale: tuple[float, float] = flag(CROPS, (0.35, 1.0), "smallest and largest area share of a random crop")
    mixup: float = flag(
        CROPS,
        0.0,
        "share of training images blended with another (weight from Beta(0.2, 0.2)); fresh crops only",
        "SHARE",
    )
    cutmix: float = flag(
        CROPS, 0.0, "share of training images with a box pasted from another; fresh crops only", "SHARE"
    )
    plain_epochs: int = flag(
        CROPS, 0, "last epochs without mixup, CutMix or mixed views of the cache, on pictures such as it is scored on"
    )
    seed: int = flag(RUN, 0, "of weights, order, crops and flips")
    workers: int | None = flag(
        RUN, None, "processes a rank that prepare pictures; 0: the rank itself [0 on a CPU, up to 8 on a GPU]", "N"
    )
    device: str = flag(RUN, "auto", "cpu, cuda, or auto: a GPU for each rank where there are any", "NAME")
    precision: str = flag(
        RUN, "auto", "fp32, bf16, or auto: bf16 on GPUs, fp32 on CPUs; most CPUs are slow in bf16", "NAME"
    )
    pixels: str = flag(
        DATA,
        "auto",
        "where decoded pictures are while a job runs: memory (of the host), device, off (images are decoded each time: "
        "for sets larger than memory), or auto: on a GPU that has the room, else memory",
        "WHERE",
    )
    pixels_dir: str | None = flag(
        DATA, None, "where decoded pictures are kept, a node-local disk say [inside the data folder]", "DIR"
    )
    checkpoint_minutes: float = flag(RUN, 10.0, "a checkpoint at least this often, besides one an epoch", "M")
    compile: bool = flag(RUN, False, "torch.compile the network: a minute or so at the start, faster steps on a GPU")
    profile: bool = flag(RUN, False, "write a trace of some steps to OUT/trace.json, for https://ui.perfetto.dev")
    start_over: bool = flag(RUN, False, "forget this run folder's earlier run instead of resuming it")
    folds: int | None = flag(DATA, None, "cut train into K even parts, of which --fold is left out", "K")
    fold: int | None = flag(DATA, None, "the part of train that is not trained on, 0 to K - 1", "k")
    tune: bool = flag(RUN, False, "score the run on the part left out instead of on val, which is not looked at")

    def __post_init__(self):
        for name, low in [("epochs", 1), ("batch_size", 1), ("image_size", 8), ("workers", 0)]:
            value = getattr(self, name)
            _require(value is None or value >= low, name, value, f"must be at least {low}")
        check_seed(self.seed)
        for name in ("lr", "checkpoint_minutes"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "must be above 0")
        for name in ("weight_decay", "warmup_epochs"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must not be negative")
        for name in ("label_smoothing", "ema"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
        for name in ("mixup", "cutmix"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie in [0, 1]")
        _require(
            self.mixup + self.cutmix <= 1, "mixup", self.mixup, f"and --cutmix {self.cutmix} must not exceed 1 together"
        )
        _require(
            0 <= self.plain_epochs <= self.epochs,
            "plain_epochs",
            self.plain_epochs,
            f"must lie in 0 to {self.epochs} (--epochs)",
        )
        check_crop_scale(self.crop_scale)
        _require(
            self.warmup_epochs < self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"must be below --epochs {self.epochs}",
        )
        self._check_fold()
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("pixels", self.pixels, PIXELS)
        _one_of("precision", self.precision, ("auto", "fp32", "bf16"))

    def _check_fold(self) -> None:
        _require(self.folds is None or self.folds >= 2, "folds", self.folds, "must be at least 2")
        if (self.folds is None) != (self.fold is None):
            raise UserError("--folds and --fold go together: --folds 10 --fold 0 leaves out the first tenth of train.")
        if self.fold is not None:
            _require(
                0 <= self.fold < self.folds, "fold", self.fold, f"must be at least 0 and below --folds {self.folds}"
            )
        if self.tune and self.fold is None:
            raise UserError("--tune scores on a part of train that is left out; add --folds 10 --fold 0.")

    @property
    def blended_epochs(self) -> int:
        """Epochs in which pictures are blended, where any are: the first ones."""
        return self.epochs - self.plain_epochs

    def resolved(self) -> Self:
        """The same settings with what follows from others filled in."""
        return self

    def stored(self) -> dict[str, Any]:
        """The settings as plain JSON values, for the run folder and the checkpoint."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def completed(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Stored settings, with the defaults of those that the version which stored them did not have yet."""
        return {setting.name: _plain(setting.default) for setting in dataclasses.fields(cls)} | dict(stored)


@dataclass(frozen=True)
class TeacherSettings(Settings):
    """The first job: train a teacher, then write the cache."""

    kind: ClassVar[str] = "teacher"
    may_change: ClassVar[frozenset[str]] = Settings.may_change | {"views", "mixed_views", "top_k", "keep_epochs"}

    out: str = flag(RUN, "runs/teacher", "folder of this run; running the same command again resumes it", "DIR")
    cache: str | None = flag(DATA, None, "where the soft labels go [OUT/logits.h5]", "FILE")
    teacher: str = flag(
        NETWORK,
        "resnet18",
        "network to train: resnet18, or resnet18_s1 with a stride-1 stem for small pictures",
        "NAME",
    )
    views: int = flag(
        DATA, 16, "views of every image in the cache: the evaluation view and V - 1 random crops; 0: no cache", "V"
    )
    mixed_views: float = flag(
        DATA, 0.0, "share of train's random crops in the cache that are mixed: half by mixup, half by CutMix", "SHARE"
    )
    top_k: int | None = flag(
        DATA, None, "keep of each row the K largest logits and the mass of the others, for many classes [all]", "K"
    )

    keep_epochs: tuple[int, ...] = flag(
        RUN, (), "keep the weights after these epochs too, as OUT/model-epoch-N.pt: a younger teacher may teach better"
    )

    def __post_init__(self):
        super().__post_init__()
        for epoch in self.keep_epochs:
            _require(1 <= epoch <= self.epochs, "keep_epochs", epoch, f"must lie in 1 to {self.epochs} (--epochs)")
        _require(self.views >= 0, "views", self.views, "must be at least 1, or 0 for no cache")
        check_mixed_views(self.mixed_views, self.views)
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "must be at least 1")


@dataclass(frozen=True)
class DistillSettings(Settings):
    """The second job: train a student from cached soft labels and hard labels."""

    kind: ClassVar[str] = "student"
    may_change: ClassVar[frozenset[str]] = Settings.may_change | {"cache_memory"}

    out: str = flag(RUN, "runs/student", "folder of this run; running the same command again resumes it", "DIR")
    cache: str | None = flag(DATA, None, "the file of soft labels [runs/teacher/logits.h5]", "FILE")
    student: str = flag(NETWORK, "cnn5", "network to train: cnn5, cnn5_wide (slower, finer), or origin", "NAME")
    alpha: float = flag(
        NETWORK, 0.9, "weight of the soft loss: total = alpha * soft + (1 - alpha) * hard; 0: hard labels alone"
    )
    temperature: float = flag(NETWORK, 4.0, "softens both distributions in the soft loss", "T")
    loss: str = flag(
        NETWORK,
        "kl",
        "the soft loss: kl (times T squared), ce, mse, std (logits standardised), or dkd (decoupled)",
        "NAME",
    )
    crops: str | None = flag(
        CROPS,
        None,
        "cached: the cache's own views; fresh: new crops, hard labels alone [cached, or fresh at --alpha 0]",
        "KIND",
    )
    views: int | None = flag(DATA, None, "use only the first V views of the cache [all]", "V")
    labelled: float = flag(
        DATA,
        1.0,
        "share of train whose labels are used, in every class alike; of the other images a student sees the soft "
        "labels alone, or at --alpha 0 nothing",
        "SHARE",
    )
    cache_memory: str = flag(
        DATA,
        "4G",
        "a cache file up to this size is loaded whole by each rank; of a larger one rows stay on file",
        "SIZE",
    )

    def __post_init__(self):
        super().__post_init__()
        bytes_of("cache_memory", self.cache_memory)
        _require(0 <= self.alpha <= 1, "alpha", self.alpha, "must lie in [0, 1]")
        _require(0 < self.temperature < math.inf, "temperature", self.temperature, "must be above 0")
        _require(self.views is None or self.views >= 1, "views", self.views, "must be at least 1")
        _require(0 < self.labelled <= 1, "labelled", self.labelled, "must be above 0 and at most 1")
        if self.crops is not None:
            _one_of("crops", self.crops, ("cached", "fresh"))
        self._check_crops()

    def _check_crops(self) -> None:
        """Raise UserError where the crops have no soft label, or show what theirs does not describe."""
        if self.uses_fresh_crops:
            _require(
                self.alpha == 0,
                "alpha",
                self.alpha,
                "needs --crops cached: a fresh crop has no row in the cache; or use --alpha 0",
            )
        else:
            for name in ("mixup", "cutmix"):
                value = getattr(self, name)
                _require(value == 0, name, value, "needs --crops fresh: a cached row describes its own view only")

    @property
    def cache_memory_bytes(self) -> int:
        """The size up to which a cache is loaded whole."""
        return bytes_of("cache_memory", self.cache_memory)

    @property
    def learns_from_labels_alone(self) -> bool:
        return self.alpha == 0

    @property
    def uses_fresh_crops(self) -> bool:
        return self.crops == "fresh" or (self.crops is None and self.alpha == 0)

    def resolved(self) -> Self:
        """Crops as they follow from alpha; the usual cache, but none for fresh crops unless one was named."""
        cache = self.cache or (None if self.uses_fresh_crops else "runs/teacher/logits.h5")
        return dataclasses.replace(self, crops="fresh" if self.uses_fresh_crops else "cached", cache=cache)


@dataclass(frozen=True)
class OnlineSettings(DistillSettings):
    """A student with its teacher at hand, for comparison: every crop has a soft label, fresh and blended ones too."""

    def _check_crops(self) -> None:
        pass


@dataclass(frozen=True)
class StudySettings(DistillSettings):
    """A study: students that differ in what they learn from, and in nothing else, each with several seeds."""

    kind: ClassVar[str] = "study"
    may_change: ClassVar[frozenset[str]] = DistillSettings.may_change | {
        *("arms", "grid", "seeds", "teacher_model", "side_by_side")
    }
    not_typed: ClassVar[frozenset[str]] = frozenset({"seed", "crops"})

    out: str = flag(RUN, "runs/study", "folder of the study; runs that it holds are not run again", "DIR")
    arms: tuple[str, ...] | None = flag(
        RUN,
        None,
        "what to compare, see --list; NAME=ARM,setting=value makes another [all, and online where --teacher-model is "
        "given]",
        "ARM",
    )
    grid: tuple[str, ...] | None = flag(
        RUN,
        None,
        "an arm for each combination of settings, such as alpha=0,0.5,0.9 temperature=2,4; --arms names what is varied "
        "[distilled]",
        "SETTING=VALUES",
    )
    seeds: tuple[int, ...] = flag(RUN, (0, 1, 2), "a student of every arm for each", "SEED")
    primary: tuple[str, ...] = flag(
        RUN, ("distilled", "baseline"), "the one difference that the study is for, named before its runs", "ARM"
    )
    side_by_side: str = flag(
        RUN,
        "auto",
        "on several ranks: yes trains one student a rank, no one student on all ranks; auto is yes on GPUs while at "
        "least as many runs are left as GPUs",
        "auto|yes|no",
    )
    teacher_model: str | None = flag(DATA, None, "the teacher's model.pt, for the arm online alone", "FILE")

    def __post_init__(self):
        super().__post_init__()
        _require(self.alpha > 0, "alpha", self.alpha, "must be above 0: the arms without soft labels are there already")
        two_arms = len(self.primary) == len({*self.primary}) == 2
        _require(two_arms, "primary", " ".join(self.primary), "must be two different arms")
        _one_of("side_by_side", self.side_by_side, ("auto", "yes", "no"))
        for seed in self.seeds:
            check_seed(seed)

    def _check_crops(self) -> None:
        pass  # each arm has its own, and only those on fresh crops blend

    def resolved(self) -> Self:
        """The usual cache where none was named."""
        return dataclasses.replace(self, cache=self.cache or "runs/teacher/logits.h5")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value} {rule}.")


def bytes_of(name: str, text: str) -> int:
    """A size such as 512M or 4G, in bytes: powers of 1024. Raises UserError for what is none."""
    units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], text[-1]) if text and text[-1].upper() in units else (text, "")
    _require(number.isdigit() and number.isascii(), name, text, "is not a size; write one such as 512M, 4G or 0")
    return int(number) << units[unit.upper()]


def check_seed(seed: int) -> None:
    """Raise UserError unless a seed suits both random generators and the cache's int64."""
    _require(0 <= seed < 2**63, "seed", seed, "must be at least 0 and below 2^63")


def check_mixed_views(share: float, views: int) -> None:
    """Raise UserError unless it is a share that comes to a view, or none."""
    _require(0 <= share <= 1, "mixed_views", share, "must lie in [0, 1]")
    comes_to_one = share == 0 or (views - 1) * share >= 1
    _require(
        comes_to_one, "mixed_views", share, f"of {max(0, views - 1)} drawn views is less than one; ask for more --views"
    )


def check_crop_scale(crop_scale: tuple[float, float]) -> None:
    """Raise UserError unless these are a smallest and a largest area share."""
    low, high = crop_scale
    _require(
        0 < low <= high <= 1, "crop_scale", f"{low} {high}", "must be two shares with 0 < smallest <= largest <= 1"
    )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    _require(value in known, name, value, f"is not known; choose from {', '.join(known)}")


@dataclass(frozen=True)
class Preset:
    """A named set of defaults: what it is for, and what it changes in either job."""

    about: str
    teacher: dict[str, Any]
    distill: dict[str, Any]

    def of(self, kind: type[Settings]) -> dict[str, Any]:
        """What it changes in jobs of this kind; a study is made of students."""
        return self.teacher if kind.kind == "teacher" else self.distill


# Each preset is headed by what it is for; measured scores stand in the README beside their commands.
PRESETS: dict[str, Preset] = {
    # One H100, or any GPUs: a starting point, its time and scores are not measured yet.
    "h100": Preset(
        about="for GPUs: 128 px, long schedules, not measured yet",
        teacher={
            "image_size": 128,
            "epochs": 250,
            "lr": 0.2,
            "batch_size": 256,
            "views": 200,
            "ema": 0.999,
            "mixup": 0.25,
            "cutmix": 0.25,
            "plain_epochs": 25,
        },
        distill={
            "student": "cnn5_wide",
            "image_size": 128,
            "epochs": 300,
            "lr": 0.2,
            "batch_size": 256,
            "ema": 0.999,
            "temperature": 2.0,
        },
    ),
    # A CPU box: the teacher sees 96 px, the student the same boxes at 64 px. `make imagewoof-cpu`, two cores with
    # AVX512-BF16 (Zen 4) and --precision bf16: teacher 77.0 % in 65 minutes, a student 73.5 +- 0.4 % in 4, its
    # hard-label twin 69.9 +- 0.7 %, 70.8 +- 0.7 % with a weight decay of 0.002 (three seeds each,
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
        about="for the generated set of `make demo`: teacher at 48 px, student at 32 px, a few minutes on two cores",
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


class _Page(argparse.HelpFormatter):
    """A narrow column of flags, sentences beside it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


def parser_for(kind: type[Settings], prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose flags are the fields of `kind`; only what was typed ends up in the namespace."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=_Page,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = _raise_user_error(prog)
    parser.usage = f"torchrun --nproc_per_node=N -m {prog} [FLAG ...]"
    hints = get_type_hints(kind)
    settings = dataclasses.fields(kind)
    for title in (RUN, DATA, NETWORK, TRAINING, CROPS):
        group = parser.add_argument_group(title)
        for setting in settings:
            if setting.metadata["group"] == title and setting.name not in kind.not_typed:
                _add_flag(group, setting, hints[setting.name], _shown_default(kind, setting))
    parser.add_argument_group("presets", "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items()))
    return parser


def _raise_user_error(prog: str):
    def error(message: str):
        raise UserError(f"{message}; `python -m {prog} --help` lists the flags.")

    return error


def _add_flag(group: Any, setting: dataclasses.Field, hint: Any, default: str) -> None:
    name, text = "--" + setting.name.replace("_", "-"), setting.metadata["help"] + default
    if hint is bool:
        group.add_argument(name, action="store_true", help=text)
        return
    is_pair = hint == tuple[float, float]
    kind = (
        next((part for part in get_args(hint) if part is not type(None)), hint)
        if isinstance(hint, types.UnionType)
        else hint
    )
    nargs = 2 if is_pair else "+" if get_origin(kind) is tuple else None
    kind = get_args(kind)[0] if nargs else kind
    metavar = ("LOW", "HIGH") if is_pair else setting.metadata["metavar"] or ("N" if kind is int else "X")
    group.add_argument(name, type=kind, nargs=nargs, metavar=metavar, help=text)


def _shown_default(kind: type[Settings], setting: dataclasses.Field) -> str:
    """The default in brackets; where presets differ from it, theirs by name."""
    presets = {name: preset.of(kind) for name, preset in PRESETS.items()}
    own = {name: values[setting.name] for name, values in presets.items() if setting.name in values}
    shown = [f"{name}: {value}" for name, value in own.items()]
    if setting.default not in (None, ()) and not isinstance(setting.default, bool):
        shown.insert(
            0, " ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else str(setting.default)
        )
    return f" [{', '.join(shown)}]" if shown else ""


def resolve(kind: type[Settings], typed: dict[str, Any], has_gpu: bool) -> Settings:
    """Settings from what was typed, over the preset's values, over the defaults. Raises UserError for an unknown
    preset.
    """
    name = typed.get("preset") or ("h100" if has_gpu and typed.get("device") != "cpu" else "cpu-64px")
    _one_of("preset", name, tuple(PRESETS))
    values = {**PRESETS[name].of(kind), **typed, "preset": name}
    values |= _shortened(kind, values, typed)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(**values).resolved()


def _shortened(kind: type[Settings], values: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """The first and last epochs that are unlike the others, where nobody asked for their number: it must not stand in
    a short run's way.
    """
    defaults = {setting.name: setting.default for setting in dataclasses.fields(kind)}
    epochs, warmup, plain = (values.get(name, defaults[name]) for name in ("epochs", "warmup_epochs", "plain_epochs"))
    short = {"warmup_epochs": min(warmup, max(epochs, 0) / 5), "plain_epochs": min(plain, max(epochs, 0) // 10)}
    return {name: value for name, value in short.items() if name not in typed}


def read_command_line(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What was typed, as a dictionary of setting names. Raises UserError for an unknown flag or an unreadable value."""
    return vars(parser.parse_args(sys.argv[1:] if arguments is None else arguments))
