"""What to run: from the command line to the settings of one job or several, and whether any run of it is unfinished."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from kd_dist import config
from kd_dist.config import DistillConfig, JobConfig, StudyConfig, TeacherConfig
from kd_dist.errors import UserError
from kd_dist.run import claim
from kd_dist.run.claim import read_settings
from kd_dist.run.folder import RunFolder

from .site import Resources, Site
from .supervisor import MODULES

KINDS: dict[str, type[JobConfig]] = {"teacher": TeacherConfig, "distill": DistillConfig, "study": StudyConfig}
PIPELINE = ("teacher", "distill")
STUDY_WORDS = ("arms", "seeds", "grid")  # of a study's own options, those that may stand before the --
PATHS = ("data", "unlabelled", "out", "cache", "archive", "pixels_dir", "teacher_model")
GPU_WORKERS = 8


@dataclass(frozen=True)
class Plan:
    """One job to be: the settings as they resolve here, the options it will be started with, the settings of each run
    that it trains: its own, or those of a study's runs.
    """

    kind: str
    settings: JobConfig
    arguments: tuple[str, ...]
    runs: tuple[JobConfig, ...]

    @property
    def run(self) -> Path:
        return Path(self.settings.out)


def _plan(kind: str, typed: dict[str, Any], resources: Resources, site: Site) -> Plan:
    """A job from what was typed for it; the preset is settled here, so that no restart elsewhere picks another."""
    typed = {"out": config.flags_of(KINDS[kind])["out"].default, **typed}
    if site.scratch and "pixels_dir" not in typed:
        typed["pixels_dir"] = f"{site.scratch}/kd_dist-pixels"
    cpus = resources.cpus or site.cpus_per_task
    if resources.gpus and cpus and "workers" not in typed:
        typed["workers"] = min(GPU_WORKERS, max(1, cpus - 1))  # the job would count the whole machine's cores
    if not resources.gpus:
        typed.setdefault("device", "cpu")
    typed = {key: _absolute(value) if key in PATHS else value for key, value in typed.items()}
    settings = config.resolve(KINDS[kind], typed, resources.gpus > 0, resources.world_size, _stored(typed["out"]))
    typed["preset"] = settings.preset
    if settings["cache"]:
        typed["cache"] = _absolute(settings["cache"])
    settings = settings.changed(cache=typed.get("cache"))
    return Plan(kind, settings, tuple(config.flag_words(dict(sorted(typed.items())))), (settings,))


def _stored(out: str) -> dict[str, Any] | None:
    """The flags of the run that a folder holds: a resume keeps its batch size."""
    folder = RunFolder(Path(out))
    return read_settings(folder)[1] if folder.settings.exists() else None


def _absolute(path: str) -> str:
    """A path that means the same from any folder; what begins with a variable is the node's own business."""
    return path if path.startswith("$") else str(Path(path).expanduser().absolute())


def _typed(kind: str, own: Sequence[str]) -> dict[str, Any]:
    return config.read_command_line(_job_parser(kind), own)


def _job_parser(kind: str) -> argparse.ArgumentParser:
    return config.parser_for(KINDS[kind], MODULES[kind], "", "")


def plan_one(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """teacher, or distill."""
    plan = _plan(options.job, _typed(options.job, own), resources, site)
    if options.job == "distill":
        require_cache(plan)
    return [plan]


def require_cache(plan: Plan) -> None:
    """Raise UserError where the cache that a student is to learn from is not there."""
    for cache in dict.fromkeys(settings["cache"] for settings in (plan.settings, *plan.runs)):
        if cache is not None and not Path(cache).exists():
            submit = f"python -m {__package__}.submit"
            raise UserError(
                f"there is no cache {cache} for the student to learn from; write it by `{submit} teacher`, submit both "
                f"jobs by `{submit} pipeline`, or name yours: -- --cache FILE."
            )


def plan_pipeline(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """Teacher and student in one tree; an option after -- goes to whichever of the two jobs knows it."""
    shared = _shared(own)
    cache = str(options.runs / "teacher" / "logits.h5")
    plans = []
    for kind, run in zip(PIPELINE, ("teacher", "student"), strict=True):
        typed = {**shared[kind], **_typed(kind, shlex.split(getattr(options, kind)))}
        for name in {"out", "cache"} & typed.keys():
            raise UserError(f"a pipeline names --{name} itself; choose the folder of both runs by --runs DIR.")
        plans.append(_plan(kind, {**typed, "out": str(options.runs / run), "cache": cache}, resources, site))
    return plans


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


def plan_study(options: argparse.Namespace, own: list[str], resources: Resources, site: Site) -> list[Plan]:
    """The same study once for each of --array workers: each takes the next run that is free."""
    from kd_dist.study.choice import chosen_arms  # takes torch, which the other jobs' submission does without
    from kd_dist.study.folder import StudyFolder, run_settings, with_variants

    if options.array < 1:
        raise UserError(f"--array {options.array} must be at least 1.")
    words = [word for name in STUDY_WORDS for word in _words_of(name, getattr(options, name))]
    typed = {"out": str(options.runs / "study"), **_typed("study", [*words, *own])}
    plan = _plan("study", typed, resources, site)
    assert isinstance(plan.settings, StudyConfig)
    arms, folder = chosen_arms(plan.settings), StudyFolder(plan.run)
    with_variants(folder, folder.document(), arms)
    runs = tuple(run_settings(plan.settings, arm, seed) for arm, seed in product(arms, plan.settings.seeds))
    plan = replace(plan, runs=runs)
    require_cache(plan)
    return [plan] * options.array


def _words_of(name: str, values: Sequence[str] | None) -> list[str]:
    return [f"--{name}", *values] if values else []


Planner = Callable[[argparse.Namespace, list[str], Resources, Site], list[Plan]]
PLANNERS: dict[str, Planner] = {
    "teacher": plan_one,
    "distill": plan_one,
    "pipeline": plan_pipeline,
    "study": plan_study,
}


def is_finished(plan: Plan) -> bool:
    """Whether each run was brought to its end with these settings. Raises UserError where one has other settings."""
    finished = [_is_finished(plan, settings) for settings in plan.runs]
    return all(finished)


def _is_finished(plan: Plan, settings: JobConfig) -> bool:
    folder = RunFolder(Path(settings.out))
    if settings.run.start_over or not folder.settings.exists():
        return False
    own = settings.stored()
    facts = {name: value for name, value in read_settings(folder)[1].items() if name not in own}  # such as digests
    cache = Path(settings["cache"] or folder.cache) if plan.kind == "teacher" else None
    wanted = {**facts, **own}
    finished = claim.is_finished(folder, settings.kind, wanted, settings.may_change, settings.completed)
    return finished and (cache is None or cache.exists())
