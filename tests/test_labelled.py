"""--label-fraction: a fraction of the labels is used; other images have soft labels only, or are left out."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_dist import config, distill, job, teacher
from kd_dist.config import DistillConfig
from kd_dist.data.folds import labelled_rows
from kd_dist.data.generated import generate
from kd_dist.data.scan import scan
from kd_dist.errors import UserError
from kd_dist.models import STUDENTS, TEACHERS, Cnn5
from kd_dist.run.claim import read_settings
from kd_dist.run.metrics import read_metrics
from kd_dist.study import __main__ as study
from kd_dist.study.folder import StudyFolder
from kd_dist.training import Trainer, objectives
from kd_dist.training.batches import Batch
from kd_dist.training.losses import SOFT_LOSSES, UNKNOWN, hard_targets
from tests.entries import call, refused
from tests.test_bad_input import TINY

SHARES = [0.05, 0.1, 0.3, 0.5, 1.0]


@pytest.fixture(scope="module")
def images():
    """211 images of three uneven classes; rows 10 to 12 show one image, as do rows 0 and 210, of two classes."""
    sha256_N32 = np.random.default_rng(0).integers(0, 256, (211, 32), dtype=np.uint8)
    sha256_N32[11] = sha256_N32[12] = sha256_N32[10]
    sha256_N32[210] = sha256_N32[0]
    return np.repeat([0, 1, 2], [100, 90, 21]), sha256_N32


def test_every_class_has_its_share_and_copies_stay_together(images):
    labels_N, sha256_N32 = images
    for share in SHARES:
        rows_M = labelled_rows(labels_N, sha256_N32, share)
        assert rows_M.dtype == np.int64 and (np.diff(rows_M) > 0).all()
        for label in range(3):
            of_class = np.flatnonzero(labels_N == label)
            different = {sha256_N32[row].tobytes() for row in of_class}
            used = {sha256_N32[row].tobytes() for row in of_class if row in rows_M}
            assert len(used) == np.ceil(round(share * len(different), 6))
            assert all((sha256_N32[row].tobytes() in used) == (row in rows_M) for row in of_class)


@pytest.mark.parametrize(("share", "of_100"), [(0.07, 7), (0.28, 28), (0.55, 55), (0.071, 8), (0.001, 1)])
def test_a_share_is_rounded_up_but_not_by_a_rounding_error(images, share, of_100):
    assert len(labelled_rows(np.zeros(100, int), images[1][100:200], share)) == of_100


def test_a_smaller_share_is_part_of_a_larger_one(images):
    found = [set(labelled_rows(*images, share)) for share in SHARES]
    assert all(small < large for small, large in pairwise(found)) and len(found[-1]) == 211


def test_the_share_follows_the_images_not_their_order(images):
    labels_N, sha256_N32 = images
    order_N = np.random.default_rng(1).permutation(211)
    moved_M = labelled_rows(labels_N[order_N], sha256_N32[order_N], 0.3)
    assert set(order_N[moved_M]) == set(labelled_rows(labels_N, sha256_N32, 0.3))


# ---- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_label_that_is_not_known_has_no_target(smoothing):
    known, unknown = torch.tensor([2, 0, 1]), torch.tensor([2, UNKNOWN, 1])
    targets_BK = hard_targets(unknown, 4, smoothing)
    assert (targets_BK[1] == 0).all() and torch.equal(targets_BK[::2], hard_targets(known, 4, smoothing)[::2])
    partners, weights = torch.tensor([3, 3, UNKNOWN]), torch.tensor([0.25, 0.25, 0.25])
    mixed_BK = hard_targets(unknown, 4, smoothing, partners, weights)
    assert torch.equal(mixed_BK[0], hard_targets(known, 4, smoothing, partners, weights)[0])
    torch.testing.assert_close(mixed_BK[1], 0.75 * hard_targets(partners, 4, smoothing)[1])
    torch.testing.assert_close(mixed_BK[2], 0.25 * hard_targets(known, 4, smoothing)[2])


def test_an_image_without_a_label_gives_the_soft_loss_alone():
    rng = np.random.default_rng(0)
    labels_B = torch.tensor([0, 1, 2])
    batch = Batch(
        index_B=torch.arange(3),
        images_BCHW=torch.tensor(rng.normal(0, 1, (3, 3, 2, 2))),
        labels_B=labels_B,
        partner_labels_B=labels_B,
        weights_B=torch.ones(3),
        teacher_logits_BK=torch.tensor(rng.normal(0, 2, (3, 5))),
        global_size=3,
    )
    masked_B = torch.tensor([0, UNKNOWN, 2])
    masked = replace(batch, labels_B=masked_B, partner_labels_B=masked_B)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).double()
    terms = objectives.distilled(5, 0.1, SOFT_LOSSES["kl"], 0.6, 2.0)
    whole, part = terms(model, batch), terms(model, masked)
    assert torch.equal(whole["soft"], part["soft"])
    assert part["hard"][1] == 0 and torch.equal(part["total"][1], 0.6 * part["soft"][1])
    assert torch.equal(whole["total"][::2], part["total"][::2])


# ---- runs


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A set of four classes of twelve (data), and a teacher's run (teacher) with a cache of three views."""
    folder = tmp_path_factory.mktemp("label_fraction")
    generate(folder / "data", train_per_class=12, val_per_class=2, classes=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEACHERS, "small", small)
        call(teacher.main, *words(folder), "--out", folder / "teacher", "--teacher", "small", "--views", 3)
    return folder


@pytest.fixture(autouse=True)
def small_student(monkeypatch):
    monkeypatch.setitem(STUDENTS, "small", small)


def small(classes: int) -> Cnn5:
    return Cnn5(classes, channels=(4, 8, 8))


def words(folder: Path) -> list[object]:
    return ["--data", folder / "data", *TINY]


def student(made: Path) -> list[object]:
    return [*words(made), "--cache", made / "teacher" / "logits.h5", "--student", "small"]


def used_rows(made: Path, share: float) -> set[int]:
    train = scan(made / "data").train
    return set(labelled_rows(train.labels_N, train.sha256_N32, share))


@pytest.fixture
def seen(monkeypatch) -> dict[int, set[int]]:
    """The labels that training was given of each image; filled as runs go on."""
    labels: dict[int, set[int]] = {}
    original = Trainer.train_step

    def looked_at(self, batch):
        for index, label in zip(batch.index_B.tolist(), batch.labels_B.tolist(), strict=True):
            labels.setdefault(index, set()).add(label)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", looked_at)
    return labels


def test_labels_alone_are_learned_from_the_labelled_images_alone(made, tmp_path, seen):
    call(
        distill.main,
        *student(made),
        "--alpha",
        0,
        "--label-fraction",
        0.5,
        "--batch-size",
        8,
        "--out",
        tmp_path / "run",
    )
    train = scan(made / "data").train
    assert set(seen) == used_rows(made, 0.5) and len(seen) == 24
    assert all(labels == {train.labels_N[row]} for row, labels in seen.items())


def test_a_distilled_student_sees_all_images_and_the_labels_of_some(made, tmp_path, seen, capsys):
    call(distill.main, *student(made), "--label-fraction", 0.25, "--out", tmp_path / "run")
    train, used = scan(made / "data").train, used_rows(made, 0.25)
    assert len(seen) == 48 and len(used) == 12
    assert all(labels == {train.labels_N[row] if row in used else UNKNOWN} for row, labels in seen.items())
    assert "48 images (12 labels used) at" in capsys.readouterr().out


def test_another_share_is_another_run(made, tmp_path):
    command = [*student(made), "--out", tmp_path / "run"]
    call(distill.main, *command, "--label-fraction", 0.5)
    assert "--label-fraction" in refused(distill.main, *command)


def test_the_share_is_of_what_a_fold_leaves(made):
    data = job.Data(scan(made / "data"), {})
    typed = {"folds": 4, "fold": 1, "label_fraction": 0.5, "alpha": 0.0}
    settings = config.resolve(DistillConfig, typed, has_gpu=False)
    members_M, fold = (
        job.members_of(settings.split, settings.distillation.labels, data),
        job.fold_for(settings.split, data),
    )
    assert (
        set(members_M) < set(fold.train_M) and np.bincount(data.samples.train.labels_N[members_M]).tolist() == [5] * 4
    )
    soft = config.resolve(DistillConfig, typed | {"alpha": 0.5}, has_gpu=False)
    assert np.array_equal(job.members_of(soft.split, soft.distillation.labels, data), fold.train_M)
    assert np.array_equal(job.labelled_of(soft.split, soft.distillation.labels, data), members_M)


def test_a_batch_larger_than_the_labelled_images_is_refused(made, one_process):
    data = job.Data(scan(made / "data"), {})
    settings = config.resolve(DistillConfig, {"label_fraction": 0.1, "alpha": 0.0, "batch_size": 9}, has_gpu=False)
    with pytest.raises(UserError, match="--batch-size 9 is larger than the 8 training images"):
        job.require_trainable(settings, data, small(4), one_process, settings.distillation.labels)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, "nan"])
def test_a_share_out_of_range_is_refused(made, tmp_path, share):
    sentence = refused(distill.main, *student(made), "--label-fraction", share, "--out", tmp_path / "run")
    assert "--label-fraction" in sentence and "must be above 0 and at most 1" in sentence


def test_a_loss_of_labels_is_refused(made, tmp_path):
    command = [*student(made), "--loss", "dkd", "--label-fraction", 0.5, "--out", tmp_path / "run"]
    assert "--loss dkd needs the hard label of every image, but --label-fraction is 0.5" in refused(
        distill.main, *command
    )
    assert not (tmp_path / "run").exists()


# ---- the study


def test_a_studys_twins_on_fewer_labels_are_shown_as_many_images(made, tmp_path):
    out = tmp_path / "study"
    chosen = ["hard-half=baseline,label_fraction=0.5", "half=distilled,label_fraction=0.5"]
    command = [*student(made), "--seeds", 0, "--out", out]
    call(study.main, *command, "--arms", "baseline", "distilled", *chosen)
    runs = {name: StudyFolder(out).run(name, 0) for name in ("baseline", "hard-half", "distilled", "half")}
    epochs = {name: len(read_metrics(run)) for name, run in runs.items()}
    assert epochs["hard-half"] == 2 * epochs["baseline"] and epochs["half"] == epochs["distilled"]
    settings = {name: read_settings(run)[1] for name, run in runs.items()}
    assert settings["hard-half"]["warmup_epochs"] == 2 * settings["baseline"]["warmup_epochs"]
    assert settings["half"]["label_fraction"] == settings["hard-half"]["label_fraction"] == 0.5
    table = StudyFolder(out).table.read_text()
    assert "| baseline with label-fraction 0.5 |" in table


@pytest.mark.parametrize("name", ["smooth", "class-mean", "shuffled-within", "no-gradient"])
def test_arms_that_need_every_label_are_refused(made, tmp_path, name):
    command = [*student(made), "--seeds", 0, "--out", tmp_path / "study", "--arms"]
    sentence = "needs the hard label of every image, but --label-fraction uses fewer; omit the arm with --arms."
    assert refused(study.main, *command, name, "--label-fraction", 0.5) == f"arm {name} {sentence}"
    assert refused(study.main, *command, f"few={name},label_fraction=0.5") == f"arm few {sentence}"
