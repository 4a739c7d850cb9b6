"""How all ranks end together: killed, stopped or refused ranks whose peers wait in C, where no signal handler runs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kd_dist.dist import endings
from kd_dist.errors import EXIT_PEER_LOST, EXIT_USER_ERROR
from kd_dist.run.folder import RunFolder
from kd_dist.run.state import read_state
from tests.ranks import free_port

REPO = Path(__file__).parent.parent
START_SECONDS, END_SECONDS = 120, 60


class Job:
    """Ranks of `tests.ending_ranks`, started one by one or by torchrun, and what they say."""

    def __init__(self, folder: Path, scene: str, ranks: int = 2, torchrun: bool = False, **environment: str):
        folder.mkdir(exist_ok=True)
        self.folder, self.count = folder, ranks
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **environment}
        rank = ["tests.ending_ranks", scene, str(folder)]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        if torchrun:
            self.processes = [self.start([*launcher, *rank])]
        else:
            self.processes = [self.start(rank, **place, RANK=n, LOCAL_RANK=n) for n in range(ranks)]
        self.pids = [self.pid(number) for number in range(ranks)]

    def start(self, command: list[str], **environment: object) -> subprocess.Popen:
        variables = {**self.environment, **{name: str(value) for name, value in environment.items()}}
        return subprocess.Popen(
            [sys.executable, "-m", *command], env=variables, cwd=REPO, stderr=subprocess.PIPE, text=True
        )

    def pid(self, rank: int) -> int:
        deadline = time.monotonic() + START_SECONDS
        while not (file := self.folder / f"pid-{rank}").exists() or not file.read_text():
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        return int(file.read_text())

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(self.count):
            os.kill(self.pids[rank], number)

    def end(self) -> list[int]:
        """The exit codes of the processes that were started here; `said` becomes the lines of ours on stderr."""
        try:
            outputs = [process.communicate(timeout=END_SECONDS)[1] for process in self.processes]
        finally:
            for pid in self.pids:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
                    pytest.fail(f"process {pid} outlived the job", pytrace=False)
        self.stderr = "".join(outputs)
        self.said = [line for line in self.stderr.splitlines() if line.startswith("kd_dist:")]
        return [process.returncode for process in self.processes]

    @property
    def state(self) -> tuple[str, str]:
        state = read_state(RunFolder(self.folder))
        return state["status"], state["message"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("scene", ["blocked", "in_a_collective"])
def test_ranks_that_wait_in_c_end_when_one_is_killed(tmp_path, scene):
    job = Job(tmp_path, scene, ranks=3)
    job.signal(signal.SIGKILL, 2)
    assert job.end() == [EXIT_PEER_LOST, EXIT_PEER_LOST, -signal.SIGKILL]
    (sentence,) = job.said
    assert re.match(r"kd_dist: rank 2 on \S+ died without a message .* run the same command again", sentence)
    assert job.state == ("failed", sentence.removeprefix("kd_dist: "))
    assert "Traceback" not in job.stderr


def test_ranks_that_wait_in_c_end_when_rank_0_and_its_store_are_killed(tmp_path):
    job = Job(tmp_path, "rank_0_waits", ranks=3)
    job.signal(signal.SIGKILL, 0)
    assert job.end() == [-signal.SIGKILL, EXIT_PEER_LOST, EXIT_PEER_LOST]
    (sentence,) = job.said
    assert "rank 0 on" in sentence and job.state == ("failed", sentence.removeprefix("kd_dist: "))


def test_a_stop_signal_does_not_keep_ranks_whose_peer_is_gone(tmp_path):
    """Slurm and torchrun send SIGTERM to the ranks that are left; they wait in C, so no handler runs."""
    job = Job(tmp_path, "blocked")
    job.signal(signal.SIGTERM, 0)
    job.signal(signal.SIGKILL, 1)
    assert job.end() == [EXIT_PEER_LOST, -signal.SIGKILL]
    assert job.state[0] == "failed" and len(job.said) == 1


def test_a_killed_rank_under_torchrun(tmp_path):
    job = Job(tmp_path, "blocked", torchrun=True)
    job.signal(signal.SIGKILL, 1)
    assert job.end() == [1]
    (sentence,) = job.said
    assert "rank 1 on" in sentence and job.state == ("failed", sentence.removeprefix("kd_dist: "))


def test_a_sentence_of_one_rank_is_the_root_cause_of_torchruns_report(tmp_path):
    job = Job(tmp_path, "refuses", torchrun=True)
    assert job.end() == [1]
    sentence = "kd_dist: the file of rank 1 is damaged; copy it again."
    assert job.said == [sentence] and job.state == ("failed", sentence.removeprefix("kd_dist: "))
    root_cause = job.stderr.split("Root Cause (first observed failure):")[1]
    assert "rank      : 1" in root_cause and f"exitcode  : {EXIT_USER_ERROR}" in root_cause
    assert root_cause.rstrip(" =\n").endswith(f"traceback : {sentence}")
    assert not re.search(r"File .*(kd_dist|tests)/", job.stderr)


def test_ranks_that_wait_in_c_end_with_the_code_of_the_one_that_refuses(tmp_path):
    job = Job(tmp_path, "refuses", ranks=3)
    assert job.end() == [EXIT_USER_ERROR] * 3
    assert job.said == ["kd_dist: the file of rank 1 is damaged; copy it again."]


@pytest.mark.slow
def test_an_error_of_nccl_is_shown_in_its_own_words(tmp_path):
    job = Job(tmp_path, "nccl")
    assert job.end() == [1, 1]
    (sentence,) = job.said
    assert "NCCL failed: " in sentence and "Cuda failure 'peer access denied'" in sentence
    assert job.state == ("failed", sentence.removeprefix("kd_dist: ")) and "Traceback" not in job.stderr


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path):
    job = Job(tmp_path, "blocked", ranks=3, KD_DIST_SILENCE_SECONDS="5")
    job.signal(signal.SIGSTOP, 2)
    (process,) = job.processes[2:]
    codes = [process.wait(END_SECONDS) for process in job.processes[:2]]
    process.kill()
    job.end()
    assert codes == [EXIT_PEER_LOST] * 2
    (sentence,) = job.said
    assert re.match(r"kd_dist: rank 2 on \S+ has not answered for 5 s", sentence)
    assert job.state == ("failed", sentence.removeprefix("kd_dist: "))


@pytest.mark.slow
def test_a_stop_waits_for_a_slow_rank_and_all_save(tmp_path):
    job = Job(tmp_path, "slow_to_stop")
    job.signal(signal.SIGTERM)
    assert job.end() == [128 + signal.SIGTERM] * 2
    assert job.state == ("interrupted", "stopped by SIGTERM")
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert job.said == ["kd_dist: stopped by SIGTERM; run the same command again to resume."]


@pytest.mark.slow
def test_a_rank_that_waits_for_all_stops_with_the_one_that_was_stopped(tmp_path):
    job = Job(tmp_path, "leaves_early")
    job.signal(signal.SIGTERM, 1)
    assert job.end() == [128 + signal.SIGTERM] * 2
    assert job.state == ("interrupted", "stopped by SIGTERM") and len(job.said) == 1


def test_a_killed_launcher_is_noted(tmp_path):
    job = Job(tmp_path, "blocked", torchrun=True)
    job.processes[0].kill()
    deadline = time.monotonic() + END_SECONDS
    while any(map(is_alive, job.pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.end()
    assert job.state[0] == "failed" and "the launcher of rank" in job.state[1]


# ---- what an error means


def test_a_full_gpu_names_what_to_change():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"
    failure = endings.failure_of(torch.OutOfMemoryError(f"{text}. Of the allocated memory 70 GiB is by PyTorch."))
    assert failure.code == EXIT_USER_ERROR and failure.traceback is None
    assert "--batch-size" in failure.sentence and "--pixels memory" in failure.sentence and text in failure.sentence
    assert "Of the allocated" not in failure.sentence


@pytest.mark.parametrize(
    ("text", "said", "code"),
    [
        ("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1", "connection to another rank broke", 3),
        ("NCCL error: ncclRemoteError: A call failed\nremote process exited", "connection to another rank broke", 3),
        ("Timed out waiting 600000ms for recv operation to complete", "did not come to a collective in time", 3),
        ("NCCL error\nncclInvalidUsage: Duplicate GPU detected", "ncclInvalidUsage: Duplicate GPU detected", 1),
    ],
)
def test_errors_of_collectives_keep_their_own_words(text, said, code):
    failure = endings.failure_of(torch.distributed.DistBackendError(text))
    assert said in failure.sentence and text.splitlines()[0] in failure.sentence and failure.code == code


def test_a_defect_keeps_its_traceback():
    failure = endings.failure_of(ZeroDivisionError("division by zero"))
    assert failure.code == 1 and "ZeroDivisionError" in failure.traceback
