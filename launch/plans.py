"""What to run: from the command line to the settings of one job or several, and whether they may run at all."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from kd_dist import config
from kd_dist.checkpoint import RunFolder, read_settings, read_state
from kd_dist.config import DistillSettings, Settings, StudySettings, TeacherSettings
from kd_dist.errors import UserError
from launch import queue
from launch.folders import Job, JobFolder, job_folders, read_json
from launch.resources import Resources, Site
from launch.task import MODULES

KINDS: dict[str, type[Settings]] = {"teacher": TeacherSettings, "distill": DistillSettings, "study": StudySettings}
PIPELINE = ("teacher", "distill")
PATHS = ("data", "out", "cache", "archive", "pixels_dir", "teacher_model")
SILENT_SECONDS = 120
GPU_WORKERS = 8


@dataclass(frozen=True)
class Plan:
    """One job to be: the settings of its run, as they resolve here, and the options it will be started with."""

    name: str
    kind: str
    settings: Settings
    arguments: tuple[str, ...]

    @property
    def run(self) -> Path:
        return Path(self.settings.out)

    @property
    def writes(self) -> Path | None:
        """The cache that this job writes."""
        if self.kind != "teacher":
            return None
        return Path(self.settings.cache) if self.settings.cache else RunFolder(self.run).cache


def _plan(name: str, kind: str, typed: dict[str, Any], resources: Resources, site: Site) -> Plan:
    """A job from what was typed for it; the preset is settled here, so that no restart elsewhere picks another."""
    typed = {"out": KINDS[kind].out, **typed}
    if site.scratch and "pixels_dir" not in typed:
        typed["pixels_dir"] = f"{site.scratch}/kd_dist-pixels"
    cpus = resources.cpus or site.cpus_per_task
    if resources.gpus and cpus and "workers" not in typed:
        typed["workers"] = min(GPU_WORKERS, max(1, cpus - 1))  # the job would count the whole machine's cores
    typed = {key: _absolute(value) if key in PATHS else value for key, value in typed.items()}
    settings = config.resolve(KINDS[kind], typed, resources.gpus > 0)
    typed["preset"] = settings.preset
    if settings.cache:
        typed["cache"] = _absolute(settings.cache)
    return Plan(name, kind, replace(settings, cache=typed.get("cache")), flags(typed))


def _absolute(path: str) -> str:
    """A path that means the same from any folder; what begins with a variable is the node's own business."""
    return path if path.startswith("$") else str(Path(path).expanduser().absolute())


def flags(typed: dict[str, Any]) -> tuple[str, ...]:
    """The command line that gives these settings."""
    words: list[str] = []
    for name, value in sorted(typed.items()):
        if value is not False:
            words.append("--" + name.replace("_", "-"))
            words += (
                []
                if value is True
                else [str(part) for part in value]
                if isinstance(value, list | tuple)
                else [str(value)]
            )
    return tuple(words)


def _typed(kind: str, own: Sequence[str]) -> dict[str, Any]:
    return config.read_command_line(_job_parser(kind), own)


def _job_parser(kind: str) -> argparse.ArgumentParser:
    return config.parser_for(KINDS[kind], MODULES[kind], "", "")


def plan_one(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """teacher, or distill."""
    plan = _plan(options.job, options.job, _typed(options.job, own), resources, site)
    if options.job == "distill":
        require_cache(plan)
    return [plan]


def require_cache(plan: Plan) -> None:
    """Raise UserError where the cache that a student is to learn from is not there."""
    cache = plan.settings.cache
    if cache is not None and not Path(cache).exists():
        raise UserError(
            f"there is no cache {cache} for the student to learn from; write it by `python -m launch.submit teacher`, "
            "submit both jobs by `python -m launch.submit pipeline`, or name yours: -- --cache FILE."
        )


def plan_pipeline(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """Teacher and student in one tree; an option after -- goes to whichever of the two jobs knows it."""
    shared = _shared(own)
    typed = {}
    for kind in PIPELINE:
        typed[kind] = {**shared[kind], **_typed(kind, shlex.split(getattr(options, kind)))}
        for name in {"out", "cache"} & typed[kind].keys():
            raise UserError(f"a pipeline names --{name} itself; choose the folder of both runs by --runs DIR.")
    cache = str(options.runs / "teacher" / "logits.h5")
    return [
        _plan(
            "teacher",
            "teacher",
            {**typed["teacher"], "out": str(options.runs / "teacher"), "cache": cache},
            resources,
            site,
        ),
        _plan(
            "distill",
            "distill",
            {**typed["distill"], "out": str(options.runs / "student"), "cache": cache},
            resources,
            site,
        ),
    ]


def _shared(own: list[str]) -> dict[str, dict[str, Any]]:
    """What was typed after -- for each job. Raises UserError for an option that neither knows."""
    known, unknown = {}, []
    for kind in PIPELINE:
        namespace, rest = _job_parser(kind).parse_known_args(own)
        known[kind] = vars(namespace)
        unknown.append({word for word in rest if word.startswith("--")})
    strange = sorted(set.intersection(*unknown))
    if strange:
        raise UserError(
            f"{', '.join(strange)}: neither job knows it; `python -m kd_dist.teacher --help` and kd_dist.distill list "
            "what they know."
        )
    return known


def plan_sweep(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """One student for each combination; at alpha 0 there is no soft loss, so no temperature either."""
    _require_turns(options)
    typed = _typed("distill", own)
    for name in {"alpha", "temperature", "seed"} & typed.keys():
        raise UserError(f"--{name} belongs before the --, where it may have several values.")
    cells = {}
    for alpha, temperature, seed in product(options.alpha, options.temperature or [None], options.seed):
        cell = {"alpha": alpha, "temperature": temperature if alpha else None, "seed": seed}
        cell = {name: value for name, value in cell.items() if value is not None}
        cells["_".join(f"{name}-{value:g}" for name, value in cell.items())] = cell
    base = Path(typed.get("out", options.runs / "sweep"))
    plans = [
        _plan(name, "distill", {**typed, **cell, "out": str(base / name)}, resources, site)
        for name, cell in cells.items()
    ]
    for plan in plans:
        require_cache(plan)
    return plans


def _require_turns(options: argparse.Namespace) -> None:
    if options.at_once < 1:
        raise UserError(f"--at-once {options.at_once} must be at least 1.")


def plan_study(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """One job for each arm and seed, all in one study's folder; the last to finish writes the whole table."""
    from kd_dist.study.choice import chosen_arms  # takes torch, which the other jobs' submission does without
    from kd_dist.study.folder import StudyFolder, run_settings, with_variants

    _require_turns(options)
    typed = _typed("study", own)
    for name in {"arms", "seeds"} & typed.keys():
        raise UserError(f"--{name} belongs before the --, so that each can become a job.")
    base = {"out": str(options.runs / "study"), **typed}
    asked = config.resolve(StudySettings, {**base, "arms": options.arms, "seeds": options.seeds}, resources.gpus > 0)
    arms, folder, plans = chosen_arms(asked), StudyFolder(Path(asked.out)), []
    with_variants(folder, folder.document(), arms)
    for arm, seed in product(arms, dict.fromkeys(options.seeds)):
        plan = _plan(
            f"{arm.name}_seed-{seed}",
            "study",
            {**base, "arms": [arm.name if arm.base is None else f"{arm.name}={arm.definition}"], "seeds": [seed]},
            resources,
            site,
        )
        require_cache(plan)  # the study's; below, the arm's
        plans.append(replace(plan, settings=run_settings(plan.settings, arm, seed)))
    for plan in plans:
        require_cache(plan)
    return plans


Planner = Callable[[argparse.Namespace, list[str], Resources, Site], list[Plan]]
PLANNERS: dict[str, Planner] = {
    "teacher": plan_one,
    "distill": plan_one,
    "pipeline": plan_pipeline,
    "sweep": plan_sweep,
    "study": plan_study,
}
ARRAYS = ("sweep", "study")
"""Submitted as one array of jobs that do not wait for each other."""


# ---- may it run


def is_finished(plan: Plan) -> bool:
    """Whether the run was brought to its end with these settings. Raises UserError where it was one of other
    settings.
    """
    folder = RunFolder(plan.run)
    if plan.settings.start_over or not folder.settings.exists():
        return False
    kind, stored = read_settings(folder)
    old, new = plan.settings.completed(stored), plan.settings.stored()
    if kind != plan.settings.kind:
        raise UserError(
            f"{plan.run} holds a {kind} run, not a {plan.settings.kind} run; choose another folder by -- --out or "
            "--runs."
        )
    changed = [name for name in sorted(new) if name not in plan.settings.may_change and old.get(name) != new[name]]
    if changed:
        shown = "; ".join(f"--{name.replace('_', '-')} was {old.get(name)}, now {new[name]}" for name in changed)
        raise UserError(
            f"{plan.run} holds a run with other settings ({shown}); type the old ones, choose another folder, or add "
            "-- --start-over."
        )
    state = read_state(folder) or {}
    return state.get("status") == "finished" and (plan.writes is None or plan.writes.exists())


def refuse_used(plan: Plan, runs: Path) -> None:
    """Raise UserError where a job in the queue, or a process that still gives signs of life, has this run folder."""
    folders = [(folder, job) for folder in job_folders(runs) if Path((job := Job.read(folder)).run) == plan.run]
    states = queue.states([(folder, job) for folder, job in folders])
    for _, job in folders:
        state = states.get(job.id) if job.id else None
        if state and state.lives:
            raise UserError(
                f"{plan.run} belongs to job {job.id} ({job.name}, {state.name}); wait for it, or cancel it by `python "
                "-m launch.status "
                f"{runs} --cancel`, or choose another folder."
            )
    state = read_state(RunFolder(plan.run)) or {}
    if state.get("status") == "running" and _is_someone_elses(state, [folder for folder, _ in folders]):
        silent = (datetime.now(UTC) - datetime.fromisoformat(state["time"])).total_seconds()
        if silent < SILENT_SECONDS:
            raise UserError(
                f"{plan.run} is in use: process {state['pid']} on {state['host']} wrote to it {silent:.0f} s ago; stop "
                "it, or choose another folder."
            )


def _is_someone_elses(state: dict[str, Any], folders: list[JobFolder]) -> bool:
    """Whether a sign of life cannot be the last one of a job of ours that is over."""
    ended = read_json(folders[-1].ended) if folders else None
    return not folders or (ended is not None and ended["time"] < state["time"])
