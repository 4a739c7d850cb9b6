"""How often a job may start again: a journal of its attempts, and the two limits that end it.

A job that runs into its time limit more often than it may, or that starts twice without a new checkpoint, is not
helped by another start.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kd_dist.checkpoint import RunFolder
from kd_dist.errors import UserError, exit_code_of

from .folders import now

TIME_OUT, PREEMPTED = "time-out", "preempted"
SCRIPT_WARNING_SECONDS = 240.0  # the scripts ask for two minutes' warning, and Slurm may be a minute early


@dataclass(frozen=True)
class Attempt:
    """One start of a job: how far the run was when it began, and why it was stopped (None: it was not, or nobody could
    say).
    """

    progress: tuple[int, int]
    log: str
    stopped: str | None = None


class Journal:
    """The attempts of one job, oldest first, in a file of one line an event; rank 0 alone writes it."""

    def __init__(self, path: Path):
        self.path = path

    def attempts(self) -> list[Attempt]:
        attempts: list[Attempt] = []
        for event in self._events():
            if event["event"] == "began":
                attempts.append(Attempt(tuple(event["progress"]), event["log"]))
            elif attempts:
                attempts[-1] = Attempt(attempts[-1].progress, attempts[-1].log, event["why"])
        return attempts

    def _events(self) -> list[dict]:
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.strip("\0")]

    def begin(self, progress: tuple[int, int], log: str) -> None:
        """Note an attempt that begins. Raises UserError where two restarts brought nothing, naming both
        attempts' logs.
        """
        before = self.attempts()[-2:]
        if len(before) == 2 and all(attempt.progress == progress for attempt in before):
            raise UserError(
                f"started again twice without a new checkpoint (step {progress[0]}), so not once more; see "
                f"{before[0].log} and "
                f"{before[1].log}, and submit again when the cause is gone, or with more --time."
            )
        self._append({"event": "began", "progress": list(progress), "log": log, "time": now()})

    def stopped(self, why: str, most_timeouts: int) -> None:
        """Note why the attempt was stopped. Raises UserError where that was one time-out too many."""
        self._append({"event": "stopped", "why": why, "time": now()})
        timeouts = sum(attempt.stopped == TIME_OUT for attempt in self.attempts())
        if why == TIME_OUT and timeouts > most_timeouts:
            raise UserError(
                f"the time limit came {timeouts} times and --max-timeouts is {most_timeouts}, so the job was not "
                "requeued; everything is "
                "saved: submit again to go on, with more --time perhaps."
            )

    def _append(self, event: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def progress_of(run: Path, cache: Path | None) -> tuple[int, int]:
    """How far a run is: the step of its newest checkpoint, and how many blocks of its cache are written (done: -1)."""
    steps = RunFolder(run).saved_steps()
    blocks = 0
    if cache is not None:
        # kd_dist.cache spells this name too, but importing that takes torch, which a supervisor does without.
        blocks = -1 if cache.exists() else len(list(cache.with_name(cache.name + ".shards").glob("*")))
    return (steps[-1] if steps else 0), blocks


def main(arguments: list[str]) -> None:
    """For slurm/job.sh: begin JOURNAL RUN LOG; requeue JOURNAL RUN MOST_TIMEOUTS."""
    action, journal, run, last = arguments
    cache = RunFolder(Path(run)).cache
    if action == "begin":
        Path(journal).parent.mkdir(parents=True, exist_ok=True)
        Journal(Path(journal)).begin(progress_of(Path(run), cache), last)
        return
    job_id = os.environ["SLURM_JOB_ID"]
    seconds_left = _seconds(_output("squeue", "--noheader", f"--jobs={job_id}", "--format=%L"))
    Journal(Path(journal)).stopped(TIME_OUT if seconds_left < SCRIPT_WARNING_SECONDS else PREEMPTED, int(last))
    _output("scontrol", "requeue", job_id)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed ({done.stderr.strip()}); all is saved: submit again to go on.")
    return done.stdout.strip()


def _seconds(left: str) -> float:
    """What squeue calls the time left, as [D-][[HH:]MM:]SS or a word where there is no limit."""
    days, _, clock = left.rpartition("-")
    if not clock.replace(":", "").isdigit():
        return math.inf
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return seconds + 86_400 * int(days or 0)


if __name__ == "__main__":
    sys.exit(exit_code_of("launch.restarts", lambda: main(sys.argv[1:])))
