"""On a real GPU: the CPU's images, soft labels and runs within stated tolerances; no wait of the host; flat memory.

Skipped where there is none; `make gpu` runs them. Bits are not compared: some kernels add in no fixed order.
"""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_dist import distill, teacher
from kd_dist.cache import open_cache
from kd_dist.cache.__main__ import main as cache
from kd_dist.dist.endings import Interrupted
from kd_dist.dist.runtime import Runtime
from kd_dist.images import views
from kd_dist.images.device import TOLERANCE, ResidentPixels
from kd_dist.models import Cnn5
from kd_dist.run.checkpoint import load_model
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.training import Trainer, objectives
from tests.entries import call
from tests.test_exactness import K, make_trainer, random_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
SHORT = ("--device", "cuda", "--precision", "fp32", "--image-size", 64, "--batch-size", 7, "--epochs", 3, "--lr", 0.01)
CLOSE = 0.05  # relative, of a training loss after three short epochs: rounding grows from step to step


@pytest.fixture(scope="module")
def tiny_root(generated_root, tmp_path_factory) -> Path:
    """One copy for this file's jobs, which keep decoded images in it."""
    return Path(shutil.copytree(generated_root, tmp_path_factory.mktemp("set") / "set"))


@pytest.fixture(scope="module")
def made(tiny_root, tmp_path_factory) -> Path:
    """A teacher's folder with a cache, from the GPU."""
    folder = tmp_path_factory.mktemp("gpu") / "teacher"
    call(teacher.main, *SHORT, "--data", tiny_root, "--out", folder, "--views", 3)
    return folder


def student(made: Path, data: Path, out: Path) -> list[object]:
    return [*SHORT, "--data", data, "--cache", made / "logits.h5", "--out", out]


def losses(out: Path) -> list[float]:
    return [row["train_total"] for row in read_metrics(RunFolder(out))]


def test_the_renderer_draws_the_hosts_images(pixels_of):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*side, 3), dtype=np.uint8) for side in ((160, 213), (213, 160), (375, 500))]
    pixels = pixels_of(images)
    index_B = rng.integers(0, len(images), 64)
    boxes_B4 = views.draw_boxes(rng, pixels.sizes_N2[index_B], (0.2, 1.0))
    shown = views.Shown.plain(index_B, boxes_B4, views.draw_flips(rng, 64))
    resident = ResidentPixels(pixels, GPU)
    for size in (64, 128, 160):
        off = (resident.show(shown, size).cpu().int() - views.show(pixels, shown, size).int()).abs()
        assert off.max() <= TOLERANCE and (off > 0).float().mean() <= 1e-3
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(resident.show(shown, size), resident.show(shown, size))


def test_a_cache_of_the_gpu_is_the_cpus_within_the_stated_tolerance(made, tiny_root):
    """`cache verify` computes rows again and refuses those beyond label.commands.TOLERANCE."""
    flags = ("--data", tiny_root, "--teacher", made / "model.pt", "--device", "cpu")
    call(cache, "verify", made / "logits.h5", *flags)
    assert np.isfinite(open_cache(made / "logits.h5").split("train").logits_NVK[:]).all()


def test_two_runs_agree(made, tiny_root, tmp_path):
    for name in ("a", "b"):
        call(distill.main, *student(made, tiny_root, tmp_path / name))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=CLOSE)


def test_a_resumed_run_agrees_with_an_uninterrupted_one(made, tiny_root, tmp_path, monkeypatch):
    call(distill.main, *student(made, tiny_root, tmp_path / "whole"))
    original = Trainer.train_step

    def stopped(self, batch):
        original(self, batch)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(Interrupted):
            call(distill.main, *student(made, tiny_root, tmp_path / "cut"))
    call(distill.main, *student(made, tiny_root, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=CLOSE)
    weights = load_model(RunFolder(tmp_path / "cut").model)["weights"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def trainer_on_gpu(folder: Path, pixels: str) -> Trainer:
    data = random_data(24 * 9, 24, 32)
    if pixels == "device":
        data = replace(data, pixels=ResidentPixels(data.pixels, GPU))
    runtime = Runtime(0, 1, 0, 1, GPU, None)
    return make_trainer(runtime, folder, Cnn5(K, channels=(4, 4, 8, 8, 8)), data, objectives.hard(K, 0.0))


@pytest.mark.parametrize("pixels", ["device", "memory"])
def test_the_host_waits_for_nothing(tmp_path, pixels):
    """torch raises wherever the host would wait, in copies and .item() alike."""
    trainer = trainer_on_gpu(tmp_path, pixels)
    batches = trainer.batches(0)
    for _ in range(4):
        trainer.train_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reserved_memory_is_flat_over_epochs(tmp_path):
    trainer = trainer_on_gpu(tmp_path, "device")
    reserved = []
    for epoch in range(12):
        for batch in trainer.batches(epoch):
            trainer.train_step(batch)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= 1.5 * reserved[1]
