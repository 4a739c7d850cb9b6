"""From a job to submitit's executors: Slurm, this machine's processes, or this very process."""

import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from kd_dist.errors import UserError

from .folders import JobFolder
from .resources import Resources, Site
from .task import Task

CLUSTERS = ("slurm", "local", "debug")
FOR_EVER_MINUTES = 365 * 24 * 60
# Until Python has put up its handlers the scheduler's warning would kill a task, and with it the job's next start.
PYTHON = f"""sh -c 'trap "" USR2; exec "$0" "$@"' {shlex.quote(sys.executable)}"""


@dataclass(frozen=True)
class Submission:
    """Tasks that are put into the queue together (one, or the cells of a sweep), and what they ask for."""

    name: str
    folder: JobFolder
    tasks: tuple[Task, ...]
    resources: Resources
    site: Site
    code: Path
    after: str | None = None
    at_once: int | None = None


class _TextOnly(SlurmExecutor):
    """Writes sbatch files on a machine without Slurm too."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def slurm_parameters(submission: Submission) -> dict:
    """What goes into the sbatch file, in submitit's terms."""
    wanted, site = submission.resources, submission.site
    cpus = wanted.cpus or site.cpus_per_task
    more = {"requeue": True, "kill_on_invalid_dep": "yes"}
    if submission.after:
        more["dependency"] = f"afterok:{submission.after}"
    parameters = {
        "job_name": f"kd-{submission.name}",
        "time": wanted.minutes,
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.ranks,
        "gpus_per_node": wanted.gpus or None,
        "cpus_per_task": cpus,
        "mem": wanted.memory,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "signal_delay_s": wanted.signal_seconds,
        "stderr_to_stdout": True,
        "array_parallelism": submission.at_once,
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": setup_lines(submission, cpus),
        "additional_parameters": {**more, **_options(site.options)},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _options(options: Sequence[str]) -> dict[str, str | bool]:
    """--reservation=x --exclusive -> what submitit writes as such."""
    pairs = (option.removeprefix("--").partition("=") for option in options)
    return {name: value if separator else True for name, separator, value in pairs}


def setup_lines(submission: Submission, cpus: int | None) -> list[str]:
    """What the batch script does before srun."""
    lines = [submission.site.activate] if submission.site.activate else []
    # The code as it was at submission, and never the one in the folder the job was submitted from.
    lines += [f"export PYTHONPATH={submission.code}", "export PYTHONSAFEPATH=1"]
    if cpus:
        lines.append(f"export SRUN_CPUS_PER_TASK={cpus}")  # since Slurm 22.05 srun does not take it from sbatch
    return lines + [f"export {name}={value}" for name, value in submission.site.network().items()]


def sbatch_text(submission: Submission) -> str:
    """The sbatch file that would be submitted."""
    executor = _TextOnly(submission.folder.submitit, python=PYTHON)
    executor.update_parameters(**slurm_parameters(submission))
    if len(submission.tasks) > 1:
        executor.parameters["map_count"] = len(submission.tasks)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_slurm(submission: Submission) -> list[str]:
    """Put the tasks into Slurm's queue and give their ids. Raises UserError with Slurm's words where it refuses."""
    try:
        executor = SlurmExecutor(submission.folder.submitit, python=PYTHON)
    except RuntimeError:
        raise UserError(
            "no Slurm (srun) on this machine, so nothing was submitted; add --cluster local to run here."
        ) from None
    executor.update_parameters(**slurm_parameters(submission))
    submission.folder.submitit.mkdir(
        parents=True, exist_ok=True
    )  # Slurm drops the output of a job whose log folder is missing
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # sbatch's words come in the error too
            return [job.job_id for job in executor.submit_array(list(submission.tasks))]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(
            f"Slurm refused the job: {_words(error)} Change the option it names, or slurm/site.conf."
        ) from error


def _words(error: Exception) -> str:
    """sbatch's own words in one line."""
    words = str(error.__cause__ or error)
    lines = [line.split("error: ", 1)[1] for line in (str(error) + "\n" + words).splitlines() if "error: " in line]
    sentence = "; ".join(dict.fromkeys(lines)) or " ".join(words.split())
    return sentence.rstrip(".") + "."


def submit_local(submission: Submission) -> list[str]:
    """Start the tasks as processes of this machine that outlive this one; all nodes' ranks run here. Gives
    process ids.
    """
    ids = []
    for task in submission.tasks:
        executor = LocalExecutor(JobFolder(Path(task.folder)).submitit)
        executor.update_parameters(
            nodes=1,
            tasks_per_node=submission.resources.world_size,
            timeout_min=task.minutes,
            signal_delay_s=submission.resources.signal_seconds,
            stderr_to_stdout=True,
        )
        with _left_alone(submission.code):
            ids.append(executor.submit(task).job_id)
    return ids


@contextlib.contextmanager
def _left_alone(code: Path) -> Iterator[None]:
    """For what is started inside: the snapshot's code, and neither a closing terminal nor a Ctrl-C ends it."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    os.environ.update(PYTHONPATH=str(code), PYTHONSAFEPATH="1")
    try:
        with _cut_off():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _cut_off() -> Iterator[None]:
    """What is started inside does not hold this process's output open, on which a pipe behind it would wait."""
    sys.stdout.flush()
    streams = {number: os.dup(number) for number in (0, 1, 2)}
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        for number in streams:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, own in streams.items():
            os.dup2(own, number)
            os.close(own)
        os.close(nowhere)
