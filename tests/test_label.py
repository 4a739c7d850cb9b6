"""Labels by several teachers: out-of-fold rows are those of the teacher that never saw the image, at any number of
ranks; the views of another cache; what is verified, extended and refused.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_dist import label
from kd_dist.cache import BlockWriter, CachePlan, TeacherRow, open_cache, render_info
from kd_dist.cache.__main__ import main
from kd_dist.data.folds import fold_numbers
from kd_dist.data.generated import generate
from kd_dist.data.scan import scan
from kd_dist.dist.endings import Interrupted, StopRequest
from kd_dist.dist.runtime import joined
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.images.store import build_pixels, open_pixels
from kd_dist.inference import Forward
from kd_dist.job import Data
from kd_dist.models import TEACHERS, Cnn5
from kd_dist.run import checkpoint
from kd_dist.run.folder import RunFolder
from tests.ranks import run_ranks

FOLDS = 3
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """40 train and 8 val images of four classes."""
    folder = tmp_path_factory.mktemp("set") / "tiny"
    generate(folder, train_per_class=10, val_per_class=2, classes=4)
    return folder


def open_data(root: Path) -> Data:
    samples, pixels = scan(root), {}
    for split in ("train", "val"):
        build_pixels(samples.split(split), root / ".kd_dist", 1, lambda done, total: None)
        pixels[split] = open_pixels(samples.split(split), root / ".kd_dist")
    return Data(samples, pixels)


def small_network(classes: int) -> Cnn5:
    return Cnn5(classes, channels=(4, 8, 8))


def make_teacher(data: Data, fold: int, folds: int = FOLDS, **facts) -> label.Teacher:
    torch.manual_seed(fold + 10)
    model = small_network(4).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # an untrained network's logits hardly differ between images
    row = TeacherRow(checkpoint.weights_digest(model.state_dict()), "small", fold, fold, 24, 0.5, folds)
    path, fingerprint = Path(f"F{fold}/model.pt"), data.samples.train.fingerprint
    rest = ((0.4, 1.0), f"2026-01-0{fold + 1}", path, fingerprint)
    return replace(label.Teacher(model, row, MEAN, STD, data.samples.classes, *rest), **facts)


def write_out_of_fold(runtime, root, target, stop_after=None) -> int:
    """Write an out-of-fold cache; gives how many blocks this rank did."""
    data = open_data(root)
    teachers = [make_teacher(data, fold) for fold in (2, 0, 1)]  # in any order
    plan = label.plan(teachers, data, label.ViewRule(3, (0.4, 1.0), seed=5), "float32")
    labeller = label.Labeller(teachers, data, plan.header, runtime.device)
    stop, blocks = StopRequest(), []

    def progress(done, total):
        blocks.append(done)
        if done == stop_after:
            stop.signal = 15

    label.write_cache(target, plan, labeller, runtime, stop, progress)
    return len(blocks)


@pytest.fixture(scope="module")
def written(root, tmp_path_factory) -> Path:
    """An out-of-fold cache written by one rank in one go."""
    target = tmp_path_factory.mktemp("whole") / "folds.h5"
    with joined("cpu") as runtime:
        write_out_of_fold(runtime, root, target)
    return target


def test_each_row_is_the_teachers_that_never_saw_the_image(root, written):
    cache, data = open_cache(written), open_data(root)
    train, val = cache.split("train"), cache.split("val")
    part_N = fold_numbers(data.samples.train.labels_N, data.samples.train.sha256_N32, FOLDS)
    assert np.array_equal(train.teacher_N, part_N) and set(part_N) == {0, 1, 2}
    assert [(row.fold, row.folds, row.members) for row in cache.header.teachers] == [
        *((fold, FOLDS, "") for fold in range(FOLDS)),
        (-1, 0, "0 1 2"),
    ]
    assert (val.teacher_N == FOLDS).all() and cache.header.teachers[FOLDS].val_top1 == cache.val_top1
    for view in range(3):
        of_val = []
        for fold in range(FOLDS):
            forward = {
                split: Forward(make_teacher(data, fold).model, data.pixels[split], 24, MEAN, STD, torch.device("cpu"))
                for split in ("train", "val")
            }
            own = np.flatnonzero(part_N == fold)
            everyone = views.Shown.plain(np.arange(40), train.box_NV4[:, view], train.flip_NV[:, view])
            assert np.array_equal(train.logits_NVK[own, view], forward["train"].logits(everyone.at(own)).astype("f2"))
            whole = forward["train"].logits(everyone)  # its own cache's rows, in other batches
            np.testing.assert_allclose(train.logits_NVK[own, view], whole[own], rtol=2e-3, atol=2e-3)
            others = np.flatnonzero(part_N != fold)
            assert (np.abs(train.logits_NVK[others, view] - whole[others]).max(axis=1) > 0.01).all()
            of_val.append(
                forward["val"].logits(views.Shown.plain(np.arange(8), val.box_NV4[:, view], val.flip_NV[:, view]))
            )
        assert np.array_equal(val.logits_NVK[:, view], np.mean(of_val, axis=0, dtype=np.float64).astype("f2"))


def test_interrupted_and_gone_on_with_by_two_ranks_the_bytes_are_one_ranks(root, written, tmp_path):
    cut = tmp_path / "folds.h5"
    with joined("cpu") as runtime, pytest.raises(Interrupted):
        write_out_of_fold(runtime, root, cut, stop_after=2)
    assert not cut.exists()
    assert run_ranks(2, write_out_of_fold, root, cut) == [2, 2]  # six blocks, two were safe
    assert cut.read_bytes() == written.read_bytes()


@pytest.fixture(scope="module")
def run_folders(root, tmp_path_factory) -> list[str]:
    """The model.pt of the three teachers, as their runs leave them, and of one that was trained on all of train."""
    data, paths = open_data(root), []
    for fold in range(4):
        teacher = make_teacher(data, fold)
        folder = RunFolder(tmp_path_factory.mktemp("teachers") / f"F{fold}")
        folder.path.mkdir()
        facts = {
            "kind": "teacher",
            "arch": "small",
            "weights": teacher.model.state_dict(),
            "classes": data.samples.classes,
        }
        seen = {"image_size": 24, "mean": MEAN, "std": STD, "settings": {"crop_scale": (0.4, 1.0)}}
        part = {"fold": {"number": fold, "folds": FOLDS} if fold < FOLDS else None, "seed": fold, "val_top1": 0.5}
        fingerprint = {"data": {"train": data.samples.train.fingerprint}, "finished": teacher.finished}
        checkpoint.save_model(folder.model, {**facts, **seen, **part, **fingerprint})
        paths.append(str(folder.model))
    return paths


@pytest.fixture
def command(root, monkeypatch, capsys):
    """Runs a command of kd_dist.cache on the tiny set; gives what it says."""
    monkeypatch.setitem(TEACHERS, "small", small_network)

    def run(*arguments: object) -> str:
        main([*map(str, arguments), "--data", str(root), "--device", "cpu"])
        return capsys.readouterr().out

    return run


def test_the_commands_write_verify_and_extend_it(written, command, run_folders, tmp_path):
    folds, more, at_once = run_folders[:3], tmp_path / "more.h5", tmp_path / "at_once.h5"
    again = tmp_path / "again.h5"
    command("write", "--teacher", *folds, "--like", written, "-o", again)
    assert np.array_equal(open_cache(again).split("train").logits_NVK, open_cache(written).split("train").logits_NVK)
    said = command("verify", again, "--samples", 9999, "--teacher", *folds)
    assert f"{3 * (40 + 8)} soft labels recomputed" in said and "not checked" not in said
    said = command("verify", again, "--samples", 9999, "--teacher", folds[1])
    rows = 3 * int((open_cache(again).split("train").teacher_N == 1).sum())
    assert f"{rows} soft labels recomputed" in said
    assert "soft labels of the teachers trained without fold 0 (of 0 to 2) of train, without fold 2" in said
    command("extend", again, "--teacher", *reversed(folds), "--views", 4, "-o", more)
    command("write", "--teacher", *folds, "--views", 4, "--seed", 5, "-o", at_once)
    assert more.read_bytes() == at_once.read_bytes()
    with pytest.raises(UserError, match=r"was labelled by other teachers .* pass the model.pt of each teacher"):
        command("extend", again, "--teacher", folds[0], "--views", 4, "-o", tmp_path / "none.h5")
    assert "out-of-fold: each train image by the teacher that was not trained on it" in render_info(open_cache(more))


def test_verify_finds_the_data_where_the_environment_names_it(root, written, run_folders, monkeypatch, capsys):
    monkeypatch.setitem(TEACHERS, "small", small_network)
    monkeypatch.setenv("KD_DIST_DATA", str(root))
    main(["verify", str(written), "--device", "cpu", "--teacher", *run_folders[:3]])
    said = capsys.readouterr().out
    assert f"images in {root} are the cache's" in said and "soft labels recomputed" in said


def test_verify_sees_a_row_of_another_fold(written, command, run_folders, tmp_path):
    cache = open_cache(written)
    shifted = replace(cache.split("train"), teacher_N=(cache.split("train").teacher_N + 1) % 3)
    plan = CachePlan(cache.header, {"train": shifted, "val": cache.split("val")})
    writer = BlockWriter(tmp_path / "wrong.h5", plan)
    for block in plan.blocks:
        writer.put(block, cache.split(block.split).logits_NVK[block.start : block.stop, block.view])
    writer.publish()
    with pytest.raises(UserError, match="does not hold the logits"):
        command("verify", tmp_path / "wrong.h5", "--samples", 9999, "--teacher", *run_folders[:3])


def test_views_of_another_cache_can_be_labelled_and_combined(written, command, run_folders, tmp_path):
    """By a teacher trained on all of train; a mean of the two is verified by all teachers, one of probabilities not."""
    other, mean, soft = (tmp_path / name for name in ("other.h5", "mean.h5", "soft.h5"))
    command("write", "--teacher", run_folders[3], "--like", written, "-o", other)
    one, two = open_cache(written), open_cache(other)
    for split in ("train", "val"):
        assert np.array_equal(one.split(split).box_NV4, two.split(split).box_NV4)
        assert not np.array_equal(one.split(split).logits_NVK, two.split(split).logits_NVK)
    assert (two.header.seed, two.header.crop_scale) == (one.header.seed, one.header.crop_scale)
    main(["combine", str(written), str(other), "-o", str(mean)])
    main(["combine", str(written), str(other), "-o", str(soft), "--mean", "probabilities", "--temperature", "2"])
    assert f"{3 * 48} soft labels recomputed" in command("verify", mean, "--samples", 9999, "--teacher", *run_folders)
    assert "not checked; each soft label is a mean of several" in command("verify", mean, "--teacher", run_folders[3])
    assert "means of probabilities at temperature 2" in command("verify", soft, "--teacher", *run_folders)
    with pytest.raises(UserError, match="omit --views"):
        command("write", "--teacher", run_folders[3], "--like", written, "--views", 4, "-o", tmp_path / "none.h5")
    with pytest.raises(UserError, match="--views is required unless --like FILE is given"):
        command("write", "--teacher", run_folders[3], "-o", tmp_path / "none.h5")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda teachers: teachers[:2],
            r"no teacher leaves out fold 2 \(of 0 to 2\): train one with --folds 3 --fold 2",
        ),
        (
            lambda teachers: [*teachers, teachers[0]],
            "F0/model.pt and F0/model.pt both leave out fold 0: pass one teacher per fold",
        ),
        (lambda teachers: [*teachers[:2], with_row(teachers[2], folds=5)], "has folds 3, but F2/model.pt has 5"),
        (
            lambda teachers: [*teachers[:2], with_row(teachers[2], image_size=32)],
            "has image size 24, but F2/model.pt has 32",
        ),
        (lambda teachers: [*teachers[:2], replace(teachers[2], mean=(0.0,) * 3)], "has mean and std .* F2/model.pt"),
        (lambda teachers: [*teachers[:2], with_row(teachers[2], fold=-1)], "F2/model.pt was trained on all of train"),
        (lambda teachers: [*teachers[:2], with_row(teachers[2], val_top1=None)], "F2/model.pt was trained with --tune"),
        (lambda teachers: [*teachers[:2], replace(teachers[2], data="f00d")], "was trained on train images f00d, "),
    ],
)
def test_an_incomplete_or_mixed_set_of_teachers_is_refused(root, change, message):
    data = open_data(root)
    teachers = change([make_teacher(data, fold) for fold in range(FOLDS)])
    with pytest.raises(UserError, match=message):
        label.plan(teachers, data, label.ViewRule(1, (0.4, 1.0), seed=5), "float32")


def with_row(teacher: label.Teacher, **facts) -> label.Teacher:
    return replace(teacher, row=replace(teacher.row, **facts))
