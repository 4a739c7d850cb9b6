"""Data sets known by name, and where a set's folder is: `locate` finds, downloads or generates it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kd_dist.data import archives, generated
from kd_dist.data.huggingface import converted, hub_set
from kd_dist.data.layout import SHARE_HINT, is_set
from kd_dist.errors import UserError
from kd_dist.fetch import Progress
from kd_dist.fetch import file_name as file_name_of


@dataclass(frozen=True)
class Release:
    """A data set known by name. Without a URL it is generated; without a SHA-256 its archive is not checked."""

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
            "demo",
            "synthetic: ten classes of shapes, 1,200 train and 400 val images, generated locally in seconds, no "
            "download",
        ),
    )
}
DEFAULT_RELEASE = "imagewoof2-160"
DEFAULT_FOLDER = "data"  # that sets are fetched into, in the current folder


def locate(
    data: Path,
    release: str | None = None,
    archive: str | None = None,
    sha256: str | None = None,
    *,
    explicit: bool,
    val_share: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder or CSV file to scan: `data` itself, or the release's folder in it, made first where it may be.

    `release` names the folder; without it the archive's name does (mirror/imagewoof2-160.tgz: imagewoof2-160), and
    without both it is DEFAULT_RELEASE. What is not there is fetched, unpacked or generated if a release or an archive
    was given, or if `explicit` is false, which means that the user did not choose `data`. An `archive` (local tar file,
    http, https or file URL) is checked against `sha256` if that is given, a release's own archive also against its
    known digest. Any number of processes may call this at once, see archives.make_folder. Raises UserError.
    """
    unnamed = not (release or archive)
    if unnamed and explicit and not is_set(data) and (named := hub_set(data)):
        return converted(named, Path(DEFAULT_FOLDER), progress)
    if is_set(data) or (unnamed and explicit and _is_own(data, val_share)):
        return data
    name = _set_name(release, archive)
    target = data / name
    if is_set(target):
        return target
    if unnamed:
        _require_default(data, explicit, val_share)
    if name == "demo" and not archive:
        archives.make_folder(target, is_set, lambda folder: generated.generate(folder, progress=progress))
        return target
    source, digest = _source(name, archive, sha256)
    part = data / f"{name}.part"
    archives.make_folder(target, is_set, lambda folder: archives.unpack_from(source, digest, folder, part, progress))
    return target


def _is_own(data: Path, val_share: float | None) -> bool:
    """Whether a place that the user chose is to be scanned as it is, if only to say what it lacks."""
    return data.is_file() or val_share is not None or os.path.isdir(data / "train")


def _require_default(data: Path, explicit: bool, val_share: float | None) -> None:
    """Raise UserError where the user asked for data of their own, so that the default set would be no answer."""
    if explicit:
        raise UserError(
            f"{data} has no folders train/ and val/: pass with --data a folder that holds train/<class>/* and "
            f"val/<class>/*, {SHARE_HINT} if its folders are the classes, or add --release {DEFAULT_RELEASE} to "
            "download that data set into it."
        )
    if val_share is not None:
        raise UserError(f"--val-share {val_share:g} is for class folders of your own: pass their folder with --data.")


def _set_name(release: str | None, archive: str | None) -> str:
    """The set's folder below --data: the archive's name counts, so that no other set passes for the default one."""
    file_name = file_name_of(archive) if archive else DEFAULT_RELEASE
    name = release or re.sub(r"\.(tgz|tbz2?|txz|tar(\.\w+)?)$", "", file_name, flags=re.IGNORECASE)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{name!r} is not usable as a folder's name: give the data set a name with --release.")
    return name


def _source(name: str, archive: str | None, sha256: str | None) -> tuple[str, str | None]:
    """Where the archive is, and the digest it must have (None: any)."""
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"--sha256 {sha256} is not a SHA-256: pass 64 hexadecimal digits, as sha256sum prints them.")
    if archive:
        return archive, sha256
    if name not in RELEASES:
        raise UserError(f"there is no release {name}: choose one of {', '.join(RELEASES)}, or pass its --archive.")
    release = RELEASES[name]
    assert release.url is not None  # the demo alone has none, and it is generated, not fetched
    return release.url, sha256 or release.sha256
