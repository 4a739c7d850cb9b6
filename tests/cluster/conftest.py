"""One two-node Slurm and one tiny data set for the tests here; they are skipped where there is none or nobody asked."""

import os
from pathlib import Path

import pytest
from box import SlurmBox, missing
from shared import Cluster, log_of

from kd_dist.data import generated


def pytest_collection_modifyitems(items) -> None:
    """Skip with a reason what needs a Slurm, where there is none or where nobody set KD_DIST_CLUSTER_TESTS."""
    asked = os.environ.get("KD_DIST_CLUSTER_TESTS")
    reason = missing() or (None if asked else "they take minutes: run by make test-cluster")
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Cluster:
    folder = tmp_path_factory.mktemp("cluster")
    generated.generate(folder / "data", train_per_class=8, val_per_class=4, classes=4)
    box = SlurmBox(folder / "slurm")
    os.environ["SLURM_CONF"] = str(box.conf)
    try:
        box.start()
        yield Cluster(box, folder)
    finally:
        box.stop()
        del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def reference(cluster) -> Cluster:
    """The cluster after a pipeline of two nodes x two ranks went through undisturbed: runs/teacher and runs/student."""
    teacher, student = cluster.submit_pipeline()
    cluster.end(student, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
    assert cluster.state("runs/student").get("status") == "finished", cluster.status("runs") + log_of(teacher)
    return cluster


@pytest.fixture(scope="session")
def student_options() -> tuple[str, ...]:
    """The options of a student that learns from the reference's cache."""
    return ("--data=data", "--cache=runs/teacher/logits.h5", "--checkpoint-minutes=0.02")
