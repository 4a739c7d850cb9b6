"""A submitted job's folder: the only place that spells the names of its files.

runs/jobs/0001-teacher/
    job.json           what was submitted: its id, its run folder, its command
    rank-0.log         rank 0's output of the latest attempt, a link
    attempt-0/         rank-0.log, rank-1.log, ... and failed-3.json where rank 3 failed
    attempts.jsonl     when each attempt began and why it ended
    ended.json         how the job ended, once it has
    submitit/          the sbatch file and submitit's own logs
runs/jobs/code/        the code as it was at submission, one folder for each version of it
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from kd_dist import files
from kd_dist.errors import UserError
from kd_dist.files import write_json, writing

JOBS = "jobs"
CODE = "code"
TAIL_LINES = 30


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

    def attempt(self, number: int) -> Path:
        return self.path / f"attempt-{number}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / f"rank-{rank}.log"

    def meeting(self, attempt: int) -> Path:
        return self.attempt(attempt) / "meeting.json"

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
    """What was submitted. `id` is Slurm's, or a process id for cluster "local"; None until it was accepted."""

    name: str
    kind: str
    cluster: str
    run: str
    nodes: int
    ranks: int
    command: tuple[str, ...]
    code: str
    after: tuple[str, ...] = ()
    id: str | None = None
    host: str | None = None
    submitted: str | None = None

    def write(self, folder: JobFolder) -> None:
        """Publish job.json."""
        write_json(folder.job, asdict(self))

    @classmethod
    def read(cls, folder: JobFolder) -> Self:
        """What `write` wrote. Raises UserError where it is damaged."""
        try:
            stored = json.loads(folder.job.read_text(encoding="utf-8"))
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder.job} cannot be read ({error}); remove that folder if its job is over.") from error


def new_folder(runs: Path, name: str) -> JobFolder:
    """Make the next numbered folder under runs/jobs; two submissions at once get two numbers. Raises UserError."""
    jobs = runs / JOBS
    with writing(jobs):
        jobs.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[:4]) for path in jobs.glob("[0-9][0-9][0-9][0-9]-*")), default=0)
    while True:
        folder = JobFolder(jobs / f"{number:04d}-{name}")
        try:
            folder.path.mkdir()
            return folder
        except FileExistsError:
            number += 1


def job_folders(runs: Path) -> Iterator[JobFolder]:
    """All jobs submitted under this tree of runs, oldest first; the cells of a sweep one by one."""
    for pattern in ("[0-9]*/job.json", "[0-9]*/[0-9]*/job.json"):
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
