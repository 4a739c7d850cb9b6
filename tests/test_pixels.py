"""The store of decoded images: what it holds, when it is built, and what is not taken for it."""

import errno
import os
import re
import shutil
import socket
import time

import numpy as np
import pytest
import torch

from kd_dist.config import DataConfig
from kd_dist.data.scan import default_folder, scan
from kd_dist.errors import UserError
from kd_dist.images import store as pixels
from kd_dist.images.decode import decode
from kd_dist.images.store import Pixels, build_pixels, open_pixels
from kd_dist.job import open_data


def build(samples, folder) -> None:
    build_pixels(samples, folder, 2, lambda done, total: None)


def assert_holds(store: Pixels | None, samples) -> None:
    assert store is not None
    assert len(store) == len(samples)
    for index, path in enumerate(samples.paths):
        image_HWC = decode(samples.root / path)
        assert tuple(store.sizes_N2[index]) == image_HWC.shape[:2]
        assert store[index].dtype == torch.uint8
        assert np.array_equal(store[index], image_HWC)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The images decoded so far; a few are decoded together, so that a store is made of several pieces."""
    decoded = []

    def decode_and_count(path):
        decoded.append(path.name)
        return decode(path)

    monkeypatch.setattr(pixels, "decode", decode_and_count)
    monkeypatch.setattr(pixels, "DECODED_TOGETHER", 4)
    return decoded


def test_store_equals_the_decoded_images(tiny, tmp_path, counted):
    told = []
    for samples in (tiny.train, tiny.val):
        assert open_pixels(samples, tmp_path / "new") is None
        build_pixels(samples, tmp_path / "new", 3, lambda done, total: told.append((done, total)))
        assert_holds(open_pixels(samples, tmp_path / "new"), samples)
    assert len(np.unique(open_pixels(tiny.train, tmp_path / "new").sizes_N2, axis=0)) > 2  # of several sizes
    assert told == [(4, 21), (8, 21), (12, 21), (16, 21), (20, 21), (21, 21), (4, 9), (8, 9), (9, 9)]
    assert len(counted) == 30


def test_second_build_does_nothing(tiny, tmp_path, counted):
    build(tiny.val, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    counted.clear()
    build(tiny.val, tmp_path)
    assert counted == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def _damage(folder, how: str) -> None:
    images, sizes = next(folder.glob("*.u8")), next(folder.glob("*.npy"))
    fewer_N2 = np.load(sizes)[:-1]
    {
        "images cut short": lambda: os.truncate(images, images.stat().st_size - 1),
        "images too long": lambda: os.truncate(images, images.stat().st_size + 1),
        "images gone": images.unlink,
        "sizes cut short": lambda: os.truncate(sizes, sizes.stat().st_size - 1),
        "sizes empty": lambda: os.truncate(sizes, 0),
        "sizes gone, as when the build was killed": sizes.unlink,
        "sizes of fewer images": lambda: np.save(sizes, fewer_N2),
        "all of fewer images": lambda: [
            np.save(sizes, fewer_N2),
            os.truncate(images, fewer_N2.prod(axis=1).sum() * 3),
        ],
    }[how]()


@pytest.mark.parametrize(
    "how",
    [
        "images cut short",
        "images too long",
        "images gone",
        "sizes cut short",
        "sizes empty",
        "sizes gone, as when the build was killed",
        "sizes of fewer images",
        "all of fewer images",
    ],
)
def test_store_that_is_not_whole_is_built_again(tiny, tmp_path, how):
    build(tiny.val, tmp_path)
    _damage(tmp_path, how)
    assert open_pixels(tiny.val, tmp_path) is None
    build(tiny.val, tmp_path)
    assert_holds(open_pixels(tiny.val, tmp_path), tiny.val)


def test_changed_data_is_another_store(tiny, tiny_root, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "store"
    shutil.copytree(tiny_root, root)
    build(tiny.val, folder)
    first, second = (root / path for path in tiny.val.paths[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    changed = scan(root)
    assert open_pixels(changed.val, folder) is None
    build(changed.val, folder)
    assert_holds(open_pixels(changed.val, folder), changed.val)
    assert_holds(open_pixels(tiny.val, folder), tiny.val)


def _states(tiny_root, tmp_path, folder):
    """Two states of one set, the first one's val store built."""
    root = tmp_path / "set"
    shutil.copytree(tiny_root, root)
    first = scan(root).val
    build(first, root / folder)
    shutil.copy(root / first.paths[0], root / first.paths[1])
    return root / folder, first, scan(root).val


def test_store_of_an_earlier_state_is_deleted_from_the_sets_own_folder(tiny_root, tmp_path):
    folder, _, second = _states(tiny_root, tmp_path, ".kd_dist")
    for name, age in (("old", 2), ("new", 0)):
        (folder / f".val-{name}.u8.host-1-2.tmp").touch()
        os.utime(folder / f".val-{name}.u8.host-1-2.tmp", (time.time() - age * 86400,) * 2)
    (folder / "train-0123456789abcdef.u8").touch()
    (folder / "digests-0.npz").touch()
    assert build_pixels(second, folder, 1, lambda done, total: None) == next(folder.glob("val*.u8")).stat().st_size
    stem = f"val-{second.fingerprint[:16]}"
    assert {path.name for path in folder.iterdir()} == {
        *(f"{stem}.u8", f"{stem}.npy", ".val-new.u8.host-1-2.tmp", "train-0123456789abcdef.u8", "digests-0.npz")
    }
    assert build_pixels(second, folder, 1, lambda done, total: None) == 0


@pytest.mark.parametrize("where", ["memory", "off"])
def test_job_prints_once_where_the_store_is_and_each_time_what_was_ignored(
    tiny_root, tmp_path, one_process, capsys, where
):
    root = tmp_path / "set"
    shutil.copytree(tiny_root, root)
    (root / "val/notes.txt").write_text("")
    source = DataConfig(data=str(root), pixels=where)
    open_data(source, one_process)
    printed = capsys.readouterr().out
    assert re.search(rf" wrote (decoded images|sizes of the images) to {root}/.kd_dist: [\d.]+ MB", printed)
    assert printed.count("ignored 1 file: .txt 1\n") == 1
    open_data(source, one_process)
    printed = capsys.readouterr().out
    assert "wrote" not in printed and "ignored 1 file" in printed


def test_store_of_an_earlier_state_stays_while_it_is_mapped_and_in_a_shared_folder(tiny_root, tmp_path):
    folder, first, second = _states(tiny_root, tmp_path, ".kd_dist")
    mapped = open_pixels(first, folder)
    build(second, folder)
    assert len(list(folder.glob("val-*"))) == 4
    del mapped
    build(second, folder)
    assert len(list(folder.glob("val-*"))) == 2
    shared, _, second = _states(tiny_root, tmp_path / "other", "shared")
    build(second, shared)
    assert len(list(shared.glob("val-*"))) == 4


def test_stale_store_that_cannot_be_deleted_is_no_error(tiny_root, tmp_path, monkeypatch):
    folder, first, second = _states(tiny_root, tmp_path, ".kd_dist")

    def refuse(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(type(folder), "unlink", refuse)
    build(second, folder)
    assert open_pixels(first, folder) and open_pixels(second, folder)


def test_broken_image_is_named_and_leaves_nothing(tiny, tiny_root, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "store"
    shutil.copytree(tiny_root, root)
    victim = root / tiny.val.paths[5]
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(UserError, match=str(tiny.val.paths[5])):
        build(scan(root).val, folder)
    assert list(folder.iterdir()) == []


def test_folder_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="pixels-dir") as caught:
        build(tiny.val, tmp_path / "file" / "store")
    assert str(tmp_path / "file" / "store") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_full_disk_is_said(tiny, tmp_path, monkeypatch):
    def write_to_full_disk(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pixels, "write_atomically", write_to_full_disk)
    with pytest.raises(UserError, match=r"disk is full.*--pixels-dir"):
        build(tiny.val, tmp_path)


def test_writing_to_a_image_does_not_reach_the_store(tiny, tmp_path):
    """All ranks of a node map the same file."""
    build(tiny.val, tmp_path)
    open_pixels(tiny.val, tmp_path)[0].zero_()
    assert_holds(open_pixels(tiny.val, tmp_path), tiny.val)


def test_default_folder_is_in_the_data_or_else_the_users_cache(tmp_path, monkeypatch):
    assert default_folder(tmp_path).parent == tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert str(default_folder(tmp_path)).startswith("/somewhere/cache/")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert str(default_folder(tmp_path)).startswith("/home/user/.cache/")


def test_two_nodes_may_build_the_same_store_at_once(tiny, tmp_path, monkeypatch):
    """On a disk that nodes share, the builders may even have the same process id, as in containers."""
    begun = []
    monkeypatch.setattr(socket, "gethostname", lambda: f"node{len(begun)}")

    def decode_while_the_other_node_builds(path):
        if not begun:
            begun.append(path)
            build(tiny.val, tmp_path)
        return decode(path)

    monkeypatch.setattr(pixels, "decode", decode_while_the_other_node_builds)
    build(tiny.val, tmp_path)
    assert begun
    assert_holds(open_pixels(tiny.val, tmp_path), tiny.val)
