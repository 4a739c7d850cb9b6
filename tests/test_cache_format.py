"""The cache file: what goes in comes out, the same plan gives the same bytes, and everything else is refused."""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from kd_dist.cache import (
    BLOCK_SAMPLES,
    BlockWriter,
    CachePlan,
    Header,
    Table,
    TeacherRow,
    assemble,
    open_cache,
    render_info,
    statistics_of,
)
from kd_dist.errors import UserError
from kd_dist.fingerprint import fingerprint_of

REPO = Path(__file__).parents[1]
DOCUMENT = REPO / "docs" / "cache-format.md"
CLASSES = ("beagle", "dingo", "Samoyède")
HEADER = Header(
    classes=CLASSES,
    dataset="demo",
    image_size=64,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    renderer="some-renderer/1",
    compute_dtype="float32",
    view_rule="some-sampler/1",
    crop_scale=(0.35, 1.0),
    seed=7,
    created="2025-01-31T12:00:00Z",
    software="kd_dist on numpy",
    teachers=(
        TeacherRow("ab" * 32, "resnet18", seed=3, fold=-1, image_size=64, val_top1=0.75),
        TeacherRow("cd" * 32, "resnet18-s1", seed=4, fold=1, image_size=64, val_top1=0.5),
    ),
)


def table_of(split: str, samples: int, views: int) -> Table:
    rng = np.random.default_rng([samples, *split.encode()])
    box_NV4 = rng.integers(0, 50, (samples, 99, 4)).astype(np.int16) + np.array([0, 0, 1, 1], np.int16)
    return Table(
        paths=tuple(f"{split}/{CLASSES[i % 3]}/{i:04d}.JPEG" for i in range(samples)),
        labels_N=np.arange(samples) % 3,
        bytes_N=rng.integers(1, 10_000, samples),
        sha256_N32=rng.integers(0, 256, (samples, 32), dtype=np.uint8),
        teacher_N=rng.integers(0, 2, samples).astype(np.int16),
        box_NV4=box_NV4[:, :views],
        flip_NV=rng.integers(0, 2, (samples, 99), dtype=np.uint8)[:, :views],
    )


def tables_of(views: int = 2) -> dict[str, Table]:
    return {"train": table_of("train", BLOCK_SAMPLES + 6, views), "val": table_of("val", 40, views)}


def plan_of(views: int = 2) -> CachePlan:
    return CachePlan(HEADER, tables_of(views))


def logits_of(block, classes: int = 3) -> np.ndarray:
    """What "the teacher" says of a block: a function of the block alone, right more often than by chance."""
    rng = np.random.default_rng([block.view, block.start, *block.split.encode()])
    logits_BK = rng.normal(size=(len(block), classes))
    logits_BK[np.arange(len(block)), np.arange(block.start, block.stop) % 3] += 1
    return logits_BK.astype(np.float16)


def write_cache(target: Path, views: int = 2, **options) -> Path:
    writer = BlockWriter(target, plan_of(views), **options)
    for block in writer.missing():
        writer.put(block, logits_of(block))
    return writer.publish()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A cache that was written in one go; not to be changed."""
    return write_cache(tmp_path_factory.mktemp("reference") / "logits.h5")


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    """A cache of one's own to spoil."""
    for file in (reference, checksum_file(reference)):
        shutil.copy(file, tmp_path)
    return tmp_path / reference.name


def checksum_file(cache: Path) -> Path:
    return cache.with_name(cache.name + ".sha256")


def shards_of(cache: Path) -> Path:
    return cache.with_name(cache.name + ".shards")


def write_checksum(cache: Path) -> None:
    checksum_file(cache).write_text(f"{hashlib.sha256(cache.read_bytes()).hexdigest()}  {cache.name}\n")


def refusal(call, *arguments, **options) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "`."))
    return message


def program(name: str, *arguments: object) -> dict[str, object]:
    """What starts tests/programs/NAME.py in a process of its own, where it may use the helpers of this file."""
    paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
    words = [sys.executable, str(REPO / "tests/programs" / f"{name}.py"), *map(str, arguments)]
    return {"args": words, "env": {**os.environ, "PYTHONPATH": paths}}


def run_program(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(**program(name, *arguments), capture_output=True, text=True, timeout=120)


# ----------------------------------------------------------------------------------------------- what goes in comes out


def test_round_trip(reference):
    cache = open_cache(reference)
    assert cache.header == HEADER
    assert cache.classes == CLASSES
    assert cache.views == 2
    assert cache.digest == hashlib.sha256(reference.read_bytes()).hexdigest()
    for split, table in tables_of().items():
        stored = cache.split(split)
        assert stored.paths == table.paths
        for field in ("labels_N", "bytes_N", "sha256_N32", "teacher_N", "box_NV4", "flip_NV"):
            assert getattr(stored, field).dtype == getattr(table, field).dtype
            np.testing.assert_array_equal(getattr(stored, field), getattr(table, field))
        assert cache.fingerprint(split) == fingerprint_of(table.paths, table.labels_N, table.sha256_N32)
    for block in plan_of().blocks:
        rows = cache.split(block.split).logits_NVK[block.start : block.stop, block.view]
        assert rows.dtype == np.float16
        np.testing.assert_array_equal(rows, logits_of(block))


def test_val_top1_is_that_of_view_0(reference):
    view_0_NK = np.concatenate(
        [logits_of(block) for block in plan_of().blocks if str(block).startswith("val-view00000")]
    )
    expected = (view_0_NK.argmax(axis=1) == np.arange(40) % 3).mean()
    assert open_cache(reference).val_top1 == expected
    with h5py.File(reference) as file:
        assert file.attrs["val_top1"] == expected


def test_blocks_cover_every_row_once():
    tables = tables_of(3)
    seen = {split: np.zeros((len(table), 3), int) for split, table in tables.items()}
    for block in CachePlan(HEADER, tables).blocks:
        assert 0 < len(block) <= BLOCK_SAMPLES
        seen[block.split][block.start : block.stop, block.view] += 1
    assert all((count == 1).all() for count in seen.values())


def test_every_dataset_is_in_one_piece_and_without_a_time(reference):
    def look(name, node):
        assert h5py.h5g.get_objinfo(node.id, b".").mtime == 0, name
        if isinstance(node, h5py.Dataset):
            assert node.chunks is None and node.id.get_offset(), name
            assert node.dtype.kind in "Siuf", name

    with h5py.File(reference) as file:
        file.visititems(look)
        assert file["train/logits"].id.get_offset() % 64 == 0


def test_sha256sum_accepts_the_digest_file(reference):
    done = subprocess.run(
        ["sha256sum", "-c", checksum_file(reference).name], cwd=reference.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "logits.h5: OK\n")


@pytest.mark.skipif(shutil.which("h5ls") is None, reason="h5ls (hdf5-tools) is not installed")
def test_h5ls_reads_it(reference):
    done = subprocess.run(["h5ls", "-r", "-d", reference], capture_output=True, text=True, check=True)
    assert "/train/logits            Dataset {1030, 2, 3}" in done.stdout
    assert '"beagle' in done.stdout
    assert "unable" not in done.stdout + done.stderr


def test_the_package_knows_nothing_of_images_networks_and_the_net():
    """What comes along when it is imported; `__main__` alone reaches for the commands that label."""
    modules = "torch", "PIL", "urllib.request", *(f"kd_dist.{name}" for name in ("dataset", "views", "label", "job"))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, kd_dist.cache; print([n for n in {modules} if n in sys.modules])"],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.stdout == "[]\n", done.stderr
    for path in (REPO / "kd_dist" / "cache").glob("[!_]*.py"):
        imported = set(re.findall(r"^ *(?:from|import) (kd_dist[\w.]*)", path.read_text(), re.MULTILINE))
        foreign = {name for name in imported if not name.startswith("kd_dist.cache")}
        assert foreign <= {"kd_dist.errors", "kd_dist.files", "kd_dist.fingerprint"}, path


# --------------------------------------------------------------------------------------------------------- the document


def test_the_documents_code_reads_a_cache_without_this_package(reference, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    assert "import kd_dist" not in code
    script = tmp_path / "read.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, "-I", script], cwd=reference.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache = open_cache(reference)
    for split in ("train", "val"):
        assert f"{split} {cache.split(split).logits_NVK.shape} {cache.fingerprint(split)}" in done.stdout
    assert f"val top-1 {cache.val_top1:.4f}" in done.stdout


def test_the_document_names_everything_in_the_file(reference):
    text = DOCUMENT.read_text()
    with h5py.File(reference) as file:
        names = [*file.attrs]
        file["train"].visititems(lambda name, node: names.append(name))
        file["teachers"].visit(names.append)
    missing = [name for name in names if f"`{name}`" not in text and f"/{name}`" not in text]
    assert not missing


# ---------------------------------------------------------------------------------------- same plan, same bytes, always


def put_all(writer: BlockWriter, todo) -> None:
    for block in todo:
        writer.put(block, logits_of(block))


def test_bytes_are_the_same_wherever_the_writing_was_cut(reference, tmp_path):
    count = len(plan_of().blocks)
    for cut in range(count + 1):
        target = tmp_path / str(cut) / "logits.h5"
        first = BlockWriter(target, plan_of())
        put_all(first, first.missing()[:cut])
        second = BlockWriter(target, plan_of())
        assert len(second.missing()) == count - cut
        put_all(second, second.missing())
        second.publish()
        assert target.read_bytes() == reference.read_bytes()
        assert sorted(path.name for path in target.parent.iterdir()) == ["logits.h5", "logits.h5.sha256"]


def test_bytes_are_the_same_in_any_order_by_any_number_of_writers(reference, tmp_path):
    writers = [BlockWriter(tmp_path / "logits.h5", plan_of()) for _ in range(2)]
    todo = writers[0].missing()[::-1]
    put_all(writers[1], todo[0::2])
    put_all(writers[0], todo[1::2])
    assert writers[0].publish().read_bytes() == reference.read_bytes()


def test_bytes_follow_the_logits(reference, tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    put_all(writer, writer.missing())
    last = plan_of().blocks[-1]
    writer.put(last, logits_of(last) + np.float16(0.5))
    assert writer.publish().read_bytes() != reference.read_bytes()


def spoil_cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-2])


def spoil_flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def spoil_swap(shard: Path) -> None:
    other = next(
        path for path in shard.parent.glob("*.shard") if path != shard and path.stat().st_size == shard.stat().st_size
    )
    shutil.copy(other, shard)


@pytest.mark.parametrize(
    "spoil", [spoil_cut, spoil_flip, spoil_swap, Path.unlink, lambda shard: shard.write_bytes(b"")]
)
def test_a_damaged_shard_counts_as_missing(spoil, reference, tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    put_all(writer, writer.missing())
    block = plan_of().blocks[2]
    spoil(shards_of(writer.target) / f"{block}.shard")
    assert writer.missing() == [block]
    assert "1 of 6 blocks" in refusal(writer.publish)
    assert not writer.target.exists()
    put_all(writer, [block])
    assert writer.publish().read_bytes() == reference.read_bytes()


def test_a_killed_writer_loses_only_the_block_in_flight(reference, tmp_path):
    target = tmp_path / "logits.h5"
    child = subprocess.Popen(**program("killed_writer", target), stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"in the middle of the fourth\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert "is not finished" in refusal(open_cache, target)
    writer = BlockWriter(target, plan_of())
    assert len(writer.missing()) == 3
    put_all(writer, writer.missing())
    assert writer.publish().read_bytes() == reference.read_bytes()


def test_a_crash_while_publishing_leaves_a_whole_pair_and_can_be_repeated(reference, tmp_path):
    done = run_program("crash_at_every_step", tmp_path / "run" / "logits.h5")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    digest = hashlib.sha256(reference.read_bytes()).hexdigest()
    assert all(line[3:] == [digest, digest] for line in lines)
    assert len(lines) > 8
    assert {line[2] for line in lines} == {"0", "2"}  # before and after the rename
    assert lines[-1][1] == "0"


def test_more_views_later_are_the_same_as_at_once(reference, tmp_path):
    """Whatever this version would sample for the views that exist already."""
    old, plan = open_cache(reference), plan_of(4)
    flip_NV = plan.tables["train"].flip_NV.copy()
    flip_NV[:, :2] ^= 1
    other = {**plan.tables, "train": replace(plan.tables["train"], flip_NV=flip_NV)}
    writer = BlockWriter(tmp_path / "grown.h5", replace(plan, tables=other).beginning_with(old))
    for block in writer.missing():
        if writer.is_known(block):
            writer.take_known(block)
        else:
            writer.put(block, logits_of(block))
    assert writer.publish().read_bytes() == write_cache(tmp_path / "at_once.h5", views=4).read_bytes()


# --------------------------------------------------------------------------------------------------- the writer refuses


def test_an_existing_cache_is_not_overwritten(copy):
    before = copy.read_bytes()
    assert str(copy) in refusal(BlockWriter, copy, plan_of())
    assert copy.read_bytes() == before
    assert not shards_of(copy).exists()


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    put_all(writer, writer.missing())
    writer.target.write_text("precious")
    assert "another process created" in refusal(writer.publish)
    assert writer.target.read_text() == "precious"
    assert writer.missing() == []


def change_label(tables):
    labels_N = tables["train"].labels_N.copy()
    labels_N[5] = 1 - labels_N[5] % 2
    return tables | {"train": replace(tables["train"], labels_N=labels_N)}


@pytest.mark.parametrize(
    ("header", "tables", "named"),
    [
        (replace(HEADER, seed=8), tables_of(), "its seed is 7, here it is 8"),
        (replace(HEADER, created="2026"), tables_of(), "created"),
        (HEADER, tables_of(3), "train: its views is 2, here it is 3"),
        (HEADER, change_label(tables_of()), "train: its checksum"),
    ],
)
def test_blocks_of_another_plan_are_refused(header, tables, named, tmp_path):
    target = tmp_path / "logits.h5"
    first = BlockWriter(target, plan_of())
    put_all(first, first.missing()[:1])
    message = refusal(BlockWriter, target, CachePlan(header, tables))
    assert named in message
    assert str(shards_of(target)) in message
    assert len(BlockWriter(target, plan_of()).missing()) == 5


def test_an_unreadable_plan_is_refused(tmp_path):
    target = tmp_path / "logits.h5"
    BlockWriter(target, plan_of())
    (shards_of(target) / "plan.json").write_text("{")
    assert "its plan.json cannot be read" in refusal(BlockWriter, target, plan_of())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    target = tmp_path / "file" / "logits.h5"
    assert f"{target}.shards cannot be written (Not a directory)" in refusal(BlockWriter, target, plan_of())


def test_blocks_whose_folder_went_away_are_named(tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    block = writer.missing()[0]
    shutil.rmtree(shards_of(writer.target))
    assert "(No such file or directory)" in refusal(writer.put, block, logits_of(block))


def test_publishing_reads_each_shard_once_and_the_file_once(reference, tmp_path, monkeypatch):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    put_all(writer, writer.missing())
    shards, written, hashed = Counter(), Counter(), Counter()
    read_bytes, pwrite, sha256_of = Path.read_bytes, os.pwrite, assemble.sha256_of
    monkeypatch.setattr(Path, "read_bytes", lambda path: shards.update([path.name]) or read_bytes(path))
    monkeypatch.setattr(assemble, "sha256_of", lambda path: hashed.update([path.name]) or sha256_of(path))

    def counted(descriptor, content, offset):
        done = pwrite(descriptor, content, offset)
        written.update(range(offset, offset + done))
        return done

    monkeypatch.setattr(os, "pwrite", counted)
    writer.publish()
    assert shards == {f"{block}.shard": 1 for block in writer.plan.blocks}
    assert hashed == {".logits.h5.tmp": 1}
    assert set(written.values()) == {1}
    rows = sum(len(table) * table.views for table in tables_of().values())
    assert len(written) == rows * (8 + 1 + 6)  # box, flip and three logits
    monkeypatch.undo()
    assert writer.target.read_bytes() == reference.read_bytes()


def test_publish_needs_every_block(tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    put_all(writer, writer.missing()[1:])
    assert "first train-view00000-sample000000000" in refusal(writer.publish)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_logits_beyond_float16_are_refused_by_name(value, tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    block = plan_of().blocks[1]
    logits_BK = logits_of(block).astype(np.float32)
    logits_BK[3:, 2] = value
    with np.errstate(over="ignore"):
        message = refusal(writer.put, block, logits_BK.astype(np.float16))
    assert "train view 0 of sample 1027 (train/dingo/1027.JPEG)" in message
    assert block in writer.missing()


def test_logits_of_another_type_or_shape_are_a_defect(tmp_path):
    writer = BlockWriter(tmp_path / "logits.h5", plan_of())
    block = writer.missing()[0]
    for wrong in (logits_of(block).astype(np.float32), logits_of(block)[:-1], logits_of(block, classes=4)):
        with pytest.raises(ValueError, match="instead of float16"):
            writer.put(block, wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"labels_N": np.full(40, 3)},
        {"teacher_N": np.full(40, 2, np.int16)},
        {"flip_NV": np.full((40, 2), 2, np.uint8)},
        {"box_NV4": np.zeros((40, 2, 4), np.int16)},
        {"bytes_N": np.ones(39, int)},
        {"sha256_N32": np.zeros((40, 32), int)},
        {"paths": ("val/x.JPEG",) * 40},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_table_that_contradicts_itself_is_a_defect(change, tmp_path):
    tables = tables_of()
    tables["val"] = replace(tables["val"], **change)
    with pytest.raises(ValueError, match=r"^val/"):
        BlockWriter(tmp_path / "logits.h5", CachePlan(HEADER, tables))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [5_000, 20_000, 100_000])
def test_a_full_disk_is_one_sentence_and_the_blocks_stay(limit, reference, tmp_path):
    target = tmp_path / "logits.h5"
    assert limit < reference.stat().st_size
    done = run_program("cache_on_a_full_disk", target, limit)
    assert done.returncode == 2, done.stderr
    assert ("all put" in done.stdout) == (limit > 6_200)  # a shard is 32 + 1024 * 3 * 2 bytes
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"no space left on the disk for \S+logits\.h5\S*; .*the same command again: it resumes with the blocks.*", last
    )
    assert [path.name for path in tmp_path.iterdir()] == ["logits.h5.shards"]
    writer = BlockWriter(target, plan_of())
    put_all(writer, writer.missing())
    assert writer.publish().read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("views", [1, 40])
def test_all_the_space_a_cache_needs_is_claimed_beforehand(views, tmp_path, monkeypatch):
    claimed = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: claimed.append(size))
    size = write_cache(tmp_path / "logits.h5", views=views).stat().st_size
    assert size <= claimed[0] <= 2 * size + (1 << 17)


# --------------------------------------------------------------------------------------------------- the reader refuses


def test_a_missing_cache_says_how_to_write_one(tmp_path):
    message = refusal(open_cache, tmp_path / "logits.h5")
    assert "python -m kd_dist.cache write --help" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "is empty"), (b"PK\x03\x04 an archive", "is not an HDF5 file"), (b"\x89HDF", "is not an HDF5 file")],
)
def test_files_that_are_not_hdf5(content, named, tmp_path):
    path = tmp_path / "logits.h5"
    path.write_bytes(content)
    write_checksum(path)
    message = refusal(open_cache, path)
    assert named in message
    assert str(path) in message


def test_a_folder_is_no_cache(tmp_path):
    assert "is a folder: name a file such as" in refusal(open_cache, tmp_path)


def test_a_lost_digest_file_is_no_reason_to_refuse_but_is_told(copy):
    assert open_cache(copy).has_checksum
    checksum_file(copy).unlink()
    assert not open_cache(copy).has_checksum
    with h5py.File(copy, "r+") as file:
        file["train/logits"][0, 1] = file["train/logits"][1, 1]
    assert "the columns of train" in refusal(open_cache, copy)


def test_a_changed_file_is_refused_before_hdf5_sees_it(copy, monkeypatch):
    expected = open_cache(copy).digest
    with open(copy, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    monkeypatch.delattr(h5py, "File")
    message = refusal(open_cache, copy)
    assert expected in message
    assert hashlib.sha256(copy.read_bytes()).hexdigest() in message


def test_a_truncated_file_is_refused(copy):
    os.truncate(copy, copy.stat().st_size // 2)
    assert "SHA-256" in refusal(open_cache, copy)
    write_checksum(copy)
    assert "is damaged" in refusal(open_cache, copy)


def test_a_digest_file_without_a_digest(copy):
    checksum_file(copy).write_bytes(b"\xff\xfe nonsense\n")
    assert "has no SHA-256" in refusal(open_cache, copy)


@contextmanager
def edited(path: Path):
    """Change a cache with h5py; its digest file is made to match, so only the checks behind the digest can object."""
    with h5py.File(path, "r+") as file:
        yield file
    write_checksum(path)


def remake(file: h5py.File, name: str, data: np.ndarray, **options) -> None:
    del file[name]
    file.create_dataset(name, data=data, **options)


def set_value(name: str, index, value):
    def edit(file):
        file[name][index] = value

    return edit


def set_attribute(name: str, value):
    def edit(file):
        file.attrs[name] = value

    return edit


def cast(name: str, dtype):
    return lambda file: remake(file, name, file[name][()].astype(dtype))


def cut(name: str, rows: int):
    return lambda file: remake(file, name, file[name][:rows])


def drop(name: str):
    def edit(file):
        del file[name]

    return edit


def drop_attribute(name: str):
    def edit(file):
        del file.attrs[name]

    return edit


def relink(name: str, link):
    def edit(file):
        if name in file:
            del file[name]
        file[name] = link

    return edit


def make_virtual(file):
    layout = h5py.VirtualLayout(shape=(40,), dtype="i8")
    layout[:] = h5py.VirtualSource("/etc/hostname", "label", shape=(40,))
    del file["val/label"]
    file.create_virtual_dataset("val/label", layout)


def make_external(file):
    remake(file, "val/label", np.zeros(40, "i8"), external=[("/etc/hostname", 0, 320)])


def make_hollow(file):
    del file["val/path"]
    file.create_dataset("val/path", (1 << 40,), "S4000")


def make_unallocated(file):
    del file["val/label"]
    file.create_dataset("val/label", (40,), "i8")


def make_vlen_text(file):
    file.attrs["renderer"] = "variable length"


def make_group(file):
    del file["val/label"]
    file.create_group("val/label")


def make_dataset_of_group(file):
    del file["val/view"]
    file["val/view"] = np.zeros(3)


def shuffle_labels(file):
    file["val/label"][...] = np.roll(file["val/label"], 1)


def shuffle_rows(file):
    file["val/logits"][...] = np.roll(file["val/logits"], 1, axis=0)


def unicode_garbage(file):
    texts = file["classes"][()].astype("S4")
    texts[0] = b"\xff\xfe"
    remake(file, "classes", texts)


REFUSALS = {
    "another program's file": (drop_attribute("format"), "not a cache of soft labels"),
    "another format": (set_attribute("format", np.bytes_("other")), "not a cache of soft labels"),
    "a later version": (set_attribute("version", 3), "has format version 3, but this kd_dist reads 2: update kd_dist"),
    "version 1": (
        set_attribute("version", 1),
        "has format version 1, but this kd_dist reads 2: rewrite it: see `python -m kd_dist.cache write --help`",
    ),
    "unknown features": (
        set_attribute("required_features", np.array([b"zoom", b"colours"])),
        "uses colours, zoom, unknown to this kd_dist: update kd_dist",
    ),
    "no list of features": (drop_attribute("required_features"), "required_features is missing"),
    "half-written": (set_attribute("complete", np.uint8(0)), "is half-written: run the command"),
    "an attribute missing": (drop_attribute("renderer"), "the attribute renderer is missing"),
    "an attribute of another type": (
        set_attribute("seed", 1.5),
        "the attribute seed is of type float64 instead of int64",
    ),
    "an attribute of another shape": (set_attribute("mean", np.zeros(4)), r"the attribute mean has shape \[4\]"),
    "variable-length text": (make_vlen_text, "renderer is of type object instead of fixed-length text"),
    "a deviation of zero": (set_attribute("std", np.zeros(3)), r"std \(0.0, 0.0, 0.0\)"),
    "an image of no size": (set_attribute("image_size", 0), "image_size is 0"),
    "a column missing": (drop("train/bytes"), "train/bytes is missing"),
    "a split missing": (drop("val"), "val is missing"),
    "a group for a dataset": (make_group, "val/label is not a dataset"),
    "a dataset for a group": (make_dataset_of_group, "val/view is not a group"),
    "a soft link": (relink("val/label", h5py.SoftLink("/train/label")), "label in val is a link"),
    "an external link": (relink("val/logits", h5py.ExternalLink("/etc/hostname", "x")), "logits in val is a link"),
    "a split from elsewhere": (relink("val", h5py.ExternalLink("other.h5", "val")), "val in / is a link"),
    "a link beside the columns": (relink("train/view/extra", h5py.SoftLink("/")), "extra in train/view is a link"),
    "a virtual dataset": (make_virtual, "val/label is not stored in one piece of this file"),
    "external storage": (make_external, "val/label is not stored in one piece of this file"),
    "a shape beyond the file": (make_hollow, "declares 4398046511104000 bytes that the file does not hold"),
    "values that are not there": (make_unallocated, "declares 320 bytes that the file does not hold"),
    "chunks": (
        lambda file: remake(file, "val/label", file["val/label"][()], chunks=(8,)),
        "val/label is not stored in one piece of this file",
    ),
    "a filter": (
        lambda file: remake(file, "val/logits", file["val/logits"][()], compression="gzip"),
        "val/logits is not stored in one piece of this file",
    ),
    "no area for crops": (set_attribute("crop_scale", np.array([0.5, 0.25])), r"crop_scale is \(0.5, 0.25\)"),
    "a share of mixed views without the feature": (set_attribute("mixed_share", 0.5), "mixed_share is 0.5"),
    "logits of another type": (cast("val/logits", "f4"), "val/logits is of type float32 instead of float16"),
    "labels of another type": (cast("val/label", "i4"), "val/label is of type int32 instead of int64"),
    "big-endian labels": (cast("val/label", ">i8"), "val/label is of type >i8"),
    "a column too short": (cut("val/label", 39), r"val/label has shape \[39\]"),
    "logits too short": (cut("train/logits", 1000), r"train/logits has shape \[1000, 2, 3\]"),
    "teachers of several lengths": (cut("teachers/seed", 1), r"teachers/seed has shape \[1\]"),
    "fewer classes": (cut("classes", 2), r"train/logits has shape"),
    "a class twice": (set_value("classes", 1, b"beagle"), "3 classes have 2 names"),
    "text that is not UTF-8": (unicode_garbage, "is damaged"),
    "a label out of range": (set_value("train/label", 17, 3), "train/label of row 17 is 3"),
    "a negative label": (set_value("val/label", 4, -1), "val/label of row 4 is -1"),
    "a teacher out of range": (set_value("val/teacher", 0, 2), "val/teacher of row 0 is 2"),
    "a teacher better than perfect": (set_value("teachers/val_top1", 0, 1.5), "val_top1 of a teacher is 1.5"),
    "an empty box": (set_value("train/view/box", (9, 1, 2), 0), "train/view/box of row 9 is"),
    "a box beside the image": (set_value("train/view/box", (8, 0, 1), -1), "train/view/box of row 8 is"),
    "a flip of 2": (set_value("val/view/flip", (7, 1), 2), r"val/view/flip of row 7 is \[\d, 2\]"),
    "a path twice": (set_value("val/path", 1, b"val/beagle/0000.JPEG"), "val/path holds a path twice"),
    "NaN": (set_value("train/logits", (1029, 1, 0), np.nan), "train/logits of row 1029 are not all finite"),
    "infinity": (set_value("val/logits", (3, 0, 2), -np.inf), "val/logits of row 3 are not all finite"),
    "another val top-1": (set_attribute("val_top1", 0.25), "stored as 0.250000"),
    "shuffled labels": (shuffle_labels, "logits and labels do not belong together"),
    "shuffled rows": (shuffle_rows, "logits and labels do not belong together"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case, copy):
    edit, named = REFUSALS[case]
    with edited(copy) as file:
        edit(file)
    message = refusal(open_cache, copy)
    assert re.search(named, message), message
    assert str(copy) in message


def test_the_edits_above_are_what_is_refused(copy):
    with edited(copy) as file:
        remake(file, "val/label", file["val/label"][()])
        set_attribute("anything", "that a later writer adds")(file)
        file["val/extra"] = np.zeros(3)
    assert open_cache(copy).header == HEADER


def test_a_cache_that_does_not_fit_in_memory_is_not_called_damaged(copy, monkeypatch):
    def full(*arguments):
        raise MemoryError("Unable to allocate 20 GiB")

    monkeypatch.setattr("kd_dist.cache.reader.check_table", full)
    assert "does not fit in memory (Unable to allocate 20 GiB)" in refusal(open_cache, copy)


def test_a_lock_on_the_file_does_not_keep_readers_out(copy):
    """HDF5 locks files it reads, which fails on network file systems without locks; the digest does that work here."""
    with open(copy, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert open_cache(copy).header == HEADER


def test_a_flipped_bit_in_the_rows_is_seen_behind_a_matching_digest(copy):
    content = bytearray(copy.read_bytes())
    rows = open_cache(copy).split("train").logits_NVK[:BLOCK_SAMPLES].tobytes()
    content[content.index(rows) + 100] ^= 1
    copy.write_bytes(content)
    write_checksum(copy)
    assert "is damaged" in refusal(open_cache, copy)


def test_no_damage_gives_anything_but_a_refusal(reference, tmp_path):
    """Bytes changed and files cut all over, with the digest made to match: no traceback, no crash, no hang."""
    done = run_program("damaged_caches", reference, tmp_path / "logits.h5")
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, (last, done.stderr)
    opened, refused = map(int, re.findall(r"\d+", last[0]))
    assert opened > 15  # bytes that HDF5 leaves unused, or values that could have been so
    assert refused > 50


# -------------------------------------------------------------------------------------------------------- fits the data


def data_like(tables: dict[str, Table]) -> dict[str, SimpleNamespace]:
    fields = ("paths", "labels_N", "sha256_N32")
    return {
        split: SimpleNamespace(**{field: getattr(table, field) for field in fields}) for split, table in tables.items()
    }


def test_a_cache_fits_its_own_data(reference):
    open_cache(reference).check_fits("demo", list(CLASSES), data_like(tables_of()))


def with_val(**changes) -> dict[str, SimpleNamespace]:
    data = data_like(tables_of())
    vars(data["val"]).update(changes)
    return data


def swapped(values, first: int, second: int):
    order = np.arange(len(values))
    order[[first, second]] = second, first
    return values[order] if isinstance(values, np.ndarray) else tuple(values[i] for i in order)


VAL = tables_of()["val"]
MISFITS = {
    "class count": (CLASSES[:2], with_val(), "has 3 classes, but other has 2:"),
    "class name": (("beagle", "husky", "Samoyède"), with_val(), "has dingo as class 1, but other has husky:"),
    "image count": (CLASSES, with_val(paths=VAL.paths[:39]), "has 40 val images, but other has 39:"),
    "order": (
        CLASSES,
        with_val(paths=swapped(VAL.paths, 4, 7)),
        "has val/dingo/0004.JPEG as val image 4, but other has val/dingo/0007.JPEG:",
    ),
    "label": (
        CLASSES,
        with_val(labels_N=swapped(VAL.labels_N, 3, 5)),
        "has label 0 for val/beagle/0003.JPEG, but other has label 2:",
    ),
    "content": (
        CLASSES,
        with_val(sha256_N32=swapped(VAL.sha256_N32, 6, 9)),
        f"has SHA-256 {VAL.sha256_N32[6].tobytes().hex()} for the content of val/beagle/0006.JPEG, "
        f"but other has {VAL.sha256_N32[9].tobytes().hex()}:",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_other_data_are_refused_with_both_values(case, reference):
    classes, data, named = MISFITS[case]
    message = refusal(open_cache(reference).check_fits, "other", classes, data)
    assert f"the cache {reference} (of demo) {named}" in message


# ------------------------------------------------------------------------------------------------------------- the card


def logits_for(probabilities) -> np.ndarray:
    return np.log(np.asarray(probabilities, np.float64))


def test_label_statistics_by_hand():
    """Two samples, two classes, an evaluation view and two drawn ones; figures worked out from the probabilities."""
    p_NVK = np.array([[[0.9, 0.1], [0.75, 0.25], [0.25, 0.75]], [[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]])
    found = statistics_of(logits_for(p_NVK), np.array([0, 1]))
    assert found.top1 == 0.5
    assert found.top1_drawn == 0.5  # 0.75 of the right class, 0.25, a draw that goes to class 0, 0.9
    h = {0.25: 0.5623351446, 0.5: 0.6931471806, 0.1: 0.3250829734}  # entropy of (p, 1 - p) in nats
    entropy = (2 * h[0.25] + h[0.5] + h[0.1]) / 4
    assert found.entropy == pytest.approx(entropy)
    assert found.entropy_share == pytest.approx(entropy / 0.6931471806)
    assert found.label_probability == pytest.approx((0.75 + 0.25 + 0.5 + 0.9) / 4)
    assert found.max_probability == pytest.approx((0.75 + 0.75 + 0.5 + 0.9) / 4)
    assert found.nll == pytest.approx((0.2876820725 + 1.3862943611 + 0.6931471806 + 0.1053605157) / 4)
    # Bins: both 0.75 together (one of two right), 0.5 alone (wrong), 0.9 alone (right).
    assert found.calibration_error == pytest.approx((2 * abs(0.5 - 0.75) + 0.5 + 0.1) / 4)
    assert found.near_one_hot == 0
    assert found.warning is None
    assert found.spread == pytest.approx((0.25 + 0.2) / 2)  # half the distance of each pair
    # Means of the drawn views: (0.5, 0.5) and (0.3, 0.7).
    first = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    second = (0.5 * np.log(0.5 / 0.3) + 0.5 * np.log(0.5 / 0.7) + 0.1 * np.log(0.1 / 0.3) + 0.9 * np.log(0.9 / 0.7)) / 2
    assert found.divergence == pytest.approx((first + second) / 2)


def test_calibration_error_by_hand():
    confidence_R = np.array([0.95, 0.96, 0.30, 0.32, 1.0])  # bins 15, 15, 5, 5 and 15 of ((m - 1) / 15, m / 15]
    hit_R = np.array([True, False, False, True, True])
    expected = (abs((0.95 + 0.96 + 1.0) - 2) + abs((0.30 + 0.32) - 1)) / 5
    assert calibration_error(confidence_R, hit_R) == pytest.approx(expected)
    assert calibration_error(np.array([1.0]), np.array([True])) == 0


def calibration_error(confidence_R: np.ndarray, hit_R: np.ndarray) -> float:
    """Of rows that give this much to class 0 and the rest to four others alike."""
    probabilities_RK = np.stack([confidence_R, *np.repeat((1 - confidence_R)[None] / 4, 4, axis=0)], axis=1)
    logits_R1K = np.log(np.maximum(probabilities_RK, 1e-30))[:, None]
    return statistics_of(logits_R1K, np.where(hit_R, 0, 1)).calibration_error


def test_calibration_bins_end_on_their_upper_edge():
    """1/3 = 5/15 lies in bin 5 with 0.3, not in bin 6 with 0.35: apart their errors add up, together they cancel."""
    edge, hit_R = np.float64(1 / 3), np.array([True, False])
    together = abs((edge - 1) + 0.3) / 2
    assert calibration_error(np.array([edge, 0.3]), hit_R) == pytest.approx(together)
    assert calibration_error(np.array([edge, 0.35]), hit_R) == pytest.approx((abs(edge - 1) + 0.35) / 2)


def test_a_statistics_of_one_view_describes_that_view():
    found = statistics_of(logits_for([[[0.25, 0.75]], [[0.25, 0.75]]]).astype(np.float16), np.array([1, 0]))
    assert found.top1 == 0.5
    assert found.max_probability == pytest.approx(0.75, abs=1e-3)
    assert (found.top1_drawn, found.spread, found.divergence) == (None, None, None)


def test_large_logits_do_not_overflow():
    logits_NVK = np.array([[[60_000, -60_000], [0, 0], [-60_000, 60_000]]], np.float16)
    found = statistics_of(logits_NVK, np.array([0]))
    assert np.isfinite([found.entropy, found.nll, found.divergence]).all()


def test_nearly_one_hot_labels_are_warned_about():
    sharp, soft = [0.995, 0.005], [0.98, 0.02]
    mostly = statistics_of(logits_for([[sharp]] * 3 + [[soft]] * 2), np.zeros(5, int))
    assert mostly.near_one_hot == 0.6
    assert re.search(
        r"60% of the soft labels .* 0\.99 .*50%.*--temperature.*--mixup.*--label-smoothing.*out-of-fold", mostly.warning
    )
    assert statistics_of(logits_for([[sharp], [soft]]), np.zeros(2, int)).warning is None


def test_info_is_one_screen(reference):
    cache = open_cache(reference)
    text = render_info(replace(cache, path=Path(os.path.relpath(reference))))
    lines = text.splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 100
    assert f"{cache.val_top1:.2%}" in next(line for line in lines if line.startswith("top-1, evaluation"))
    for shown in (
        cache.digest,
        "1,030 images x 2 views",
        "resnet18-s1 without fold 1 of train",
        "sha256 cdcdcdcdcdcd",
        "beagle, dingo, Samoyède",
        "some-sampler/1",
    ):
        assert shown in text
    many = replace(cache, header=replace(HEADER, teachers=HEADER.teachers * 5, classes=tuple("abcdefghijklm" * 20)))
    crowded = render_info(many).splitlines()
    assert "further teachers: 7" in "\n".join(crowded)
    assert len(crowded) <= 28


def test_info_ends_with_the_warning(reference):
    cache = open_cache(reference)
    train = cache.split("train")
    sharp = replace(train, logits_NVK=train.logits_NVK * np.float16(100))
    text = render_info(replace(cache, splits={"train": sharp, "val": cache.split("val")}))
    assert "warning: " in text
    assert max(len(line) for line in text.splitlines()[2:]) <= 100
