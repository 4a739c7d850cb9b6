"""Hugging Face image sets: converted once into a folder of the same images, from Parquet files of `datasets`."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_dist import dataset, teacher
from kd_dist.data import huggingface
from kd_dist.data.generated import draw
from kd_dist.data.releases import locate
from kd_dist.data.scan import scan
from kd_dist.errors import UserError
from launch import plans
from tests.entries import call

datasets = pytest.importorskip("datasets")
CLASSES = ["10 apples", "2/3 pear", ".hidden"]  # in an order that is not the alphabet's, with names no folder can have
FOLDERS = ("10 apples", "2_3 pear", "_.hidden")


def picture(number: int, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(draw(np.random.default_rng(number), number % 3, 3)).save(content, kind)
    return content.getvalue()


def rows(count: int, first: int = 0) -> dict[str, list]:
    """Images of three classes in turn; each third is a PNG."""
    contents = [picture(first + i, "PNG" if i % 3 == 2 else "JPEG") for i in range(count)]
    return {"picture": [{"bytes": each, "path": None} for each in contents], "kind": [i % 3 for i in range(count)]}


FEATURES = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)}


def write(folder: Path, features=FEATURES, **splits) -> Path:
    """A folder of Parquet files as the hub has them; each split's columns are given."""
    (folder / "data").mkdir(parents=True)
    for name, columns in splits.items():
        split = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
        split.to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, for sets to be put into its data/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parquet(place: Path) -> Path:
    return write(place / "fruit", train=rows(12), validation=rows(6, first=100))


def test_parquet_files_become_a_folder_of_the_same_images(parquet: Path, place: Path):
    found = scan(locate(Path(f"hf:{parquet}"), explicit=True))
    assert found.classes == FOLDERS and found.layout == "class folders in train/ and validation/"
    assert (len(found.train), len(found.val)) == (12, 6)
    (folder,) = (place / "data").glob("fruit-*")
    written = rows(12)["picture"]
    for path in found.train.paths:
        index = int(Path(path).stem)
        assert (folder / path).read_bytes() == written[index]["bytes"]
        assert path.startswith(f"train/{FOLDERS[index % 3]}/") and path.endswith(".png" if index % 3 == 2 else ".jpg")


@pytest.mark.parametrize("typed", ["fruit", "hf:fruit", "hf:./fruit"])
def test_folder_goes_with_or_without_the_prefix_and_is_converted_once(parquet: Path, monkeypatch, typed: str):
    first = locate(Path(typed), explicit=True)
    monkeypatch.setattr(huggingface, "_convert", lambda *_: pytest.fail("converted again"))
    assert locate(Path(f"hf:{parquet}"), explicit=True) == first == Path("data") / first.name


def test_other_parquet_files_are_another_set(parquet: Path):
    before = locate(Path("fruit"), explicit=True)
    train = datasets.Dataset.from_dict(rows(9), features=datasets.Features(FEATURES))
    train.to_parquet(parquet / "data/train-00000-of-00001.parquet")
    after = locate(Path("fruit"), explicit=True)
    assert after != before and (len(scan(before).train), len(scan(after).train)) == (12, 9)


def test_name_of_the_hub_goes_through_load_dataset(parquet: Path, monkeypatch):
    asked, original = [], datasets.load_dataset

    def from_here(name, **options):
        asked.append(name)
        return original(str(parquet), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_here)
    found = [locate(Path("hf:someone/fruit-2"), explicit=True) for _ in range(2)]
    assert found == [Path("data/someone--fruit-2")] * 2 and asked == ["someone/fruit-2"]


def test_train_alone_is_split_by_share_and_needs_one(place: Path):
    write(place / "fruit", train=rows(60))
    found = scan(locate(Path("hf:fruit"), explicit=True, val_share=0.3), val_share=0.3)
    assert found.layout == "class folders in train/, --val-share 0.3"
    with pytest.raises(UserError, match="has train but no val"):
        scan(locate(Path("hf:fruit"), explicit=True))


def test_test_is_val_if_it_has_labels_and_nothing_else_is(place: Path):
    write(place / "a", train=rows(6), test=rows(6, first=9))
    write(place / "b", train=rows(6), test=rows(6, first=9) | {"kind": [-1] * 6})
    write(place / "c", train=rows(6), test=rows(6, first=9), validation=rows(3, first=20))
    assert len(scan(locate(Path("hf:a"), explicit=True)).val) == 6
    assert {path.name for path in locate(Path("hf:b"), explicit=True).iterdir()} == {"train"}
    assert len(scan(locate(Path("hf:c"), explicit=True)).val) == 3


def test_plain_columns_are_known_by_their_usual_names(place: Path):
    columns = {"img": rows(6)["picture"], "label": ["b", "a"] * 3, "more": [0] * 6}
    write(place / "plain", None, train=columns, test=columns)
    assert scan(locate(Path("hf:plain"), explicit=True)).classes == ("a", "b")


def _broken(what: str, folder: Path) -> Path:
    more, features, columns = {}, dict(FEATURES), rows(6)
    if what == "no train":
        return write(folder, test=columns)
    if what == "no images":
        features, columns = {"kind": features["kind"]}, {"kind": columns["kind"]}
    elif what == "no labels":
        features, columns = {"picture": features["picture"]}, {"picture": columns["picture"]}
    elif what == "a label is missing":
        columns["kind"][4] = -1
    elif what == "an image is missing":
        columns["picture"][4] = None
    elif what == "an image is broken":
        columns["picture"][4] = {"bytes": b"not an image", "path": None}
    elif what == "classes clash":
        features["kind"] = datasets.ClassLabel(names=["a/b", "a_b", "c"])
    elif what == "no parquet":
        folder.mkdir()
        return folder
    write(folder, features, train=columns, **more)
    if what == "cut short":
        path = next(folder.rglob("*.parquet"))
        path.write_bytes(path.read_bytes()[:-40])
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no train", r"hf:.*x has no split train \(its splits: test\)"),
        ("no images", r"split train of hf:.*x has no column of images \(its columns: kind\)"),
        ("no labels", r"split train of hf:.*x has no column of class labels \(its columns: picture\)"),
        ("a label is missing", "row 4 of the split train of hf:.*x has no label"),
        ("an image is missing", "row 4 of the split train of hf:.*x has no image"),
        ("an image is broken", "row 4 of the split train of hf:.*x is no image of a known kind"),
        ("classes clash", "two classes of the split train .* differ only"),
        ("no parquet", r"x holds no \.parquet files"),
        ("cut short", "--data hf:.*x cannot be opened|cannot be read"),
    ],
)
def test_set_that_cannot_be_used_is_one_sentence_and_leaves_nothing(place: Path, what: str, words: str):
    _broken(what, place / "x")
    with pytest.raises(UserError, match=words) as caught:
        locate(Path("hf:x"), explicit=True)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert all(path.suffix == ".lock" for path in place.glob("data/*"))


@pytest.mark.parametrize("name", ["no folder/nor/name", "hf:../up"])
def test_what_is_neither_a_folder_nor_a_name_is_refused(place: Path, name: str):
    with pytest.raises(UserError, match="there is no folder"):
        locate(Path(f"hf:{name}"), explicit=True)


def test_without_the_package_the_extra_is_named(parquet: Path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'missing: datasets; install with `pip install "kd-dist\[hf\]"`'):
        locate(Path("hf:fruit"), explicit=True)


def test_name_that_cannot_be_reached_is_one_sentence(place: Path):
    line = [sys.executable, "-m", "kd_dist.dataset", "--data", "hf:nobody/nothing"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kd_dist.dataset: --data hf:nobody/nothing cannot be opened (")
    assert done.stderr.count("\n") == 1


def test_job_and_command_take_it(parquet: Path, place: Path, capsys):
    small = ["--teacher", "tests.test_own_data:small", "--image-size", 16, "--batch-size", 6, "--epochs", 1]
    call(teacher.main, "--data", "hf:fruit", *small, "--views", 2, "--device", "cpu", "--out", "run")
    assert "--data hf:fruit" in capsys.readouterr().out.splitlines()[-1]
    assert dataset.main(["--data", "hf:fruit"]) == 0
    assert "class folders in train/ and validation/" in capsys.readouterr().out


def test_launcher_leaves_names_as_they_are(parquet: Path, place: Path):
    assert plans._absolute("hf:someone/fruit") == "hf:someone/fruit"
    assert plans._absolute("hf:fruit") == f"hf:{parquet}"
