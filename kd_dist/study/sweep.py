"""One setting along an axis: top-1 over the views of a cache, the share of labels, the teacher behind the cache.

A line joins arms of one study whose runs differ in that setting alone, such as cached-V, few=cached-V,views=2 and
some=cached-V,views=4. Several studies, of other epochs say, give a line each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.cache import Cache, open_cache
from kd_dist.checkpoint import ValLogits
from kd_dist.errors import UserError
from kd_dist.job import top1
from kd_dist.report import markdown
from kd_dist.study.choice import MAY_VARY
from kd_dist.study.folder import StudyFolder
from kd_dist.study.results import Arm, Study, read_study, require_same_val, with_deviation, write_bytes, writing
from kd_dist.study.statistics import spread

AXES = {
    "views": "views of an image in the cache, the evaluation view counted",
    "label_fraction": "share of the labels that is used",
    "cache": "top-1 of the cache's own rows on {}, %",
}
"""What the axis of a setting says, where its name would not do."""
_NO_AXIS = ("loss",)


@dataclass(frozen=True)
class Point:
    """An arm on the axis: its value, and the top-1 in [0, 1] of its finished runs."""

    value: float
    arm: str
    top1_S: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """Arms by rising value. Two caches may stand at one value; they stay two points."""

    name: str
    points: tuple[Point, ...]


def sweep(setting: str, outs: Sequence[Path]) -> str:
    """The table of a sweep as Markdown; its plot is written into the first study's folder.

    Raises UserError for a setting without an axis, and where no study has two arms along it.
    """
    from kd_dist.study.pictures import plot_lines  # it alone needs matplotlib

    setting = setting.replace("-", "_")
    if setting not in MAY_VARY or setting in _NO_AXIS:
        axes = ", ".join(name for name in MAY_VARY if name not in _NO_AXIS).replace("_", "-")
        raise UserError(f"{setting} cannot be swept over; name one of {axes}.")
    studies = [read_study(out) for out in outs]
    require_same_val([run for study in studies for arm in study.arms.values() for run in arm.finished.values()])
    lines = [line for study in studies for line in _lines(study, setting, _name_of(study, studies))]
    if not lines:
        raise UserError(
            f"no two arms of {', '.join(map(str, outs))} differ in {setting} alone and have finished runs; make "
            f"variants, as in --arms cached-V other=cached-V,{setting.replace('_', '-')}=VALUE."
        )
    scored_on = studies[0].scored_on
    axis = AXES.get(setting, setting.replace("_", " ")).format(scored_on)
    path = StudyFolder(outs[0]).sweep(setting)
    drawn = {line.name: [(point.value, point.top1_S) for point in line.points] for line in lines}
    with writing(outs[0]):
        write_bytes(path, plot_lines(drawn, axis, f"top-1 on {scored_on}, %"))
    return f"{_table(axis, scored_on, lines)}\n\nPlot: {path}"


def _name_of(study: Study, studies: Sequence[Study]) -> str:
    """What tells a study from the others, to stand behind an arm's name: nothing if it is alone, its epochs if these
    do, else its folder.
    """
    epochs = [(one.document.get("settings") or {}).get("epochs") for one in studies]
    names = [one.out.name for one in studies]
    if len(studies) == 1:
        return ""
    if len({*epochs}) == len(studies) and None not in epochs:
        return f", {study.document['settings']['epochs']} epochs"
    return f", {study.out.name if len({*names}) == len(studies) else study.out}"


def _lines(study: Study, setting: str, of_study: str) -> Iterator[Line]:
    alike: dict[str, list[Arm]] = {}
    for arm in study.arms.values():
        if arm.finished:
            alike.setdefault(_but_for(setting, arm), []).append(arm)
    values = _values(setting)
    for arms in alike.values():
        if len(arms) > 1:
            points = [Point(values(arm), arm.name, tuple(arm.values("top1"))) for arm in arms]
            yield Line(f"{arms[0].name}{of_study}", tuple(sorted(points, key=lambda point: point.value)))


def _but_for(setting: str, arm: Arm) -> str:
    """What arms have in common that differ in a setting alone: their kin, and the other settings of their runs."""
    settings = next(iter(arm.finished.values())).settings
    return json.dumps([arm.kin, *(settings[name] for name in MAY_VARY if name != setting)])


def _values(setting: str):
    """A function that tells where an arm stands on the axis; each cache is opened once."""

    @cache
    def opened(path: str) -> Cache:
        return open_cache(Path(path))

    def value(arm: Arm) -> float:
        run = next(iter(arm.finished.values()))
        own: Any = run.settings[setting]
        if setting == "cache":
            return round(100 * _top1_of(opened(own), run.val), 2)
        if setting == "views" and own is None:
            return opened(run.settings["cache"]).views
        return own

    return value


def _top1_of(labels: Cache, val: ValLogits) -> float:
    """Top-1 of a cache's own rows on the images that a run was scored on: val, or under --tune a part of train."""
    table = labels.split("val" if val.of == "val" else "train")
    row_of = {path: row for row, path in enumerate(table.paths)}
    rows_M = np.array([row_of[path] for path in val.paths])
    return top1(table.logits_NVK[rows_M, 0], val.labels_N)


def _table(axis: str, scored_on: str, lines: Sequence[Line]) -> str:
    head = ("line", axis, "arm", "seeds", f"top-1 on {scored_on}, %")
    return markdown([head, *(_row(line, point) for line in lines for point in line.points)])


def _row(line: Line, point: Point) -> tuple[str, ...]:
    shown = with_deviation(spread(np.array(point.top1_S)), digits=2, scale=100)
    return (line.name, f"{point.value:g}", point.arm, f"{len(point.top1_S)}", shown)
