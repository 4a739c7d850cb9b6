"""`make gpu`: finished steps are not repeated, interrupted ones resume, a failed test is a result. No GPU is needed."""

import json
import sys
import time

import pytest

from benchmarks import gpu, gpu_page
from benchmarks.gpu import Step
from kd_dist.errors import UserError

PASSES = Step("passes", ("-c", "print('ran')"))
FAILS = Step("fails", ("-c", "raise SystemExit(3)"))
HANGS = Step("hangs", ("-c", "import time; print('up', flush=True); time.sleep(600)"))


def test_a_finished_step_is_not_run_again(tmp_path):
    assert gpu.go_on([PASSES], tmp_path, None) and gpu.go_on([PASSES], tmp_path, None)
    assert gpu.log_of(tmp_path, PASSES).read_text() == "ran\n"
    assert gpu.read_record(tmp_path, PASSES)["done"]


def test_a_failure_ends_all_unless_it_is_a_result(tmp_path):
    with pytest.raises(UserError, match="step fails ended with code 3"):
        gpu.go_on([FAILS, PASSES], tmp_path, None)
    assert not gpu.is_done(tmp_path, FAILS) and not gpu.is_done(tmp_path, PASSES)
    may = Step("fails", FAILS.command, may_fail=True)
    assert gpu.go_on([may, PASSES], tmp_path, None)
    assert gpu.read_record(tmp_path, may)["code"] == 3


def test_at_the_deadline_a_step_is_stopped_and_counts_as_unfinished(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "ENDING_SECONDS", 5.0)
    assert not gpu.go_on([PASSES, HANGS], tmp_path, time.monotonic() + 9)
    assert gpu.is_done(tmp_path, PASSES) and not gpu.is_done(tmp_path, HANGS)
    first = gpu.read_record(tmp_path, HANGS)["seconds"]
    assert not gpu.go_on([PASSES, HANGS], tmp_path, time.monotonic() + 8)
    assert gpu.read_record(tmp_path, HANGS)["seconds"] > first  # the seconds of all attempts together


def test_a_step_that_never_fits_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "ENDING_SECONDS", 1.0)
    long = Step("long", HANGS.command, resumes=False, may_fail=True)
    assert not gpu.go_on([long, PASSES], tmp_path, time.monotonic() + 3)
    assert not gpu.go_on([long, PASSES], tmp_path, time.monotonic() + 3)
    assert gpu.read_record(tmp_path, long)["code"] is None
    assert gpu.go_on([long, PASSES], tmp_path, time.monotonic() + 60)


def test_no_step_is_begun_shortly_before_the_deadline(tmp_path):
    assert not gpu.go_on([PASSES], tmp_path, time.monotonic() + 1)
    assert not gpu.log_of(tmp_path, PASSES).exists()


@pytest.mark.parametrize("gpus", [1, 4])
def test_every_step_is_a_command_that_exists(tmp_path, gpus):
    steps = gpu.steps_of(tmp_path, gpus)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert step.command[0] == "-m"
    assert f"--nproc_per_node={gpus}" in next(step for step in steps if step.name == "teacher").command


def test_without_a_gpu_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="none is visible here"):
        gpu.main()
    with pytest.raises(UserError, match="too short"):
        gpu.arguments(["--minutes", "1"])


def test_the_page_holds_what_the_steps_left(tmp_path):
    steps = [Step("tests", ("-m", "pytest")), Step("bench-gpu", ("-m", "b")), Step("primary", ("-m", "s"))]
    for step in steps:
        record = {"seconds": 12.3, "code": 0, "done": True, "command": "-m x"}
        gpu.write_json(gpu.record_of(tmp_path, step), record)
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="3" skipped="1"><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "bench-gpu").mkdir()
    row = {"name": "gpu step", "value": 2.0, "unit": "x", "spread": [1.9, 2.1], "goal": ">= 1", "met": True}
    about = {"gpu": "Some GPU", "gpus": 2, "started": "today", "software": "s", "cpu": "c", "cores": 8}
    (tmp_path / "bench-gpu" / "bench.json").write_text(json.dumps({"about": about, "rows": [row]}))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text('{"arms": {}}')
    (tmp_path / "study" / "table.md").write_text("| arm | top-1 |")
    (tmp_path / "study" / "plot.png").write_bytes(b"png")
    page = gpu_page.write(tmp_path, steps, tmp_path / "docs").read_text()
    assert page.startswith("# Imagewoof on 2 x Some GPU") and "| arm | top-1 |" in page
    assert "| gpu step | 2 x | 1.9 to 2.1 | >= 1 | yes |" in page
    assert "1 passed, 1 skipped, 1 failed: b." in page and "| primary | 12 | 0 | `-m x` |" in page
    assert json.loads((tmp_path / "docs" / "imagewoof-gpu.json").read_text())["rows"] == [row]
