"""A cache as a folder to publish: other programs read it, it says what it is, and it gives back the cache."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import mlcroissant
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kd_dist import label, version
from kd_dist.cache import BLOCK_SAMPLES, BlockWriter, CachePlan, open_cache
from kd_dist.cache.__main__ import main
from kd_dist.cache.format import UNLABELLED_IMAGES
from kd_dist.cache.statistics import top1_by_class
from kd_dist.errors import UserError
from kd_dist.fingerprint import UNKNOWN
from kd_dist.publish.folder import Statement, export, restore
from tests.ranks import run_command
from tests.test_cache_format import HEADER, logits_of, plan_of, tables_of
from tests.test_exactness import open_tiny, small_teacher

FILES = {"README.md", "croissant.json", "labels.json", "data/train.parquet", "data/val.parquet"}
SAID = Statement("cc-by-4.0", "mit", "https://example.org/images", "research on distillation", "A. Person")
KINDS = ("plain", "top_k", "mixed", "uneven", "unlabelled")


def plan_of_kind(kind: str, tiny_root: Path) -> CachePlan:
    if kind == "top_k":
        return plan_of().keeping_top(2)
    if kind == "mixed":
        data = open_tiny(tiny_root)
        teacher = small_teacher(data.samples.classes)
        return label.plan([teacher], data, label.ViewRule(5, (0.4, 1.0), 5, 0.5), "float32")
    if kind == "uneven":  # fewer views of val than of train
        return CachePlan(HEADER, tables_of(3) | {"val": tables_of(1)["val"]})
    if kind == "unlabelled":
        tables = tables_of()
        labels_N = tables["train"].labels_N.copy()
        labels_N[-9:] = UNKNOWN
        tables["train"] = replace(tables["train"], labels_N=labels_N)
        return CachePlan(replace(HEADER, features=(UNLABELLED_IMAGES,)), tables)
    return plan_of()


def written(target: Path, plan: CachePlan) -> Path:
    writer = BlockWriter(target, plan)
    for block in writer.missing():
        writer.put(block, logits_of(block))
    return writer.publish()


@pytest.fixture(scope="module", params=KINDS)
def published(request, generated_root, tmp_path_factory):
    """(cache, folder) of each kind of cache."""
    root = shutil.copytree(generated_root, tmp_path_factory.mktemp("published") / "set")
    cache = open_cache(written(root.parent / "logits.h5", plan_of_kind(request.param, root)))
    export(cache, root.parent / "labels", SAID)
    return cache, root.parent / "labels"


@pytest.fixture(scope="module")
def unsaid(tmp_path_factory):
    """A cache and its folder of which nothing was said; not to be changed."""
    root = tmp_path_factory.mktemp("unsaid")
    export(open_cache(written(root / "logits.h5", plan_of())), root / "labels", Statement())
    return root


@pytest.fixture
def plain(unsaid, tmp_path):
    """A folder of one's own to spoil."""
    return shutil.copytree(unsaid, tmp_path, dirs_exist_ok=True) / "labels"


def test_it_gives_back_the_cache_to_the_byte(published, tmp_path):
    cache, folder = published
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    assert restore(folder, tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == cache.path.read_bytes()
    assert open_cache(tmp_path / "again.h5").has_checksum


def test_datasets_streams_it(published):
    cache, folder = published
    streams = datasets.load_dataset(str(folder), streaming=True)
    assert set(streams) == {"train", "val"}
    for split, stream in streams.items():
        table = cache.split(split)
        assert stream.features["label"].names == list(cache.classes)
        assert pq.read_metadata(folder / f"data/{split}.parquet").num_rows == len(table)
        for row, found in enumerate(stream.take(20)):
            assert found["path"] == table.paths[row] and found["label"] == table.labels_N[row]
            assert found["sha256"] == table.sha256_N32[row].tobytes().hex()
            assert np.array_equal(found["boxes"], table.box_NV4[row]) and np.array_equal(
                found["flips"], table.flip_NV[row]
            )
            own = table.logit_columns[-1][row]
            assert np.array_equal(np.float16(found["top_tail" if cache.header.top_k else "logits"]), own)


def test_mlcroissant_accepts_it_and_reads_it(published):
    cache, folder = published
    found = mlcroissant.Dataset(jsonld=folder / "croissant.json")
    issues = found.metadata.ctx.issues
    assert not issues.errors and not issues.warnings
    assert found.metadata.license == ["cc-by-4.0"] and found.metadata.creators[0].name == "A. Person"
    assert len(found.metadata.machine_annotation_tools) == len(cache.header.teachers)
    for field in ("data_collection", "data_limitations", "data_use_cases", "annotations_per_item"):
        assert getattr(found.metadata, field), field
    row = next(iter(found.records("val")))
    assert row["val/path"].decode() == cache.split("val").paths[0]
    assert {name.removeprefix("val/") for name in row} == set(pq.read_schema(folder / "data/val.parquet").names)


def test_mlcroissant_refuses_a_file_without_what_croissant_asks_for(plain, tmp_path):
    document = json.loads((plain / "croissant.json").read_text())
    del document["distribution"]
    (tmp_path / "croissant.json").write_text(json.dumps(document))
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=tmp_path / "croissant.json")


def test_the_card_says_what_a_set_of_labels_needs(published):
    cache, folder = published
    card = (folder / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(front["license"]) == "cc-by-4.0"
    for words in (
        *("| licence of the teacher | mit |", "https://example.org/images", "research on distillation", "A. Person"),
        *(cache.header.software, cache.digest, version.commit(), cache.header.teachers[0].sha256),
    ):
        assert words in card
    images_K, hits_K = top1_by_class(cache, "val")
    assert hits_K.sum() == round(cache.val_top1 * images_K.sum())
    for name, images, hits in zip(cache.classes, images_K, hits_K, strict=True):
        assert f"| {name} | {images} | {hits / images:.1%} |" in card
    assert (
        str(folder.parent) not in card + (folder / "labels.json").read_text() + (folder / "croissant.json").read_text()
    )


def test_what_nobody_said_is_not_stated(plain):
    card = (plain / "README.md").read_text()
    for fact in ("licence of the labels", "licence of the teacher", "publisher"):
        assert f"| {fact} | not stated |" in card
    assert "source: not stated" in card and 'license: "unknown"' in card
    assert not mlcroissant.Dataset(jsonld=plain / "croissant.json").metadata.ctx.issues.errors


def test_rows_are_written_a_block_at_a_time(plain):
    groups = pq.ParquetFile(plain / "data/train.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [BLOCK_SAMPLES, 6]


def test_nothing_is_written_over(plain):
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        main(["export", str(plain.parent / "logits.h5"), "--to", str(plain)])
    with pytest.raises(UserError, match="already exists: move it away"):
        main(["import", str(plain), "-o", str(plain.parent / "logits.h5")])
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
    assert not list(plain.parent.glob(".*"))


def test_a_killed_export_leaves_nothing_under_the_name(plain, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kd_dist.publish.folder.data_card", full)
    with pytest.raises(UserError, match="no space left"):
        export(open_cache(plain.parent / "logits.h5"), plain.parent / "other", Statement())
    assert sorted(path.name for path in plain.parent.iterdir()) == ["labels", "logits.h5", "logits.h5.sha256"]


def other_byte(folder: Path) -> None:
    path = folder / "data/val.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_value(folder: Path, column: str, change) -> None:
    """Write val again with another value, and its digest into labels.json: the file is whole, its values are not."""
    path, noted = folder / "data/val.parquet", folder / "labels.json"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[3] = change(values[3])
    place = table.schema.get_field_index(column)
    table = table.set_column(place, table.schema.field(place), [pa.array(values, table[column].type)])
    pq.write_table(table.cast(pq.read_schema(path)), path)
    document = json.loads(noted.read_text())
    document["splits"]["val"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    noted.write_text(json.dumps(document))


DAMAGE = {
    "a flipped byte": (other_byte, r"val.parquet has SHA-256"),
    "a missing file": (lambda folder: (folder / "data/train.parquet").unlink(), "train.parquet is missing"),
    "another logit": (
        lambda folder: other_value(folder, "logits", lambda row: row[::-1]),
        "columns of val do not have",
    ),
    "another label": (
        lambda folder: other_value(folder, "label", lambda label: (label + 1) % 3),
        "columns of val do not",
    ),
    "no class": (lambda folder: other_value(folder, "label", lambda label: 7), "val/label of row 3 is 7"),
    "a view too few": (lambda folder: other_value(folder, "flips", lambda row: row[:1]), "different numbers of views"),
    "no JSON": (lambda folder: (folder / "labels.json").write_text("{"), "labels.json cannot be read"),
    "of a later version": (lambda folder: (folder / "labels.json").write_text('{"format": "x"}'), "update kd_dist"),
    "a path that leads out": (
        lambda folder: (folder / "labels.json").write_text(
            (folder / "labels.json").read_text().replace("data/val.parquet", "../val.parquet")
        ),
        "is not data/val.parquet",
    ),
}


def test_verify_accepts_what_was_not(plain, capsys):
    main(["verify", str(plain), "--device", "cpu"])
    said = capsys.readouterr().out
    assert (
        "the Parquet files give back the columns of the exported cache\n" in said
        and "2,140 soft labels, all finite" in said
    )


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_refuses_what_was_changed(name, plain):
    spoil, words = DAMAGE[name]
    spoil(plain)
    with pytest.raises(UserError, match=words) as caught:
        main(["verify", str(plain), "--device", "cpu"])
    assert "\n" not in str(caught.value) and str(plain) in str(caught.value)


def test_verify_computes_the_logits_again_at_two_ranks(tiny_root, tmp_path):
    data = open_tiny(tiny_root)
    teacher = small_teacher(data.samples.classes)
    plan = label.plan([teacher], data, label.ViewRule(3, (0.4, 1.0), 5), "float32")
    writer = BlockWriter(tmp_path / "logits.h5", plan)
    labeller = label.Labeller([teacher], data, plan.header, torch.device("cpu"))
    for block in writer.missing():
        writer.put(block, labeller.block(block, plan.tables[block.split]))
    export(open_cache(writer.publish()), tmp_path / "labels", SAID)
    run = run_command("kd_dist.cache", "verify", tmp_path / "labels", "--data", tiny_root, "--device", "cpu", ranks=2)
    assert "the Parquet files give back the columns" in run.stdout and "images in" in run.stdout


def test_a_folder_in_place_of_a_cache_names_the_command(plain):
    with pytest.raises(UserError, match=r"`python -m kd_dist.cache import .*labels -o FILE`"):
        open_cache(plain)
