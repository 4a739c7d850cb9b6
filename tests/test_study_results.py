"""A study's results from run folders made up by hand: the numbers are those of the files, what is missing is said."""

import json
import re
import shutil

import h5py
import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from kd_dist.checkpoint import (
    CACHE_SECONDS,
    RunFolder,
    append_metrics,
    claim,
    note_cost,
    write_state,
    write_val_logits,
)
from kd_dist.errors import UserError
from kd_dist.study import results
from kd_dist.study.breakeven import Student, cost_of, duration, sentences, students_to_pay
from kd_dist.study.statistics import resampled

N, K = 40, 4
LABELS_N = np.arange(N) % K
WRONG = {  # how many of the 40 val images each seed's run gets wrong
    "hard-fresh": (12, 14, 10),
    "hard-cached": (16, 15, 14),
    "shuffled-all": (20, 21, 19),
    "cached-V": (6, 4, 2),
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
    describe(out, cache=str(cache), primary=["cached-V", "hard-fresh"], settings={"epochs": 3})
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
    rows = rows_of(results.table(study))
    assert set(WRONG) < set(rows)
    assert rows["cached-V"][2:5] == ["3", "90.00 ± 5.00", "89.00 ± 1.00"]
    # A logit of 2 among 4 classes is a confidence of e^2 / (e^2 + 3).
    confidence = np.exp(2) / (np.exp(2) + 3)
    errors = np.abs(shares("cached-V") - confidence)
    assert rows["cached-V"][5] == f"{errors.mean():.3f} ± {errors.std(ddof=1):.3f}"


def test_differences_are_to_the_best_hard_twin(study):
    rows = rows_of(results.table(study))
    assert rows["arm"][6].startswith("less hard-fresh") and rows["hard-fresh"][6] == "best hard twin"
    for arm in ("hard-cached", "shuffled-all", "online", "cached-V"):
        a_S, b_S = shares(arm), shares("hard-fresh")
        for cell, theirs in zip(
            rows[arm][6:8], (stats.ttest_rel(a_S, b_S), stats.ttest_ind(a_S, b_S, equal_var=False)), strict=True
        ):
            low, high = 100 * np.array(theirs.confidence_interval(0.95))
            assert cell == f"{100 * (a_S - b_S).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        hits = [np.stack([right(seed, WRONG[name][seed]) for seed in range(3)]) for name in (arm, "hard-fresh")]
        low, high = 100 * np.array(resampled(*hits).interval)
        assert rows[arm][8] == f"{100 * (a_S - b_S).mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def test_the_better_twin_is_chosen(study):
    for seed in range(3):
        make_run(study, "hard-cached-better", seed, 1)
    for seed in range(3):
        (study / "hard-cached" / f"seed-{seed}").rename(study / f"kept-{seed}")
        (study / "hard-cached-better" / f"seed-{seed}").rename(study / "hard-cached" / f"seed-{seed}")
    text = results.table(study)
    assert rows_of(text)["arm"][6].startswith("less hard-cached")
    assert "hard-cached is the best hard twin" in text
    # The contrast named beforehand keeps its twin, and the row's own difference is then corrected like any other.
    assert "cached-V less hard-fresh, 3 shared seeds, +20.00 points" in line_of(text, "**Primary")
    assert "primary" not in rows_of(text)["cached-V"][9]


def test_a_variant_of_a_hard_twin_is_one_too(study):
    primary = {"primary": ["cached-V", "hard-fresh"], "cache": str(study)}
    for seed in range(3):
        make_run(study, "steep", seed, 1, **{"made of": "hard-fresh"})
        make_run(study, "hot", seed, 0, **{"made of": "cached-V"})
    for noted in ({"steep": "hard-fresh,lr=0.1", "hot": "cached-V,temperature=8.0"}, {}):  # lost: the runs know it
        describe(study, variants=noted, **primary)
        text = results.table(study)
        assert rows_of(text)["arm"][6].startswith("less steep") and "(besides it: hard-fresh, hard-cached)" in text
    for seed in (1, 2):
        shutil.rmtree(study / "steep" / f"seed-{seed}")
    text = results.table(study)
    assert rows_of(text)["arm"][6].startswith("less hard-fresh")
    assert "(besides it: hard-cached, steep (fewer seeds))" in text
    assert "**primary: " in rows_of(text)["cached-V"][9]


def test_the_primary_contrast_is_marked_and_the_rest_corrected(study):
    rows = rows_of(results.table(study))
    p = {arm: stats.ttest_rel(shares(arm), shares("hard-fresh")).pvalue for arm in WRONG if arm != "hard-fresh"}
    assert rows["cached-V"][9] == f"**primary: {p['cached-V']:.2g}**"
    rest = sorted((value, arm) for arm, value in p.items() if arm != "cached-V")
    floor = 0.0
    for factor, (value, arm) in zip((3, 2, 1), rest, strict=True):
        floor = max(floor, min(1.0, factor * value))
        assert rows[arm][9] == f"{floor:.2g}"


def test_nobody_else_stands_in_for_a_twin_named_beforehand(tmp_path):
    """A twin picked by the figures would have an uncorrected p."""
    out = tmp_path / "study"
    for arm in ("hard-cached", "cached-V"):
        for seed, wrong in enumerate(WRONG[arm]):
            make_run(out, arm, seed, wrong)
    for facts in ({"primary": ["cached-V", "hard-fresh"]}, {}):
        describe(out, **facts)
        text = results.table(out)
        primary = line_of(text, "The primary contrast, ")
        assert (
            primary
            == "- The primary contrast, cached-V less hard-fresh, cannot be told: without complete runs of hard-fresh."
        )
        assert "primary" not in rows_of(text)["cached-V"][9] and "(besides it: hard-fresh (not in this study))" in text


def test_a_twin_of_three_seeds_is_no_less_a_twin_for_five(study):
    """The two arms that a study is for have five seeds, the others three."""
    for seed in (3, 4):
        make_run(study, "hard-fresh", seed, 12)
        make_run(study, "cached-V", seed, 4)
    for seed in range(3):
        make_run(study, "steep", seed, 8, **{"made of": "hard-fresh"})
    text = results.table(study)
    assert rows_of(text)["arm"][6].startswith("less steep") and "every gain look smaller" in text
    shutil.rmtree(study / "steep" / "seed-2")
    text = results.table(study)
    assert rows_of(text)["arm"][6].startswith("less hard-fresh")
    assert "steep (fewer seeds)). With more seeds, steep may turn out better, and every gain smaller." in text


def test_a_difference_is_over_the_seeds_that_both_arms_have(study):
    make_run(study, "cached-V", 3, 40)  # a seed that its twin does not have
    found = results.read_study(study)
    one = results.contrast(found.arms["cached-V"], found.arms["hard-fresh"])
    assert (
        one.mean == pytest.approx(one.paired.mean) == pytest.approx((shares("cached-V") - shares("hard-fresh")).mean())
    )
    assert one.welch.mean < one.mean


def test_arms_on_fewer_labels_are_set_against_their_like(study):
    for seed in range(3):
        make_run(study, "hard-tenth", seed, 30 + seed, label_fraction=0.1, **{"made of": "hard-fresh"})
        make_run(study, "tenth", seed, 10 + 2 * seed, label_fraction=0.1, **{"made of": "cached-V"})
    text = results.table(study)
    assert "- On 0.1 of the labels: tenth less hard-tenth, +47.50 [" in text
    assert rows_of(text)["arm"][6].startswith("less hard-fresh") and "hard-tenth (fewer labels)" in text


def test_the_bug_check(study):
    low_bound = stats.ttest_rel(shares("shuffled-all"), shares("hard-fresh"), alternative="less")
    high = 100 * low_bound.confidence_interval(0.95).high
    assert f"{high:+.2f} points; passed: below +1" in line_of(results.table(study), "Bug check")
    for seed in range(3):
        (study / "cached-V" / f"seed-{seed}" / "val_logits.h5").rename(
            study / "shuffled-all" / f"seed-{seed}" / "val_logits.h5"
        )
        make_run(study, "cached-V", seed + 3, 4)
    assert "NOT PASSED" in line_of(results.table(study), "Bug check")


def test_an_incomplete_arm_is_shown_and_not_tested(study):
    make_run(study, "online", 3, 5, status="running")
    describe(study, arms=[*WRONG, "origin"], seeds=[0, 1, 2])
    text = results.table(study)
    rows = rows_of(text)
    assert rows["online"][2] == "incomplete, 3 of 4" and rows["online"][3] == "89.17 ± 2.89"
    assert rows["online"][6:] == ["-"] * 4 and rows["origin"][2:] == ["incomplete, 0 of ?", *["-"] * 7]
    assert line_of(text, "Incomplete").endswith("online, origin.")


def test_fewer_than_two_seeds_have_no_interval_over_seeds(tmp_path):
    out = tmp_path / "study"
    for arm in ("hard-fresh", "cached-V"):
        make_run(out, arm, 0, WRONG[arm][0])
    describe(out, seeds=[0, 1])
    text = results.table(out)
    assert rows_of(text)["cached-V"][3] == "85.00" and rows_of(text)["cached-V"][6:9] == [
        "+15.00 (no interval)",
        "-",
        "-",
    ]
    assert "Fewer than two seeds" in text and set(WRONG) & set(
        re.findall(r"[\w-]+", line_of(text, "Fewer seeds than the study names (0, 1)"))
    ) == {"hard-fresh", "cached-V"}


def test_without_a_complete_twin_nothing_is_compared(tmp_path):
    out = tmp_path / "study"
    make_run(out, "cached-V", 0, 4)
    make_run(out, "hard-fresh", 0, 4, status="interrupted")
    text = results.table(out)
    assert "Neither hard-fresh nor hard-cached is complete" in text
    assert rows_of(text)["cached-V"][6:] == ["-"] * 4


def test_runs_on_other_val_images_are_refused(study):
    make_run(study, "cached-V", 3, 4, fingerprint="e" * 64)
    with pytest.raises(UserError, match="eeeeeeeeeeee") as refusal:
        results.table(study)
    assert "ffffffffffff" in str(refusal.value)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        results.table(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the files


def test_write_leaves_table_figures_plot_and_page(study):
    results.write(study)
    results.write(study)  # in place of the first, not beside it
    assert (study / "table.md").read_text() == results.table(study)
    figures = json.loads((study / "results.json").read_text())
    assert figures["arms"]["cached-V"]["top1"]["mean"] == pytest.approx(0.9)
    assert [run["top1"] for run in figures["arms"]["online"]["runs"]] == pytest.approx(list(shares("online")))
    assert figures["primary"]["paired"]["p"] == pytest.approx(
        stats.ttest_rel(shares("cached-V"), shares("hard-fresh")).pvalue
    )
    assert figures["cache"] == {"training_s": 200.0, "writing_s": 50.0, "bytes": 1000}
    assert (study / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (study / "hparams").iterdir()) == sorted(
        f"{arm}-seed-{seed}" for arm in WRONG for seed in range(3)
    )
    assert not list(study.glob(".*tmp"))


@pytest.mark.parametrize("of", ["val", "part 0 of 10 of train"])
def test_the_plot_says_what_was_scored(study, monkeypatch, of):
    for file in study.glob("*/*/val_logits.h5"):
        with h5py.File(file, "r+") as opened:
            opened.attrs["of"] = of
    said = []
    original = Axes.set_xlabel
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text: said.append(text) or original(self, text))
    results.write(study)
    assert said[0] == f"top-1 on {of}, %"


def test_the_page_shows_a_setting_that_some_arms_lack_as_text(study):
    make_run(study, "few", 0, 4, views=2)
    results.write(study)
    shown = {}
    for name in ("few-seed-0", "cached-V-seed-0"):
        events = EventAccumulator(str(study / "hparams" / name)).Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        shown[name] = (started.hparams["views"].string_value, started.hparams["label_fraction"].number_value)
    assert shown == {"few-seed-0": ("2", 1.0), "cached-V-seed-0": ("None", 1.0)}  # these runs are too old for labelled


def test_the_hparams_page_compares_arms(study):
    results.write(study)
    folder = study / "hparams" / "cached-V-seed-1"
    events = EventAccumulator(str(folder)).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == pytest.approx(
        {"top1": 0.9, "agreement": 0.89, "calibration_error": abs(0.9 - np.exp(2) / (np.exp(2) + 3))}, abs=1e-6
    )
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["arm"].string_value == "cached-V" and started.hparams["seed"].number_value == 1
    assert "views" not in started.hparams, "no value to show"
    assert len(list(folder.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------- break-even


def test_break_even_of_a_whole_study(study):
    """Online takes 3 x 40 s, cached-V 3 x 10 s: 90 s saved against 50 s of writing. cached-V beats hard-fresh's 70 %
    in its third of three epochs, so it saves nothing there.
    """
    text = results.table(study)
    assert "50 s of writing and 1,000 bytes; training its teacher took 3 min" in text
    assert line_of(text, "Against online").endswith(
        "saves 90 s a student, so the cost of 50 s is paid after 1 student."
    )
    assert "+20.00 points of top-1 cost 4 min once, and 0 s more a student" in text
    assert line_of(text, "cached-V reaches").endswith("that saves no time, so it never pays.")


def test_students_that_are_sooner_as_good_pay_in_the_end(study):
    """At the twin's 70 % after epoch 2 of 3: 10 s saved of 30 s, against 200 s of training and 50 s of writing."""
    for seed in range(3, 6):
        make_run(study, "cached-V-sooner", seed, 4, epochs=(0.5, 0.8))
    for seed in range(3):
        (study / "cached-V" / f"seed-{seed}").rename(study / f"kept-{seed}")
    for seed in range(3, 6):
        (study / "cached-V-sooner" / f"seed-{seed}").rename(study / "cached-V" / f"seed-{seed}")
    shown = line_of(results.table(study), "cached-V reaches")
    assert "final 70.00 % after 2 epochs, hard-fresh takes 3" in shown
    assert shown.endswith("saves 10 s a student, so the cost of 4 min is paid after 25 students.")


def test_unknown_costs_are_said_to_be_unknown(study, tmp_path):
    describe(study, cache=str(tmp_path / "elsewhere.h5"))
    text = results.table(study)
    assert "The cache cost an unknown time of writing and an unknown number of bytes" in text
    assert "what the cache cost is unknown, and so is when it pays" in line_of(text, "Against online")
    make_run(study, "cached-V", 3, 4, epoch_s=None)
    assert "an unknown time" in line_of(results.table(study), "Against online")


def test_a_cache_of_another_name_has_no_costs_of_the_teacher_beside_it(study, tmp_path):
    other = tmp_path / "teacher" / "combined.h5"
    other.write_bytes(b"xy")
    assert cost_of(other).training_s is None and cost_of(other).writing_s is None and cost_of(other).bytes == 2
    assert cost_of(tmp_path / "teacher" / "logits.h5").writing_s == 50.0


def test_when_it_pays():
    assert students_to_pay(100, 30) == 4 and students_to_pay(90, 30) == 3 and students_to_pay(1, 30) == 1
    assert students_to_pay(100, 0) is None and students_to_pay(100, -3) is None
    assert students_to_pay(None, 3) is None and students_to_pay(3, None) is None


def test_a_pause_of_the_machine_is_no_cost_of_the_method():
    paused = Student((10.0, 600.0, 12.0, None), (0.1, 0.2, 0.3, 0.4))
    assert paused.total_s == 4 * 12.0 and paused.seconds_until(1) == 2 * 12.0
    assert Student((None, None), (0.1, 0.2)).total_s is None


def test_a_student_that_never_gets_there(study):
    weak = Student((10.0, 10.0), (0.3, 0.5))
    said = sentences(cost_of(None), {"cached-V": [weak], "hard-fresh": [Student((1.0,), (0.9,))]}, "cached-V")
    assert "1 of 1 runs of cached-V never reach hard-fresh's final 90.00 %" in said[-1]
    assert "No run of cached-V" in sentences(cost_of(None), {}, "cached-V")[-1]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "an unknown time"), (4.23, "4.23 s"), (150, "2 min"), (3600, "60 min"), (11100, "3 h 05 min")],
)
def test_durations_as_one_says_them(seconds, shown):
    assert duration(seconds) == shown


# --------------------------------------------------------------------------------------------------------- any two runs


def test_compare_two_runs(study):
    """Seed 0: hard-fresh is wrong on images 0 to 11, cached-V on 0 to 5; where both are wrong, on the same class."""
    text = results.compare(study / "cached-V" / "seed-0", study / "hard-fresh" / "seed-0")
    assert "top-1 85.00 %" in text and "top-1 70.00 %" in text
    assert "A less B on 40 images of val: +15.00 points" in text
    low, high = (float(end) for end in re.search(r"\[([-+][\d.]+), ([-+][\d.]+)\]", text).groups())
    assert 2.5 <= low <= 7.5 and 22.5 <= high <= 30
    assert f"only A is right on 6, only B on 0: p = {2 / 64:.2g}" in text
    assert "both put 85.0 % of the images in the same class" in text


def test_compare_refuses_other_val_images_and_unfinished_runs(study):
    other = make_run(study, "other", 0, 4, fingerprint="e" * 64)
    with pytest.raises(UserError, match="eeeeeeeeeeee") as refusal:
        results.compare(study / "cached-V" / "seed-0", other.path)
    assert "ffffffffffff" in str(refusal.value)
    cut = make_run(study, "other", 1, 4, status="interrupted")
    with pytest.raises(UserError, match=r"seed-1/val_logits.h5; run it to its end"):
        results.compare(cut.path, study / "cached-V" / "seed-0")
