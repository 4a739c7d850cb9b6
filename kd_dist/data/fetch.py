"""Getting a data set onto a disk once: resumable download, careful unpacking, and one process at work per filesystem.

Nothing here leaves half a folder under its final name. What is unfinished has another name: NAME.part (the archive so
far, with NAME.part.json saying of what) and .NAME.making (the folder being filled). An unfinished download is gone on
with, an unfinished folder is thrown away; both vanish once the set is whole. The empty lock file .NAME.lock stays:
removing it would be a race.
"""

import bz2
import errno
import fcntl
import gzip
import http.client
import json
import lzma
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO
from urllib.parse import unquote

from kd_dist.errors import UserError
from kd_dist.files import disk_full, publish, sha256_of, write_atomically

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is (0: unknown)

TRIES = 4  # in a row without a new byte
PAUSE_SECONDS = 1.0  # before the second try; doubles with each
TIMEOUT_SECONDS = 20.0  # without an answer, or without a byte
POLL_SECONDS = 0.5
CHUNK_BYTES = 1 << 20

# Errors of the system that a bad archive causes: an entry that is a file in one place and a folder in another.
_CLASHES = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


# --------------------------------------------------------------------------------------------- one process, one rename


def make_folder(target: Path, is_whole: Callable[[Path], bool], fill: Callable[[Path], None]) -> None:
    """Have `target` made by one of the processes that call this at the same time, on any host that shares the disk.

    `fill` gets an empty folder beside the target; that, or the one folder in it that `is_whole`, is then renamed to the
    target. The other processes return when it is there, or take over when the one at work dies. Raises UserError, with
    nothing under the target's name, when it cannot be made. Hosts exclude each other as far as the filesystem's flock()
    reaches across them; where it does not, have the folder made by one process beforehand.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, is_whole) as to_do:
            if to_do:
                _make_alone(target, is_whole, fill)
    except OSError as error:
        raise _write_error(target, error) from error


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


@contextmanager
def _locked(target: Path, is_whole: Callable[[Path], bool]) -> Iterator[bool]:
    """Wait for the target or for its lock, whichever comes first; true: the lock is ours, the target not yet made."""
    with open(target.with_name(f".{target.name}.lock"), "ab") as file:
        while not _is_there(target, is_whole):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
            except OSError as error:
                raise UserError(
                    f"{target.parent} is on a filesystem without file locks ({error.strerror}): unpack the set there "
                    "by hand, or choose another folder with --data."
                ) from error
            else:
                yield not _is_there(target, is_whole)
                return
        yield False


def _is_there(target: Path, is_whole: Callable[[Path], bool]) -> bool:
    os.listdir(target.parent)  # makes an NFS client look again, which may remember that the target was absent
    return is_whole(target)


def _write_error(target: Path, error: OSError) -> UserError:
    if disk_full(error):
        return UserError(
            f"no space left for {target}: free disk space and run the same command again: it resumes where it stopped."
        )
    return UserError(f"cannot make {target} ({error}): choose a writable folder with --data.")


# ------------------------------------------------------------------------------------------------------------ archives


def unpack_from(source: str, sha256: str | None, folder: Path, part: Path, progress: Progress | None = None) -> None:
    """Unpack an archive given by path or URL into `folder`, after checking its SHA-256 where one is given.

    A URL is downloaded into `part`, which goes when the archive is unpacked or turns out to be no good, and stays when
    the disk was full, so that it need not be fetched again. A file of the user's is left alone. Raises UserError, and
    OSError for the disk.
    """
    path = _local_path(source)
    if path is None:
        download(source, part, progress)
    try:
        _unpack_checked(path or part, source, sha256, folder, progress)
    except UserError:
        if path is None:
            _discard(part)
        raise
    _discard(part)


def _unpack_checked(path: Path, source: str, sha256: str | None, folder: Path, progress: Progress | None) -> None:
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        raise UserError(
            f"{source} has the SHA-256 {found} instead of {sha256.lower()}, so nothing of it was unpacked: run this "
            "again, or pass a good copy with --archive."
        )
    unpack(path, folder, source, progress)


def _local_path(source: str) -> Path | None:
    """The path of a local archive, checked to be a file; None for a URL that needs a download."""
    scheme, is_url, rest = source.partition("://")
    if is_url and scheme.lower() in ("http", "https"):
        return None
    if is_url and scheme.lower() != "file":
        raise UserError(f"cannot fetch {source}: --archive takes a local file or an http, https or file URL.")
    path = Path("/" + unquote(rest.partition("/")[2]) if is_url else source)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an archive: pass it with --data if it holds train/ and val/.")
    if not path.is_file():
        raise UserError(f"there is no archive {path}: pass an existing tar file, or omit --archive.")
    return path


def file_name(source: str) -> str:
    """The last part of a path or URL, without a URL's query."""
    return PurePosixPath(re.sub(r"[?#].*", "", source) if "://" in source else source).name or source


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
    with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK_BYTES, tarinfo=_Header) as tar:
        for count, member in enumerate(tar, start=1):
            _write_member(tar, member, folder, name)
            yield count
    while stream.read(CHUNK_BYTES):  # to the end, where gzip and xz compare their sums
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
        shutil.copyfileobj(content, file, CHUNK_BYTES)


# ------------------------------------------------------------------------------------------------------------ download


class _Dropped(Exception):
    """The connection failed or ended early; another try may resume from the bytes that came."""


@dataclass(frozen=True)
class _Origin:
    """What a part file is a part of."""

    url: str
    validator: str | None  # a strong ETag or a Last-Modified date, for If-Range (RFC 9110, section 13.1.5)
    total: int | None  # bytes


def download(url: str, part: Path, progress: Progress | None = None) -> None:
    """Fetch an http(s) URL into `part`, resuming from the bytes that are already there if they are of the same file.

    A dropped connection is tried again, up to TRIES times without a new byte. Raises UserError when the server refuses
    or cannot be reached; the bytes so far are kept.
    """
    failures, most = 0, _size(part)
    while True:
        try:
            return _fetch_rest(url, part, progress)
        except _Dropped as error:
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures >= TRIES:
                raise _unreachable(url, error) from error
        time.sleep(PAUSE_SECONDS * 2 ** (failures - 1))


def _fetch_rest(url: str, part: Path, progress: Progress | None) -> None:
    origin = _read_origin(part, url)
    if origin and origin.total == _size(part):
        return
    with _request(url, part, origin) as response:
        if origin and response.status == 206:
            _check_range(response, part, origin)
        else:
            origin = _start_over(url, response, part)
        _append(response, part, f"fetching {file_name(url)}", origin.total or 0, progress)
    if origin.total is not None and _size(part) != origin.total:
        raise _Dropped(f"the connection ended after {_size(part):,} of {origin.total:,} bytes")


def _request(url: str, part: Path, origin: _Origin | None) -> http.client.HTTPResponse:
    """Ask for what is missing: the whole file, or the rest of it provided that it is still the same file."""
    headers = {"User-Agent": "kd_dist", "Accept-Encoding": "identity"}
    if origin and _size(part):
        headers["Range"] = f"bytes={_size(part)}-"
        if origin.validator:
            headers["If-Range"] = origin.validator
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file: not a part of it
            _discard(part)
        if error.code in (416, 429) or error.code >= 500:
            raise _Dropped(f"HTTP {error.code} {error.reason}") from error
        raise UserError(
            f"the server has no {url} (HTTP {error.code} {error.reason}): pass another copy with --archive FILE_OR_URL."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(str(getattr(error, "reason", error))) from error
    except ValueError as error:
        raise UserError(f"{url} is not a URL that can be downloaded ({error}): pass another with --archive.") from error


def _check_range(response: http.client.HTTPResponse, part: Path, origin: _Origin) -> None:
    """Drop the part unless the reply continues where it ends and is of a file of the same size."""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span and int(span[1]) == _size(part) and span[2] in ("*", str(origin.total)):
        return
    _discard(part)
    raise _Dropped("the server sent another part of the file than asked for")


def _start_over(url: str, response: http.client.HTTPResponse, part: Path) -> _Origin:
    """Begin an empty part, and note first of what, so that no byte is ever there without its origin."""
    etag = response.headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    origin = _Origin(url, validator, response.length)
    _discard(part)
    write_atomically(_note(part), lambda file: file.write(json.dumps(asdict(origin)).encode()))
    return origin


def _append(response: http.client.HTTPResponse, part: Path, what: str, total: int, progress: Progress | None) -> None:
    with open(part, "ab") as file:
        while chunk := _read(response):
            file.write(chunk)
            if progress:
                progress(what, file.tell(), total)


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(str(error)) from error


def _read_origin(part: Path, url: str) -> _Origin | None:
    """What the part is a part of, or None when it is of another URL or cannot be told."""
    try:
        origin = _Origin(**json.loads(_note(part).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return origin if origin.url == url else None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unreachable(url: str, error: _Dropped) -> UserError:
    return UserError(
        f"cannot download {url} ({error}): if this machine has no internet access, pass a local copy with --archive "
        "FILE_OR_URL, or download the data set on a login node first with python -m kd_dist.dataset."
    )
