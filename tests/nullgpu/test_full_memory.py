"""A simulated GPU whose memory is too small for the batch: one sentence, which names what to change."""

import json

import pytest

from kd_dist.data.generated import generate


@pytest.mark.parametrize("devices", [1, 2])
def test_a_full_gpu_is_one_sentence(simulated_job, tmp_path, devices):
    generate(tmp_path / "set", train_per_class=40, val_per_class=2, seed=0)
    shape = ["--image-size", 224, "--batch-size", 400, "--epochs", 1, "--workers", 0, "--device", "cuda"]
    data = ["--data", tmp_path / "set", "--out", tmp_path / "run", "--pixels", "memory"]
    done = simulated_job("kd_dist.teacher", *data, *shape, devices=devices, memory_gib=1)
    assert done.returncode == (2 if devices == 1 else 1)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("kd_dist:")]
    assert "memory is full" in sentence and "Tried to allocate" in sentence
    assert "--batch-size" in sentence and "--pixels memory" in sentence
    assert "kd_dist/training/" not in done.stderr
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "failed" and f"kd_dist: {state['message']}".split("GPU ")[0] == sentence.split("GPU ")[0]
