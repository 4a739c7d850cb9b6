"""A study on two simulated GPUs: each GPU trains separate students."""

import json

from kd_dist import teacher
from kd_dist.data import generated
from tests.entries import call


def test_a_study_on_two_gpus_trains_a_student_on_each(simulated_job, tmp_path):
    generated.generate(tmp_path / "set", train_per_class=8, val_per_class=4, classes=3, seed=0)
    tiny = ["--data", tmp_path / "set", "--image-size", 32, "--batch-size", 12, "--epochs", 1]
    call(teacher.main, *tiny, "--views", 3, "--out", tmp_path / "teacher", "--device", "cpu")

    arms = ["baseline", "distilled", "online"]
    files = ["--cache", tmp_path / "teacher/logits.h5", "--teacher-model", tmp_path / "teacher/model.pt"]
    asked = ["--arms", *arms, "--seeds", 0, "--out", tmp_path / "study", "--device", "cuda"]
    done = simulated_job("kd_dist.study", *tiny, *files, *asked, devices=2)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "side by side: each of 2 ranks trains separate students" in done.stdout
    states = [json.loads((tmp_path / "study" / arm / "seed-0/state.json").read_text()) for arm in arms]
    assert [state["status"] for state in states] == ["finished"] * 3
    begun = [line for line in done.stdout.splitlines() if "1 rank (cuda" in line]
    assert {line[:8] for line in begun} == {"rank 0 |", "rank 1 |"} and len(begun) == 3
    assert "| online | " in (tmp_path / "study/table.md").read_text()
