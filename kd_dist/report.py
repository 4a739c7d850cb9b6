"""Runs side by side: `python -m kd_dist.report RUN [RUN ...]` prints a table of teachers and students, finished or not.

Top-1 and images/s come from each run's metrics. Agreement is the share of val images on which a student's class is the
cached teacher's, from the logits that the student saved and view 0 of the cache: comparing needs no network and no GPU.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.cache import Cache, open_cache
from kd_dist.checkpoint import RunFolder, read_metrics, read_settings, read_state, read_val_logits
from kd_dist.config import DistillConfig
from kd_dist.errors import UserError, exit_code_of

COLUMNS = ("run", "kind", "alpha", "temperature", "epochs", "top-1", "agreement", "images/s", "status")
_ABSENT = "-"


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it, and the name to show it under. Raises UserError where it is no run's folder."""

    folder: RunFolder
    name: str

    @cached_property
    def kind(self) -> str:
        return read_settings(self.folder)[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_settings(self.folder)[1]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    @property
    def cache(self) -> Path | None:
        """The cache this run wrote or was told to read."""
        named = self.settings.get("cache")
        return Path(named) if named else self.folder.cache if self.kind == "teacher" else None

    @property
    def head(self) -> str:
        """What the names of its scores begin with: "tune" where it is scored on a part of train, else "val"."""
        return "tune" if self.settings.get("tune") else "val"

    def row(self, agreement: float | None) -> tuple[str, ...]:
        """The run's cells, one for each of COLUMNS."""
        last = self.metrics[-1] if self.metrics else {}  # a row an epoch
        rates = [row["images_per_s"] for row in self.metrics if row.get("images_per_s")]
        return (
            self.name,
            self.kind,
            _text(self.settings.get("alpha")),
            _text(self.settings.get("temperature")),
            f"{len(self.metrics)}/{_text(self.settings.get('epochs'))}",
            _percent(last.get(f"{self.head}_top1")),
            _percent(last.get(f"{self.head}_agreement") if agreement is None else agreement),
            f"{statistics.median(rates):.0f}" if rates else _ABSENT,
            _status(read_state(self.folder)),
        )


class Caches:
    """Opens the cache each run is compared with, each file once. `named` (--cache) replaces what the runs recorded."""

    def __init__(self, runs: Sequence[Run], named: Path | None) -> None:
        self.named = named
        # A student on hard labels alone has no cache of its own: it is compared with the one of the runs beside it.
        self.beside = [run.cache for run in runs if run.cache is not None]
        self._opened: dict[Path, Cache] = {}

    def of(self, run: Run) -> Cache | None:
        """None where there is none to be found; UserError where there is one that cannot be used."""
        if self.named is not None:
            return self._open(self.named)
        found = (path for path in [run.cache, *self.beside] if path is not None and path.exists())
        path = next(found, None)
        return self._open(path) if path is not None else None

    def _open(self, path: Path) -> Cache:
        if path not in self._opened:
            self._opened[path] = open_cache(path)
        return self._opened[path]


def agreement_of(run: Run, cache: Cache) -> float:
    """Share of val images, in [0, 1], that the student and the teacher put in one class; UserError on other data."""
    val = read_val_logits(run.folder.val_logits)
    teacher_NK = cache.split("val").logits_NVK[:, 0]
    if val.fingerprint != cache.fingerprint("val"):
        raise UserError(
            f"{run.folder.val_logits} is of other val images ({val.fingerprint[:12]}) than {cache.path} "
            f"({cache.fingerprint('val')[:12]}); name the cache of the same data with --cache."
        )
    return float(np.mean(val.logits_NK.argmax(axis=1) == teacher_NK.argmax(axis=1)))


def table_of(runs: Sequence[Run], caches: Caches) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows, headed by COLUMNS, and a note on each run of which something could not be told."""
    rows, notes = [COLUMNS], []
    for run in runs:
        agreement = None
        if run.head == "tune":
            part = f"fold {run.settings['fold']} of {run.settings['folds']} of train"
            notes.append(f"{run.name}: top-1 and agreement are those on {part} (--tune), not on val")
        elif run.kind == "student" and run.folder.val_logits.exists():
            try:
                cache = caches.of(run)
                agreement = agreement_of(run, cache) if cache else None
            except UserError as error:
                if caches.named is not None:
                    raise
                notes.append(f"{run.name}: {error}")
        rows.append(run.row(agreement))
        message = (read_state(run.folder) or {}).get("message")
        if message:
            notes.append(f"{run.name}: {message}")
    return rows, notes


def seed_means(runs: Sequence[Run], rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One more row for each group of finished students that differ in nothing but the seed: mean and standard
    deviation.
    """
    groups: dict[str, list[tuple[Run, tuple[str, ...]]]] = {}
    for run, row in zip(runs, rows, strict=True):
        if run.kind == "student" and row[-1] == "finished":
            settings = DistillConfig.completed(run.settings)  # runs of older versions lack some
            same = {name: value for name, value in settings.items() if name not in {"seed", *DistillConfig.may_change}}
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((run, row))
    return [_mean_row(group) for group in groups.values() if len({run.settings.get("seed") for run, _ in group}) > 1]


def _mean_row(group: Sequence[tuple[Run, tuple[str, ...]]]) -> tuple[str, ...]:
    cells = dict(zip(COLUMNS, zip(*(row for _, row in group), strict=True), strict=True))
    same = {name: cells[name][0] for name in ("kind", "alpha", "temperature", "epochs")}
    spread = {name: _mean_and_deviation(cells[name]) for name in ("top-1", "agreement")}
    return tuple(
        {"run": f"{len(group)} seeds: {cells['run'][0]} ...", **same, **spread}.get(name, "") for name in COLUMNS
    )


def _mean_and_deviation(cells: Sequence[str]) -> str:
    if _ABSENT in cells:
        return _ABSENT
    values = [float(cell.removesuffix(" %")) for cell in cells]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"


def plain(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.report`; returns the exit code."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may hold what the terminal cannot show
    return exit_code_of("kd_dist.report", lambda: print(report(options.runs, options.cache, options.markdown)))


def report(folders: Sequence[Path], cache: Path | None = None, as_markdown: bool = False) -> str:
    """The table of the runs in these folders, what is to be said of them, and the command that shows their curves."""
    parent = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    runs = [Run(RunFolder(folder), str(folder.resolve().relative_to(parent))) for folder in folders]
    rows, notes = table_of(runs, Caches(runs, cache))
    rows += seed_means(runs, rows[1:])
    curves = f"{_tensorboard()} --logdir {shlex.quote(_shown(parent))}"
    return "\n\n".join(
        [markdown(rows) if as_markdown else plain(rows), *notes, f"`{curves}`" if as_markdown else f"curves: {curves}"]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kd_dist.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/student")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="compare all students with this file of soft labels")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def _text(value: object) -> str:
    return _ABSENT if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f} %"


def _status(state: dict[str, Any] | None) -> str:
    if state is None:
        return "not started"
    if state["status"] != "running":
        return state["status"]
    silent = datetime.now(UTC) - datetime.fromisoformat(state["time"])
    return f"running, last heard of {silent.total_seconds() / 60:.0f} min ago"


def _tensorboard() -> str:
    """The command as one would type it: by its path where an environment that is not activated holds it."""
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else _shown(beside)


def _shown(folder: Path) -> str:
    """The folder as one would type it here."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


if __name__ == "__main__":
    sys.exit(main())
