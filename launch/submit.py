"""Put jobs into the queue: python -m launch.submit JOB [where and how] -- [the job's own options]

python -m launch.submit teacher  --nodes 2 --gpus-per-node 4 --partition gpu --time 2h -- --epochs 200
python -m launch.submit distill  --nodes 1 --gpus-per-node 4
python -m launch.submit pipeline --nodes 1 --gpus-per-node 4     # teacher, then distill if the teacher succeeds
python -m launch.submit sweep    --alpha 0 0.5 0.9 --temperature 2 4 --seed 0 1 2
python -m launch.submit study    --arms baseline distilled --seeds 0 1 2
"""

import argparse
import glob
import importlib
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kd_dist.config import DistillSettings, StudySettings
from kd_dist.errors import UserError, exit_code_of
from launch import executors
from launch.code import snapshot
from launch.executors import CLUSTERS, FOR_EVER_MINUTES, Submission
from launch.folders import JOBS, Job, JobFolder, new_folder, now
from launch.plans import ARRAYS, PLANNERS, Plan, is_finished, refuse_used
from launch.resources import SITE_FILE, Resources, Site, minutes_of, read_site
from launch.task import MODULES, Task


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of("launch.submit", lambda: submit(given))


def submit(given: list[str]) -> None:
    """Read the command line, and submit or show."""
    mine, jobs_own = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = _parser().parse_args(mine)
    site = _site(options)
    resources = _resources(options)
    plans = PLANNERS[options.job](options, jobs_own, resources, site)
    runs = _runs_of(options, plans)
    if options.dry_run:
        _show(options, plans, resources, site, runs)
        return
    unfinished = [plan for plan in plans if not is_finished(plan)]
    for plan in plans:
        if plan not in unfinished:
            print(f"{plan.name}: finished already in {plan.run}, nothing to do")
    if options.cluster == "debug":
        _run_here(unfinished)
    elif unfinished:
        _submit_all(options, unfinished, resources, site, runs)


# ---- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "launch.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _raise_user_error
    jobs = parser.add_subparsers(dest="job", required=True, metavar="|".join(PLANNERS))
    for name in PLANNERS:
        job = jobs.add_parser(
            name, allow_abbrev=False, description="The job's own options come after --, such as: -- --epochs 200"
        )
        job.error = _raise_user_error
        _add_options(job)
        if name == "pipeline":
            job.add_argument(
                "--teacher", default="", metavar="'OPTIONS'", help="options for the teacher job alone, in quotes"
            )
            job.add_argument(
                "--distill", default="", metavar="'OPTIONS'", help="options for the student's job alone, in quotes"
            )
        if name == "study":
            job.add_argument("--arms", nargs="+", metavar="ARM", help="see python -m kd_dist.study --list [all]")
            job.add_argument("--seeds", type=int, nargs="+", default=list(StudySettings.seeds), metavar="SEED")
        if name == "sweep":
            job.add_argument("--alpha", type=float, nargs="+", default=[DistillSettings.alpha])
            job.add_argument("--temperature", type=float, nargs="+")
            job.add_argument("--seed", type=int, nargs="+", default=[0])
        if name in ARRAYS:
            job.add_argument(
                "--at-once", type=int, default=4, metavar="N", help="jobs that may run at the same time [4]"
            )
    return parser


def _raise_user_error(message: str) -> None:
    raise UserError(
        f"{message}; `python -m launch.submit --help` and `... teacher --help` list the options, the job's own come "
        "after --."
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--cluster",
        choices=CLUSTERS,
        default="slurm",
        help="where to run: slurm, local (this machine), debug (this process) [slurm]",
    )
    add("--dry-run", action="store_true", help="show the sbatch text and the resolved settings, submit nothing")
    add("--nodes", type=int, default=1, metavar="N", help="machines [1]")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs, and ranks, on each [1; local: those that are here]")
    add("--ranks-per-node", type=int, metavar="N", help="ranks on each node, where they are not one a GPU")
    add("--cpus-per-task", type=int, metavar="N", help="cores for each rank [SITE_CPUS_PER_TASK]")
    add("--mem", metavar="SIZE", help="memory a node, as Slurm writes it, such as 64G")
    add("--time", metavar="TIME", help="time limit, such as 2h, 90m, 1d12h or HH:MM:SS [4h; local: none]")
    add("--partition", metavar="NAME", help="[SBATCH_PARTITION]")
    add("--account", metavar="NAME", help="[SBATCH_ACCOUNT]")
    add("--qos", metavar="NAME", help="[SBATCH_QOS]")
    add("--constraint", metavar="NAME", help="[SBATCH_CONSTRAINT]")
    add("--scratch", metavar="DIR", help="node-local folder for the decoded pictures, such as '$TMPDIR' [SITE_SCRATCH]")
    add("--max-timeouts", type=int, default=3, metavar="N", help="time limits after which the job is requeued [3]")
    add("--signal-before", type=int, default=90, metavar="S", help="seconds from the warning to the time limit [90]")
    add("--site", type=Path, default=SITE_FILE, metavar="FILE", help="the site's settings [slurm/site.conf]")
    add(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of a pipeline's, a sweep's or a study's runs [runs]",
    )


def _site(options: argparse.Namespace) -> Site:
    site = read_site(options.site)
    typed = {name: getattr(options, name) for name in ("partition", "account", "qos", "constraint", "scratch")}
    return replace(site, **{name: value for name, value in typed.items() if value is not None})


def _resources(options: argparse.Namespace) -> Resources:
    gpus = options.gpus_per_node
    if gpus is None:
        gpus = 1 if options.cluster == "slurm" else _gpus_here()
    ranks = max(1, gpus) if options.ranks_per_node is None else options.ranks_per_node
    minutes = minutes_of(options.time) if options.time else 240 if options.cluster == "slurm" else FOR_EVER_MINUTES
    wanted = Resources(options.nodes, ranks, gpus, minutes, options.cpus_per_task, options.mem, options.signal_before)
    if wanted.signal_seconds >= minutes * 60:
        raise UserError(
            f"--signal-before {wanted.signal_seconds} s is not before the end of --time {options.time}; give less of "
            "it or more time."
        )
    if options.max_timeouts < 0:
        raise UserError(
            f"--max-timeouts {options.max_timeouts} must not be negative; 0 never requeues after a time limit."
        )
    if options.cluster == "debug" and wanted.world_size > 1:
        raise UserError(
            f"--cluster debug runs in this one process, but --nodes {wanted.nodes} and {wanted.ranks} ranks on each "
            f"make {wanted.world_size}; "
            "use --cluster local, or one rank."
        )
    return wanted


def _gpus_here() -> int:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        len(glob.glob("/dev/nvidia[0-9]*"))
        if chosen is None
        else len([name for name in chosen.split(",") if name.strip()])
    )


# ---- submitting


def _runs_of(options: argparse.Namespace, plans: list[Plan]) -> Path:
    """The folder under which these jobs are kept: an array's and a pipeline's own, else the one beside the run."""
    return options.runs.absolute() if options.job in ("pipeline", *ARRAYS) else plans[0].run.parent


def _submission(
    options: argparse.Namespace, plans: list[Plan], resources: Resources, site: Site, folder: JobFolder, code: Path
) -> Submission:
    folders = (
        [folder] if len(plans) == 1 else [JobFolder(folder.path / f"{number:02d}") for number in range(len(plans))]
    )
    tasks = tuple(_task(plan, place, options, resources, site) for plan, place in zip(plans, folders, strict=True))
    name = options.job if len(plans) > 1 else plans[0].kind
    return Submission(name, folder, tasks, resources, site, code, at_once=getattr(options, "at_once", None))


def _task(plan: Plan, folder: JobFolder, options: argparse.Namespace, resources: Resources, site: Site) -> Task:
    threads = resources.cpus or site.cpus_per_task
    environment: dict[str, str | None] = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    if options.cluster == "local":
        # submitit's local executor narrows what is visible, but each rank picks its own GPU itself.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // resources.world_size)))
        environment.update(site.network())
    return Task(
        kind=plan.kind,
        arguments=plan.arguments,
        folder=str(folder.path.absolute()),
        run=str(plan.run),
        cache=str(plan.writes) if plan.writes else None,
        minutes=resources.minutes,
        signal_seconds=resources.signal_seconds,
        most_timeouts=options.max_timeouts,
        environment=tuple(environment.items()),
    )


def _submit_all(options: argparse.Namespace, plans: list[Plan], resources: Resources, site: Site, runs: Path) -> None:
    """A sweep or a study goes in as one array, a pipeline one after the other, each waiting for the one before."""
    for plan in plans:
        refuse_used(plan, runs)
    code = snapshot(runs)
    batches = [plans] if options.job in ARRAYS else [[plan] for plan in plans]
    before: tuple[JobFolder, str] | None = None
    for batch in batches:
        folder = new_folder(runs, options.job if len(batch) > 1 else batch[0].kind)
        submission = _submission(options, batch, resources, site, folder, code)
        ids = _start(options, submission, batch, before)
        for plan, task, job_id in zip(batch, submission.tasks, ids, strict=True):
            log = JobFolder(Path(task.folder)).main_log
            waits = f", after job {before[1]} has succeeded" if before else ""
            print(f"{plan.name}: job {job_id}, {resources.nodes} x {resources.ranks} ranks{waits}; log {_shown(log)}")
        before = (folder, ids[-1])
    print(f"watch them: python -m launch.status {_shown(runs)} --follow")


def _start(
    options: argparse.Namespace, submission: Submission, plans: list[Plan], before: tuple[JobFolder, str] | None
) -> list[str]:
    """Submit, and note each job in its folder; a refused one leaves no trace."""
    records = [_record(options, submission, plan, before) for plan in plans]
    folders = [JobFolder(Path(task.folder)) for task in submission.tasks]
    if options.cluster == "slurm":
        ids = _or_remove(
            submission, lambda: executors.submit_slurm(replace(submission, after=before[1] if before else None))
        )
        for folder, record, job_id in zip(folders, records, ids, strict=True):
            folder.path.mkdir(exist_ok=True)
            replace(record, id=job_id).write(folder)
        return ids
    return [_start_local(submission, number, folder, records[number], before) for number, folder in enumerate(folders)]


def _or_remove(submission: Submission, start: Callable[[], list[str]]) -> list[str]:
    try:
        return start()
    except UserError:
        shutil.rmtree(submission.folder.path)
        raise


def _start_local(
    submission: Submission,
    number: int,
    folder: JobFolder,
    record: Job,
    before: tuple[JobFolder, str] | None,
) -> str:
    """Start one job here. It waits for the pipeline's earlier job, or for the sweep's cell that frees its place."""
    task = submission.tasks[number]
    if before:
        task = replace(task, after=(str(before[0].path.absolute()),), minutes=min(2 * task.minutes, FOR_EVER_MINUTES))
    elif submission.at_once and number >= submission.at_once:
        turn = submission.tasks[number - submission.at_once]
        task = replace(
            task, after=(turn.folder,), needs_success=False, minutes=min(task.minutes * (number + 1), FOR_EVER_MINUTES)
        )
    folder.path.mkdir(exist_ok=True)
    record.write(folder)
    (job_id,) = executors.submit_local(replace(submission, tasks=(task,)))
    replace(record, id=job_id).write(folder)
    return job_id


def _record(
    options: argparse.Namespace, submission: Submission, plan: Plan, before: tuple[JobFolder, str] | None
) -> Job:
    return Job(
        name=plan.name,
        kind=plan.kind,
        cluster=options.cluster,
        run=str(plan.run),
        nodes=submission.resources.nodes,
        ranks=submission.resources.ranks,
        command=("python", "-m", MODULES[plan.kind], *plan.arguments),
        code=str(submission.code),
        after=(before[0].path.name,) if before else (),
        host=socket.gethostname(),
        submitted=now(),
    )


def _run_here(plans: list[Plan]) -> None:
    """--cluster debug: the jobs, one after the other, in this process, where a debugger can look."""
    for plan in plans:
        name = MODULES[plan.kind]
        in_package = importlib.util.find_spec(name).submodule_search_locations
        sys.argv = [name, *plan.arguments]
        importlib.import_module(f"{name}.__main__" if in_package else name).main()


def _show(options: argparse.Namespace, plans: list[Plan], resources: Resources, site: Site, runs: Path) -> None:
    """--dry-run: the settings of each job, and the text that sbatch would get."""
    batches = [plans] if options.job in ARRAYS else [[plan] for plan in plans]
    before = None
    for batch in batches:
        for plan in batch:
            print(f"# {plan.name}: python -m {MODULES[plan.kind]} {' '.join(plan.arguments)}")
            for name, value in plan.settings.stored().items():
                print(f"#   {name} = {value}")
        folder = JobFolder(runs / JOBS / f"NNNN-{options.job if len(batch) > 1 else batch[0].kind}")
        submission = _submission(options, batch, resources, site, folder, runs / JOBS / "code" / "DIGEST")
        if options.cluster == "slurm":
            print(executors.sbatch_text(replace(submission, after=before)))
        else:
            print(f"# {options.cluster}: {resources.world_size} ranks on this machine\n")
        before = f"<job of {batch[-1].name}>"


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
