"""The sbatch scripts as they stand, with another size typed to sbatch: they train, and resume after a warning."""

import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from box import wait_for
from shared import ROOT, SIZES

from kd_dist.run.folder import RunFolder
from launch.supervisor import Job, JobFolder

SIZE = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")


@pytest.fixture
def checkout(reference) -> Path:
    """A folder with kd_dist/, launch/ and slurm/ as one has it after cloning."""
    folder = reference.folder / "checkout"
    if not folder.exists():
        for name in ("kd_dist", "launch", "slurm"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".venv").symlink_to(sys.prefix)
    return folder


def sbatch(reference, checkout, *words: str) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable", *words], cwd=checkout, env=reference.box.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def own(reference, *more: str) -> tuple[str, ...]:
    return (*SIZES, f"--data={reference.folder / 'data'}", *more)


def test_teacher_then_distill_which_is_warned_and_requeued(reference, checkout):
    box = reference.box
    run = RunFolder(checkout / "runs/student")
    teacher = sbatch(reference, checkout, *SIZE, "slurm/teacher.sbatch", *own(reference, "--views=2", "--epochs=1"))
    student = sbatch(
        *(reference, checkout, *SIZE, f"--dependency=afterok:{teacher}", "slurm/distill.sbatch"),
        *own(reference, "--epochs=40", "--checkpoint-minutes=0.02"),
    )
    box.wait_state(teacher, "COMPLETED", "FAILED", seconds=200)
    assert box.state(teacher) == "COMPLETED", (checkout / f"kd-teacher-{teacher}.log").read_text(encoding="utf-8")
    rows = reference.status(str(checkout / "runs")).splitlines()
    assert rows[1].split()[:3] == [f"slurm-{teacher}-teacher", teacher, "finished"]
    wait_for(lambda: len(run.saved_steps()) > 1, 200, lambda: log_in(checkout, student))
    box.run("scancel", "--signal=USR2", student)
    box.wait_state(student, "PENDING", "FAILED", "COMPLETED")
    assert not box.processes(str(run.path)), "ranks were left behind"
    box.release(student)
    box.wait_state(student, "COMPLETED", "FAILED", seconds=200)
    assert box.state(student) == "COMPLETED" and "resuming from step" in log_in(checkout, student), log_in(
        checkout, student
    )

    folder = JobFolder(checkout / f"runs/jobs/slurm-{student}-distill")
    assert (Job.read(folder).nodes, folder.last_attempt()) == (2, 1)
    assert '"why": "preempted"' in folder.attempts.read_text(encoding="utf-8")


def log_in(checkout: Path, job: str) -> str:
    """What the batch script printed, and rank 0's log."""
    printed = (checkout / f"kd-distill-{job}.log").read_text(encoding="utf-8")
    log = checkout / f"runs/jobs/slurm-{job}-distill/rank-0.log"
    return printed + (log.read_text(encoding="utf-8") if log.exists() else "")


def test_tensorboard_listens_on_localhost_and_says_how_to_reach_it(reference, checkout):
    job = sbatch(reference, checkout, "slurm/tensorboard.sbatch", str(reference.folder / "runs"))
    log = checkout / f"kd-tensorboard-{job}.log"
    port = 20000 + int(job) % 12000

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5).status == 200
        except OSError:
            return False

    wait_for(answers, 90, lambda: log.read_text(encoding="utf-8"))
    shown = log.read_text(encoding="utf-8")
    node = reference.box.facts(job)["NodeList"]
    (line,) = [line for line in shown.splitlines() if f"ssh -N -L {port}:localhost:{port} -J " in line]
    assert line.endswith(f"@{node}"), "the node that it runs on is at the end"
    assert listeners(port) == {"127.0.0.1"}, "nobody outside the node reaches it"
    reference.box.run("scancel", job)
    reference.box.wait_state(job, "CANCELLED")
    wait_for(lambda: not listeners(port), 60, lambda: "TensorBoard outlives its job")


def listeners(port: int) -> set[str]:
    """The addresses of this machine on which something listens at a TCP port, from the kernel's tables."""
    tables = (Path(f"/proc/net/{name}").read_text(encoding="utf-8") for name in ("tcp", "tcp6"))
    rows = [line.split()[1:4] for table in tables for line in table.splitlines()[1:]]
    found = {local.rpartition(":")[0] for local, _, state in rows if local.endswith(f":{port:04X}") and state == "0A"}
    return {"127.0.0.1" if address == "0100007F" else address for address in found}
