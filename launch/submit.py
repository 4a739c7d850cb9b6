"""Put jobs into the queue of a cluster, or start them on this machine.

JOB is one of

  teacher     train a teacher and write its cache      (python -m kd_dist.teacher)
  distill     train a student from a cache             (python -m kd_dist.distill)
  pipeline    teacher, then distill if the teacher succeeds
  study       many students; --array N workers share the runs   (python -m kd_dist.study)

Examples:

  python -m launch.submit teacher  --nodes 2 --gpus-per-node 4 --partition gpu --time 2h -- --epochs 200
  python -m launch.submit distill  --gpus-per-node 4 -- --cache runs/teacher/logits.h5 --alpha 0.9
  python -m launch.submit pipeline --gpus-per-node 4 --dry-run
  python -m launch.submit study    --grid alpha=0,0.5,0.9 --seeds 0 1 2 --array 4
  python -m launch.submit teacher  --cluster local --gpus-per-node 0 --ranks-per-node 2

`python -m launch.submit JOB --help` lists the options of one job. Then watch: python -m launch.status runs --follow
"""

import argparse
import contextlib
import glob
import importlib
import importlib.util
import io
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

import kd_dist
from kd_dist.errors import UserError, exit_code_of
from kd_dist.files import writing
from kd_dist.run.folder import RunFolder
from kd_dist.run.lock import in_use
from kd_dist.tables import counted

from . import status
from .plans import PLANNERS, STUDY_WORDS, Plan, is_finished
from .site import Resources, Site, minutes_of, read_site
from .supervisor import FOR_EVER_MINUTES, JOBS, MODULES, Job, JobFolder, job_folders

CLUSTERS = ("slurm", "local", "debug")
LOCAL = "add --cluster local to run on this machine"
# Until Python has put up its handlers the scheduler's warning would kill a task, and with it the job's next start.
PYTHON = f"""sh -c 'trap "" USR2; exec "$0" "$@"' {shlex.quote(sys.executable)}"""
# The name that each package is imported by -> its folder. Installed, a checkout's launch/ is kd_dist.launch.
PACKAGES = {"kd_dist": Path(kd_dist.__file__).resolve().parent, __package__: Path(__file__).resolve().parent}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of("launch.submit", lambda: submit(given))


def submit(given: list[str]) -> None:
    """Read the command line, and submit or show."""
    mine, jobs_own = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = _parser().parse_args(mine)
    site, resources = _site(options), _resources(options)
    plans = PLANNERS[options.job](options, jobs_own, resources, site)
    runs = options.runs.absolute() if options.job in ("pipeline", "study") else plans[0].run.parent
    if options.dry_run:
        _show(options, plans, resources, site, runs)
        return
    done = {plan.run: is_finished(plan) for plan in plans}
    for run in (run for run, finished in done.items() if finished):
        print(f"{run.name}: finished already in {run}, nothing to do")
    unfinished = [plan for plan in plans if not done[plan.run]]
    if options.cluster == "debug":
        _run_here([*{plan.run: plan for plan in unfinished}.values()])
    elif unfinished:
        _submit_all(options, unfinished, resources, site, runs)


# ---- the command line


class _Parser(argparse.ArgumentParser):
    """Its errors are one sentence; those of its jobs too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}; `python -m {__package__}.submit --help` and `... teacher --help` list the options, the job's "
            "own come after --. The folder of a single job is `-- --out DIR`, that of a pipeline or study --runs DIR."
        )


def _parser() -> argparse.ArgumentParser:
    page = __doc__.replace("-m launch.", f"-m {__package__}.")
    layout = argparse.RawDescriptionHelpFormatter
    usage = f"python -m {__package__}.submit JOB [where and how much] -- [the job's own options]"
    parser = _Parser(usage=usage, description=page, formatter_class=layout)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="|".join(PLANNERS), help=argparse.SUPPRESS)
    for name in PLANNERS:
        text = "The job's own options come after --, such as: -- --epochs 200"
        job = jobs.add_parser(name, allow_abbrev=False, usage=usage.replace("JOB", name), description=text)
        _add_own_options(name, job.add_argument_group(name))
        _add_options(job)
    return parser


def _add_own_options(job: str, group: Any) -> None:
    if job == "pipeline":
        for kind in ("teacher", "distill"):
            group.add_argument(f"--{kind}", default="", metavar="'OPTIONS'", help=f"for {kind} alone, in quotes")
    if job == "study":
        for name, meaning in zip(STUDY_WORDS, ("ARM", "SEED", "SETTING=V1,V2"), strict=True):
            group.add_argument(f"--{name}", nargs="+", metavar=meaning, help="as python -m kd_dist.study takes it")
        group.add_argument("--array", type=int, default=1, metavar="N", help="jobs that share the study's runs [1]")
    if job in ("pipeline", "study"):
        group.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of its runs [runs]")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where").add_argument
    add("--cluster", choices=CLUSTERS, default="slurm", help="slurm, local: this machine, debug: this process [slurm]")
    add("--partition", metavar="NAME", help="[SBATCH_PARTITION]")
    add("--account", metavar="NAME", help="[SBATCH_ACCOUNT]")
    add("--qos", metavar="NAME", help="[SBATCH_QOS]")
    add("--constraint", metavar="NAME", help="[SBATCH_CONSTRAINT]")
    add("--scratch", metavar="DIR", help="node-local folder for the decoded images, such as '$TMPDIR' [SITE_SCRATCH]")
    add("--site", type=Path, metavar="FILE", help="the site's settings, which give the defaults here [slurm/site.conf]")
    add("--dry-run", action="store_true", help="show the sbatch text and the resolved settings, submit nothing")
    add = parser.add_argument_group("how much").add_argument
    add("--nodes", type=int, default=1, metavar="N", help="machines [1]")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs, and ranks, on each; 0: CPU [1; local: all]")
    add("--ranks-per-node", type=int, metavar="N", help="ranks on each node, where they are not one a GPU")
    add("--cpus-per-task", type=int, metavar="N", help="cores for each rank [SITE_CPUS_PER_TASK]")
    add("--mem", metavar="SIZE", help="memory a node, as Slurm writes it, such as 64G")
    add = parser.add_argument_group("how long").add_argument
    add("--time", metavar="TIME", help="time limit, such as 2h, 90m, 1d12h or HH:MM:SS [4h; local: none]")
    add("--signal-before", type=int, default=90, metavar="S", help="seconds from the warning to the time limit [90]")
    add("--max-timeouts", type=int, default=3, metavar="N", help="time limits after which the job is requeued [3]")


def _site(options: argparse.Namespace) -> Site:
    typed = {name: getattr(options, name) for name in ("partition", "account", "qos", "constraint", "scratch")}
    return replace(read_site(options.site), **{name: value for name, value in typed.items() if value is not None})


def _resources(options: argparse.Namespace) -> Resources:
    gpus, on_slurm, array = options.gpus_per_node, options.cluster == "slurm", max(1, getattr(options, "array", 1))
    if gpus is None:
        gpus = 1 if on_slurm else len(_gpus_here()) // (array * max(1, options.nodes))
    ranks = max(1, gpus) if options.ranks_per_node is None else options.ranks_per_node
    minutes = minutes_of(options.time) if options.time else 240 if on_slurm else FOR_EVER_MINUTES
    wanted = Resources(
        *(options.nodes, ranks, gpus, minutes, options.cpus_per_task, options.mem),
        *(options.signal_before, options.max_timeouts),
    )
    if options.cluster == "debug" and wanted.world_size > 1:
        raise UserError(
            f"--cluster debug runs in this one process, but --nodes {wanted.nodes} and {wanted.ranks} ranks on each "
            f"make {wanted.world_size}; use --cluster local, or one rank."
        )
    if not on_slurm and array * wanted.nodes * gpus > len(_gpus_here()):
        raise UserError(
            f"{array} x {wanted.nodes * gpus} GPUs were asked for, this machine has {len(_gpus_here())}; ask for fewer "
            "by --gpus-per-node or --array."
        )
    return wanted


def _gpus_here() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    return [name for name in chosen.split(",") if name.strip()]


# ---- submissions


@dataclass(frozen=True)
class Batch:
    """Jobs that are put into the queue together (one, or the workers of a study), and what they ask for. `after` is the
    id of a job that must succeed first.
    """

    folder: JobFolder
    jobs: tuple[Job, ...]
    resources: Resources
    site: Site
    after: str | None = None

    @property
    def code(self) -> Path:
        """The snapshot that all of them run."""
        return self.folder.path / "code"


def _batch(
    cluster: str, plans: list[Plan], resources: Resources, site: Site, folder: Path, before: Job | None
) -> Batch:
    alone = len(plans) == 1
    jobs = tuple(
        Job(
            kind=plan.kind,
            arguments=plan.arguments,
            folder=str(folder if alone else folder / f"{number:02d}"),
            run=str(plan.run),
            cluster=cluster,
            nodes=resources.nodes,
            ranks=resources.ranks,
            minutes=resources.minutes * (2 if before and cluster == "local" else 1),  # it waits within its own time
            signal_seconds=resources.signal_seconds,
            max_timeouts=resources.max_timeouts,
            environment=_environment(cluster, number, len(plans), resources, site),
            after=(before.folder,) if before else (),
        )
        for number, plan in enumerate(plans)
    )
    return Batch(JobFolder(folder), jobs, resources, site, before.id if before else None)


def _environment(cluster: str, number: int, jobs: int, resources: Resources, site: Site) -> dict[str, str | None]:
    """What changes in the environment of a job's ranks. On this machine each of several jobs has GPUs of its own."""
    threads = resources.cpus or site.cpus_per_task
    if cluster != "local":
        return {"OMP_NUM_THREADS": str(threads)} if threads else {}
    threads = threads or max(1, len(os.sched_getaffinity(0)) // (resources.world_size * jobs))
    each = resources.gpus * resources.nodes
    own = ",".join(_gpus_here()[number * each : (number + 1) * each])
    return {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": own, **site.network()}


def _submit_all(options: argparse.Namespace, plans: list[Plan], resources: Resources, site: Site, runs: Path) -> None:
    """A study's workers go in as one array, a pipeline's jobs one after the other, each waiting for the one before."""
    for run in dict.fromkeys(plan.run for plan in plans):
        refuse_used(run, runs)
    before: Job | None = None
    for together in _batches(plans):
        folder = new_folder(runs, together[0].kind)
        batch = _batch(options.cluster, together, resources, site, folder, before)
        for job in _start(batch):
            waits = f", after job {before.id} has succeeded" if before else ""
            log = _shown(JobFolder(Path(job.folder)).main_log)
            size = f"{counted(job.nodes, 'node')} x {counted(job.ranks, 'rank')}"
            print(f"{job.kind}: job {job.id}, {size}{waits}; log {log}")
        before = job
    print(f"watch them: python -m {__package__}.status {shlex.quote(_shown(runs))} --follow")


def _batches(plans: list[Plan]) -> list[list[Plan]]:
    return [plans] if plans[0].kind == "study" else [[plan] for plan in plans]


def _start(batch: Batch) -> list[Job]:
    """Submit, and note each job in its folder; a refused one leaves no trace. Gives the jobs with their ids."""
    snapshot(batch.code)
    for job in batch.jobs:
        job.write()
    try:
        ids = submit_local(batch) if batch.jobs[0].cluster == "local" else submit_slurm(batch)
    except UserError:
        shutil.rmtree(batch.folder.path)
        raise
    jobs = [replace(job, id=job_id) for job, job_id in zip(batch.jobs, ids, strict=True)]
    for job in jobs:
        job.write()
    return jobs


def new_folder(runs: Path, name: str) -> Path:
    """Make the next numbered folder under runs/jobs; two submissions at once get two numbers. Raises UserError."""
    jobs = runs / JOBS
    with writing(jobs):
        jobs.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[:4]) for path in jobs.glob("[0-9][0-9][0-9][0-9]-*")), default=0)
    while True:
        folder = jobs / f"{number:04d}-{name}"
        try:
            folder.mkdir()
            return folder.absolute()
        except FileExistsError:
            number += 1


def refuse_used(run: Path, runs: Path) -> None:
    """Raise UserError where a job in the queue, or a process that anybody started, has this run folder."""
    jobs = [job for job in map(Job.read, job_folders(runs)) if Path(job.run) == run]
    for job in jobs:
        state = status.states(jobs).get(job.id) if job.id else None
        if state and state.lives:
            raise UserError(
                f"{run} belongs to job {job.id} ({job.kind}, {state.name}); wait for it, or cancel it by `python -m "
                f"{__package__}.status {shlex.quote(_shown(runs))} --cancel`, or choose another folder."
            )
    if in_use(RunFolder(run)):
        raise UserError(f"{run} is in use by another process; stop it, or choose another folder.")


def snapshot(target: Path, packages: Mapping[str, Path] = PACKAGES) -> None:
    """Copy the packages, for PYTHONPATH: a pending or requeued job runs the code as it was at submission, whatever
    happens to the working tree meanwhile. Raises UserError where they cannot be written.
    """
    with writing(target):
        for package, folder in packages.items():
            leave_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(folder, target.joinpath(*package.split(".")), ignore=leave_out, dirs_exist_ok=True)


# ---- Slurm


class _TextOnly(SlurmExecutor):
    """Writes sbatch files on a machine without Slurm too."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def slurm_parameters(batch: Batch) -> dict[str, Any]:
    """What goes into the sbatch file, in submitit's terms."""
    wanted, site = batch.resources, batch.site
    cpus = wanted.cpus or site.cpus_per_task
    more = {"requeue": True, "kill_on_invalid_dep": "yes"}
    if batch.after:
        more["dependency"] = f"afterok:{batch.after}"
    pairs = (option.removeprefix("--").partition("=") for option in site.options)
    more |= {name: value if separator else True for name, separator, value in pairs}
    parameters = {
        "job_name": f"kd-{batch.jobs[0].kind}",
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
        "array_parallelism": len(batch.jobs),
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": setup_lines(batch, cpus),
        "additional_parameters": more,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def setup_lines(batch: Batch, cpus: int | None) -> list[str]:
    """What the batch script does before srun."""
    lines = [batch.site.activate] if batch.site.activate else []
    # The code as it was at submission, and never the one in the folder the job was submitted from.
    lines += [f"export PYTHONPATH={shlex.quote(str(batch.code))}", "export PYTHONSAFEPATH=1"]
    if cpus:
        lines.append(f"export SRUN_CPUS_PER_TASK={cpus}")  # since Slurm 22.05 srun does not take it from sbatch
    return lines + [f"export {name}={value}" for name, value in batch.site.network().items()]


def sbatch_text(batch: Batch) -> str:
    """The sbatch file that would be submitted."""
    executor = _TextOnly(batch.folder.submitit, python=PYTHON)
    executor.update_parameters(**slurm_parameters(batch))
    if len(batch.jobs) > 1:
        executor.parameters["map_count"] = len(batch.jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_slurm(batch: Batch) -> list[str]:
    """Put the tasks into Slurm's queue and give their ids. Raises UserError with Slurm's words where it refuses."""
    try:
        executor = SlurmExecutor(batch.folder.submitit, python=PYTHON)
    except RuntimeError:
        raise UserError(f"no Slurm (srun) on this machine, so nothing was submitted; {LOCAL}.") from None
    executor.update_parameters(**slurm_parameters(batch))
    batch.folder.submitit.mkdir(parents=True, exist_ok=True)  # without it Slurm drops the job's output
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # sbatch's words come in the error too
            return [job.job_id for job in executor.submit_array(list(batch.jobs))]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(
            f"Slurm refused the job: {_words(error)} Change the option it names, or slurm/site.conf, or {LOCAL}."
        ) from error


def _words(error: Exception) -> str:
    """sbatch's own words in one line."""
    text = f"{error}\n{error.__cause__ or ''}"
    own = [line.split(": ", 2)[-1] for line in text.splitlines() if line.startswith(("sbatch: error", "sbatch: fatal"))]
    sentence = "; ".join(dict.fromkeys(own)) or " ".join(str(error.__cause__ or error).split())
    return sentence.rstrip(".") + "."


# ---- this machine


def submit_local(batch: Batch) -> list[str]:
    """Start the jobs as processes of this machine that outlive this one; all nodes' ranks run here. Gives their ids."""
    ids = []
    for job in batch.jobs:
        executor = LocalExecutor(JobFolder(Path(job.folder)).submitit)
        executor.update_parameters(
            nodes=1,
            tasks_per_node=batch.resources.world_size,
            timeout_min=min(job.minutes, FOR_EVER_MINUTES),
            signal_delay_s=job.signal_seconds,
            stderr_to_stdout=True,
        )
        with _detached(), environment_variables(PYTHONPATH=batch.code, PYTHONSAFEPATH=1):
            ids.append(executor.submit(job).job_id)
    return ids


@contextlib.contextmanager
def _detached() -> Iterator[None]:
    """What is started inside outlives the terminal and a Ctrl-C, and does not hold this process's output open, on which
    a pipe behind it would wait.
    """
    sys.stdout.flush()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
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
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run_here(plans: list[Plan]) -> None:
    """--cluster debug: the jobs, one after the other, in this process, where a debugger can look."""
    for plan in plans:
        name = MODULES[plan.kind]
        found = importlib.util.find_spec(name)
        in_package = found is not None and found.submodule_search_locations
        sys.argv = [name, *plan.arguments]
        importlib.import_module(f"{name}.__main__" if in_package else name).main()


# ---- --dry-run


def _show(options: argparse.Namespace, plans: list[Plan], resources: Resources, site: Site, runs: Path) -> None:
    """The settings of each job, and the text that sbatch would get."""
    before = None
    for together in _batches(plans):
        plan = together[0]
        print(f"# {plan.kind}: python -m {MODULES[plan.kind]} {shlex.join(plan.arguments)}")
        for name, value in plan.settings.stored().items():
            print(f"#   {name} = {value}")
        folder = runs / JOBS / f"NNNN-{plan.kind}"
        batch = _batch(options.cluster, together, resources, site, folder, before)
        if options.cluster == "slurm":
            print(sbatch_text(batch))
        else:
            print(f"# {options.cluster}: {len(together)} x {counted(resources.world_size, 'rank')} on this machine\n")
        before = replace(batch.jobs[0], id=f"<job of {plan.kind}>")


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
