"""A study's results as its table, the sentences beneath it, and its files: table.md, results.json, plot.png."""

import json
from pathlib import Path

from kd_dist import tables
from kd_dist.files import write_bytes, writing
from kd_dist.lock import locked
from kd_dist.study.arms import BASELINES, BUG_CHECK, DISTILLED, ONLINE
from kd_dist.study.cost import cost_of, sentences
from kd_dist.study.folder import StudyFolder
from kd_dist.study.over import over_grid
from kd_dist.study.plots import plot
from kd_dist.study.results import ENOUGH_SEEDS, METRICS, ArmRuns, Study, contrast, read_study
from kd_dist.study.statistics import Difference
from kd_dist.tables import counted

BUG_CHECK_LIMIT = 0.01  # of top-1
_ABSENT = "-"
_ON_A_TERMINAL = (0, 2, 3, 4, 6, 9)  # the columns that a terminal has room for; table.md has all


def write(out: Path) -> None:
    """Write OUT/table.md, results.json and plot.png, each in place of an earlier one; for a grid, plots over its
    settings. Several processes may do so: the last one to finish a run looks at all runs.
    """
    read_study(out)  # what is not a study is refused before anything is written there
    folder = StudyFolder(out)
    with writing(folder.table), locked(folder.lock):
        study = read_study(out)
        write_bytes(folder.table, (_text(study, True, None) + "\n").encode())
        figures = study.figures() | {"cache": cost_of(study.cache)}
        write_bytes(folder.figures, (json.dumps(figures, indent=2) + "\n").encode())
        # The bug check is far below the others and would compress their scale: it is in the table alone.
        drawn = [arm for name, arm in study.arms.items() if arm.finished and name != BUG_CHECK]
        values = {arm.name: {metric: arm.values(metric) for metric in METRICS} for arm in drawn}
        write_bytes(folder.plot, plot(values, study.best_baseline, study.scored_on))
        for setting, png in over_grid(study)[1].items():
            write_bytes(folder.plot_over(setting), png)


def text(out: Path, as_markdown: bool = True, width: int | None = None) -> str:
    """The study's table and the sentences beneath it: as Markdown, whole (width None), or the main columns for a
    terminal of this width.
    """
    return _text(read_study(out), as_markdown, width)


def _text(study: Study, as_markdown: bool, width: int | None) -> str:
    baseline = f"minus {study.best_baseline or 'baseline'}"
    head = (
        *("arm", "what it isolates", "seeds", "top-1, %", "agreement, %", "calibration error"),
        *(f"{baseline}, points (paired)", "(Welch)", "(images resampled too)", "p (Holm)"),
    )
    rows = [head, *(_row(study, arm) for arm in study.arms.values())]
    if width is not None and not as_markdown:
        rows = [tuple(row[column] for column in _ON_A_TERMINAL) for row in rows]
    shown = tables.markdown if as_markdown else lambda rows: tables.plain(rows, width)
    beneath = "\n".join(f"- {sentence}" for sentence in _sentences(study))
    return "\n\n".join([shown(rows), beneath, *map(shown, over_grid(study)[0])])


def _row(study: Study, arm: ArmRuns) -> tuple[str, ...]:
    seeds = f"{len(arm.finished)}" if arm.complete else f"incomplete, {len(arm.finished)} of {len(arm.runs) or '?'}"
    figures = ((arm.spread("top1"), 2, 100), (arm.spread("agreement"), 2, 100), (arm.spread("calibration_error"), 3, 1))
    cells = (found.text(digits, scale) if found else _ABSENT for found, digits, scale in figures)
    return (arm.name, arm.isolates, seeds, *cells, *_contrast_cells(study, arm))


def _contrast_cells(study: Study, arm: ArmRuns) -> tuple[str, ...]:
    found = study.contrasts.get(arm.name)
    if arm.name == study.best_baseline:
        return ("best baseline", "", "", "")
    if found is None:
        return (_ABSENT,) * 4
    intervals = [_points(kind) for kind in (found.paired, found.welch, found.resampled)]
    if found is study.primary_contrast:
        p = f"**primary: {_p(found.paired)}**"
    else:
        p = f"{study.corrected[arm.name]:.2g}" if arm.name in study.corrected else _ABSENT
    if found.paired is None:
        intervals[0] = f"{100 * found.mean:+.2f} (no interval{'' if found.shared_seeds else ', no shared seed'})"
    return (*intervals, p)


def _sentences(study: Study) -> list[str]:
    distilled, online = (
        study.complete[name].seconds if name in study.complete else None for name in (DISTILLED, ONLINE)
    )
    return [
        "Mean ± standard deviation over seeds; 95 % intervals. Paired and Welch: other seeds, the same images. Images "
        "resampled too: other seeds, other images.",
        *([] if study.scored_on == "val" else [f"Scored on {study.scored_on} (--tune), not on val."]),
        *_about_baseline(study),
        *_about_primary(study),
        *_about_fewer_labels(study),
        *_about_incomplete(study),
        *_about_bug_check(study),
        *_about_caches(study),
        *sentences(cost_of(study.cache), distilled, online),
    ]


def _about_baseline(study: Study) -> list[str]:
    if study.best_baseline is None:
        return ["No baseline has finished, so there is no difference to show."]
    others = [name for name in study.baselines if name != study.best_baseline]
    rest = ", ".join(f"{name}{_left_out(study, name, study.arms[study.best_baseline])}" for name in others)
    best = study.arms[study.best_baseline].mean_top1
    higher = [name for name in others if name in study.complete and study.arms[name].mean_top1 > best]
    why = "Choosing the best one can only make a gain look smaller."
    if higher:
        why = f"With more seeds, {', '.join(higher)} may turn out better, and every gain smaller."
    return [f"{study.best_baseline} is the best baseline by mean top-1 (the others: {rest}). {why}"]


def _left_out(study: Study, name: str, best: ArmRuns) -> str:
    """Why a baseline was not considered, in brackets; empty where it was."""
    if name not in study.arms:
        return " (not in this study)"
    if name not in study.complete:
        return " (not complete)"
    arm = study.arms[name]
    if arm.labelled != best.labelled:
        return " (fewer labels)"
    return " (fewer seeds)" if len(arm.finished) < min(ENOUGH_SEEDS, len(best.finished)) else ""


def _about_caches(study: Study) -> list[str]:
    own = [name for name, arm in study.arms.items() if "cache" in arm.own]
    return [f"Agreement of {', '.join(own)} is with the teacher of its own cache."] if own else []


def _about_primary(study: Study) -> list[str]:
    one, (arm, baseline) = study.primary_contrast, study.primary
    if one is None:
        missing = ", ".join(name for name in (arm, baseline) if name not in study.complete)
        return [f"Primary contrast ({arm} minus {baseline}) not computed; incomplete: {missing}."]
    named = "named beforehand" if study.document.get("primary") else "this program's default"
    intervals = ", ".join(
        f"{name} {_points(kind)} p {_p(kind)}" for name, kind in (("paired", one.paired), ("Welch", one.welch))
    )
    return [
        f"**Primary contrast** ({named}, no multiplicity correction): {arm} minus {baseline} = {100 * one.mean:+.2f} "
        f"points over {counted(one.shared_seeds, 'shared seed')}. 95 % intervals: {intervals}; bootstrap over seeds "
        f"and images {_points(one.resampled)}. The p values of the other arms come from paired tests with Holm's "
        "correction."
    ]


def _about_fewer_labels(study: Study) -> list[str]:
    """Each arm on a fraction of the labels minus the best baseline on the same fraction."""
    found = []
    for arm in study.complete.values():
        baseline = study.best_baseline_at(arm.labelled)
        if arm.labelled == 1 or arm.name in study.baselines or baseline is None:
            continue
        one = contrast(arm, study.arms[baseline])
        points = _points(one.paired) if one.paired else f"{100 * one.mean:+.2f}"
        kind = "paired" if one.paired else "no interval"
        found.append(f"On {arm.labelled:g} of the labels: {arm.name} minus {baseline}, {points} points ({kind}).")
    return found


def _about_incomplete(study: Study) -> list[str]:
    asked = set(study.document.get("seeds") or ())
    notes = {
        "Incomplete, so not tested": [arm.name for arm in study.arms.values() if not arm.complete],
        f"Fewer seeds than the study names ({', '.join(map(str, sorted(asked)))})": [
            name for name, arm in study.complete.items() if asked - arm.finished.keys()
        ],
        f"Fewer than two seeds shared with {study.best_baseline}, so no interval over seeds": [
            name for name, one in study.contrasts.items() if one.shared_seeds < 2
        ],
        "The differences of the seeds are equal, so there is no paired interval": [
            name for name, one in study.contrasts.items() if one.shared_seeds > 1 and one.paired is None
        ],
    }
    return [f"{what}: {', '.join(names)}." for what, names in notes.items() if names]


def _about_bug_check(study: Study) -> list[str]:
    one, baseline = study.bug_check, BASELINES[0]
    if one is None:
        return [f"No bug check: {BUG_CHECK} or {baseline} is not complete."] if BUG_CHECK in study.arms else []
    if one.upper_bound is None:
        return [f"Bug check: {BUG_CHECK} minus {baseline} is {100 * one.mean:+.2f} points, without a bound."]
    passed = "passed: below" if one.upper_bound < BUG_CHECK_LIMIT else "NOT PASSED: not below"
    return [
        f"Bug check: the upper 95 % bound (one-sided, paired) of {BUG_CHECK} minus {baseline} is "
        f"{100 * one.upper_bound:+.2f} points; {passed} {100 * BUG_CHECK_LIMIT:+g}."
    ]


def _points(found: Difference | None) -> str:
    if found is None:
        return _ABSENT
    low, high = found.interval
    return f"{100 * found.mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _p(found: Difference | None) -> str:
    return _ABSENT if found is None else f"{found.p:.2g}"
