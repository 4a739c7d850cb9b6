"""Batches: every image once, the same at any number of ranks and after any stop, with soft labels of the view shown."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from kd_dist.images import views
from kd_dist.training.batches import (
    Batch,
    CachedCrops,
    EpochBatches,
    FreshCrops,
    TrainData,
    mixes_of,
    order_of,
)

SIZES_HW = ((40, 55), (55, 40), (48, 48), (41, 60))


def noise_images(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*SIZES_HW[i % len(SIZES_HW)], 3), dtype=np.uint8) for i in range(n)]


def plain_images(n: int) -> list[np.ndarray]:
    """Images of one colour each, of which the first channel tells the index."""
    return [np.full((*SIZES_HW[i % len(SIZES_HW)], 3), (i, 255 - i, 3 * i % 256), np.uint8) for i in range(n)]


@pytest.fixture
def fresh(pixels_of):
    """Makes training data of n noisy images in fresh crops."""

    def make(n: int = 21, batch_size: int = 4, images=noise_images, **changes) -> TrainData:
        pixels = pixels_of(images(n))
        crops = FreshCrops(pixels.sizes_N2, (0.35, 1.0), seed=5)
        data = TrainData(pixels, np.arange(n) % 7, crops, image_size=16, batch_size=batch_size, seed=5)
        return replace(data, **changes)

    return make


@pytest.fixture
def cached(fresh):
    """Makes training data with V cached views, the logits of image i in view v being [i, v, i + v / 10]."""

    def make(n: int = 21, views_V: int = 5, batch_size: int = 4) -> TrainData:
        data = fresh(n, batch_size)
        box_NV4, flip_NV = views.cached_views(3, "train", data.pixels.sizes_N2, range(views_V), (0.35, 1.0))
        index_NV, view_NV = np.mgrid[:n, :views_V]
        logits_NVK = np.stack([index_NV, view_NV, index_NV + view_NV / 10], axis=-1).astype(np.float16)
        return replace(data, views_of_epoch=CachedCrops(box_NV4, flip_NV, seed=5), logits_NVK=logits_NVK)

    return make


def epoch_of(data: TrainData, epoch: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    batches = EpochBatches(data, epoch, rank, world_size)
    return [batches[step] for step in range(len(batches))]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)}


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert tensors(a).keys() == tensors(b).keys()
        assert a.global_size == b.global_size
        for name, tensor in tensors(a).items():
            assert torch.equal(tensor, tensors(b)[name]), name


# ------------------------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize(("n", "batch_size"), [(21, 4), (20, 5), (7, 7), (5, 3), (13, 1), (1, 1), (17, 16), (3, 64)])
def test_each_image_comes_once_an_epoch(fresh, n, batch_size):
    data = fresh(n, batch_size)
    batches = epoch_of(data)
    sizes = [len(batch.index_B) for batch in batches]
    assert len(batches) == data.steps_per_epoch == -(-n // batch_size)
    assert sorted(torch.cat([batch.index_B for batch in batches]).tolist()) == list(range(n))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [batch.global_size for batch in batches]


def test_order_is_drawn_anew_each_epoch_from_the_seed():
    orders = {(seed, epoch): tuple(order_of(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert orders[0, 1] == tuple(order_of(0, 1, 50))
    assert orders[0, 0] != tuple(range(50))


def test_batch_holds_its_images(fresh):
    data = fresh()
    crops = data.views_of_epoch(3)
    for batch in epoch_of(data, epoch=3):
        assert batch.images_BCHW.dtype == torch.uint8
        assert batch.labels_B.tolist() == (batch.index_B % 7).tolist()
        assert batch.teacher_logits_BK is None
        for index, image_CHW in zip(batch.index_B, batch.images_BCHW, strict=True):
            expected_CHW = views.render(data.pixels[index], crops.box_N4[index], crops.flip_N[index], 16)
            assert torch.equal(image_CHW, expected_CHW)


def test_fresh_crops_change_every_epoch(fresh):
    crops = fresh(200).views_of_epoch
    first, second, again = crops(0), crops(1), crops(0)
    assert first.choice_N is None
    assert (first.box_N4 != second.box_N4).any(axis=1).mean() > 0.9
    assert 0.4 < (first.flip_N != second.flip_N).mean() < 0.6
    assert np.array_equal(first.box_N4, again.box_N4) and np.array_equal(first.flip_N, again.flip_N)
    assert (replace(crops, seed=6)(0).box_N4 != first.box_N4).any(axis=1).mean() > 0.9


def test_crops_tell_nothing_of_the_flips(fresh):
    crops = fresh(2000).views_of_epoch(0)
    left_N = crops.box_N4[:, 1].astype(float)
    assert abs(np.corrcoef(left_N, crops.flip_N)[0, 1]) < 0.08


# ------------------------------------------------------------------------------------------- ranks, resumes and workers


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("kind", ["fresh", "mixed", "cached"])
def test_ranks_parts_are_the_batch_of_one_process(fresh, cached, kind, world_size):
    data = cached(23, batch_size=8) if kind == "cached" else fresh(23, batch_size=8)
    data = replace(data, mixup=0.4, cutmix=0.4) if kind == "mixed" else data
    alone = epoch_of(data, epoch=1)
    parts = [epoch_of(data, 1, rank, world_size) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        pieces = [part[step] for part in parts]
        sizes = [len(piece.index_B) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1
        assert {piece.global_size for piece in pieces} == {len(whole.index_B)}
        for name, tensor in tensors(whole).items():
            assert torch.equal(torch.cat([tensors(piece)[name] for piece in pieces]), tensor), name


@pytest.mark.parametrize("first_step", [1, 4, 5, 6])
def test_epoch_goes_on_from_any_step(fresh, one_process, first_step):
    data = fresh(mixup=0.4, cutmix=0.4)
    assert data.steps_per_epoch == 6
    rest = list(data.epoch(2, one_process, workers=0, first_step=first_step))
    assert_same(rest, epoch_of(data, epoch=2)[first_step:])


def test_loader_processes_give_the_same_batches(fresh, rank_of):
    data = fresh(mixup=0.4, cutmix=0.4)
    assert_same(list(data.epoch(2, rank_of(1, 2), workers=2, first_step=1)), epoch_of(data, 2, 1, 2)[1:])


def test_batches_do_not_depend_on_the_generators_of_the_process(fresh, one_process):
    data = fresh(mixup=0.4, cutmix=0.4)
    torch.manual_seed(1)
    np.random.seed(1)
    first = list(data.epoch(0, one_process))
    torch.manual_seed(2)
    np.random.seed(2)
    assert_same(list(data.epoch(0, one_process)), first)


def test_batch_moves_whole(cached):
    batch = epoch_of(cached())[0]
    assert_same([batch.to(torch.device("cpu"))], [batch])
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}
    assert tensors(moved).keys() == tensors(batch).keys() and moved.global_size == batch.global_size
    assert replace(batch, teacher_logits_BK=None).to(torch.device("cpu")).teacher_logits_BK is None


# --------------------------------------------------------------------------------------------------------- cached views


@pytest.mark.parametrize("views_V", [2, 3, 6])
def test_cached_views_come_without_replacement(cached, views_V):
    """In V - 1 epochs each image is seen in each view but the evaluation view, and so again in the next V - 1."""
    crops = cached(40, views_V).views_of_epoch
    for cycle in range(2):
        epochs = range(cycle * (views_V - 1), (cycle + 1) * (views_V - 1))
        choices_NE = np.stack([crops(epoch).choice_N for epoch in epochs], axis=1)
        assert (np.sort(choices_NE, axis=1) == np.arange(1, views_V)).all()


def test_single_cached_view_is_the_evaluation_view(cached):
    data = cached(views_V=1)
    for epoch in range(3):
        assert not data.views_of_epoch(epoch).choice_N.any()
    assert epoch_of(data)[0].teacher_logits_BK[:, 1].tolist() == [0] * 4


def test_images_take_their_views_in_different_orders(cached):
    """Else an epoch would show all images in view 3, then all in view 5: one crop rule's draws in turn."""
    crops = cached(200, 6).views_of_epoch
    for epoch in range(3):
        counts_V = np.bincount(crops(epoch).choice_N, minlength=6)
        assert counts_V[0] == 0
        assert counts_V[1:].min() > 15
    assert (crops(0).choice_N != crops(5).choice_N).any()  # and in another order the next time round
    assert (crops(0).choice_N != replace(crops, seed=6)(0).choice_N).any()
    assert np.array_equal(crops(3).choice_N, crops(3).choice_N)


def test_soft_labels_are_those_of_the_view_shown(cached):
    """Row, box and flip come from the same place in the cache, for every image of every epoch."""
    data = cached()
    crops = data.views_of_epoch
    for epoch in range(5):
        choice_N = crops(epoch).choice_N
        for batch in epoch_of(data, epoch):
            assert batch.teacher_logits_BK.dtype == torch.float16
            for index, image_CHW, row in zip(batch.index_B, batch.images_BCHW, batch.teacher_logits_BK, strict=True):
                view = choice_N[index]
                assert row.tolist() == data.logits_NVK[index, view].tolist()
                box, flip = crops.box_NV4[index, view], crops.flip_NV[index, view]
                assert torch.equal(image_CHW, views.render(data.pixels[index], box, flip, 16))


# ------------------------------------------------------------------------------------------------------------- mixing


def test_nothing_is_mixed_unless_asked_for(fresh):
    for batch in epoch_of(fresh()):
        assert torch.equal(batch.weights_B, torch.ones(len(batch.index_B)))
        assert torch.equal(batch.partner_labels_B, batch.labels_B)


def mixed_images(data, epoch):
    """(index, image, weight of the own label, partner's label) of every image of an epoch."""
    for batch in epoch_of(data, epoch=epoch):
        weights, labels = batch.weights_B.tolist(), batch.partner_labels_B.tolist()
        yield from zip(batch.index_B.tolist(), batch.images_BCHW, weights, labels, strict=True)


def test_pasted_area_is_the_partners_share_of_the_label(fresh):
    data = fresh(60, 8, images=plain_images, cutmix=0.7)
    partner_N = mixes_of(data, 4).partner_N
    seen = []
    for index, image_CHW, weight, label in mixed_images(data, epoch=4):
        own_HW = image_CHW[0] == index
        # the label's share is that of the box in fractions, whatever the size it is shown at: half a pixel an edge
        assert abs(own_HW.double().mean().item() - weight) <= 2.1 / 16 or partner_N[index] == index
        assert set(image_CHW[0].unique().tolist()) <= {index, int(partner_N[index])}
        assert label == partner_N[index] % 7 or weight == 1
        seen.append(weight)
        rows, columns = torch.nonzero(~own_HW, as_tuple=True)
        if len(rows):  # one box, nothing else
            assert (~own_HW[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]).all()
    assert 0.2 < np.mean(np.array(seen) == 1) < 0.5
    assert len(set(seen)) > 25
    assert min(seen) < 0.3


def test_mixed_images_and_labels_have_the_same_shares(fresh):
    data = fresh(60, 8, images=plain_images, mixup=0.7)
    mixes = mixes_of(data, 4)
    mixed = 0
    for index, image_CHW, weight, label in mixed_images(data, epoch=4):
        partner = int(mixes.partner_N[index])
        assert weight == pytest.approx(mixes.weight_N[index], rel=1e-6)
        assert abs(image_CHW[0].double() - (weight * index + (1 - weight) * partner)).max() <= 0.5 + 1e-4
        assert label == partner % 7 or weight == 1
        mixed += weight < 1
    assert 30 < mixed < 55


def test_the_last_epochs_are_plain(fresh):
    data = fresh(60, 8, mixup=0.5, cutmix=0.5)
    ending = replace(data, mixed_epochs=3)
    for epoch, is_plain in enumerate((False, False, False, True, True)):
        weights_B = torch.cat([batch.weights_B for batch in epoch_of(ending, epoch=epoch)])
        assert (weights_B == 1).all().item() == is_plain
    assert mixes_of(data, 4) is not None and mixes_of(replace(data, mixed_epochs=0), 0) is None
    for mixed, plain in zip(epoch_of(data, epoch=2), epoch_of(ending, epoch=2), strict=True):
        assert torch.equal(mixed.images_BCHW, plain.images_BCHW)


def test_partner_is_shown_in_its_own_view_of_the_epoch(fresh):
    data = fresh(mixup=1.0)
    mixes, crops = mixes_of(data, 2), data.views_of_epoch(2)
    for batch in epoch_of(data, epoch=2):
        for index, image_CHW in zip(batch.index_B.tolist(), batch.images_BCHW, strict=True):
            own, other = (
                views.render(data.pixels[i], crops.box_N4[i], crops.flip_N[i], 16).double()
                for i in (index, mixes.partner_N[index])
            )
            weight = mixes.weight_N[index]
            assert abs(image_CHW.double() - (weight * own + (1 - weight) * other)).max() <= 0.5 + 1e-3
