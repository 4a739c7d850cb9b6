"""What the cluster tests type and look at."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from box import SlurmBox, wait_for

from kd_dist.run.checkpoint import load_model, weights_digest
from kd_dist.run.folder import RunFolder
from kd_dist.run.state import read_state
from launch.supervisor import Job, JobFolder, job_folders

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("--preset=demo", "--image-size=32", "--batch-size=16", "--warmup-epochs=0", "--device=cpu", "--lr=0.003")


@dataclass(frozen=True)
class Cluster:
    """The Slurm, and a folder shared by its nodes in which commands are typed."""

    box: SlurmBox
    folder: Path

    def command(self, *words: str) -> subprocess.CompletedProcess:
        """Type a command in the folder."""
        environment = {**self.box.environment, "PYTHONPATH": str(ROOT)}
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)

    def submit(self, job: str, where: str, *own: str) -> list[JobFolder]:
        """`launch.submit JOB WHERE -- OWN`, which must be accepted; gives the folders of the jobs it made."""
        before = set(self.job_folders())
        done = self.command(sys.executable, "-m", "launch.submit", job, *where.split(), "--", *SIZES, *own)
        assert done.returncode == 0, done.stdout + done.stderr
        return [folder for folder in self.job_folders() if folder not in before]

    def submit_pipeline(self) -> list[JobFolder]:
        """The pipeline that the other tests compare with: two nodes x two ranks, 4 epochs and 30."""
        size = "--nodes 2 --gpus-per-node 0 --ranks-per-node 2 --cpus-per-task 1 --time 30m"
        own = ("--data=data", "--views=2", "--epochs=30")
        return self.submit("pipeline", f"{size} --runs runs --teacher=--epochs=4", *own)

    def job_folders(self) -> list[JobFolder]:
        trees = sorted({path.parent for path in self.folder.glob("**/jobs") if path.is_dir()})
        return [folder for tree in trees for folder in job_folders(tree)]

    def status(self, runs: str, *options: str) -> str:
        """What `launch.status RUNS` prints."""
        done = self.command(sys.executable, "-m", "launch.status", runs, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def end(self, folder: JobFolder, *states: str, seconds: float = 240) -> None:
        """Wait until a job has ended in one of these states."""
        self.box.wait_state(Job.read(folder).id, *states, seconds=seconds)

    def wait_step(self, run: str, step: int, seconds: float = 240) -> None:
        """Wait until a run has done this many steps."""
        wait_for(lambda: self.step(run) >= step, seconds, lambda: f"{run} is at {self.state(run)}")

    def state(self, run: str) -> dict:
        return read_state(RunFolder(self.folder / run)) or {}

    def step(self, run: str) -> int:
        return self.state(run).get("step", 0)

    def weights(self, run: str) -> str:
        """The digest of a finished run's weights."""
        return weights_digest(load_model(RunFolder(self.folder / run).model)["weights"])


def log_of(folder: JobFolder) -> str:
    """Rank 0's output so far."""
    return folder.main_log.read_text(encoding="utf-8") if folder.main_log.exists() else ""
