"""Plots of a study: its arms, and top-1 over a setting. Knows values and names, no files."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_dist.study.statistics import spread

PANELS = {
    "top1": ("top-1 on {}, %", 100),
    "agreement": ("agreement with the teacher, %", 100),
    "calibration_error": ("calibration error", 1),
}
LOG_AXIS_FROM = 4.0  # times the least value
DASHES = ("-", "--", ":")
LEGEND = {"-": "solid", "--": "dashed", ":": "dotted"}
Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Values over seeds, by arm and metric."""


def plot(arms: Values, best_baseline: str | None, scored_on: str) -> bytes:
    """A PNG: a row an arm, a panel a metric; a point with its 95 % interval over seeds, and a dot for each seed."""
    figure = Figure(figsize=(13, 1.6 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (metric, (title, scale)) in zip(axes, PANELS.items(), strict=True):
        for row, values in enumerate(arms.values()):
            _draw(axis, row, scale * np.array(values[metric]))
        axis.set_xlabel(title.format(scored_on))
        axis.grid(axis="x", alpha=0.3)
        if best_baseline is not None and arms[best_baseline][metric]:
            axis.axvline(scale * np.mean(arms[best_baseline][metric]), color="tab:red", linestyle="--", linewidth=1)
    axes[0].set_yticks(range(len(arms)), list(arms))
    axes[0].invert_yaxis()
    dashed = f"; dashed: {best_baseline}, the best baseline" if best_baseline else ""
    figure.suptitle(f"mean over seeds with its 95 % interval (two seeds or more), dots: seeds{dashed}", fontsize=11)
    return _png(figure)


def _draw(axis: Any, row: int, values_S: np.ndarray) -> None:
    if not len(values_S):
        return
    found = spread(values_S)
    axis.plot(values_S, np.full(len(values_S), row + 0.22), ".", color="tab:gray", markersize=6)
    axis.plot(found.mean, row, "o", color="tab:blue")
    if found.interval:
        axis.plot(found.interval, (row, row), color="tab:blue")


def plot_lines(lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]], axis_title: str, top1_title: str) -> bytes:
    """A PNG: top-1 in % over a setting's values, a line through the means over seeds and a dot for each seed.

    A line is its points by rising value: (value, top-1 of each seed).
    """
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


def plot_summary(arms: Values, teacher_top1: float) -> bytes:
    """A PNG: top-1 of a few arms with 95 % intervals over seeds, and the teacher's top-1 as a line."""
    figure = Figure(figsize=(7, 0.9 + 0.45 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for row, values in enumerate(arms.values()):
        _draw(axis, row, 100 * np.array(values["top1"]))
    axis.axvline(100 * teacher_top1, color="tab:green", linestyle="--", label="teacher")
    axis.set_yticks(range(len(arms)), list(arms))
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_xlabel("top-1 on val, %: mean with its 95 % interval over seeds; small dots: seeds")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower left")
    return _png(figure)


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], charts: Mapping[str, Sequence[str]]) -> bytes:
    """A PNG with a panel a chart: the values of each run's rows that a chart names, over epochs. A run has one colour;
    the values of a chart differ in their dashes. Of a score "top1" a row has "val_top1" or "tune_top1".
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, -(-len(charts) // 2)).flat
    for axis, (title, names) in zip(panels, charts.items(), strict=False):
        for number, rows in enumerate(runs.values()):
            for dashes, name in zip(DASHES, names, strict=False):
                axis.plot(*_line(rows, name), dashes, color=f"C{number % 10}", marker=".", markersize=3)
        words = ", ".join(f"{LEGEND[dashes]}: {name}" for dashes, name in zip(DASHES, names, strict=False))
        axis.set_title(f"{title}\n{words}" if len(names) > 1 else title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("epochs")
    handles = [Line2D([], [], color=f"C{number % 10}", label=name) for number, name in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return _png(figure)


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    names = (name, f"val_{name}", f"tune_{name}")
    points = [(row["epoch"], row[known]) for row in rows for known in names if row.get(known) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
