"""One setting along an axis: top-1 over the views of a cache, the share of labels, the teacher behind the cache.

A line joins arms of one study that differ in that setting alone, such as cached-V, few=cached-V,views=2 and
some=cached-V,views=4. Several studies, of other epochs say, give a line each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_dist.cache import open_cache
from kd_dist.config import DistillSettings
from kd_dist.errors import UserError
from kd_dist.report import markdown
from kd_dist.study.choice import MAY_VARY
from kd_dist.study.folder import StudyFolder
from kd_dist.study.results import Arm, SeedRun, Study, publish, read_study, require_same_val, with_deviation, writing
from kd_dist.study.statistics import spread

AXES = {
    "views": "views of an image in the cache, the evaluation view counted",
    "labelled": "share of the labels that is used",
    "cache": "top-1 of the cache's own rows on val, %",
}
"""What the axis of a setting says, where its name would not do."""
_NO_AXIS = ("loss",)


@dataclass(frozen=True)
class Line:
    """Top-1 in [0, 1] of finished runs by the setting's value, both rising."""

    name: str
    top1: dict[float, list[float]]


def sweep(setting: str, outs: Sequence[Path]) -> str:
    """The table of a sweep as Markdown; its plot is written into the first study's folder.

    Raises UserError for a setting without an axis, and where no study has two values of it.
    """
    from kd_dist.study.pictures import plot_lines  # it alone needs matplotlib

    setting = setting.replace("-", "_")
    if setting not in MAY_VARY or setting in _NO_AXIS:
        axes = ", ".join(name for name in MAY_VARY if name not in _NO_AXIS).replace("_", "-")
        raise UserError(f"{setting} cannot be swept over; name one of {axes}.")
    studies = [read_study(out) for out in outs]
    runs = [run for study in studies for arm in study.arms.values() for run in arm.finished.values()]
    require_same_val(runs)
    lines = [line for study in studies for line in _lines(study, setting, _name_of(study, studies))]
    if not lines:
        raise UserError(
            f"no arm of {', '.join(map(str, outs))} has finished runs of two values of {setting}; make variants, as in "
            f"--arms cached-V other=cached-V,{setting.replace('_', '-')}=VALUE."
        )
    axis = AXES.get(setting, setting.replace("_", " "))
    path = StudyFolder(outs[0]).sweep(setting)
    with writing(outs[0]):
        publish(path, plot_lines({line.name: line.top1 for line in lines}, axis, f"top-1 on {runs[0].val.of}, %"))
    return f"{_table(axis, lines)}\n\nPlot: {path}"


def _name_of(study: Study, studies: Sequence[Study]) -> str:
    """What tells a study from the others, to stand behind an arm's name: nothing if it is alone, its epochs if these
    do, else its folder.
    """
    if len(studies) == 1:
        return ""
    epochs = [(one.document.get("settings") or {}).get("epochs") for one in studies]
    if len(set(epochs)) == len(studies) and None not in epochs:
        return f", {study.document['settings']['epochs']} epochs"
    return f", {study.out.name}"


def _lines(study: Study, setting: str, of_study: str) -> Iterator[Line]:
    alike: dict[tuple, list[Arm]] = {}
    for arm in study.arms.values():
        rest = tuple((name, value) for name, value in arm.own.items() if name != setting)
        alike.setdefault((arm.kin, rest), []).append(arm)
    for (kin, rest), arms in alike.items():
        top1: dict[float, list[float]] = {}
        for arm in arms:
            for run in arm.finished.values():
                top1.setdefault(_value(run, setting), []).append(run.top1)
        if len(top1) > 1:
            name = ", ".join([kin, *(f"{name} {value}" for name, value in rest)])
            yield Line(f"{name}{of_study}", dict(sorted(top1.items())))


def _value(run: SeedRun, setting: str) -> float:
    """Where a run stands on the axis; a cache stands where its teacher's top-1 is, in %."""
    settings = DistillSettings.completed(run.run.settings)
    value = settings[setting]
    if setting == "cache":
        return round(100 * open_cache(Path(value), memory=0).val_top1, 2)
    if setting == "views" and value is None:
        return open_cache(Path(settings["cache"]), memory=0).views
    return value


def _table(axis: str, lines: Sequence[Line]) -> str:
    values = sorted({value for line in lines for value in line.top1})
    rows = [(axis, *(f"{line.name}: top-1, % (seeds)" for line in lines))]
    return markdown([*rows, *((f"{value:g}", *(_cell(line, value) for line in lines)) for value in values)])


def _cell(line: Line, value: float) -> str:
    top1_S = line.top1.get(value)
    return "-" if top1_S is None else f"{with_deviation(spread(np.array(top1_S)), digits=2, scale=100)} ({len(top1_S)})"
