"""Images on the device: the batched renderer against the one of `views`, run by the same code on the CPU."""

import numpy as np
import pytest
import torch

from kd_dist.images import device as resident
from kd_dist.images import views
from kd_dist.images.device import TOLERANCE, ResidentPixels
from kd_dist.images.views import Shown

CPU = torch.device("cpu")


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise over a gradient, so that neighbouring pixels differ as much as they ever will, uint8 [H, W, 3]."""
    gradient = np.linspace(0, 200, height)[:, None, None] + np.linspace(0, 55, width)[None, :, None]
    return np.where(rng.random((height, width, 3)) < 0.5, gradient, rng.integers(0, 256, (height, width, 3))).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def stored(pixels_of):
    rng = np.random.default_rng(0)
    return pixels_of([smooth_image(rng, *side) for side in ((160, 213), (213, 160), (160, 160), (9, 300), (1, 1))])


def differences(pixels, shown: Shown, size: int) -> np.ndarray:
    """Grey levels between the two renderers' images, whose shape and layout are the same."""
    host_BCHW, device_BCHW = views.show(pixels, shown, size), ResidentPixels(pixels, CPU).show(shown, size)
    assert device_BCHW.dtype == torch.uint8 and device_BCHW.shape == host_BCHW.shape
    assert device_BCHW.is_contiguous(memory_format=torch.channels_last)
    return (device_BCHW.int() - host_BCHW.int()).abs().numpy()


def random_crops(pixels, n: int, low: float = 0.08) -> Shown:
    rng = np.random.default_rng(1)
    index_B = rng.integers(0, 3, n)
    return Shown.plain(index_B, views.draw_boxes(rng, pixels.sizes_N2[index_B], (low, 1.0)), views.draw_flips(rng, n))


@pytest.mark.parametrize("size", [24, 64, 160])
def test_random_crops_are_those_of_the_host(stored, size):
    shown = random_crops(stored, 24)
    off = differences(stored, shown, size)
    assert off.max() <= TOLERANCE
    largest_scale = shown.box_B4[:, 2:].max() / size
    assert (off > 0).mean() <= (0 if largest_scale < 3 else 1e-3)


@pytest.mark.parametrize("box", [(0, 0, 9, 300), (3, 250, 6, 50), (8, 0, 1, 300), (0, 299, 9, 1), (4, 4, 1, 1)])
def test_extreme_boxes(stored, box):
    """Very long ones, slivers and single pixels, at the border of the image that the smallest one follows."""
    index_B, box_B4 = np.array([3, 4, 3]), np.array([box, (0, 0, 1, 1), box], np.int16)
    off = differences(stored, Shown.plain(index_B, box_B4, np.array([0, 1, 1], np.uint8)), 32)
    assert off.max() <= TOLERANCE and off.mean() < 1e-3


def test_mixes_are_those_of_the_host(stored):
    rng = np.random.default_rng(2)
    own, other = random_crops(stored, 15), random_crops(stored, 15)
    mixes = views.draw_mixes(rng, 15, 0.4, 0.4)
    partner_B = rng.permutation(15)
    shown = Shown(
        *(own.index_B, own.box_B4, own.flip_B),
        *(other.index_B[partner_B], other.box_B4[partner_B], other.flip_B[partner_B]),
        *(mixes.weight_N.astype(np.float32), mixes.paste_N4.astype(np.float32)),
    )
    kinds = {(weight < 1, bool(paste.any())) for weight, paste in zip(shown.weight_B, shown.paste_B4, strict=True)}
    assert kinds >= {(True, True), (True, False), (False, False)}
    assert differences(stored, shown, 64).max() <= TOLERANCE
    unmixed = differences(stored, Shown.plain(own.index_B, own.box_B4, own.flip_B), 64)
    assert views.show(stored, shown, 64).ne(views.show(stored, own, 64)).any() and unmixed.max() == 0


def test_images_do_not_depend_on_the_batch_they_are_in(stored, monkeypatch):
    """Nor on how many are rendered at once."""
    shown = random_crops(stored, 12)
    whole_BCHW = ResidentPixels(stored, CPU).show(shown, 32)
    alone_BCHW = [
        ResidentPixels(stored, CPU).show(Shown.plain(shown.index_B[i : i + 1], shown.box_B4[i : i + 1], flip), 32)
        for i, flip in enumerate(shown.flip_B[:, None])
    ]
    assert torch.equal(whole_BCHW, torch.cat(alone_BCHW))
    monkeypatch.setattr(resident, "WORK_BYTES", 10**6)
    assert torch.equal(whole_BCHW, ResidentPixels(stored, CPU).show(shown, 32))


def test_a_table_of_filters_grows_with_the_crops(stored):
    on_device = ResidentPixels(stored, CPU)
    for box in ((0, 0, 20, 20), (0, 0, 160, 200), (0, 0, 20, 20)):
        shown = Shown.plain(np.array([0]), np.array([box], np.int16), np.array([1], np.uint8))
        assert torch.equal(on_device.show(shown, 32), views.show(stored, shown, 32))


def test_some_of_the_images_are_a_split_of_their_own(stored):
    shown = random_crops(stored.at(np.array([2, 0, 1])), 6)
    some = ResidentPixels(stored, CPU).at(np.array([2, 0, 1]))
    assert torch.equal(some.show(shown, 32), ResidentPixels(stored.at(np.array([2, 0, 1])), CPU).show(shown, 32))


def test_no_images(stored):
    nothing = Shown.plain(np.zeros(0, np.int64), np.zeros((0, 4), np.int16), np.zeros(0, np.uint8))
    assert ResidentPixels(stored, CPU).show(nothing, 16).shape == (0, 3, 16, 16)


def test_weights_add_up_and_are_whole_multiples():
    side_L = torch.tensor([1, 31, 32, 200])
    taps = resident.taps_of(200, 32)
    weights_LST, first_LS = resident.filter_taps(side_L, 32, taps)
    place_LST = first_LS[:, :, None] + torch.arange(taps)
    assert (weights_LST.double().sum(dim=2) - 1).abs().max() < 1e-3
    assert torch.equal((place_LST[2] * weights_LST[2]).sum(dim=1), torch.arange(32.0))
    assert torch.equal(weights_LST * 2**22, (weights_LST * 2**22).round())
    assert not weights_LST[place_LST >= side_L[:, None, None]].any()


# ------------------------------------------------------------------------------- what must not change the images


def same_as_alone(stored) -> bool:
    """Whether crops that are shrunk to a third or less are the host's to the bit."""
    return differences(stored, random_crops(stored, 12), 96).max() == 0


def test_autocast_does_not_reach_the_products(stored):
    with torch.autocast("cpu", torch.bfloat16):
        assert same_as_alone(stored)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_does_not_reach_the_products_and_stays_as_set(stored, monkeypatch, precision):
    matmul, bmm, seen = torch.backends.mkldnn.matmul, torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *of: seen.append(matmul.fp32_precision) or bmm(*of))
    torch.set_float32_matmul_precision(precision)
    try:
        outside = matmul.fp32_precision
        assert same_as_alone(stored) and set(seen) == {"ieee"} and outside != "ieee"
        assert matmul.fp32_precision == outside and torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_nothing_is_left_lowered_or_raised_by_an_error():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(ZeroDivisionError), resident.exact_products(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
            _ = 1 / 0
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("off", [2, -2])
def test_a_renderer_that_is_off_is_found_out(stored, monkeypatch, off):
    on_device = ResidentPixels(stored, CPU)
    assert resident.fault_of(on_device, stored) is None
    show = on_device.show
    monkeypatch.setattr(on_device, "show", lambda *of: (show(*of).int() + off).clamp(0, 255).to(torch.uint8))
    assert "2 grey levels off" in resident.fault_of(on_device, stored)


# -------------------------------------------------------------------------------- crops of very unlike size


def padded_pixels(sides_C2: np.ndarray, classes) -> int:
    return sum(len(members) * int(sides_C2[members].max(axis=0).prod()) for members in classes)


def test_similar_crops_are_one_class():
    sides_C2 = np.random.default_rng(0).integers(120, 214, (256, 2))
    assert [len(members) for members in resident.size_classes(sides_C2)] == [256]


@pytest.mark.parametrize("seed", range(5))
def test_a_few_large_crops_do_not_pad_the_others(seed):
    rng = np.random.default_rng(seed)
    sides_C2 = views.draw_boxes(rng, np.tile([[375, 500]], (256, 1)), (0.35, 1.0))[:, 2:].astype(np.int64)
    alone = padded_pixels(sides_C2, resident.size_classes(sides_C2))
    sides_C2[::64] = views.draw_boxes(rng, np.tile([[2000, 3000]], (4, 1)), (0.35, 1.0))[:, 2:]
    classes = resident.size_classes(sides_C2)
    assert len(classes) == 2 and padded_pixels(sides_C2, classes) <= 2 * alone
    assert np.array_equal(np.sort(np.concatenate(classes)), np.arange(256))


def test_large_and_small_crops_come_back_in_their_order(pixels_of):
    rng = np.random.default_rng(3)
    pixels = pixels_of([smooth_image(rng, *side) for side in ((40, 50), (400, 500), (41, 44), (30, 20))])
    index_B = np.array([1, 0, 2, 3, 0, 2, 1, 3, 0, 0, 2, 2])
    crops = (index_B, views.draw_boxes(rng, pixels.sizes_N2[index_B], (0.5, 1.0)), views.draw_flips(rng, 12))
    assert len(resident.size_classes(crops[1][:, 2:])) > 1
    mixes, partner_B = views.draw_mixes(rng, 12, 0.4, 0.4), rng.permutation(12)
    mix = (mixes.weight_N.astype(np.float32), mixes.paste_N4.astype(np.float32))
    off = differences(pixels, Shown(*crops, *(column[partner_B] for column in crops), *mix), 48)
    assert off.max() <= TOLERANCE and (off > 0).mean() < 1e-3


def test_work_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(resident, "WORK_BYTES", 10**7)
    sides = [np.full((7, 2), 300), np.full((2, 2), 4000)]
    pieces = list(resident._pieces(sides, 64))
    assert [piece[:2] for piece in pieces] == [(0, 5), (5, 2), (7, 1), (8, 1)]
