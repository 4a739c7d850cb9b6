"""Top-1 over one setting: the views of a cache, the fraction of labels, alpha, the temperature.

A line joins arms of one study whose runs differ in that setting alone, such as distilled, few=distilled,views=2 and
some=distilled,views=4, or the cells of a grid. Several studies, of other epochs say, give one line each.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_dist import tables
from kd_dist.cache import open_cache
from kd_dist.errors import UserError
from kd_dist.fetch import local_file
from kd_dist.files import write_bytes
from kd_dist.study.choice import MAY_VARY
from kd_dist.study.folder import StudyFolder
from kd_dist.study.plots import plot_lines
from kd_dist.study.results import ArmRuns, Study, read_study, require_same_val
from kd_dist.study.statistics import spread

AXES = {
    "views": "views of an image in the cache, the evaluation view counted",
    "label_fraction": "fraction of the labels that is used",
}
"""The title of a setting's axis, where its name would not do."""
_NO_AXIS = ("loss", "cache")


@dataclass(frozen=True)
class Point:
    """An arm on the axis: its value, and the top-1 in [0, 1] of its finished runs."""

    value: float
    arm: str
    top1_S: tuple[float, ...]


Lines = Mapping[str, Sequence[Point]]
"""Arms by rising value, by the line's name."""


def over(setting: str, outs: Sequence[Path], as_markdown: bool = False, width: int | None = None) -> str:
    """The table of top-1 over a setting; its plot is written into the first study's folder.

    Raises UserError for a setting without an axis, and where no study has two arms along it.
    """
    setting = setting.replace("-", "_")
    if setting not in MAY_VARY or setting in _NO_AXIS:
        axes = ", ".join(name for name in MAY_VARY if name not in _NO_AXIS).replace("_", "-")
        raise UserError(f"--over {setting} has no axis; choose one of {axes}.")
    studies = [read_study(out) for out in outs]
    require_same_val([run for study in studies for arm in study.arms.values() for run in arm.finished.values()])
    lines = {name + _suffix(study, studies): line for study in studies for name, line in _lines(study, setting)}
    if not lines:
        raise UserError(
            f"no two arms of {', '.join(map(str, outs))} differ in {setting} alone and have finished runs; train them "
            f"by --grid {setting.replace('_', '-')}=VALUE,VALUE."
        )
    path, axis = StudyFolder(outs[0]).plot_over(setting), _axis(setting)
    write_bytes(path, _png(lines, axis, studies[0]))
    rows = _rows(lines, axis, studies[0])
    return f"{tables.markdown(rows) if as_markdown else tables.plain(rows, width)}\n\nplot: {path}"


def over_grid(study: Study) -> tuple[list[list[tuple[str, ...]]], dict[str, bytes]]:
    """The tables over the settings of a study's grid, and their plots by setting."""
    rows, plots = [], {}
    for setting in study.document.get("grid", ()):
        name = setting.replace("-", "_")
        lines = {} if name in _NO_AXIS else dict(_lines(study, name))
        if lines:
            rows.append(_rows(lines, _axis(name), study))
            plots[name] = _png(lines, _axis(name), study)
    return rows, plots


def _suffix(study: Study, studies: Sequence[Study]) -> str:
    """What tells a study's lines from another's: nothing for one study, the epochs where they differ, else the
    folder.
    """
    epochs = [(one.document.get("settings") or {}).get("epochs") for one in studies]
    names = [one.out.name for one in studies]
    if len(studies) == 1:
        return ""
    if len({*epochs}) == len(studies) and None not in epochs:
        return f", {study.document['settings']['epochs']} epochs"
    return f", {study.out.name if len({*names}) == len(studies) else study.out}"


def _lines(study: Study, setting: str) -> Iterator[tuple[str, list[Point]]]:
    alike: dict[str, list[ArmRuns]] = {}
    for arm in study.arms.values():
        if arm.finished:
            alike.setdefault(_all_but(setting, arm), []).append(arm)
    for arms in alike.values():
        if len(arms) > 1:
            points = [Point(_value(setting, arm), arm.name, tuple(arm.values("top1"))) for arm in arms]
            yield arms[0].name, sorted(points, key=lambda point: point.value)


def _all_but(setting: str, arm: ArmRuns) -> str:
    """What arms have in common that differ in one setting alone: their base, and the other settings of their runs."""
    settings = next(iter(arm.finished.values())).settings
    return json.dumps([arm.base, *(settings[name] for name in MAY_VARY if name != setting)])


def _value(setting: str, arm: ArmRuns) -> float:
    """An arm's value on the axis. --views that nobody typed are all those of the cache."""
    settings = next(iter(arm.finished.values())).settings
    if setting == "views" and settings["views"] is None:
        return open_cache(local_file(settings["cache"])).views
    return settings[setting]


def _axis(setting: str) -> str:
    return AXES.get(setting, setting.replace("_", " "))


def _rows(lines: Lines, axis: str, study: Study) -> list[tuple[str, ...]]:
    head = ("line", axis, "arm", "seeds", f"top-1 on {study.scored_on}, %")
    points = [(name, point) for name, line in lines.items() for point in line]
    return [head, *((name, f"{one.value:g}", one.arm, f"{len(one.top1_S)}", _score(one)) for name, one in points)]


def _score(point: Point) -> str:
    return spread(np.array(point.top1_S)).text(digits=2, scale=100)


def _png(lines: Lines, axis: str, study: Study) -> bytes:
    drawn = {name: [(point.value, point.top1_S) for point in line] for name, line in lines.items()}
    return plot_lines(drawn, axis, f"top-1 on {study.scored_on}, %")
