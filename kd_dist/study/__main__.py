"""Entry 3: the same student taught in several ways, each with several seeds, to tell what its gain comes from.

torchrun --nproc_per_node=4 -m kd_dist.study --cache runs/teacher/logits.h5 --seeds 0 1 2
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kd_dist import checkpoint, distill, job
from kd_dist.cache import Cache, open_cache
from kd_dist.checkpoint import RunFolder
from kd_dist.config import StudyConfig
from kd_dist.errors import UserError
from kd_dist.files import locked
from kd_dist.job import Data
from kd_dist.runtime import Interrupted, Runtime, StopRequest, joined, launched_rank, run_entry
from kd_dist.study.arms import ARMS, Arm
from kd_dist.study.choice import MAY_VARY, chosen_arms, require_alike_crops, require_views
from kd_dist.study.folder import MADE_OF, StudyFolder, note, run_settings
from kd_dist.study.online import OnlineTeacher, open_teacher

DESCRIPTION = """Train the same student in several ways (arms), each with several seeds, under one schedule, and compare
them. Finished runs are not run again and interrupted ones go on, so the same command, typed again, completes a study;
typed on two machines that share a disk, it shares the work. Further arms and seeds may be added. --list shows the arms;
NAME=ARM,setting=value makes another out of one of them. More commands: `table OUT` writes the table and plot of a study
anew, `compare A B` tells two finished runs apart, `sweep views OUT` plots top-1 over a setting that arms differ in, of
several studies if these are named."""
EPILOG = f"""Examples: python -m kd_dist.study --cache runs/teacher/logits.h5 --arms hard-fresh cached-V --seeds 0 1 2
--epochs 30; the arm online needs the teacher: --teacher-model runs/teacher/model.pt; arms of other caches and settings:
--arms cached-V ensemble=cached-V,cache=runs/both.h5 hot=cached-V,temperature=8. A variant may set
{", ".join(MAY_VARY).replace("_", "-")}."""


def main() -> None:
    words = sys.argv[1:]
    command = COMMANDS.get(words[0]) if words else None
    if command:
        if launched_rank() == 0:
            command(words[1:])
        return
    settings = job.read_config(StudyConfig, "kd_dist.study", DESCRIPTION, EPILOG)
    arms = chosen_arms(settings)
    settings = settings.changed(seeds=tuple(dict.fromkeys(settings.seeds)))
    distill.require_known(settings.distillation)
    with joined(settings.device) as runtime, StopRequest() as stop:
        study(settings, arms, runtime, stop)


def study(settings: StudyConfig, arms: Sequence[Arm], runtime: Runtime, stop: StopRequest) -> None:
    """All runs that are not finished, one after the other, a seed's arms together; then the results.

    Runs that another process is at are left to it: the same command on two machines shares the work.
    """
    cache, data = distill.open_inputs(settings, runtime)
    caches = caches_of(settings, arms, data, cache, runtime)
    online = None
    if any(arm.needs_teacher for arm in arms):
        online = open_teacher(Path(settings.teacher_model), data, cache, runtime.device)
    folder = StudyFolder(Path(settings.out))
    runtime.on_main(lambda: note(folder, settings, arms, cache.digest))
    ours = 0
    for seed in settings.seeds:
        for arm in arms:
            if any(signals := runtime.gather(stop.signal or 0)):
                raise Interrupted(max(signals))
            teacher = online if arm.needs_teacher else None
            ours += run(settings, arm, seed, data, caches[arm.name], teacher, runtime, stop)
    if not ours:
        raise UserError(f"another process is at all runs that are left in {folder.path}; wait for it.")
    runtime.on_main(lambda: show(folder))


def caches_of(
    settings: StudyConfig, arms: Sequence[Arm], data: Data, cache: Cache, runtime: Runtime
) -> dict[str, Cache]:
    """Each arm's cache by the arm's name; a file that several learn from is opened once. Raises UserError, before
    anything is trained, where an arm cannot use its own.
    """
    of_arm = {arm.name: run_settings(settings, arm, settings.seeds[0]) for arm in arms}
    paths = {name: Path(own.cache).absolute() for name, own in of_arm.items()}
    opened = {Path(settings.cache).absolute(): cache}
    for arm in arms:
        own, path = of_arm[arm.name], paths[arm.name]
        if path not in opened:
            opened[path] = open_cache(path, runtime.once_a_node)
            distill.warn_missing_checksum(opened[path], runtime)
        distill.require_use(own, opened[path])
        distill.require_cache_fits(own, data, opened[path])
        distill.require_student(own, data, runtime)
        require_views(arm, opened[path], own.views)
        require_alike_crops(own, cache)
    return {name: opened[path] for name, path in paths.items()}


def run(
    study_settings: StudyConfig,
    arm: Arm,
    seed: int,
    data: Data,
    cache: Cache,
    online: OnlineTeacher | None,
    runtime: Runtime,
    stop: StopRequest,
) -> bool:
    """One student of an arm, unless it is finished. False where another process is at it."""
    settings = run_settings(study_settings, arm, seed)
    folder = RunFolder(Path(settings.out))
    identity = {
        "study arm": arm.name,
        **({MADE_OF: arm.made_of} if arm.made_of else {}),
        **({"teacher weights": online.digest} if online else {}),
    }
    stored = job.stored_settings(settings, data, **distill.learned_from(settings, cache), **identity)
    if not settings.start_over and runtime.on_main(
        lambda: checkpoint.is_finished(folder, settings.kind, stored, settings.may_change, settings.completed)
    ):
        job.say(runtime, f"{arm.name}, seed {seed}: finished already")
        return True
    if runtime.on_main(lambda: checkpoint.in_use(folder)):
        job.say(runtime, f"{arm.name}, seed {seed}: another process is at it, left to it")
        return False
    job.say(runtime, f"{arm.name}, seed {seed}: {arm.isolates}")
    distill.run(settings, data, cache, runtime, rows=arm.rows, loss=online or arm.loss, stop=stop, **identity)
    return True


def show(folder: StudyFolder) -> None:
    """Write the study's table and plot, and print the table."""
    from kd_dist.study.results import write, writing  # needs scipy and more, which train nobody

    with writing(folder.path), locked(folder.lock):  # of several processes, the last to finish a run looks at all runs
        write(folder.path)
    print(folder.table.read_text(encoding="utf-8"), flush=True)


def _table(words: Sequence[str]) -> None:
    from kd_dist.study.results import read_study

    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("name one study's folder: python -m kd_dist.study table runs/study.")
    read_study(Path(words[0]))  # refuses what is no study before anything is written there
    show(StudyFolder(Path(words[0])))


def _compare(words: Sequence[str]) -> None:
    from kd_dist.study.results import compare

    if len(words) != 2 or words[0].startswith("-"):
        raise UserError("name two runs' folders: python -m kd_dist.study compare runs/a runs/b.")
    print(compare(*map(Path, words)), flush=True)


def _sweep(words: Sequence[str]) -> None:
    from kd_dist.study.sweep import sweep

    if len(words) < 2 or words[0].startswith("-"):
        raise UserError("name a setting and studies' folders: python -m kd_dist.study sweep views runs/study.")
    print(sweep(words[0], [*map(Path, words[1:])]), flush=True)


def _list(_words: Sequence[str]) -> None:
    width = max(map(len, ARMS))
    print("\n".join(f"{arm.name:{width}}  {arm.isolates}" for arm in ARMS.values()), flush=True)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "table": _table,
    "sweep": _sweep,
    "compare": _compare,
    "--list": _list,
}


if __name__ == "__main__":
    run_entry(main)
