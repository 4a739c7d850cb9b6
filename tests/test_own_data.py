"""Both jobs on data of other layouts and with images that have no label: what one job writes of it the other reads, on
any number of ranks, resumed too; other data is refused.
"""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kd_dist import config, dataset, distill, job, teacher
from kd_dist.cache import UNLABELLED_IMAGES, open_cache
from kd_dist.cache import __main__ as cache_command
from kd_dist.cache.format import check_table
from kd_dist.cache.statistics import statistics_of
from kd_dist.config import DistillConfig, TeacherConfig
from kd_dist.data.folds import fold_numbers, labelled_rows
from kd_dist.data.generated import generate
from kd_dist.data.scan import scan
from kd_dist.dist.endings import Interrupted
from kd_dist.errors import UserError
from kd_dist.fingerprint import UNKNOWN
from kd_dist.run.checkpoint import load_model
from kd_dist.run.results import read_val_logits
from kd_dist.training import Trainer
from tests.entries import call, refused
from tests.ranks import run_command

SMALL = ["--image-size", "16", "--batch-size", "12", "--epochs", "2", "--lr", "0.02", "--device", "cpu"]
TEACHER = ["--teacher", "tests.test_own_data:small", "--views", "3", *SMALL]
STUDENT = ["--student", "tests.test_own_data:small", *SMALL]


def small(classes: int) -> nn.Module:
    """A network without batch statistics, so that any number of ranks trains it alike."""
    convolution = nn.Conv2d(3, 8, 3, stride=2)
    return nn.Sequential(
        convolution, nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
    )


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """Class folders alone: three classes of 16 images."""
    folder = tmp_path_factory.mktemp("own")
    generate(folder, train_per_class=16, val_per_class=1, classes=3)
    return folder / "train"


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    """Nine images of other pictures, two of them in a sub-folder."""
    folder = tmp_path_factory.mktemp("more")
    generate(folder / "drawn", train_per_class=3, val_per_class=1, seed=1, classes=3)
    for number, path in enumerate(sorted(folder.glob("drawn/train/*/*"))):
        target = folder / "images" / ("b" if number < 2 else "") / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder / "images"


@pytest.fixture(scope="module")
def made(flat, unlabelled, tmp_path_factory) -> tuple[list[object], Path]:
    """The flags of a set of 36 train images with labels and 9 without, and a teacher's run on it."""
    folder = tmp_path_factory.mktemp("made")
    data = ["--data", shutil.copytree(flat, folder / "set"), "--val-share", 0.3, "--unlabelled", unlabelled]
    call(teacher.main, *data, *TEACHER, "--out", folder / "teacher")
    return data, folder / "teacher"


def data_of(data: list[object]) -> job.Data:
    return job.Data(scan(data[1], val_share=data[3], unlabelled=data[5]), {})


def student(made: tuple[list[object], Path]) -> list[object]:
    return [*made[0], "--cache", made[1] / "logits.h5", *STUDENT]


# ---- the list


def test_images_without_a_label_follow_those_of_train(flat, unlabelled):
    before, found = scan(flat, val_share=0.3), scan(flat, val_share=0.3, unlabelled=unlabelled)
    count = len(before.train)
    assert found.val.fingerprint == before.val.fingerprint and found.classes == before.classes
    assert found.train.at(np.arange(count), "train").fingerprint == before.train.fingerprint
    assert found.train.paths[count:] == (
        *(f"unlabelled/{number}.jpg" for number in range(2, 9)),
        "unlabelled/b/0.jpg",
        "unlabelled/b/1.jpg",
    )
    assert (found.train.labels_N[count:] == UNKNOWN).all() and found.train.is_labelled_N.sum() == count
    assert found.layout.endswith("--val-share 0.3, 9 images without labels")
    assert found.train.file("unlabelled/b/0.jpg").read_bytes() == (unlabelled / "b/0.jpg").read_bytes()


def test_the_fingerprint_does_not_depend_on_where_unlabelled_images_are(flat, unlabelled, tmp_path):
    moved = shutil.copytree(unlabelled, tmp_path / "elsewhere")
    fingerprints = {scan(flat, val_share=0.3, unlabelled=where).train.fingerprint for where in (unlabelled, moved)}
    (moved / "2.jpg").write_bytes((moved / "3.jpg").read_bytes())
    fingerprints.add(scan(flat, val_share=0.3, unlabelled=moved).train.fingerprint)
    assert len(fingerprints) == 2


def test_digests_are_kept_with_and_without_them(flat, unlabelled, tmp_path):
    for more in (None, unlabelled, None):
        scan(flat, val_share=0.3, unlabelled=more, manifest_folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_copies_of_val_among_them_are_a_note_and_other_copies_are_none(flat, unlabelled, tmp_path):
    moved, found = shutil.copytree(unlabelled, tmp_path / "more"), scan(flat, val_share=0.3)
    shutil.copy(flat / found.train.paths[0], moved / "of-train.jpg")
    assert scan(flat, val_share=0.3, unlabelled=moved).notes() == []
    shutil.copy(flat / found.val.paths[0], moved / "of-val.jpg")
    (note,) = scan(flat, val_share=0.3, unlabelled=moved).notes()
    assert note.startswith("warning: files with the same content in train and in val: 1, such as unlabelled/of-val.jpg")


def _spoil(folder: Path, flat: Path, how: str) -> Path:
    if how == "a file":
        (folder / "x").write_text("")
        return folder / "x"
    if how == "the set":
        return flat
    if how == "a class":
        return flat / "00-disc-coarse"
    if how == "links":
        (folder / "link.jpg").symlink_to(next(flat.glob("01*/*")))
    return folder / ("nowhere" if how == "nowhere" else "")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nowhere", "there is no folder"),
        ("a file", "there is no folder"),
        ("empty", "holds no images"),
        ("the set", "holds images that have labels, such as"),
        ("a class", "holds images that have labels, such as"),
        ("links", "holds images that have labels, such as .*01-disc-fine"),
    ],
)
def test_unusable_folders_are_refused(flat, tmp_path, how, words):
    with pytest.raises(UserError, match=words) as caught:
        scan(flat, val_share=0.3, unlabelled=_spoil(tmp_path, flat, how))
    assert "\n" not in str(caught.value)


def test_class_folder_of_that_name_is_refused(flat, unlabelled, tmp_path):
    data = shutil.copytree(flat, tmp_path / "set")
    (data / "00-disc-coarse").rename(data / "unlabelled")
    with pytest.raises(UserError, match="a folder unlabelled/ of its own"):
        scan(data, val_share=0.3, unlabelled=unlabelled)


def test_command_counts_them(flat, unlabelled, capsys):
    assert dataset.main(["--data", str(flat), "--val-share", "0.3", "--unlabelled", str(unlabelled)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["without", "a", "label", "9", "0"] in lines and ["3", "classes", "45", "12"] in lines


# ---- who learns from them


def test_teacher_and_baseline_leave_them_out_and_a_student_takes_them(made):
    data, labelled = data_of(made[0]), np.arange(36)
    of_teacher = config.resolve(TeacherConfig, {}, has_gpu=False)
    assert np.array_equal(job.members_of(of_teacher.split, config.LabelUse(), data), labelled)
    for alpha, members in ((0.0, labelled), (0.5, None)):
        own = config.resolve(DistillConfig, {"alpha": alpha}, has_gpu=False)
        found_M = job.members_of(own.split, own.distillation.labels, data)
        assert found_M is members if members is None else np.array_equal(found_M, members)


def test_folds_and_label_shares_take_them_for_a_class_of_its_own(made):
    train = data_of(made[0]).samples.train
    fold_N = fold_numbers(train.labels_N, train.sha256_N32, 3)
    assert np.bincount(fold_N[36:]).tolist() == [3, 3, 3]
    assert np.bincount(fold_numbers(train.labels_N, train.sha256_N32, 10)[36:], minlength=10).max() == 1
    assert labelled_rows(train.labels_N, train.sha256_N32, 1.0).tolist() == list(range(36))
    split = config.resolve(TeacherConfig, {"folds": 3, "fold": 1, "tune": True}, has_gpu=False).split
    scored = job.scored_on(split, data_of(made[0]))
    assert (scored.samples.labels_N >= 0).all() and set(scored.rows_M) == set(np.flatnonzero(fold_N[:36] == 1))


def test_cache_holds_logits_of_all_and_labels_of_some(made, capsys):
    cache = open_cache(made[1] / "logits.h5")
    train = cache.split("train")
    assert train.logits_NVK.shape == (45, 3, 3) and (train.labels_N == UNKNOWN).sum() == 9
    job.Data.require_fit(data_of(made[0]), cache)
    call(cache_command.main, "verify", cache.path, *made[0], "--teacher", made[1] / "model.pt", "--device", "cpu")
    call(cache_command.main, "info", cache.path)
    assert "45 images (9 without a label) x 3 views" in capsys.readouterr().out


def test_statistics_compare_with_labels_where_there_are_some():
    rng = np.random.default_rng(0)
    logits_NVK, labels_N = rng.normal(0, 2, (20, 4, 5)), rng.integers(0, 5, 20)
    fewer_N = np.where(np.arange(20) < 12, labels_N, UNKNOWN)
    whole, part = statistics_of(logits_NVK, labels_N), statistics_of(logits_NVK, fewer_N)
    known = statistics_of(logits_NVK[:12], labels_N[:12])
    for name in ("top1", "top1_drawn", "label_probability", "nll", "calibration_error"):
        assert getattr(part, name) == pytest.approx(getattr(known, name)) != getattr(whole, name)
    for name in ("entropy", "max_probability", "near_one_hot", "spread", "divergence"):
        assert getattr(part, name) == getattr(whole, name)


@pytest.mark.parametrize(("split", "label"), [("train", -2), ("val", UNKNOWN), ("train", 3)])
def test_cache_with_other_labels_is_refused(made, split, label):
    cache = open_cache(made[1] / "logits.h5")
    labels_N = cache.split(split).labels_N.copy()
    labels_N[-1] = label
    with pytest.raises(ValueError, match=f"{split}/label of row"):
        check_table(split, cache.split(split).without_logits(labels_N=labels_N), cache.header)


def test_a_reader_has_to_know_of_them(made, flat, tmp_path):
    cache = open_cache(made[1] / "logits.h5")
    train = cache.split("train")
    assert cache.header.features == (UNLABELLED_IMAGES,)
    with pytest.raises(ValueError, match="train/label of row 36 is -1"):
        check_table("train", train.without_logits(), replace(cache.header, features=()))
    for labels_N, lacking in ((np.zeros(45, np.int64), 0), (np.full(45, UNKNOWN), 45)):
        with pytest.raises(ValueError, match=f"{lacking} of 45 images of train have no label"):
            check_table("train", train.without_logits(labels_N=labels_N), cache.header)


def test_caches_of_them_are_extended_combined_and_labelled_alike(made, tmp_path):
    first, teacher_file = made[1] / "logits.h5", made[1] / "model.pt"
    common = [*made[0], "--teacher", teacher_file, "--device", "cpu", "-o"]
    call(cache_command.main, "extend", first, "--views", 4, *common, tmp_path / "four.h5")
    call(teacher.main, *made[0], *TEACHER, "--seed", 1, "--views", 0, "--out", tmp_path / "other")
    like = [*made[0], "--teacher", tmp_path / "other/model.pt", "--device", "cpu", "--like", first]
    call(cache_command.main, "write", *like, "-o", tmp_path / "like.h5")
    call(cache_command.main, "combine", first, tmp_path / "like.h5", "-o", tmp_path / "mean.h5")
    for name in ("four", "like", "mean"):
        cache = open_cache(tmp_path / f"{name}.h5")
        assert cache.header.features == (UNLABELLED_IMAGES,)
        assert cache.fingerprint("train") == open_cache(first).fingerprint("train")


# ---- jobs


def test_jobs_agree_on_a_share_held_out_as_val(made, tmp_path, capsys):
    other = [*made[0][:3], 0.4, *made[0][4:]]
    assert "45 train images" in refused(distill.main, *student(made), *other, "--out", tmp_path / "other")
    without = [*made[0][:4], "--cache", made[1] / "logits.h5", *STUDENT, "--out", tmp_path / "other"]
    assert "has 45 train images" in refused(distill.main, *without)
    call(teacher.main, *made[0], *TEACHER, "--out", made[1])  # finished: prints the command for the student
    assert not (tmp_path / "other").exists()


def test_command_for_the_student_names_the_data_whole(flat, unlabelled, tmp_path, capsys):
    data = ["--data", flat, "--val-share", 0.3, "--unlabelled", unlabelled, "--pixels-dir", tmp_path / "pixels"]
    call(teacher.main, *data, *TEACHER, "--epochs", 1, "--out", tmp_path / "teacher")
    assert f"--val-share 0.3 --unlabelled {unlabelled}" in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory) -> Path:
    """A student's run that was not interrupted, of one rank."""
    out = tmp_path_factory.mktemp("student") / "run"
    call(distill.main, *student(made), "--out", out)
    return out


def test_two_ranks_train_what_one_does(made, trained, tmp_path):
    run_command("kd_dist.distill", *student(made), "--out", tmp_path / "run", ranks=2)
    one, two = (read_val_logits(folder / "val_logits.h5").logits_NK for folder in (trained, tmp_path / "run"))
    assert len(one) == 12 and np.abs(one - two).max() < 1e-5


def test_two_ranks_write_the_cache_that_one_does(made, tmp_path):
    options = [*made[0], "--teacher", made[1] / "model.pt", "--views", 3, "--device", "cpu", "-o", tmp_path / "two.h5"]
    run_command("kd_dist.cache", "write", *options, ranks=2)
    one, two = open_cache(made[1] / "logits.h5"), open_cache(tmp_path / "two.h5")
    for split in ("train", "val"):
        assert np.array_equal(one.split(split).logits_NVK[:], two.split(split).logits_NVK[:])


def test_resumed_student_is_the_uninterrupted_one_to_the_bit(made, trained, tmp_path, monkeypatch):
    original, steps = Trainer.train_step, []

    def counted(self, batch):
        steps.append(batch)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", counted)
    command = [*student(made), "--out", tmp_path / "run"]
    with pytest.raises(Interrupted):
        call(distill.main, *command)
    assert len(steps) == 5
    call(distill.main, *command)
    assert len(steps) == 8, "two epochs of four steps, each taken once"
    one, again = (load_model(folder / "model.pt")["weights"] for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_loss_that_needs_labels_is_refused(made, tmp_path):
    command = [*student(made), "--loss", "dkd", "--out", tmp_path / "run"]
    assert "--loss dkd needs every image's label, --unlabelled has none" in refused(distill.main, *command)
    assert not (tmp_path / "run").exists()


def test_study_refuses_arms_that_need_labels(made, tmp_path):
    from kd_dist.study import __main__ as study

    command = [*student(made), "--seeds", 0, "--out", tmp_path / "study", "--arms"]
    assert "arm class-mean needs every image's label, --unlabelled" in refused(study.main, *command, "class-mean")
