"""The table as text, as JSON and as a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from kd_dist import tables
from kd_dist.files import write_atomically

COLUMNS = ("what", "value", "quartiles", "rounds", "goal", "")
VERDICTS = {True: "met", False: "missed", None: ""}


def table(rows: Sequence[Row]) -> str:
    """Rows under each other in columns, notes below the row they belong to."""
    head, *lines = tables.plain([COLUMNS, *(_cells(row) for row in rows)]).splitlines()
    text = [head, "-" * max(map(len, [head, *lines]))]
    for row, line in zip(rows, lines, strict=True):
        text += [line] + ([f"    {row.note}"] if row.note else [])
    goals = [row for row in rows if row.goal]
    measured = [row for row in goals if row.met is not None]
    met = sum(row.met for row in measured)
    return "\n".join(
        [*text, "", f"{met} of {len(measured)} measured goals met, {len(goals) - len(measured)} not measured"]
    )


def _cells(row: Row) -> tuple[str, ...]:
    if row.value is None:
        return (row.name, "-", "", "", str(row.goal or ""), "not measured")
    spread = f"{_number(row.spread[0])} .. {_number(row.spread[1])}" if row.spread else ""
    value = f"{_number(row.value)} {row.unit}"
    return (row.name, value, spread, str(row.rounds), str(row.goal or ""), VERDICTS[row.met])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """What bench.json holds: `about` the machine and the run, and every row with name, value, spread and goal."""
    entries = [{**asdict(row), "goal": str(row.goal) if row.goal else None, "met": row.met} for row in rows]
    return {"about": about, "rows": entries}


def write(folder: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """bench.json, bench.txt and bench.png in a folder, each whole or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(rows, about), indent=1)
    write_atomically(folder / "bench.json", lambda file: file.write(text.encode()))
    write_atomically(folder / "bench.txt", lambda file: file.write(f"{table(rows)}\n".encode()))
    write_atomically(folder / "bench.png", lambda file: plot(rows, file))


def plot(rows: Sequence[Row], file: Any) -> None:
    """Every measured row with a goal as a bar of how far it got: right of the line the goal is met."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.met is not None]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.34 * max(1, len(shown))), layout="constrained")
    for place, row in enumerate(reversed(shown)):
        share, low, high = (share_of_goal(row, value) for value in (row.value, *(row.spread or (row.value, row.value))))
        low, high = sorted((low, high))
        axes.barh(place, share, color="tab:green" if row.met else "tab:red", alpha=0.8)
        axes.plot([low, high], [place, place], color="black", linewidth=2)
    axes.set_yticks(range(len(shown)), [f"{row.name} ({row.goal})" for row in reversed(shown)], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("share of the goal reached (median; black: quartiles over rounds)")
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def share_of_goal(row: Row, value: float) -> float:
    """1 at the goal, more beyond it, whichever direction is better."""
    share = value / row.goal.bound if row.goal.at_least else row.goal.bound / value
    return share if math.isfinite(share) else 0.0
