"""A study's results: its table, figures, plot and TensorBoard page, and the comparison of any two finished runs.

Everything is read from the run folders OUT/<arm>/seed-<s> and from OUT/study.json: nothing is trained, and the same
folders give the same figures. An arm counts as complete when all its seeds are finished; others are shown, not tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.cache import statistics_of
from kd_dist.checkpoint import RunFolder, ValLogits, read_state, read_val_logits
from kd_dist.config import DistillConfig
from kd_dist.errors import UserError
from kd_dist.files import disk_full, write_atomically
from kd_dist.report import Run, markdown
from kd_dist.study.arms import ARMS
from kd_dist.study.arms import Arm as KnownArm
from kd_dist.study.breakeven import cost_of, sentences, student_of
from kd_dist.study.choice import variant
from kd_dist.study.folder import MADE_OF, StudyFolder
from kd_dist.study.statistics import Difference, Spread, holm, mcnemar, over_images, paired, resampled, spread, welch

HARD_TWINS = ("hard-fresh", "hard-cached")
DISTILLED, FAIR_TWIN, BUG_CHECK = "cached-V", "hard-fresh", "shuffled-all"
BUG_CHECK_LIMIT = 0.01  # of top-1
ENOUGH_SEEDS = 3
METRICS = ("top1", "agreement", "calibration_error")
_ABSENT = "-"


# ---- what the folders hold


@dataclass(frozen=True)
class SeedRun:
    """One run of an arm; its figures are those of its saved val logits."""

    run: Run
    seed: int

    @cached_property
    def finished(self) -> bool:
        folder = self.run.folder
        return (read_state(folder) or {}).get("status") == "finished" and folder.val_logits.exists()

    @cached_property
    def val(self) -> ValLogits:
        return read_val_logits(self.run.folder.val_logits)

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

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's settings, with the defaults of those that it is too old to have."""
        return DistillConfig.completed(self.run.settings)

    @property
    def agreement(self) -> float | None:
        """Share of val images in the teacher's class after the last epoch, where the run had a cache to tell it by."""
        return self.run.metrics[-1].get(f"{self.run.head}_agreement") if self.run.metrics else None

    def figures(self) -> dict[str, Any]:
        """All of the run's numbers, as plain JSON values."""
        seconds = student_of(self.run.metrics).total_s
        return {"seed": self.seed, **{name: getattr(self, name) for name in METRICS}, "seconds": seconds}


@dataclass(frozen=True)
class Arm:
    """An arm's runs by seed; `isolates` says what it is in the study for, `kin` which arm of the ladder it is or is
    made of, `own` what a variant sets.
    """

    name: str
    isolates: str
    runs: tuple[SeedRun, ...]
    kin: str
    own: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def finished(self) -> dict[int, SeedRun]:
        return {run.seed: run for run in self.runs if run.finished}

    @property
    def complete(self) -> bool:
        return bool(self.runs) and len(self.finished) == len(self.runs)

    @cached_property
    def labelled(self) -> float:
        """The share of the labels that its finished runs used."""
        return min((run.settings["label_fraction"] for run in self.finished.values()), default=1.0)

    def values(self, metric: str) -> list[float]:
        """A metric of the finished runs that have it, by rising seed."""
        values = (getattr(run, metric) for run in self.finished.values())
        return [value for value in values if value is not None]

    def spread(self, metric: str) -> Spread | None:
        """Mean and standard deviation over finished seeds, None without any."""
        values = self.values(metric)
        return spread(np.array(values)) if values else None


@dataclass(frozen=True)
class Contrast:
    """Top-1 of an arm less that of its twin, the mean over the seeds that both have (over all where they share none);
    each interval is None where it cannot be told.
    """

    arm: str
    twin: str
    shared_seeds: int
    mean: float
    paired: Difference | None
    welch: Difference | None
    resampled: Difference | None

    def figures(self) -> dict[str, Any]:
        """All numbers, as plain JSON values."""
        kinds = ((name, getattr(self, name)) for name in ("paired", "welch", "resampled"))
        shown = {name: kind and {**asdict(kind), "interval": kind.interval} for name, kind in kinds}
        for name in ("paired", "welch"):  # the third has degrees of freedom that few seeds cannot tell well enough
            if shown[name]:
                shown[name]["p"] = getattr(self, name).p
        return {"arm": self.arm, "twin": self.twin, "shared_seeds": self.shared_seeds, "mean": self.mean, **shown}


def contrast(arm: Arm, twin: Arm) -> Contrast:
    """The difference of two arms: paired and resampled over the seeds that both have, Welch over all."""
    shared = sorted(arm.finished.keys() & twin.finished.keys())
    runs = [[side.finished[seed] for seed in shared] for side in (arm, twin)]
    a_S, b_S = (np.array([run.top1 for run in side]) for side in runs)
    several = len(shared) > 1
    return Contrast(
        arm=arm.name,
        twin=twin.name,
        shared_seeds=len(shared),
        mean=float(np.mean(a_S - b_S) if shared else np.mean(arm.values("top1")) - np.mean(twin.values("top1"))),
        paired=paired(a_S, b_S),
        welch=welch(np.array(arm.values("top1")), np.array(twin.values("top1"))),
        resampled=resampled(*(np.stack([run.hit_N for run in side]) for side in runs)) if several else None,
    )


@dataclass(frozen=True)
class Study:
    """A study's folder, read. Raises UserError where it is none, and where its runs saw different val images."""

    out: Path
    document: Mapping[str, Any]
    arms: Mapping[str, Arm]

    @property
    def cache(self) -> Path | None:
        named = self.document.get("cache")
        return Path(named) if named else None

    @property
    def complete(self) -> dict[str, Arm]:
        return {name: arm for name, arm in self.arms.items() if arm.complete}

    @property
    def hard_twins(self) -> list[str]:
        """The arms on hard labels alone, variants of them among these."""
        return [*HARD_TWINS, *(name for name, arm in self.arms.items() if name != arm.kin and arm.kin in HARD_TWINS)]

    @cached_property
    def scored_on(self) -> str:
        """The images that its runs were scored on: "val", or under --tune a part of train."""
        found = {run.val.of for arm in self.arms.values() for run in arm.finished.values()}
        return " and ".join(sorted(found)) or "val"

    @cached_property
    def best_twin(self) -> str | None:
        """The twin of those that have all labels."""
        return self.best_twin_at(1.0)

    def best_twin_at(self, labelled: float) -> str | None:
        """The complete twin on hard labels of the highest mean top-1, which is hardest to beat, of those that use this
        share of the labels. One lucky seed is no twin for several: one of fewer than three seeds is passed over if
        another has more.
        """
        twins = {name: self.arms[name] for name in self.hard_twins if name in self.complete}
        twins = {name: twin for name, twin in twins.items() if twin.labelled == labelled}
        enough = min(ENOUGH_SEEDS, max((len(twin.finished) for twin in twins.values()), default=0))
        among = [name for name, twin in twins.items() if len(twin.finished) >= enough]
        return max(among, key=lambda name: twins[name].spread("top1").mean, default=None)

    @cached_property
    def primary(self) -> tuple[str, str] | None:
        """(arm, twin) of the contrast named beforehand; None while one of them is not complete."""
        arm, twin = self.document.get("primary") or (DISTILLED, FAIR_TWIN)
        return (arm, twin) if {arm, twin} <= self.complete.keys() and arm != twin else None

    @cached_property
    def contrasts(self) -> dict[str, Contrast]:
        """Each other complete arm against the best hard twin."""
        if self.best_twin is None:
            return {}
        others = (arm for name, arm in self.complete.items() if name != self.best_twin)
        return {arm.name: contrast(arm, self.arms[self.best_twin]) for arm in others}

    @cached_property
    def primary_contrast(self) -> Contrast | None:
        """The contrast named beforehand, which needs no correction."""
        if self.primary is None:
            return None
        arm, twin = self.primary
        return self.contrasts[arm] if twin == self.best_twin else contrast(self.arms[arm], self.arms[twin])

    @cached_property
    def corrected(self) -> dict[str, float]:
        """p of the paired differences to the best hard twin after Holm, without the primary contrast."""
        first = self.primary_contrast
        rest = {name: one for name, one in self.contrasts.items() if one is not first and one.paired}
        return holm({name: one.paired.p for name, one in rest.items()})

    @cached_property
    def bug_check(self) -> Contrast | None:
        """shuffled-all against hard-fresh: rows of other images must teach nothing."""
        if not {BUG_CHECK, FAIR_TWIN} <= self.complete.keys():
            return None
        return contrast(self.arms[BUG_CHECK], self.arms[FAIR_TWIN])


def read_study(out: Path) -> Study:
    """All of a study's runs, finished or not. Raises UserError where there is none."""
    folder = StudyFolder(out)
    document, there = folder.document(), folder.runs()
    if not there:
        raise UserError(f"{out} holds no runs <arm>/seed-<number>; run `python -m kd_dist.study --out {out}` first.")
    named = {*(document.get("arms") or ()), *there}
    variants = {name: variant(f"{name}={made_of}") for name, made_of in document.get("variants", {}).items()}
    known = ARMS | variants
    order = [name for name in known if name in named]
    arms = {name: _arm(name, known.get(name), there.get(name, {})) for name in [*order, *sorted(named - set(order))]}
    require_same_val([run for arm in arms.values() for run in arm.finished.values()])
    return Study(out, document, arms)


def _arm(name: str, known: KnownArm | None, folders: Mapping[int, RunFolder]) -> Arm:
    runs = tuple(SeedRun(Run(folders[seed], f"{name}/{folders[seed].path.name}"), seed) for seed in sorted(folders))
    if known:
        return Arm(name, known.isolates, runs, known.made_of or name, known.own)
    made_of = {run.run.settings.get(MADE_OF) for run in runs if run.finished} - {None}  # study.json may be lost
    return Arm(name, _ABSENT, runs, next(iter(made_of), name))


def require_same_val(runs: Sequence[SeedRun]) -> None:
    """Raise UserError where runs saw different val images."""
    for run in runs[1:]:
        _require_same_images(runs[0].run.folder.val_logits, runs[0].val, run.run.folder.val_logits, run.val)


def _require_same_images(path_a: Path, a: ValLogits, path_b: Path, b: ValLogits) -> None:
    if a.fingerprint != b.fingerprint:
        raise UserError(
            f"{path_a} is of other val images ({a.fingerprint[:12]}) than {path_b} ({b.fingerprint[:12]}); "
            "compare runs on the same data."
        )


def _hits(val: ValLogits) -> np.ndarray:
    return val.logits_NK.argmax(axis=1) == val.labels_N


def _calibration_error(val: ValLogits) -> float:
    return statistics_of(val.logits_NK[:, None], val.labels_N).calibration_error


# ---- the table


def table(out: Path) -> str:
    """The study's table as Markdown, and beneath it what is to be said of it."""
    return _text(read_study(out))


def _text(study: Study) -> str:
    twin = f"less {study.best_twin}" if study.best_twin else "less a hard twin"
    head = (
        *("arm", "what it isolates", "seeds", "top-1, %", "agreement, %", "calibration error"),
        *(f"{twin}, points (paired)", "(Welch)", "(images resampled too)", "p (Holm)"),
    )
    rows = [head, *(_row(study, arm) for arm in study.arms.values())]
    return "\n".join([markdown(rows), "", *(f"- {sentence}" for sentence in _sentences(study)), ""])


def _row(study: Study, arm: Arm) -> tuple[str, ...]:
    seeds = f"{len(arm.finished)}" if arm.complete else f"incomplete, {len(arm.finished)} of {len(arm.runs) or '?'}"
    shares = (with_deviation(arm.spread(name), digits=2, scale=100) for name in ("top1", "agreement"))
    figures = (*shares, with_deviation(arm.spread("calibration_error"), digits=3))
    return (arm.name, arm.isolates, seeds, *figures, *_contrast_cells(study, arm))


def _contrast_cells(study: Study, arm: Arm) -> tuple[str, ...]:
    found = study.contrasts.get(arm.name)
    if arm.name == study.best_twin:
        return ("best hard twin", "", "", "")
    if found is None:
        return (_ABSENT,) * 4
    intervals = [_points(kind) for kind in (found.paired, found.welch, found.resampled)]
    if found is study.primary_contrast:
        p = f"**primary: {_p(found.paired)}**"
    else:
        p = f"{study.corrected[arm.name]:.2g}" if arm.name in study.corrected else _ABSENT
    if found.paired is None:
        intervals[0] = f"{100 * found.mean:+.2f} (no interval{'' if found.shared_seeds else ', no seed shared'})"
    return (*intervals, p)


def _sentences(study: Study) -> list[str]:
    said = [
        "Mean ± standard deviation over seeds; 95 % intervals. Paired and Welch: other seeds on these images; the "
        "third: other images too.",
        *_about_images(study),
        *_about_twin(study),
        *_about_primary(study),
        *_about_fewer_labels(study),
        *_about_incomplete(study),
        *_about_bug_check(study),
        *_about_caches(study),
    ]
    runs = {
        name: [student_of(run.run.metrics) for run in arm.finished.values() if run.run.metrics]
        for name, arm in study.complete.items()
    }
    return said + sentences(cost_of(study.cache), runs, DISTILLED)


def _about_images(study: Study) -> list[str]:
    on = study.scored_on
    return [] if on == "val" else [f"Scored on {on} (--tune): none of these figures is val's."]


def _about_twin(study: Study) -> list[str]:
    if study.best_twin is None:
        return [f"Neither {' nor '.join(study.hard_twins)} is complete, so no difference is told."]
    others = [name for name in study.hard_twins if name != study.best_twin]
    rest = ", ".join(f"{name}{_passed_over(study, name)}" for name in others)
    best = study.arms[study.best_twin].spread("top1").mean
    higher = [name for name in others if name in study.complete and study.arms[name].spread("top1").mean > best]
    why = "Taking the best as the twin makes every gain look smaller rather than larger."
    if higher:
        why = f"With more seeds, {', '.join(higher)} may turn out better, and every gain smaller."
    return [f"{study.best_twin} is the best hard twin, by mean top-1 (besides it: {rest}). {why}"]


def _passed_over(study: Study, name: str) -> str:
    """Why a hard twin was not looked at, in brackets; empty where it was."""
    if name not in study.arms:
        return " (not in this study)"
    if name not in study.complete:
        return " (not complete)"
    twin, best = study.arms[name], study.arms[study.best_twin]
    if twin.labelled != best.labelled:
        return " (fewer labels)"
    return " (fewer seeds)" if len(twin.finished) < min(ENOUGH_SEEDS, len(best.finished)) else ""


def _about_caches(study: Study) -> list[str]:
    own = [name for name, made_of in study.document.get("variants", {}).items() if ",cache=" in made_of]
    return [f"Agreement of {', '.join(own)} is with the teacher of its own cache."] if own else []


def _about_primary(study: Study) -> list[str]:
    one = study.primary_contrast
    if one is None:
        arm, twin = study.document.get("primary") or (DISTILLED, FAIR_TWIN)
        missing = " and ".join(name for name in (arm, twin) if name not in study.complete)
        return [f"The primary contrast, {arm} less {twin}, cannot be told: without complete runs of {missing}."]
    named = "named beforehand" if study.document.get("primary") else "this program's default"
    kinds = (("paired", one.paired), ("Welch", one.welch))
    intervals = ", ".join(f"{name} {_points(kind)} p {_p(kind)}" for name, kind in kinds)
    intervals += f", images resampled too {_points(one.resampled)}"
    return [
        f"**Primary contrast** ({named}; not corrected): {one.arm} less {one.twin}, {one.shared_seeds} shared seeds, "
        f"{100 * one.mean:+.2f} points: {intervals}. The other arms' p are of the paired differences, corrected for "
        "their number by Holm."
    ]


def _about_fewer_labels(study: Study) -> list[str]:
    """Each arm on a share of the labels against the best hard twin on the same share."""
    said = []
    for arm in study.complete.values():
        twin = study.best_twin_at(arm.labelled)
        if arm.labelled == 1 or arm.name in study.hard_twins or twin is None:
            continue
        one = contrast(arm, study.arms[twin])
        shown = (
            f"{_points(one.paired)} points (paired)" if one.paired else f"{100 * one.mean:+.2f} points (no interval)"
        )
        said.append(f"On {arm.labelled:g} of the labels: {arm.name} less {twin}, {shown}.")
    return said


def _about_incomplete(study: Study) -> list[str]:
    asked = set(study.document.get("seeds") or ())
    cut = [arm.name for arm in study.arms.values() if not arm.complete]
    fewer = [name for name, arm in study.complete.items() if asked - arm.finished.keys()]
    lone = [name for name, one in study.contrasts.items() if one.shared_seeds < 2]
    equal = [name for name, one in study.contrasts.items() if one.shared_seeds > 1 and one.paired is None]
    said = {
        "Incomplete, so not tested": cut,
        f"Fewer seeds than the study names ({', '.join(map(str, sorted(asked)))})": fewer,
        f"Fewer than two seeds shared with {study.best_twin}, so no interval over seeds": lone,
        "The seeds' differences do not spread, so no paired interval can be told": equal,
    }
    return [f"{what}: {', '.join(names)}." for what, names in said.items() if names]


def _about_bug_check(study: Study) -> list[str]:
    one = study.bug_check
    if one is None:
        return [f"Bug check: {BUG_CHECK} and {FAIR_TWIN} are not both complete."] if BUG_CHECK in study.arms else []
    if one.paired is None:
        return [f"Bug check: {BUG_CHECK} less {FAIR_TWIN} is {100 * one.mean:+.2f} points; its bound cannot be told."]
    bound = one.paired.upper_bound
    verdict = "passed: below" if bound < BUG_CHECK_LIMIT else "NOT PASSED: not below"
    return [
        f"Bug check: the upper 95 % bound (one-sided, paired) of {BUG_CHECK} less {FAIR_TWIN} is {100 * bound:+.2f} "
        f"points; {verdict} {100 * BUG_CHECK_LIMIT:+g}."
    ]


def with_deviation(found: Spread | None, digits: int, scale: float = 1.0) -> str:
    """Mean and standard deviation as one writes them: "73.50 ± 0.39"."""
    if found is None:
        return _ABSENT
    values = (value for value in (found.mean, found.deviation) if value is not None)
    return " ± ".join(f"{scale * value:.{digits}f}" for value in values)


def _points(found: Difference | None) -> str:
    if found is None:
        return _ABSENT
    low, high = found.interval
    return f"{100 * found.mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _p(found: Difference | None) -> str:
    return _ABSENT if found is None else f"{found.p:.2g}"


# ---- files


def write(out: Path) -> None:
    """Write OUT/table.md, results.json, plot.png and hparams/, each in place of an earlier one."""
    from kd_dist.study.pictures import plot, write_page  # they alone need matplotlib and torch's SummaryWriter

    study, folder = read_study(out), StudyFolder(out)
    with writing(out):
        write_bytes(folder.table, _text(study).encode())
        write_bytes(folder.figures, (json.dumps(_figures(study), indent=2) + "\n").encode())
        write_bytes(folder.plot, plot(_plotted(study), study.best_twin, BUG_CHECK, study.scored_on))
        write_page(folder.page, _entries(study))


def _figures(study: Study) -> dict[str, Any]:
    """All numbers behind the table, as plain JSON values; shares in [0, 1]."""
    first, check = study.primary_contrast, study.bug_check
    return {
        "arms": {name: _arm_figures(arm) for name, arm in study.arms.items()},
        "best_twin": study.best_twin,
        "contrasts": [one.figures() for one in study.contrasts.values()],
        "primary": first.figures() if first else None,
        "p_holm": study.corrected,
        "bug_check_upper_bound": check.paired.upper_bound if check and check.paired else None,
        "cache": asdict(cost_of(study.cache)),
        "settings": study.document.get("settings"),
        "variants": study.document.get("variants", {}),
    }


def _arm_figures(arm: Arm) -> dict[str, Any]:
    spreads = {name: arm.spread(name) for name in METRICS}
    return {
        "complete": arm.complete,
        "runs": [run.figures() for run in arm.finished.values()],
        **{name: asdict(found) if found else None for name, found in spreads.items()},
    }


def _plotted(study: Study) -> dict[str, dict[str, list[float]]]:
    """Each arm's values by metric, for the arms that have any."""
    arms = [arm for arm in study.arms.values() if arm.finished]
    return {arm.name: {metric: arm.values(metric) for metric in METRICS} for arm in arms}


def _entries(study: Study) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Of every finished run: what it was asked to do and its final metrics, by a name for TensorBoard."""
    return {
        f"{arm.name}-seed-{seed}": (
            {"arm": arm.name, **run.settings, "seed": seed},
            {name: getattr(run, name) for name in METRICS if getattr(run, name) is not None},
        )
        for arm in study.arms.values()
        for seed, run in arm.finished.items()
    }


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in place of an earlier one."""
    write_atomically(path, lambda file: file.write(data))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """One sentence, which names the folder, of what the system says against writing."""
    try:
        yield
    except OSError as error:
        reason = "no space left" if disk_full(error) else error.strerror or error
        raise UserError(f"the results cannot be written to {out} ({reason}); mend that and run it again.") from error


# ---- any two runs


def compare(a: Path, b: Path) -> str:
    """Statistics on two finished runs, from their saved val logits. Raises UserError on other val images."""
    files = [RunFolder(Path(path)).val_logits for path in (a, b)]
    vals = [read_val_logits(file) for file in files]
    _require_same_images(files[0], vals[0], files[1], vals[1])
    hits = [_hits(val) for val in vals]
    difference, low, high = over_images(*hits)
    split = mcnemar(*hits)
    same = float(np.mean(vals[0].logits_NK.argmax(axis=1) == vals[1].logits_NK.argmax(axis=1)))
    shown = [
        f"{name}: {path}, top-1 {100 * hit.mean():.2f} %, calibration error {_calibration_error(val):.3f}"
        for name, path, hit, val in zip("AB", (a, b), hits, vals, strict=True)
    ]
    return "\n".join(
        [
            *shown,
            f"A less B on {len(hits[0]):,} images of {vals[0].of}: {100 * difference:+.2f} points of top-1, 95 % "
            f"interval [{100 * low:+.2f}, {100 * high:+.2f}] (images resampled, paired)",
            f"only A is right on {split.only_a}, only B on {split.only_b}: p = {split.p:.2g} (McNemar, exact)",
            f"both put {100 * same:.1f} % of the images in the same class",
            "One run of each: this tells two networks apart, not two methods. Another seed moves both; compare arms "
            "over several seeds by python -m kd_dist.study.",
        ]
    )
