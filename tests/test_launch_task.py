"""The supervisor of one rank, with a stand-in for the rank: signals, logs, failures, restarts; no torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.folders import Job, JobFolder, read_json, write_json
from launch.task import LOCAL_REQUEUE, PORTS, port_of

STAND_IN = """
import os, signal, sys, time
do = sys.argv[1]
print("stand-in", *sys.argv[1:], *(os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")))
print("colour", os.environ.get("COLOUR"))
print("patience", os.environ.get("KD_DIST_RENDEZVOUS_SECONDS"), "unbuffered", os.environ.get("PYTHONUNBUFFERED"))
def leave(number, frame):
    print("saved")
    os._exit(128 + number)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN if do == "deaf" else leave)
print("ready")
if do == "fail":
    sys.exit("kd_dist: wrong on purpose.")
if do == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while do != "finish":
    time.sleep(0.05)
"""

START = """
import os, sys
from launch import task
task.MODULES["teacher"] = "stand_in"
task.PEER_SECONDS = 0.5
given = dict(minutes=60, signal_seconds=2, most_timeouts=0, environment=(("COLOUR", "red"), ("HOME", None)))
if os.environ.get("AFTER"):
    given |= dict(after=(os.environ["AFTER"],), needs_success=os.environ["NEEDS_SUCCESS"] == "yes")
task.Task("teacher", tuple(sys.argv[3:]), sys.argv[1], sys.argv[2], None, **given)()
"""


class Rank:
    """A supervisor process of one of two ranks, or of the only one."""

    def __init__(self, folder: Path, *arguments: str, rank: int = 0, count: int = 1):
        (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
        self.job = JobFolder(folder / "job")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}:{Path(__file__).parent.parent}",
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_FOLDER": str(folder / "submitit"),
            "SUBMITIT_LOCAL_JOB_ID": str(20_000 + os.getpid() % 10_000),
            "SUBMITIT_LOCAL_NTASKS": str(count),
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
        }
        command = [sys.executable, "-c", START, str(self.job.path), str(folder / "run"), *arguments]
        self.rank = rank
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def log(self, attempt: int = 0) -> str:
        path = self.job.log(attempt, self.rank)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def when_ready(self, attempt: int = 0) -> "Rank":
        while "ready" not in self.log(attempt):
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.05)
        return self

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        self.process.stderr.close()
        return code

    def signalled(self, number: int) -> int:
        self.process.send_signal(number)
        return self.end()


def test_a_rank_that_finishes_gets_torchs_variables_and_its_own_changes(tmp_path):
    rank = Rank(tmp_path, "finish", "$HOME_OF_NOBODY", "--start-over")
    assert rank.end() == 0
    assert "stand-in finish $HOME_OF_NOBODY --start-over 0 1 127.0.0.1" in rank.log()
    assert "colour red" in rank.log()
    assert "patience 300 unbuffered 1" in rank.log()  # of a rank whose peers may be slow to import torch
    assert rank.job.main_log.read_text(encoding="utf-8") == rank.log()
    assert read_json(rank.job.ended)["status"] == "finished"


def test_sigterm_saves_and_asks_nobody_to_start_again(tmp_path):
    rank = Rank(tmp_path, "wait").when_ready()
    assert rank.signalled(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "saved" in rank.log() and read_json(rank.job.ended)["status"] == "interrupted"


def test_a_warning_saves_and_asks_for_another_start_that_does_not_start_over(tmp_path):
    rank = Rank(tmp_path, "wait", "--start-over").when_ready()
    assert rank.signalled(signal.SIGUSR2) == LOCAL_REQUEUE
    assert "saved" in rank.log() and not rank.job.ended.exists()
    second = Rank(tmp_path, "wait", "--start-over").when_ready(1)
    assert "stand-in wait 0 1" in second.log(1)
    assert second.job.main_log.resolve() == second.job.log(1, 0)
    second.signalled(signal.SIGUSR2)
    third = Rank(tmp_path, "wait")
    assert third.end() == 2
    ended, failure = read_json(third.job.ended), read_json(third.job.failure(2, 0))
    assert ended["status"] == "failed" and "attempt-0/rank-0.log and" in failure["message"]


def test_sigterm_after_a_warning_means_the_end(tmp_path):
    rank = Rank(tmp_path, "deaf").when_ready()
    rank.process.send_signal(signal.SIGUSR2)
    assert rank.signalled(signal.SIGTERM) == 128 + signal.SIGTERM
    assert read_json(rank.job.ended)["status"] == "interrupted"


def test_a_rank_that_is_deaf_to_its_warning_is_killed_in_time_and_started_again(tmp_path):
    rank = Rank(tmp_path, "deaf").when_ready()
    assert rank.signalled(signal.SIGUSR2) == LOCAL_REQUEUE
    assert "did not stop in time and was killed" in rank.log()


@pytest.mark.parametrize(("way", "code", "left"), [("fail", 1, 1), ("die", -9, 137)])
def test_a_failure_is_noted_with_the_ranks_last_words(tmp_path, way, code, left):
    rank = Rank(tmp_path, way)
    assert rank.end() == left
    note = read_json(rank.job.failure(0, 0))
    assert note["code"] == code and ("wrong on purpose" in note["tail"]) == (way == "fail")
    assert read_json(rank.job.ended)["status"] == "failed"


def test_a_rank_whose_peer_failed_is_ended(tmp_path):
    ranks = [Rank(tmp_path, "deaf", rank=rank, count=2) for rank in (0, 1)]
    for rank in ranks:
        rank.when_ready()
    write_json(
        ranks[0].job.failure(0, 1), {"rank": 1, "code": 1, "time": 0, "message": "", "tail": "", "host": "", "log": ""}
    )
    assert ranks[0].end() == 137 and ranks[1].end() == 137
    assert read_json(ranks[0].job.ended)["status"] == "failed"


def test_a_killed_supervisor_takes_its_rank_with_it(tmp_path):
    rank = Rank(tmp_path, "wait").when_ready()
    children = Path(f"/proc/{rank.process.pid}/task/{rank.process.pid}/children").read_text(encoding="utf-8").split()
    rank.process.kill()
    rank.end()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) == 1 and not Path(f"/proc/{children[0]}").exists()


@pytest.mark.parametrize(
    ("status", "needs_success", "code", "word"),
    [("finished", "yes", 0, "finished"), ("failed", "yes", 2, "dropped"), ("failed", "no", 0, "finished")],
)
def test_a_job_here_waits_for_the_one_before(tmp_path, monkeypatch, status, needs_success, code, word):
    before = JobFolder(tmp_path / "before")
    before.path.mkdir()
    Job("teacher", "teacher", "local", "runs/teacher", 1, 1, (), "", id=None).write(before)
    monkeypatch.setenv("AFTER", str(before.path))
    monkeypatch.setenv("NEEDS_SUCCESS", needs_success)
    rank = Rank(tmp_path, "finish")
    while not rank.job.log(0, 0).exists():
        time.sleep(0.05)
    assert rank.process.poll() is None
    write_json(before.ended, {"status": status, "message": "", "time": ""})
    assert rank.end() == code and read_json(rank.job.ended)["status"] == word
    assert ("stand-in" in rank.log()) == (code == 0)


def test_jobs_of_neighbouring_ids_have_ports_of_their_own():
    ports = [port_of(str(job_id)) for job_id in range(5_000, 5_000 + len(PORTS))]
    assert len(set(ports)) == len(PORTS) and max(ports) < 32_768
