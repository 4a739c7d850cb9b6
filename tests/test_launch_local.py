"""The same commands without Slurm: a pipeline and a study as processes of this machine, and the debugger's mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.supervisor import Job, JobFolder, job_folders, read_json

ROOT = Path(__file__).parent.parent
SIZES = ("--preset=demo", "--image-size=32", "--batch-size=7", "--warmup-epochs=0", "--epochs=1", "--lr=0.003")


@pytest.fixture
def launch(tmp_path, tiny_root):
    """Type a command in an empty folder: launch("submit", "teacher", ...)."""

    def command(*words: str, code: int = 0) -> str:
        mine = {"PYTHONPATH": str(ROOT), "KD_DIST_DATA": str(tiny_root), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{words[0]}", *words[1:]],
            cwd=tmp_path,
            env={**os.environ, **mine},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return command


def test_a_pipeline_here_runs_one_job_after_the_other(launch, tmp_path):
    said = launch("submit", "pipeline", "--cluster=local", "--nodes=2", "--", *SIZES, "--views=2")
    assert "teacher: job" in said and "has succeeded" in said
    assert not (tmp_path / "runs/teacher/model.pt").exists(), "launch.submit waited for its jobs"
    shown = launch("status", "runs", "--follow", "--every=0.5")
    assert shown.rstrip().splitlines()[-2].split()[2] == shown.rstrip().splitlines()[-1].split()[2] == "finished"
    assert (tmp_path / "runs/student/model.pt").exists()
    teacher, student = job_folders(tmp_path / "runs")
    assert read_json(teacher.ended)["time"] <= read_json(student.ended)["time"]
    assert "nothing to do" in launch("submit", "pipeline", "--cluster=local", "--nodes=2", "--", *SIZES, "--views=2")


@pytest.mark.slow
def test_a_failed_teacher_here_drops_its_student(launch, tmp_path):
    launch("submit", "pipeline", "--cluster=local", "--", *SIZES, "--teacher=nonet")
    shown = launch("status", "--follow", "--every=0.5", code=1)
    assert "dropped: 0001-teacher failed" in shown and "rank 0 on" in shown and "--teacher nonet is not known" in shown
    assert not JobFolder(tmp_path / "runs/jobs/0002-distill").main_log.read_text(encoding="utf-8")


def test_debug_runs_in_this_process(launch, tmp_path):
    said = launch("submit", "distill", "--cluster=debug", "--", *SIZES, "--alpha=0", "--device=cpu")
    assert "epoch 1/1" in said and (tmp_path / "runs/student/model.pt").exists()


@pytest.mark.slow
def test_two_workers_share_a_study(launch, tmp_path):
    launch("submit", "teacher", "--cluster=debug", "--gpus-per-node=0", "--", *SIZES, "--views=3")
    own = ("--", *SIZES, "--cache=runs/teacher/logits.h5")
    launch("submit", "study", "--cluster=local", "--arms", "distilled", "--seeds", "0", "1", "--array=2", *own)
    launch("status", "--follow", "--every=0.5")
    assert all((tmp_path / f"runs/study/distilled/seed-{seed}/model.pt").exists() for seed in (0, 1))
    assert (tmp_path / "runs/study/table.md").exists()
    jobs = [Job.read(folder) for folder in job_folders(tmp_path / "runs")]
    assert len(jobs) == 2 and {job.environment["CUDA_VISIBLE_DEVICES"] for job in jobs} == {""}
    assert all("--device cpu" in " ".join(job.arguments) for job in jobs)
