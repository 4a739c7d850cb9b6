"""Whole jobs on one and on two simulated GPUs: teacher with its cache, student, study with `online`, `cache write`.

Values mean nothing there; that a job ends, and what it leaves on disk, does.
"""

import json
from pathlib import Path

import pytest

from kd_dist.data import generated

SHORT = ("--device", "cuda", "--image-size", 64, "--batch-size", 8, "--epochs", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "set"
    generated.generate(root, train_per_class=8, val_per_class=4, classes=4)
    return root


def state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def ended(done) -> str:
    """What a job printed; it must have ended well."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module", params=[1, 2], ids=["one-gpu", "two-gpus"])
def teacher(request, data, simulated_job, tmp_path_factory) -> tuple[Path, int]:
    """The folder of a finished teacher with its cache, and how many GPUs made it."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = ("--data", data, "--out", folder, "--views", 3, "--mixup", 0.2, "--cutmix", 0.2, "--ema", 0.9)
    ended(simulated_job("kd_dist.teacher", *SHORT, *flags, devices=request.param))
    return folder, request.param


def test_a_teacher_is_trained_and_writes_its_cache(teacher):
    folder, _ = teacher
    assert state_of(folder)["status"] == "finished"
    assert (folder / "model.pt").exists() and (folder / "logits.h5").exists()


@pytest.mark.parametrize("pixels", ["device", "memory", "off"])
def test_a_student_learns_from_the_cache_wherever_the_images_are(teacher, data, simulated_job, tmp_path, pixels):
    folder, devices = teacher
    flags = ("--data", data, "--cache", folder / "logits.h5", "--out", tmp_path / "student", "--pixels", pixels)
    ended(simulated_job("kd_dist.distill", *SHORT, *flags, devices=devices))
    assert state_of(tmp_path / "student")["status"] == "finished"


def test_more_views_are_written_by_the_teacher(teacher, data, simulated_job, tmp_path):
    folder, devices = teacher
    flags = ("--data", data, "--teacher", folder / "model.pt", "--views", 5, "--mixed-views", 0.5, "--device", "cuda")
    ended(simulated_job("kd_dist.cache", "write", *flags, "-o", tmp_path / "more.h5", devices=devices))
    assert (tmp_path / "more.h5").exists()


def test_a_study_with_the_teacher_in_the_loop(teacher, data, simulated_job, tmp_path):
    folder, devices = teacher
    model = ("--cache", folder / "logits.h5", "--teacher-model", folder / "model.pt")
    flags = (*model, "--arms", "distilled", "online", "--seeds", 0, "--data", data, "--out", tmp_path)
    ended(simulated_job("kd_dist.study", *SHORT, *flags, devices=devices))
    states = [state_of(path.parent)["status"] for path in tmp_path.rglob("state.json")]
    assert states == ["finished"] * 2


def test_a_stopped_student_goes_on_from_its_checkpoint(teacher, data, simulated_job, tmp_path):
    folder, devices = teacher
    flags = ("--data", data, "--cache", folder / "logits.h5", "--out", tmp_path / "student")
    stopped = simulated_job("kd_dist.distill", *SHORT, *flags, devices=devices, STOP_AFTER_STEPS="5")
    assert stopped.returncode != 0 and state_of(tmp_path / "student")["status"] == "interrupted"
    assert state_of(tmp_path / "student")["step"] == 8  # on a GPU the ranks look for signals at an epoch's end
    going_on = ended(simulated_job("kd_dist.distill", *SHORT, *flags, devices=devices))
    assert "from step 8 of 12" in going_on
    assert state_of(tmp_path / "student")["status"] == "finished"
