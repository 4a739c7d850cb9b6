"""Getting a file onto a disk once: by http(s), or by any other address through fsspec; resumable, and by one process of
those that share the disk.

A file that is not whole yet is NAME.part, with NAME.part.json saying what it is a part of. The lock .NAME.lock stays:
removing it would be a race.
"""

import http.client
import importlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from kd_dist import lock
from kd_dist.errors import UserError, require_installed
from kd_dist.files import disk_full, publish, sha256_of, write_atomically

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is (0: unknown)

TRIES = 4  # in a row without a new byte
PAUSE_SECONDS = 1.0  # before the second try; doubles with each
TIMEOUT_SECONDS = 20.0  # without an answer, or without a byte
POLL_SECONDS = 0.5
CHUNK_BYTES = 1 << 20
PROGRESS_SECONDS = 5.0
RANGE_BYTES = 8 << 20  # asked for at once of an object store
DIGEST_BYTES = 1 << 16  # more than a file that `sha256sum` wrote has

DOWNLOADS = "KD_DIST_DOWNLOADS"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


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


def is_address(name: str) -> bool:
    """Whether a name is https://..., s3://... or the like, and not a path."""
    return ADDRESS.match(name) is not None


def file_name(source: str) -> str:
    """The last part of a path or address, without an address's query."""
    return PurePosixPath(re.sub(r"[?#].*", "", source) if "://" in source else source).name or source


# --------------------------------------------------------------------------------------------- one process, one rename


def make_once(target: Path, is_whole: Callable[[Path], bool], make: Callable[[], None], mend: str) -> None:
    """Have `target` made by one of the processes that call this at the same time, on any host that shares the disk.

    `make` makes it under another name, and then renames it to the target. The other processes return when it is there,
    or take over when the one at work dies. `mend` says what to do where the place cannot be written. Raises UserError.
    Hosts exclude each other as far as the file system's locks reach; where they do not, have it made beforehand.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, is_whole, mend) as to_do:
            if to_do:
                make()
    except OSError as error:
        if disk_full(error):
            message = f"no space left for {target}: make room, and the same command goes on where it stopped."
        else:
            message = f"cannot make {target} ({error}): {mend}."
        raise UserError(message) from error


@contextmanager
def _locked(target: Path, is_whole: Callable[[Path], bool], mend: str) -> Iterator[bool]:
    """Wait for the target or for its lock, whichever comes first; true: the lock is ours, the target not yet made."""
    while not _is_there(target, is_whole):
        ours = lock.take(target.with_name(f".{target.name}.lock"))
        if ours is None:
            time.sleep(POLL_SECONDS)
            continue
        try:
            if not ours.excludes:
                raise UserError(f"{target.parent} is on a filesystem without file locks: {mend}.")
            yield not _is_there(target, is_whole)
        finally:
            ours.release()
        return
    yield False


def _is_there(target: Path, is_whole: Callable[[Path], bool]) -> bool:
    os.listdir(target.parent)  # makes an NFS client look again, which may remember that the target was absent
    return is_whole(target)


# ------------------------------------------------------------------------------------------------------------ one file


def downloads() -> Path:
    """The folder for files that are named by address: $KD_DIST_DOWNLOADS, else kd_dist in the user's cache folder."""
    named = os.environ.get(DOWNLOADS)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named if named else f"{caches}/kd_dist").expanduser()


def fetch_file(address: str, progress: Progress | None = None) -> Path:
    """The file at an address, with its checksum file beside it, in a folder of `downloads` that its digest names; one
    that is there is not fetched again.

    The digest is what `#sha256=HEX` at the end of the address says, else what the file ADDRESS.sha256 says, which is
    read each time: another digest is another file, and no file is ever replaced. Raises UserError: no digest, another
    digest, no such address, no space, an extra that is missing.
    """
    address, _, pinned = address.partition("#sha256=")
    mend = "name another address or a file with --cache"
    digest = pinned.lower() if pinned else _digest_beside(address, mend)
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise UserError(f"{address}#sha256={pinned}: a SHA-256 has 64 hexadecimal digits, as sha256sum prints them.")
    target = downloads() / digest[:16] / file_name(address)

    def make() -> None:
        part = target.with_name(f"{target.name}.part")
        download(address, part, mend, progress)
        if (found := sha256_of(part)) != digest:
            discard(part)
            raise UserError(f"{address} has the SHA-256 {found} instead of {digest}: run this again, or {mend}.")
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        text = f"{digest}  {target.name}\n"
        write_atomically(target.with_name(f"{target.name}.sha256"), lambda file: file.write(text.encode()))
        publish(part, target)
        discard(part)

    make_once(target, Path.is_file, make, f"name with {DOWNLOADS} a folder that can be written")
    return target


def local_file(
    name: str | Path,
    once_a_node: Callable[[str, Callable[[], str]], str] = lambda task, work: work(),
    progress: Progress | None = None,
) -> Path:
    """The path that is named, or that of a file which is named by address, see `fetch_file`: one process of each node
    fetches it. Raises UserError.
    """
    if not is_address(str(name)):
        return Path(name)
    return Path(once_a_node(f"fetch {name}", lambda: str(fetch_file(str(name), progress))))


def _digest_beside(address: str, mend: str) -> str:
    """What the checksum file of an address says."""
    path, mark, query = address.partition("?")
    beside = f"{path}.sha256{mark}{query}"
    text = _tried(lambda: _small(beside, mend), lambda: 0, beside, mend)
    found = re.search(rb"^\\?([0-9a-f]{64})\b", text, re.MULTILINE)
    if found is None:
        raise UserError(
            f"{address} comes without a digest, {beside} does not hold one: put there what `sha256sum` prints, or add "
            "#sha256=HEX to the address."
        )
    return found[1].decode()


def _small(address: str, mend: str) -> bytes:
    """The content of a small file; empty where there is none."""
    try:
        with _opened(address, 0, None, mend) as reply:
            content = b""
            while len(content) < DIGEST_BYTES and (chunk := reply.read()):
                content += chunk
            return content
    except _Absent:
        return b""


# ------------------------------------------------------------------------------------------------------------ download


class _Dropped(Exception):
    """The connection failed or ended early; another try may resume from the bytes that came."""


class _Absent(UserError):
    """There is nothing at the address, or it is not for us."""


class _NotAPart(_Dropped):
    """The bytes so far are of another file than the one at the address."""


@dataclass(frozen=True)
class _Origin:
    """What a part file is a part of."""

    url: str
    validator: str | None  # of http a strong ETag or a Last-Modified date (RFC 9110, section 13.1.5), else fsspec's key
    total: int | None  # bytes


@dataclass(frozen=True)
class _Reply:
    """What came back from an address: the rest of a part, or else a whole file with its origin."""

    read: Callable[[], bytes]  # the next bytes, empty at the end
    origin: _Origin | None  # None: it goes on where the part ends


def download(url: str, part: Path, mend: str, progress: Progress | None = None) -> None:
    """Fetch an address into `part`, going on with the bytes that are already there when they are of the same file.

    A dropped connection is tried again, up to TRIES times without a new byte. Raises UserError when the server refuses
    or cannot be reached, with `mend` at its end; the bytes so far are kept.
    """
    _tried(lambda: _fetch_rest(url, part, mend, progress), lambda: _size(part), url, mend)


def _tried(work: Callable[[], T], size: Callable[[], int], url: str, mend: str) -> T:
    """What `work` gives, tried again where the connection drops, as long as `size` grows."""
    failures, most = 0, size()
    while True:
        try:
            return work()
        except _Dropped as error:
            failures = 1 if size() > most else failures + 1
            most = max(most, size())
            if failures >= TRIES:
                raise UserError(f"cannot fetch {url} ({error}): {mend}.") from error
        time.sleep(PAUSE_SECONDS * 2 ** (failures - 1))


def _fetch_rest(url: str, part: Path, mend: str, progress: Progress | None) -> None:
    origin = _read_origin(part, url)
    if origin and origin.total == _size(part):
        return
    try:
        with _opened(url, _size(part), origin, mend) as reply:
            if reply.origin is not None:
                origin = _begin(reply.origin, part)
            assert origin is not None  # only what has an origin is gone on with
            _append(reply, part, f"fetching {file_name(url)}", origin.total or 0, progress)
    except _NotAPart:
        discard(part)
        raise
    if origin.total is not None and _size(part) != origin.total:
        raise _Dropped(f"the connection ended after {_size(part):,} of {origin.total:,} bytes")


def _opened(url: str, start: int, origin: _Origin | None, mend: str) -> Any:
    """A context with the _Reply of an address: its bytes from `start` on if they are of `origin`, else all of them."""
    return (
        _http(url, start, origin, mend)
        if re.match("https?:", url, re.IGNORECASE)
        else _fsspec(url, start, origin, mend)
    )


@contextmanager
def _http(url: str, start: int, origin: _Origin | None, mend: str) -> Iterator[_Reply]:
    with _request(url, start, origin, mend) as response:

        def read() -> bytes:
            try:
                return response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _Dropped(str(error)) from error

        if origin and response.status == 206:
            _check_range(response, start, origin)
            yield _Reply(read, None)
        else:
            etag = response.headers.get("ETag")
            validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
            yield _Reply(read, _Origin(url, validator, response.length))


def _request(url: str, start: int, origin: _Origin | None, mend: str) -> http.client.HTTPResponse:
    """Ask for what is missing: the whole file, or the rest of it provided that it is still the same file."""
    headers = {"User-Agent": "kd_dist", "Accept-Encoding": "identity"}
    if origin and start:
        headers["Range"] = f"bytes={start}-"
        if origin.validator:
            headers["If-Range"] = origin.validator
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            raise _NotAPart(f"HTTP {error.code} {error.reason}") from error
        if error.code == 429 or error.code >= 500:
            raise _Dropped(f"HTTP {error.code} {error.reason}") from error
        raise _Absent(f"the server has no {url} (HTTP {error.code} {error.reason}): {mend}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(str(getattr(error, "reason", error))) from error
    except ValueError as error:
        raise UserError(f"{url} is not a URL that can be downloaded ({error}): {mend}.") from error


def _check_range(response: http.client.HTTPResponse, start: int, origin: _Origin) -> None:
    """Raise _NotAPart unless the reply goes on where the part ends and is of a file of the same size."""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not (span and int(span[1]) == start and span[2] in ("*", str(origin.total))):
        raise _NotAPart("the server sent another part of the file than asked for")


@contextmanager
def _fsspec(url: str, start: int, origin: _Origin | None, mend: str) -> Iterator[_Reply]:
    """An object store by its own client, a range of bytes at a time."""
    system, path = _file_system(url, mend)
    try:
        found = _Origin(url, str(system.ukey(path)), system.size(path))
    except (FileNotFoundError, PermissionError) as error:
        raise _Absent(f"there is no {url}, or it may not be read ({error}): {mend}.") from error
    except Exception as error:  # each client has errors of its own
        raise _Dropped(_in_a_line(error)) from error
    place = start if found == origin else 0

    def read() -> bytes:
        nonlocal place
        stop = place + RANGE_BYTES if found.total is None else min(place + RANGE_BYTES, found.total)
        if place >= stop:
            return b""
        try:
            content = system.cat_file(path, start=place, end=stop)
        except Exception as error:
            raise _Dropped(_in_a_line(error)) from error
        place += len(content)
        return content

    yield _Reply(read, None if found == origin else found)


def _file_system(url: str, mend: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    require_installed("remote", "fsspec")
    core = importlib.import_module("fsspec.core")
    try:
        return core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise UserError(
            f"{scheme}:// needs a package that is missing ({_in_a_line(error)}); install with `pip install "
            '"kd-dist[remote]"`.'
        ) from error
    except ValueError as error:
        raise UserError(f"{url} is not a URL that can be downloaded ({error}): {mend}.") from error
    except Exception as error:  # each client has errors of its own
        raise _Dropped(_in_a_line(error)) from error


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _begin(origin: _Origin, part: Path) -> _Origin:
    """Begin an empty part, and note first of what, so that no byte is ever there without its origin."""
    discard(part)
    write_atomically(_note(part), lambda file: file.write(json.dumps(asdict(origin)).encode()))
    return origin


def _append(reply: _Reply, part: Path, what: str, total: int, progress: Progress | None) -> None:
    with open(part, "ab") as file:
        while chunk := reply.read():
            file.write(chunk)
            if progress:
                progress(what, file.tell(), total)


def _read_origin(part: Path, url: str) -> _Origin | None:
    """What the part is a part of, or None when it is of another URL or cannot be told."""
    try:
        origin = _Origin(**json.loads(_note(part).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return origin if origin.url == url else None


def discard(part: Path) -> None:
    """Remove a part and what says what it is a part of."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
