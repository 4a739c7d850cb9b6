"""--evaluate-every: how often a run is scored on val, which changes no weight."""

import pytest
import torch

from kd_dist import distill, report, teacher
from kd_dist.run.checkpoint import load_model
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from tests.entries import call, refused

SHORT = ["--device", "cpu", "--image-size", "32", "--batch-size", "7", "--lr", "0.01", "--preset", "cpu-64px"]


def scored_epochs(folder) -> list[int]:
    return [row["epoch"] for row in read_metrics(RunFolder(folder)) if "val_top1" in row]


@pytest.fixture
def data(tiny_root, tmp_path) -> list:
    """The flags of a short job on the tiny set, which keeps its decoded images elsewhere."""
    return [*SHORT, "--data", tiny_root, "--pixels-dir", tmp_path / "store"]


def test_scores_are_those_of_the_evaluated_epochs_and_weights_are_the_same(data, tmp_path):
    command = [*data, "--alpha", 0, "--epochs", 5, "--student", "cnn5"]
    for every in (1, 2):
        call(distill.main, *command, "--evaluate-every", every, "--out", tmp_path / str(every))
    assert scored_epochs(tmp_path / "1") == [1, 2, 3, 4, 5] and scored_epochs(tmp_path / "2") == [2, 4, 5]
    often, seldom = (load_model(RunFolder(tmp_path / name).model) for name in ("1", "2"))
    assert all(torch.equal(often["weights"][key], seldom["weights"][key]) for key in often["weights"])
    assert often["val_top1"] == seldom["val_top1"]
    assert "5/5" in report.report([tmp_path / "2"])


def test_weights_that_are_kept_have_their_scores(data, tmp_path):
    flags = ["--evaluate-every", 9, "--keep-epochs", 1, "--epochs", 3, "--views", 0]
    call(teacher.main, *data, *flags, "--out", tmp_path / "run")
    assert scored_epochs(tmp_path / "run") == [1, 3]
    assert "val_top1" in load_model(RunFolder(tmp_path / "run").model_after(1))


@pytest.mark.parametrize("every", [0, -1])
def test_never_is_refused(data, tmp_path, every):
    command = [*data, "--alpha", 0, "--evaluate-every", every, "--out", tmp_path / "run"]
    assert "--evaluate-every" in refused(distill.main, *command)
