"""Both jobs on real dogs: a small subset of Imagewoof at 64 px, where KD_DIST_IMAGEWOOF names an archive of it."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from kd_dist.cache import open_cache
from kd_dist.data.releases import locate
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from tests.test_jobs import run, torchrun

ARCHIVE = os.environ.get("KD_DIST_IMAGEWOOF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARCHIVE, reason="KD_DIST_IMAGEWOOF names no Imagewoof archive"),
]
SMALL = ["--image-size", "64", "--batch-size", "40", "--warmup-epochs", "0.5", "--device", "cpu"]


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> Path:
    """24 train and 8 val images of each class."""
    folder = tmp_path_factory.mktemp("imagewoof")
    whole = locate(folder, "imagewoof2-160", ARCHIVE, explicit=True)
    for split, count in (("train", 24), ("val", 8)):
        for class_folder in sorted((whole / split).iterdir()):
            target = folder / "subset" / split / class_folder.name
            target.mkdir(parents=True)
            for path in sorted(class_folder.iterdir())[:count]:
                shutil.copy(path, target)
    return folder / "subset"


def test_teacher_cache_student(subset, tmp_path):
    data = ["--data", str(subset)]
    out = RunFolder(tmp_path / "teacher")
    run([*torchrun(2), "kd_dist.teacher", *data, "--out", str(out.path), "--epochs", "2", "--views", "3", *SMALL])
    cache = open_cache(out.cache)
    assert cache.split("train").logits_NVK.shape == (240, 3, 10)
    verify = ["kd_dist.cache", "verify", str(out.cache), *data, "--teacher", str(out.model)]
    assert "soft labels recomputed" in run([sys.executable, "-m", *verify]).stdout
    student = RunFolder(tmp_path / "student")
    from_cache = ["--cache", str(out.cache), "--out", str(student.path), "--epochs", "6", "--lr", "0.02"]
    run([*torchrun(2), "kd_dist.distill", *data, *from_cache, *SMALL])
    soft = [row["train_soft"] for row in read_metrics(student)]
    assert soft[-1] < 0.8 * soft[0]  # the student moves towards the cached rows
