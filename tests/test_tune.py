"""--folds, --fold and --tune: the part left out is not trained on, it alone is looked at, and it says so everywhere."""

from pathlib import Path

import numpy as np
import pytest

from kd_dist import config, distill, job, teacher
from kd_dist.cache import open_cache
from kd_dist.config import DistillConfig, TeacherConfig
from kd_dist.data.folds import fold_of
from kd_dist.data.generated import generate
from kd_dist.data.scan import scan
from kd_dist.errors import UserError
from kd_dist.fingerprint import fingerprint_of
from kd_dist.images.store import Pixels
from kd_dist.models import STUDENTS, TEACHERS, Cnn5
from kd_dist.report import report
from kd_dist.run.checkpoint import load_model
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.run.results import read_val_logits
from kd_dist.training.batches import EpochBatches, FreshCrops, TrainData
from tests.entries import call, refused
from tests.test_bad_input import TINY

PART = ("--folds", 4, "--fold", 1)


def test_mixes_and_order_keep_to_the_members(pixels_of):
    pixels = pixels_of([np.full((9, 9, 3), i, np.uint8) for i in range(40)])
    members_M = np.arange(0, 40, 3)
    whole = TrainData(pixels, np.arange(40), FreshCrops(pixels.sizes_N2, (0.5, 1.0), 0), 8, 5, 0, 0.4, 0.4)
    part = TrainData(**{**vars(whole), "members_M": members_M})
    assert (len(part), part.steps_per_epoch) == (14, 3)
    batches = EpochBatches(part, 0, 0, 1)
    items = [batches[step] for step in range(3)]
    assert sorted(np.concatenate([item.index_B for item in items])) == members_M.tolist()
    partners = np.concatenate([item.partner_labels_B for item in items])
    assert set(partners) <= set(members_M) and len(set(partners)) > 5
    box_N4 = EpochBatches(whole, 0, 0, 1).views.box_N4
    assert np.array_equal(batches.views.box_N4, box_N4)  # an image's view does not depend on who else is there


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set, and what a tuned teacher and a tuned student left: their folders are `teacher` and `student`."""
    folder = tmp_path_factory.mktemp("tune")
    generate(folder / "data", train_per_class=12, val_per_class=2, classes=4)
    with pytest.MonkeyPatch.context() as patch:
        small = lambda classes: Cnn5(classes, channels=(4, 8, 8))  # noqa: E731
        patch.setitem(TEACHERS, "small", small)
        patch.setitem(STUDENTS, "small", small)
        call(teacher.main, *usual(folder, "teacher"), "--views", 2, *PART, "--tune")
        forbid_val(patch)
        call(distill.main, *usual(folder, "student"), "--cache", folder / "teacher/logits.h5", *PART, "--tune")
    return folder


def usual(folder: Path, kind: str) -> list[object]:
    return ["--data", folder / "data", "--out", folder / kind, f"--{kind}", "small", *TINY]


def forbid_val(patch):
    """From here on, to render or to score a val image is an error."""
    original = job.open_data

    class Forbidden(Pixels):
        def __getitem__(self, *_):
            raise AssertionError("a val image was looked at")

        crops = __getitem__

    def open_data(*arguments):
        data = original(*arguments)
        return job.Data(data.samples, {**data.pixels, "val": Forbidden(**vars(data.pixels["val"]))})

    patch.setattr(job, "open_data", open_data)


def test_without_tune_the_val_images_are_looked_at(made, monkeypatch):
    """The guard above can fail."""
    forbid_val(monkeypatch)
    monkeypatch.setitem(STUDENTS, "small", lambda classes: Cnn5(classes, channels=(4, 8, 8)))
    with pytest.raises(AssertionError, match="a val image was looked at"):
        call(distill.main, *usual(made, "student"), "--alpha", 0, "--out", made / "untuned", *PART)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_score_says_what_it_is_of(made, kind):
    folder, train = RunFolder(made / kind), scan(made / "data").train
    fold = fold_of(train.labels_N, train.sha256_N32, 1, 4)
    kept, saved, row = read_val_logits(folder.val_logits), load_model(folder.model), read_metrics(folder)[-1]
    assert kept.attrs["of"] == "fold 1 of 4 of train" and len(kept.logits_NK) == len(fold.held_out_M) == 12
    assert kept.paths == tuple(train.paths[i] for i in fold.held_out_M)
    assert np.array_equal(kept.labels_N, train.labels_N[fold.held_out_M])
    assert kept.fingerprint == fingerprint_of(kept.paths, kept.labels_N, train.sha256_N32[fold.held_out_M])
    assert saved["fold"] == {"number": 1, "folds": 4} and saved["settings"]["tune"]
    assert saved["tune_top1"] == row["tune_top1"] == kept.attrs["top1"]
    assert "val_top1" not in saved and not [name for name in row if name.startswith("val_")]
    shown = report([folder.path])
    assert (
        f"{100 * row['tune_top1']:.1f} %" in shown
        and "are on fold 1 (of 0 to 3) of train (--tune), not on val" in shown
    )


def test_agreement_is_with_the_caches_rows_of_the_part(made):
    train = scan(made / "data").train
    held_out_M = fold_of(train.labels_N, train.sha256_N32, 1, 4).held_out_M
    cache, kept = open_cache(made / "teacher/logits.h5"), read_val_logits(RunFolder(made / "student").val_logits)
    agreement = np.mean(kept.logits_NK.argmax(1) == cache.split("train").logits_NVK[held_out_M, 0].argmax(1))
    assert read_metrics(RunFolder(made / "student"))[-1]["tune_agreement"] == agreement


def test_soft_labels_that_an_arm_makes_are_made_of_the_members_alone(made):
    """class-mean, say, must not use logits of the part that is scored on."""
    data = job.Data(scan(made / "data"), {})
    settings = config.resolve(DistillConfig, {"folds": 4, "fold": 1, "tune": True}, has_gpu=False)
    logits_NVK = np.ones((48, 2, 4), np.float16)
    held_out_M = job.fold_for(settings.split, data).held_out_M
    logits_NVK[held_out_M] = np.nan
    rows = lambda logits_NVK, labels_N, _: np.broadcast_to(logits_NVK.mean(axis=0), logits_NVK.shape)  # noqa: E731
    made_NVK = distill._made_of_members(rows, logits_NVK, data, settings)
    assert (np.delete(made_NVK, held_out_M, axis=0) == 1).all() and (made_NVK[held_out_M] == 0).all()


def test_the_teachers_cache_names_its_part(made):
    cache = open_cache(made / "teacher/logits.h5")
    (row,) = cache.header.teachers
    assert (row.fold, row.folds, row.val_top1) == (1, 4, cache.val_top1)
    assert len(cache.split("train")) == 48 and len(cache.split("val")) == 8


def test_labels_of_a_teacher_that_saw_the_part_are_refused(made):
    other = [*usual(made, "student"), "--cache", made / "teacher/logits.h5", "--tune", "--folds", 4, "--fold", 2]
    other[other.index("small")] = "cnn5"
    sentence = refused(distill.main, *other, "--out", made / "none")
    assert (
        "trained without fold 1 (of 0 to 3) of train, but --tune evaluates on fold 2 (of 0 to 3) of train" in sentence
    )
    assert "which that teacher saw; use the cache of a teacher trained with --folds 4 --fold 2" in sentence
    assert "--folds 4 --fold 2" in sentence and not (made / "none").exists()
    assert "on fold 1 (of 0 to 2) of train, which that teacher saw" in refused(
        distill.main, *other[:-4], "--folds", 3, "--fold", 1, "--out", made / "none"
    )


@pytest.mark.parametrize(
    "typed, message",
    [
        ({"folds": 4}, "--folds and --fold go together"),
        ({"folds": 4, "fold": 4}, "--fold 4 must be at least 0 and below --folds 4"),
        ({"folds": 1, "fold": 0}, "--folds 1 must be at least 2"),
        ({"tune": True}, "add --folds 10 --fold 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(typed, message):
    for kind in (TeacherConfig, DistillConfig):
        with pytest.raises(UserError, match=message):
            config.resolve(kind, typed, has_gpu=False)


def test_a_teacher_without_a_cache(made, monkeypatch):
    """--views 0, for teachers of folds: their labels are written together."""
    monkeypatch.setitem(TEACHERS, "small", lambda classes: Cnn5(classes, channels=(4, 8, 8)))
    call(teacher.main, *usual(made, "teacher"), "--out", made / "F0", "--views", 0, "--folds", 2, "--fold", 0)
    folder = RunFolder(made / "F0")
    assert not folder.cache.exists() and load_model(folder.model)["fold"] == {"number": 0, "folds": 2}
    assert "val_top1" in load_model(folder.model)
