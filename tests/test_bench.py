"""The benchmark's own logic: goals, turns, the table and its files; and one cheap row from end to end. No time is
asserted.
"""

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from benchmarks import report, setting, whole_job
from benchmarks.bench import ROWS, arguments, measure
from benchmarks.children import Child
from benchmarks.measure import Effort, Goal, Row, interleaved, row
from benchmarks.setting import Bench
from benchmarks.whole_job import spread
from kd_dist.errors import UserError
from kd_dist.job import Data

AT_LEAST, AT_MOST = Goal(0.95), Goal(1.02, at_least=False)


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [(AT_LEAST, 0.95, True), (AT_LEAST, 0.949, False), (AT_MOST, 1.02, True), (AT_MOST, 1.021, False)],
)
def test_goal_is_met_on_its_side_and_at_its_bound(goal, value, met):
    assert Row("x", value, goal=goal).met is met


def test_fewer_threads_than_one_are_refused():
    with pytest.raises(UserError, match="--threads -1 must be at least 1"):
        arguments(["--threads", "-1"])


def test_no_verdict_without_goal_or_value():
    assert Row("x", 1.0).met is None
    assert Row("x", None, goal=AT_LEAST).met is None


def test_arms_take_turns_and_the_first_round_is_thrown_away():
    calls = []

    def arm(name):
        return lambda: calls.append(name) or float(len(calls))

    taken = interleaved({"a": arm("a"), "b": arm("b")}, Effort(seconds=0, least=3))
    assert calls == ["a", "b"] * 4
    assert taken["a"].tolist() == [3, 5, 7] and taken["b"].tolist() == [4, 6, 8]


def test_no_more_rounds_than_allowed():
    assert len(interleaved({"a": lambda: 1.0}, Effort(seconds=60, least=1, most=4))["a"]) == 4


def test_row_is_median_and_quartiles():
    found = row("x", [1.0, 2.0, 3.0, 4.0, 100.0], goal=AT_LEAST)
    assert (found.value, found.spread, found.rounds) == (3.0, (2.0, 4.0), 5)


@pytest.fixture
def rows() -> list[Row]:
    """A met goal, a missed one, one that was not measured, and a figure without a goal."""
    return [
        row("fast", [1.0, 1.0, 1.2], goal=AT_LEAST, facts={"rate": 3.0}),
        row("slow", [2.0, 2.0], goal=AT_MOST),
        Row("absent", None, goal=AT_LEAST, note="not installed here; type this"),
        Row("plain", 12345.0, unit="images/s"),
    ]


def test_table_says_what_was_met_missed_and_not_measured(rows):
    text = report.table(rows)
    verdicts = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.startswith(("fast", "slow"))}
    assert verdicts == {"fast": "met", "slow": "missed"}
    assert "not measured\n    not installed here; type this\n" in text
    assert "12,345 images/s" in text
    assert text.endswith("1 of 2 measured goals met, 1 not measured")


def test_files_hold_every_row(rows, tmp_path):
    report.write(tmp_path / "new", rows, {"cores": 2})
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert found["about"] == {"cores": 2}
    assert [(entry["name"], entry["goal"], entry["met"]) for entry in found["rows"]] == [
        ("fast", ">= 0.95", True),
        ("slow", "<= 1.02", False),
        ("absent", ">= 0.95", None),
        ("plain", None, None),
    ]
    assert found["rows"][0]["spread"] == [1.0, 1.1] and found["rows"][0]["facts"] == {"rate": 3.0}
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_share_of_goal_is_beyond_one_where_it_is_met():
    assert report.share_of_goal(Row("x", None, goal=Goal(2.0)), 3.0) == 1.5
    assert report.share_of_goal(Row("x", None, goal=Goal(1.0, at_least=False)), 2.0) == 0.5


def test_unknown_row_is_refused(capsys):
    assert arguments(["--rows", "1", "gpu"]).rows == ["1", "gpu"]
    with pytest.raises(UserError, match="--help"):
        arguments(["--rows", "99"])


def test_source_prefers_a_folder_to_an_archive_to_the_drawn_set(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_DIST_DATA", raising=False)
    monkeypatch.delenv("KD_DIST_IMAGEWOOF", raising=False)
    assert setting.source_of(None, None, tmp_path).release == "demo"
    assert setting.source_of(None, "x.tgz", tmp_path).archive == "x.tgz"
    assert setting.source_of("images", "x.tgz", tmp_path).data == "images"
    monkeypatch.setenv("KD_DIST_DATA", "others")
    assert setting.source_of(None, "x.tgz", tmp_path).data == "others"


@pytest.fixture
def bench(tiny, tiny_pixels, one_process, tmp_path) -> Bench:
    """The tiny set, quick."""
    return Bench(Data(tiny, tiny_pixels), one_process, tmp_path / "work", threads=1, quick=True)


def test_a_row_from_end_to_end_and_a_failing_one_beside_it(bench, tmp_path, monkeypatch, capsys):
    def fails(_):
        raise RuntimeError("as a defect would")
        yield

    monkeypatch.setitem(ROWS, "2", fails)
    bench.folder.mkdir()
    assert measure(bench, ["2", "1"], tmp_path / "out", {}) == ["2"]
    (found,) = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert found["name"].startswith("1 distill step / hard-label step") and found["goal"] == "<= 1.02"
    assert found["rounds"] == 2 and found["value"] > 0
    assert "as a defect would" in capsys.readouterr().err


def test_spread_takes_samples_of_all_classes_with_their_images(bench):
    few = spread(bench.data, {"train": 6, "val": 3})
    assert set(few.samples.train.labels_N) == {0, 1, 2}
    whole = {path: place for place, path in enumerate(bench.data.samples.train.paths)}
    for place, path in enumerate(few.samples.train.paths):
        assert np.array_equal(few.pixels["train"][place], bench.data.pixels["train"][whole[path]])


def test_moments_are_the_first_event_of_each_code():
    began = datetime(2026, 1, 1, tzinfo=UTC)
    happened = [{"code": code, "time": f"2026-01-01T00:00:0{s}.500+00:00"} for s, code in enumerate(["a", "b", "a"])]
    assert whole_job.moments(happened, began) == {"a": 0.5, "b": 1.5}


def test_a_child_that_ends_is_told_from_an_answer():
    with (
        Child("benchmarks.no_such_module") as child,
        pytest.raises(UserError, match="no_such_module ended with code 1"),
    ):
        child.ask(size=3)


def test_quick_changes_sizes_not_what_is_measured(bench):
    assert bench.student.augmentation.image_size == 32
    slow = replace(bench, quick=False)
    assert (
        slow.student.augmentation.image_size == 64
        and slow.student.distillation.student == bench.student.distillation.student
    )
