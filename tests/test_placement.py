"""Where images are while a job runs, `--pixels`: the same batches and rows from memory, files and device."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_dist import job, label
from kd_dist.cache import BlockWriter, TeacherRow, open_cache
from kd_dist.config import MEAN, STD, DataConfig
from kd_dist.dist.endings import StopRequest
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.images import device as resident
from kd_dist.images import views
from kd_dist.images.device import TOLERANCE, ResidentPixels
from kd_dist.images.store import ImageFiles, Pixels, measure_files, open_files, open_pixels
from kd_dist.job import Data, open_data
from kd_dist.models import Cnn5
from kd_dist.run import checkpoint
from kd_dist.training.batches import FreshCrops, TrainData


@pytest.fixture
def opened(tiny_root, tmp_path, one_process):
    """Opens the tiny set the way `--pixels` says, its store in a folder of this test."""

    def open_as(where: str) -> Data:
        return open_data(DataConfig(data=str(tiny_root), pixels=where, pixels_dir=str(tmp_path / "store")), one_process)

    return open_as


def batches_of(data: Data, runtime: Runtime, workers: int = 0):
    pixels = data.pixels["train"]
    crops = FreshCrops(pixels.sizes_N2, (0.35, 1.0), seed=5)
    train = TrainData(pixels, data.samples.train.labels_N, crops, 24, 4, seed=5, mixup=0.3, cutmix=0.3)
    return list(train.epoch(1, runtime, workers))


def test_files_give_the_stores_batches_bit_for_bit_and_leave_no_store(opened, one_process, tmp_path):
    from_files = opened("off")
    assert isinstance(from_files.pixels["train"], ImageFiles)
    assert list((tmp_path / "store").glob("*.u8")) == []
    in_memory = opened("memory")
    assert isinstance(in_memory.pixels["train"], Pixels)
    assert np.array_equal(from_files.pixels["train"].sizes_N2, in_memory.pixels["train"].sizes_N2)
    assert np.array_equal(opened("off").pixels["val"].sizes_N2, in_memory.pixels["val"].sizes_N2)
    for workers in (0, 2):
        for a, b in zip(batches_of(in_memory, one_process), batches_of(from_files, one_process, workers), strict=True):
            assert all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())


def test_sizes_alone_are_not_taken_for_a_store(tiny, tmp_path):
    measure_files(tiny.train, tmp_path, 1, lambda done, total: None)
    assert open_files(tiny.train, tmp_path) is not None and open_pixels(tiny.train, tmp_path) is None
    assert open_files(tiny.val, tmp_path) is None


def test_resident_images_give_the_same_batches_but_for_a_grey_level(opened, one_process):
    in_memory, on_device = opened("memory"), opened("device")
    assert isinstance(on_device.pixels["train"], ResidentPixels)
    pairs = list(zip(batches_of(in_memory, one_process), batches_of(on_device, one_process, workers=2), strict=True))
    assert len(pairs) == 6
    for a, b in pairs:
        assert (a.images_BCHW.int() - b.images_BCHW.int()).abs().max() <= TOLERANCE
        others = [name for name in a.tensors() if name != "images_BCHW"]
        assert all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in others)


def in_tf32(values: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32's ten bits of mantissa."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_a_device_that_computes_in_tf32_leaves_the_images_to_the_host(opened, monkeypatch, capsys):
    """As NVIDIA_TF32_OVERRIDE makes cuBLAS do, whatever torch asks of it."""
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda one, other: bmm(in_tf32(one), in_tf32(other)))
    assert isinstance(opened("device").pixels["train"], Pixels)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"kd_dist: GPU-rendered crops differ .*% of the pixel values\); all images will be rendered on the CPU.*",
        lines[-1],
    )


def test_images_too_large_for_the_device_are_left_to_the_host(opened, monkeypatch, capsys):
    monkeypatch.setattr(resident, "LONGEST_SIDE", 10)
    assert isinstance(opened("device").pixels["train"], Pixels)
    assert "takes 10 at most; all images will be rendered on the CPU" in capsys.readouterr().out


def test_on_a_cpu_auto_is_the_hosts_memory(opened):
    assert isinstance(opened("auto").pixels["val"], Pixels)


def test_images_that_do_not_fit_the_device_are_refused_in_a_sentence(opened, monkeypatch):
    monkeypatch.setattr(job.data, "free_bytes", lambda device: 1000.0)
    with pytest.raises(UserError, match=r"--pixels device needs .* GB .* use --pixels memory"):
        opened("device")


def test_a_gpu_takes_the_images_where_there_is_room(tiny_pixels, monkeypatch):
    """As far as can be told without one: how `auto` decides, with the copy left out."""
    monkeypatch.setattr(resident, "ResidentPixels", lambda pixels, device: device.type)
    monkeypatch.setattr(resident, "fault_of", lambda on_device, pixels: None)
    on_gpu = Runtime(0, 1, 0, 1, torch.device("cuda"), None)
    needed = sum(len(pixels.bytes_) for pixels in tiny_pixels.values())
    for free, expected in (
        (needed / job.data.RESIDENT_SHARE * 1.01, "cuda"),
        (needed / job.data.RESIDENT_SHARE * 0.99, None),
    ):
        monkeypatch.setattr(job.data, "free_bytes", lambda device, free=free: free)
        placed = job.data._placed(tiny_pixels, "auto", on_gpu)
        assert placed == ({"train": "cuda", "val": "cuda"} if expected else tiny_pixels)
    assert job.data._placed(tiny_pixels, "memory", on_gpu) == tiny_pixels


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_broken_meanwhile_is_named_in_one_line(tiny, one_process, tmp_path, workers):
    measure_files(tiny.train, tmp_path, 1, lambda done, total: None)
    files = open_files(tiny.train, tmp_path)
    sizes_N2 = files.sizes_N2.copy()
    sizes_N2[7] += 1
    data = Data(None, {"train": ImageFiles(tiny.train, sizes_N2)})
    train = TrainData(data.pixels["train"], tiny.train.labels_N, FreshCrops(files.sizes_N2, (0.9, 1.0), 0), 16, 4, 0)
    with pytest.raises(UserError) as caught:
        list(train.epoch(0, one_process, workers))
    assert Path(tiny.train.paths[7]).name in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the cache


def teacher_of(data: Data) -> label.Teacher:
    torch.manual_seed(1)
    model = Cnn5(len(data.samples.classes), channels=(4, 4, 8, 8, 8)).eval()
    row = TeacherRow(checkpoint.weights_digest(model.state_dict()), "cnn5", 1, -1, 32, 0.0)
    return label.Teacher(model, row, MEAN, STD, data.samples.classes, (0.4, 1.0), "2026-01-01T00:00:00+00:00")


def written(data: Data, target: Path, runtime: Runtime, threads: int = 0):
    data = Data(data.samples, data.pixels, threads)
    teacher = teacher_of(data)
    plan = label.plan([teacher], data, label.ViewRule(3, (0.4, 1.0), seed=5), "float32")
    labeller = label.Labeller([teacher], data, plan.header, runtime.device)
    label.write_cache(target, plan, labeller, runtime, StopRequest(), lambda done, total: None)
    return open_cache(target)


def test_a_cache_says_who_drew_it_and_either_renderer_is_read(opened, one_process, tmp_path):
    host = written(opened("memory"), tmp_path / "host.h5", one_process)
    files = written(opened("off"), tmp_path / "files.h5", one_process, threads=2)
    device = written(opened("device"), tmp_path / "device.h5", one_process)
    assert host.header.renderer == views.RENDERER and device.header.renderer == views.DEVICE_RENDERER
    assert host.path.read_bytes() == files.path.read_bytes()
    for cache in (host, device):
        views.require_renderer(cache.header.renderer, cache.path)
    with pytest.raises(UserError, match="some-renderer/7"):
        views.require_renderer("some-renderer/7", host.path)
    for split in ("train", "val"):
        a, b = (cache.split(split).logits_NVK.astype(np.float32) for cache in (host, device))
        assert np.abs(a - b).max() < 0.01


def test_a_block_that_cannot_be_written_ends_the_writing(opened, one_process, tmp_path, monkeypatch):
    """Though it is written in the background."""

    def put(self, block, logits_BK):
        raise UserError("the disk is full")

    monkeypatch.setattr(BlockWriter, "put", put)
    with pytest.raises(UserError, match="the disk is full"):
        written(opened("memory"), tmp_path / "host.h5", one_process)
