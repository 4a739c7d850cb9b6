"""The statistics against published figures, scipy, and cases that can be worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kd_dist.study.statistics import (
    holm,
    mcnemar,
    over_images,
    paired,
    resampled,
    spread,
    upper_bound,
    welch,
)

PUBLISHED = Path(__file__).parents[1] / "docs/results/imagewoof-cpu.json"

# Student's own data (1908): extra hours of sleep of ten patients on two drugs.
SLEEP_A = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP_B = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def test_paired_is_students_own_example():
    """The figures that R's documentation shows for t.test(paired = TRUE)."""
    found = paired(SLEEP_A, SLEEP_B)
    assert found.mean == pytest.approx(-1.58) and found.freedom == 9
    assert found.interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert found.p == pytest.approx(0.002833, abs=1e-6)


def test_welch_is_the_published_example():
    found = welch(SLEEP_A, SLEEP_B)
    assert found.freedom == pytest.approx(17.776, abs=1e-3)
    assert found.interval == pytest.approx((-3.3654832, 0.2054832), abs=1e-7)
    assert found.p == pytest.approx(0.07939, abs=1e-5)


def test_the_published_study_comes_out_again():
    """Paired, Welch and Holm of docs/results/imagewoof-cpu.json from the top-1 of its runs."""
    study = json.loads(PUBLISHED.read_text())["study"]
    top1 = {name: {run["seed"]: run["top1"] for run in arm["runs"]} for name, arm in study["arms"].items()}
    p, first = {}, study["primary"]
    for one in [*study["contrasts"], first]:
        arm, baseline = top1[one["arm"]], top1[one["baseline"]]
        shared = sorted(arm.keys() & baseline.keys())
        sides = [np.array([side[seed] for seed in shared]) for side in (arm, baseline)]
        pairs = ((one["paired"], paired(*sides)), (one["welch"], welch([*arm.values()], [*baseline.values()])))
        for theirs, found in pairs:
            assert (theirs is None) == (found is None)
            if found:
                assert (found.mean, found.freedom, found.p) == pytest.approx(
                    (theirs["mean"], theirs["freedom"], theirs["p"]), rel=1e-9
                )
                assert found.interval == pytest.approx(theirs["interval"], rel=1e-9)
        if one is not first and one["paired"]:
            p[one["arm"]] = one["paired"]["p"]
    assert len(p) == 11 and holm(p) == pytest.approx(study["p_holm"], rel=1e-9)
    check = [np.array([top1[name][seed] for seed in range(3)]) for name in ("shuffled-all", "baseline")]
    assert upper_bound(*check) == pytest.approx(study["bug_check_upper_bound"], rel=1e-9)


def test_the_upper_bound_is_one_sided():
    """t of 9 degrees of freedom at 95 % is 1.833113; the standard error of the mean is 0.388961."""
    assert upper_bound(SLEEP_A, SLEEP_B) == pytest.approx(-1.58 + 1.833113 * 0.388961, abs=1e-5)


def test_what_cannot_be_told_is_none():
    one, same = np.array([0.5]), np.array([0.1, 0.2, 0.3])
    assert paired(one, one) is None and welch(one, same) is None and welch(same, one) is None
    assert upper_bound(one, one) is None and upper_bound(same + 0.1, same) is None
    assert paired(same + 0.1, same) is None, "rounding is no spread"
    assert welch(np.array([0.5, 0.5]), np.array([0.4, 0.4])) is None
    hits = np.ones((2, 4), bool)
    assert resampled(hits[:1], ~hits[:1]) is None and resampled(hits, ~hits) is None


def test_spread_has_the_deviation_of_a_sample():
    found = spread([0.60, 0.64, 0.62])
    assert (found.mean, found.deviation, found.count) == (pytest.approx(0.62), pytest.approx(0.02), 3)
    reach = 4.302653 * 0.02 / math.sqrt(3)  # t of 2 degrees of freedom
    assert found.interval == pytest.approx((0.62 - reach, 0.62 + reach), abs=1e-6)
    assert spread([0.5]).deviation is None and spread([0.5]).interval is None


# ------------------------------------------------------------------------------------------------------------ bootstrap


def error_of(found):
    """The standard error behind an interval."""
    low, high = found.interval
    return (high - low) / 2 / stats.t.ppf(0.975, found.freedom)


def test_resampled_where_only_seeds_differ_is_the_paired_interval():
    """All images alike: the images' part is nil, and drawing S - 1 of S seeds gives the variance of the mean."""
    a_SN = np.repeat(np.array([0.02, 0.05, 0.03, 0.08])[:, None], 50, axis=1)
    found, seeds_alone = resampled(a_SN, np.zeros_like(a_SN), draws=40_000), paired(a_SN[:, 0], np.zeros(4))
    assert found.mean == pytest.approx(0.045) and found.freedom == pytest.approx(3, abs=0.1)
    assert found.interval == pytest.approx(seeds_alone.interval, rel=0.05)


def test_resampled_where_only_images_differ_is_the_error_of_a_share():
    """All seeds alike: a is right on 30 of 100 images more, so the error is sqrt(0.3 * 0.7 / 100)."""
    a_SN = np.tile(np.arange(100) < 70, (3, 1))
    b_SN = np.tile(np.arange(100) < 40, (3, 1))
    found = resampled(a_SN, b_SN, draws=40_000)
    assert found.mean == pytest.approx(0.3)
    assert error_of(found) == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.02)
    assert found.freedom == pytest.approx(99, rel=0.01)


def test_both_arms_are_drawn_on_the_same_images():
    """Two arms that are right on the same images: drawing them apart would make an error of it."""
    hit_SN = np.random.default_rng(0).random((3, 200)) < 0.5
    assert resampled(hit_SN, hit_SN) is None
    assert over_images(hit_SN[0], hit_SN[0]) == (0.0, 0.0, 0.0)


def test_the_same_runs_give_the_same_interval():
    hit_a, hit_b = np.random.default_rng(1).random((2, 3, 40)) < 0.6
    assert resampled(hit_a, hit_b) == resampled(hit_a, hit_b)
    assert over_images(hit_a[0], hit_b[0]) == over_images(hit_a[0], hit_b[0])


def test_drawing_in_pieces_changes_nothing(monkeypatch):
    """So that memory stays flat on many images."""
    hit_a, hit_b = np.random.default_rng(1).random((2, 3, 40)) < 0.6
    at_once = resampled(hit_a, hit_b, draws=101)
    monkeypatch.setattr("kd_dist.study.statistics._INDICES_AT_ONCE", 400)
    assert resampled(hit_a, hit_b, draws=101).interval == pytest.approx(at_once.interval, rel=1e-9)


@pytest.mark.parametrize(
    ("seeds", "of_seed", "held_from", "of_seeds_alone"),
    [(3, 0.3, 0.925, 0.9), (5, 0.3, 0.925, 0.85), (3, 1.0, 0.89, 0.97)],
)
def test_coverage_over_seeds_and_images(seeds, of_seed, held_from, of_seeds_alone):
    """Made-up studies whose truth is 0: images and seeds differ, and each pair by itself. The interval that draws
    images too holds the truth in about 95 % of them, 92 % where three seeds differ much; the one over seeds alone takes
    the images as given and does not.
    """
    rng = np.random.default_rng(7)
    held = {"resampled": 0, "paired": 0}
    studies = 300
    for _ in range(studies):
        seeds_S1, images_N = rng.normal(0, of_seed, (seeds, 1)), rng.normal(0, 2.0, 60)
        values_SN = seeds_S1 + images_N + rng.normal(0, 0.5, (seeds, 60))
        nothing_SN = np.zeros_like(values_SN)
        low, high = resampled(values_SN, nothing_SN, draws=300).interval
        held["resampled"] += low <= 0 <= high
        low, high = paired(values_SN.mean(axis=1), np.zeros(seeds)).interval
        held["paired"] += low <= 0 <= high
    assert held_from <= held["resampled"] / studies <= 0.985
    assert held["paired"] / studies < of_seeds_alone


def test_over_images_is_the_normal_interval_on_many_images():
    hit_a_N, hit_b_N = np.arange(2000) < 1400, np.arange(2000) < 1300
    difference, low, high = over_images(hit_a_N, hit_b_N)
    reach = 1.96 * math.sqrt(0.05 * 0.95 / 2000)
    assert difference == pytest.approx(0.05)
    assert (low, high) == pytest.approx((0.05 - reach, 0.05 + reach), abs=0.001)


# ---------------------------------------------------------------------------------------------------------------- tests


def test_mcnemar_by_hand():
    """A alone is right on 9 images, B alone on 1: two tails of (1 + 10) in 2^10."""
    hit_a_N = np.array([True] * 9 + [False] + [True] * 20 + [False] * 5)
    hit_b_N = np.array([False] * 9 + [True] + [True] * 20 + [False] * 5)
    found = mcnemar(hit_a_N, hit_b_N)
    assert found == (9, 1, pytest.approx(22 / 1024))
    assert mcnemar(hit_a_N, hit_a_N) == (0, 0, 1.0)


def test_holm_by_hand():
    """0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.03 x 2 = 0.06; 0.04 x 1 is held at 0.06."""
    corrected = holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.02})
    assert list(corrected) == ["c", "a", "d", "b"]
    assert list(corrected.values()) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm({"x": 0.9, "y": 0.6}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}
