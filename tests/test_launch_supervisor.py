"""The supervisor of one rank, with a stand-in for the rank: signals, logs, failures, restarts; no torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_dist.errors import UserError
from kd_dist.files import write_json
from kd_dist.run import events
from kd_dist.run.events import Reason
from launch.supervisor import (
    LOCAL_REQUEUE,
    PORTS,
    Job,
    JobFolder,
    Stop,
    begin_attempt,
    port_of,
    progress_of,
    read_json,
    stop_attempt,
)

STAND_IN = (Path(__file__).parent / "programs/stand_in.py").read_text()

START = (Path(__file__).parent / "programs/start_stand_in.py").read_text()


def a_job(folder: Path, **more) -> Job:
    shape = {"cluster": "local", "nodes": 1, "ranks": 1, "minutes": 60, "signal_seconds": 2, "max_timeouts": 0}
    return Job("teacher", (), str(folder), "runs/teacher", **{**shape, **more})


class Rank:
    """A supervisor process of one of two ranks, or of the only one."""

    def __init__(self, folder: Path, *arguments: str, rank: int = 0, count: int = 1):
        (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
        self.job = JobFolder(folder / "jobs/0001-teacher")
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
    assert "colour red job 0001-teacher" in rank.log()
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
    (tmp_path / "run").mkdir()
    rank = Rank(tmp_path, "deaf").when_ready()
    assert rank.signalled(signal.SIGUSR2) == LOCAL_REQUEUE
    assert "did not stop in time and was killed" in rank.log()
    (requeued,) = events.read(tmp_path / "run" / events.NAME)
    assert requeued["code"] == "run-requeued" and requeued["why"] == "preempted" and requeued["job"] == "0001-teacher"


@pytest.mark.parametrize(("way", "code", "left"), [("fail", 1, 1), ("die", -9, 137), ("lose", 3, 3)])
def test_a_failure_is_noted_with_the_ranks_last_words(tmp_path, way, code, left):
    rank = Rank(tmp_path, way)
    assert rank.end() == left
    note = read_json(rank.job.failure(0, 0))
    assert note["code"] == code and ("wrong on purpose" in note["tail"]) == (way == "fail")
    assert note["reason"] == (Reason.PEER_LOST if way == "lose" else Reason.DEFECT)
    assert read_json(rank.job.ended)["status"] == "failed"


def test_a_rank_whose_peer_failed_is_ended(tmp_path):
    ranks = [Rank(tmp_path, "deaf", rank=rank, count=2) for rank in (0, 1)]
    for rank in ranks:
        rank.when_ready()
    write_json(
        ranks[0].job.failure(0, 1), {"rank": 1, "code": 1, "time": 0, "message": "", "tail": "", "host": "", "log": ""}
    )
    assert ranks[0].end() == 137 and ranks[1].end() == 137
    assert read_json(ranks[0].job.failure(0, 0))["reason"] == Reason.PEER_LOST
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


@pytest.mark.parametrize(("status", "code", "word"), [("finished", 0, "finished"), ("failed", 2, "dropped")])
def test_a_job_here_waits_for_the_one_before(tmp_path, monkeypatch, status, code, word):
    before = JobFolder(tmp_path / "jobs/0000-before")
    a_job(before.path).write()
    monkeypatch.setenv("AFTER", str(before.path))
    rank = Rank(tmp_path, "finish")
    while not rank.job.log(0, 0).exists():
        time.sleep(0.05)
    assert rank.process.poll() is None
    write_json(before.ended, {"status": status, "message": "", "time": ""})
    assert rank.end() == code and read_json(rank.job.ended)["status"] == word
    assert ("stand-in" in rank.log()) == (code == 0)


def test_a_job_reads_back_as_it_was_written(tmp_path):
    job = a_job(tmp_path / "jobs/0001-teacher", after=("0000",), environment={"A": None}, id="7")
    job.write()
    assert Job.read(JobFolder(Path(job.folder))) == job


def test_jobs_of_neighbouring_ids_have_ports_of_their_own():
    ports = [port_of(str(job_id)) for job_id in range(5_000, 5_000 + len(PORTS))]
    assert len(set(ports)) == len(PORTS) and max(ports) < 32_768


def test_a_script_of_sbatch_starts_the_same_supervisor(tmp_path):
    of_slurm = {"JOB_ID": "57", "PROCID": "0", "LOCALID": "0", "NTASKS": "1", "JOB_NUM_NODES": "1"}
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "slurm", **{f"SLURM_{k}": v for k, v in of_slurm.items()}}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    words = ["teacher", "runs/teacher", "--time-limit", "1-00:00:00", "--", "--epochs", "none"]
    command = [sys.executable, "-m", "launch.supervisor", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    folder = JobFolder(tmp_path / "runs/jobs/slurm-57-teacher")
    assert done.returncode == 2 and f"rank 0's log: {folder.main_log}" in done.stdout
    assert f"rank 0 on {read_json(folder.failure(0, 0))['host']} failed, exit code 2; log" in done.stderr
    job = Job.read(folder)
    assert (job.id, job.minutes, job.arguments[:2]) == ("57", 24 * 60, ("--out", str(tmp_path / "runs/teacher")))
    assert "--epochs" in folder.main_log.read_text(encoding="utf-8")
    assert read_json(folder.failure(0, 0))["reason"] == Reason.USER_ERROR


# ---- how often a job may start again


def test_two_restarts_without_a_new_checkpoint_end_the_job_and_name_both_logs(tmp_path):
    journal = tmp_path / "attempts.jsonl"
    begin_attempt(journal, 5, "log-0")
    stop_attempt(journal, Stop.PREEMPTED, 3)
    begin_attempt(journal, 5, "log-1")
    with pytest.raises(UserError, match=r"no progress in two restarts .*log-0 and log-1"):
        begin_attempt(journal, 5, "log-2")


def test_whatever_need_not_be_done_again_is_progress(tmp_path):
    journal = tmp_path / "attempts.jsonl"
    begin_attempt(journal, 5, "log-0")
    begin_attempt(journal, 5, "log-1")
    begin_attempt(journal, 6, "log-2")
    begin_attempt(journal, 6, "log-3")
    with pytest.raises(UserError, match="log-2 and log-3"):
        begin_attempt(journal, 6, "log-4")


def test_only_time_outs_are_counted_against_their_limit(tmp_path):
    journal = tmp_path / "attempts.jsonl"
    for step, why in enumerate([Stop.TIME_OUT, Stop.PREEMPTED, Stop.PREEMPTED]):
        begin_attempt(journal, step, "log")
        stop_attempt(journal, why, 1)
    begin_attempt(journal, 9, "log")
    with pytest.raises(UserError, match=r"hit its time limit \(count: 2\) and --max-timeouts is 1"):
        stop_attempt(journal, Stop.TIME_OUT, 1)


def test_progress_is_what_this_job_has_kept_in_its_run_or_its_studys_runs(tmp_path, monkeypatch):
    monkeypatch.setenv(events.JOB_VARIABLE, "0001-teacher")
    study_run = tmp_path / "cached-V/seed-0"
    study_run.mkdir(parents=True)
    assert progress_of(tmp_path, "0001-teacher") == 0
    for folder, code in [(tmp_path, "checkpoint-written"), (tmp_path, "resumed"), (study_run, "block-written")]:
        events.emit(folder, events.Code(code))
    assert progress_of(tmp_path, "0001-teacher") == 2 and progress_of(tmp_path, "0002-teacher") == 0
