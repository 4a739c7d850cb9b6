"""What launch.status shows of jobs, from their folders and from what the queue says."""

import os
from pathlib import Path

import pytest

from kd_dist.checkpoint import RunFolder, append_metrics, write_state
from kd_dist.errors import EXIT_PEER_LOST, UserError
from launch import queue, status
from launch.folders import Job, JobFolder, write_json
from launch.queue import State


def put_job(runs: Path, name: str, job_id: str | None, after: tuple[str, ...] = ()) -> JobFolder:
    folder = JobFolder(runs / "jobs" / name)
    folder.path.mkdir(parents=True)
    run = str(runs / name.split("-")[1])
    Job(name.split("-")[1], "teacher", "slurm", run, 1, 2, (), "", after, id=job_id, host="h").write(folder)
    return folder


def fail(folder: JobFolder, rank: int, code: int, time: float, tail: str) -> None:
    folder.attempt(0).mkdir(exist_ok=True)
    note = {
        "rank": rank,
        "host": f"n{rank}",
        "code": code,
        "time": time,
        "message": "",
        "tail": tail,
        "log": f"log-{rank}",
    }
    write_json(folder.failure(0, rank), note)


@pytest.fixture
def known(monkeypatch) -> dict[str, State]:
    """What the queue says, to be filled in by the test."""
    states: dict[str, State] = {}
    monkeypatch.setattr(queue, "states", lambda jobs: states)
    return states


def table(runs: Path) -> str:
    return status.text_of(status.standings(runs))


def test_a_running_job_shows_node_epoch_top1_and_last_line(tmp_path, known):
    folder = put_job(tmp_path, "0001-teacher", "12")
    known["12"] = State("RUNNING", "n[1-2]")
    run = RunFolder(tmp_path / "teacher")
    run.path.mkdir()
    write_state(run, "running", step=5, epoch=2.5, epochs=10)
    append_metrics(run, {"step": 4, "val_top1": 0.4321})
    folder.attempt(0).mkdir()
    folder.log(0, 0).write_text("first\n  epoch 2 done\n\n", encoding="utf-8")
    folder.point_main_log(0)
    assert table(tmp_path).splitlines() == [
        "job           id  state    node    epoch   top-1   last log line",
        "0001-teacher  12  running  n[1-2]  2.5/10  43.2 %  epoch 2 done",
    ]


def test_a_damaged_note_ends_in_one_sentence(tmp_path, known):
    folder = put_job(tmp_path, "0001-teacher", "12")
    folder.ended.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"ended.json cannot be read .*; remove it if its job is over\."):
        table(tmp_path)


def test_the_rank_that_failed_first_is_shown_and_those_that_lost_it_are_not(tmp_path, known):
    folder = put_job(tmp_path, "0001-teacher", "12")
    known["12"] = State("FAILED", "n1")
    fail(folder, 0, EXIT_PEER_LOST, 5.0, "kd_dist: rank 3 on n3 died without a message")
    fail(folder, 1, 143, 4.0, "epoch 3")
    fail(folder, 3, 1, 7.0, "Traceback\nZeroDivisionError: division by zero")
    write_json(folder.ended, {"status": "failed", "message": "", "time": ""})
    text = table(tmp_path)
    assert "teacher (job 12): rank 3 on n3 failed, exit code 1; log log-3\n    Traceback\n    ZeroDivisionError" in text
    assert "stopped answering" not in text


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


def test_follow_ends_when_all_jobs_have(tmp_path, known, capsys):
    put_job(tmp_path, "0001-teacher", "12")
    known["12"] = State("RUNNING")
    looks = []

    def look(_jobs):
        looks.append(1)
        return {"12": State("RUNNING" if len(looks) < 3 else "COMPLETED")}

    status.queue.states = look
    assert status.main([str(tmp_path), "--follow", "--every", "0"]) == 0
    shown = capsys.readouterr().out
    assert len(looks) == 3 and shown.count("0001-teacher") == 2 and "finished" in shown
