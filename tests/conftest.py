"""What several test modules share: a tiny drawn set made once, images in memory, ranks without a process group."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests are many small computations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_dist.data import generated
from kd_dist.data.samples import Dataset
from kd_dist.data.scan import scan
from kd_dist.dist.runtime import Runtime
from kd_dist.images.store import Pixels, build_pixels, open_pixels

# Tests of whole jobs, the longest file first, so that two workers end at the same time.
INTEGRATION = (
    *("test_jobs", "test_exactness", "test_package", "test_study", "test_bad_input", "test_launch_local"),
    *("test_launch_task", "test_real_pictures", "test_docs", "test_study_sweep"),
)
STARTERS = {"run_ranks", "run_command"}
KINDS = {"unit", "integration", "cluster", "nullgpu", "gpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its kind: its own marker's or its folder's; integration for the files above and for what starts
    ranks; unit for all else. The long files come first.
    """
    order = {name: number for number, name in enumerate(INTEGRATION)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.parent.name in ("cluster", "nullgpu", "gpu"):
            item.add_marker(item.path.parent.name)
        elif not KINDS & {marker.name for marker in item.iter_markers()}:
            whole = item.path.stem in order or STARTERS & set(item.function.__code__.co_names)
            item.add_marker("integration" if whole else "unit")


@pytest.fixture(scope="session")
def generated_root(tmp_path_factory) -> Path:
    """A set of three classes, 21 train and 9 val images of several sizes, for all tests: no job may write into it."""
    root = tmp_path_factory.mktemp("tiny") / "set"
    generated.generate(root, train_per_class=7, val_per_class=3, classes=3)
    return root


@pytest.fixture
def tiny_root(generated_root, tmp_path_factory) -> Path:
    """A copy of that set for one test, in which a job leaves its decoded images."""
    return shutil.copytree(generated_root, tmp_path_factory.mktemp("tiny") / "set")


@pytest.fixture(scope="session")
def tiny(generated_root) -> Dataset:
    """The sample lists of the set that no job writes into."""
    return scan(generated_root)


@pytest.fixture(scope="session")
def tiny_pixels(tiny, tmp_path_factory) -> dict[str, Pixels]:
    """The decoded images of the tiny set by split."""
    folder = tmp_path_factory.mktemp("pixels")
    for split in ("train", "val"):
        build_pixels(tiny.split(split), folder, 1, lambda done, total: None)
    return {split: open_pixels(tiny.split(split), folder) for split in ("train", "val")}


@pytest.fixture(scope="session")
def pixels_of() -> Callable[[Sequence[np.ndarray]], Pixels]:
    """Makes a store in memory from images uint8 [H, W, 3]."""

    def build(images: Sequence[np.ndarray]) -> Pixels:
        lengths_N = np.array([image.size for image in images])
        sizes_N2 = np.array([image.shape[:2] for image in images], np.int64)
        content = np.concatenate([image.ravel() for image in images])
        return Pixels(torch.from_numpy(content), sizes_N2, np.cumsum(lengths_N) - lengths_N)

    return build


@pytest.fixture(scope="session")
def rank_of() -> Callable[[int, int], Runtime]:
    """Makes the runtime of (rank, world size) on the CPU; its collectives work only in a world of one."""
    return lambda rank, world_size: Runtime(rank, world_size, rank, world_size, torch.device("cpu"), None)


@pytest.fixture(scope="session")
def one_process(rank_of) -> Runtime:
    """The runtime of a job that is a single process."""
    return rank_of(0, 1)
