"""The study to look at: the plot of its arms, and TensorBoard's HParams page.

matplotlib and torch's SummaryWriter are imported where they are used: the table needs neither.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.files import publish
from kd_dist.study.statistics import spread

PANELS = {
    "top1": ("top-1 on {}, %", 100),
    "agreement": ("agreement with the teacher, %", 100),
    "calibration_error": ("calibration error", 1),
}
LOG_AXIS_FROM = 4.0  # times the least value
Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Values over seeds, by arm and metric."""


def plot(arms: Values, best_twin: str | None, far: str, scored_on: str) -> bytes:
    """A PNG: a row an arm, a panel a metric; a point with its 95 % interval over seeds, and a dot for each seed.

    The arm `far` is told in a number at the edge where the others' scale does not reach it: it would crush them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (metric, (title, scale)) in zip(axes, PANELS.items(), strict=True):
        for row, (name, values) in enumerate(arms.items()):
            if name != far:
                _draw(axis, row, scale * np.array(values[metric]))
        if far in arms:
            _draw_far(axis, list(arms).index(far), scale * np.array(arms[far][metric]))
        axis.set_xlabel(title.format(scored_on))
        axis.grid(axis="x", alpha=0.3)
        if best_twin is not None and arms[best_twin][metric]:
            axis.axvline(scale * np.mean(arms[best_twin][metric]), color="tab:red", linestyle="--", linewidth=1)
    axes[0].set_yticks(range(len(arms)), list(arms))
    axes[0].invert_yaxis()
    twin = f"; dashed: {best_twin}, the best hard twin" if best_twin else ""
    figure.suptitle(f"mean over seeds with its 95 % interval (two seeds or more), dots: seeds{twin}", fontsize=11)
    return _png(figure)


def _draw(axis: Any, row: int, values_S: np.ndarray) -> None:
    if not len(values_S):
        return
    found = spread(values_S)
    axis.plot(values_S, np.full(len(values_S), row + 0.22), ".", color="tab:gray", markersize=6)
    axis.plot(found.mean, row, "o", color="tab:blue")
    if found.interval:
        axis.plot(found.interval, (row, row), color="tab:blue")


def _draw_far(axis: Any, row: int, values_S: np.ndarray) -> None:
    low, high = axis.get_xlim()
    mean = np.mean(values_S) if len(values_S) else low
    if low <= mean <= high or not axis.lines:
        _draw(axis, row, values_S)
        return
    place, arrow = (0.01, "\N{LEFTWARDS ARROW} {}") if mean < low else (0.99, "{} \N{RIGHTWARDS ARROW}")
    side = "left" if mean < low else "right"
    axis.text(place, row, arrow.format(f"{mean:.3g}"), transform=axis.get_yaxis_transform(), ha=side, va="center")


def plot_lines(lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]], axis_title: str, top1_title: str) -> bytes:
    """A PNG: top-1 in % over a setting's values, a line through the means over seeds and a dot for each seed.

    A line is its points by rising value: (value, top-1 of each seed).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    values = sorted({value for points in lines.values() for value, _ in points})
    if values[0] > 0 and values[-1] / values[0] >= LOG_AXIS_FROM:
        axis.set_xscale("log")
    for name, points in lines.items():
        means = [100 * np.mean(top1_S) for _, top1_S in points]
        (drawn,) = axis.plot([value for value, _ in points], means, "o-", label=name)
        for value, top1_S in points:
            axis.plot(np.full(len(top1_S), value), 100 * np.array(top1_S), ".", color=drawn.get_color(), alpha=0.4)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.set_xlabel(axis_title)
    axis.set_ylabel(top1_title)
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def write_page(folder: Path, entries: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]]) -> None:
    """TensorBoard's HParams page in place of an earlier one: an entry by name, with its settings and final metrics."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    settings = _shared_settings([settings for settings, _ in entries.values()])
    metrics = sorted({name for _, found in entries.values() for name in found})
    for (name, (_, found)), shown in zip(entries.items(), settings, strict=True):
        _write_entry(temporary / name, shown, found, metrics)
    shutil.rmtree(folder, ignore_errors=True)
    publish(temporary, folder)


def _write_entry(folder: Path, settings: Mapping[str, Any], found: Mapping[str, float], metrics: Sequence[str]) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(folder)) as writer:
        # What SummaryWriter.add_hparams does, but in this folder: it would open one of its own name and time.
        for summary in hparams(dict(settings), dict.fromkeys(metrics, 0.0)):
            writer.file_writer.add_summary(summary)
        for name, value in found.items():
            writer.add_scalar(name, value)


def _shared_settings(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each entry's settings that the page can show: plain values of one type in every entry. One that is None in some
    entries alone is shown as text.
    """
    plain, absent = {bool, int, float, str}, type(None)
    shown: list[dict[str, Any]] = [{} for _ in entries]
    for name in entries[0] if entries else ():
        types = {type(entry.get(name)) for entry in entries}
        if len(types - {absent}) == 1 and types <= {*plain, absent}:
            for entry, own in zip(entries, shown, strict=True):
                own[name] = str(entry.get(name)) if absent in types else entry[name]
    return shown
