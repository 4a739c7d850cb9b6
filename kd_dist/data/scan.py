"""Scanning: every image of a set gets its index, in one order, and a digest of its content."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kd_dist.data.fetch import Progress
from kd_dist.data.samples import SPLITS, Dataset, SampleList, unreadable
from kd_dist.errors import UserError
from kd_dist.files import write_atomically

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
STORE_FOLDER = ".kd_dist"  # in the set's own folder: digests and decoded images
STRAY_FOLDERS = ("__MACOSX",)  # that archive programs add


@dataclass(frozen=True)
class _File:
    path: str  # relative to the set's root, with "/"
    label: int
    status: os.stat_result


@dataclass
class _Ignored:
    """What the scan passes over: how many files of each kind, and which folders."""

    files: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        lines = []
        if self.files:
            most_first = sorted(self.files.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{kind} {count:,}" for kind, count in most_first]
            count = self.files.total()
            lines.append(f"ignored {count:,} file{'s' * (count != 1)}: {_some(kinds, 6)}")
        if self.folders:
            lines.append(f"ignored folders that hold no images: {_some(self.folders)}")
        return tuple(lines)


def default_folder(root: Path) -> Path:
    """Where a set's digests and decoded images go when nobody says: inside its folder, or in the user's cache folder
    when that is read-only.
    """
    if os.access(root, os.W_OK):
        return root / STORE_FOLDER
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kd_dist"


def is_set(folder: Path) -> bool:
    """Whether a folder looks like an image set: it has train/ and val/."""
    return all(os.path.isdir(folder / split) for split in SPLITS)


def scan(
    root: Path, *, manifest_folder: Path | None = None, workers: int = 2, progress: Progress | None = None
) -> Dataset:
    """List a set's images in their one order, with a digest of each.

    Classes are the sorted folders of train/; images are the files in them, and in folders below them, with one of
    IMAGE_SUFFIXES, in any case. What starts with a dot is left out; other files, empty folders and STRAY_FOLDERS are
    left out with a note. With `manifest_folder` the digests are kept there, and as long as no file's path, size or time
    stamps change, a later scan need not read the images. Raises UserError where the set is unusable.
    """
    if not is_set(root):
        raise UserError(
            f"{root} has no folders train/ and val/: name with --data a folder that holds train/<class>/* and "
            "val/<class>/*."
        )
    ignored = _Ignored()
    found = {split: _class_files(root, split, ignored) for split in SPLITS}
    classes = _classes(root, found, ignored)
    files = {
        split: [_File(path, label, status) for label, name in enumerate(classes) for path, status in found[split][name]]
        for split in SPLITS
    }
    sha256_N32 = _digests(root, files["train"] + files["val"], manifest_folder, workers, progress)
    parts = dict(zip(SPLITS, np.split(sha256_N32, [len(files["train"])]), strict=True))
    lists = {split: _sample_list(split, root, classes, files[split], parts[split]) for split in SPLITS}
    return Dataset(name=root.resolve().name, root=root, classes=classes, **lists, ignored=ignored.lines())


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


# ------------------------------------------------------------------------------------------------------------- folders

_Identity = tuple[int, int]  # device and inode
_Images = list[tuple[str, os.stat_result]]  # paths relative to the set's root, with "/"


def _class_files(root: Path, split: str, ignored: _Ignored) -> dict[str, _Images]:
    """The images of each folder of a split; a folder without a file is left out."""
    folders, files = _listed(root / split)
    outside = [name for name in files if _is_image(name)]
    ignored.files.update({"images outside of a class folder": len(outside)} if outside else {})
    ignored.files.update(_kind(name) for name in files if not _is_image(name))
    images_of, around = {}, (_identity(root), _identity(root / split))
    for name in folders:
        before = ignored.files.total()
        images = [] if name in STRAY_FOLDERS else sorted(_images(root, f"{split}/{name}", around, ignored))
        if images or ignored.files.total() > before:
            images_of[name] = images
        else:
            ignored.folders.append(f"{split}/{name}")
    return images_of


def _images(
    root: Path, folder: str, around: tuple[_Identity, ...], ignored: _Ignored
) -> Iterator[tuple[str, os.stat_result]]:
    """(path, status) of each image in a folder and those below it; `around` identifies the folders that hold it."""
    here = _identity(root / folder)
    if here in around:
        raise UserError(f"{root / folder} leads back to a folder that holds it: remove the link in this path.")
    folders, files = _listed(root / folder)
    for name in files:
        path = f"{folder}/{name}"
        if not _is_image(name):
            ignored.files[_kind(name)] += 1
        elif stat.S_ISREG((status := _status(root / path)).st_mode):
            yield path, status
        else:
            ignored.files["not a regular file"] += 1
    for name in folders:
        if name not in STRAY_FOLDERS:
            yield from _images(root, f"{folder}/{name}", (*around, here), ignored)


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the other files in a folder, without hidden ones.

    Raises UserError for a folder or an image whose name is not UTF-8 or holds a line break.
    """
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"cannot list {folder} ({error.strerror}): mend its permissions, or name other data."
        ) from error
    for name, is_folder in visible:
        if not is_folder and not _is_image(name):
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's stand-ins for bytes that are no text
            raise UserError(f"a name in {folder} is not UTF-8 ({name!r}): rename it.")
        if any(letter < " " or letter == "\x7f" for letter in name):
            raise UserError(f"a name in {folder} has a control character ({name!r}): rename it.")
    return [name for name, is_folder in visible if is_folder], [name for name, is_folder in visible if not is_folder]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _identity(folder: Path) -> _Identity:
    status = _status(folder)
    return status.st_dev, status.st_ino


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _kind(name: str) -> str:
    """The suffix by which a file that is no image is counted."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix.isprintable() and 1 < len(suffix) < 12 else "without a suffix"


def _classes(root: Path, found: dict[str, dict[str, _Images]], ignored: _Ignored) -> tuple[str, ...]:
    """The sorted class folders, after checking that each has images in both splits."""
    for split in SPLITS:
        if not any(found[split].values()):
            raise UserError(f"{root / split} holds no images in class folders: {_what_counts(split, ignored)}.")
    if len(found["train"]) < 2:
        raise UserError(f"{root / 'train'} holds 1 class folder: a set needs two or more, train/<class>/*.")
    classes = sorted(found["train"].keys() | found["val"].keys())
    for split in SPLITS:
        if empty := [name for name in classes if not found[split].get(name)]:
            raise UserError(
                f"{root / split} has no images of the class {_some(empty)}: {_what_counts(split, ignored)}; add some, "
                "or remove the class from train/ and val/."
            )
    return tuple(classes)


def _what_counts(split: str, ignored: _Ignored) -> str:
    """Which files are images, and which were found beside them."""
    return "; ".join([f"images are {split}/<class>/* with {', '.join(IMAGE_SUFFIXES)}", *ignored.lines()[:1]])


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # such as a link to nowhere: leaving it out would silently shorten the set
        raise unreadable(path, error.strerror) from error


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" (and {len(names) - most:,} more)" if len(names) > most else "")


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
        raise unreadable(path, error.strerror) from error
