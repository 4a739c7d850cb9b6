"""Mixed views: a cached soft label is the teacher's output for exactly the mix that the student sees."""

import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from kd_dist import distill, label, teacher
from kd_dist.cache import BlockWriter, Cache, CachePlan, Mixed, open_cache, render_info, statistics_of
from kd_dist.cache.__main__ import main as cache_main
from kd_dist.cache.combine import check_same_views
from kd_dist.cache.format import checksum_file_of
from kd_dist.cache.mixed import check_mixed
from kd_dist.cache.statistics import unmixed_views
from kd_dist.config import MEAN, STD, DistillConfig
from kd_dist.data.folds import fold_numbers
from kd_dist.dist.endings import StopRequest
from kd_dist.errors import UserError
from kd_dist.files import sha256_of
from kd_dist.images import views
from kd_dist.job import Data
from kd_dist.label.plans import require_partners_share
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.study.arms import ARMS
from kd_dist.study.choice import require_views
from kd_dist.training import Trainer
from kd_dist.training.batches import EpochBatches, TrainData
from kd_dist.training.losses import hard_targets
from tests.entries import call, refused
from tests.ranks import run_ranks
from tests.test_bad_input import TINY
from tests.test_exactness import open_tiny, small_teacher

DOCUMENT = Path(__file__).parents[1] / "docs" / "cache-format.md"
V = 7
MIXED = (2, 4, 6)
SIZE, STUDENT_SIZE = 32, 21


def plan(data: Data, views_V: int = V, mixed: float = 0.5, folds: int = 0) -> CachePlan:
    model = small_teacher(data.samples.classes)
    model = replace(model, row=replace(model.row, folds=folds, fold=0 if folds else -1))
    return label.plan([model], data, label.ViewRule(views_V, (0.4, 1.0), 5, mixed), "float32")


def write(runtime, root: Path, target: Path, views_V: int = V, mixed: float = 0.5) -> None:
    data = open_tiny(root)
    model = small_teacher(data.samples.classes)
    own = plan(data, views_V, mixed)
    labeller = label.Labeller([model], data, own.header, runtime.device)
    label.write_cache(target, own, labeller, runtime, StopRequest(), lambda done, total: None)


@pytest.fixture(scope="module")
def root(generated_root, tmp_path_factory) -> Path:
    return shutil.copytree(generated_root, tmp_path_factory.mktemp("mixed") / "set")


@pytest.fixture(scope="module")
def data(root) -> Data:
    return open_tiny(root)


@pytest.fixture(scope="module")
def cache(root, one_process) -> Cache:
    """A cache of 21 train images in 7 views, of which 2, 4 and 6 are mixed; not to be changed."""
    write(one_process, root, root.with_name("logits.h5"))
    return open_cache(root.with_name("logits.h5"))


def composed(cache: Cache, data: Data, index: int, view: int, size: int) -> np.ndarray:
    """What an image shows in a view, put together from the file's columns as its document says: uint8 [3, S, S]."""
    train, mixed = cache.split("train"), cache.split("train").mixed

    def crop(i, v):
        image = views.render(data.pixels["train"][i], train.box_NV4[i, v], bool(train.flip_NV[i, v]), size)
        return image.numpy().copy()

    own, partner = crop(index, view), crop(mixed.partner_NV[index, view], mixed.partner_view_NV[index, view])
    weight = float(mixed.weight_NV[index, view])
    if not mixed.paste_NV4[index, view].any():
        return np.rint(weight * own.astype(np.float64) + (1 - weight) * partner).astype(np.uint8)
    top, left, bottom, right = np.rint(mixed.paste_NV4[index, view].astype(np.float64) * size).astype(int)
    own[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return own


def kinds(mixed: Mixed) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are mixup's, and which CutMix's: bool [N, V] each."""
    pasted_NV = mixed.paste_NV4.any(axis=2)
    return (mixed.weight_NV < 1) & ~pasted_NV, pasted_NV


# ---------------------------------------------------------------------------------------------------------- the draw


def test_a_share_of_the_drawn_views_is_mixed_whatever_their_number():
    assert [view for view in range(V) if views.is_mixed(view, 0.5)] == list(MIXED)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        for drawn in (1, 10, 200):
            count = sum(views.is_mixed(view, share) for view in range(drawn + 1))
            assert drawn * share - 1 < count <= drawn * share
    assert not views.is_mixed(0, 1.0)


def drawn(n: int = 3000, numbers=range(V), share: float = 0.5, **more) -> Mixed:
    return Mixed(*views.mixed_views(3, "train", n, numbers, share, **more))


def test_half_of_a_mixed_view_is_mixup_and_half_cutmix_with_the_boxs_weight():
    mixed = drawn()
    mixup_NV, cutmix_NV = kinds(mixed)
    assert not (mixup_NV | cutmix_NV)[:, [0, 1, 3, 5]].any()
    for view in MIXED:  # 3000 draws at even odds: a deviation of 0.03 is more than three standard errors
        assert mixup_NV[:, view].mean() == pytest.approx(0.5, abs=0.03)
        assert cutmix_NV[:, view].mean() == pytest.approx(0.5, abs=0.03)
    box_R4, weight_R = mixed.paste_NV4[cutmix_NV].astype(np.float64), mixed.weight_NV[cutmix_NV]
    area_R = (box_R4[:, 2] - box_R4[:, 0]) * (box_R4[:, 3] - box_R4[:, 1])
    np.testing.assert_array_equal(weight_R, (1 - area_R).astype(np.float32))
    assert (np.abs(mixed.weight_NV[mixup_NV] - 0.5) > 0.4).mean() > 0.5  # Beta(0.2, 0.2) has its mass at both ends
    check_mixed("train", mixed, np.zeros(3000, np.int16))


def test_partners_are_any_image_in_any_plain_drawn_view_before():
    mixed = drawn()
    mixed_NV = mixed.weight_NV < 1
    for view, lower in ((2, {1}), (4, {1, 3}), (6, {1, 3, 5})):
        rows = mixed_NV[:, view]
        assert set(mixed.partner_view_NV[rows, view]) == lower
        assert len(set(mixed.partner_NV[rows, view])) > 0.6 * rows.sum()  # 1 - 1/e of them at random
        assert mixed.partner_NV[rows, view].max() > 2900
    everything = drawn(share=1.0)  # no drawn view is plain then
    assert set(everything.partner_view_NV[everything.weight_NV < 1]) == {0}


def test_partners_stay_in_their_group():
    group_N = np.random.default_rng(0).choice([-1, 4, 9], 3000, p=[0.1, 0.3, 0.6])
    mixed = drawn(group_N=group_N)
    mixed_NV = mixed.weight_NV < 1
    for view in MIXED:
        rows = np.flatnonzero(mixed_NV[:, view])
        partner_R = mixed.partner_NV[rows, view]
        np.testing.assert_array_equal(group_N[partner_R], group_N[rows])
        for group in (-1, 4, 9):
            mine = rows[group_N[rows] == group]
            members = (group_N == group).sum()
            assert len(set(mixed.partner_NV[mine, view])) > 0.5 * min(len(mine), members)  # all of the group, not one
            assert (mixed.partner_NV[mine, view] != mine).mean() > 0.9
    lone = drawn(n=5, group_N=np.arange(5))
    np.testing.assert_array_equal(lone.partner_NV, np.mgrid[:5, :V][0])


def test_partners_share_the_part_that_a_teacher_left_out(data):
    train = data.samples.train
    part_N = fold_numbers(train.labels_N, train.sha256_N32, 4)
    tables = plan(data, folds=4).tables
    mixed = tables["train"].mixed
    np.testing.assert_array_equal(part_N[mixed.partner_NV], np.broadcast_to(part_N[:, None], (21, V)))
    assert (mixed.partner_NV != np.arange(21)[:, None]).any()
    assert (part_N[plan(data).tables["train"].mixed.partner_NV] != part_N[:, None]).any()
    assert tables["val"].mixed.mixed_views().size == 0


def test_views_are_appended_and_crops_do_not_depend_on_the_mixing(data):
    few, more = drawn(numbers=range(4)), drawn()
    for name, values in vars(few).items():
        np.testing.assert_array_equal(values, getattr(more, name)[:, :4])
    with_mixed, without = plan(data).tables, plan(data, mixed=0.0).tables
    for split in ("train", "val"):
        assert without[split].mixed is None
        np.testing.assert_array_equal(with_mixed[split].box_NV4, without[split].box_NV4)
        np.testing.assert_array_equal(with_mixed[split].flip_NV, without[split].flip_NV)
    assert not np.array_equal(few.partner_NV, Mixed(*views.mixed_views(4, "train", 3000, range(4), 0.5)).partner_NV)


# ------------------------------------------------------------------------------------------------ labelled and shown


def test_a_mixed_row_is_the_teacher_on_the_composed_image(cache, data):
    train = cache.split("train")
    mixup_NV, cutmix_NV = kinds(train.mixed)
    assert min(mixup_NV.sum(), cutmix_NV.sum()) > 20
    model = small_teacher(data.samples.classes).model
    normalise = views.Normalise(MEAN, STD, torch.float32, torch.device("cpu"))
    rows = [(i, v) for v in range(V) for i in range(21)]
    images = np.stack([composed(cache, data, i, v, SIZE) for i, v in rows])
    with torch.inference_mode():
        direct = model(normalise(torch.from_numpy(images))).numpy()
    stored = np.stack([train.logits_NVK[i, v] for i, v in rows]).astype(np.float32)
    np.testing.assert_allclose(stored, direct, rtol=2e-3, atol=0.02)
    unmixed = replace(train, mixed=None)
    labeller = label.Labeller([small_teacher(data.samples.classes)], data, cache.header, torch.device("cpu"))
    own = np.concatenate([labeller.logits("train", unmixed, np.arange(21), v) for v in range(V)])
    differs = (np.abs(own - stored).max(axis=1) > 0.05).reshape(V, 21).T
    assert not differs[:, [0, 1, 3, 5]].any()
    assert (differs & (train.mixed.weight_NV < 0.9)).sum() > 20  # the crop alone would not pass


def test_the_student_is_shown_the_mix_at_its_own_size_with_its_labels(cache, data):
    settings = DistillConfig.of(alpha=0.9)
    crops, logits_NVK = distill.crops_of(settings, data, cache)
    labels_N = data.samples.train.labels_N
    of_student = TrainData(data.pixels["train"], labels_N, crops, STUDENT_SIZE, 5, seed=1, logits_NVK=logits_NVK)
    mixed, seen = cache.split("train").mixed, set()
    for epoch in range(V - 1):
        epoch_batches = EpochBatches(of_student, epoch, 0, 1)
        for batch in map(epoch_batches.__getitem__, range(len(epoch_batches))):
            targets_BK = hard_targets(batch.labels_B, 3, 0.0, batch.partner_labels_B, batch.weights_B)
            for slot, i in enumerate(batch.index_B.tolist()):
                v = epoch_batches.views.choice_N[i]
                seen.add((i, v))
                expected = composed(cache, data, i, v, STUDENT_SIZE).astype(int)
                assert np.abs(batch.images_BCHW[slot].numpy() - expected).max() <= 1  # a half may round either way
                np.testing.assert_array_equal(batch.teacher_logits_BK[slot], logits_NVK[i, v])
                target_K = np.zeros(3)
                target_K[labels_N[i]] += mixed.weight_NV[i, v]
                target_K[labels_N[mixed.partner_NV[i, v]]] += 1 - mixed.weight_NV[i, v]
                np.testing.assert_allclose(targets_BK[slot], target_K, atol=1e-6)
    assert seen == {(i, v) for i in range(21) for v in range(1, V)}


def test_the_first_views_stand_alone(cache, data):
    """A student may use fewer views: no partner is seen in a later one."""
    crops, logits_NVK = distill.crops_of(DistillConfig.of(alpha=0.9, views=3), data, cache)
    assert logits_NVK.shape == (21, 3, 3)
    shown = [crops(epoch).mixed_N for epoch in range(2)]
    assert any((epoch.weight_B < 1).any() for epoch in shown)


def test_an_image_that_is_left_out_is_in_no_image(cache, data):
    settings = DistillConfig.of(alpha=0.0, crops="cached", folds=4, fold=1)
    with pytest.raises(UserError, match=r"show images of fold 1 \(of 0 to 3\) of train, which is left out"):
        distill.require_own_partners(settings, data, cache)
    distill.require_own_partners(DistillConfig.of(alpha=0.0, crops="cached"), data, cache)
    apart = replace(cache, splits=plan(data, folds=4).tables)
    distill.require_own_partners(settings, data, apart)


def test_out_of_fold_teachers_label_no_image_of_two_parts(cache, data):
    train = data.samples.train
    part_N = fold_numbers(train.labels_N, train.sha256_N32, 4)
    with pytest.raises(UserError, match="mixed views with images of two folds"):
        require_partners_share(part_N, cache.split("train").mixed)
    require_partners_share(part_N, plan(data, folds=4).tables["train"].mixed)
    require_partners_share(part_N, None)


def test_means_are_taken_of_the_same_mixes(cache, data):
    check_same_views(cache, cache)
    plain = {split: replace(table, mixed=None) for split, table in cache.splits.items()}
    with pytest.raises(UserError, match=r"has mixed views of train, .* has no mixed views"):
        check_same_views(cache, replace(cache, splits=plain))
    mixed = cache.split("train").mixed
    other = edit("weight_NV", lambda mixed: first(mixed, 0), 0.125)(mixed)
    others = {**cache.splits, "train": replace(cache.split("train"), mixed=other)}
    with pytest.raises(UserError, match=r"has view/weight 0.* for view . of train/.*has 0.125"):
        check_same_views(cache, replace(cache, splits=others))


def test_the_last_epochs_show_plain_views_each_in_turn(cache, data):
    settings = DistillConfig.of(epochs=9, no_mix_epochs=6, warmup_epochs=0.0).resolved()
    crops, _ = distill.crops_of(settings, data, cache)
    drawn = [crops(epoch).choice_N for epoch in range(9)]
    every = [distill.crops_of(settings.changed(no_mix_epochs=0), data, cache)[0](epoch).choice_N for epoch in range(9)]
    assert all(np.array_equal(*pair) for pair in zip(drawn[:3], every[:3], strict=True))
    assert np.isin(np.stack(every), MIXED).any(axis=1)[3:].all()
    for turn in (drawn[3:6], drawn[6:9]):
        assert (np.sort(np.stack(turn), axis=0).T == [1, 3, 5]).all()
    assert not np.array_equal(drawn[3], drawn[6])
    assert (crops(3).mixed_N.weight_B == 1).all()


def test_plain_epochs_of_a_cache_without_plain_views_are_refused(cache):
    settings = DistillConfig.of(epochs=9, no_mix_epochs=1, warmup_epochs=0.0).resolved()
    distill.require_use(settings, cache)
    mixed = replace(cache.split("train").mixed, weight_NV=np.full((21, V), 0.5, np.float32))
    mixed.weight_NV[:, 0] = 1
    everywhere = replace(cache, splits={**cache.splits, "train": replace(cache.split("train"), mixed=mixed)})
    with pytest.raises(UserError, match=r"needs random views that are not mixed.* use --no-mix-epochs 0"):
        distill.require_use(settings, everywhere)
    distill.require_use(settings.changed(no_mix_epochs=0), everywhere)
    distill.require_use(settings.changed(alpha=0.0, crops="fresh"), everywhere)


def test_plain_epochs_reach_the_batches(root, monkeypatch, tmp_path):
    """Of a teacher on fresh crops: mixes in the first epoch, none in the last."""
    weights: list[torch.Tensor] = []
    original = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, batch: weights.append(batch.weights_B) or original(self, batch)
    )
    run = ["--data", root, "--out", tmp_path / "run", "--views", 0, *TINY, "--batch-size", 21, "--epochs", 3]
    call(teacher.main, *run, "--mixup", 0.5, "--cutmix", 0.5, "--no-mix-epochs", 2)
    assert [bool((weights_B < 1).any()) for weights_B in weights] == [True, False, False]


def test_controls_whose_labels_know_one_image_are_refused(cache):
    for name in ("distilled", "baseline-cached"):
        require_views(ARMS[name], cache, None)
    with pytest.raises(UserError, match="has mixed views, and arm class-mean makes soft labels for views of one"):
        require_views(ARMS["class-mean"], cache, None)


def test_info_counts_mixed_views_and_leaves_them_out_of_its_figures(cache):
    train = cache.split("train")
    plain_NVK = train.logits_NVK[:, [0, 1, 3, 5]]
    assert unmixed_views(train) == [0, 1, 3, 5]
    assert statistics_of(train.logits_NVK, train.labels_N, [0, 1, 3, 5]) == statistics_of(plain_NVK, train.labels_N)
    text = render_info(cache)
    assert "3 of 7 views of train are mixup or CutMix, and not in the statistics below" in text
    assert "views of val" not in text
    assert f"{statistics_of(plain_NVK, train.labels_N).top1_drawn:.2%}" in text
    assert max(map(len, text.splitlines()[2:])) <= 100


# ----------------------------------------------------------------------------------------------------------- the file


def test_bytes_are_the_same_at_two_ranks_after_an_interruption(cache, root, data, tmp_path):
    target = tmp_path / "logits.h5"
    writer = BlockWriter(target, plan(data))
    for block in writer.missing()[::4]:
        writer.put(block, cache.split(block.split).logits_NVK[block.start : block.stop, block.view])
    run_ranks(2, write, root, target)
    assert target.read_bytes() == cache.path.read_bytes()


def test_a_file_without_mixed_views_knows_nothing_of_them(root, one_process, tmp_path):
    target = tmp_path / "logits.h5"
    write(one_process, root, target, views_V=2, mixed=0.0)
    with h5py.File(target) as file:
        assert list(file.attrs["required_features"]) == []
        assert sorted(file["train/view"]) == ["box", "flip"]
        assert (file.attrs["crop_scale"].tolist(), file.attrs["mixed_share"]) == ([0.4, 1.0], 0)
    table = open_cache(target).split("train")
    assert table.mixed is None
    whose = (table.bytes_N, table.sha256_N32, table.labels_N, table.teacher_N)
    columns = (*whose, table.box_NV4, table.flip_NV, table.logits_NVK)
    texts = table.fingerprint + "".join(hashlib.sha256(values.tobytes()).hexdigest() for values in columns)
    assert table.checksum == hashlib.sha256(texts.encode()).hexdigest()


def first(mixed: Mixed, kind: int) -> tuple[int, int]:
    """Row and view of a mixup (0) or CutMix (1) row with a weight well inside (0, 1)."""
    inside_NV = kinds(mixed)[kind] & (np.abs(mixed.weight_NV - 0.5) < 0.45)
    return tuple(np.argwhere(inside_NV)[0])


def edit(name: str, at, value):
    """A change of one value, at the place that `at` finds in a Mixed."""

    def apply(mixed: Mixed) -> Mixed:
        values = getattr(mixed, name).copy()
        values[at(mixed)] = value
        return replace(mixed, **{name: values})

    return apply


MIXUP, CUTMIX = (lambda mixed: first(mixed, 0)), (lambda mixed: first(mixed, 1))
PLAIN, VIEW_0 = (lambda mixed: (7, 3)), (lambda mixed: (7, 0))
MALFORMED = {
    "weight above 1": (edit("weight_NV", MIXUP, 1.5), "weight"),
    "weight below 0": (edit("weight_NV", MIXUP, -0.1), "weight"),
    "weight not a number": (edit("weight_NV", MIXUP, np.nan), "weight"),
    "weight that is not what the box leaves": (edit("weight_NV", CUTMIX, 0.999), "weight"),
    "a box beyond the image": (edit("paste_NV4", CUTMIX, (-0.5, 0, 0.5, 1)), "paste"),
    "a box upside down": (edit("paste_NV4", CUTMIX, (0.5, 0.5, 0.25, 0.25)), "paste"),
    "a box not a number": (edit("paste_NV4", CUTMIX, (0, 0, np.nan, 1)), "paste"),
    "a box in a plain view": (edit("paste_NV4", PLAIN, (0, 0, 0.5, 0.5)), "weight"),
    "a partner beyond the rows": (edit("partner_NV", MIXUP, 21), "partner"),
    "a negative partner": (edit("partner_NV", CUTMIX, -1), "partner"),
    "a partner in a plain view": (edit("partner_NV", PLAIN, 3), "partner"),
    "a partner's later view": (edit("partner_view_NV", MIXUP, V - 1), "partner_view"),
    "a negative partner's view": (edit("partner_view_NV", CUTMIX, -1), "partner_view"),
    "a mixed evaluation view": (edit("weight_NV", VIEW_0, 0.5), "partner_view"),
}


@pytest.mark.parametrize("change, named", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_columns_are_refused(change, named, cache):
    table = cache.split("train")
    check_mixed("train", table.mixed, table.teacher_N)
    with pytest.raises(ValueError, match=rf"^train/view/{named} of row \d+ in view \d is "):
        check_mixed("train", change(table.mixed), table.teacher_N)


def test_a_mix_of_a_mix_and_two_teachers_of_one_image_are_refused(cache):
    mixed, teacher_N = cache.split("train").mixed, np.zeros(21, np.int16)
    row, view = np.argwhere(mixed.weight_NV[:, 6:] < 1)[0] + (0, 6)
    other, mixed_view = np.argwhere(mixed.weight_NV[:, :5] < 1)[0]
    changed = edit("partner_view_NV", lambda _: (row, view), mixed_view)(
        edit("partner_NV", lambda _: (row, view), other)(mixed)
    )
    with pytest.raises(ValueError, match="view/partner_view of row"):
        check_mixed("train", changed, teacher_N)
    teacher_N[mixed.partner_NV[row, view]] = 1
    teacher_N[row] = 0
    with pytest.raises(ValueError, match="view/partner of row"):
        check_mixed("train", mixed, teacher_N)


def spoilt(cache: Cache, tmp_path: Path, change) -> str:
    target = Path(shutil.copy(cache.path, tmp_path / "logits.h5"))
    with h5py.File(target, "r+") as file:
        change(file)
    checksum_file_of(target).write_text(f"{sha256_of(target)}  logits.h5\n")
    with pytest.raises(UserError) as caught:
        open_cache(target)
    return str(caught.value)


def cut_box(file):
    values = file["train/view/paste"][:, :, :3]
    del file["train/view/paste"]
    file.create_dataset("train/view/paste", data=values)


def swap_partners(file):
    """Another partner that could have been drawn: only the digest of the rows can tell."""
    view = file["train/view/weight"][:, 2] < 1
    rows = np.flatnonzero(view)[:2]
    partners = file["train/view/partner"][rows, 2]
    assert partners[0] != partners[1]
    file["train/view/partner"][rows, 2] = partners[::-1]


def unlist(file):
    del file.attrs["required_features"]
    file.attrs.create("required_features", np.array([], "S1"))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda file: file["train/view"].pop("weight"), "train/view/weight is missing"),
        (cut_box, r"train/view/paste has shape \[21, 7, 3\]"),
        (
            lambda file: file["val/view/weight"].write_direct(np.full((9, 7), 0.5, "f4")),
            "val/view/partner_view of row 0",
        ),
        (swap_partners, "the columns of train have checksum"),
        (unlist, r"mixed_share is 0.5 with the features \[\]"),
    ],
    ids=["missing", "shape", "values", "partners", "feature not listed"],
)
def test_a_spoilt_file_is_refused(change, named, cache, tmp_path):
    assert re.search(named, spoilt(cache, tmp_path, change))


def test_a_table_and_its_header_have_to_agree(data, tmp_path):
    header, tables = plan(data).header, plan(data).tables
    with pytest.raises(ValueError, match="columns of mixed views in train"):
        BlockWriter(tmp_path / "logits.h5", CachePlan(replace(header, features=(), mixed_share=0.0), tables))


def test_the_documents_example_refuses_what_it_does_not_read(cache):
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cache.path.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs more" in done.stderr


# ---------------------------------------------------------------------------------------------------------- commands


def test_from_teacher_to_student_on_the_command_line(root, tmp_path, capsys):
    tiny = [*TINY, "--batch-size", "21", "--data", root]
    mixed = ["--views", 3, "--mixed-views", 0.5]
    out, at_once, longer = (tmp_path / name for name in ("teacher", "at_once.h5", "longer.h5"))
    call(teacher.main, *tiny, "--out", out, *mixed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cache"])
        told = ["--teacher", str(out / "model.pt"), "--data", str(root), "--device", "cpu"]
        cache_main(["write", *told, "--views", "5", "--mixed-views", "0.5", "-o", str(at_once)])
        cache_main(["extend", str(out / "logits.h5"), *told, "--views", "5", "-o", str(longer)])
        assert longer.read_bytes() == at_once.read_bytes()
        cache_main(["verify", str(longer), *told, "--samples", "4096"])
    assert "teacher: 150 soft labels recomputed" in capsys.readouterr().out
    call(distill.main, *tiny, "--out", tmp_path / "student", "--cache", longer, "--epochs", 2)
    assert read_metrics(RunFolder(tmp_path / "student"))[-1]["train_soft"] > 0
    again = refused(teacher.main, *tiny, "--out", out, "--views", 3)
    assert "was written with --mixed-views 0.5, but --mixed-views is 0.0" in again
    assert "--mixed-views 1.5 must lie in [0, 1]" in refused(teacher.main, *tiny, "--mixed-views", 1.5)
    few = refused(teacher.main, *tiny, "--views", 3, "--mixed-views", 0.25)
    assert "--mixed-views 0.25 of the random views (2) is less than one" in few
