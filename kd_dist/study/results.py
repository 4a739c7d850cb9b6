"""What a study's run folders hold: its arms, their scores, and the differences between them. Nothing is trained.

Everything is read from OUT/<arm>/seed-<s> and OUT/study.json: the same folders give the same figures. An arm is
complete when all its seeds are finished; other arms are shown, not tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.cache import statistics_of
from kd_dist.config import DistillConfig, command
from kd_dist.errors import UserError
from kd_dist.run.folder import RunFolder
from kd_dist.run.reading import Run
from kd_dist.run.results import ValLogits, read_val_logits
from kd_dist.study.arms import ARMS, BASELINES, BUG_CHECK, DISTILLED
from kd_dist.study.choice import variant
from kd_dist.study.cost import run_seconds
from kd_dist.study.folder import BASE, StudyFolder
from kd_dist.study.statistics import (
    Difference,
    Spread,
    holm,
    mcnemar,
    over_images,
    paired,
    resampled,
    spread,
    upper_bound,
    welch,
)

ENOUGH_SEEDS = 3
METRICS = ("top1", "agreement", "calibration_error")


@dataclass(frozen=True)
class SeedRun(Run):
    """One run of an arm; its figures are those of its saved val logits."""

    seed: int

    @cached_property
    def finished(self) -> bool:
        return self.state.get("status") == "finished" and self.folder.val_logits.exists()

    @cached_property
    def val(self) -> ValLogits:
        return read_val_logits(self.folder.val_logits)

    @cached_property
    def hit_N(self) -> np.ndarray:
        """Whether each val image was put in its class."""
        return _hits(self.val)

    @cached_property
    def top1(self) -> float:
        return float(self.hit_N.mean())

    @cached_property
    def calibration_error(self) -> float:
        return _calibration_error(self.val)

    @property
    def agreement(self) -> float | None:
        """Share of val images in the teacher's class after the last epoch, None where the run had no cache."""
        return self.scores.get(f"{self.prefix}_agreement")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's settings, with the defaults of those that it is too old to have."""
        return DistillConfig.completed(super().settings)

    def figures(self) -> dict[str, Any]:
        """All of the run's numbers, as plain JSON values."""
        scores = {name: getattr(self, name) for name in METRICS}
        return {"seed": self.seed, **scores, "seconds": run_seconds(self.metrics)}


@dataclass(frozen=True)
class ArmRuns:
    """An arm's runs by seed; `base` is the built-in arm that it is or varies, `own` the settings of a variant."""

    name: str
    isolates: str
    runs: tuple[SeedRun, ...]
    base: str
    own: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def finished(self) -> dict[int, SeedRun]:
        return {run.seed: run for run in self.runs if run.finished}

    @property
    def complete(self) -> bool:
        return bool(self.runs) and len(self.finished) == len(self.runs)

    @cached_property
    def labelled(self) -> float:
        """The fraction of the labels that its finished runs used."""
        return min((run.settings["label_fraction"] for run in self.finished.values()), default=1.0)

    def values(self, metric: str) -> list[float]:
        """A metric of the finished runs that have it, by rising seed."""
        values = (getattr(run, metric) for run in self.finished.values())
        return [value for value in values if value is not None]

    @property
    def mean_top1(self) -> float:
        """Mean top-1 over its finished runs, of which there is one at least."""
        return float(np.mean(self.values("top1")))

    def spread(self, metric: str) -> Spread | None:
        """Mean and standard deviation over finished seeds, None without any."""
        values = self.values(metric)
        return spread(np.array(values)) if values else None

    @property
    def seconds(self) -> float | None:
        """Mean wall seconds of its finished runs, None where one of them did not note them."""
        found = [run_seconds(run.metrics) for run in self.finished.values()]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None


@dataclass(frozen=True)
class Contrast:
    """Top-1 of an arm minus that of a baseline: the mean over the seeds that both have (over all where they share
    none). An interval is None where there are too few seeds, or no spread. `upper_bound`: one-sided, paired.
    """

    arm: str
    baseline: str
    shared_seeds: int
    mean: float
    paired: Difference | None
    welch: Difference | None
    resampled: Difference | None
    upper_bound: float | None


def contrast(arm: ArmRuns, baseline: ArmRuns) -> Contrast:
    """The difference of two arms: paired and resampled over the seeds that both have, Welch over all."""
    shared = sorted(arm.finished.keys() & baseline.finished.keys())
    runs = [[side.finished[seed] for seed in shared] for side in (arm, baseline)]
    a_S, b_S = (np.array([run.top1 for run in side]) for side in runs)
    all_a_S, all_b_S = (np.array(side.values("top1")) for side in (arm, baseline))
    return Contrast(
        arm=arm.name,
        baseline=baseline.name,
        shared_seeds=len(shared),
        mean=float(np.mean(a_S) - np.mean(b_S)) if shared else float(np.mean(all_a_S) - np.mean(all_b_S)),
        paired=paired(a_S, b_S),
        welch=welch(all_a_S, all_b_S),
        resampled=resampled(_hits_SN(runs[0]), _hits_SN(runs[1])) if len(shared) > 1 else None,
        upper_bound=upper_bound(a_S, b_S),
    )


@dataclass(frozen=True)
class Study:
    """A study's folder, read: its document and its arms."""

    out: Path
    document: Mapping[str, Any]
    arms: Mapping[str, ArmRuns]

    @property
    def cache(self) -> Path | None:
        named = self.document.get("cache")
        return Path(named) if named else None

    @property
    def complete(self) -> dict[str, ArmRuns]:
        return {name: arm for name, arm in self.arms.items() if arm.complete}

    @property
    def baselines(self) -> list[str]:
        """The arms on hard labels only, with their variants."""
        return [*BASELINES, *(name for name, arm in self.arms.items() if name != arm.base and arm.base in BASELINES)]

    @cached_property
    def scored_on(self) -> str:
        """The images that its runs were scored on: "val", or under --tune a part of train."""
        found = {run.val.of for arm in self.arms.values() for run in arm.finished.values()}
        return " and ".join(sorted(found)) or "val"

    @cached_property
    def best_baseline(self) -> str | None:
        """The best of the baselines that use all labels."""
        return self.best_baseline_at(1.0)

    def best_baseline_at(self, labelled: float) -> str | None:
        """The complete baseline of the highest mean top-1, of those that use this fraction of the labels. One of fewer
        than three seeds is left out if another has more: one lucky seed is not a baseline for several.
        """
        found = {name: self.arms[name] for name in self.baselines if name in self.complete}
        found = {name: arm for name, arm in found.items() if arm.labelled == labelled}
        enough = min(ENOUGH_SEEDS, max((len(arm.finished) for arm in found.values()), default=0))
        among = [name for name, arm in found.items() if len(arm.finished) >= enough]
        return max(among, key=lambda name: found[name].mean_top1, default=None)

    @property
    def primary(self) -> tuple[str, str]:
        """(arm, baseline) of the contrast named before the runs."""
        arm, baseline = self.document.get("primary") or (DISTILLED, BASELINES[0])
        return arm, baseline

    @cached_property
    def contrasts(self) -> dict[str, Contrast]:
        """Each other complete arm minus the best baseline."""
        if self.best_baseline is None:
            return {}
        others = (arm for name, arm in self.complete.items() if name != self.best_baseline)
        return {arm.name: contrast(arm, self.arms[self.best_baseline]) for arm in others}

    @cached_property
    def primary_contrast(self) -> Contrast | None:
        """The primary contrast, which needs no correction; None while one of its arms is not complete."""
        arm, baseline = self.primary
        if arm == baseline or not {arm, baseline} <= self.complete.keys():
            return None
        return self.contrasts[arm] if baseline == self.best_baseline else contrast(self.arms[arm], self.arms[baseline])

    @cached_property
    def corrected(self) -> dict[str, float]:
        """p of the paired differences to the best baseline after Holm, without the primary contrast."""
        first = self.primary_contrast
        rest = {name: one.paired for name, one in self.contrasts.items() if one is not first and one.paired}
        return holm({name: found.p for name, found in rest.items() if found.p is not None})

    @cached_property
    def bug_check(self) -> Contrast | None:
        """shuffled-all minus baseline: soft labels of other images must not help. None while one is not complete."""
        if not {BUG_CHECK, BASELINES[0]} <= self.complete.keys():
            return None
        return contrast(self.arms[BUG_CHECK], self.arms[BASELINES[0]])

    def figures(self) -> dict[str, Any]:
        """All numbers behind the table, as plain JSON values; fractions in [0, 1]."""
        return {
            "arms": {name: _arm_figures(arm) for name, arm in self.arms.items()},
            "best_baseline": self.best_baseline,
            "contrasts": [asdict(one) for one in self.contrasts.values()],
            "primary": asdict(self.primary_contrast) if self.primary_contrast else None,
            "p_holm": self.corrected,
            "bug_check_upper_bound": self.bug_check.upper_bound if self.bug_check else None,
            "settings": self.document.get("settings"),
            "variants": self.document.get("variants", {}),
        }


def _arm_figures(arm: ArmRuns) -> dict[str, Any]:
    spreads = {name: arm.spread(name) for name in METRICS}
    return {
        "complete": arm.complete,
        "runs": [run.figures() for run in arm.finished.values()],
        **{name: asdict(found) if found else None for name, found in spreads.items()},
    }


def read_study(out: Path) -> Study:
    """All of a study's runs, finished or not. Raises UserError where there is none, and where runs saw other images."""
    folder = StudyFolder(out)
    document, there = folder.document(), folder.runs()
    if not there:
        raise UserError(f"{out} holds no runs <arm>/seed-<number>; run `{command('kd_dist.study', out=out)}` first.")
    named = {*(document.get("arms") or ()), *there}
    variants = {name: variant(f"{name}={text}") for name, text in document.get("variants", {}).items()}
    order = [name for name in (*ARMS, *variants) if name in named]
    arms = {}
    for name in (*order, *sorted(named - {*order})):
        runs = tuple(SeedRun(run, f"{name}/{run.path.name}", seed) for seed, run in sorted(there.get(name, {}).items()))
        if known := (ARMS | variants).get(name):
            arms[name] = ArmRuns(name, known.isolates, runs, known.base or name, known.own)
        else:  # study.json is lost or older: its runs still know
            bases = {run.settings[BASE] for run in runs if run.finished and run.settings.get(BASE) is not None}
            arms[name] = ArmRuns(name, "-", runs, next(iter(bases), name))
    require_same_val([run for arm in arms.values() for run in arm.finished.values()])
    return Study(out, document, arms)


def require_same_val(runs: Sequence[SeedRun]) -> None:
    """Raise UserError where runs saw different val images."""
    for run in runs[1:]:
        _require_same_images(runs[0].folder.val_logits, runs[0].val, run.folder.val_logits, run.val)


def _require_same_images(path_a: Path, a: ValLogits, path_b: Path, b: ValLogits) -> None:
    if a.fingerprint != b.fingerprint:
        raise UserError(
            f"{path_a} is of other val images ({a.fingerprint[:12]}) than {path_b} ({b.fingerprint[:12]}); "
            "compare runs on the same data."
        )


def _hits_SN(runs: Sequence[SeedRun]) -> np.ndarray:
    return np.stack([run.hit_N for run in runs])


def _hits(val: ValLogits) -> np.ndarray:
    return val.logits_NK.argmax(axis=1) == val.labels_N


def _calibration_error(val: ValLogits) -> float:
    return statistics_of(val.logits_NK[:, None], val.labels_N).calibration_error


def compare(a: Path, b: Path) -> str:
    """Statistics on two finished runs, from their saved val logits. Raises UserError on other val images."""
    files = [RunFolder(Path(path)).val_logits for path in (a, b)]
    vals = [read_val_logits(file) for file in files]
    _require_same_images(files[0], vals[0], files[1], vals[1])
    hits = [_hits(val) for val in vals]
    difference, low, high = over_images(hits[0], hits[1])
    only_a, only_b, p = mcnemar(hits[0], hits[1])
    same = float(np.mean(vals[0].logits_NK.argmax(axis=1) == vals[1].logits_NK.argmax(axis=1)))
    runs = [
        f"{name}: {path}, top-1 {100 * hit.mean():.2f} %, calibration error {_calibration_error(val):.3f}"
        for name, path, hit, val in zip("AB", (a, b), hits, vals, strict=True)
    ]
    found = [
        f"A minus B on {len(hits[0]):,} images of {vals[0].of}: {100 * difference:+.2f} points of top-1, 95 % interval "
        f"[{100 * low:+.2f}, {100 * high:+.2f}] (paired, images resampled)",
        f"only A is right on {only_a} images, only B on {only_b}: p = {p:.2g} (McNemar, exact)",
        f"both put {100 * same:.1f} % of the images in the same class",
        "These figures compare two networks, not two methods: another seed changes both. To compare methods, train "
        "several seeds of each with python -m kd_dist.study.",
    ]
    return "\n".join(runs + found)
