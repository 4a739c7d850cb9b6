"""Columns that are mapped into memory, and logits of the top k: as near to all logits as the document says."""

import gc
import json
import math
import mmap
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_cache_format import CLASSES, HEADER, edited, logits_of, refusal, table_of, write_checksum

from benchmarks import generated_cache
from kd_dist.cache import (
    TOP_K,
    BlockWriter,
    CachePlan,
    TopK,
    open_cache,
    render_info,
    require_temperature,
    statistics_of,
)
from kd_dist.cache.topk import shorten
from kd_dist.training.batches import CachedCrops, TrainData
from kd_dist.training.losses import kl, logit_mse, soft_cross_entropy

VIEWS, K = 5, 40


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A cache of 2100 x 5 train rows of 40 classes: three chunks a view. Not to be changed."""
    return generated_cache.write(tmp_path_factory.mktemp("dense") / "logits.h5", 2100, VIEWS, K, val_images=50)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The same teacher's top 6."""
    folder = tmp_path_factory.mktemp("short")
    return generated_cache.write(folder / "logits.h5", 2100, VIEWS, K, top_k=6, val_images=50)


@pytest.fixture
def copy(dense, tmp_path) -> Path:
    """A cache of one's own to spoil."""
    for name in (dense.name, f"{dense.name}.sha256"):
        shutil.copy(dense.with_name(name), tmp_path)
    return tmp_path / dense.name


def some_rows(count: int = 700) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 2100, count), rng.integers(0, VIEWS, count)


# -------------------------------------------------------------------------------------------------------------- mapped


def test_columns_are_the_files_own_bytes(dense):
    """Not a copy: all processes of a node share the same pages. Nobody can write into them."""
    train = open_cache(dense).split("train")
    with h5py.File(dense) as file:
        for name, column in (("logits", train.logits_NVK), ("view/box", train.box_NV4), ("view/flip", train.flip_NV)):
            assert isinstance(column.base, mmap.mmap) and not column.flags.writeable
            assert column.ctypes.data % column.itemsize == 0
            np.testing.assert_array_equal(column, file[f"train/{name}"][()])


def mapped_batches(path: Path, pixels_of, runtime, workers: int = 0) -> list:
    train = open_cache(path).split("train")
    n = 60
    pixels = pixels_of([np.full((9, 9, 3), i, np.uint8) for i in range(n)])
    crops = CachedCrops(np.zeros((n, VIEWS, 4), np.int16) + np.int16(4), np.zeros((n, VIEWS), np.uint8), seed=3)
    data = TrainData(pixels, train.labels_N[:n], crops, 8, 7, seed=1, logits_NVK=train.logits_NVK)
    return [batch for epoch in (0, 5) for batch in data.epoch(epoch, runtime, workers, first_step=2)]


def test_worker_processes_see_the_same_rows(dense, pixels_of, one_process, monkeypatch):
    expected = mapped_batches(dense, pixels_of, one_process)
    monkeypatch.setattr("kd_dist.training.batches.AHEAD_BYTES", 2 * K * 15)  # two or three steps at once
    for workers in (0, 2):
        found = mapped_batches(dense, pixels_of, one_process, workers)
        assert len(found) == len(expected) == 2 * 7
        for batch, other in zip(found, expected, strict=True):
            assert torch.equal(batch.index_B, other.index_B)
            assert torch.equal(batch.teacher_logits_BK, other.teacher_logits_BK)


def test_views_are_chosen_as_they_were_at_once(monkeypatch):
    box_NV4, flip_NV = np.zeros((50, VIEWS, 4), np.int16), np.zeros((50, VIEWS), np.uint8)
    whole = [CachedCrops(box_NV4, flip_NV, seed=2)(epoch).choice_N for epoch in range(5)]
    monkeypatch.setattr("kd_dist.training.batches.CHOICE_CELLS", 4 * 7)
    pieces = [CachedCrops(box_NV4, flip_NV, seed=2)(epoch).choice_N for epoch in range(5)]
    np.testing.assert_array_equal(whole, pieces)


def test_a_file_that_takes_the_place_does_not_mix_in(copy):
    cache = open_cache(copy)
    expected = cache.split("train").logits_NVK[some_rows()]
    generated_cache.write(copy, 2100, VIEWS, K, top_k=3)
    np.testing.assert_array_equal(cache.split("train").logits_NVK[some_rows()], expected)
    cache.require_unchanged()


def test_a_file_changed_in_place_is_refused_and_a_touched_one_is_not(copy):
    cache = open_cache(copy)
    os.utime(copy, ns=(1, 1))
    cache.require_unchanged()
    with h5py.File(copy) as file:
        place = file["train/logits"].id.get_offset()
    with open(copy, "r+b") as file:
        file.seek(place)
        file.write(b"\x01\x02")
    os.utime(copy, ns=(2, 2))
    assert f"{copy} was modified during this run" in refusal(cache.require_unchanged)


def test_a_file_replaced_while_it_is_opened_is_refused(copy, monkeypatch):
    opened = h5py.File

    def replace_first(path, *arguments, **options):
        monkeypatch.setattr(h5py, "File", opened)
        shutil.copy(copy, copy.with_name("other"))
        os.replace(copy.with_name("other"), copy)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(h5py, "File", replace_first)
    assert "was replaced while it was being opened" in refusal(open_cache, copy)


def test_one_process_of_a_node_verifies_and_the_others_rely_on_it(copy, monkeypatch):
    results = {}

    def first(task, work):
        results[task] = json.loads(json.dumps(work()))
        return results[task]

    cache = open_cache(copy, first)
    assert list(results) == [f"verify {copy}"]
    monkeypatch.setattr("kd_dist.cache.reader.sha256_of", None)  # the others hash nothing
    monkeypatch.setattr("kd_dist.cache.reader.digest_of", None)
    other = open_cache(copy, lambda task, work: results[task])
    assert (other.digest, other.header, other.identity) == (cache.digest, cache.header, cache.identity)
    assert other.has_checksum
    np.testing.assert_array_equal(other.split("train").logits_NVK, cache.split("train").logits_NVK)
    os.utime(copy, ns=(1, 1))
    assert "was replaced" in refusal(open_cache, copy, lambda task, work: results[task])


def put(name: str, place, value):
    """An edit of a file: values of a dataset, made of the dataset where `value` is a function."""

    def edit(file):
        file[name][place] = value(file[name]) if callable(value) else value

    return edit


SPOILT = {
    "a row elsewhere": (put("train/logits", (5, 1), lambda rows: rows[6, 1]), "the columns of train"),
    "NaN": (put("train/logits", (2050, 4, 0), np.nan), "train/logits of row 2050 are not all finite"),
    "an empty box": (put("train/view/box", (1500, 3, 2), 0), "train/view/box of row 1500 is"),
    "labels": (put("val/label", ..., lambda labels_N: np.roll(labels_N, 1)), "do not belong together"),
    "sizes of files": (put("train/bytes", 7, 1), "the columns of train"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_columns_are_refused(case, copy):
    edit, named = SPOILT[case]
    with edited(copy) as file:
        edit(file)
    assert named in refusal(open_cache, copy)


def test_statistics_are_the_same_in_one_piece(dense, monkeypatch):
    cache = open_cache(dense)
    train = cache.split("train")
    whole = statistics_of(train.logits_NVK, train.labels_N)
    monkeypatch.setattr("kd_dist.cache.statistics.PIECE_BYTES", 8 * VIEWS * K * 700)
    pieces = statistics_of(train.logits_NVK, train.labels_N)
    assert vars(pieces) == pytest.approx(vars(whole))
    assert "80 bytes of logits per (image, view)" in render_info(cache)


def test_no_file_is_left_open(dense, tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for path in (dense, generated_cache.write(tmp_path / "logits.h5", 30, 2)):
            cache = open_cache(path)
            render_info(cache)
            del cache
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert len(os.listdir("/proc/self/fd")) <= before


# --------------------------------------------------------------------------------------------------------------- top k


def test_top_k_rows_by_hand():
    logits_BK = np.array([[1, 5, 2, 5, 0], [-3, -3, -3, -3, 9]], np.float16)
    index_Bk, top_Bk, tail_BG = shorten(logits_BK, 2)
    assert index_Bk.dtype == np.uint8
    assert index_Bk.tolist() == [[1, 3], [4, 0]]  # of equal logits the first class
    assert top_Bk.tolist() == [[5, 5], [9, -3]]
    at_2, at_1 = 2 * math.log((1 + math.e**0.5 + math.e) / 3), math.log((1 + math.e + math.e**2) / 3)
    assert tail_BG[0, [0, 4, 7]].tolist() == pytest.approx([1.0, at_2, at_1], abs=1e-3)
    assert tail_BG[1].tolist() == [-3] * 8


@pytest.mark.parametrize(("classes", "dtype"), [(256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "i4")])
def test_classes_are_counted_in_the_smallest_type(classes, dtype):
    logits_BK = np.arange(classes, dtype=np.float32)[None] / 100
    index_Bk = shorten(logits_BK, 1)[0]
    assert (index_Bk.dtype, int(index_Bk[0, 0])) == (dtype, classes - 1)


@pytest.mark.parametrize("temperature", [1.0, 1.4, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
def test_top_k_keeps_probabilities_and_the_tails_mass(temperature, dense, short):
    dense_BK, short_BK = (open_cache(path).split("train").logits_NVK for path in (dense, short))
    assert short_BK.shape == dense_BK.shape
    dense_BK, short_BK = dense_BK[some_rows()].astype(float), short_BK.at(temperature)[some_rows()].astype(float)
    top_Bk = np.argsort(-dense_BK, axis=1, kind="stable")[:, :6]
    p_BK, q_BK = (np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True) for z in (dense_BK, short_BK))
    for probabilities in zip(*(np.take_along_axis(x, top_Bk, axis=1) for x in (p_BK, q_BK)), strict=True):
        np.testing.assert_allclose(*probabilities, rtol=0.01)
    assert (short_BK.argmax(1) == dense_BK.argmax(1)).all()


@pytest.mark.parametrize(
    ("loss", "temperature", "at"),
    [(kl, 1.0, 1.0), (kl, 7.0, 7.0), (soft_cross_entropy, 4.0, 4.0), (logit_mse, 4.0, math.inf)],
)
def test_what_a_student_learns_of_the_top_classes_is_the_same(loss, temperature, at, dense, short):
    """The gradient of the soft loss is right on the top classes, and on the others in sum."""
    dense_NVK, short_NVK = (open_cache(path).split("train").logits_NVK for path in (dense, short))
    student_BK = torch.zeros(700, K, dtype=torch.float64, requires_grad=True)
    top_Bk = torch.from_numpy(short_NVK.index_NVk[some_rows()].astype(np.int64))
    gradients, sums = [], []
    for teacher_BK in (dense_NVK[some_rows()], short_NVK.at(at)[some_rows()]):
        (gradient_BK,) = torch.autograd.grad(
            loss(student_BK, torch.from_numpy(teacher_BK), temperature).sum(), student_BK
        )
        gradients.append(gradient_BK.gather(1, top_Bk))
        sums.append(gradient_BK.sum(dim=1) - gradients[-1].sum(dim=1))
    torch.testing.assert_close(*gradients, atol=2e-3, rtol=0.01)
    torch.testing.assert_close(*sums, atol=5e-3, rtol=0.01)


def test_rows_of_all_shapes_are_those_of_the_top_k(short):
    logits = open_cache(short).split("train").logits_NVK
    whole_NVK = logits[:]
    assert whole_NVK.shape == logits.shape == (2100, VIEWS, K)
    np.testing.assert_array_equal(logits[some_rows()], whole_NVK[some_rows()])
    np.testing.assert_array_equal(logits[40:50, 2], whole_NVK[40:50, 2])
    np.testing.assert_array_equal(logits[:, :2][7:9], whole_NVK[7:9, :2])


def test_a_top_k_file_requires_the_feature_and_is_smaller(dense, short):
    with h5py.File(short) as file:
        assert file.attrs["required_features"].tolist() == [b"top_k"]
        assert "logits" not in file["train"]
        assert file["train/top/index"].shape == file["train/top/logits"].shape == (2100, VIEWS, 6)
        assert file["train/top/tail"].shape == (2100, VIEWS, 8)
    cache = open_cache(short)
    assert cache.header.top_k == 6
    assert cache.val_top1 == open_cache(dense).val_top1
    assert "34 bytes per (image, view): the 6 largest of 40 logits" in render_info(cache)


def test_blocks_of_the_top_k_survive_a_stop_and_grow_by_views(tmp_path):
    header = replace(HEADER, features=(TOP_K,), top_k=1)

    def tables(views: int) -> dict:
        return {"train": table_of("train", 30, views), "val": table_of("val", 40, views)}

    def written(target: Path, views: int, known=None) -> Path:
        plan = CachePlan(header, tables(views))
        for stop in (1, 99):
            writer = BlockWriter(target, plan.beginning_with(known) if known else plan)
            for block in writer.missing()[:stop]:
                if writer.is_known(block):
                    writer.take_known(block)
                else:
                    writer.put(block, logits_of(block))
        return writer.publish()

    first = written(tmp_path / "first.h5", 2)
    grown = written(tmp_path / "grown.h5", 3, known=open_cache(first))
    assert grown.read_bytes() == written(tmp_path / "at_once.h5", 3).read_bytes()
    table = open_cache(first).split("val")
    assert isinstance(table.logits_NVK, TopK)
    writer = BlockWriter(tmp_path / "other.h5", CachePlan(header, tables(2)))
    with pytest.raises(ValueError, match="instead of"):
        writer.put_columns(writer.missing()[0], [logits_of(writer.missing()[0])])


def set_temperatures(file):
    file.attrs["tail_temperatures"] = np.arange(8.0)


def drop_tail(file):
    del file["val/top/tail"]


def add_link(file):
    file["train/top/more"] = h5py.SoftLink("/val")


def drop_feature(file):
    file.attrs["required_features"] = np.empty(0, "S1")


TOP_REFUSALS = {
    "a class out of range": (put("train/top/index", (9, 1, 0), K), "top/index of row 9 is"),
    "a class twice": (put("val/top/index", (4, 0, 1), lambda index: index[4, 0, 0]), "top/index of row 4 is"),
    "NaN in the tail": (put("train/top/tail", (3, 2, 5), np.nan), "top/tail of row 3 are not all finite"),
    "another tail": (put("train/top/tail", (3, 2, 5), 1), "the columns of train"),
    "other temperatures": (set_temperatures, "tail_temperatures"),
    "no tail": (drop_tail, "val/top/tail is missing"),
    "a link": (add_link, "more in train/top is a link"),
    "dense rows": (drop_feature, "train/logits is missing"),
}


@pytest.mark.parametrize("case", TOP_REFUSALS)
def test_refused(case, short, tmp_path):
    edit, named = TOP_REFUSALS[case]
    path = Path(shutil.copy(short, tmp_path))
    with h5py.File(path, "r+") as file:
        edit(file)
    write_checksum(path)
    assert named in refusal(open_cache, path)


def test_temperatures_below_the_tails_are_refused():
    require_temperature(1.0, "logits.h5")
    require_temperature(math.inf, "logits.h5")
    assert "--temperature 0.5 is below 1, but logits.h5" in refusal(require_temperature, 0.5, "logits.h5")


def test_a_header_that_contradicts_itself_is_a_defect(tmp_path):
    tables = {"train": table_of("train", 30, 1), "val": table_of("val", 40, 1)}
    for changes in ({"top_k": 1}, {"features": (TOP_K,)}, {"features": (TOP_K,), "top_k": len(CLASSES)}):
        with pytest.raises(ValueError, match="top_k is"):
            BlockWriter(tmp_path / "logits.h5", CachePlan(replace(HEADER, **changes), tables))
