"""A data set for loops of one's own: crops and logits of the student's job, in any loader; the loops of the docs."""

import copy
import json
import os
import pickle
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset

import kd_dist
from benchmarks import generated_cache
from kd_dist import cached_views, distill, label
from kd_dist.cache import TopK, open_cache
from kd_dist.cached_views import CachedViews
from kd_dist.config import MEAN, STD, DataConfig, DistillConfig
from kd_dist.data.generated import generate
from kd_dist.dist.endings import StopRequest
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.job import Data
from kd_dist.training import objectives
from kd_dist.training.batches import Batch, EpochBatches, TrainData
from kd_dist.training.losses import kl
from tests.test_exactness import open_tiny, small_teacher

V, SIZE = 5, 21
LOOPS = Path(__file__).parents[1] / "docs" / "loops.md"


def write(runtime, data: Data, target: Path, mixed: float = 0.0) -> Path:
    """A cache of a set in V views."""
    model = small_teacher(data.samples.classes)
    plan = label.plan([model], data, label.ViewRule(V, (0.4, 1.0), 5, mixed), "float32")
    labeller = label.Labeller([model], data, plan.header, runtime.device)
    label.write_cache(target, plan, labeller, runtime, StopRequest(), lambda done, total: None)
    return target


@pytest.fixture(scope="module")
def root(generated_root, tmp_path_factory) -> Path:
    return shutil.copytree(generated_root, tmp_path_factory.mktemp("views") / "set")


@pytest.fixture(scope="module", params=["cache", "mixed"])
def either(request) -> Path:
    """A cache without and one with mixed views; not to be changed."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def cache(root, one_process) -> Path:
    return write(one_process, open_tiny(root), root.with_name("plain.h5"))


@pytest.fixture(scope="module")
def mixed(root, one_process) -> Path:
    return write(one_process, open_tiny(root), root.with_name("mixed.h5"), 0.5)


def job_batches(cache: Path, root: Path, epoch: int) -> list[Batch]:
    """An epoch of the student's job."""
    data = open_tiny(root)
    crops, logits_NVK = distill.crops_of(DistillConfig.of(alpha=0.9), data, open_cache(cache))
    train = TrainData(data.pixels["train"], data.samples.train.labels_N, crops, SIZE, 8, 0, logits_NVK=logits_NVK)
    batches = EpochBatches(train, epoch, 0, 1)
    return [batches[step] for step in range(len(batches))]


def test_items_are_what_the_students_job_shows_to_the_bit(either, root):
    """Pixels, labels and logits, in each of two rounds through the views; the network's input too."""
    pixels = CachedViews(either, root, image_size=SIZE, normalise=None)
    inputs = CachedViews(either, root, image_size=SIZE)
    normalise = views.Normalise(MEAN, STD, torch.float32, torch.device("cpu"))
    for epoch in range(2 * V):
        pixels.set_epoch(epoch)
        inputs.set_epoch(epoch)
        for batch in job_batches(either, root, epoch):
            normalised_BCHW = normalise(batch.images_BCHW)
            for slot, index in enumerate(batch.index_B.tolist()):
                image, target, logits = pixels[index]
                own, partner, weight = (
                    column[slot] for column in (batch.labels_B, batch.partner_labels_B, batch.weights_B)
                )
                assert torch.equal(image, batch.images_BCHW[slot]) and image.dtype == torch.uint8
                assert torch.equal(inputs[index].image, normalised_BCHW[slot])
                assert torch.equal(logits, batch.teacher_logits_BK[slot].float())
                if pixels._crops.mixed is None:
                    assert target == own and target.dtype == torch.int64
                else:
                    expected_K = torch.zeros(3)
                    expected_K[own] += weight
                    expected_K[partner] += 1 - weight
                    torch.testing.assert_close(target, expected_K)


def test_one_view_for_all(cache, root):
    table = open_cache(cache).split("val")
    val = CachedViews(cache, root, "val", image_size=SIZE)
    centre = CachedViews(cache, root, "val", image_size=SIZE, view=0)
    assert len(val) == 9 and val.classes == open_cache(cache).classes
    rows = table.logits_NVK[:, 0].astype(np.float32)
    for index, (item, same) in enumerate(zip(val, centre, strict=True)):  # iteration ends with the images
        assert item.label == table.labels_N[index] and np.array_equal(item.teacher_logits, rows[index])
        assert all(torch.equal(*pair) for pair in zip(item, same, strict=True))
    third = CachedViews(cache, root, image_size=SIZE, view=3, normalise=None)
    train, data = open_cache(cache).split("train"), open_tiny(root)
    expected_CHW = views.render(data.pixels["train"][7], train.box_NV4[7, 3], bool(train.flip_NV[7, 3]), SIZE)
    assert torch.equal(third[7].image, expected_CHW)


def test_images_without_labels_come_with_their_logits_and_the_label_that_is_none(root, one_process, tmp_path):
    (tmp_path / "more").mkdir()
    for number, path in enumerate(sorted((root / "val").rglob("*.jpg"))[:4]):
        shutil.copy(path, tmp_path / f"more/{number}.jpg")
    flags = {"unlabelled": str(tmp_path / "more"), "pixels_dir": str(tmp_path / "store")}
    source = DataConfig(data=str(root), pixels="memory", **flags)
    data = cached_views.job.open_data(source, one_process)
    cache = write(one_process, data, tmp_path / "logits.h5")
    train = CachedViews(cache, root, image_size=SIZE, **flags)
    assert (train.labels_N == -1).sum() == 4 and len(train) == 25
    _, labels, logits_BK = torch.utils.data.default_collate([train[i] for i in range(25)])
    assert labels.tolist() == train.labels_N.tolist()
    assert torch.isfinite(kd_dist.distillation_loss(torch.zeros(25, 3), logits_BK, labels))
    assert {tuple(row.tolist()) for row in logits_BK[labels == -1]} <= {
        tuple(row) for row in open_cache(cache).split("train").logits_NVK[train.labels_N == -1].reshape(-1, 3).tolist()
    }
    with pytest.raises(UserError, match="25 train images"):
        CachedViews(cache, root, image_size=SIZE)


def test_an_epoch_shows_other_views_than_the_one_before(cache, root):
    data = CachedViews(cache, root, image_size=SIZE)
    seen = []
    for epoch in range(V - 1):
        data.set_epoch(epoch)
        seen.append([item.teacher_logits for item in data])
    for rows in zip(*seen, strict=True):
        assert len({tuple(row.tolist()) for row in rows}) == V - 1


# ------------------------------------------------------------------------------------------------------------- loaders


def epochs(data: CachedViews, loader: DataLoader, count: int) -> list[list[torch.Tensor]]:
    """The batches of some epochs, each put together: images, labels, logits."""
    found = []
    for epoch in range(count):
        data.set_epoch(epoch)
        found.append([torch.cat(column) for column in zip(*loader, strict=True)])
    return found


@pytest.mark.integration
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_processes_give_what_one_process_gives(start, mixed, root):
    """Also those that stay from one epoch to the next."""
    data = CachedViews(mixed, root, image_size=SIZE)
    expected = epochs(data, DataLoader(data, batch_size=4), 3)
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=start, persistent_workers=True)
    for alone, shared in zip(expected, epochs(data, loader, 3), strict=True):
        assert all(torch.equal(*pair) for pair in zip(alone, shared, strict=True))
    assert not torch.equal(expected[0][0], expected[1][0])


def test_a_pickle_holds_names_and_labels_and_not_what_is_mapped(cache, root):
    data = CachedViews(cache, root, image_size=SIZE)
    data.set_epoch(2)
    again = pickle.loads(pickled := pickle.dumps(data))
    assert len(pickled) < 20_000 < len(data._pixels.bytes_)
    assert all(torch.equal(*pair) for pair in zip(again[5], data[5], strict=True))


def test_a_cache_that_was_replaced_is_not_mapped_again(cache, root, tmp_path):
    for name in (cache.name, f"{cache.name}.sha256"):
        shutil.copy(cache.with_name(name), tmp_path)
    pickled = pickle.dumps(CachedViews(tmp_path / cache.name, root, image_size=SIZE))
    shutil.copy(cache, tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / cache.name)
    with pytest.raises(UserError, match="was replaced"):
        pickle.loads(pickled)


def test_samplers_of_several_ranks_share_an_epoch_out(cache, root):
    data = CachedViews(cache, root, image_size=SIZE)
    data.set_epoch(1)
    expected = {tuple(item.teacher_logits.tolist()) for item in data}
    seen = []
    for rank in range(3):
        sampler = DistributedSampler(data, num_replicas=3, rank=rank, seed=3)
        sampler.set_epoch(1)
        own = DataLoader(copy.deepcopy(data), batch_size=3, sampler=sampler)
        seen += [tuple(row.tolist()) for batch in own for row in batch.teacher_logits]
    assert len(seen) == 21 and set(seen) == expected
    half = Subset(data, range(0, 21, 2))
    assert torch.equal(half[3].image, data[6].image)


def _enter(log: Path, cache: Path, root: Path, opened) -> None:
    def slow(*arguments):
        with open(log, "a") as file:
            file.write("in\n")
        time.sleep(0.3)
        with open(log, "a") as file:
            file.write("out\n")
        return opened(*arguments)

    cached_views.job.open_data = slow
    CachedViews(cache, root, image_size=SIZE)


@pytest.mark.integration
def test_the_processes_of_a_machine_open_the_data_one_after_the_other(cache, root, tmp_path):
    """So that the ranks of a job do not all decode the same images."""
    fork = get_context("fork")
    arguments = (tmp_path / "log", cache, root, cached_views.job.open_data)
    ranks = [fork.Process(target=_enter, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"split": "test"}, "split='test' is not known; pass 'train' or 'val'."),
        ({"view": 5}, "view=5, but the views are 0 to 4"),
        ({"view": -1, "split": "val"}, "view=-1, but the views are 0 to 4"),
        ({"pixels": "device"}, "renders images on the CPU"),
        ({"pixels": "nowhere"}, "--pixels nowhere is not known"),
        ({"data": "absent"}, "absent"),
        ({"cache": "absent.h5"}, "there is no cache absent.h5"),
    ],
)
def test_what_cannot_be_given_is_one_sentence(arguments, sentence, cache, root):
    with pytest.raises(UserError) as caught:
        CachedViews(**{"cache": cache, "data": root, "image_size": SIZE, **arguments})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_and_an_altered_cache_are_refused(cache, root, tmp_path):
    generate(tmp_path / "other", train_per_class=7, val_per_class=3, seed=1, classes=3)
    with pytest.raises(UserError, match="for the content of"):
        CachedViews(cache, tmp_path / "other", image_size=SIZE)
    content = bytearray(cache.read_bytes())
    content[-100] ^= 1
    (tmp_path / "altered.h5").write_bytes(content)
    with pytest.raises(UserError, match=r"altered.h5 is damaged"):
        CachedViews(tmp_path / "altered.h5", root, image_size=SIZE)


def test_a_cache_without_its_checksum_file_is_used_with_a_warning(cache, root, tmp_path):
    shutil.copy(cache, tmp_path / "alone.h5")
    with pytest.warns(UserWarning, match=r"alone.h5 has no .sha256 file beside it"):
        CachedViews(tmp_path / "alone.h5", root, image_size=SIZE)


def test_shortened_logits_and_mean_probabilities_need_the_temperature(tmp_path):
    short = open_cache(generated_cache.write(tmp_path / "short.h5", 40, 3, 12, top_k=4, val_images=9))
    held = short.split("train").logits_NVK
    assert isinstance(held, TopK)
    with pytest.raises(UserError, match=r"holds the 4 largest logits, .*such as temperature=4"):
        cached_views._soft_labels(short, "train", None)
    with pytest.raises(UserError, match="below 1"):
        cached_views._soft_labels(short, "train", 0.5)
    rows = np.arange(40), np.ones(40, int)
    assert np.array_equal(cached_views._soft_labels(short, "train", 4)[rows], held.at(4)[rows])
    means = replace(short, header=replace(short.header, temperature=4.0))
    with pytest.raises(UserError, match=r"at temperature 4; pass temperature=4, and use it in your loss"):
        cached_views._soft_labels(means, "train", 2)
    cached_views._soft_labels(means, "train", 4)


# ---------------------------------------------------------------------------------------------------------------- loss


def linear(weights_DK: torch.Tensor, images_BCHW: torch.Tensor) -> torch.Tensor:
    return images_BCHW.flatten(1) @ weights_DK


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_the_loss_is_the_jobs(either, root, alpha):
    """Value and gradient, on the job's own batches and on batches of the data set."""
    data, of_job = CachedViews(either, root, image_size=SIZE), objectives.distilled(3, 0.0, kl, alpha, 3.0)
    for batch in job_batches(either, root, 0):
        weights = torch.randn(3 * SIZE * SIZE, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        normalised_BCHW = torch.stack([data[i].image for i in batch.index_B.tolist()])
        shown = replace(batch, images_BCHW=normalised_BCHW, teacher_logits_BK=batch.teacher_logits_BK.float())
        expected = of_job(partial(linear, weights), shown)["total"].mean()
        (expected_gradient,) = torch.autograd.grad(expected, weights)
        images, targets, logits_BK = torch.utils.data.default_collate([data[i] for i in batch.index_B.tolist()])
        loss = kd_dist.distillation_loss(linear(weights, images), logits_BK, targets, alpha=alpha, temperature=3.0)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, weights)[0], expected_gradient, rtol=1e-5, atol=1e-6)


def test_an_image_without_a_label_counts_by_its_soft_loss_alone():
    student_BK, teacher_BK = torch.randn(2, 4, 3)
    labels_B = torch.tensor([0, -1, 2, -1])
    loss = kd_dist.distillation_loss(student_BK, teacher_BK, labels_B, alpha=0.5, temperature=2.0)
    hard_B = torch.nn.functional.cross_entropy(student_BK, labels_B, ignore_index=-1, reduction="none")
    torch.testing.assert_close(loss, (0.5 * kl(student_BK, teacher_BK, 2.0) + 0.5 * hard_B).mean())
    with pytest.raises(UserError, match="is not known"):
        kd_dist.distillation_loss(student_BK, teacher_BK, labels_B, loss="kll")


# ---------------------------------------------------------------------------------------------------- loops of the page


def loops() -> dict[str, str]:
    """The page's code by its heading."""
    return dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)```", LOOPS.read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture
def recorded(cache, root, tmp_path, monkeypatch):
    """The page's files in the current folder; gives what was drawn of train, [epoch, images], by all processes."""
    for name in (cache.name, f"{cache.name}.sha256"):
        target = tmp_path / "runs/teacher" / name.replace(cache.stem, "logits")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(cache.with_name(name).read_bytes())
    shutil.copytree(root, tmp_path / "data/imagewoof2-160")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original = CachedViews.__getitems__

    def drawn(self, indices):
        if self.split == "train":
            with open(tmp_path / "drawn", "a") as file:
                file.write(json.dumps([int(self._epoch), list(map(int, indices))]) + "\n")
        return original(self, indices)

    monkeypatch.setattr(CachedViews, "__getitems__", drawn)
    return lambda: [json.loads(line) for line in (tmp_path / "drawn").read_text().splitlines()]


@pytest.mark.integration
@pytest.mark.parametrize(
    "name, package",
    [
        ("Plain PyTorch", "torch"),
        pytest.param("Lightning", "lightning", marks=pytest.mark.slow),
        pytest.param("Hugging Face Trainer", "transformers", marks=pytest.mark.slow),
    ],
)
def test_the_pages_loops_run_and_show_each_image_once_an_epoch(name, package, recorded):
    """In the views of that epoch: three epochs, each with the 21 images of train, drawn by two loader processes."""
    pytest.importorskip(package)
    code = loops()[name]
    assert len([line for line in code.splitlines() if line]) < 30
    torch.manual_seed(0)
    exec(compile(code, str(LOOPS), "exec"), {"__name__": "loop"})
    for epoch in range(3):
        shown = [index for at, indices in recorded() if at == epoch for index in indices]
        assert sorted(shown) == list(range(21)), f"epoch {epoch}"
    assert {epoch for epoch, _ in recorded()} == {0, 1, 2}
