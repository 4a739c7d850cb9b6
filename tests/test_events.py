"""A run's events: whole lines, codes of a closed list, and never the end of a run."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from entries import call

from kd_dist import distill, teacher
from kd_dist.errors import UserError
from kd_dist.run import events
from kd_dist.run.events import Code, Reason
from kd_dist.run.folder import RunFolder
from kd_dist.run.state import read_state

SIZES = ("--preset=demo", "--image-size=32", "--batch-size=7", "--warmup-epochs=0", "--epochs=2", "--lr=0.003")


def codes(run: Path) -> list[str]:
    return [event["code"] for event in events.read(RunFolder(run).events)]


def test_an_event_names_its_time_its_code_its_job_and_its_facts(tmp_path, monkeypatch):
    monkeypatch.setenv(events.JOB_VARIABLE, "0001-teacher")
    events.emit(tmp_path, Code.CHECKPOINT_WRITTEN, step=7)
    (event,) = events.read(tmp_path / events.NAME)
    assert event.pop("time").endswith("+00:00")
    assert event == {"code": "checkpoint-written", "job": "0001-teacher", "step": 7}


def test_a_line_that_was_cut_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    events.emit(tmp_path, Code.DATA_READY)
    with open(tmp_path / events.NAME, "ab") as file:
        file.write(b'{"code": "epoch-fini')
    assert codes(tmp_path) == ["data-ready"]
    events.emit(tmp_path, Code.RUN_FINISHED)
    assert codes(tmp_path) == ["data-ready", "run-finished"]


def test_events_of_several_writers_stay_whole(tmp_path):
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(lambda step: events.emit(tmp_path, Code.RESUMED, step=step, note="x" * 500), range(200)))
    assert sorted(event["step"] for event in events.read(tmp_path / events.NAME)) == [*range(200)]


def test_the_history_has_a_line_an_attempt_with_how_it_ended():
    def event(code, at, **facts):
        return {"time": f"2026-01-31T12:{at:02}:00.250+00:00", "code": code, **facts}

    attempts = [
        event(Code.DATA_READY, 0),
        event(Code.TRAINING_STARTED, 0, ranks=4),
        event(Code.RUN_INTERRUPTED, 5, message="stopped by SIGUSR2"),
        event(Code.RUN_REQUEUED, 5, why="preempted"),
        event(Code.DATA_READY, 10),
        event(Code.TRAINING_STARTED, 10, ranks=2),
        event(Code.RESUMED, 10, step=140),
        event(Code.DATA_READY, 20),
        event(Code.TRAINING_STARTED, 20, ranks=2),
        event(Code.RESUMED, 20, step=200),
    ]
    assert events.history(attempts).splitlines()[2:] == [
        "| 1 | 2026-01-31T12:00:00 | 4 | 0 | 2026-01-31T12:05:00 | stopped on request, all saved: stopped by SIGUSR2; "
        "requeued: preempted |",
        "| 2 | 2026-01-31T12:10:00 | 2 | 140 | - | killed: it noted no end |",
        "| 3 | 2026-01-31T12:20:00 | 2 | 200 | - |  |",
    ]


def test_goodput_is_the_trained_share_of_the_time_since_the_first_attempt():
    begun = datetime.now(UTC) - timedelta(seconds=1000)
    attempts = [{"time": (begun + timedelta(seconds=after)).isoformat(), "code": Code.DATA_READY} for after in (0, 500)]
    found = events.standing(attempts, 400.0)
    assert found["attempts"] == 2 and found["goodput"] == pytest.approx(0.4, rel=0.05)
    assert events.standing([], 400.0) == {}


@pytest.mark.parametrize("place", ["missing", "/dev/full"])
def test_an_event_that_cannot_be_written_ends_nothing(tmp_path, place):
    folder = tmp_path / "run"
    if place == "/dev/full":
        folder.mkdir()
        (folder / events.NAME).symlink_to(place)
    events.emit(folder, Code.DATA_READY)


def test_both_jobs_leave_their_phases(tiny_root, tmp_path):
    common = (*SIZES, f"--data={tiny_root}", "--device=cpu")
    call(teacher.main, *common, "--views=2", f"--out={tmp_path}/teacher")
    written = codes(tmp_path / "teacher")
    assert written[:2] == ["data-ready", "training-started"] and written[-2:] == ["cache-published", "run-finished"]
    assert written.count("epoch-finished") == 2 and written.count("checkpoint-written") >= 1
    assert written.index("labelling-started") < written.index("block-written") < written.index("cache-published")
    call(distill.main, *common, f"--cache={tmp_path}/teacher/logits.h5", f"--out={tmp_path}/student")
    (last,) = [e for e in events.read(tmp_path / "student/events.jsonl") if e.get("epoch") == 2]
    assert last["code"] == "epoch-finished" and last["epochs"] == 2 and 0 <= last["val_top1"] <= 1
    call(distill.main, *common, f"--cache={tmp_path}/teacher/logits.h5", f"--out={tmp_path}/student", "--start-over")
    assert codes(tmp_path / "student").count("run-finished") == 1, "--start-over removes the earlier run's events"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UserError("no."), "failed", Reason.USER_ERROR),
        (ZeroDivisionError("oh"), "failed", Reason.DEFECT),
        (RuntimeError("[gloo] Connection closed by peer"), "failed", Reason.PEER_LOST),
        (KeyboardInterrupt(), "interrupted", Reason.STOPPED),
    ],
)
def test_how_a_run_ended_has_a_code_beside_the_sentence(tmp_path, rank_of, error, status, reason):
    from kd_dist import job

    folder = RunFolder(tmp_path)
    with pytest.raises(type(error)), job.running(folder, rank_of(0, 1)):
        raise error
    state, last = read_state(folder), events.read(folder.events)[-1]
    assert (state["status"], state["code"]) == (status, reason)
    assert last["reason"] == reason and last["message"] == state["message"]
    assert last["code"] == ("run-failed" if status == "failed" else "run-interrupted")
    assert json.dumps(state["code"]) == json.dumps(str(reason)) and os.fspath(folder.events).endswith("events.jsonl")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "defect"), (2, "user-error"), (3, "peer-lost"), (143, "stopped"), (-15, "stopped"), (-9, "defect")],
)
def test_an_exit_code_has_a_reason(code, reason):
    assert Reason.of_exit_code(code) == reason
