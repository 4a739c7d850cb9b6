"""Layouts: how a set's images may lie on a disk. Each gives every image a class and a split.

- Folders train/ and val/ (or one of OTHER_VALS), each with a folder for each class.
- Class folders alone, in the set's folder or in its train/: val is split off by --val-share.
- A CSV file of path, label and split, with paths relative to its folder.

To each of these a folder of images without labels can be added.
"""

import csv
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kd_dist.data.samples import UNLABELLED, unreadable
from kd_dist.errors import UserError
from kd_dist.fingerprint import UNKNOWN

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
STRAY_FOLDERS = ("__MACOSX",)  # that archive programs add
OTHER_VALS = ("valid", "validation", "test")
VAL_NAMES = ("val", *OTHER_VALS)
SHARE_HINT = "add --val-share 0.1 to hold out a tenth of the images as val"


class File(NamedTuple):
    """An image: its name in the sample list, its place on the disk, its label, and what stat() says of it."""

    path: str  # with "/", relative to the set's root
    at: str
    label: int
    status: os.stat_result

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        return self.status.st_dev, self.status.st_ino


@dataclass(frozen=True)
class Layout:
    """A set's images before their contents are read. `val` is None where --val-share is to split it off train.

    `about` names the layout in a few words, `root` is the folder that the images' paths are relative to.
    """

    name: str
    about: str
    root: Path
    classes: tuple[str, ...]
    train: list[File]
    val: list[File] | None


@dataclass
class Ignored:
    """What is passed over: how many files of each kind, which folders, and what is left alone on purpose."""

    files: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        """A line for each sort."""
        lines = []
        if self.files:
            most_first = sorted(self.files.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{kind} {count:,}" for kind, count in most_first]
            count = self.files.total()
            lines.append(f"ignored {count:,} file{'s' * (count != 1)}: {some(kinds, 6)}")
        if self.folders:
            lines.append(f"ignored folders that hold no images: {some(self.folders)}")
        return (*lines, *self.left_alone)


def is_set(folder: Path) -> bool:
    """Whether a folder looks like a data set: it has train/ and val/, or train/ and one of OTHER_VALS."""
    return os.path.isdir(folder / "train") and any(os.path.isdir(folder / name) for name in VAL_NAMES)


def lay_out(data: Path, val_share: float | None, ignored: Ignored) -> Layout:
    """List the images of a folder or a CSV file by class and path. Raises UserError where it is no usable set."""
    try:
        is_file = data.is_file()
    except OSError as error:  # a folder above it may not be entered
        raise UserError(
            f"cannot read {data} ({error.strerror}): fix its permissions, or pass another data set with --data."
        ) from error
    return _of_csv(data, val_share, ignored) if is_file else _of_folder(data, val_share, ignored)


def _val_among(names: Iterable[str], val_share: float | None, where: Path, ignored: Ignored) -> str | None:
    """Which of a set's splits is val; None where a fraction of train becomes val. Raises UserError where it is unclear.

    Beside another val, or under --val-share, test is no val: it is left alone.
    """
    found = [name for name in VAL_NAMES if name in names]
    clear = [name for name in found if name != "test"]
    if len(clear) > 1:
        raise UserError(
            f"{where} has {' and '.join(clear)}: which one is val? Rename or move away the other, or write a CSV file "
            "of path,label,split."
        )
    if val_share is not None:
        if clear:
            raise UserError(f"--val-share {val_share:g}, but {where} has {clear[0]} already: leave --val-share out.")
        val = "a fraction of train"
    elif not found:
        raise UserError(f"{where} has train but no val (nor {', '.join(OTHER_VALS)}): add that, or {SHARE_HINT}.")
    else:
        val = found[0]
    if "test" in found and val != "test":
        ignored.left_alone.append(f"test is left alone: scores are on {val}")
    return val if val_share is None else None


# ------------------------------------------------------------------------------------------------------------- folders

_Identity = tuple[int, int]  # device and inode
_Images = list[tuple[str, os.stat_result]]  # paths relative to the set's root, with "/"


def _of_folder(root: Path, val_share: float | None, ignored: Ignored) -> Layout:
    folders = _split_folders(root, val_share, ignored)
    found = {split: _class_files(root, folder, ignored) for split, folder in folders.items()}
    places = {split: str(root / folder) for split, folder in folders.items()}
    counted = {split: f"images are {_below(folder, '<class>/*')} with" for split, folder in folders.items()}

    def what_counts(split: str) -> str:
        """Which files are images, and which were found beside them."""
        return "; ".join([f"{counted[split]} {', '.join(IMAGE_SUFFIXES)}", *ignored.lines()[:1]])

    classes = _classes(found, places, what_counts)
    if val_share is None:
        about = f"class folders in {folders['train']}/ and {folders['val']}/"
    else:
        about = f"class folders{' in train/' * bool(folders['train'])}"
    return _listed_set(root.resolve().name, about, root, classes, found)


def _split_folders(root: Path, val_share: float | None, ignored: Ignored) -> dict[str, str]:
    """The folder of each split, relative to the root; "val" is missing where it is to be split off."""
    if os.path.isdir(root / "train"):
        val = _val_among({name for name in VAL_NAMES if os.path.isdir(root / name)}, val_share, root, ignored)
        return {"train": "train"} if val is None else {"train": "train", "val": val}
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}: pass with --data a folder of images or a CSV file.")
    if val_share is None:
        raise UserError(
            f"{root} has no folders train/ and val/: pass with --data a folder that holds train/<class>/* and "
            f"val/<class>/*; if its folders are the classes, {SHARE_HINT}."
        )
    return {"train": ""}


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _class_files(root: Path, split: str, ignored: Ignored) -> dict[str, _Images]:
    """The images of each folder of a split; a folder without a file is left out."""
    folders, files = _listed(root / split)
    outside = [name for name in files if _is_image(name)]
    ignored.files.update({"images outside of a class folder": len(outside)} if outside else {})
    ignored.files.update(_kind(name) for name in files if not _is_image(name))
    images_of, around = {}, (_identity(root), _identity(root / split))
    for name in folders:
        folder, before = _below(split, name), ignored.files.total()
        images = [] if name in STRAY_FOLDERS else sorted(_images(root, folder, around, ignored))
        if images or ignored.files.total() > before:
            images_of[name] = images
        else:
            ignored.folders.append(folder)
    return images_of


def _images(
    root: Path, folder: str, around: tuple[_Identity, ...], ignored: Ignored
) -> Iterator[tuple[str, os.stat_result]]:
    """(path, status) of each image in a folder and those below it; `around` identifies the folders that hold it."""
    here = _identity(root / folder)
    if here in around:
        raise UserError(f"{root / folder} leads back to a folder that holds it: remove the link in this path.")
    folders, files = _listed(root / folder)
    for name in files:
        path = _below(folder, name)
        if not _is_image(name):
            ignored.files[_kind(name)] += 1
        elif stat.S_ISREG((status := _status(root / path)).st_mode):
            yield path, status
        else:
            ignored.files["not a regular file"] += 1
    for name in folders:
        if name not in STRAY_FOLDERS:
            yield from _images(root, _below(folder, name), (*around, here), ignored)


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the other files in a folder, without hidden ones.

    Raises UserError for a folder or an image whose name is not UTF-8 or holds a line break.
    """
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"cannot list {folder} ({error.strerror}): fix its permissions, or pass another data set with --data."
        ) from error
    for name, is_folder in visible:
        if is_folder or _is_image(name):
            _require_plain(name, str(folder))
    return [name for name, is_folder in visible if is_folder], [name for name, is_folder in visible if not is_folder]


def _require_plain(name: str, where: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's stand-ins for bytes that are no text
        raise UserError(f"a name in {where} is not UTF-8 ({name!r}): rename it.")
    if any(letter < " " or letter == "\x7f" for letter in name):
        raise UserError(f"a name in {where} has a control character ({name!r}): rename it.")


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


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # such as a link to nowhere: leaving it out would silently shorten the set
        raise unreadable(path, error.strerror) from error


# ------------------------------------------------------------------------------------------------------ without labels


def list_unlabelled(folder: Path, layout: Layout, ignored: Ignored) -> list[File]:
    """The images of a folder and of those below it, by path. Raises UserError where there are none, or where one of
    them is an image of the set.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: pass with --unlabelled a folder of images without labels.")
    named = [
        File(UNLABELLED + path, os.path.join(folder, path), UNKNOWN, status)
        for path, status in sorted(_images(folder, "", (), ignored))
    ]
    if not named:
        raise UserError(
            f"--unlabelled {folder} holds no images: {', '.join(IMAGE_SUFFIXES)} count, in sub-folders too."
        )
    labelled = layout.train + (layout.val or [])
    at = {file.identity: file.at for file in labelled}
    if both := next((file for file in named if file.identity in at), None):
        raise UserError(
            f"--unlabelled {folder} holds images that have labels, such as {at[both.identity]}: pass a folder of other "
            "images."
        )
    if next((file for file in labelled if file.path.startswith(UNLABELLED)), None):
        raise UserError(f"{layout.root} has a folder {UNLABELLED} of its own: give it another name for --unlabelled.")
    return named


# ------------------------------------------------------------------------------------------------------------ CSV file

COLUMNS = ("path", "label", "split")


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


def _of_csv(file: Path, val_share: float | None, ignored: Ignored) -> Layout:
    root, rows = file.parent, _read_csv(file, val_share)
    if not rows:
        raise UserError(f"{file} lists no images: each line below the first is a path, a label and a split.")
    val = _val_among({row.split for row in rows}, val_share, file, ignored)
    found: dict[str, dict[str, _Images]] = {split: {} for split in ("train", "val") if split == "train" or val}
    lines: dict[str, int] = {}
    for row in rows:
        if row.split not in ("train", val):
            continue
        if row.path in lines:
            raise _wrong_line(file, row.line, f"{row.path} is in line {lines[row.path]} already: remove one of the two")
        lines[row.path] = row.line
        split = "train" if row.split == "train" else "val"
        found[split].setdefault(row.label, []).append((row.path, _status_of_row(file, row)))
    for images_of in found.values():
        for images in images_of.values():
            images.sort()
    written = {"train": "train", "val": val}
    places = {split: f"{file} (split {name})" for split, name in written.items()}
    classes = _classes(found, places, lambda split: f"its lines are path,label,{written[split]}")
    about = f"CSV file with {len(lines):,} images"
    return _listed_set(file.stem, about, root, classes, found)


def _read_csv(file: Path, val_share: float | None) -> list[_Row]:
    """The lines of a CSV file. Without a column of splits, as --val-share may have it, all are train."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(reader, [])]
            wanted = COLUMNS[:2] if val_share is not None and "split" not in header else COLUMNS
            if missing := [name for name in wanted if name not in header]:
                raise UserError(
                    f"{file} lacks the column {missing[0]} in its first line ({','.join(header)[:80] or 'empty'}): a "
                    "CSV file of images begins with path,label,split."
                )
            at = [header.index(name) for name in wanted]
            return [_row(file, reader.line_num, cells, at) for cells in reader if cells]
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): pass another file with --data.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} is no CSV file in UTF-8 ({error}): --data takes a folder of images or a CSV file of "
            "path,label,split; an archive goes with --archive."
        ) from error


def _row(file: Path, line: int, cells: Sequence[str], at: Sequence[int]) -> _Row:
    if len(cells) <= max(at):
        raise _wrong_line(file, line, f"it has {len(cells)} fields, the first line names more: fix the line")
    path, label, split = [*(cells[place].strip() for place in at), "train"][:3]
    if not path or not label:
        what = "label: images without one go into a folder that --unlabelled names" if path else "path: add it"
        raise _wrong_line(file, line, f"there is no {what}")
    if split not in ("train", *VAL_NAMES):
        raise _wrong_line(file, line, f"the split {split!r} is not known: write train or val")
    if posixpath.isabs(path):
        raise _wrong_line(file, line, f"{path} begins with /: write paths relative to the CSV file's folder")
    for name in (path, label):
        _require_plain(name, f"line {line} of {file}")
    return _Row(line, posixpath.normpath(path), label, split)


def _status_of_row(file: Path, row: _Row) -> os.stat_result:
    try:
        status = (file.parent / row.path).stat()
    except (OSError, ValueError):
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise _wrong_line(
            file, row.line, f"there is no file {file.parent / row.path}: fix the path, or remove the line"
        )
    return status


def _wrong_line(file: Path, line: int, what: str) -> UserError:
    return UserError(f"line {line} of {file}: {what}.")


# ------------------------------------------------------------------------------------------------------------- classes


def _classes(
    found: Mapping[str, Mapping[str, _Images]], places: Mapping[str, str], what_counts: Callable[[str], str]
) -> tuple[str, ...]:
    """The sorted classes, after checking that each has images in every split. `places` says where a split is."""
    for split, images_of in found.items():
        if not any(images_of.values()):
            raise UserError(f"{places[split]} holds no images: {what_counts(split)}.")
    if len(found["train"]) < 2:
        raise UserError(
            f"{places['train']} holds 1 class ({next(iter(found['train']))}): a set needs two or more; "
            f"{what_counts('train')}."
        )
    classes = sorted({name for images_of in found.values() for name in images_of})
    for split, images_of in found.items():
        if empty := [name for name in classes if not images_of.get(name)]:
            raise UserError(
                f"{places[split]} has no images of the class {some(empty)}: {what_counts(split)}; add some, or remove "
                "the class from train and val."
            )
    return tuple(classes)


def _listed_set(
    name: str, about: str, root: Path, classes: tuple[str, ...], found: Mapping[str, Mapping[str, _Images]]
) -> Layout:
    files = {
        split: [
            File(path, os.path.join(root, path), label, status)
            for label, kind in enumerate(classes)
            for path, status in images_of[kind]
        ]
        for split, images_of in found.items()
    }
    return Layout(name, about, root, classes, files["train"], files.get("val"))


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" (and {len(names) - most:,} more)" if len(names) > most else "")
