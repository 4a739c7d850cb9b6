"""Views: boxes that fit, draws that do not depend on the order of work, and a renderer that agrees with Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image

from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.images.views import (
    Normalise,
    Shown,
    cached_views,
    draw_boxes,
    draw_flips,
    draw_mixes,
    evaluation_boxes,
    render,
)

ODD_SIZES_N2 = np.array(
    [
        (1, 1),
        (1, 50),
        (50, 1),
        (2, 3),
        (3, 2),
        (7, 500),
        (500, 7),
        (3, 2000),
        (160, 213),
        (213, 160),
        (160, 160),
        (375, 500),
    ]
)


def assert_inside(box_N4: np.ndarray, sizes_N2: np.ndarray) -> None:
    top_left_N2, height_width_N2 = box_N4[:, :2].astype(int), box_N4[:, 2:].astype(int)
    assert (top_left_N2 >= 0).all()
    assert (height_width_N2 >= 1).all()
    assert (top_left_N2 + height_width_N2 <= sizes_N2).all()


# --------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("crop_scale", [(0.35, 1.0), (0.01, 0.05), (1.0, 1.0)])
def test_boxes_lie_inside_images_of_odd_sizes(crop_scale):
    for seed in range(40):
        box_N4 = draw_boxes(np.random.default_rng(seed), ODD_SIZES_N2, crop_scale)
        assert (box_N4.shape, box_N4.dtype) == ((len(ODD_SIZES_N2), 4), np.int16)
        assert_inside(box_N4, ODD_SIZES_N2)


def test_boxes_have_the_areas_and_ratios_asked_for():
    """On an image where every draw fits, rounding to whole pixels is the only slack."""
    sizes_N2 = np.full((4000, 2), 400)
    box_N4 = draw_boxes(np.random.default_rng(0), sizes_N2, (0.2, 0.5)).astype(float)
    height_N, width_N = box_N4[:, 2], box_N4[:, 3]
    share_N, ratio_N = height_N * width_N / 400**2, width_N / height_N
    assert share_N.min() == pytest.approx(0.2, abs=0.004)
    assert share_N.max() == pytest.approx(0.5, abs=0.004)
    assert share_N.mean() == pytest.approx(0.35, abs=0.005)
    assert ratio_N.min() == pytest.approx(3 / 4, abs=0.01)
    assert ratio_N.max() == pytest.approx(4 / 3, abs=0.01)
    assert np.log(ratio_N).mean() == pytest.approx(0, abs=0.01)
    assert np.median(ratio_N) == pytest.approx(1, abs=0.02)


def test_boxes_reach_all_corners():
    box_N4 = draw_boxes(np.random.default_rng(0), np.full((4000, 2), 20), (0.3, 0.6)).astype(int)
    room_N2 = 20 - box_N4[:, 2:]
    for axis in (0, 1):
        assert (box_N4[:, axis] == 0).any()
        assert (box_N4[:, axis] == room_N2[:, axis]).any()
        assert (box_N4[:, axis] / room_N2[:, axis].clip(1)).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((30, 600), (0, 280, 30, 40)),  # as high as the image, 4 to 3, centred
        ((600, 30), (280, 0, 40, 30)),
        ((1, 9), (0, 4, 1, 1)),
    ],
)
def test_images_too_narrow_for_any_draw_give_the_largest_centred_box(size, box):
    for seed in range(20):
        assert tuple(draw_boxes(np.random.default_rng(seed), np.array([size]), (0.35, 1.0))[0]) == box


def test_whole_image_is_the_fallback_where_its_ratio_is_allowed():
    """A share of all of an image that is not square: most draws do not fit, and what is left keeps everything."""
    sizes_N2 = np.full((200, 2), (100, 120))
    box_N4 = draw_boxes(np.random.default_rng(0), sizes_N2, (1.0, 1.0))
    whole_N = (box_N4 == (0, 0, 100, 120)).all(axis=1)
    assert whole_N.mean() > 0.5


def test_boxes_of_huge_images_are_right_or_refused():
    """Sides beyond what the stored type holds must not wrap around."""
    sizes_N2 = np.full((50, 2), (4000, 44000))
    try:
        box_N4 = draw_boxes(np.random.default_rng(0), sizes_N2, (0.05, 0.1))
    except UserError:
        return
    assert_inside(box_N4, sizes_N2)


def test_evaluation_view_is_the_centre_square():
    box_N4 = evaluation_boxes(np.array([(160, 213), (213, 160), (5, 5), (1, 8), (9, 2)]))
    assert box_N4.tolist() == [[0, 26, 160, 160], [26, 0, 160, 160], [0, 0, 5, 5], [0, 3, 1, 1], [3, 0, 2, 2]]
    assert box_N4.dtype == np.int16


def test_flips_come_at_even_odds():
    flip_N = draw_flips(np.random.default_rng(0), 4000)
    assert set(flip_N) == {0, 1}
    assert flip_N.mean() == pytest.approx(0.5, abs=0.03)


# -------------------------------------------------------------------------------------------------------- cached views


def test_view_zero_is_the_evaluation_view():
    box_NV4, flip_NV = cached_views(0, "train", ODD_SIZES_N2, range(3), (0.35, 1.0))
    assert (box_NV4.shape, box_NV4.dtype) == ((len(ODD_SIZES_N2), 3, 4), np.int16)
    assert (flip_NV.shape, flip_NV.dtype) == ((len(ODD_SIZES_N2), 3), np.uint8)
    np.testing.assert_array_equal(box_NV4[:, 0], evaluation_boxes(ODD_SIZES_N2))
    assert not flip_NV[:, 0].any()
    assert flip_NV[:, 1:].any()


def test_more_views_are_appended():
    few, more = (cached_views(0, "train", ODD_SIZES_N2, range(v), (0.35, 1.0)) for v in (3, 6))
    for a, b in zip(few, more, strict=True):
        np.testing.assert_array_equal(a, b[:, :3])


def test_order_of_the_work_does_not_matter():
    whole = cached_views(0, "train", ODD_SIZES_N2, range(6), (0.35, 1.0))
    cached_views(0, "val", ODD_SIZES_N2[:5], range(4), (0.35, 1.0))  # another split in between takes nothing away
    some = cached_views(0, "train", ODD_SIZES_N2, [4, 0, 2], (0.35, 1.0))
    for a, b in zip(some, whole, strict=True):
        np.testing.assert_array_equal(a, b[:, [4, 0, 2]])


def test_views_differ_by_seed_split_number_and_image():
    sizes_N2 = np.full((30, 2), (160, 213))

    def boxes(seed=0, split="train", view=1):
        return cached_views(seed, split, sizes_N2, [view], (0.35, 1.0))[0][:, 0]

    for other in (boxes(seed=1), boxes(split="val"), boxes(view=2)):
        assert (boxes() != other).any(axis=1).mean() > 0.9
    assert len(np.unique(boxes(), axis=0)) > 25


def test_views_are_those_of_the_first_version():
    """Recorded once. Caches name this way of drawing, and `extend` adds to what it drew: another needs another name."""
    sizes_N2 = np.array([(160, 213), (213, 160), (64, 64), (1, 50), (375, 500)])
    box_NV4, flip_NV = cached_views(7, "train", sizes_N2, [1, 5], (0.35, 1.0))
    assert views.SAMPLER == "random-resized-crop/1"
    assert box_NV4.tolist() == [
        [[13, 12, 139, 174], [1, 22, 158, 133]],
        [[29, 6, 113, 139], [2, 2, 207, 155]],
        [[0, 7, 61, 51], [4, 4, 60, 52]],
        [[0, 24, 1, 1], [0, 24, 1, 1]],
        [[58, 95, 314, 329], [31, 44, 336, 427]],
    ]
    assert flip_NV.tolist() == [[1, 0], [0, 0], [0, 1], [1, 1], [0, 1]]


# ----------------------------------------------------------------------------------------------------------- rendering


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """An image without fine detail, different everywhere."""
    y_HW, x_HW = np.mgrid[:height, :width]
    waves = [np.sin(x_HW / 17) + np.cos(y_HW / 23), np.sin((x_HW + y_HW) / 31) * 2, np.cos(x_HW / 29 - y_HW / 13) * 2]
    return np.stack([127.5 + 60 * wave_HW for wave_HW in waves], axis=-1).round().astype(np.uint8)


def render_by_pillow(image_HWC: np.ndarray, box, size: int) -> np.ndarray:
    top, left, height, width = map(int, box)
    crop = Image.fromarray(image_HWC).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


BOXES = [(0, 0, 90, 120), (10, 33, 50, 61), (3, 5, 17, 13), (60, 100, 1, 1), (0, 119, 90, 1), (20, 30, 48, 48)]


@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("box", BOXES)
def test_rendering_agrees_with_pillow(box, size):
    """Cut, then bilinear with antialiasing: within one grey level, of noise, enlarged and reduced."""
    image_HWC = noise(90, 120)
    image_CHW = render(torch.from_numpy(image_HWC), box, False, size)
    assert (image_CHW.shape, image_CHW.dtype) == ((3, size, size), torch.uint8)
    expected_CHW = render_by_pillow(image_HWC, box, size).astype(int)
    assert abs(image_CHW.numpy() - expected_CHW).max() <= 1


@pytest.mark.parametrize("box", BOXES)
def test_flip_mirrors_the_finished_image(box):
    image_HWC = torch.from_numpy(noise(90, 120))
    plain_CHW, flipped_CHW = render(image_HWC, box, False, 32), render(image_HWC, box, True, 32)
    assert torch.equal(flipped_CHW, plain_CHW.flip(2))
    if box[3] > 1:
        assert not torch.equal(flipped_CHW, plain_CHW)


def test_box_of_the_wanted_size_is_cut_out_as_it_is():
    image_HWC = noise(90, 120)
    image_CHW = render(torch.from_numpy(image_HWC), (20, 30, 48, 48), False, 48)
    assert np.array_equal(image_CHW.numpy().transpose(1, 2, 0), image_HWC[20:68, 30:78])


def test_box_shows_the_same_content_at_two_sizes():
    """A student may see its teacher's crop smaller: the large image reduced is the small one, another box is not."""
    image_HWC = torch.from_numpy(smooth(160, 213))
    large_CHW = render(image_HWC, (11, 40, 128, 128), True, 96).float()
    reduced_CHW = torch.nn.functional.avg_pool2d(large_CHW, 2)
    gaps = {
        shift: (render(image_HWC, (11 + shift, 40, 128, 128), True, 48).float() - reduced_CHW).abs().max().item()
        for shift in (0, 4)
    }
    assert gaps[0] <= 3
    assert gaps[4] > 5


def test_batch_holds_each_image_in_its_own_view(pixels_of):
    images = [torch.from_numpy(noise(height, width)) for height, width in ((40, 60), (60, 40), (33, 33))]
    box_B4, flip_B = (
        np.array([(0, 5, 40, 40), (10, 0, 30, 40), (1, 2, 30, 20)], np.int16),
        np.array([0, 1, 1], np.uint8),
    )
    stored = pixels_of([image_HWC.numpy() for image_HWC in images])
    images_BCHW = views.show(stored, Shown.plain(np.arange(3), box_B4, flip_B), 24)
    assert images_BCHW.shape == (3, 3, 24, 24)
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    for image_CHW, image_HWC, box, flip in zip(images_BCHW, images, box_B4, flip_B, strict=True):
        assert torch.equal(image_CHW, render(image_HWC, box, bool(flip), 24))
    assert views.show(stored, Shown.plain(np.arange(0), box_B4[:0], flip_B[:0]), 24).shape == (0, 3, 24, 24)


def test_rendering_leaves_the_stored_image_alone(pixels_of):
    stored = pixels_of([noise(48, 48)])
    before = stored.bytes_.clone()
    views.show(stored, Shown.plain(np.array([0]), np.array([(0, 0, 48, 48)]), np.array([0])), 48).zero_()
    assert torch.equal(stored.bytes_, before)


def test_drawing_is_for_one_thread_and_leaves_torch_its_own(pixels_of):
    """torch's threads are many in a job of one rank; in these tests they are one."""
    stored = pixels_of([noise(90, 70), noise(40, 80)])
    shown = Shown.plain(np.array([1, 0]), np.array([(3, 5, 30, 70), (0, 0, 90, 70)]), np.array([1, 0]))
    by_one_BCHW, seen = views.show(stored, shown, 64), []

    class Looking:
        def crops(self, index_B, box_B4):
            for crop_1CHW in stored.crops(index_B, box_B4):
                seen.append(torch.get_num_threads())
                yield crop_1CHW
            if len(seen) > 2:
                raise UserError("gone.")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(views.show(Looking(), shown, 64), by_one_BCHW)
        assert (seen, torch.get_num_threads()) == ([1, 1], 3)
        with pytest.raises(UserError, match="gone"):
            views.show(Looking(), shown, 64)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalise_is_its_formula(dtype):
    images_BCHW = torch.from_numpy(noise(8, 6).transpose(2, 0, 1).copy())[None]
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    inputs_BCHW = Normalise(mean, std, dtype, images_BCHW.device)(images_BCHW)
    assert inputs_BCHW.dtype == dtype
    for channel in range(3):
        expected_HW = (images_BCHW[0, channel].numpy() / 255.0 - mean[channel]) / std[channel]
        np.testing.assert_allclose(
            inputs_BCHW[0, channel], expected_HW, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=1e-6
        )


# ------------------------------------------------------------------------------------------------------------- mixing


def test_mixes_come_in_their_shares():
    mixes = draw_mixes(np.random.default_rng(0), 4000, mixup=0.3, cutmix=0.5)
    pasted_N = mixes.paste_N4.any(axis=1)
    untouched_N = (mixes.weight_N == 1) & ~pasted_N
    assert pasted_N.mean() == pytest.approx(0.5, abs=0.03)
    assert untouched_N.mean() == pytest.approx(0.2, abs=0.03)
    assert ((mixes.weight_N >= 0) & (mixes.weight_N <= 1)).all()
    # cut off at the border, more is left: 1 - E[(s - s^2 / 4)^2] with s^2 uniform
    assert mixes.weight_N[pasted_N].mean() == pytest.approx(0.679, abs=0.02)
    mixed_N = mixes.weight_N[~pasted_N & ~untouched_N]  # Beta(0.2, 0.2): mostly near 0 or 1
    assert ((mixed_N < 0.1) | (mixed_N > 0.9)).mean() > 0.6
    assert np.bincount(mixes.partner_N, minlength=4000).max() < 10
    assert (draw_mixes(np.random.default_rng(1), 4000, 0.3, 0.5).partner_N != mixes.partner_N).mean() > 0.9


@pytest.mark.parametrize(
    ("weight", "centre", "pasted", "remains"),
    [
        (0.75, (0.5, 0.5), (6, 18, 6, 18), 0.75),
        (0.75, (0.0, 1.0), (0, 6, 18, 24), 0.9375),  # cut off at a corner
        (0.0, (0.5, 0.5), (0, 24, 0, 24), 0.0),
        (1.0, (0.3, 0.3), (0, 0, 0, 0), 1.0),
        (0.9999, (0.5, 0.5), (12, 12, 12, 12), 0.9999),  # less than a pixel
    ],
)
def test_pasted_box_has_the_given_share(weight, centre, pasted, remains):
    paste_14 = views.paste_boxes(np.array([weight]), np.array([centre]))
    assert 1 - (paste_14[:, 2:] - paste_14[:, :2]).prod() == pytest.approx(remains)
    image_CHW, partner_CHW = torch.zeros(3, 24, 24, dtype=torch.uint8), torch.ones(3, 24, 24, dtype=torch.uint8)
    if remains < 1:
        views.mix(image_CHW, partner_CHW, remains, paste_14[0])
    expected_HW = torch.zeros(24, 24, dtype=torch.uint8)
    top, bottom, left, right = pasted
    expected_HW[top:bottom, left:right] = 1
    assert torch.equal(image_CHW, expected_HW.expand(3, 24, 24))


def test_mixed_images_are_made_of_two_crops_of_their_own(pixels_of):
    images = [torch.from_numpy(noise(40, 60)), torch.from_numpy(noise(50, 30))]
    own, other = (0, (0, 5, 40, 40), 1), (1, (3, 2, 30, 20), 0)
    index_B, box_B4, flip_B = (np.array([value] * 3) for value in own)
    partner = [np.array([value] * 3) for value in other]
    weight_B = np.array([0.25, 0.75, 1.0], np.float32)
    paste_B4 = np.array([(0, 0, 0, 0), (0.5, 0, 1, 0.5), (0, 0, 0, 0)], np.float32)
    stored = pixels_of([image_HWC.numpy() for image_HWC in images])
    mixed_CHW, pasted_CHW, plain_CHW = views.show(
        stored, Shown(index_B, box_B4, flip_B, *partner, weight_B, paste_B4), 16
    )
    own_CHW, other_CHW = (render(images[i], box, bool(flip), 16) for i, box, flip in (own, other))
    assert torch.equal(plain_CHW, own_CHW)
    assert (mixed_CHW - (0.25 * own_CHW + 0.75 * other_CHW)).abs().max() <= 0.5 + 1e-4
    assert torch.equal(pasted_CHW[:, 8:, :8], other_CHW[:, 8:, :8])
    assert torch.equal(pasted_CHW[:, :8], own_CHW[:, :8]) and torch.equal(pasted_CHW[:, :, 8:], own_CHW[:, :, 8:])


def test_the_gpus_single_pass_is_the_definition_but_for_the_last_bits():
    images_BCHW = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for dtype, off in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype, images_BCHW.device)
        exact = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.float64, images_BCHW.device)(images_BCHW)
        inputs_BCHW = normalise.in_one_pass(images_BCHW)
        assert inputs_BCHW.dtype == dtype and inputs_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert ((inputs_BCHW - exact).abs() <= off * exact.abs().clamp(min=1)).all()
