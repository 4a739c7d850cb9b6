"""Data sets: the scan and its refusals, decoding, fingerprints, digest manifest, the demo, and the command."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_dist import dataset
from kd_dist.data import generated
from kd_dist.data import scan as scanning
from kd_dist.data.releases import DEFAULT_RELEASE, RELEASES, locate
from kd_dist.data.samples import SPLITS
from kd_dist.data.scan import scan
from kd_dist.errors import UserError
from kd_dist.fingerprint import fingerprint_of
from kd_dist.images.decode import decode, decoded_size


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes with three train images and one val image each."""
    folder = tmp_path / "set"
    generated.generate(folder, train_per_class=3, val_per_class=1, classes=3)
    return folder


# ------------------------------------------------------------------------------------------------------------ the scan


def test_scan_lists_images_by_class_and_name(root: Path):
    found = scan(root)
    assert found.name == "set"
    assert found.classes == ("00-disc-coarse", "01-disc-fine", "02-square-coarse")
    assert found.train.paths[:3] == tuple(f"train/00-disc-coarse/0000{i}.jpg" for i in range(3))
    assert found.train.paths[3] == "train/01-disc-fine/00000.jpg"
    assert found.train.labels_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.val.labels_N.tolist() == [0, 1, 2]
    assert len(found.val) == 3
    assert found.split("val") is found.val


def test_scan_records_size_and_digest_of_each_file(root: Path):
    train = scan(root).train
    assert (train.labels_N.dtype, train.bytes_N.dtype, train.sha256_N32.dtype) == (np.int64, np.int64, np.uint8)
    for path, size, digest_32 in zip(train.paths, train.bytes_N, train.sha256_N32, strict=True):
        content = (root / path).read_bytes()
        assert (size, digest_32.tobytes()) == (len(content), hashlib.sha256(content).digest())


def test_scan_takes_image_suffixes_of_any_case_and_nothing_hidden(root: Path):
    first = root / "train/00-disc-coarse"
    for suffix in ("JPEG", "Png", "bmp", "WEBP"):
        Image.new("RGB", (4, 4)).save(first / f"more.{suffix}")
    (first / "notes.txt").write_text("not an image")
    (first / ".00000.jpg").write_text("hidden, such as those that archives from a Mac bring")
    (first / "folder.jpg").mkdir()
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "noisy.csv").write_text("beside the splits")
    assert sorted(Path(p).name for p in scan(root).train.paths if "more" in p) == [
        "more.JPEG",
        "more.Png",
        "more.WEBP",
        "more.bmp",
    ]
    assert len(scan(root).train) == 13


def _spoil(root: Path, how: str) -> None:
    train, val = root / "train", root / "val"
    {
        "no val": lambda: shutil.rmtree(val),
        "no folder": lambda: shutil.rmtree(root),
        "one class": lambda: [shutil.rmtree(train / name) for name in ("00-disc-coarse", "01-disc-fine")],
        "no images": lambda: [path.unlink() for path in train.glob("*/*")],
        "empty class": lambda: [path.unlink() for path in val.glob("01*/*")],
        "lacks a class": lambda: shutil.rmtree(val / "01-disc-fine"),
        "unknown class": lambda: [(val / "zebra").mkdir(), shutil.copy(val / "01-disc-fine/00000.jpg", val / "zebra")],
        "no image files": lambda: [path.rename(path.with_suffix(".TGA")) for path in val.glob("01*/*")],
        "train images outside": lambda: [path.rename(train / f"{i}.jpg") for i, path in enumerate(train.glob("*/*"))],
        "link loop": lambda: (train / "01-disc-fine/again").symlink_to("../.."),
        "link to itself": lambda: (train / "01-disc-fine/x.jpg").symlink_to("x.jpg"),
        "line break": lambda: (train / "a\nb").mkdir(),
        "dead link": lambda: (train / "01-disc-fine/x.jpg").symlink_to("nowhere"),
        "odd name": lambda: Path(os.fsdecode(os.fsencode(train / "01-disc-fine") + b"/\xff.jpg")).write_bytes(b""),
    }[how]()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no val", r"set has train but no val \(nor valid, validation, test\): .*--val-share 0.1"),
        ("no folder", "there is no folder"),
        ("one class", r"train holds 1 class \(02-square-coarse\): a set needs two"),
        ("no images", "train holds no images"),
        ("empty class", "val has no images of the class 01-disc-fine"),
        ("lacks a class", "val has no images of the class 01-disc-fine"),
        ("unknown class", "train has no images of the class zebra"),
        (
            "no image files",
            r"class 01-disc-fine: images are val/<class>/\* with .jpg, .*.tiff; ignored 1 file: .tga 1;",
        ),
        ("train images outside", "train holds no images: .*images outside of a class folder 9"),
        ("link loop", "01-disc-fine/again leads back"),
        ("link to itself", "cannot read the image .*01-disc-fine/x.jpg"),
        ("line break", "control character"),
        ("dead link", "01-disc-fine/x.jpg"),
        ("odd name", "not UTF-8"),
    ],
)
def test_unusable_set_is_refused_in_one_sentence(root: Path, how: str, words: str):
    _spoil(root, how)
    with pytest.raises(UserError, match=words) as caught:
        scan(root)
    assert "\n" not in str(caught.value)


def test_gif_tiff_and_images_in_sub_folders_are_found(root: Path):
    first = root / "train/00-disc-coarse"
    (first / "more/still more").mkdir(parents=True)
    for name in ("x.gif", "x.tif", "more/x.TIFF", "more/still more/é x.png"):
        Image.new("RGB", (4, 4)).save(first / name)
    found = scan(root)
    names = [path.removeprefix("train/00-disc-coarse/") for path in found.train.paths if "00-disc-coarse" in path]
    jpegs = [f"0000{i}.jpg" for i in range(3)]
    assert names == [*jpegs, "more/still more/é x.png", "more/x.TIFF", "x.gif", "x.tif"]
    assert found.ignored == ()
    assert all(decode(root / path).ndim == 3 for path in found.train.paths)


def test_files_that_are_no_images_are_counted_in_one_line(root: Path):
    first = root / "train/00-disc-coarse"
    for i in range(3):
        (first / f"{i}.TXT").write_text("")
    (first / "LICENSE").write_text("")
    os.mkfifo(first / "pipe.jpg")
    shutil.copy(first / "00000.jpg", root / "val/loose.jpg")
    (first / os.fsdecode(b"\xff.csv")).write_text("")
    assert scan(root).ignored == (
        "ignored 7 files: .txt 3, .csv 1, images outside of a class folder 1, not a regular file 1, without a suffix 1",
    )


def test_stray_and_empty_folders_are_no_classes(root: Path):
    before = scan(root)
    for folder in ("train/__MACOSX/00-disc-coarse", "val/__MACOSX", "val/00-disc-coarse/__MACOSX", "train/empty/too"):
        (root / folder).mkdir(parents=True)
        shutil.copy(root / before.train.paths[0], root / folder / "._00000.jpg")
    shutil.copy(root / before.train.paths[0], root / "train/__MACOSX/00-disc-coarse")
    found = scan(root)
    assert (found.classes, found.train.fingerprint) == (before.classes, before.train.fingerprint)
    assert found.ignored == ("ignored folders that hold no images: train/__MACOSX, train/empty, val/__MACOSX",)


def test_odd_class_names_work(root: Path):
    for split in SPLITS:
        (root / split / "00-disc-coarse").rename(root / split / "-a b ü")
    found = scan(root)
    assert found.classes[0] == "-a b ü" and len(found.train) == 9


def test_linked_class_folders_are_followed(root: Path, tmp_path: Path):
    before = scan(root).train.fingerprint
    shutil.move(root / "train/00-disc-coarse", tmp_path / "elsewhere")
    (root / "train/00-disc-coarse").symlink_to(tmp_path / "elsewhere")
    assert scan(root).train.fingerprint == before


def test_files_with_the_same_content_are_a_line_for_each_kind(root: Path):
    assert scan(root).notes() == []
    train, val = root / "train", root / "val"
    shutil.copy(train / "00-disc-coarse/00001.jpg", train / "00-disc-coarse/same-class.jpg")
    assert scan(root).notes() == []
    shutil.copy(train / "00-disc-coarse/00000.jpg", val / "00-disc-coarse/again.jpg")
    shutil.copy(train / "00-disc-coarse/00002.jpg", train / "01-disc-fine/again.jpg")
    assert scan(root).notes() == [
        "warning: files with the same content in train and in val: 1, such as train/00-disc-coarse/00000.jpg and "
        "val/00-disc-coarse/again.jpg",
        "warning: files with the same content in two classes: 1, such as train/00-disc-coarse/00002.jpg and "
        "train/01-disc-fine/again.jpg",
    ]


# --------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_the_documented_digest():
    sha256_N32 = np.arange(64, dtype=np.uint8).reshape(2, 32)
    by_hand = b"".join(
        len(path).to_bytes(8, "little") + path + label.to_bytes(8, "little") + content.tobytes()
        for path, label, content in zip((b"a/b.jpg", "a/é.jpg".encode()), (0, 7), sha256_N32, strict=True)
    )
    assert fingerprint_of(("a/b.jpg", "a/é.jpg"), np.array([0, 7]), sha256_N32) == hashlib.sha256(by_hand).hexdigest()


def test_fingerprint_changes_with_byte_label_name_and_order(root: Path):
    train = scan(root).train
    paths, labels_N, sha256_N32 = train.paths, train.labels_N, train.sha256_N32
    assert fingerprint_of(paths, labels_N, sha256_N32) == train.fingerprint
    order = np.array([1, 0, *range(2, len(train))])
    other_labels_N = np.where(np.arange(len(train)) == 4, 2, labels_N)
    seen = {
        train.fingerprint,
        fingerprint_of(paths, other_labels_N, sha256_N32),
        fingerprint_of(("train/renamed.jpg", *paths[1:]), labels_N, sha256_N32),
        fingerprint_of([paths[i] for i in order], labels_N[order], sha256_N32[order]),
    }
    with open(root / paths[5], "ab") as file:
        file.write(b"\0")
    seen.add(scan(root).train.fingerprint)
    assert len(seen) == 5
    assert scan(root).val.fingerprint not in seen


def test_fingerprint_does_not_depend_on_the_folder(root: Path, tmp_path: Path):
    before = scan(root).train.fingerprint
    shutil.move(root, tmp_path / "elsewhere")
    assert scan(tmp_path / "elsewhere").train.fingerprint == before


# ------------------------------------------------------------------------------------------------------------ manifest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read for a digest, as they are read."""
    seen, real = [], scanning._content_digest
    monkeypatch.setattr(scanning, "_content_digest", lambda path: (seen.append(path), real(path))[1])
    return seen


def test_manifest_saves_the_second_scan_from_reading(root: Path, tmp_path: Path, hashed: list[Path]):
    first = scan(root, manifest_folder=tmp_path / "kept")
    assert len(hashed) == 12
    second = scan(root, manifest_folder=tmp_path / "kept")
    assert len(hashed) == 12
    assert (second.train.fingerprint, second.val.fingerprint) == (first.train.fingerprint, first.val.fingerprint)


@pytest.mark.parametrize("change", ["content", "same size and time", "new file", "manifest cut", "manifest foreign"])
def test_manifest_is_not_trusted_after_a_change(root: Path, tmp_path: Path, hashed: list[Path], change: str):
    before = scan(root, manifest_folder=tmp_path / "kept")
    (manifest,) = (tmp_path / "kept").iterdir()
    path = root / before.train.paths[0]
    status = path.stat()
    if change == "content":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "same size and time":
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "new file":
        shutil.copy(path, path.with_name("zzz.jpg"))
    elif change == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:-30])
    else:
        manifest.write_bytes(b"something else")
    after = scan(root, manifest_folder=tmp_path / "kept")
    assert len(hashed) == 12 + 12 + (change == "new file")
    assert after.train.fingerprint == scan(root).train.fingerprint
    assert (after.train.fingerprint != before.train.fingerprint) == (not change.startswith("manifest"))


def test_manifest_that_cannot_be_written_is_no_error(root: Path, tmp_path: Path):
    (tmp_path / "a file").write_text("")
    assert len(scan(root, manifest_folder=tmp_path / "a file" / "kept").train) == 9


# -------------------------------------------------------------------------------------------------------------- decode


def _image_HW3() -> np.ndarray:
    """6 x 4 pixels, upper half red and lower half blue."""
    image_HW3 = np.zeros((6, 4, 3), np.uint8)
    image_HW3[:3, :, 0] = image_HW3[3:, :, 2] = 255
    return image_HW3


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.fromarray(_image_HW3()).convert(mode).save(path, quality=100)
    pixels_HW3 = decode(path)
    assert pixels_HW3.dtype == np.uint8 and pixels_HW3.flags.writeable
    assert np.abs(pixels_HW3.astype(int) - _image_HW3()).max() <= (3 if mode == "CMYK" else 0)


def test_greyscale_becomes_rgb_of_equal_channels(tmp_path: Path):
    grey_HW = np.arange(0, 240, 10, dtype=np.uint8).reshape(6, 4)
    Image.fromarray(grey_HW).save(tmp_path / "grey.png")
    assert np.array_equal(decode(tmp_path / "grey.png"), np.repeat(grey_HW[..., None], 3, axis=2))


def test_sixteen_bit_greyscale_is_scaled_and_not_clipped(tmp_path: Path):
    Image.fromarray(np.array([[0, 256 * 7, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert decode(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 7, 255]


def test_palette_with_transparency_keeps_its_colours(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    image = Image.fromarray(_image_HW3()).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    assert np.array_equal(decode(tmp_path / "x.png"), _image_HW3())
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int):
    upright_HW3 = _image_HW3()
    upright_HW3[0, 0] = 255
    undo = {  # how a camera that notes this orientation stored the upright image (Exif 2.32, tag 0x0112)
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright_HW3))).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "x.png"), upright_HW3)
    for name in ("x.jpg", "x.tif"):
        Image.fromarray(np.ascontiguousarray(undo(upright_HW3))).save(tmp_path / name, exif=exif)
    assert np.array_equal(decode(tmp_path / "x.tif"), upright_HW3)
    assert {decoded_size(tmp_path / f"x.{suffix}") for suffix in ("png", "jpg", "tif")} == {upright_HW3.shape[:2]}


def test_of_several_frames_the_first_is_read(tmp_path: Path):
    first, second = Image.fromarray(_image_HW3()), Image.new("RGB", (4, 6), "white")
    for name in ("x.gif", "x.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert np.array_equal(decode(tmp_path / name), _image_HW3())
        assert decoded_size(tmp_path / name) == (6, 4)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_tiff_of_unknown_range_is_refused(tmp_path: Path, mode: str):
    Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif.*unknown range"):
        decode(tmp_path / "x.tif")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing", "other format"])
def test_broken_image_is_named(root: Path, damage: str):
    path = root / "train/00-disc-coarse/00001.jpg"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "text":
        path.write_text("<html>not found</html>")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    else:
        Image.new("RGB", (4, 4)).save(path, format="PPM")
    with pytest.raises(UserError, match=r"00-disc-coarse/00001\.jpg") as caught:
        decode(path)
    assert "\n" not in str(caught.value)


def test_decompression_bomb_is_refused_before_it_is_decoded(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"00000\.jpg.*decompression bomb"):
        decode(root / "train/00-disc-coarse/00000.jpg")


# ------------------------------------------------------------------------------------------------------- the drawn set


def test_drawn_set_is_the_same_each_time_and_a_larger_one_contains_it(root: Path, tmp_path: Path):
    generated.generate(tmp_path / "again", train_per_class=4, val_per_class=1, classes=3)
    for path in root.glob("*/*/*.jpg"):
        assert (tmp_path / "again" / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_drawn_set_has_other_images_for_another_seed_and_split(root: Path, tmp_path: Path):
    generated.generate(tmp_path / "other", train_per_class=3, val_per_class=1, seed=1, classes=3)
    digests = [scan(folder).split(split).sha256_N32 for folder in (root, tmp_path / "other") for split in SPLITS]
    assert len({row.tobytes() for rows in digests for row in rows}) == 2 * (9 + 3)


def test_drawn_set_has_several_aspect_ratios_and_short_sides_of_64(tmp_path: Path):
    generated.generate(tmp_path, train_per_class=12, val_per_class=1, classes=2)
    shapes = {decode(path).shape[:2] for path in tmp_path.glob("train/*/*")}
    assert len(shapes) >= 4
    assert {min(shape) for shape in shapes} == {64}


# ------------------------------------------------------------------------------------------------------------ locating


def test_folder_that_is_a_set_is_used_as_it_is(root: Path):
    assert locate(root, "imagewoof2-160", None, None, explicit=True) == root


def test_release_that_is_there_is_found_by_name(root: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    shutil.move(root, tmp_path / "data" / DEFAULT_RELEASE)
    assert locate(tmp_path / "data", None, None, None, explicit=True) == tmp_path / "data/imagewoof2-160"


def test_chosen_folder_without_a_set_is_not_fetched_into(tmp_path: Path):
    with pytest.raises(UserError, match=r"typo has no folders train/ and val/.*--release imagewoof2-160"):
        locate(tmp_path / "typo", None, None, None, explicit=True)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("release", "archive", "sha256", "words"),
    [
        ("imagenet", None, None, "no release imagenet: choose one of imagewoof2-160, .*demo"),
        ("../up", None, None, "not usable as a folder"),
        (None, "weird name.tgz", None, "name with --release"),
        (None, "x.tgz", "abc", "64 hexadecimal digits"),
        (None, "missing.tgz", None, "no archive missing.tgz"),
        (None, "nothing://host/x.tgz", None, "is not a URL that can be downloaded"),
    ],
)
def test_wrong_wishes_are_refused(tmp_path: Path, release, archive, sha256, words: str):
    with pytest.raises(UserError, match=words):
        locate(tmp_path, release, archive, sha256, explicit=False)


def test_demo_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, real = [], generated.generate

    def small(folder: Path, progress=None) -> None:
        calls.append(folder)
        real(folder, train_per_class=1, val_per_class=1, classes=2)

    monkeypatch.setattr(generated, "generate", small)
    found = [locate(tmp_path, "demo", None, None, explicit=True) for _ in range(2)]
    assert found == [tmp_path / "demo"] * 2
    assert len(calls) == 1
    assert len(scan(found[0]).train) == 2


# ------------------------------------------------------------------------------------------------------------- command


def _command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "kd_dist.dataset", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])


def test_command_prints_classes_counts_and_fingerprints(root: Path):
    done = _command("--data", root)
    assert done.returncode == 0, done.stderr
    assert f"set in {root}" in done.stdout
    assert [line.split() for line in done.stdout.splitlines()][2] == ["00-disc-coarse", "3", "1"]
    assert scan(root).train.fingerprint in done.stdout
    assert scan(root).val.fingerprint in done.stdout


def test_command_prints_what_was_ignored(root: Path, capsys: pytest.CaptureFixture):
    (root / "train/00-disc-coarse/notes.txt").write_text("")
    assert dataset.main(["--data", str(root)]) == 0
    assert "ignored 1 file: .txt 1\n" in capsys.readouterr().out


def test_command_says_one_sentence_for_bad_input(tmp_path: Path):
    done = _command("--data", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kd_dist.dataset: ") and done.stderr.count("\n") == 1


def test_command_lists_releases(capsys: pytest.CaptureFixture):
    assert dataset.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}\n" in listed or f"{name} (default)\n" in listed for name in RELEASES)


def test_folder_in_the_environment_counts_as_chosen(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("KD_DIST_DATA", str(root))
    assert dataset.main([]) == 0
    assert str(root) in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the real set


@pytest.mark.skipif("KD_DIST_IMAGEWOOF" not in os.environ, reason="KD_DIST_IMAGEWOOF names no Imagewoof archive")
def test_real_imagewoof(tmp_path: Path):
    root = locate(tmp_path, "imagewoof2-160", os.environ["KD_DIST_IMAGEWOOF"], None, explicit=True)
    found = scan(root)
    assert (len(found.train), len(found.val), len(found.classes)) == (9025, 3929, 10)
    assert np.bincount(found.train.labels_N)[found.classes.index("n02089973")] == 580
    grey = 0
    for path in found.train.paths + found.val.paths:
        with Image.open(root / path) as image:
            grey += image.mode == "L"
    assert grey == 121
    assert min(decode(root / found.train.paths[0]).shape[:2]) == 160
