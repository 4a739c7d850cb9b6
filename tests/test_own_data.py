"""Both jobs on data of other layouts: what one job writes of it, the other reads, and other data is refused."""

import shutil
from pathlib import Path

import pytest

from kd_dist import distill, teacher
from kd_dist.cache import __main__ as cache_command
from kd_dist.cache import open_cache
from kd_dist.data.generated import generate
from kd_dist.data.scan import scan
from tests.entries import call, refused

SMALL = ["--image-size", "32", "--batch-size", "12", "--epochs", "2", "--lr", "0.02", "--device", "cpu"]
TEACHER = ["--teacher", "tests.test_own_data:small", "--views", "3", *SMALL]
STUDENT = ["--student", "tests.test_own_data:small", *SMALL]


def small(classes: int):
    """A network that trains in no time."""
    from kd_dist.models import Cnn5

    return Cnn5(classes, channels=(4, 8, 8, 16, 16))


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """Class folders alone: three classes of 16 images."""
    folder = tmp_path_factory.mktemp("own")
    generate(folder, train_per_class=16, val_per_class=1, classes=3)
    return folder / "train"


def test_jobs_agree_on_a_share_held_out_as_val(flat, tmp_path, capsys):
    data, share = ["--data", shutil.copytree(flat, tmp_path / "flat")], ["--val-share", "0.3"]
    call(teacher.main, *data, *share, *TEACHER, "--out", tmp_path / "teacher")
    cache = tmp_path / "teacher/logits.h5"
    assert "--val-share 0.3" in capsys.readouterr().out.splitlines()[-1]  # in the command for the student
    samples, found = scan(tmp_path / "flat", val_share=0.3), open_cache(cache)
    assert [found.fingerprint(split) for split in ("train", "val")] == [
        samples.train.fingerprint,
        samples.val.fingerprint,
    ]
    call(distill.main, *data, *share, *STUDENT, "--cache", cache, "--out", tmp_path / "student")
    call(cache_command.main, "verify", cache, *data, *share, "--device", "cpu")
    other = [*data, "--val-share", "0.4"]
    assert "36 train images" in refused(distill.main, *other, *STUDENT, "--cache", cache, "--out", tmp_path / "other")
