"""An image set out of an archive: fetched once, unpacked with care, and put in place whole.

Nothing here leaves half a folder under its final name. What is unfinished has another name: NAME.part (the archive so
far, see kd_dist.fetch) and .NAME.making (the folder being filled). An unfinished download is gone on with, an
unfinished folder is thrown away; both vanish once the set is whole.
"""

import bz2
import errno
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO
from urllib.parse import unquote

from kd_dist import fetch
from kd_dist.errors import UserError
from kd_dist.fetch import Progress, file_name, is_address
from kd_dist.files import publish, sha256_of

COPY_BYTES = 1 << 20
ANOTHER = (
    "pass a copy with --archive FILE_OR_URL, or fetch it beforehand on a login node with python -m kd_dist.dataset"
)

# Errors of the system that a bad archive causes: an entry that is a file in one place and a folder in another.
_CLASHES = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def make_folder(target: Path, is_whole: Callable[[Path], bool], fill: Callable[[Path], None]) -> None:
    """Have `target` made by one of the processes that call this at the same time, on any host that shares the disk.

    `fill` gets an empty folder beside the target; that, or the one folder in it that `is_whole`, is then renamed to the
    target. The other processes return when it is there, or take over when the one at work dies. Raises UserError, with
    nothing under the target's name, when it cannot be made. Hosts exclude each other as far as the file system's locks
    reach; where they do not, have the folder made by one process beforehand.
    """
    mend = "unpack the set by hand, or name with --data a folder that can be written"
    fetch.make_once(target, is_whole, lambda: _make_alone(target, is_whole, fill), mend)


def _make_alone(target: Path, is_whole: Callable[[Path], bool], fill: Callable[[Path], None]) -> None:
    if target.exists() and not (target.is_dir() and not os.listdir(target)):
        raise UserError(
            f"{target} exists but is not a data set (it has no train/ and val/): move it away and run the command "
            "again."
        )
    making = target.with_name(f".{target.name}.making")
    shutil.rmtree(making, ignore_errors=True)  # of an attempt that was killed
    making.mkdir()
    try:
        fill(making)
        whole = _the_whole_one(making, is_whole)
        os.sync()  # one flush for all the small files, or a power cut after the rename could leave empty ones
        publish(whole, target)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _the_whole_one(folder: Path, is_whole: Callable[[Path], bool]) -> Path:
    """The folder itself or the one folder in it that is whole: archives come with a top folder or without."""
    found = [path for path in [folder, *sorted(folder.iterdir())] if is_whole(path)]
    if found and (found[0] == folder or len(found) == 1):
        return found[0]
    raise UserError(
        f"the archive holds {len(found)} data sets (folders with train/ and val/): pass an archive that holds one."
    )


# ------------------------------------------------------------------------------------------------------------ archives


def unpack_from(source: str, sha256: str | None, folder: Path, part: Path, progress: Progress | None = None) -> None:
    """Unpack an archive given by path or URL into `folder`, after checking its SHA-256 where one is given.

    A URL is downloaded into `part`, which goes when the archive is unpacked or turns out to be no good, and stays when
    the disk was full, so that it need not be fetched again. A file of the user's is left alone. Raises UserError, and
    OSError for the disk.
    """
    path = _local_path(source)
    if path is None:
        fetch.download(source, part, ANOTHER, progress)
    try:
        _unpack_checked(path or part, source, sha256, folder, progress)
    except UserError:
        if path is None:
            fetch.discard(part)
        raise
    fetch.discard(part)


def _unpack_checked(path: Path, source: str, sha256: str | None, folder: Path, progress: Progress | None) -> None:
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        raise UserError(
            f"{source} has the SHA-256 {found} instead of {sha256.lower()}, so nothing of it was unpacked: run this "
            "again, or pass a good copy with --archive."
        )
    unpack(path, folder, source, progress)


def _local_path(source: str) -> Path | None:
    """The path of a local archive, checked to be a file; None for a URL that needs a download."""
    scheme, _, rest = source.partition("://")
    if is_address(source) and scheme.lower() != "file":
        return None
    path = Path("/" + unquote(rest.partition("/")[2]) if is_address(source) else source)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an archive: pass it with --data if it holds train/ and val/.")
    if not path.is_file():
        raise UserError(f"there is no archive {path}: pass an existing tar file, or omit --archive.")
    return path


def unpack(archive: Path, folder: Path, name: str, progress: Progress | None = None) -> None:
    """Unpack a tar archive (plain, gzip, bzip2 or xz) into an empty folder, calling it `name` in messages.

    Only regular files and folders with plain relative names are written; an archive with anything else (a link, a
    device, an absolute name, a "..") is refused with a UserError, as is one that is cut short or damaged. Owners, modes
    and times are not taken over.
    """
    try:
        with open(archive, "rb") as raw, _decompressed(raw) as stream:
            size = os.fstat(raw.fileno()).st_size
            for count in _write_members(stream, folder, name):
                if progress and count % 64 == 0:
                    progress(f"unpacking {file_name(name)}", raw.tell(), size)
    except (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None) not in {None, *_CLASHES}:  # the disk's fault; bz2 and gzip give no number
            raise
        raise UserError(
            f"{name} is damaged, cut short, or no tar archive ({error}): pass a good copy with --archive."
        ) from error


def _decompressed(raw: BinaryIO) -> IO[bytes] | gzip.GzipFile:
    """The tar stream in a file, told by its first bytes. Not tarfile's own, which does not check gzip's sum."""
    start = raw.read(6)
    raw.seek(0)
    openers: dict[bytes, Callable[[BinaryIO], IO[bytes] | gzip.GzipFile]]
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    return next((opener(raw) for magic, opener in openers.items() if start.startswith(magic)), raw)


class _Header(tarfile.TarInfo):
    """A file's header that tarfile does not pass over: by itself it takes a damaged or missing one for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the block of zeros that every archive ends with
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _write_members(stream: IO[bytes] | gzip.GzipFile, folder: Path, name: str) -> Iterator[int]:
    """Write the stream's files into the folder, yielding their count so far."""
    with tarfile.open(fileobj=stream, mode="r|", bufsize=COPY_BYTES, tarinfo=_Header) as tar:
        for count, member in enumerate(tar, start=1):
            _write_member(tar, member, folder, name)
            yield count
    while stream.read(COPY_BYTES):  # to the end, where gzip and xz compare their sums
        pass


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
        raise UserError(
            f"{name} was refused for its entry {member.name!r}: only files and folders that stay inside are unpacked, "
            "no links; pack it again (tar --dereference --hard-dereference)."
        )
    target = folder / path  # stays inside: the folder was empty, and no link is ever made in it
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # a file's is there
    with content, open(target, "wb") as file:
        shutil.copyfileobj(content, file, COPY_BYTES)
