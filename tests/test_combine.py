"""Means of caches: exact against a direct computation, of the same views only, and honest about what they are."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from kd_dist.cache import BLOCK_SAMPLES, BlockWriter, CachePlan, Header, Table, TeacherRow, open_cache, render_info
from kd_dist.cache.__main__ import main
from kd_dist.cache.combine import combine
from kd_dist.errors import UserError

CLASSES = ("beagle", "dingo", "papillon")
SOFTWARE = "tests"


def table_of(split: str, samples: int, teachers: int) -> Table:
    rng = np.random.default_rng([samples, *split.encode()])
    return Table(
        paths=tuple(f"{split}/{i:04d}.png" for i in range(samples)),
        labels_N=np.arange(samples) % 3,
        bytes_N=np.full(samples, 9),
        sha256_N32=rng.integers(0, 256, (samples, 32), dtype=np.uint8),
        teacher_N=(np.arange(samples) % teachers).astype(np.int16),
        box_NV4=rng.integers(1, 50, (samples, 2, 4)).astype(np.int16),
        flip_NV=rng.integers(0, 2, (samples, 2), dtype=np.uint8),
    )


def write(path, seed: int, teachers=1, change_table=lambda split, table: table, scale=4.0, **facts):
    """A cache of random logits, of as many teachers as asked for, in turn."""
    rows = tuple(TeacherRow(f"{seed}{n}" * 32, f"net{seed}{n}", seed, -1, 64, 0.5) for n in range(teachers))
    usual = {"classes": CLASSES, "dataset": "demo", "image_size": 64, "mean": (0.5,) * 3, "std": (0.2,) * 3, "seed": 7}
    rules = {"renderer": "r/1", "compute_dtype": "float32", "view_rule": "s/1", "crop_scale": (0.35, 1.0)}
    header = Header(**{**usual, **rules, "software": "x", "created": f"2025-01-0{seed}", "teachers": rows, **facts})
    tables = {"train": table_of("train", BLOCK_SAMPLES + 6, teachers), "val": table_of("val", 40, teachers)}
    tables = {split: change_table(split, table) for split, table in tables.items()}
    writer = BlockWriter(path, CachePlan(header, tables))
    for block in writer.plan.blocks:
        rng = np.random.default_rng([seed, block.view, block.start, *block.split.encode()])
        writer.put(block, (scale * rng.normal(size=(len(block), len(header.classes)))).astype(np.float16))
    return open_cache(writer.publish())


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Three caches of the same views; the second has two teachers in turn."""
    folder = tmp_path_factory.mktemp("members")
    return [write(folder / f"{seed}.h5", seed, teachers) for seed, teachers in ((1, 1), (2, 2), (3, 1))]


def rows_of(caches, split: str) -> np.ndarray:
    """Logits of all members, float64 [M, N, V, K]."""
    return np.stack([cache.split(split).logits_NVK for cache in caches]).astype(np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def test_mean_of_logits_is_exact_at_every_temperature(caches, tmp_path):
    combine(caches, tmp_path / "mean.h5", None, SOFTWARE)
    mean = open_cache(tmp_path / "mean.h5")
    assert mean.header.features == () and mean.header.temperature is None and mean.header.created == "2025-01-03"
    for split in ("train", "val"):
        members = rows_of(caches, split)
        assert np.array_equal(mean.split(split).logits_NVK, members.mean(axis=0).astype(np.float16))
        for temperature in (1.0, 2.0, 7.0):
            geometric = np.exp(np.log(softmax(members / temperature)).mean(axis=0))
            expected = geometric / geometric.sum(axis=-1, keepdims=True)
            stored = softmax(mean.split(split).logits_NVK.astype(np.float64) / temperature)
            np.testing.assert_allclose(stored, expected, rtol=0.02, atol=0)
        assert np.array_equal(mean.split(split).box_NV4, caches[0].split(split).box_NV4)


def test_every_row_names_the_mean_and_its_members(caches, tmp_path):
    combine(caches, tmp_path / "mean.h5", None, SOFTWARE)
    mean = open_cache(tmp_path / "mean.h5")
    rows = mean.header.teachers
    assert [row.arch for row in rows[:4]] == ["net10", "net20", "net21", "net30"]
    assert {(row.arch, row.members) for row in rows[4:]} == {
        ("mean of 3: net10, net20, net30", "0 1 3"),
        ("mean of 3: net10, net21, net30", "0 2 3"),
    }
    assert all(row.val_top1 == mean.val_top1 for row in rows[4:])
    for i in (0, 1, 1029):
        members = rows[mean.split("train").teacher_N[i]].member_rows
        assert [rows[member].arch for member in members] == ["net10", f"net2{i % 2}", "net30"]
    assert "mean of 3: net10, net20, net30" in render_info(mean)
    with pytest.raises(UserError, match="is the mean of other caches: extend those"):
        main(["extend", str(mean.path), "--teacher", "x", "--views", "9", "-o", str(tmp_path / "more.h5")])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_of_probabilities_is_theirs_at_its_temperature(caches, tmp_path, temperature):
    combine(caches, tmp_path / "mean.h5", temperature, SOFTWARE)
    mean = open_cache(tmp_path / "mean.h5")
    assert (mean.header.features, mean.header.temperature) == (("one_temperature",), temperature)
    for split in ("train", "val"):
        expected = softmax(rows_of(caches, split) / temperature).mean(axis=0)
        stored = mean.split(split).logits_NVK
        assert np.array_equal(stored, (temperature * np.log(expected)).astype(np.float16))
        np.testing.assert_allclose(softmax(stored.astype(np.float64) / temperature), expected, rtol=0.005)
    assert f"--temperature {temperature:g} only" in render_info(mean)
    mean.check_loss("kl", temperature)
    mean.check_loss("ce", temperature)
    with pytest.raises(UserError, match=f"at temperature {temperature:g}, not 3: use --temperature {temperature:g},"):
        mean.check_loss("kl", 3.0)
    with pytest.raises(UserError, match="--loss mse needs logits; use --loss kl"):
        mean.check_loss("mse", temperature)
    with pytest.raises(UserError, match=r"one_temperature.*combine the caches"):
        combine([mean, caches[0]], tmp_path / "again.h5", None, SOFTWARE)


def test_a_mean_of_very_sure_teachers_is_finite(tmp_path):
    caches = [write(tmp_path / f"{seed}.h5", seed, scale=15_000.0) for seed in (1, 2)]
    combine(caches, tmp_path / "mean.h5", 1.0, SOFTWARE)  # the writer and the reader refuse what is not finite
    assert (open_cache(tmp_path / "mean.h5").split("train").logits_NVK.min()) < -30_000


def test_interrupted_it_goes_on_and_the_bytes_are_the_same(caches, tmp_path, monkeypatch):
    combine(caches, tmp_path / "whole.h5", 2.0, SOFTWARE)
    put, stored = BlockWriter.put, []

    def stop_after_three(self, block, rows):
        if len(stored) == 3:
            raise KeyboardInterrupt
        put(self, block, rows)
        stored.append(block)

    monkeypatch.setattr(BlockWriter, "put", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        combine(caches, tmp_path / "cut.h5", 2.0, SOFTWARE)
    monkeypatch.setattr(BlockWriter, "put", lambda self, block, rows: stored.append(block) or put(self, block, rows))
    combine(caches, tmp_path / "cut.h5", 2.0, SOFTWARE)
    assert len(stored) == len(set(stored)) == 6
    assert (tmp_path / "cut.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_one_teacher_twice_is_no_ensemble(caches, tmp_path):
    """The same file, a copy of it, and a mean that counts the teacher already: told by the weights' digest."""
    copy = shutil.copy(caches[0].path, tmp_path / "copy.h5")
    combine(caches[:2], tmp_path / "mean.h5", None, SOFTWARE)
    digest = caches[0].header.teachers[0].sha256
    for other in (caches[0].path, copy, tmp_path / "mean.h5"):
        arguments = ["combine", str(caches[0].path), str(other), "-o", str(tmp_path / "twice.h5")]
        with pytest.raises(UserError, match=rf"logits of the same teacher \(SHA-256 {digest[:16]}.*different teachers"):
            main(arguments)
    assert not list(tmp_path.glob("twice*"))


def turned(split, table):
    flip_NV = table.flip_NV.copy()
    flip_NV[7, 1] ^= split == "val"
    return replace(table, flip_NV=flip_NV)


def with_another_content(split, table):
    sha256_N32 = table.sha256_N32.copy()
    sha256_N32[3] = 0
    return replace(table, sha256_N32=sha256_N32)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"classes": ("beagle", "dingo", "pug")}, "has papillon as class 2, .*other.h5 has pug: label"),
        ({"renderer": "r/2"}, "has images rendered by r/1, .*other.h5 has r/2: label"),
        ({"change_table": turned}, r"has view/flip \d for view 1 of val/0007.png, .*other.h5 has \d: label"),
        ({"change_table": with_another_content}, r"has SHA-256 \w+ for the content of train/0003.png, .* has 0{64}: "),
    ],
)
def test_other_views_are_refused_with_both_values(caches, tmp_path, facts, message):
    other = write(tmp_path / "other.h5", 4, **facts)
    with pytest.raises(UserError, match=message):
        combine([caches[0], other], tmp_path / "mean.h5", None, SOFTWARE)
    assert not (tmp_path / "mean.h5.shards").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}", "-o", "x.h5"], "needs two caches or more"),
        (["{}", "{}", "-o", "x.h5", "--mean", "probabilities"], "requires --temperature T"),
        (["{}", "{}", "-o", "x.h5", "--temperature", "4"], "omit --temperature"),
        (["{}", "{}", "-o", "x.h5", "--mean", "probabilities", "--temperature", "0"], "0 is not a number above 0"),
    ],
)
def test_wrong_commands_are_refused(caches, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["combine", *(text.format(caches[0].path) for text in arguments)])


def test_the_command_writes_the_same_file(caches, tmp_path, capsys):
    main(["combine", *(str(cache.path) for cache in caches), "-o", str(tmp_path / "mean.h5"), "--mean", "logits"])
    assert "wrote" in capsys.readouterr().out
    with h5py.File(tmp_path / "mean.h5") as file:
        assert file["teachers/members"][()].tolist() == [b"", b"", b"", b"", b"0 1 3", b"0 2 3"]
        assert file["train/teacher"][:2].tolist() == [4, 5]
