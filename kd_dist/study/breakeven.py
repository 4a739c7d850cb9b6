"""After how many students a cache has paid for itself, in wall seconds as the jobs themselves noted them.

Against a teacher in the loop the teacher is there either way: writing the cache is the cost, and each student trained
from it instead saves time. Against hard labels the teacher's training counts too, and what it buys is top-1; it saves
time only where the student reaches the twin's final top-1 earlier. What no run noted is said to be unknown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_dist.checkpoint import CACHE_SECONDS, RunFolder, head_of, read_costs, read_metrics


@dataclass(frozen=True)
class CacheCost:
    """What a cache cost: wall seconds of training its teacher and of writing it, and its bytes; None where unknown."""

    training_s: float | None
    writing_s: float | None
    bytes: int | None


@dataclass(frozen=True)
class Student:
    """One finished run, epoch by epoch: wall seconds (None where not noted) and top-1 on val in [0, 1]."""

    seconds: tuple[float | None, ...]
    top1: tuple[float, ...]

    @property
    def total_s(self) -> float | None:
        """Seconds of the whole run."""
        return self.seconds_until(len(self.seconds) - 1)

    def seconds_until(self, epoch: int) -> float | None:
        """Seconds up to the end of an epoch, counted from 0, each as long as the run's median epoch: a pause of the
        machine is no cost of the method.
        """
        known = [seconds for seconds in self.seconds if seconds is not None]
        return (epoch + 1) * statistics.median(known) if known else None

    def first_epoch_at(self, top1: float) -> int | None:
        """The first epoch, counted from 0, that ends at this top-1 or more."""
        return next((epoch for epoch, reached in enumerate(self.top1) if reached >= top1), None)


def cost_of(cache: Path | None) -> CacheCost:
    """What the teacher job beside a cache noted. Another cache than that job's own has costs that nobody noted."""
    if cache is None:
        return CacheCost(None, None, None)
    size = cache.stat().st_size if cache.exists() else None
    folder = RunFolder(cache.parent)
    if cache.name != folder.cache.name or not folder.costs.exists():
        return CacheCost(None, None, size)
    training_s = student_of(read_metrics(folder)).total_s
    return CacheCost(training_s, read_costs(folder).get(CACHE_SECONDS), size)


def student_of(rows: Sequence[Mapping]) -> Student:
    """A run's epochs from the rows of its metrics."""
    top1 = (row[f"{head_of(row)}_top1"] for row in rows)
    return Student(tuple(row.get("epoch_s") for row in rows), tuple(top1))


def sentences(cost: CacheCost, runs: Mapping[str, Sequence[Student]], distilled: str) -> list[str]:
    """What the cache cost and after how many students it pays; `runs` holds each arm's finished runs."""
    said = [
        f"The cache cost {duration(cost.writing_s)} of writing and {_size(cost.bytes)}; training its teacher took "
        f"{duration(cost.training_s)}. Wall time, each job on the ranks that it ran on; an epoch of a run counts as "
        "its median one."
    ]
    cached = runs.get(distilled, ())
    if not cached:
        return [*said, f"No run of {distilled} is finished, so there is no break-even to tell."]
    if runs.get("online"):
        said.append(_against_online(cost, cached, runs["online"], distilled))
    if runs.get("hard-fresh"):
        said += [
            _price_of_top1(cost, cached, runs["hard-fresh"]),
            _against_hard(cost, cached, runs["hard-fresh"], distilled),
        ]
    return said


def students_to_pay(cost_s: float | None, saving_s: float | None) -> int | None:
    """After how many students savings reach the cost; None where either is unknown or nothing is saved."""
    if cost_s is None or saving_s is None or saving_s <= 0:
        return None
    return max(1, math.ceil(cost_s / saving_s))


def _against_online(cost: CacheCost, cached: Sequence[Student], online: Sequence[Student], name: str) -> str:
    with_teacher_s, from_cache_s = _mean_s(online), _mean_s(cached)
    head = (
        f"Against online (the teacher's training counts for neither): a student takes {duration(with_teacher_s)} with "
        f"the teacher in the loop and {duration(from_cache_s)} as {name}"
    )
    return f"{head}; {_pays(cost.writing_s, _less(with_teacher_s, from_cache_s))}"


def _price_of_top1(cost: CacheCost, cached: Sequence[Student], hard: Sequence[Student]) -> str:
    gain = _final(cached) - _final(hard)
    more_s = _less(_mean_s(cached), _mean_s(hard))
    each = "an unknown time" if more_s is None else f"{duration(abs(more_s))} {'more' if more_s >= 0 else 'less'}"
    return (
        f"Against hard-fresh (the teacher's training counts): {100 * gain:+.2f} points of top-1 cost "
        f"{duration(_sum(cost.training_s, cost.writing_s))} once, and {each} a student."
    )


def _against_hard(cost: CacheCost, cached: Sequence[Student], hard: Sequence[Student], name: str) -> str:
    goal = _final(hard)
    epochs = [run.first_epoch_at(goal) for run in cached]
    shown = f"hard-fresh's final {100 * goal:.2f} %"
    if None in epochs:
        missed = sum(epoch is None for epoch in epochs)
        return f"{missed} of {len(cached)} runs of {name} never reach {shown}: in time it does not pay."
    counts = [epoch + 1 for epoch in epochs]
    whole = max(len(run.top1) for run in hard)
    head = (
        f"{name} reaches {shown} after {_range(counts)} epochs, hard-fresh takes {whole} (seen afterwards, no "
        "run was stopped there)"
    )
    until = [run.seconds_until(epoch) for run, epoch in zip(cached, epochs, strict=True)]
    until_s = None if None in until else sum(until) / len(until)
    return f"{head}; {_pays(_sum(cost.training_s, cost.writing_s), _less(_mean_s(hard), until_s))}"


def _pays(cost_s: float | None, saving_s: float | None) -> str:
    if saving_s is None:
        return "how much time that saves is unknown."
    if saving_s <= 0:
        return "that saves no time, so it never pays."
    saves = f"that saves {duration(saving_s)} a student"
    if cost_s is None:
        return f"{saves}; what the cache cost is unknown, and so is when it pays."
    count = students_to_pay(cost_s, saving_s)
    return f"{saves}, so the cost of {duration(cost_s)} is paid after {count} student{'s' * (count > 1)}."


def _final(runs: Sequence[Student]) -> float:
    return sum(run.top1[-1] for run in runs) / len(runs)


def _mean_s(runs: Sequence[Student]) -> float | None:
    totals = [run.total_s for run in runs]
    return None if None in totals else sum(totals) / len(totals)


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def duration(seconds: float | None) -> str:
    """Seconds as one says them: 4.2 s, 12 min, 3 h 05 min."""
    if seconds is None:
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: int | None) -> str:
    return "an unknown number of bytes" if count is None else f"{count:,} bytes"
