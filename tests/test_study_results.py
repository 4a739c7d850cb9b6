"""A study's results from run folders made up by hand: the numbers are those of the files, what is missing is said."""

import json
import re
import shutil

import h5py
import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from kd_dist.errors import UserError
from kd_dist.run.claim import claim
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import CACHE_SECONDS, append_metrics, note_cost
from kd_dist.run.results import write_val_logits
from kd_dist.run.state import write_state
from kd_dist.study import results, table
from kd_dist.study.cost import cost_of, duration, run_seconds
from kd_dist.study.statistics import resampled

N, K = 40, 4
LABELS_N = np.arange(N) % K
WRONG = {  # how many of the 40 val images each seed's run gets wrong
    "baseline": (12, 14, 10),
    "baseline-cached": (16, 15, 14),
    "shuffled-all": (20, 21, 19),
    "distilled": (6, 4, 2),
    "online": (5, 5, 3),
}


def right(seed, wrong):
    """On which images a made-up network is right: not on the first `wrong` from 3 * seed on."""
    return (np.arange(N) - 3 * seed) % N >= wrong


def make_run(
    out, arm, seed, wrong, *, fingerprint="f" * 64, status="finished", epoch_s=10.0, epochs=(0.5, 0.6), **facts
):
    """A run's folder of three epochs."""
    folder = RunFolder(out / arm / f"seed-{seed}")
    settings = {"epochs": 3, "alpha": 0.9, "cache": "c.h5", "views": None, "seed": seed, **facts}
    claim(folder, "student", settings, set(), False)
    clock = {"epoch_s": epoch_s} if epoch_s is not None else {}
    for epoch, top1 in enumerate((*epochs, 1 - wrong / N), 1):
        row = {"step": epoch, "epoch": epoch, "val_top1": top1, "val_agreement": 0.9 - seed / 100, **clock}
        append_metrics(folder, row)
    classes_N = (LABELS_N + ~right(seed, wrong)) % K
    write_state(folder, status)
    if status == "finished":
        logits_NK = 2.0 * np.eye(K)[classes_N]
        write_val_logits(folder.val_logits, logits_NK, LABELS_N, ["x"] * N, fingerprint, top1=0.5)
    return folder


def make_teacher(folder, epoch_s=100.0, writing_s=50.0):
    """A teacher's folder with a cache of 1,000 bytes."""
    teacher = RunFolder(folder)
    claim(teacher, "teacher", {}, set(), False)
    for epoch in (1, 2):
        append_metrics(teacher, {"step": epoch, "epoch": epoch, "val_top1": 0.5, "epoch_s": epoch_s})
    note_cost(teacher, CACHE_SECONDS, writing_s)
    teacher.cache.write_bytes(b"x" * 1000)
    return teacher


def describe(out, **facts):
    (out / "study.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "study"
    for arm, wrong_S in WRONG.items():
        for seed, wrong in enumerate(wrong_S):
            make_run(out, arm, seed, wrong, epoch_s=40.0 if arm == "online" else 10.0)
    make_teacher(out.with_name("teacher"))
    return out.parent


@pytest.fixture
def study(made_once, tmp_path):
    """Five arms of three seeds, beside a teacher that noted its costs; a copy to change."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    out, cache = tmp_path / "study", tmp_path / "teacher" / "logits.h5"
    describe(out, cache=str(cache), primary=["distilled", "baseline"], settings={"epochs": 3})
    return out


def rows_of(text):
    """{arm: [cells]} of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells}


def line_of(text, start):
    return next(line for line in text.splitlines() if line.removeprefix("- ").startswith(start))


def shares(arm):
    return 1 - np.array(WRONG[arm]) / N


# ----------------------------------------------------------------------------------------------------------- the table


def test_means_and_deviations_are_those_of_the_val_logits(study):
    rows = rows_of(table.text(study))
    assert set(WRONG) < set(rows)
    assert rows["distilled"][2:5] == ["3", "90.00 ± 5.00", "89.00 ± 1.00"]
    # A logit of 2 among 4 classes is a confidence of e^2 / (e^2 + 3).
    confidence = np.exp(2) / (np.exp(2) + 3)
    errors = np.abs(shares("distilled") - confidence)
    assert rows["distilled"][5] == f"{errors.mean():.3f} ± {errors.std(ddof=1):.3f}"


def test_differences_are_to_the_best_baseline(study):
    rows = rows_of(table.text(study))
    assert rows["arm"][6].startswith("minus baseline,") and rows["baseline"][6] == "best baseline"
    for arm in ("baseline-cached", "shuffled-all", "online", "distilled"):
        a_S, b_S = shares(arm), shares("baseline")
        for cell, theirs in zip(
            rows[arm][6:8], (stats.ttest_rel(a_S, b_S), stats.ttest_ind(a_S, b_S, equal_var=False)), strict=True
        ):
            low, high = 100 * np.array(theirs.confidence_interval(0.95))
            assert cell == f"{100 * (a_S - b_S).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        hits = [np.stack([right(seed, WRONG[name][seed]) for seed in range(3)]) for name in (arm, "baseline")]
        low, high = 100 * np.array(resampled(*hits).interval)
        assert rows[arm][8] == f"{100 * (a_S - b_S).mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def test_the_better_baseline_is_chosen(study):
    for seed in range(3):
        make_run(study, "baseline-cached-better", seed, 1)
    for seed in range(3):
        (study / "baseline-cached" / f"seed-{seed}").rename(study / f"kept-{seed}")
        (study / "baseline-cached-better" / f"seed-{seed}").rename(study / "baseline-cached" / f"seed-{seed}")
    text = table.text(study)
    assert rows_of(text)["arm"][6].startswith("minus baseline-cached,")
    assert "baseline-cached is the best baseline" in text
    # The contrast named beforehand keeps its baseline, and the row's own difference is then corrected like any other.
    assert "distilled minus baseline = +20.00 points over 3 shared seeds" in line_of(text, "**Primary")
    assert "primary" not in rows_of(text)["distilled"][9]


def test_a_variant_of_a_baseline_is_one_too(study):
    primary = {"primary": ["distilled", "baseline"], "cache": str(study)}
    for seed in range(3):
        make_run(study, "steep", seed, 1, **{"base arm": "baseline"})
        make_run(study, "hot", seed, 0, **{"base arm": "distilled"})
    for noted in ({"steep": "baseline,lr=0.1", "hot": "distilled,temperature=8.0"}, {}):  # lost: the runs know it
        describe(study, variants=noted, **primary)
        text = table.text(study)
        assert rows_of(text)["arm"][6].startswith("minus steep,") and "(the others: baseline, baseline-cached)" in text
    for seed in (1, 2):
        shutil.rmtree(study / "steep" / f"seed-{seed}")
    text = table.text(study)
    assert rows_of(text)["arm"][6].startswith("minus baseline,")
    assert "(the others: baseline-cached, steep (fewer seeds))" in text
    assert "**primary: " in rows_of(text)["distilled"][9]


def test_the_primary_contrast_is_marked_and_the_rest_corrected(study):
    rows = rows_of(table.text(study))
    p = {arm: stats.ttest_rel(shares(arm), shares("baseline")).pvalue for arm in WRONG if arm != "baseline"}
    assert rows["distilled"][9] == f"**primary: {p['distilled']:.2g}**"
    rest = sorted((value, arm) for arm, value in p.items() if arm != "distilled")
    floor = 0.0
    for factor, (value, arm) in zip((3, 2, 1), rest, strict=True):
        floor = max(floor, min(1.0, factor * value))
        assert rows[arm][9] == f"{floor:.2g}"


def test_no_other_baseline_replaces_the_one_named_beforehand(tmp_path):
    """A baseline chosen by the figures would have an uncorrected p."""
    out = tmp_path / "study"
    for arm in ("baseline-cached", "distilled"):
        for seed, wrong in enumerate(WRONG[arm]):
            make_run(out, arm, seed, wrong)
    for facts in ({"primary": ["distilled", "baseline"]}, {}):
        describe(out, **facts)
        text = table.text(out)
        assert "- Primary contrast (distilled minus baseline) not computed; incomplete: baseline." in text
        assert "primary" not in rows_of(text)["distilled"][9] and "(the others: baseline (not in this study))" in text


def test_a_baseline_of_three_seeds_counts_beside_arms_of_five(study):
    """The two arms that a study is for have five seeds, the others three."""
    for seed in (3, 4):
        make_run(study, "baseline", seed, 12)
        make_run(study, "distilled", seed, 4)
    for seed in range(3):
        make_run(study, "steep", seed, 8, **{"base arm": "baseline"})
    text = table.text(study)
    assert rows_of(text)["arm"][6].startswith("minus steep,") and "can only make a gain look smaller" in text
    shutil.rmtree(study / "steep" / "seed-2")
    text = table.text(study)
    assert rows_of(text)["arm"][6].startswith("minus baseline,")
    assert "steep (fewer seeds)). With more seeds, steep may turn out better, and every gain smaller." in text


def test_a_difference_is_over_the_seeds_that_both_arms_have(study):
    make_run(study, "distilled", 3, 40)  # a seed that the baseline does not have
    found = results.read_study(study)
    one = results.contrast(found.arms["distilled"], found.arms["baseline"])
    assert (
        one.mean == pytest.approx(one.paired.mean) == pytest.approx((shares("distilled") - shares("baseline")).mean())
    )
    assert one.welch.mean < one.mean


def test_arms_on_fewer_labels_are_set_against_their_like(study):
    for seed in range(3):
        make_run(study, "hard-tenth", seed, 30 + seed, label_fraction=0.1, **{"base arm": "baseline"})
        make_run(study, "tenth", seed, 10 + 2 * seed, label_fraction=0.1, **{"base arm": "distilled"})
    text = table.text(study)
    assert "- On 0.1 of the labels: tenth minus hard-tenth, +47.50 [" in text
    assert rows_of(text)["arm"][6].startswith("minus baseline,") and "hard-tenth (fewer labels)" in text


def test_the_bug_check(study):
    low_bound = stats.ttest_rel(shares("shuffled-all"), shares("baseline"), alternative="less")
    high = 100 * low_bound.confidence_interval(0.95).high
    assert f"{high:+.2f} points; passed: below +1" in line_of(table.text(study), "Bug check")
    for seed in range(3):
        (study / "distilled" / f"seed-{seed}" / "val_logits.h5").rename(
            study / "shuffled-all" / f"seed-{seed}" / "val_logits.h5"
        )
        make_run(study, "distilled", seed + 3, 4)
    assert "NOT PASSED" in line_of(table.text(study), "Bug check")


def test_an_incomplete_arm_is_shown_and_not_tested(study):
    make_run(study, "online", 3, 5, status="running")
    describe(study, arms=[*WRONG, "no-gradient"], seeds=[0, 1, 2])
    text = table.text(study)
    rows = rows_of(text)
    assert rows["online"][2] == "incomplete, 3 of 4" and rows["online"][3] == "89.17 ± 2.89"
    assert rows["online"][6:] == ["-"] * 4 and rows["no-gradient"][2:] == ["incomplete, 0 of ?", *["-"] * 7]
    assert line_of(text, "Incomplete").endswith("online, no-gradient.")


def test_fewer_than_two_seeds_have_no_interval_over_seeds(tmp_path):
    out = tmp_path / "study"
    for arm in ("baseline", "distilled"):
        make_run(out, arm, 0, WRONG[arm][0])
    describe(out, seeds=[0, 1])
    text = table.text(out)
    assert rows_of(text)["distilled"][3] == "85.00" and rows_of(text)["distilled"][6:9] == [
        "+15.00 (no interval)",
        "-",
        "-",
    ]
    assert "Fewer than two seeds" in text and set(WRONG) & set(
        re.findall(r"[\w-]+", line_of(text, "Fewer seeds than the study names (0, 1)"))
    ) == {"baseline", "distilled"}


def test_without_a_complete_baseline_nothing_is_compared(tmp_path):
    out = tmp_path / "study"
    make_run(out, "distilled", 0, 4)
    make_run(out, "baseline", 0, 4, status="interrupted")
    text = table.text(out)
    assert "No baseline has finished, so there is no difference to show." in text
    assert rows_of(text)["distilled"][6:] == ["-"] * 4


def test_runs_on_other_val_images_are_refused(study):
    make_run(study, "distilled", 3, 4, fingerprint="e" * 64)
    with pytest.raises(UserError, match="eeeeeeeeeeee") as refusal:
        table.text(study)
    assert "ffffffffffff" in str(refusal.value)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        table.text(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the files


def test_write_leaves_table_figures_and_plot(study):
    table.write(study)
    table.write(study)  # in place of the first, not beside it
    assert (study / "table.md").read_text() == table.text(study) + "\n"
    figures = json.loads((study / "results.json").read_text())
    assert figures["arms"]["distilled"]["top1"]["mean"] == pytest.approx(0.9)
    assert [run["top1"] for run in figures["arms"]["online"]["runs"]] == pytest.approx(list(shares("online")))
    assert figures["primary"]["paired"]["p"] == pytest.approx(
        stats.ttest_rel(shares("distilled"), shares("baseline")).pvalue
    )
    assert figures["cache"] == {"training_s": 200.0, "writing_s": 50.0, "bytes": 1000}
    assert (study / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(study.glob(".*tmp"))


@pytest.mark.parametrize("of", ["val", "part 0 of 10 of train"])
def test_the_plot_says_what_was_scored(study, monkeypatch, of):
    for file in study.glob("*/*/val_logits.h5"):
        with h5py.File(file, "r+") as opened:
            opened.attrs["of"] = of
    said = []
    original = Axes.set_xlabel
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text: said.append(text) or original(self, text))
    table.write(study)
    assert said[0] == f"top-1 on {of}, %"


def test_a_terminal_has_the_main_columns_and_a_pipe_the_whole_table(study):
    narrow = table.text(study, as_markdown=False, width=80).split("\n\n")[0]
    assert max(map(len, narrow.splitlines())) <= 80 and "(Welch)" not in narrow and "+20.00" in narrow
    whole = table.text(study, as_markdown=False)
    assert len(whole.split("\n\n")[0].splitlines()) == len(WRONG) + 1 and "90.00 ± 5.00" in whole


def test_what_is_not_a_study_is_not_written_to(tmp_path):
    with pytest.raises(UserError, match="holds no runs"):
        table.write(tmp_path)
    assert not [*tmp_path.iterdir()]


# ----------------------------------------------------------------------------------------------------------- break-even


def test_break_even_of_a_whole_study(study):
    """Online takes 3 x 40 s, distilled 3 x 10 s: 90 s saved against 50 s of writing."""
    text = table.text(study)
    assert "Writing the cache took 50 s, training its teacher 3 min; the cache has 1,000 bytes; a distilled" in text
    assert "With the teacher in the loop a student takes 2 min: the cache pays after 1 student." in text


def test_a_teacher_in_the_loop_that_is_faster_never_pays(study):
    for seed in range(3):
        make_run(study, "distilled", seed + 3, 4, epoch_s=1000.0)
    assert "the cache never pays." in table.text(study)


def test_unknown_costs_are_said_to_be_unknown(study, tmp_path):
    describe(study, cache=str(tmp_path / "elsewhere.h5"))
    text = table.text(study)
    assert "Writing the cache took an unknown time, training its teacher an unknown time; the cache has an unk" in text
    assert "With the teacher in the loop" not in text
    make_run(study, "distilled", 3, 4, epoch_s=None)
    assert "a distilled student takes an unknown time" in table.text(study)


def test_a_cache_of_another_name_has_no_costs_of_the_teacher_beside_it(study, tmp_path):
    other = tmp_path / "teacher" / "combined.h5"
    other.write_bytes(b"xy")
    assert cost_of(other) == {"training_s": None, "writing_s": None, "bytes": 2}
    assert cost_of(tmp_path / "teacher" / "logits.h5")["writing_s"] == 50.0


def test_a_pause_of_the_machine_is_not_a_cost_of_the_method():
    assert run_seconds([{"epoch_s": seconds} for seconds in (10.0, 600.0, 12.0, None)]) == 4 * 12.0
    assert run_seconds([{}, {}]) is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "an unknown time"), (4.23, "4.23 s"), (150, "2 min"), (3600, "60 min"), (11100, "3 h 05 min")],
)
def test_durations_as_one_says_them(seconds, shown):
    assert duration(seconds) == shown


# --------------------------------------------------------------------------------------------------------- any two runs


def test_compare_two_runs(study):
    """Seed 0: baseline is wrong on images 0 to 11, distilled on 0 to 5; where both are wrong, on the same class."""
    text = results.compare(study / "distilled" / "seed-0", study / "baseline" / "seed-0")
    assert "top-1 85.00 %" in text and "top-1 70.00 %" in text
    assert "A minus B on 40 images of val: +15.00 points" in text
    low, high = (float(end) for end in re.search(r"\[([-+][\d.]+), ([-+][\d.]+)\]", text).groups())
    assert 2.5 <= low <= 7.5 and 22.5 <= high <= 30
    assert f"only A is right on 6 images, only B on 0: p = {2 / 64:.2g}" in text
    assert "both put 85.0 % of the images in the same class" in text


def test_compare_refuses_other_val_images_and_unfinished_runs(study):
    other = make_run(study, "other", 0, 4, fingerprint="e" * 64)
    with pytest.raises(UserError, match="eeeeeeeeeeee") as refusal:
        results.compare(study / "distilled" / "seed-0", other.path)
    assert "ffffffffffff" in str(refusal.value)
    cut = make_run(study, "other", 1, 4, status="interrupted")
    with pytest.raises(UserError, match=r"seed-1/val_logits.h5; finish the run first"):
        results.compare(cut.path, study / "distilled" / "seed-0")
