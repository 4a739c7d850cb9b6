"""What every task of a job runs: a supervisor that starts one rank of kd_dist and stays beside it.

The supervisor hands torch's variables to the rank, passes signals on, gives its output a log file, notes why it
failed, and, on rank 0, has the job requeued after the scheduler's warning. The rank itself is the same `python -m
kd_dist.teacher` that a user types, and does not know of its supervisor. The supervisor holds no torch and no
collective, so it can answer a signal at any moment. submitit calls `Job`, slurm/job.sh calls `main`.

A job's folder, whose names are spelled here alone:

    runs/jobs/0001-teacher/    (slurm-57-teacher/ of a script that was submitted by sbatch)
        job.json           what was submitted: its id, its run folder, its command
        rank-0.log         rank 0's output of the latest attempt, a link
        attempt-0/         rank-0.log, rank-1.log, ... and failed-3.json where rank 3 failed
        attempts.jsonl     when each attempt began and why it was stopped
        ended.json         how the job ended, once it has
        code/              the code as it was at submission
        submitit/          the sbatch file and submitit's own logs
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, Self

import submitit

import kd_dist
from kd_dist import files
from kd_dist.errors import EXIT_USER_ERROR, UserError, exit_code_of
from kd_dist.files import write_json
from kd_dist.run import events
from kd_dist.run.events import Code, Reason

from .rendezvous import Aborted, DistributedEnvironment, wait_for_all_ranks
from .site import minutes_of

MODULES = {"teacher": "kd_dist.teacher", "distill": "kd_dist.distill", "study": "kd_dist.study"}
JOBS = "jobs"
WARNING = signal.SIGUSR2
LOCAL_REQUEUE = 144  # what submitit's local executor takes for "start me again"
FOR_EVER_MINUTES = 365 * 24 * 60
PORTS = range(20_000, 32_000)  # below the ports that systems hand out to outgoing connections
# Output at once; and rank 0 has been reached already, so that one slow to import torch is no reason to end.
ALWAYS = {"PYTHONUNBUFFERED": "1", "KD_DIST_RENDEZVOUS_SECONDS": "300"}
POLL_SECONDS = 0.5
PEER_SECONDS = 15.0
CLOCK_SECONDS = 60.0  # Slurm's warning may come this much earlier than was asked for
TAIL_LINES = 30


class Stop(StrEnum):
    """Why the scheduler stopped an attempt."""

    TIME_OUT = "time-out"
    PREEMPTED = "preempted"


class Status(StrEnum):
    """How a job ended."""

    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    DROPPED = "dropped"  # the job that it waited for did not finish


# ---- a job's folder


@dataclass(frozen=True)
class JobFolder:
    """The names inside one job's folder. Making one touches no disk."""

    path: Path

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def main_log(self) -> Path:
        return self.path / "rank-0.log"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def ended(self) -> Path:
        return self.path / "ended.json"

    @property
    def name(self) -> str:
        """The job's name among those of a tree of runs: 0001-teacher, and 0002-study/03 for a task of an array."""
        jobs = next(parent for parent in self.path.parents if parent.name == JOBS)
        return self.path.relative_to(jobs).as_posix()

    def attempt(self, number: int) -> Path:
        return self.path / f"attempt-{number}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / f"rank-{rank}.log"

    def rendezvous(self, attempt: int) -> Path:
        return self.attempt(attempt) / "rendezvous.json"

    def failure(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / f"failed-{rank}.json"

    def failures(self, attempt: int) -> list[Path]:
        return sorted(self.attempt(attempt).glob("failed-*.json"))

    def attempts_seen(self, rank: int) -> int:
        """How many attempts of this rank have a log."""
        return len(list(self.path.glob(f"attempt-*/rank-{rank}.log")))

    def last_attempt(self) -> int | None:
        """The number of the newest attempt, None before the first."""
        numbers = [int(path.name.removeprefix("attempt-")) for path in self.path.glob("attempt-*")]
        return max(numbers, default=None)

    def point_main_log(self, attempt: int) -> None:
        """Let rank-0.log lead to this attempt's."""
        temporary = self.main_log.with_name(f".rank-0.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.log(attempt, 0).relative_to(self.path))
        os.replace(temporary, self.main_log)


@dataclass(frozen=True)
class Job:
    """One job as it was submitted, callable: submitit pickles it and calls it on every rank. All paths are absolute.

    `environment` changes variables of the ranks (None removes one). `after` names the folders of jobs that must finish
    first. `id` is Slurm's, or a process id for cluster "local"; None until the job was accepted.
    """

    kind: str
    arguments: tuple[str, ...]
    folder: str
    run: str
    cluster: str
    nodes: int
    ranks: int
    minutes: int
    signal_seconds: int
    max_timeouts: int
    environment: Mapping[str, str | None] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    id: str | None = None
    host: str = field(default_factory=socket.gethostname)
    submitted: str = field(default_factory=lambda: now())

    def __call__(self) -> str:
        """Run one rank to its end; leaves by SystemExit unless the job finished."""
        return Supervisor(self).run()

    def write(self) -> None:
        """Publish job.json in its folder."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        write_json(JobFolder(Path(self.folder)).job, asdict(self))

    @classmethod
    def read(cls, folder: JobFolder) -> Self:
        """What `write` wrote. Raises UserError where it is damaged."""
        try:
            stored: dict[str, Any] = json.loads(folder.job.read_text(encoding="utf-8"))
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
            }
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder.job} cannot be read ({error}); remove that folder if its job is over.") from error


def job_folders(runs: Path) -> Iterator[JobFolder]:
    """All jobs submitted under this tree of runs; the tasks of an array one by one."""
    for pattern in ("*/job.json", "[0-9]*/[0-9]*/job.json"):
        yield from (JobFolder(path.parent) for path in sorted((runs / JOBS).glob(pattern)))


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, None where there is nothing. Raises UserError where it is damaged."""
    return files.read_json(path, mend="remove it if its job is over.")


def now() -> str:
    """The time as these files write it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def tail_of(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:])


# ---- how often a job may start again: a journal of its attempts, which rank 0 alone writes


def begin_attempt(journal: Path, progress: int, log: str) -> None:
    """Note an attempt that begins. Raises UserError where two restarts brought nothing, naming both attempts' logs."""
    before = [event for event in events.read(journal) if event["code"] == "began"][-2:]
    if len(before) == 2 and all(event["progress"] == progress for event in before):
        raise UserError(
            f"no progress in two restarts (no new checkpoint, no new cache shard), giving up; see {before[0]['log']} "
            f"and {before[1]['log']}, fix the cause and submit again, or increase --time."
        )
    events.append(journal, {"code": "began", "progress": progress, "log": log})


def stop_attempt(journal: Path, why: Stop, max_timeouts: int) -> None:
    """Note why an attempt was stopped. Raises UserError where that was one time-out too many."""
    events.append(journal, {"code": "stopped", "why": why})
    timeouts = sum(event.get("why") == Stop.TIME_OUT for event in events.read(journal))
    if why == Stop.TIME_OUT and timeouts > max_timeouts:
        raise UserError(
            f"the job hit its time limit (count: {timeouts}) and --max-timeouts is {max_timeouts}, so it was not "
            "requeued; all progress is saved: submit again to resume, perhaps with a longer --time."
        )


def events_of(run: Path, job: str) -> list[dict[str, Any]]:
    """What a job did in its run, or in the runs of its study, oldest first."""
    logs = [run / events.NAME, *run.glob(f"*/*/{events.NAME}")]
    found = [event for log in logs for event in events.read(log) if event.get("job") == job]
    return sorted(found, key=lambda event: event["time"])


def progress_of(run: Path, job: str) -> int:
    """How much a job has done that a restart need not do again."""
    kept = {Code.CHECKPOINT_WRITTEN, Code.BLOCK_WRITTEN, Code.CACHE_PUBLISHED, Code.RUN_FINISHED}
    return sum(event["code"] in kept for event in events_of(run, job))


# ---- one rank's supervisor


def port_of(job_id: str) -> int:
    """A port that jobs of neighbouring ids do not share."""
    return PORTS[int(job_id) % len(PORTS)]


def environment_here(folder: JobFolder) -> DistributedEnvironment:
    """This task's ranks and address, from the scheduler's variables as submitit reads them."""
    task = submitit.JobEnvironment()
    rank = task.global_rank
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0") if task.name() == "slurm" else folder.attempts_seen(rank)
    return DistributedEnvironment(
        job_id=task.job_id,
        rank=rank,
        world_size=task.num_tasks,
        local_rank=task.local_rank,
        local_world_size=task.num_tasks // task.num_nodes,
        address=task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
        port=port_of(task.raw_job_id),
        attempt=int(restarts),
    )


class Signals:
    """The stop signals that came, passed on to the rank. SIGTERM outranks the warning: whoever sends it wants
    the end.
    """

    def __init__(self):
        self.first_at: float | None = None
        self.warned = self.terminated = False
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
            self.terminated = True
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._rank is not None and self._rank.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._rank.send_signal(number)


class Supervisor:
    """One rank's supervisor, for one attempt."""

    def __init__(self, job: Job):
        self.job = job
        self.started_at = time.monotonic()
        self.signals = Signals()
        self.folder = JobFolder(Path(job.folder))
        self.env = environment_here(self.folder)
        self.attempt = self.env.attempt
        self.log = self.folder.log(self.attempt, self.env.rank)
        self.is_main = self.env.rank == 0
        self.peer_failed_at: float | None = None

    def run(self) -> str:
        self._open_log()
        try:
            self._wait_for_others()
            self._begin()
            wait_for_all_ranks(self.env, self.folder.rendezvous(self.attempt), self._must_end)
            code = self._run_rank()
        except Aborted:
            self._say("ended before all ranks had started")
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

    def _wait_for_others(self) -> None:
        earlier = self.job.after if self.job.cluster == "local" else ()  # Slurm waits by itself
        for folder in map(JobFolder, map(Path, earlier)):
            while (ended := read_json(folder.ended)) is None:
                if self.signals.any:
                    raise Aborted
                if not _lives(folder):
                    ended = read_json(folder.ended) or {"status": Status.FAILED}
                    break
                time.sleep(POLL_SECONDS)
            if ended["status"] != Status.FINISHED:
                self._close(Status.DROPPED, f"{folder.path.name} {ended['status']}")
                sys.exit(EXIT_USER_ERROR)

    def _begin(self) -> None:
        if self.is_main:
            progress = progress_of(Path(self.job.run), self.folder.name)
            begin_attempt(self.folder.attempts, progress, str(self.log))
            self._say(
                f"job {self.env.job_id}, attempt {self.attempt}: world size {self.env.world_size}, rank 0 on "
                f"{socket.gethostname()}"
            )

    # ---- during

    def _must_end(self) -> bool:
        return self.signals.any or bool(self.folder.failures(self.attempt))

    def _run_rank(self) -> int:
        command = [sys.executable, "-P", "-m", MODULES[self.job.kind], *self._arguments()]
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
        arguments = [os.path.expandvars(argument) for argument in self.job.arguments]
        return [argument for argument in arguments if argument != "--start-over" or self.attempt == 0]

    def _environment(self) -> dict[str, str]:
        source = str(Path(kd_dist.__file__).resolve().parent.parent)  # the rank runs the code that runs here
        changes: Mapping[str, str | None] = {
            "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
            events.JOB_VARIABLE: self.folder.name,
            **self.job.environment,
            **self.env.variables(),
            **ALWAYS,
        }
        return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}

    def _watch(self, rank: subprocess.Popen) -> int:
        """Wait for the rank's end; end it where it outlives its warning or a failed peer."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return rank.wait(POLL_SECONDS)
            if self.peer_failed_at is None and self.folder.failures(self.attempt):
                self.peer_failed_at = time.monotonic()
            if _over(self.peer_failed_at, PEER_SECONDS) or _over(self.signals.first_at, self.job.signal_seconds * 0.7):
                self._say("the rank did not stop in time and was killed; a restart resumes from its newest checkpoint")
                rank.kill()

    # ---- after

    def _end(self, code: int) -> str:
        if code == 0:
            self._close(Status.FINISHED)
            return "finished"
        if self.signals.terminated:
            self._close(Status.INTERRUPTED, "stopped by SIGTERM; submit again to resume")
            sys.exit(128 + signal.SIGTERM)
        if self.signals.warned and code != EXIT_USER_ERROR:
            self._requeue()
        self._fail(code)

    def _requeue(self) -> None:
        """After the scheduler's warning: rank 0 has the job started again, the others leave quietly."""
        if not self.is_main:
            sys.exit(0)
        passed = time.monotonic() - self.started_at
        time_is_up = passed > self.job.minutes * 60 - self.job.signal_seconds - CLOCK_SECONDS
        why = Stop.TIME_OUT if time_is_up else Stop.PREEMPTED
        self._say(f"stopped by the scheduler's warning signal ({why}); requesting a requeue")
        try:
            stop_attempt(self.folder.attempts, why, self.job.max_timeouts)
        except UserError as error:
            self._fail(EXIT_USER_ERROR, str(error))
        with contextlib.suppress(OSError):  # the run's rank 0 has ended: nobody else writes there
            requeued = {"code": Code.RUN_REQUEUED, "job": self.folder.name, "why": why}
            events.append(Path(self.job.run) / events.NAME, requeued)
        if submitit.JobEnvironment().name() == "local":
            sys.exit(LOCAL_REQUEUE)
        asked = subprocess.run(["scontrol", "requeue", self.env.job_id], capture_output=True, text=True)
        if asked.returncode:
            self._fail(1, f"requeueing failed ({asked.stderr.strip()}); all progress is saved: submit again to resume.")
        sys.exit(0)

    def _fail(self, code: int, message: str = "") -> NoReturn:
        """Note the last lines of this rank's output, for launch.status, and leave."""
        if message:
            self._say(message)
        facts = {
            "rank": self.env.rank,
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "code": code,
            "reason": Reason.PEER_LOST if self.peer_failed_at is not None else Reason.of_exit_code(code),
            "time": time.time(),
            "log": str(self.log),
            "message": message,
            "tail": tail_of(self.log),
        }
        write_json(self.folder.failure(self.attempt, self.env.rank), facts)
        print(f"rank {facts['rank']} on {facts['host']} failed, exit code {code}; log {self.log}", file=sys.stderr)
        self._close(Status.FAILED)
        sys.exit(128 - code if code < 0 else code)

    def _close(self, status: Status, message: str = "") -> None:
        if status == Status.INTERRUPTED and self.folder.failures(self.attempt):
            status, message = Status.FAILED, ""  # a rank failed, and the scheduler then stopped the others
        if self.is_main:
            write_json(self.folder.ended, {"status": status, "message": message, "time": now()})

    def _say(self, text: str) -> None:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} launch: {text}\n")


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


# ---- for slurm/job.sh


def main(arguments: list[str]) -> None:
    """A rank of a job that was submitted by sbatch: KIND RUN [--time-limit T] ... -- OPTIONS of the job."""
    parser = argparse.ArgumentParser(
        "launch.supervisor", description="Start and watch one rank; slurm/job.sh types it."
    )
    parser.add_argument("kind", choices=MODULES)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--time-limit", default="UNLIMITED", help="as scontrol writes it")
    parser.add_argument(
        "--signal-before", type=int, default=120, metavar="S", help="seconds from warning to time limit"
    )
    parser.add_argument(
        "--max-timeouts",
        type=int,
        default=3,
        metavar="N",
        help="maximum number of requeues after hitting the time limit",
    )
    split = arguments.index("--")
    options, own = parser.parse_args(arguments[:split]), tuple(arguments[split + 1 :])
    run, task = options.run.absolute(), submitit.JobEnvironment()
    job = Job(
        kind=options.kind,
        arguments=("--out", str(run), *own),
        folder=str(run.parent / JOBS / f"slurm-{task.job_id}-{options.kind}"),
        run=str(run),
        cluster="slurm",
        nodes=task.num_nodes,
        ranks=task.num_tasks // task.num_nodes,
        minutes=FOR_EVER_MINUTES if options.time_limit == "UNLIMITED" else minutes_of(options.time_limit),
        signal_seconds=options.signal_before,
        max_timeouts=options.max_timeouts,
        id=task.job_id,
    )
    if task.global_rank == 0:
        if not JobFolder(Path(job.folder)).job.exists():  # a requeued job was submitted once
            job.write()
        print(f"rank 0's log: {JobFolder(Path(job.folder)).main_log}", flush=True)
    job()


if __name__ == "__main__":
    sys.exit(exit_code_of("launch.supervisor", lambda: main(sys.argv[1:])))
