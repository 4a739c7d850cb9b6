"""Print a table of runs (teachers and students, finished or not), for example: python -m kd_dist.report runs/*

Top-1 and images/s come from each run's metrics. Agreement is the fraction of val images on which a student's class is
the cached teacher's, from the logits that the student saved and view 0 of the cache: comparing needs no network
and no GPU.
"""

import argparse
import io
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist import tables
from kd_dist.cache import Cache, open_cache
from kd_dist.errors import UserError, exit_code_of, require_installed
from kd_dist.files import write_bytes
from kd_dist.run.curves import CHARTS
from kd_dist.run.folder import RunFolder
from kd_dist.run.reading import Run
from kd_dist.run.results import read_val_logits
from kd_dist.study.folder import StudyFolder

COLUMNS = ("run", "kind", "alpha", "temperature", "epochs", "top-1", "agreement", "images/s", "status")
_ABSENT = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.report`; returns the exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may hold what the terminal cannot show
    return exit_code_of("kd_dist.report", lambda: _answer(options))


def _answer(options: argparse.Namespace) -> None:
    if options.plot:
        plot(options.runs, options.plot)
    tables.show(report(options.runs, options.cache, options.markdown, tables.terminal_width()))


def plot(entries: Sequence[Path], target: Path) -> None:
    """Draw the curves of these entries' runs as a PNG with the charts of TensorBoard's first screen. Raises UserError
    as `report`, and where the file cannot be written.
    """
    require_installed("study", "matplotlib")
    from kd_dist.study.plots import plot_runs

    runs, _ = find_runs(entries)
    write_bytes(target, plot_runs({run.name: run.metrics for run in runs}, CHARTS))


def report(
    entries: Sequence[Path], cache: Path | None = None, as_markdown: bool = False, width: int | None = None
) -> str:
    """The table of the runs in these entries, notes on them, and the command that shows their curves.

    An entry is a run's folder or a study's; others are passed over. `cache` replaces the caches that the runs name.
    Raises UserError where no entry holds a run.
    """
    runs, notes = find_runs(entries)
    rows, remarks = _rows(runs, cache)
    table = tables.markdown(rows) if as_markdown else tables.plain(rows, width)
    curves = f"{_tensorboard()} --logdir {shlex.quote(_shown(_parent(entries)))}"
    return "\n\n".join([table, *notes, *remarks, f"`{curves}`" if as_markdown else f"curves: {curves}"])


def _parent(entries: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([entry.resolve().parent for entry in entries]))


def find_runs(entries: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that these entries are, or hold as studies, named by their folders below what all have in common, and a
    note on the entries that are passed over.
    """
    runs, passed, parent = [], {}, _parent(entries)
    for entry in entries:
        inside = [run for seeds in StudyFolder(entry).runs().values() for run in seeds.values()]
        for folder in inside or [RunFolder(entry)]:
            run = Run(folder, str(folder.path.resolve().relative_to(parent)))
            try:
                _ = run.settings, run.metrics, run.state
                runs.append(run)
            except UserError as error:
                passed[folder] = error
    if not runs and len(passed) == 1:
        raise next(iter(passed.values()))
    shown = ", ".join(f"{folder.path} ({'damaged' if folder.settings.exists() else 'not a run'})" for folder in passed)
    if not runs:
        raise UserError(f"no runs in {shown}; pass a run's or a study's folder.")
    return runs, [f"passed over: {shown}"] * bool(passed)


def _rows(runs: Sequence[Run], named: Path | None) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows, headed by COLUMNS, and remarks on runs of which something is missing."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    remarks: list[str] = []
    opened = lru_cache(open_cache)
    # A student on hard labels only names no cache: it is compared with the first one that another run names.
    beside = [run.cache for run in runs if run.cache is not None]
    for run in runs:
        agreement = None
        if run.prefix == "tune":
            part = f"fold {run.settings['fold']} (of 0 to {run.settings['folds'] - 1}) of train"
            remarks.append(f"{run.name}: top-1 and agreement are on {part} (--tune), not on val")
        elif run.kind == "student" and run.folder.val_logits.exists():
            caches = [named] if named else [path for path in (run.cache, *beside) if path and path.exists()]
            try:
                agreement = agreement_of(run, opened(caches[0])) if caches else None
            except UserError as error:
                if named is not None:
                    raise
                remarks.append(f"{run.name}: {error}")
        rows.append(_row(run, agreement))
        if run.state.get("message"):
            remarks.append(f"{run.name}: {run.state['message']}")
    return rows, remarks


def agreement_of(run: Run, cache: Cache) -> float:
    """Share of val images, in [0, 1], that the student and the teacher put in one class; UserError on other data."""
    val = read_val_logits(run.folder.val_logits)
    teacher_NK = cache.split("val").logits_NVK[:, 0]
    if val.fingerprint != cache.fingerprint("val"):
        raise UserError(
            f"{run.folder.val_logits} has other val images ({val.fingerprint[:12]}) than {cache.path} "
            f"({cache.fingerprint('val')[:12]}); pass the cache of the same data with --cache."
        )
    return float(np.mean(val.logits_NK.argmax(axis=1) == teacher_NK.argmax(axis=1)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kd_dist.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a study; other entries are passed over"
    )
    parser.add_argument("--cache", type=Path, metavar="FILE", help="compare all students with this file of soft labels")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw TensorBoard's first screen as one picture")
    return parser


def _row(run: Run, agreement: float | None) -> tuple[str, ...]:
    """The run's cells, one for each of COLUMNS."""
    rates = [line["images_per_s"] for line in run.metrics if line.get("images_per_s")]
    return (
        run.name,
        run.kind,
        _text(run.settings.get("alpha")),
        _text(run.settings.get("temperature")),
        f"{len(run.metrics)}/{_text(run.settings.get('epochs'))}",
        _percent(run.scores.get(f"{run.prefix}_top1")),
        _percent(run.scores.get(f"{run.prefix}_agreement") if agreement is None else agreement),
        f"{statistics.median(rates):.0f}" if rates else _ABSENT,
        _status(run.state),
    )


def _text(value: object) -> str:
    return _ABSENT if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f} %"


def _status(state: Mapping[str, Any]) -> str:
    if state.get("status") != "running":
        return state.get("status", "not started")
    silent = datetime.now(UTC) - datetime.fromisoformat(state["time"])
    return f"running, last sign of life {silent.total_seconds() / 60:.0f} min ago"


def _tensorboard() -> str:
    """The command as one would type it: by its path where an environment that is not activated holds it."""
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else _shown(beside)


def _shown(folder: Path) -> str:
    """The folder as one would type it here."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


if __name__ == "__main__":
    sys.exit(main())
