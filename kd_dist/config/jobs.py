"""What each job is asked for: a composition of groups, and the few flags that are its own. On the command line and in a
run's folder the flags are flat, under the names of the fields.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

from kd_dist.config.groups import (
    AugmentationConfig,
    DataConfig,
    DistillationConfig,
    LabellingConfig,
    OptimisationConfig,
    RunConfig,
    SplitConfig,
    check_seed,
    flag,
    one_of,
    require,
)

USUAL_CACHE = "runs/teacher/logits.h5"
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class JobConfig:
    """What all jobs have. Raises UserError where a value is out of its range."""

    kind: ClassVar[str]
    trains_together: ClassVar[bool] = True  # all ranks train one network
    may_change: ClassVar[frozenset[str]]  # flags that a resumed run may have other values of

    preset: str | None = flag(
        None,
        "Named set of defaults, listed below [gpu-128px on a GPU, cpu-64px on a CPU].",
        "NAME",
        may_change=True,
    )
    out: str = flag("runs", "Folder of this run; the same command again resumes the run.", "DIR", may_change=True)
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        unmixed, epochs = self.augmentation.no_mix_epochs, self.optimisation.epochs
        require(0 <= unmixed <= epochs, "no_mix_epochs", unmixed, f"must lie in 0 to {epochs} (--epochs)")

    @property
    def mixed_epochs(self) -> int:
        """Epochs in which images are mixed, where any are: the first ones."""
        return self.optimisation.epochs - self.augmentation.no_mix_epochs

    def is_evaluated_after(self, epoch: int) -> bool:
        """Whether this epoch, counted from 1, ends with an evaluation."""
        return epoch % self.run.evaluate_every == 0 or epoch == self.optimisation.epochs

    def resolved(self) -> Self:
        """The same config with what follows from other values filled in."""
        return self

    def flat(self) -> dict[str, Any]:
        """The value of every flag by its name."""
        return {name: getattr(getattr(self, group) if group else self, name) for group, name in _places(type(self))}

    def __getitem__(self, flag: str) -> Any:
        """The value of a flag by its name, whichever group it is in; KeyError where this job has no such flag."""
        return self.flat()[flag]

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A config from values by flag name, and defaults for the others. Raises TypeError for an unknown name."""
        groups = groups_of(cls)
        nested: dict[str, dict[str, Any]] = {group: {} for group in groups}
        place_of = {name: group for group, name in _places(cls)}
        own: dict[str, Any] = {}
        for name, value in values.items():
            place = place_of.get(name, "")
            (nested[place] if place else own)[name] = value
        return cls(**own, **{group: groups[group](**nested[group]) for group in groups})

    def changed(self, **values: Any) -> Self:
        """This config with other values of some flags, by flag name."""
        return type(self).of(**{**self.flat(), **values})

    def stored(self) -> dict[str, Any]:
        """The flags as plain JSON values, for the run folder and the checkpoint."""
        return {name: _plain(value) for name, value in self.flat().items()}

    @classmethod
    def completed(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Stored values, with the defaults of flags that the version which stored them did not have yet."""
        return {name: _plain(each.default) for name, each in flags_of(cls).items()} | dict(stored)


@dataclass(frozen=True)
class NetworkConfig(JobConfig):
    """A job that trains one network from a seed; each kind has a folder of its own by default."""

    seed: int = flag(0, "Seed of weights, order, crops and flips.")
    init: str | None = flag(
        None,
        "Start a new run, with a new schedule, from the weights of this run or model.pt [random weights].",
        "RUN_OR_FILE",
        may_change=True,
    )

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)


@dataclass(frozen=True)
class TeacherConfig(NetworkConfig):
    """The first job: train a teacher, then write the cache of its soft labels."""

    kind: ClassVar[str] = "teacher"

    out: str = flag(
        "runs/teacher", "Folder of this run; the same command again resumes the run.", "DIR", may_change=True
    )
    labelling: LabellingConfig = field(default_factory=LabellingConfig)

    def __post_init__(self):
        super().__post_init__()
        both = self.init is not None and self.labelling.weights is not None
        rule = f"and --init {self.init} cannot be combined; remove one of them"
        require(not both, "weights", self.labelling.weights, rule)
        epochs = self.optimisation.epochs
        for epoch in self.labelling.keep_epochs:
            require(1 <= epoch <= epochs, "keep_epochs", epoch, f"must lie in 1 to {epochs} (--epochs)")

    def is_evaluated_after(self, epoch: int) -> bool:
        """As other jobs, and where weights are kept: their scores are kept with them."""
        return super().is_evaluated_after(epoch) or epoch in self.labelling.keep_epochs


@dataclass(frozen=True)
class StudentConfig(NetworkConfig):
    """A student, whether its soft labels come from a cache or from a teacher at hand."""

    kind: ClassVar[str] = "student"

    out: str = flag(
        "runs/student", "Folder of this run; the same command again resumes the run.", "DIR", may_change=True
    )
    crops: str | None = flag(
        None,
        "Training crops: cached (the views in the cache) or fresh (sampled anew, hard labels only) [fresh with "
        "--alpha 0, else cached].",
        "KIND",
    )
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.crops is not None:
            one_of("crops", self.crops, ("cached", "fresh"))

    @property
    def uses_fresh_crops(self) -> bool:
        """Whether each epoch samples new crops, which have no soft label in the cache."""
        return self.crops == "fresh" or (self.crops is None and self.distillation.alpha == 0)

    def resolved(self) -> Self:
        """Crops as they follow from alpha; the usual cache, but none for fresh crops unless one was named."""
        cache = self.distillation.cache or (None if self.uses_fresh_crops else USUAL_CACHE)
        return self.changed(crops="fresh" if self.uses_fresh_crops else "cached", cache=cache)


@dataclass(frozen=True)
class DistillConfig(StudentConfig):
    """The second job: a student that learns from a cache, so every crop that it sees needs a soft label there."""

    def __post_init__(self):
        super().__post_init__()
        alpha, augmentation = self.distillation.alpha, self.augmentation
        if self.uses_fresh_crops:
            rule = "needs --crops cached, because a fresh crop has no soft label in the cache; or use --alpha 0"
            require(alpha == 0, "alpha", alpha, rule)
        else:
            rule = "needs --crops fresh: a cached soft label belongs to its own view only"
            require(augmentation.mixup == 0, "mixup", augmentation.mixup, rule)
            require(augmentation.cutmix == 0, "cutmix", augmentation.cutmix, rule)


@dataclass(frozen=True)
class StudyConfig(JobConfig):
    """A study: students that differ in what they learn from, and in nothing else. Each arm has its own crops, and each
    run its own seed.
    """

    kind: ClassVar[str] = "study"
    trains_together: ClassVar[bool] = False  # its students have the batch size of one GPU, on however many

    out: str = flag("runs/study", "Folder of the study; finished runs in it are not run again.", "DIR", may_change=True)
    arms: tuple[str, ...] | None = flag(
        None,
        "Arms to train; --list shows the built-in ones, NAME=ARM,setting=value defines a variant [all but online; with "
        "--teacher-model, all].",
        "ARM",
        may_change=True,
    )
    grid: tuple[str, ...] | None = flag(
        None,
        "Define one variant for each combination of setting values, such as alpha=0,0.5,0.9 temperature=2,4; --arms "
        "selects the arm that is varied [distilled].",
        "SETTING=VALUES",
        may_change=True,
    )
    side_by_side: str = flag(
        "auto",
        "With several ranks: yes trains a separate student on each rank; no trains each student on all ranks; auto "
        "chooses yes on GPUs while there are at least as many runs left as GPUs.",
        "auto|yes|no",
        may_change=True,
    )
    seeds: tuple[int, ...] = flag((0, 1, 2), "Train a student of every arm with each of these seeds.", "SEED", True)
    primary: tuple[str, ...] = flag(
        ("distilled", "baseline"), "The primary contrast: exactly two arms, A minus B, fixed before the runs.", "ARM"
    )
    teacher_model: str | None = flag(
        None, "The teacher's model.pt; only the arm online needs it.", "FILE", may_change=True
    )
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self):
        super().__post_init__()
        alpha = self.distillation.alpha
        require(alpha > 0, "alpha", alpha, "must be above 0: the study already has arms without soft labels")
        two_arms = len(self.primary) == len({*self.primary}) == 2
        require(two_arms, "primary", " ".join(self.primary), "must be two different arms")
        one_of("side_by_side", self.side_by_side, ("auto", "yes", "no"))
        for seed in self.seeds:
            check_seed(seed)

    @property
    def uses_fresh_crops(self) -> bool:
        """False: a study's cache is read for its crops; arms on fresh crops have a config of their own."""
        return False

    def resolved(self) -> Self:
        """The usual cache where none was named."""
        return self.changed(cache=self.distillation.cache or USUAL_CACHE)


def _cached(function: Callable[[K], T]) -> Callable[[K], T]:
    """functools.cache, whose own type takes no class of configs: mypy finds only the instances' __hash__ there."""
    return cache(function)


@_cached
def groups_of(kind: type[JobConfig]) -> dict[str, Any]:
    """The groups that a job is composed of, by the names of their fields."""
    hints = get_type_hints(kind)
    names = [each.name for each in dataclasses.fields(kind)]
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


@_cached
def flags_of(kind: type[JobConfig]) -> dict[str, dataclasses.Field]:
    """Every flag of a job by its name: its default, help text and the rest of it."""
    groups = groups_of(kind)
    found: dict[str, dataclasses.Field] = {}
    for each in dataclasses.fields(kind):
        inside = dataclasses.fields(groups[each.name]) if each.name in groups else [each]
        found |= {one.name: one for one in inside}
    return found


@_cached
def _places(kind: type[JobConfig]) -> list[tuple[str, str]]:
    """(group, flag) of every flag; group "" for those that are the job's own."""
    groups = groups_of(kind)
    own = [("", each.name) for each in dataclasses.fields(kind) if each.name not in groups]
    return own + [(group, each.name) for group in groups for each in dataclasses.fields(groups[group])]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


for _kind in (JobConfig, NetworkConfig, TeacherConfig, StudentConfig, DistillConfig, StudyConfig):
    _kind.may_change = frozenset(name for name, each in flags_of(_kind).items() if each.metadata["may_change"])
