"""Entry 3: the same student taught in several ways, each with several seeds, to find what its gain comes from.

torchrun --nproc_per_node=4 -m kd_dist.study --cache runs/teacher/logits.h5 --seeds 0 1 2
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from kd_dist import distill, job, tables
from kd_dist.cache import Cache, open_cache
from kd_dist.config import StudyConfig
from kd_dist.dist.endings import StopRequest, launched_rank, run_entry
from kd_dist.dist.runtime import Runtime, joined
from kd_dist.errors import UserError, require_installed
from kd_dist.job import Data
from kd_dist.run.state import read_state
from kd_dist.study import runs
from kd_dist.study.arms import ARMS, Arm
from kd_dist.study.choice import MAY_VARY, chosen_arms, require_alike_crops, require_views
from kd_dist.study.folder import StudyFolder, note, run_settings
from kd_dist.study.online import open_teacher

DESCRIPTION = """Train the same student in several ways (arms), each with several seeds, under one schedule, and compare
them. The same command, typed again, completes a study: finished runs stay, interrupted ones go on. Typed several times
at once, on machines that share a disk or as a job array, it shares the work: each process takes the next free run.
Further arms and seeds may be added. --list shows the arms; NAME=ARM,setting=value makes a variant of one; --grid makes
one for each combination. More commands, each with --help: `table` writes the table and plot of a study again,
`compare` compares two finished runs,
`summary` plots a published study in brief."""
EPILOG = f"""Examples: python -m kd_dist.study --cache runs/teacher/logits.h5 --arms baseline distilled --seeds 0 1 2
--epochs 30; a grid of six arms: --grid alpha=0,0.5,0.9 temperature=2,4; the arm online needs the teacher:
--teacher-model runs/teacher/model.pt; arms of other caches and settings: --arms distilled
ensemble=distilled,cache=runs/both.h5 hot=distilled,temperature=8. A variant may set
{", ".join(MAY_VARY).replace("_", "-")}."""


def main() -> None:
    require_installed("study", "scipy", "matplotlib")
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
    with joined(settings.run.device) as runtime, StopRequest() as stop:
        study(settings, arms, runtime, stop)


def study(settings: StudyConfig, arms: Sequence[Arm], runtime: Runtime, stop: StopRequest) -> None:
    """Train all runs that are not finished and that no other process has; then write and print the results."""
    folder = StudyFolder(Path(settings.out))
    unfinished = runtime.on_main(lambda: _count_unfinished(folder, settings, arms))
    side_by_side = runs.is_side_by_side(settings.side_by_side, unfinished, runtime)
    cache, data, caches = open_inputs(settings, arms, runtime)
    for arm in arms:
        check(settings, arm, data, caches[arm.name], cache, runs.alone(runtime) if side_by_side else runtime)
    teacher = None
    if any(arm.needs_teacher for arm in arms):
        assert settings.teacher_model is not None  # chosen_arms sees to it
        teacher = open_teacher(Path(settings.teacher_model), data, cache, runtime.device)
    runtime.on_main(lambda: note(folder, settings, arms, cache.digest))
    planned = runs.planned(settings, arms, data, caches, teacher)
    if not side_by_side:
        failed = runs.train_all(planned, runtime, stop)
        runtime.on_main(lambda: finish(folder, planned, failed, runtime))
        return
    job.say(runtime, f"side by side: each of {runtime.world_size} ranks trains students of its own")
    failed, sound = runs.train_side_by_side(planned, runtime, stop)
    if runtime.is_main:
        finish(folder, planned, failed, runtime)
    if not sound:  # its own lines say why
        raise SystemExit(1)


def _count_unfinished(folder: StudyFolder, settings: StudyConfig, arms: Sequence[Arm]) -> int:
    states = [read_state(folder.run(arm.name, seed)) or {} for arm in arms for seed in settings.seeds]
    return sum(settings.run.start_over or state.get("status") != "finished" for state in states)


def open_inputs(settings: StudyConfig, arms: Sequence[Arm], runtime: Runtime) -> tuple[Cache, Data, dict[str, Cache]]:
    """The study's cache, the data, and each arm's cache by the arm's name. A file that several arms use is opened
    once.
    """
    paths = {arm.name: Path(run_settings(settings, arm, 0)["cache"]).absolute() for arm in arms}
    own = Path(settings["cache"]).absolute()
    cache, data = distill.open_inputs(settings, runtime)
    assert cache is not None  # a study has one
    opened = {own: cache}
    for path in paths.values():
        if path not in opened:
            opened[path] = open_cache(path, runtime.once_a_node)
            distill.warn_missing_checksum(opened[path], runtime)
    return cache, data, {name: opened[path] for name, path in paths.items()}


def check(settings: StudyConfig, arm: Arm, data: Data, cache: Cache, study_cache: Cache, runtime: Runtime) -> None:
    """Raise UserError where an arm cannot be trained with its cache, before any arm is."""
    if arm.needs_labels and not data.samples.train.is_labelled_N.all():
        raise UserError(f"arm {arm.name} needs every image's label, --unlabelled has none; leave it out by --arms.")
    own = run_settings(settings, arm, settings.seeds[0])
    distill.require_use(own, cache)
    distill.require_cache_fits(own, data, cache)
    distill.require_student(own, data, runtime)
    require_views(arm, cache, own.distillation.views)
    require_alike_crops(own, study_cache)


def finish(
    folder: StudyFolder, planned: Sequence[runs.PlannedRun], failed: Mapping[str, str], runtime: Runtime
) -> None:
    """Write the results; print them unless other processes still train. Raises UserError where runs failed."""
    from kd_dist.study.table import write  # matplotlib and more, which training does not need

    if any(run.is_finished() for run in planned):
        write(folder.path)
    if runs.describe(planned, failed, runtime):
        show(folder)


def show(folder: StudyFolder, as_markdown: bool = False) -> None:
    """Print the study's table."""
    from kd_dist.study.table import text

    tables.show(f"{text(folder.path, as_markdown, tables.terminal_width())}\n\nall columns: {folder.table}")


# ---- commands that train nothing


def _table(words: Sequence[str]) -> None:
    from kd_dist.study.over import over
    from kd_dist.study.table import write

    parser = _Parser("table", "Write a study's table and plot again, from its finished runs, and print the table.")
    parser.add_argument("studies", nargs="+", type=Path, metavar="DIR", help="a study's folder; several with --over")
    parser.add_argument(
        "--over",
        metavar="SETTING",
        help=f"top-1 over a setting instead, table and plot: {', '.join(MAY_VARY).replace('_', '-')}",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(words)
    if options.over:
        tables.show(over(options.over, options.studies, options.markdown, tables.terminal_width()))
        return
    if len(options.studies) > 1:
        raise UserError("several studies have a common table only over a setting; add --over SETTING, such as views.")
    write(options.studies[0])
    show(StudyFolder(options.studies[0]), options.markdown)


def _compare(words: Sequence[str]) -> None:
    from kd_dist.study.results import compare

    parser = _Parser("compare", "Compare two finished runs by the logits that they saved: top-1, McNemar's test.")
    parser.add_argument("a", type=Path, metavar="A", help="a run's folder, such as runs/study/distilled/seed-0")
    parser.add_argument("b", type=Path, metavar="B", help="the other run's folder")
    options = parser.parse_args(words)
    tables.show(compare(options.a, options.b))


def _summary(words: Sequence[str]) -> None:
    from kd_dist.files import read_json, write_bytes
    from kd_dist.study.plots import plot_summary

    parser = _Parser("summary", "Plot a published study in brief: the teacher's top-1 and the primary contrast's arms.")
    parser.add_argument("figures", type=Path, metavar="JSON", help="such as docs/results/imagewoof-cpu.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="the plot to write")
    options = parser.parse_args(words)
    mend = "name a published study, such as docs/results/imagewoof-cpu.json."
    published = read_json(options.figures, mend) or {}
    try:
        study, teacher_top1 = published["study"], published["teacher"]["val_top1"]
        names = study["primary"]["baseline"], study["primary"]["arm"]
        arms = {name: {"top1": [run["top1"] for run in study["arms"][name]["runs"]]} for name in names}
    except (KeyError, TypeError) as error:
        raise UserError(f"{options.figures} has no top-1 of a teacher and two arms; name a published study.") from error
    write_bytes(options.output, plot_summary(arms, teacher_top1))


def _list(words: Sequence[str]) -> None:
    _Parser("--list", "List the built-in arms.").parse_args(words)
    tables.show(tables.plain([(arm.name, arm.isolates) for arm in ARMS.values()], tables.terminal_width()))


class _Parser(argparse.ArgumentParser):
    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"python -m kd_dist.study {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows how to use it.")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "table": _table,
    "compare": _compare,
    "summary": _summary,
    "--list": _list,
}


if __name__ == "__main__":
    run_entry(main)
