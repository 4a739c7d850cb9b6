"""What launch.status shows of jobs, from their folders and from what the queue says."""

import os
from pathlib import Path

import pytest

from kd_dist.errors import UserError
from kd_dist.files import write_json
from kd_dist.run import events
from kd_dist.run.events import Code
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import append_metrics
from kd_dist.run.state import write_state
from launch import status
from launch.status import State
from launch.supervisor import Job, JobFolder


def put_job(runs: Path, name: str, job_id: str | None, after: tuple[str, ...] = (), run: str = "") -> JobFolder:
    folder, kind = JobFolder(runs / "jobs" / name), name.split("-")[-1]
    shape = {"cluster": "slurm", "nodes": 1, "ranks": 2, "minutes": 9, "signal_seconds": 9, "max_timeouts": 3}
    before = tuple(str(runs / "jobs" / one) for one in after)
    facts = {"after": before, "id": job_id, "host": "h", "submitted": "2026-01-01"}
    Job(kind, (), str(folder.path), str(runs / (run or kind)), **shape, **facts).write()
    return folder


def fail(folder: JobFolder, rank: int, code: int, time: float, tail: str, reason: str = "defect") -> None:
    folder.attempt(0).mkdir(exist_ok=True)
    facts = {"rank": rank, "host": f"n{rank}", "code": code, "time": time, "reason": reason, "message": ""}
    write_json(folder.failure(0, rank), {**facts, "tail": tail, "log": f"log-{rank}"})


def begin(folder: JobFolder) -> None:
    folder.attempt(0).mkdir(exist_ok=True)
    events.append(folder.attempts, {"code": "began", "progress": 0, "log": ""})


@pytest.fixture
def known(monkeypatch) -> dict[str, State]:
    """What the queue says, to be filled in by the test."""
    states: dict[str, State] = {}
    monkeypatch.setattr(status, "states", lambda jobs: states)
    return states


def table(runs: Path, width: int | None = None) -> str:
    return status.text_of(status.standings(runs), width)


@pytest.fixture
def epoch_done(tmp_path, monkeypatch):
    """Note an epoch that a job has finished in a run: epoch_done("0001-teacher", "teacher", epoch=3)."""

    def note(job: str, run: str, **facts) -> None:
        (tmp_path / run).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(events.JOB_VARIABLE, job)
        events.emit(tmp_path / run, Code.EPOCH_FINISHED, epochs=10, **facts)

    return note


def test_a_running_job_shows_node_epoch_top1_and_last_line(tmp_path, known, epoch_done):
    folder = put_job(tmp_path, "0001-teacher", "12")
    known["12"] = State("RUNNING", "n[1-2]")
    run = RunFolder(tmp_path / "teacher")
    epoch_done("0001-teacher", "teacher", epoch=2, val_top1=0.4321, val_agreement=0.5)
    append_metrics(run, {"step": 4, "epoch": 2, "images_per_s": 512.3, "data_wait_share": 0.03})
    write_state(run, "running", step=5, epoch=2.5, epochs=10)
    begin(folder)
    folder.log(0, 0).write_text("first\n  epoch 2 done\n\n", encoding="utf-8")
    folder.point_main_log(0)
    assert table(tmp_path).splitlines() == [
        "job           id  state    node    epoch   top-1   agreement  images/s  data wait  last log line",
        "0001-teacher  12  running  n[1-2]  2.5/10  43.2 %  50.0 %     512       3 %        epoch 2 done",
    ]
    folder.log(0, 0).write_text("x" * 300, encoding="utf-8")
    assert "x" * 300 in table(tmp_path), "a pipe gets whole lines"
    assert [len(line) for line in table(tmp_path, width=120).splitlines()] == [96, 120], (
        "a terminal what it has room for"
    )


def test_an_older_job_of_a_folder_keeps_its_own_progress_and_gives_no_advice(tmp_path, known, epoch_done, capsys):
    older, newer = put_job(tmp_path, "0001-teacher", "12"), put_job(tmp_path, "0002-teacher", "13")
    begin(older)
    begin(newer)
    epoch_done("0001-teacher", "teacher", epoch=3, val_top1=0.25)
    epoch_done("0002-teacher", "teacher", epoch=8, val_top1=0.75)
    known |= {"12": State("TIMEOUT"), "13": State("COMPLETED")}
    lines = table(tmp_path).splitlines()
    assert lines[1].split()[2:7] == ["failed", "-", "3/10", "25.0", "%"]
    assert lines[2].split()[2:7] == ["finished", "-", "8/10", "75.0", "%"]
    assert f"teacher (job 12): failed; job 13 has gone on with {tmp_path}/teacher since" in lines
    assert "submit again" not in table(tmp_path)
    assert status.main([str(tmp_path), "--follow"]) == 0, "the run was finished by the newer job"


def test_a_newer_job_that_has_not_begun_takes_nothing_from_the_older(tmp_path, known, epoch_done):
    begin(put_job(tmp_path, "0001-teacher", "12"))
    put_job(tmp_path, "0002-teacher", "13")
    epoch_done("0001-teacher", "teacher", epoch=3, val_top1=0.25)
    known |= {"12": State("TIMEOUT"), "13": State("PENDING", "", "Priority")}
    text = table(tmp_path)
    assert text.splitlines()[2].split()[2:6] == ["waiting", "-", "-", "-"]
    assert "teacher (job 12): failed: the queue reports TIMEOUT; submit again to resume" in text


def test_the_workers_of_a_study_each_show_the_run_that_they_are_at(tmp_path, known, epoch_done):
    for number in (0, 1):
        begin(put_job(tmp_path, f"0001-study/0{number}-study", str(number), run="study"))
        known[str(number)] = State("RUNNING")
    epoch_done("0001-study/01-study", "study/cached-V/seed-0", epoch=4, tune_top1=0.5)
    rows = table(tmp_path).splitlines()[1:]
    assert rows[0].split()[2:5] == ["running", "-", "-"] and rows[1].split()[4:8] == ["4/10", "50.0", "%", "(tune)"]


def test_a_damaged_note_ends_in_one_sentence(tmp_path, known):
    folder = put_job(tmp_path, "0001-teacher", "12")
    folder.ended.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"ended.json cannot be read .*; remove it if its job is over\."):
        table(tmp_path)


def test_the_rank_that_failed_first_is_shown_and_those_that_lost_it_are_not(tmp_path, known):
    folder = put_job(tmp_path, "0001-teacher", "12")
    known["12"] = State("FAILED", "n1")
    fail(folder, 0, 3, 5.0, "kd_dist: another rank was lost", "peer-lost")
    fail(folder, 1, 143, 4.0, "epoch 3", "stopped")
    fail(folder, 3, 1, 7.0, "Traceback\nZeroDivisionError: division by zero")
    write_json(folder.ended, {"status": "failed", "message": "", "time": ""})
    text = table(tmp_path)
    assert "teacher (job 12): rank 3 on n3 failed, exit code 1; log log-3\n    Traceback\n    ZeroDivisionError" in text
    assert "was lost" not in text


def test_a_student_whose_teacher_failed_is_dropped(tmp_path, known):
    teacher = put_job(tmp_path, "0001-teacher", "12")
    put_job(tmp_path, "0002-distill", "13", ("0001-teacher",))
    fail(teacher, 0, -9, 1.0, "epoch 1")
    known |= {"12": State("FAILED"), "13": State("PENDING", "", "DependencyNeverSatisfied")}
    write_json(teacher.ended, {"status": "failed", "message": "", "time": ""})
    text = table(tmp_path)
    assert "rank 0 on n0 failed, killed by SIGKILL" in text
    assert "distill (job 13): dropped: teacher (job 12) failed" in text


@pytest.mark.parametrize(
    ("state", "ended", "word"),
    [
        (State("PENDING", "", "Resources"), None, "waiting"),
        (State("PENDING", "", "BeginTime"), {"status": "interrupted", "message": ""}, "waiting"),
        (State("COMPLETING"), None, "stopping"),
        (State("TIMEOUT"), None, "failed"),
        (State("NODE_FAIL"), None, "failed"),
        (State("CANCELLED"), None, "cancelled"),
        (State("CANCELLED"), {"status": "interrupted", "message": "m"}, "interrupted"),
        (State("OUT_OF_MEMORY"), {"status": "interrupted", "message": "m"}, "failed"),
        (State("COMPLETED"), {"status": "finished", "message": ""}, "finished"),
        (None, {"status": "finished", "message": ""}, "finished"),
        (None, None, "gone"),
    ],
)
def test_one_word_for_each_way_to_stand(tmp_path, known, state, ended, word):
    folder = put_job(tmp_path, "0001-teacher", "12")
    if state:
        known["12"] = state
    if ended:
        write_json(folder.ended, ended)
    assert status.standings(tmp_path)[0].state == word


def test_a_folder_without_jobs_is_said_to_be_one(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 2
    assert "no jobs were submitted under" in capsys.readouterr().err


def test_cancel_asks_slurm_for_what_waits_first(tmp_path, known, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    scancel = tmp_path / "bin/scancel"
    scancel.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\n', encoding="utf-8")
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for number, state in enumerate(["RUNNING", "PENDING", "COMPLETED"]):
        put_job(tmp_path, f"000{number}-teacher", str(number))
        known[str(number)] = State(state)
    assert status.main([str(tmp_path), "--cancel"]) == 0
    assert (tmp_path / "cancelled").read_text(encoding="utf-8").split() == ["1", "0"]


@pytest.mark.parametrize(("end", "word", "code"), [("COMPLETED", "finished", 0), ("FAILED", "failed", 1)])
def test_follow_ends_when_all_jobs_have(tmp_path, monkeypatch, capsys, end, word, code):
    put_job(tmp_path, "0001-teacher", "12")
    looks = []

    def look(_jobs):
        looks.append(1)
        return {"12": State("RUNNING" if len(looks) < 3 else end)}

    monkeypatch.setattr(status, "states", look)
    assert status.main([str(tmp_path), "--follow", "--every", "0"]) == code
    shown = capsys.readouterr().out
    assert len(looks) == 3 and shown.count("0001-teacher") == 2 and word in shown
