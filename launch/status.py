"""Show the state of submitted jobs: python -m launch.status runs/ [--follow] [--cancel]

The table has one row for each job, newest last: its id, state, node, epoch, top-1, agreement with the teacher,
images/s, share of time waiting for data, and last log line; TensorBoard shows the same numbers. Below it, for each job
that failed, the error of the rank that failed first. With --follow the exit code is 0 if all jobs finished.
"""

import argparse
import contextlib
import getpass
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_dist import tables
from kd_dist.errors import UserError, exit_code_of
from kd_dist.run.events import Code, Reason
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.run.state import read_state
from kd_dist.tables import show

from .supervisor import JOBS, Job, JobFolder, Status, controller_lives, events_of, job_folders, read_json, tail_of

COLUMNS = ("job", "id", "state", "node", "epoch", "top-1", "agreement", "images/s", "data wait", "last log line")
ERROR_LINES = 12
_LIVING = ("waiting", "running", "stopping")
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT", "ENDED", "GONE"),
}
_SCORED = (("val", ""), ("tune", " (tune)"))
_BROKEN = ("BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")


# ---- the queue


@dataclass(frozen=True)
class State:
    """A job in the queue: Slurm's word for its state, its nodes, and why it waits."""

    name: str
    nodes: str = ""
    reason: str = ""

    @property
    def lives(self) -> bool:
        return self.name not in _OVER


def states(jobs: Sequence[Job]) -> dict[str, State]:
    """The states of jobs by their ids, as Slurm or this machine's process table has them; unknown jobs are left out."""
    found = _slurm({job.id for job in jobs if job.cluster == "slurm" and job.id})
    for job in jobs:
        if job.cluster == "local" and job.id:
            folder = JobFolder(Path(job.folder))
            lives = job.host == socket.gethostname() and controller_lives(job.id, folder)
            word = "RUNNING" if folder.attempts.exists() else "PENDING"
            found[job.id] = State(word if lives else "ENDED", job.host)
    return found


def _slurm(ids: set[str]) -> dict[str, State]:
    """From squeue, which knows jobs until some minutes after their end; of older ones from sacct, where there is
    accounting.
    """
    if not ids:
        return {}
    user, columns = f"--user={getpass.getuser()}", "--format=%i|%T|%N|%r"
    found = _rows(ids, "squeue", "--noheader", "--array", "--states=all", user, columns)
    if older := ids - found.keys():
        jobs, columns = f"--jobs={','.join(sorted(older))}", "--format=JobID,State,NodeList"
        found |= _rows(older, "sacct", "--noheader", "--parsable2", "--allocations", columns, jobs)
    return found


def _rows(ids: set[str], *command: str) -> dict[str, State]:
    if shutil.which(command[0]) is None:
        return {}
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return {row[0]: State(row[1].split()[0], *row[2:4]) for row in rows if row[0] in ids}


# ---- from what is known to a word


@dataclass(frozen=True)
class Standing:
    """One job and all that is known of it now. `newer` is the job that has its run folder since."""

    job: Job
    state: str
    nodes: str = ""
    note: str = ""
    newer: Job | None = None

    @property
    def folder(self) -> JobFolder:
        return JobFolder(Path(self.job.folder))

    @property
    def title(self) -> str:
        return f"{self.job.kind} (job {self.job.id})"

    @property
    def lives(self) -> bool:
        return self.state in _LIVING

    def row(self) -> tuple[str, ...]:
        """The job's cells, one for each of COLUMNS."""
        last = f"waits: {self.note}" if self.state == "waiting" and self.note else _last_line(self.folder)
        name = self.folder.name if self.folder.name.endswith(self.job.kind) else f"{self.folder.name} {self.job.kind}"
        return (name, self.job.id or "-", self.state, self.nodes or "-", *self.progress(), last)

    def progress(self) -> tuple[str, ...]:
        """How far this very job came: epochs done, top-1 after the last of them, and what TensorBoard shows of it too:
        agreement with the teacher, images/s, the share of time waiting for data.
        """
        run = RunFolder(Path(self.job.run))
        try:
            done = [e for e in events_of(run.path, self.folder.name) if e["code"] == Code.EPOCH_FINISHED]
            state = read_state(run) if self.state == "running" and not self.newer else None
            rows = {row["epoch"]: row for row in read_metrics(run)}
        except (UserError, OSError):  # a file in the middle of a failing disk must not hide the other jobs
            return ("?",) * 5
        last = done[-1] if done else {}
        at = f"{state['epoch']:.1f}/{state['epochs']}" if state and "epochs" in state else None
        row = rows.get(last.get("epoch"), {})
        return (
            at or (f"{last['epoch']}/{last['epochs']}" if last else "-"),
            _newest_share(done, "top1"),
            _newest_share(done, "agreement"),
            f"{row['images_per_s']:.0f}" if "images_per_s" in row else "-",
            f"{100 * row['data_wait_share']:.0f} %" if "data_wait_share" in row else "-",
        )


def _newest_share(epochs: Sequence[dict[str, Any]], name: str) -> str:
    """The newest score of this name, in percent; marked where it is of a part of train."""
    names = [(f"{part}_{name}", note) for part, note in _SCORED]
    found = [f"{100 * e[name]:.1f} %{note}" for e in reversed(epochs) for name, note in names if name in e]
    return found[0] if found else "-"


def _last_line(folder: JobFolder) -> str:
    try:
        lines = [line for line in tail_of(folder.main_log).splitlines() if line.strip()]
    except OSError:
        return "-"
    return lines[-1].strip() if lines else "-"


def standings(runs: Path) -> list[Standing]:
    """All jobs under a tree of runs, oldest first. Raises UserError where there are none."""
    jobs = sorted(map(Job.read, job_folders(runs)), key=lambda job: (job.submitted, job.folder))
    if not jobs:
        raise UserError(
            f"no jobs were submitted under {runs}; pass the folder that holds {JOBS}/, such as runs, or submit one "
            "first."
        )
    known = states(jobs)
    found: list[Standing] = []
    for number, job in enumerate(jobs):
        newer = [other for other in jobs[number + 1 :] if _takes_over(other, job)]
        found.append(Standing(job, *_standing(job, known.get(job.id or ""), found), newer[-1] if newer else None))
    return found


def _takes_over(other: Job, job: Job) -> bool:
    """Whether a later job has taken over a job's run folder. The workers of one array share it."""
    began = JobFolder(Path(other.folder)).attempts.exists()
    return other.run == job.run and began and _array_of(other) != _array_of(job)


def _array_of(job: Job) -> str:
    return JobFolder(Path(job.folder)).name.partition("/")[0]


def _standing(job: Job, state: State | None, earlier: list[Standing]) -> tuple[str, str, str]:
    """(state, nodes, note) of a job."""
    nodes, folder = state.nodes if state else "", JobFolder(Path(job.folder))
    if state and state.lives and state.reason != "DependencyNeverSatisfied":
        word = {"PENDING": "waiting", "RUNNING": "running"}.get(state.name, "stopping")
        return word, nodes, state.reason if word == "waiting" else "" if word == "running" else state.name
    ended, began = read_json(folder.ended), folder.last_attempt() is not None
    blocking = [
        other for other in earlier if other.job.folder in job.after and other.state not in ("finished", *_LIVING)
    ]
    if blocking and not began:
        return "dropped", nodes, f"{blocking[0].title} {blocking[0].state}"
    if ended and ended["status"] == Status.INTERRUPTED and state and state.name in _BROKEN:
        note = f"stopped by SIGTERM ({state.name}): preempted without a warning, or another task died; submit again"
        return "failed", nodes, note
    if ended:
        return ended["status"], nodes, ended["message"]
    return _vanished(job, state, began, nodes)


def _vanished(job: Job, state: State | None, began: bool, nodes: str) -> tuple[str, str, str]:
    """The same for a job that is over and could not note its own end: Slurm's word for it, or ours."""
    if state is None and job.id is None:
        return "not submitted", nodes, ""
    if state is None:
        return "gone", nodes, "neither the queue nor the job noted how it ended; submit again to resume"
    if state.name == "CANCELLED":
        return "cancelled", nodes, "everything up to its last checkpoint is kept" if began else "before it began"
    if state.name == "COMPLETED":
        return "finished", nodes, ""
    why = "its processes are gone" if state.name == "ENDED" else f"the queue reports {state.name}"
    return "failed", nodes, f"{why}; submit again to resume"


# ---- why it failed


def first_failure(folder: JobFolder) -> dict[str, Any] | None:
    """The note of the rank that failed first in the newest attempt; those that only lost a peer come last."""
    attempt = folder.last_attempt()
    notes = [read_json(path) for path in folder.failures(attempt)] if attempt is not None else []
    later = (Reason.PEER_LOST, Reason.STOPPED)
    return min(filter(None, notes), key=lambda note: (note["reason"] in later, note["time"]), default=None)


def error_of(standing: Standing) -> str | None:
    """The paragraph on why a job ended, None where it finished or lives. Only the newest job of a run folder gets
    advice.
    """
    if standing.lives or standing.state == "finished":
        return None
    if standing.newer:
        return f"{standing.title}: {standing.state}; job {standing.newer.id} has gone on with {standing.job.run} since"
    note = first_failure(standing.folder) if standing.state == "failed" else None
    if note is None:
        where = f"see {standing.folder.main_log}" if standing.state == "failed" else ""
        return ": ".join(filter(None, [standing.title, standing.state, standing.note or where]))
    how = f"killed by {signal.Signals(-note['code']).name}" if note["code"] < 0 else f"exit code {note['code']}"
    text = note["message"] or "\n".join(note["tail"].splitlines()[-ERROR_LINES:])
    indented = "\n".join("    " + line for line in text.splitlines())
    return f"{standing.title}: rank {note['rank']} on {note['host']} failed, {how}; log {note['log']}\n{indented}"


def text_of(found: Sequence[Standing], width: int | None = None) -> str:
    """The table, its lines cut to `width` (None: whole), and below it what there is to say of each job that did not
    finish.
    """
    lines = tables.plain([COLUMNS, *(standing.row() for standing in found)]).splitlines()
    table = "\n".join(line[:width] for line in lines)
    return "\n\n".join([table, *(error for standing in found if (error := error_of(standing)))])


# ---- the command


def cancel(found: Sequence[Standing]) -> list[str]:
    """Ask the living jobs to save and end, those that wait first; gives a line for each."""
    lines = []
    for standing in sorted((one for one in found if one.lives), key=lambda one: one.state != "waiting"):
        assert standing.job.id is not None  # it lives: its state is known by its id
        answer = "asked to save and end"
        if standing.job.cluster == "slurm":
            done = subprocess.run(["scancel", standing.job.id], capture_output=True, text=True)
            answer = done.stderr.strip() or "cancelled"
        else:
            os.kill(int(standing.job.id), signal.SIGTERM)
        lines.append(f"{standing.title}: {answer}")
    return lines or ["no job is pending or running"]


def follow(runs: Path, seconds: float) -> int:
    """Print the table whenever it changed, until all jobs have ended; 0 if the newest job of each run finished."""
    shown = None
    while True:
        found = standings(runs)
        text = text_of(found, tables.terminal_width())
        if text != shown:
            head = "\033[H\033[J" if sys.stdout.isatty() else f"{time.strftime('%H:%M:%S')}\n"
            print(f"{head}{text}\n", flush=True)
            shown = text
        if not any(standing.lives for standing in found):
            return int(any(standing.state != "finished" for standing in found if not standing.newer))
        time.sleep(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    page = __doc__.replace("-m launch.", f"-m {__package__}.")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m {__package__}.status", description=page, formatter_class=layout)
    add = parser.add_argument
    add("runs", nargs="?", type=Path, default=Path("runs"), help="the folder that holds jobs/ [runs]")
    add("--follow", action="store_true", help="keep the table up to date until all jobs have ended")
    add("--every", type=float, default=5.0, metavar="S", help="seconds between two updates with --follow [5]")
    add(
        "--cancel",
        action="store_true",
        help="cancel all pending and running jobs; each saves a checkpoint before it ends",
    )
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a log line may hold what the terminal cannot show
    codes: list[int] = []
    with contextlib.suppress(KeyboardInterrupt):
        return exit_code_of("launch.status", lambda: codes.append(_show(options))) or codes[0]
    return 0


def _show(options: argparse.Namespace) -> int:
    if options.cancel:
        print("\n".join(cancel(standings(options.runs))))
    if options.follow:
        return follow(options.runs, options.every)
    if not options.cancel:
        show(text_of(standings(options.runs), tables.terminal_width()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
