"""Image sets: where they come from, the ordered list of their samples, and the fingerprint that binds a cache to them.

A set is a folder with train/<class>/* and val/<class>/*. `locate` finds it, and fetches or draws it where it may;
`scan` gives every image its index; `decode` reads one. On its own, on a login node: `python -m kd_dist.dataset`.
"""

import argparse
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kd_dist.data import fetch, generated
from kd_dist.data.fetch import Progress
from kd_dist.errors import UserError, exit_code_of
from kd_dist.files import write_atomically
from kd_dist.fingerprint import fingerprint_of

SPLITS = ("train", "val")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Named because Pillow goes by content, not suffix, and some of its readers run other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass(frozen=True)
class Release:
    """An image set known by name. Without a URL it is drawn, without a SHA-256 its archive's content is not checked."""

    name: str
    about: str
    url: str | None = None
    sha256: str | None = None


_BUCKET = "https://s3.amazonaws.com/fast-ai-imageclas/"
RELEASES = {
    release.name: release
    for release in (
        Release(
            "imagewoof2-160",
            "Imagewoof, 9,025 train and 3,929 val images of ten breeds of dogs, shortest side 160; 93 MB",
            _BUCKET + "imagewoof2-160.tgz",
            "663c22f69c2802d85e2a67103c017e047096702ffddf9149a14011b7002539bf",
        ),
        Release("imagewoof2-320", "the same images, shortest side 320; 328 MB", _BUCKET + "imagewoof2-320.tgz"),
        Release("imagewoof2", "the same images in full size; 1.3 GB", _BUCKET + "imagewoof2.tgz"),
        Release(
            "imagewoof-160",
            "the first release: the same images split 12,454 to 500, shortest side 160",
            _BUCKET + "imagewoof-160.tgz",
            "a0d360f9d8159055b3bf2b8926a51d19b2f1ff98a1eef6034e4b891c59ca3f1a",
        ),
        Release(
            "demo", "ten classes of drawn shapes, 1,200 train and 400 val images, made in seconds without a network"
        ),
    )
}
DEFAULT_RELEASE = "imagewoof2-160"
DEFAULT_DATA = "data"
MANIFEST_FOLDER = ".kd_dist"  # in the set's own folder
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class SampleList:
    """The images of one split in their one order: sample i is row i of everything made from them.

    The order is by class, then by file name, both by code point.
    """

    split: str
    root: Path
    classes: tuple[str, ...]  # a label is a position in here
    paths: tuple[str, ...]  # relative to root, with "/": "train/n02086240/x.JPEG"
    labels_N: np.ndarray  # int64
    bytes_N: np.ndarray  # int64, file sizes
    sha256_N32: np.ndarray  # uint8, digests of the files' contents

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, rows_M: np.ndarray, name: str) -> "SampleList":
        """The samples in these rows as a list of their own, with its own fingerprint; `name` is its split's."""
        paths = tuple(self.paths[row] for row in rows_M)
        columns = (self.labels_N[rows_M], self.bytes_N[rows_M], self.sha256_N32[rows_M])
        return SampleList(name, self.root, self.classes, paths, *columns)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes with any byte, label, name or place in the order."""
        return fingerprint_of(self.paths, self.labels_N, self.sha256_N32)


@dataclass(frozen=True)
class Dataset:
    """Both splits of one folder, with the same classes."""

    name: str
    root: Path
    classes: tuple[str, ...]
    train: SampleList
    val: SampleList

    def split(self, name: str) -> SampleList:
        """The sample list of "train" or "val"."""
        return {"train": self.train, "val": self.val}[name]


# ------------------------------------------------------------------------------------------------------------- reading


def decode(path: Path) -> np.ndarray:
    """One image as RGB, uint8 [H, W, 3], turned the way its EXIF orientation says.

    Greyscale, palette and CMYK become RGB; an alpha channel is dropped, and 16-bit greyscale is scaled to 8. Raises
    UserError naming the file when it is broken, cut short, no image of a known kind, or so large that Pillow takes it
    for an attack (179 million pixels).
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_to_rgb(image))
    except Exception as error:  # Pillow's readers raise almost anything on broken bytes
        raise _unreadable(path, error) from error


def decoded_size(path: Path) -> tuple[int, int]:
    """Height and width that `decode` gives, from the image's header where that holds its orientation too.

    Raises UserError naming the file when it is no image of a known kind.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
            return (width, height) if sideways else (height, width)
    except Exception as error:
        raise _unreadable(path, error) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # else Pillow warns of each such palette
        image = image.convert("RGBA")
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------ scanning


@dataclass(frozen=True)
class _File:
    path: str  # relative to the set's root, with "/"
    label: int
    status: os.stat_result


def is_set(folder: Path) -> bool:
    """Whether a folder looks like an image set: it has train/ and val/."""
    return all(os.path.isdir(folder / split) for split in SPLITS)


def scan(
    root: Path, *, manifest_folder: Path | None = None, workers: int = 2, progress: Progress | None = None
) -> Dataset:
    """List a set's images in their one order, with a digest of each.

    Classes are the sorted folders of train/; images are the files in them with one of IMAGE_SUFFIXES, in any case; what
    starts with a dot is left out. With `manifest_folder` the digests are kept there, and as long as no file's path,
    size or time stamps change, a later scan need not read the images. Raises UserError where the set is unusable.
    """
    if not is_set(root):
        raise UserError(
            f"{root} has no folders train/ and val/: name with --data a folder that holds train/<class>/* and "
            "val/<class>/*."
        )
    classes = _classes(root)
    files = {split: _list_files(root, split, classes) for split in SPLITS}
    sha256_N32 = _digests(root, files["train"] + files["val"], manifest_folder, workers, progress)
    parts = dict(zip(SPLITS, np.split(sha256_N32, [len(files["train"])]), strict=True))
    lists = {split: _sample_list(split, root, classes, files[split], parts[split]) for split in SPLITS}
    return Dataset(name=root.resolve().name, root=root, classes=classes, **lists)


def _sample_list(
    split: str, root: Path, classes: tuple[str, ...], files: list[_File], sha256_N32: np.ndarray
) -> SampleList:
    return SampleList(
        split=split,
        root=root,
        classes=classes,
        paths=tuple(file.path for file in files),
        labels_N=np.array([file.label for file in files], dtype=np.int64),
        bytes_N=np.array([file.status.st_size for file in files], dtype=np.int64),
        sha256_N32=sha256_N32,
    )


def _classes(root: Path) -> tuple[str, ...]:
    """The sorted class folders of train/, after checking that val/ has the same."""
    train, val = (_class_folders(root / split) for split in SPLITS)
    if len(train) < 2:
        raise UserError(f"{root / 'train'} holds {len(train)} class folders: a set needs two or more, train/<class>/*.")
    if missing := sorted(set(train) - set(val)):
        raise UserError(f"{root / 'val'} lacks the class {_some(missing)} of train/: add val/<class>/* for each class.")
    if unknown := sorted(set(val) - set(train)):
        raise UserError(f"{root / 'val'} has the class {_some(unknown)}, which train/ lacks: both need the same.")
    return tuple(train)


def _class_folders(folder: Path) -> list[str]:
    return sorted(name for name in _visible(folder) if os.path.isdir(folder / name))


def _visible(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones; UserError for a name that no UTF-8 file can record."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(
            f"cannot list {folder} ({error.strerror}): mend its permissions, or name other data."
        ) from error
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's stand-ins for bytes that are no text
            raise UserError(f"a name in {folder} is not UTF-8 ({name!r}): rename it.")
    return names


def _list_files(root: Path, split: str, classes: tuple[str, ...]) -> list[_File]:
    files_by_class = [_class_files(root, f"{split}/{name}", label) for label, name in enumerate(classes)]
    empty = [name for name, files in zip(classes, files_by_class, strict=True) if not files]
    if len(empty) == len(classes):
        raise UserError(f"{root / split} holds no images: its class folders need files in {', '.join(IMAGE_SUFFIXES)}.")
    if empty:
        raise UserError(f"{root / split} has no images of the class {_some(empty)}: add some, or remove the class.")
    return [file for files in files_by_class for file in files]


def _class_files(root: Path, folder: str, label: int) -> list[_File]:
    names = [name for name in _visible(root / folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    listed = [_File(f"{folder}/{name}", label, _status(root / folder / name)) for name in names]
    return [file for file in listed if stat.S_ISREG(file.status.st_mode)]


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # such as a link to nowhere: leaving it out would silently shorten the set
        raise _unreadable(path, error.strerror) from error


def _unreadable(path: Path, why: object) -> UserError:
    return UserError(f"cannot read the image {path} ({why}): put back a good copy of it, or take it out of the set.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------- digests


def _digests(
    root: Path, files: list[_File], manifest_folder: Path | None, workers: int, progress: Progress | None
) -> np.ndarray:
    """SHA-256 of each file's content, uint8 [N, 32], from the manifest where it still holds."""
    if manifest_folder is None:
        return _hash_files(root, files, workers, progress)
    key = _listing_key(root, files)
    manifest = manifest_folder / f"digests-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
    sha256_N32 = _read_manifest(manifest, key, len(files))
    if sha256_N32 is None:
        sha256_N32 = _hash_files(root, files, workers, progress)
        _write_manifest(manifest, key, sha256_N32)
    return sha256_N32


def _listing_key(root: Path, files: list[_File]) -> str:
    """Hex SHA-256 over the set's folder and each file's path, size and times of last change (content, and inode)."""
    lines = [f"{f.path}\0{f.status.st_size}\0{f.status.st_mtime_ns}\0{f.status.st_ctime_ns}\n" for f in files]
    return hashlib.sha256(os.fsencode(root.resolve()) + b"\n" + "".join(lines).encode()).hexdigest()


def _read_manifest(manifest: Path, key: str, count: int) -> np.ndarray | None:
    """The digests kept for exactly this listing, or None: a manifest only saves time, so no fault of it is an error."""
    try:
        with np.load(manifest, allow_pickle=False) as kept:
            sha256_N32 = kept["sha256_N32"]
            valid = str(kept["key"]) == key and sha256_N32.shape == (count, 32) and sha256_N32.dtype == np.uint8
            return sha256_N32 if valid else None
    except Exception:  # np.load raises almost anything on broken bytes
        return None


def _write_manifest(manifest: Path, key: str, sha256_N32: np.ndarray) -> None:
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(manifest, lambda file: np.savez(file, key=key, sha256_N32=sha256_N32))
    except OSError:  # no place for it: the next scan reads the images again
        return


def _hash_files(root: Path, files: list[_File], workers: int, progress: Progress | None) -> np.ndarray:
    sha256_N32 = np.empty((len(files), 32), dtype=np.uint8)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for i, digest in enumerate(pool.map(_content_digest, (root / file.path for file in files))):
            sha256_N32[i] = np.frombuffer(digest, dtype=np.uint8)
            if progress:
                progress("taking digests of the images", i + 1, len(files))
    return sha256_N32


def _content_digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


# ------------------------------------------------------------------------------------------------------------ locating


def locate(
    data: Path,
    release: str | None = None,
    archive: str | None = None,
    sha256: str | None = None,
    *,
    explicit: bool,
    progress: Progress | None = None,
) -> Path:
    """The folder that holds train/ and val/: `data` itself, or the release's folder in it, made first where it may be.

    `release` names the folder; without it the archive's name does (mirror/imagewoof2-160.tgz: imagewoof2-160), and
    without both it is DEFAULT_RELEASE. What is not there is fetched, unpacked or drawn when a release or an archive was
    named, or when `explicit` is false, which means that the user did not choose `data`. An `archive` (local tar file or
    http, https or file URL) is checked against `sha256` if that is given, a release's own archive also against its
    known digest. Any number of processes may call this at once, see fetch.make_folder. Raises UserError.
    """
    if is_set(data):
        return data
    name = _set_name(release, archive)
    target = data / name
    if is_set(target):
        return target
    if explicit and not (release or archive):
        raise UserError(
            f"{data} has no folders train/ and val/: name with --data a folder that holds train/<class>/* and "
            f"val/<class>/*, or add --release {DEFAULT_RELEASE} to fetch that into it."
        )
    if name == "demo" and not archive:
        fetch.make_folder(target, is_set, lambda folder: generated.generate(folder, progress=progress))
        return target
    source, digest = _source(name, archive, sha256)
    part = data / f"{name}.part"
    fetch.make_folder(target, is_set, lambda folder: fetch.unpack_from(source, digest, folder, part, progress))
    return target


def _set_name(release: str | None, archive: str | None) -> str:
    """The set's folder below --data: the archive's name counts, so that no other set passes for the default one."""
    file_name = fetch.file_name(archive) if archive else DEFAULT_RELEASE
    name = release or re.sub(r"\.(tgz|tbz2?|txz|tar(\.\w+)?)$", "", file_name, flags=re.IGNORECASE)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{name!r} cannot name a folder: give the set a plain name with --release.")
    return name


def _source(name: str, archive: str | None, sha256: str | None) -> tuple[str, str | None]:
    """Where the archive is, and the digest it must have (None: any)."""
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"--sha256 {sha256} is no SHA-256: it has 64 hexadecimal digits, as sha256sum prints them.")
    if archive:
        return archive, sha256
    if name not in RELEASES:
        raise UserError(f"there is no release {name}: choose one of {', '.join(RELEASES)}, or name its --archive.")
    release = RELEASES[name]
    assert release.url is not None  # the demo alone has none, and it is drawn, not fetched
    return release.url, sha256 or release.sha256


# -------------------------------------------------------------------------------------------------------- command line


class PrintedProgress:
    """Progress as plain lines on stderr: when something begins, every few seconds, and when it is done."""

    def __init__(self) -> None:
        self._what, self._said_at = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self._what and done != total and now - self._said_at < PROGRESS_SECONDS:
            return
        self._what, self._said_at = what, now
        print(f"{what}: {done:,} of {total:,}" if total else f"{what}: {done:,}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.dataset`; returns the exit code."""
    options = _parser().parse_args(arguments)
    work = _print_releases if options.list else lambda: _print_set(_prepare(options))
    try:
        return exit_code_of("kd_dist.dataset", work)
    except KeyboardInterrupt:
        print("kd_dist.dataset: stopped; the same command goes on with what is there.", file=sys.stderr)
        return 130


def _prepare(options: argparse.Namespace) -> Dataset:
    progress = PrintedProgress()
    typed = options.data or os.environ.get("KD_DIST_DATA")
    data = Path(typed or DEFAULT_DATA)
    root = locate(data, options.release, options.archive, options.sha256, explicit=bool(typed), progress=progress)
    return scan(root, manifest_folder=root / MANIFEST_FOLDER, progress=progress)


def _print_set(dataset: Dataset) -> None:
    print(f"{dataset.name} in {dataset.root.resolve()}")
    print(f"{'class':<32} {'train':>8} {'val':>8}")
    counts = [np.bincount(dataset.split(split).labels_N, minlength=len(dataset.classes)) for split in SPLITS]
    for name, train, val in zip(dataset.classes, *counts, strict=True):
        print(f"{name:<32} {train:>8,} {val:>8,}")
    print(f"{f'{len(dataset.classes)} classes':<32} {len(dataset.train):>8,} {len(dataset.val):>8,}")
    for split in SPLITS:
        print(f"fingerprint of {split:<5} {dataset.split(split).fingerprint}")


def _print_releases() -> None:
    for release in RELEASES.values():
        print(f"{release.name}{' (default)' * (release.name == DEFAULT_RELEASE)}\n    {release.about}")
        if release.url:
            print(f"    {release.url}\n    SHA-256 {release.sha256 or 'not known'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_dist.dataset",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_HELP,
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="the set's folder, or the one to put it in [$KD_DIST_DATA, else data]")
    add("--release", metavar="NAME", help=f"which set to fetch, see --list [{DEFAULT_RELEASE}]")
    add("--archive", metavar="FILE_OR_URL", help="take the set from this tar file or http(s) address instead")
    add("--sha256", metavar="HEX", help="the digest that the archive must have")
    add("--list", action="store_true", help="print the known releases and stop")
    return parser


_HELP = """\
Get an image set ready and say what is in it. No GPU is needed, so a login node will do.

A folder with train/<class>/* and val/<class>/* is used as it is. Otherwise the release is looked for in it by
name, and fetched when it is not there: downloaded (an interrupted download goes on where it stopped), checked,
unpacked aside, and put in place with one rename. A folder that you name must hold a set, unless you name a
release or an archive to put into it."""

_EXAMPLES = """\
examples:
  python -m kd_dist.dataset                                        Imagewoof, 160 pixels, into data/
  python -m kd_dist.dataset --release demo                         a set that is drawn, without a network
  python -m kd_dist.dataset --archive /mirror/imagewoof2-160.tgz   from a copy
  python -m kd_dist.dataset --data /datasets/pets                  a folder of your own"""


if __name__ == "__main__":
    sys.exit(main())
