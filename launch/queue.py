"""How jobs stand, as Slurm or this machine's process table tells it."""

import getpass
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from .folders import Job, JobFolder
from .task import controller_lives

_OVER = {
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ),
    *("ENDED", "GONE"),
}


@dataclass(frozen=True)
class State:
    """A job in the queue: Slurm's word for its state, its nodes, and why it waits."""

    name: str
    nodes: str = ""
    reason: str = ""

    @property
    def lives(self) -> bool:
        return self.name not in _OVER


def states(jobs: Sequence[tuple[JobFolder, Job]]) -> dict[str, State]:
    """The states of jobs by their ids; a job that nobody knows any more is left out."""
    slurm = [job.id for _, job in jobs if job.cluster == "slurm" and job.id]
    found = _slurm(slurm) if slurm else {}
    for folder, job in jobs:
        if job.cluster == "local" and job.id:
            found[job.id] = _local(folder, job)
    return found


def _local(folder: JobFolder, job: Job) -> State:
    if job.host == socket.gethostname() and controller_lives(job.id, folder):
        return State("PENDING" if folder.attempts_seen(0) == 0 or not folder.attempts.exists() else "RUNNING", job.host)
    return State("ENDED", job.host or "")


def _slurm(ids: Sequence[str]) -> dict[str, State]:
    """From squeue, which knows jobs until some minutes after their end; of older ones from sacct, where there is
    accounting.
    """
    if shutil.which("squeue") is None:
        return {}
    lines = _lines(
        "squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%N|%r"
    )
    found = {
        id: State(name, nodes, reason)
        for id, name, nodes, reason in (line.split("|", 3) for line in lines)
        if id in ids
    }
    older = [id for id in ids if id not in found]
    if older and shutil.which("sacct"):
        lines = _lines(
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State,NodeList",
            f"--jobs={','.join(older)}",
        )
        found |= {
            id: State(name.split()[0], nodes)
            for id, name, nodes in (line.split("|", 2) for line in lines)
            if id in older
        }
    return found


def _lines(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []
