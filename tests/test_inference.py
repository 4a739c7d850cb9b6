"""Logits of a model on given views: right, in fixed batches, and the same at any number of ranks."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kd_dist import inference
from kd_dist.cache import BLOCK_SAMPLES
from kd_dist.dist.runtime import Runtime
from kd_dist.images import views
from kd_dist.inference import FORWARD_BATCH, Forward
from kd_dist.models import Cnn5

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@dataclass(frozen=True)
class LoneRank(Runtime):
    """A rank whose sums are its own part, so that a test can look at each part and add them up."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def rank(number: int, world_size: int) -> LoneRank:
    return LoneRank(number, world_size, number, world_size, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Batches of four, so that 21 images make five whole ones and a rest."""
    monkeypatch.setattr(inference, "FORWARD_BATCH", 4)


@pytest.fixture
def model() -> Cnn5:
    """A network whose running statistics differ from any batch's."""
    torch.manual_seed(0)
    model = Cnn5(3, (4, 8)).train()
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16) + 1)
    return model


@pytest.fixture
def drawn(tiny_pixels) -> views.Shown:
    """A random view of each of the 21 train images."""
    box_NV4, flip_NV = views.cached_views(0, "train", tiny_pixels["train"].sizes_N2, [1], (0.35, 1.0))
    return views.Shown.plain(np.arange(21), box_NV4[:, 0], flip_NV[:, 0])


@pytest.fixture
def forward(model, tiny_pixels) -> Forward:
    return Forward(model, tiny_pixels["train"], 16, MEAN, STD, torch.device("cpu"))


def one_by_one(model: Cnn5, pixels, shown: views.Shown) -> np.ndarray:
    model.eval()
    normalise = views.Normalise(MEAN, STD, torch.float32, torch.device("cpu"))
    rows = []
    for index, box, flip in zip(shown.index_B, shown.box_B4, shown.flip_B, strict=True):
        image_CHW = views.render(pixels[index], box, bool(flip), 16)
        with torch.inference_mode():
            rows.append(model(normalise(image_CHW[None]))[0].numpy())
    model.train()
    return np.stack(rows)


def test_logits_are_the_networks_on_each_image_in_its_view(forward, model, tiny_pixels, drawn):
    logits_NK = forward.logits(drawn)
    assert (logits_NK.shape, logits_NK.dtype) == ((21, 3), np.float32)
    np.testing.assert_allclose(logits_NK, one_by_one(model, tiny_pixels["train"], drawn), atol=1e-5)
    mirrored = views.Shown.plain(drawn.index_B, drawn.box_B4, 1 - drawn.flip_B)
    assert (forward.logits(mirrored) != logits_NK).any(axis=1).all()


def test_images_may_come_in_any_order(forward, drawn):
    places = np.array([20, 3, 3, 11, 0])
    np.testing.assert_allclose(forward.logits(drawn.at(places)), forward.logits(drawn)[places], atol=1e-5)


def test_rows_do_not_depend_on_where_the_work_begins(forward, drawn):
    whole_NK = forward.logits(drawn)
    for start, stop in ((0, 4), (8, 16), (8, 21), (20, 21), (4, 7)):
        part_NK = forward.logits(drawn.at(slice(start, stop)))
        if (stop - start) % 4 == 0 or stop == 21:  # the same batches: the same bits
            np.testing.assert_array_equal(part_NK, whole_NK[start:stop])
        else:
            np.testing.assert_allclose(part_NK, whole_NK[start:stop], atol=1e-5)


def test_images_go_through_in_fixed_batches(forward, model, drawn):
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    forward.logits(drawn.at(slice(4, 21)))
    assert sizes == [4, 4, 4, 4, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_sample_is_computed_on_one_rank(forward, drawn, world_size):
    parts = [forward.all_logits(drawn, 3, rank(number, world_size)).copy() for number in range(world_size)]
    done_RN = np.stack([part_NK.any(axis=1) for part_NK in parts])
    assert (done_RN.sum(axis=0) == 1).all()
    np.testing.assert_array_equal(sum(parts), forward.logits(drawn))


def test_network_is_left_as_it_was(forward, model, drawn):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward.logits(drawn)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    forward.logits(drawn)
    assert not model.training


def test_network_in_float64_gets_images_in_float64(model, tiny_pixels, drawn):
    seen = []
    model.double().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    forward = Forward(model, tiny_pixels["train"], 16, MEAN, STD, torch.device("cpu"))
    assert forward.logits(drawn.at(slice(4))).dtype == np.float32
    assert seen == [torch.float64]


def test_blocks_of_the_cache_are_whole_batches():
    """Else a row's bits would depend on the block it is computed in, and differ from validation's."""
    assert BLOCK_SAMPLES % FORWARD_BATCH == 0


def test_cpu_runs_in_float32():
    """On CPUs bfloat16 is mostly slower; the cache names the type."""
    assert inference.compute_dtype(torch.device("cpu")) == "float32"
    with inference.autocast(torch.device("cpu"), "float32"):
        assert torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32
