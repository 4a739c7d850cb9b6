"""How submitted jobs stand: python -m launch.status runs/ [--follow] [--cancel]

The table has one row for each job, newest last: its id, state, node, epoch, top-1 and last log line. Below it, for
each job that failed, the error of the rank that failed first.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_dist.checkpoint import RunFolder, head_of, read_metrics, read_state
from kd_dist.errors import EXIT_PEER_LOST, UserError, exit_code_of

from . import queue
from .folders import JOBS, Job, JobFolder, job_folders, read_json, tail_of
from .queue import State

COLUMNS = ("job", "id", "state", "node", "epoch", "top-1", "last log line")
LINE_WIDTH = 60
ERROR_LINES = 12
_BLOCKING = ("failed", "interrupted", "cancelled", "dropped", "gone", "not submitted")
_BROKEN = ("BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Standing:
    """One job and all that is known of it now."""

    folder: JobFolder
    job: Job
    state: str
    nodes: str = ""
    note: str = ""

    @property
    def lives(self) -> bool:
        return self.state in ("waiting", "running", "stopping")

    def row(self) -> tuple[str, ...]:
        """The job's cells, one for each of COLUMNS."""
        last = f"waits: {self.note}" if self.state == "waiting" and self.note else _last_line(self.folder)
        epoch, top1 = _progress(RunFolder(Path(self.job.run)))
        name = self.folder.path.relative_to(_jobs_of(self.folder)).as_posix()
        label = f"{name} {self.job.name}" if not name.endswith(self.job.name) else name
        return (label, self.job.id or "-", self.state, self.nodes or "-", epoch, top1, last)


def _jobs_of(folder: JobFolder) -> Path:
    return next(parent for parent in folder.path.parents if parent.name == JOBS)


def _progress(run: RunFolder) -> tuple[str, str]:
    try:
        state, metrics = read_state(run) or {}, read_metrics(run)
    except UserError:  # a file in the middle of a failing disk must not hide the other jobs
        return "?", "?"
    epoch = f"{state['epoch']:.1f}/{state['epochs']}" if "epochs" in state else f"{len(metrics)}" if metrics else "-"
    return epoch, _top1(metrics[-1]) if metrics else "-"


def _top1(row: dict[str, Any]) -> str:
    head = head_of(row)
    return f"{100 * row[f'{head}_top1']:.1f} %{' (tune)' if head == 'tune' else ''}"


def _last_line(folder: JobFolder) -> str:
    try:
        lines = [line for line in tail_of(folder.main_log).splitlines() if line.strip()]
    except OSError:
        return "-"
    return lines[-1].strip()[:LINE_WIDTH] if lines else "-"


# ---- from what is known to a word


def standings(runs: Path) -> list[Standing]:
    """All jobs under a tree of runs, oldest first. Raises UserError where there are none."""
    jobs = [(folder, Job.read(folder)) for folder in job_folders(runs)]
    if not jobs:
        raise UserError(
            f"no jobs were submitted under {runs}; name the folder that holds {JOBS}/, such as runs, or submit one "
            "first."
        )
    known = queue.states(jobs)
    found: list[Standing] = []
    for folder, job in jobs:
        found.append(_standing(folder, job, known.get(job.id or ""), found))
    return found


def _standing(folder: JobFolder, job: Job, state: State | None, earlier: list[Standing]) -> Standing:
    if state and state.lives and state.reason != "DependencyNeverSatisfied":
        word, note = _living(state)
        return Standing(folder, job, word, state.nodes, note)
    ended = read_json(folder.ended)
    nodes = state.nodes if state else ""
    blocking = [other for other in earlier if _is_named(other, job.after) and other.state in _BLOCKING]
    failed_before = blocking[0] if blocking else None
    if failed_before and folder.last_attempt() is None:
        return Standing(
            folder,
            job,
            "dropped",
            nodes,
            f"{failed_before.job.name} (job {failed_before.job.id}) {failed_before.state}",
        )
    if ended and ended["status"] == "interrupted" and state and state.name in _BROKEN:
        note = f"stopped by SIGTERM ({state.name}): preempted without a warning, or another task died; submit again"
        return Standing(folder, job, "failed", nodes, note)
    if ended:
        return Standing(folder, job, ended["status"], nodes, ended["message"])
    return Standing(folder, job, *_vanished(folder, job, state))


def _is_named(other: Standing, names: Sequence[str]) -> bool:
    return other.folder.path.name in names


def _living(state: State) -> tuple[str, str]:
    if state.name == "PENDING":
        return "waiting", state.reason
    return ("running", "") if state.name == "RUNNING" else ("stopping", state.name)


def _vanished(folder: JobFolder, job: Job, state: State | None) -> tuple[str, str, str]:
    """(state, nodes, note) of a job that is over and could not say why itself: Slurm's word for it, or ours."""
    attempt = folder.last_attempt()
    nodes = state.nodes if state else ""
    if state is None:
        return (
            ("not submitted", nodes, "")
            if job.id is None
            else ("gone", nodes, "neither the queue nor the job says how it ended; submit again to go on")
        )
    if state.name.startswith("CANCELLED"):
        return (
            "cancelled",
            nodes,
            "before it began" if attempt is None else "everything up to its last checkpoint is kept",
        )
    if state.name == "COMPLETED":
        return "finished", nodes, ""
    return (
        "failed",
        nodes,
        f"the queue says {state.name}; submit again to go on"
        if state.name != "ENDED"
        else "its processes are gone; submit again to go on",
    )


# ---- why it failed


def first_failure(folder: JobFolder) -> dict[str, Any] | None:
    """What the rank that failed first noted in the newest attempt; those that only lost a peer come last."""
    attempt = folder.last_attempt()
    notes = [read_json(path) for path in folder.failures(attempt)] if attempt is not None else []
    return min((note for note in notes if note), key=lambda note: (_lost_its_peer(note), note["time"]), default=None)


def _lost_its_peer(note: dict[str, Any]) -> bool:
    """Whether a rank ended because another had: by its own words, or by the signal that ends the rest."""
    said = note["message"] or note["tail"]
    return note["code"] in (EXIT_PEER_LOST, -signal.SIGTERM, 128 + signal.SIGTERM) or not said.strip()


def error_of(standing: Standing) -> str | None:
    """The paragraph that says why a job ended, None where it did not fail."""
    if standing.state != "failed":
        head = f"{standing.job.name} (job {standing.job.id}): {standing.state}"
        return f"{head}: {standing.note}" if standing.note and not standing.lives else None
    title, note = f"{standing.job.name} (job {standing.job.id})", first_failure(standing.folder)
    if note is None:
        return f"{title}: failed: {standing.note or f'see {standing.folder.main_log}'}"
    how = f"killed by {signal.Signals(-note['code']).name}" if note["code"] < 0 else f"exit code {note['code']}"
    said = note["message"] or "\n".join(note["tail"].splitlines()[-ERROR_LINES:])
    indented = "\n".join("    " + line for line in said.splitlines())
    return f"{title}: rank {note['rank']} on {note['host']} failed, {how}; log {note['log']}\n{indented}"


def text_of(found: Sequence[Standing]) -> str:
    """The table, and below it what is to be said of each job that did not end well."""
    rows = [COLUMNS, *(standing.row() for standing in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n\n".join(["\n".join(lines), *(error for standing in found if (error := error_of(standing)))])


# ---- the command


def cancel(found: Sequence[Standing]) -> list[str]:
    """Ask the living jobs to save and end, those that wait first; gives a line for each."""
    said = []
    for standing in sorted((one for one in found if one.lives), key=lambda one: one.state != "waiting"):
        if standing.job.cluster == "slurm":
            done = subprocess.run(["scancel", standing.job.id], capture_output=True, text=True)
            said.append(f"{standing.job.name} (job {standing.job.id}): " + (done.stderr.strip() or "cancelled"))
        else:
            os.kill(int(standing.job.id), signal.SIGTERM)
            said.append(f"{standing.job.name} (process {standing.job.id}): asked to save and end")
    return said or ["no job is waiting or running"]


def follow(runs: Path, seconds: float) -> None:
    """Print the table whenever it changed, until every job has ended."""
    shown = None
    while True:
        found = standings(runs)
        text = text_of(found)
        if text != shown:
            print(
                f"\033[H\033[J{text}" if sys.stdout.isatty() else f"{time.strftime('%H:%M:%S')}\n{text}\n", flush=True
            )
            shown = text
        if not any(standing.lives for standing in found):
            return
        time.sleep(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        "launch.status",
        description=__doc__.replace("-m launch.", f"-m {__package__}."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="the folder that holds jobs/ [runs]")
    parser.add_argument("--follow", action="store_true", help="keep the table up to date until all jobs have ended")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="S", help="seconds between two looks with --follow [5]"
    )
    parser.add_argument("--cancel", action="store_true", help="cancel what waits or runs; each saves before it ends")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a log line may hold what the terminal cannot show
    with contextlib.suppress(KeyboardInterrupt):
        return exit_code_of("launch.status", lambda: _show(options))
    return 0


def _show(options: argparse.Namespace) -> None:
    if options.cancel:
        print("\n".join(cancel(standings(options.runs))))
    if options.follow:
        follow(options.runs, options.every)
    elif not options.cancel:
        print(text_of(standings(options.runs)))


if __name__ == "__main__":
    sys.exit(main())
