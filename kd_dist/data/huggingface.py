"""Hugging Face image data sets, converted once into a folder of image files: `hf:NAME` of the hub, or Parquet files.

The images are written as they are, byte for byte, so that from then on the set is a folder like any other: no network
and no `datasets` is needed to read it. Everything of `datasets` is in this module, and nothing imports it earlier.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from kd_dist.data.archives import make_folder
from kd_dist.data.layout import VAL_NAMES
from kd_dist.errors import UserError, require_installed
from kd_dist.fetch import Progress

PREFIX = "hf:"
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tif"}
PROGRESS_IMAGES = 256


@dataclass(frozen=True)
class HubSet:
    """A data set as the user named it, what `datasets` knows it by, and the name of the folder it is converted into."""

    typed: str
    source: str
    folder: str


def hub_set(data: Path) -> HubSet | None:
    """What --data names if it is a data set of the hub (`hf:NAME`) or a folder of Parquet files (`hf:DIR`, or DIR with
    the files in it or in its data/), else None. Raises UserError for a name that cannot be one.
    """
    typed = str(data)
    if not typed.startswith(PREFIX):
        return _local(typed, data) if any(data.glob("*.parquet")) or any(data.glob("data/*.parquet")) else None
    name = typed.removeprefix(PREFIX)
    if Path(name).is_dir():
        return _local(typed, Path(name))
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"--data {typed}: there is no folder {name}, and a name on the hub is NAME or OWNER/NAME.")
    return HubSet(typed, name, name.replace("/", "--"))


def _local(typed: str, folder: Path) -> HubSet:
    """Files that change make another set, so the folder's name has a digest of their names, sizes and times."""
    folder = folder.resolve()
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"--data {typed}: {folder} holds no .parquet files; leave {PREFIX} out for a folder of images.")
    lines = [f"{path.relative_to(folder)}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}" for path in files]
    digest = hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()
    return HubSet(typed, str(folder), f"{folder.name}-{digest[:8]}")


def converted(named: HubSet, parent: Path, progress: Progress | None = None) -> Path:
    """The folder in `parent` that holds the set's images in train/<class>/ and, where there is one, val.

    It is made by one of the processes that call this at once, or found. Raises UserError, with nothing in its place.
    """
    target = parent / named.folder
    make_folder(target, lambda folder: (folder / "train").is_dir(), lambda folder: _convert(named, folder, progress))
    return target


def _convert(named: HubSet, folder: Path, progress: Progress | None) -> None:
    streams = _opened(named)
    if "train" not in streams:
        found = ", ".join(streams) or "none"
        raise UserError(f"--data {named.typed} has no split train (its splits: {found}): name another set.")
    for split in _used({name: _Split(named, name, stream) for name, stream in streams.items()}):
        _write(split, folder / split.name, progress)


def _opened(named: HubSet) -> Mapping[str, Any]:
    """The splits of a set as `datasets` streams them, by name."""
    require_installed("hf", "datasets")
    import datasets

    datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub", "httpx"):  # they print what the sentence below says
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        return dict(datasets.load_dataset(named.source, streaming=True))
    except Exception as error:  # the libraries below raise almost anything
        raise UserError(
            f"--data {named.typed} cannot be opened ({_in_one_line(error)}): check the name; on a machine without a "
            f"network, name a folder of its Parquet files by {PREFIX}DIR, or fetch it on a login node with python -m "
            "kd_dist.dataset."
        ) from error


class _Split:
    """A split as `datasets` streams it: which column holds the images, which the labels, and the rows."""

    def __init__(self, named: HubSet, name: str, stream: Any):
        features = stream.features or {}
        self.name, self.where, self._stream = name, f"split {name} of {named.typed}", stream
        self.image = _column(features, "Image", ("image", "img"))
        self.label = _column(features, "ClassLabel", ("label", "labels"))
        self._classes = getattr(features.get(self.label), "names", None)
        self.columns = ", ".join(features)

    def rows(self) -> Iterator[tuple[str | None, Any]]:
        """(class, image as {"bytes", "path"}) of each row; the class is None where the row has none."""
        from datasets import Image as ImageColumn

        rows = self._stream.select_columns([self.image, self.label]).cast_column(self.image, ImageColumn(decode=False))
        try:
            for row in rows:
                yield self._class_of(row[self.label]), row[self.image]
        except Exception as error:  # of the network, or of a file's bytes
            raise UserError(f"the {self.where} cannot be read ({_in_one_line(error)}): run this again.") from error

    def _class_of(self, value: Any) -> str | None:
        if value is None or (isinstance(value, int) and value < 0):
            return None
        return str(value if self._classes is None else self._classes[value])

    def require_columns(self) -> None:
        """Raise UserError where the images or the labels are not found."""
        for column, what in ((self.image, "images"), (self.label, "class labels")):
            if column is None:
                raise UserError(f"the {self.where} has no column of {what} (its columns: {self.columns}).")


def _column(features: Mapping[str, Any], kind: str, usual: tuple[str, ...]) -> str | None:
    """The first column of a type of `datasets`, else the first that has a usual name."""
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    return next(iter([*of_kind, *(name for name in usual if name in features)]), None)


def _used(splits: Mapping[str, _Split]) -> list[_Split]:
    """Train, and what may be val. A test split counts where no other is val, and if its images have labels."""
    vals = [splits[name] for name in VAL_NAMES if name in splits and name != "test"]
    test = splits.get("test")
    if not vals and test and test.image and test.label and next(test.rows(), (None, None))[0] is not None:
        vals = [test]
    return [splits["train"], *vals]


def _write(split: _Split, folder: Path, progress: Progress | None) -> None:
    """Write a split's images as <class>/<row>.<suffix>; raises UserError for a row without a label or an image."""
    split.require_columns()
    folders: dict[str, str] = {}
    for index, (kind, image) in enumerate(split.rows()):
        where = f"row {index} of the {split.where}"
        if kind is None:
            raise UserError(f"{where} has no label: name a set whose images have one each.")
        target = folder / folders.setdefault(kind, _folder_name(kind))
        target.mkdir(parents=True, exist_ok=True)
        content = _content(image, where)
        (target / f"{index:08d}{_suffix(content, where)}").write_bytes(content)
        if progress and index % PROGRESS_IMAGES == 0:
            progress(f"writing the images of {split.name}", index + 1, 0)
    if len(set(folders.values())) < len(folders):
        raise UserError(f"two classes of the {split.where} differ only in characters that no folder's name can have.")


def _folder_name(kind: str) -> str:
    """A class's name as a folder's: without "/" and control characters, and not hidden."""
    plain = re.sub(r"[/\x00-\x1f\x7f]", "_", kind)
    return f"_{plain}" if plain.startswith(".") or not plain else plain


def _content(value: Mapping[str, Any] | None, where: str) -> bytes:
    """The bytes of an image's file."""
    if value and value.get("bytes") is not None:
        return value["bytes"]
    try:
        import fsspec

        with fsspec.open((value or {})["path"], "rb") as file:
            return file.read()
    except Exception as error:
        raise UserError(f"{where} has no image ({_in_one_line(error)}): name a set that is whole.") from error


def _suffix(content: bytes, where: str) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return SUFFIXES[image.format or ""]
    except Exception as error:
        raise UserError(f"{where} is no image of a known kind ({_in_one_line(error)}): name another set.") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
