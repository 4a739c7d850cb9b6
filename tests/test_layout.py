"""Data of other layouts: names of val, class folders with --val-share, CSV files, and what each refuses."""

import csv
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from kd_dist import dataset
from kd_dist.data import generated
from kd_dist.data.releases import locate
from kd_dist.data.samples import Dataset
from kd_dist.data.scan import default_folder, in_val, scan
from kd_dist.errors import UserError

CLASSES = ("00-disc-coarse", "01-disc-fine", "02-square-coarse")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes with three train images and one val image each."""
    generated.generate(tmp_path / "set", train_per_class=3, val_per_class=1, classes=3)
    return tmp_path / "set"


@pytest.fixture(scope="module")
def flat_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    generated.generate(folder, train_per_class=20, val_per_class=1, classes=3)
    return folder / "train"


@pytest.fixture
def flat(flat_once: Path, tmp_path: Path) -> Path:
    """A folder of three class folders of 20 images."""
    return shutil.copytree(flat_once, tmp_path / "flat")


def refusal(data: Path, **options) -> str:
    """The sentence with which a scan refuses this data."""
    with pytest.raises(UserError) as caught:
        scan(data, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def sides(found: Dataset) -> dict[bytes, str]:
    """The split of each image by its content."""
    return {row.tobytes(): split for split in ("train", "val") for row in found.split(split).sha256_N32}


# -------------------------------------------------------------------------------------------------------- names of val


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_val_may_have_another_name(root: Path, name: str):
    before = scan(root)
    (root / "val").rename(root / name)
    found = scan(root)
    assert found.val.paths[0] == f"{name}/00-disc-coarse/00000.jpg"
    assert np.array_equal(found.val.sha256_N32, before.val.sha256_N32)
    assert found.train.fingerprint == before.train.fingerprint
    assert (found.layout, found.ignored) == (f"class folders in train/ and {name}/", ())
    assert locate(root, explicit=True) == root


def test_test_beside_val_is_left_alone_with_a_note(root: Path):
    before = scan(root)
    shutil.copytree(root / "val", root / "test")
    (root / "test/00-disc-coarse/00000.jpg").write_text("no image")
    found = scan(root)
    assert found.val.fingerprint == before.val.fingerprint
    assert found.ignored == ("test is left alone: scores are on val",)


def test_two_vals_are_refused(root: Path):
    shutil.copytree(root / "val", root / "validation")
    assert "has val and validation: which one is val?" in refusal(root)


def test_train_alone_needs_a_share(root: Path):
    shutil.rmtree(root / "val")
    assert "has train but no val (nor valid, validation, test)" in refusal(root)
    with pytest.raises(UserError, match=r"--val-share 0\.1"):
        scan(locate(root, explicit=True))


# ----------------------------------------------------------------------------------------------------------- val share


def test_share_of_class_folders_becomes_val(flat: Path):
    found = scan(flat, val_share=0.3)
    assert found.classes == CLASSES and len(found.train) + len(found.val) == 60
    assert found.train.paths[0].startswith("00-disc-coarse/")
    assert not set(found.train.paths) & set(found.val.paths)
    for split in (found.train, found.val):
        assert split.paths == tuple(sorted(split.paths))
        assert [CLASSES[label] for label in split.labels_N] == [path.split("/")[0] for path in split.paths]
        assert [split.split in ("train", "val"), len(split.sha256_N32)] == [True, len(split)]
    assert found.layout == "class folders, --val-share 0.3"


def test_the_rule_is_the_documented_one(flat: Path):
    found = scan(flat, val_share=0.3)
    for split in (found.train, found.val):
        numbers = [int.from_bytes(row.tobytes()[-8:], "big") / 2**64 for row in split.sha256_N32]
        assert all((number < 0.3) == (split.split == "val") for number in numbers)


def test_share_is_met_on_many_images():
    sha256_N32 = np.random.default_rng(0).integers(0, 256, (20_000, 32)).astype(np.uint8)
    for share in (0.1, 0.5):
        assert abs(in_val(sha256_N32, share).mean() - share) < 0.01
    first_N = sha256_N32[:, 0] < 128  # by which folds go
    assert abs(in_val(sha256_N32[first_N], 0.1).mean() - 0.1) < 0.015


def test_an_image_keeps_its_side_whatever_else_is_there(flat: Path):
    before = sides(scan(flat, val_share=0.3))
    for number, path in enumerate(sorted(flat.glob("*/*"))):
        if number % 5 == 0:
            path.unlink()
        elif number % 5 == 1:
            path.rename(path.with_name(f"renamed {path.name}"))
    generated.generate(flat.parent / "more", train_per_class=9, val_per_class=1, seed=3, classes=4)
    shutil.copytree(flat.parent / "more/train", flat, dirs_exist_ok=True)
    after = sides(scan(flat, val_share=0.3))
    shared = before.keys() & after.keys()
    assert len(shared) > 30 and len(after) > len(shared)
    assert {digest: before[digest] for digest in shared} == {digest: after[digest] for digest in shared}
    larger = sides(scan(flat, val_share=0.4))
    assert {digest for digest, side in after.items() if side == "val"} <= {
        digest for digest, side in larger.items() if side == "val"
    }


def test_copies_are_on_one_side(flat: Path):
    for path in sorted(flat.glob("00*/*")):
        shutil.copy(path, flat / "01-disc-fine" / f"copy-{path.name}")
    found = scan(flat, val_share=0.3)
    assert len(found.train) + len(found.val) == 80
    assert not {row.tobytes() for row in found.train.sha256_N32} & {row.tobytes() for row in found.val.sha256_N32}


def test_share_is_taken_of_train_where_there_is_no_val(flat: Path, root: Path):
    shutil.rmtree(root / "train")
    shutil.move(flat, root / "train")
    (root / "val").rename(root / "test")
    found = scan(root, val_share=0.3)
    assert found.val.paths[0].startswith("train/00-disc-coarse/")
    assert found.ignored == ("test is left alone: scores are on a fraction of train",)
    assert found.layout == "class folders in train/, --val-share 0.3"


def test_share_of_a_set_that_has_val_is_refused(root: Path):
    assert "--val-share 0.1, but" in refusal(root, val_share=0.1) and "has val already" in refusal(root, val_share=0.1)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_share_out_of_range_is_refused(flat: Path, share: float):
    assert "must lie between 0 and 1" in refusal(flat, val_share=share)


@pytest.mark.parametrize(("share", "side"), [(0.001, "val"), (0.999, "train")])
def test_share_that_leaves_a_class_out_names_one_that_does_not(flat: Path, share: float, side: str):
    sentence = refusal(flat, val_share=share)
    assert f"--val-share {share} leaves {side} no image of the class 0" in sentence
    least = float(sentence.split(": ")[1].split()[0])
    assert set(scan(flat, val_share=least).val.labels_N) == {0, 1, 2}
    refusal(flat, val_share=least - 0.002)


def test_class_with_one_image_cannot_be_split(flat: Path):
    for path in sorted(flat.glob("01*/*"))[1:]:
        path.unlink()
    assert "add images of it, or write the split into a CSV file" in refusal(flat, val_share=0.3)


def test_class_folders_without_a_share_are_refused(flat: Path):
    assert "--val-share 0.1" in refusal(flat)
    with pytest.raises(UserError, match=r"add --val-share 0\.1"):
        locate(flat, explicit=True)


@pytest.mark.parametrize(
    ("spoiled", "words"), [("empty", "holds no images: images are <class>/*"), ("gone", "no folder")]
)
def test_folder_without_classes_is_refused(tmp_path: Path, spoiled: str, words: str):
    if spoiled == "empty":
        (tmp_path / "data").mkdir()
        (tmp_path / "data/loose.jpg").write_bytes(b"")
    sentence = refusal(tmp_path / "data", val_share=0.1)
    assert words in sentence and (spoiled == "gone" or "images outside of a class folder 1" in sentence)


def test_share_without_data_of_the_users_is_refused_before_anything_is_fetched(tmp_path: Path):
    with pytest.raises(UserError, match="pass their folder with --data"):
        locate(tmp_path / "data", explicit=False, val_share=0.1)
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------------------------ CSV file


@pytest.fixture
def listed(root: Path) -> Path:
    """A CSV file in the set's folder that lists the set's images, in a random order."""
    rows = [(path.relative_to(root), path.parts[-2], path.parts[-3]) for path in root.glob("*/*/*.jpg")]
    random.Random(0).shuffle(rows)
    return write_csv(root / "list.csv", rows)


def write_csv(file: Path, rows, header=("path", "label", "split")) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as text:
        csv.writer(text).writerows([header, *rows])
    return file


def rows_of(file: Path) -> list[list[str]]:
    return list(csv.reader(file.read_text().splitlines()))[1:]


def test_csv_lists_the_set_that_the_folders_hold(root: Path, listed: Path):
    folders, found = scan(root), scan(listed)
    assert (found.name, found.root, found.classes) == ("list", root, folders.classes)
    assert (found.train.fingerprint, found.val.fingerprint) == (folders.train.fingerprint, folders.val.fingerprint)
    assert found.layout == "CSV file with 12 images"
    assert default_folder(listed) == default_folder(root)


def test_order_of_lines_and_columns_does_not_matter(root: Path, listed: Path):
    before = scan(listed).train.fingerprint
    rows = [(split, "ignored", f"./{path}", label) for path, label, split in reversed(rows_of(listed))]
    other = write_csv(root / "other.csv", rows, ("split", "more", "path", "label"))
    text = other.read_text()
    other.write_text("\ufeff" + text.replace(",", ", ") + "\n\n", encoding="utf-8")  # as spreadsheets write it
    assert scan(other).train.fingerprint == before


def test_labels_of_a_csv_need_no_folders(root: Path):
    paths = sorted(str(path.relative_to(root.parent)) for path in root.glob("*/*/*.jpg"))
    rows = [
        (f"../{path}", "cat, big" if i % 2 else "dog", "train" if i < 8 else "test") for i, path in enumerate(paths)
    ]
    (root.parent / "lists").mkdir()
    found = scan(write_csv(root.parent / "lists/a.csv", rows))
    assert found.classes == ("cat, big", "dog") and (len(found.train), len(found.val)) == (8, 4)
    assert found.train.paths[0].startswith("../set/")


def test_csv_without_splits_is_split_by_share(flat: Path):
    paths = [path.relative_to(flat) for path in flat.glob("*/*.jpg")]
    listed = write_csv(flat / "list.csv", [(path, path.parts[0]) for path in paths], ("path", "label"))
    found, folders = scan(listed, val_share=0.3), scan(flat, val_share=0.3)
    assert (found.train.fingerprint, found.val.fingerprint) == (folders.train.fingerprint, folders.val.fingerprint)
    assert "lacks the column split" in refusal(listed)


def test_test_lines_beside_val_lines_are_left_alone(root: Path, listed: Path):
    rows = [*rows_of(listed), ["nowhere.jpg", "unheard", "test"]]
    found = scan(write_csv(listed, rows))
    assert len(found.val) == 3 and found.ignored == ("test is left alone: scores are on val",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [*rows, ["a.jpg", "x", "dev"]], "line 14 of .*list.csv: the split 'dev' is not known"),
        (lambda rows: [*rows, ["a.jpg", "x", "train"]], "line 14 of .*list.csv: there is no file .*/set/a.jpg"),
        (lambda rows: [*rows, ["val", "x", "train"]], "line 14 of .*list.csv: there is no file .*/set/val:"),
        (lambda rows: [*rows, ["/a.jpg", "x", "train"]], "line 14 of .*list.csv: /a.jpg begins with /"),
        (lambda rows: [*rows, [rows[0][0], "x", "val"]], r"line 14 of .*list.csv: .*\.jpg is in line 2 already"),
        (lambda rows: [*rows, ["a.jpg", "", "train"]], "line 14 of .*list.csv: there is no label"),
        (lambda rows: [*rows, ["", "x", "train"]], "line 14 of .*list.csv: there is no path"),
        (lambda rows: [*rows, ["a.jpg"]], "line 14 of .*list.csv: it has 1 fields"),
        (lambda rows: [*rows, ["a\nb.jpg", "x", "train"]], "line 15 of .*list.csv has a control character"),
        (lambda rows: [], "list.csv lists no images"),
        (lambda rows: [row for row in rows if row[2] == "train"], "has train but no val"),
        (lambda rows: [row for row in rows if row[2] == "val"], r"\(split train\) holds no images"),
        (lambda rows: [row for row in rows if row[1] == CLASSES[0]], "holds 1 class "),
        (
            lambda rows: [row for row in rows if row[1:] != [CLASSES[1], "train"]],
            "train.* has no images of the class 01",
        ),
        (lambda rows: [row for row in rows if row[1:] != [CLASSES[1], "val"]], "val.* has no images of the class 01"),
        (lambda rows: [*rows, [*rows[0][:2], "valid"]], "has val and valid: which one is val"),
    ],
)
def test_unusable_csv_is_refused_with_its_line(listed: Path, change, words: str):
    write_csv(listed, change(rows_of(listed)))
    with pytest.raises(UserError, match=words) as caught:
        scan(listed)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "lacks the column path in its first line (empty)"),
        (b"path;label;split\na;b;c\n", "lacks the column path in its first line (path;label;split)"),
        (b"path,class,split\n", "lacks the column label in its first line (path,class,split)"),
        (b"\x1f\x8b\x08\x00\xff\xfe", "is no CSV file in UTF-8"),
        (b'path,label,split\n"a,b\n', "is no CSV file in UTF-8"),
    ],
)
def test_file_that_is_no_csv_of_images_is_refused(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "x.csv").write_bytes(content)
    assert words in refusal(tmp_path / "x.csv")


def test_two_csvs_and_the_folders_keep_their_own_digests(root: Path, listed: Path, tmp_path: Path):
    shutil.copy(listed, root / "again.csv")
    for data in (root, listed, root / "again.csv"):
        scan(data, manifest_folder=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 3


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("layout", ["folders", "flat", "csv"])
def test_command_says_which_layout_it_found(root: Path, flat: Path, listed: Path, layout: str, capsys):
    data, words = {
        "folders": ([root], "class folders in train/ and val/"),
        "flat": ([flat, "--val-share", "0.3"], "class folders, --val-share 0.3"),
        "csv": ([listed], "CSV file with 12 images"),
    }[layout]
    assert dataset.main(["--data", *map(str, data)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f": {words}")


def test_a_folder_that_may_not_be_entered_is_one_sentence(tiny_root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=r"cannot read .* fix its permissions"):
        scan(tiny_root)
