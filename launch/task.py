"""What every task of a job runs: a supervisor that starts one rank of kd_dist and stays beside it.

The supervisor hands torch's variables to the rank, passes signals on, gives its output a log file, notes why it
failed, and, on rank 0, has the job requeued after the scheduler's warning. The rank itself is the same `python -m
kd_dist.teacher` that one types by hand, and neither knows of the other. The supervisor holds no torch and no
collective, so it can answer a signal at any moment.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import submitit

from kd_dist.errors import EXIT_USER_ERROR, UserError

from .folders import Job, JobFolder, now, read_json, tail_of, write_json
from .meeting import GivenUp, Place, meet
from .restarts import PREEMPTED, TIME_OUT, Journal, progress_of

MODULES = {"teacher": "kd_dist.teacher", "distill": "kd_dist.distill", "study": "kd_dist.study"}
WARNING = signal.SIGUSR2
LOCAL_REQUEUE = 144  # what submitit's local executor takes for "start me again"
PORTS = range(20_000, 32_000)  # below the ports that systems hand out to outgoing connections
# Output at once; and the ranks have met already, so that one slow to import torch is no reason to end.
ALWAYS = {"PYTHONUNBUFFERED": "1", "KD_DIST_RENDEZVOUS_SECONDS": "300"}
POLL_SECONDS = 0.5
PEER_SECONDS = 15.0
CLOCK_SECONDS = 60.0  # Slurm's warning may come this much earlier than was asked for


def port_of(job_id: str) -> int:
    """A port that jobs of neighbouring ids do not share."""
    return PORTS[int(job_id) % len(PORTS)]


def place_of(folder: JobFolder) -> Place:
    """This task's place, from the scheduler's variables as submitit reads them."""
    told = submitit.JobEnvironment()
    rank = told.global_rank
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0") if told.name() == "slurm" else folder.attempts_seen(rank)
    address = told.hostnames[0] if told.num_nodes > 1 else "127.0.0.1"
    local_world_size = told.num_tasks // told.num_nodes
    return Place(
        told.job_id,
        rank,
        told.num_tasks,
        told.local_rank,
        local_world_size,
        address,
        port_of(told.raw_job_id),
        int(restarts),
    )


class Signals:
    """The stop signals that came, passed on to the rank. SIGTERM outranks the warning: whoever sends it wants
    the end.
    """

    def __init__(self):
        self.first_at: float | None = None
        self.warned = self.told_to_end = False
        self._rank: subprocess.Popen | None = None
        for number in (WARNING, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    @property
    def any(self) -> bool:
        return self.first_at is not None

    def watch(self, rank: subprocess.Popen) -> None:
        """Pass signals on to this process from now on."""
        self._rank = rank
        if self.any:  # came while the process was being started
            self._pass_on(signal.SIGTERM)

    def _note(self, number: int, _frame: object) -> None:
        self.first_at = self.first_at or time.monotonic()
        if number == WARNING:
            self.warned = True
        else:
            self.told_to_end = True
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._rank is not None and self._rank.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._rank.send_signal(number)


@dataclass(frozen=True)
class Task:
    """One job, callable: submitit pickles it and calls it on every rank. All paths are absolute.

    `environment` changes variables of the rank (None removes one). `after` names job folders to wait for on this
    machine, where no scheduler does; with `needs_success` their failure ends this job too.
    """

    kind: str
    arguments: tuple[str, ...]
    folder: str
    run: str
    cache: str | None
    minutes: int
    signal_seconds: int
    most_timeouts: int
    environment: tuple[tuple[str, str | None], ...] = ()
    after: tuple[str, ...] = ()
    needs_success: bool = True

    def __call__(self) -> str:
        """Run one rank to its end; leaves by SystemExit unless the job finished."""
        return Supervisor(self).run()

    def checkpoint(self, *_arguments: object) -> "submitit.helpers.DelayedSubmission":
        """What submitit would requeue; its handler is replaced by ours, so that this serves only before we are
        called.
        """
        return submitit.helpers.DelayedSubmission(self)


class Supervisor:
    """One rank's supervisor, for one attempt."""

    def __init__(self, task: Task):
        self.task = task
        self.started_at = time.monotonic()
        self.signals = Signals()
        self.folder = JobFolder(Path(task.folder))
        self.place = place_of(self.folder)
        self.attempt = self.place.attempt
        self.log = self.folder.log(self.attempt, self.place.rank)
        self.is_main = self.place.rank == 0

    def run(self) -> str:
        self._open_log()
        self._forget_left_over()
        try:
            self._wait_for_others()
            self._begin()
            meet(self.place, self.folder.meeting(self.attempt), self._must_end)
            code = self._run_rank()
        except GivenUp:
            self._say("ended before the ranks had met")
            code = 128 + signal.SIGTERM
        except UserError as error:
            self._fail(EXIT_USER_ERROR, str(error))
        return self._end(code)

    # ---- before

    def _open_log(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        if self.is_main:
            self.folder.ended.unlink(missing_ok=True)
            self.folder.point_main_log(self.attempt)

    def _forget_left_over(self) -> None:
        """Remove the half-written result of an attempt that was killed: submitit refuses to write over it."""
        result = submitit.JobEnvironment().paths.result_pickle
        result.with_name(result.name + ".save_tmp").unlink(missing_ok=True)

    def _wait_for_others(self) -> None:
        for name in self.task.after:
            folder = JobFolder(Path(name))
            while (ended := read_json(folder.ended)) is None:
                if self.signals.any:
                    raise GivenUp
                if not _lives(folder):
                    ended = read_json(folder.ended) or {"status": "failed"}
                    break
                time.sleep(POLL_SECONDS)
            if self.task.needs_success and ended["status"] != "finished":
                self._close("dropped", f"{folder.path.name} {ended['status']}")
                sys.exit(EXIT_USER_ERROR)

    def _begin(self) -> None:
        if self.is_main:
            cache = Path(self.task.cache) if self.task.cache else None
            Journal(self.folder.attempts).begin(progress_of(Path(self.task.run), cache), str(self.log))
            self._say(
                f"attempt {self.attempt} of job {self.place.job_id}: {self.place.world_size} ranks, rank 0 on "
                f"{socket.gethostname()}"
            )

    # ---- during

    def _must_end(self) -> bool:
        return self.signals.any or bool(self.folder.failures(self.attempt))

    def _run_rank(self) -> int:
        command = [sys.executable, "-P", "-m", MODULES[self.task.kind], *self._arguments()]
        with open(self.log, "ab") as log:
            rank = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
                preexec_fn=die_with_parent,
            )
        self.signals.watch(rank)
        return self._watch(rank)

    def _arguments(self) -> list[str]:
        """The job's options here: variables such as $TMPDIR mean this node's, and a restart must not start over."""
        arguments = [os.path.expandvars(argument) for argument in self.task.arguments]
        return [argument for argument in arguments if argument != "--start-over" or self.attempt == 0]

    def _environment(self) -> dict[str, str]:
        changes: Mapping[str, str | None] = {
            **dict(self.task.environment),
            **self.place.variables(),
            **ALWAYS,
        }
        kept = {name: value for name, value in os.environ.items() if name not in changes}
        return {**kept, **{name: value for name, value in changes.items() if value is not None}}

    def _watch(self, rank: subprocess.Popen) -> int:
        """Wait for the rank's end; end it where it outlives its warning or a failed peer."""
        peer_failed_at = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return rank.wait(POLL_SECONDS)
            if peer_failed_at is None and self.folder.failures(self.attempt):
                peer_failed_at = time.monotonic()
            if _over(peer_failed_at, PEER_SECONDS) or _over(self.signals.first_at, self.task.signal_seconds * 0.7):
                self._say("the rank did not stop in time and was killed; its newest checkpoint counts")
                rank.kill()

    # ---- after

    def _end(self, code: int) -> str:
        if code == 0:
            self._close("finished")
            return "finished"
        if self.signals.told_to_end:
            self._close("interrupted", "stopped by SIGTERM; submit again to go on")
            sys.exit(128 + signal.SIGTERM)
        if self.signals.warned and code != EXIT_USER_ERROR:
            self._requeue()
        self._fail(code, "")

    def _requeue(self) -> None:
        """After the scheduler's warning: rank 0 has the job started again, the others leave quietly."""
        if not self.is_main:
            sys.exit(0)
        why = TIME_OUT if self._time_is_up() else PREEMPTED
        self._say(f"stopped by the scheduler's warning ({why}), asking for another start")
        try:
            Journal(self.folder.attempts).stopped(why, self.task.most_timeouts)
        except UserError as error:
            self._fail(EXIT_USER_ERROR, str(error))
        if submitit.JobEnvironment().name() == "local":
            sys.exit(LOCAL_REQUEUE)
        asked = subprocess.run(["scontrol", "requeue", self.place.job_id], capture_output=True, text=True)
        if asked.returncode:
            self._fail(
                1,
                f"the job could not be requeued ({asked.stderr.strip()}); everything is saved: submit again to go on.",
            )
        sys.exit(0)

    def _time_is_up(self) -> bool:
        passed = time.monotonic() - self.started_at
        return passed > self.task.minutes * 60 - self.task.signal_seconds - CLOCK_SECONDS

    def _fail(self, code: int, message: str) -> None:
        """Note what this rank said last, for launch.status, and leave."""
        if message:
            self._say(message)
        facts = {"rank": self.place.rank, "host": node_name(), "code": code, "time": time.time(), "log": str(self.log)}
        tail = tail_of(self.log)
        write_json(self.folder.failure(self.attempt, self.place.rank), {**facts, "message": message, "tail": tail})
        self._close("failed")
        sys.exit(128 - code if code < 0 else code)

    def _close(self, status: str, message: str = "") -> None:
        if status == "interrupted" and self.folder.failures(self.attempt):
            status, message = "failed", ""  # a rank failed, and the scheduler then stopped the others
        if self.is_main:
            write_json(self.folder.ended, {"status": status, "message": message, "time": now()})

    def _say(self, text: str) -> None:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} launch: {text}\n")


def node_name() -> str:
    """The node as the scheduler calls it, or the machine's own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def die_with_parent() -> None:
    """Between fork and exec: ask Linux to kill this process when its supervisor is gone, however it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _over(since: float | None, seconds: float) -> bool:
    return since is not None and time.monotonic() - since > seconds


def _lives(folder: JobFolder) -> bool:
    """Whether a job of this machine has its process still."""
    job = Job.read(folder)
    return job.id is None or controller_lives(job.id, folder)


def controller_lives(pid: str, folder: JobFolder) -> bool:
    """Whether this process is still the one that submitit's local executor started for this folder."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(folder.submitit.absolute()).encode() in words
