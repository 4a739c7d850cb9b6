"""Getting a set onto a disk, with a server of our own: resume, refusals, hostile archives, many processes at once."""

import errno
import gzip
import hashlib
import io
import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd_dist import dataset, fetch, lock
from kd_dist.data import archives, generated
from kd_dist.data.layout import is_set
from kd_dist.data.releases import DEFAULT_RELEASE, RELEASES, Release, locate
from kd_dist.data.scan import scan
from kd_dist.errors import UserError
from kd_dist.files import sha256_of

REPOSITORY = Path(__file__).parents[1]


@dataclass
class Served:
    """A file on a local server, how the server misbehaves, and what it was asked."""

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes of the body before the connection is closed, by request
    status: list[int] = field(default_factory=list)  # by request; 200 when used up
    skip: int = 0  # bytes left out at the start of a later part
    requests: list[dict[str, str]] = field(default_factory=list)  # their headers
    url: str = ""


@contextmanager
def server_of(find: Callable[[str], Served | None]) -> Iterator[str]:
    """A server on this machine of the files that `find` knows by their path: its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(find)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _handler(find: Callable[[str], Served | None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served = find(self.path.partition("?")[0])
            if served is None:
                return self.send_error(404)
            served.requests.append(dict(self.headers))
            if served.status and (status := served.status.pop(0)) != 200:
                return self.send_error(status)
            self._send(served, *self._part(served))

        def _part(self, served: Served) -> tuple[int, bytes]:
            """(first byte, body) as the Range and If-Range headers ask for."""
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range", served.etag) == served.etag
            start = int(asked[1]) + served.skip if asked and same and served.ranges else 0
            return start, served.content[start:]

        def _send(self, served: Served, start: int, body: bytes) -> None:
            if start >= len(served.content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
            if served.etag:
                self.send_header("ETag", served.etag)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: served.cut_after.pop(0)] if served.cut_after else body)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries, and no proxy between us and our server."""
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(fetch, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def served(archive: Path) -> Iterator[Served]:
    """The archive on a server of this test's own."""
    file = Served(archive.read_bytes())
    with server_of(lambda path: file) as address:
        file.url = f"{address}/mirror/tiny.tgz?token=1"
        yield file


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    generated.generate(folder, train_per_class=3, val_per_class=1, classes=2)
    return folder


@pytest.fixture
def archive(small_set: Path, tmp_path: Path) -> Path:
    """A gzipped tar with one top folder, as the releases have it."""
    with tarfile.open(tmp_path / "tiny.tgz", "w:gz") as tar:
        tar.add(small_set, "tiny-by-another-name")
    return tmp_path / "tiny.tgz"


def _get(data: Path, archive: object, sha256: str | None = None) -> Path:
    return locate(data, None, str(archive), sha256, explicit=True)


def _nothing_usable(data: Path) -> bool:
    return not is_set(data) and not any(is_set(path) for path in data.iterdir() if not path.name.startswith("."))


# ------------------------------------------------------------------------------------------------------------ download


def test_download_is_unpacked_and_leaves_nothing_else(tmp_path: Path, served: Served, small_set: Path):
    root = _get(tmp_path / "data", served.url, sha256_of(tmp_path / "tiny.tgz").upper())
    assert root == tmp_path / "data/tiny"
    assert scan(root).train.fingerprint == scan(small_set).train.fingerprint
    assert sorted(path.name for path in root.parent.iterdir()) == [".tiny.lock", "tiny"]
    assert _get(tmp_path / "data", served.url) == root
    assert len(served.requests) == 1


def test_dropped_connection_is_resumed_where_it_stopped(tmp_path: Path, served: Served):
    served.cut_after = [1000, 500]
    assert is_set(_get(tmp_path / "data", served.url))
    assert [request.get("Range") for request in served.requests] == [None, "bytes=1000-", "bytes=1500-"]
    assert [request.get("If-Range") for request in served.requests] == [None, '"one"', '"one"']


def test_second_start_resumes_the_first(tmp_path: Path, served: Served):
    served.cut_after = [1000, 0, 0, 0]
    with pytest.raises(UserError, match="1,000 of"):
        _get(tmp_path / "data", served.url)
    assert _nothing_usable(tmp_path / "data")
    assert is_set(_get(tmp_path / "data", served.url))
    assert served.requests[-1]["Range"] == "bytes=1000-"


def test_whole_part_of_a_killed_start_is_not_fetched_again(
    tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch
):
    def disk_full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write_member", disk_full)
        with pytest.raises(UserError, match=r"no space left for .*data/tiny"):
            _get(tmp_path / "data", served.url)
    assert is_set(_get(tmp_path / "data", served.url))
    assert len(served.requests) == 1


def _change(served: Served, part: Path, change: str) -> None:
    if change == "no ranges":
        served.ranges = False
    elif change == "another file":
        served.etag = '"two"'
    elif change == "another range":
        served.skip = 7
    elif change == "another address":
        served.url = served.url.replace("/mirror", "/other")
    elif change == "too long":
        part.write_bytes(b"x" * 100_000)
    elif change == "note lost":
        part.with_name("tiny.part.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "ranges"),
    [
        ("no ranges", ["bytes=1000-"]),
        ("another file", ["bytes=1000-"]),
        ("another range", ["bytes=1000-", None]),
        ("another address", [None]),
        ("too long", ["bytes=100000-", None]),
        ("note lost", [None]),
    ],
)
def test_part_that_does_not_fit_is_started_over(tmp_path: Path, served: Served, change: str, ranges: list[str | None]):
    served.cut_after = [1000, 0, 0, 0]
    with pytest.raises(UserError):
        _get(tmp_path / "data", served.url)
    _change(served, tmp_path / "data/tiny.part", change)
    assert is_set(_get(tmp_path / "data", served.url, sha256_of(tmp_path / "tiny.tgz")))
    assert [request.get("Range") for request in served.requests[4:]] == ranges


def test_without_a_validator_another_size_starts_over(tmp_path: Path, served: Served):
    served.etag, served.cut_after = None, [1000, 0, 0, 0]
    whole = served.content
    served.content = b"x" * (len(whole) + 100)
    with pytest.raises(UserError):
        _get(tmp_path / "data", served.url)
    served.content = whole
    assert is_set(_get(tmp_path / "data", served.url))
    assert [request.get("Range") for request in served.requests[-2:]] == ["bytes=1000-", None]


def test_server_that_never_gets_further_is_given_up(tmp_path: Path, served: Served):
    served.ranges, served.cut_after = False, [1000] * 50
    with pytest.raises(UserError, match="the connection ended after 1,000 of"):
        _get(tmp_path / "data", served.url)
    assert len(served.requests) == fetch.TRIES


def test_busy_server_is_asked_again(tmp_path: Path, served: Served):
    served.status = [503, 429]
    assert is_set(_get(tmp_path / "data", served.url))
    assert len(served.requests) == 3


def test_missing_file_is_said_at_once(tmp_path: Path, served: Served):
    served.status = [404]
    with pytest.raises(UserError, match=r"tiny\.tgz.*HTTP 404.*--archive"):
        _get(tmp_path / "data", served.url)
    assert len(served.requests) == 1


def test_no_network_names_the_address_and_the_ways_out(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/tiny.tgz"
        with pytest.raises(UserError, match=r"tiny\.tgz.*--archive.*python -m kd_dist\.dataset") as caught:
            _get(tmp_path / "data", url)
    assert url in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_digest_keeps_nothing(tmp_path: Path, served: Served):
    with pytest.raises(UserError) as caught:
        _get(tmp_path / "data", served.url, "0" * 64)
    assert "0" * 64 in str(caught.value) and sha256_of(tmp_path / "tiny.tgz") in str(caught.value)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".tiny.lock"]


def test_error_page_instead_of_an_archive_keeps_nothing(tmp_path: Path, served: Served):
    served.content = b"<html>please log in</html>" * 100
    with pytest.raises(UserError, match="no tar archive"):
        _get(tmp_path / "data", served.url)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".tiny.lock"]


@pytest.fixture
def default_release(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The server's archive as the release that is fetched when nobody names one."""
    release = Release(DEFAULT_RELEASE, "", served.url, hashlib.sha256(served.content).hexdigest())
    monkeypatch.setitem(RELEASES, release.name, release)
    return served


def test_default_release_is_fetched_where_no_folder_was_chosen(
    tmp_path: Path, default_release: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KD_DIST_DATA", raising=False)
    assert dataset.main([]) == 0
    assert capsys.readouterr().out.startswith("imagewoof2-160 in ")
    assert is_set(tmp_path / "data/imagewoof2-160")


def test_release_is_checked_against_its_known_digest_or_the_one_given(tmp_path: Path, default_release: Served):
    known = hashlib.sha256(default_release.content).hexdigest()
    with pytest.raises(UserError, match="instead of 2222"):
        locate(tmp_path / "given", None, None, "2" * 64, explicit=False)
    default_release.content = default_release.content + b"\0"
    with pytest.raises(UserError, match=f"instead of {known}"):
        locate(tmp_path / "known", None, None, None, explicit=False)


# ------------------------------------------------------------------------------------------------------- local archives


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize("pack", [bytes, _gzip, lzma.compress])
def test_local_archive_of_any_packing_is_unpacked_and_left_alone(
    tmp_path: Path, archive: Path, pack: Callable[[bytes], bytes]
):
    source = tmp_path / "copy of it.tar.packed"
    source.write_bytes(pack(gzip.decompress(archive.read_bytes())))
    root = locate(tmp_path / "data", "mine", str(source), sha256_of(source), explicit=True)
    assert (root, len(scan(root).train)) == (tmp_path / "data/mine", 6)
    assert source.exists()


def test_file_url_and_archive_without_top_folder(tmp_path: Path, small_set: Path):
    with tarfile.open(tmp_path / "flat set.tar", "w") as tar:
        tar.add(small_set, ".")
    root = locate(tmp_path, "flat", f"file://{tmp_path}/flat%20set.tar", None, explicit=True)
    assert len(scan(root).train) == 6


def test_local_archive_with_wrong_digest_is_refused_and_kept(tmp_path: Path, archive: Path):
    with pytest.raises(UserError, match="instead of 1111"):
        _get(tmp_path / "data", archive, "1" * 64)
    assert archive.exists() and _nothing_usable(tmp_path / "data")


@pytest.mark.parametrize("damage", ["cut", "plain cut between files", "bad header", "bad sum", "no end", "no archive"])
def test_damaged_archive_is_refused(tmp_path: Path, archive: Path, damage: str):
    packed, plain = archive.read_bytes(), gzip.decompress(archive.read_bytes())
    with tarfile.open(archive) as tar:
        middle = tar.getmembers()[-2].offset
    archive.write_bytes(
        {
            "cut": packed[: len(packed) // 2],
            "plain cut between files": plain[:middle],
            "bad header": plain[:middle] + b"#" * 512 + plain[middle + 512 :],
            "bad sum": packed[:-8] + bytes(4) + packed[-4:],
            "no end": packed[:-8],
            "no archive": b"PK\3\4" + packed,
        }[damage]
    )
    with pytest.raises(UserError, match=r"tiny\.tgz is damaged, cut short, or no tar archive") as caught:
        _get(tmp_path / "data", archive)
    assert "\n" not in str(caught.value)
    assert _nothing_usable(tmp_path / "data")


def _hostile(kind: str, outside: Path) -> tarfile.TarInfo:
    entry = tarfile.TarInfo({"absolute": f"{outside}/absolute", "up": "tiny/../../../up"}.get(kind, f"tiny/{kind}"))
    types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    entry.type = types.get(kind, tarfile.REGTYPE)
    entry.linkname = "/etc/passwd" if kind == "link" else "tiny/train" if kind == "hard link" else ""
    return entry


@pytest.mark.parametrize("kind", ["link", "hard link", "device", "pipe", "absolute", "up"])
def test_hostile_entry_is_refused_by_name(tmp_path: Path, small_set: Path, kind: str):
    entry = _hostile(kind, tmp_path)
    with tarfile.open(tmp_path / "tiny.tar", "w") as tar:
        tar.add(small_set, "tiny")
        tar.addfile(entry, io.BytesIO())
    with pytest.raises(UserError, match=re.escape(repr(entry.name))):
        _get(tmp_path / "data", tmp_path / "tiny.tar")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".tiny.lock"]
    assert not (tmp_path / "up").exists() and not (tmp_path / "absolute").exists()


def test_link_cannot_be_written_through(tmp_path: Path, small_set: Path):
    link = tarfile.TarInfo("tiny/out")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    with tarfile.open(tmp_path / "tiny.tar", "w") as tar:
        tar.add(small_set, "tiny")
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("tiny/out/written"), io.BytesIO())
    with pytest.raises(UserError):
        _get(tmp_path / "data", tmp_path / "tiny.tar")
    assert not (tmp_path / "written").exists()


def test_archive_of_something_else_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "notes.tar", "w") as tar:
        tar.add(__file__, "notes/test.py")
    with pytest.raises(UserError, match="holds 0 data sets"):
        _get(tmp_path / "data", tmp_path / "notes.tar")


def test_folder_in_the_way_is_not_touched(tmp_path: Path, archive: Path):
    (tmp_path / "data/tiny/train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data/tiny exists but is not a data set"):
        _get(tmp_path / "data", archive)
    assert (tmp_path / "data/tiny/train").exists()


def test_place_that_cannot_be_written_is_named(tmp_path: Path, archive: Path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*a file/data/tiny"):
        _get(tmp_path / "a file/data", archive)


# ---------------------------------------------------------------------------------------------- dying, and many at once


def test_error_in_the_middle_leaves_no_set(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch):
    written, real = [], archives._write_member

    def dies_at_the_last_but_one(tar, member, *rest) -> None:
        written.append(member.name)
        if len(written) == 12:
            raise KeyboardInterrupt
        real(tar, member, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write_member", dies_at_the_last_but_one)
        with pytest.raises(KeyboardInterrupt):
            _get(tmp_path / "data", archive)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".tiny.lock"]
    assert len(scan(_get(tmp_path / "data", archive)).train) == 6


_KILL_WHILE_UNPACKING = (Path(__file__).parent / "programs/killed_while_unpacking.py").read_text()


def test_killed_process_leaves_no_set_and_the_next_one_clears_up(tmp_path: Path, archive: Path):
    killed = subprocess.run([sys.executable, "-c", _KILL_WHILE_UNPACKING, tmp_path / "data", archive], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".tiny.lock", ".tiny.making"]
    assert is_set(tmp_path / "data/.tiny.making/tiny-by-another-name")
    assert _nothing_usable(tmp_path / "data")
    (tmp_path / "data/.tiny.making/tiny-by-another-name/train/left").mkdir()
    assert len(scan(_get(tmp_path / "data", archive)).train) == 6
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".tiny.lock", "tiny"]


def test_processes_at_once_fetch_once(tmp_path: Path, served: Served):
    command = [sys.executable, "-m", "kd_dist.dataset", "--data", tmp_path / "data", "--archive", served.url]
    running = [
        subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert len(served.requests) == 1
    assert sum("fetching tiny.tgz" in stderr for _, stderr in said) == 1
    assert len({stdout for stdout, _ in said}) == 1


_FAIL_WHEN_TOLD = (Path(__file__).parent / "programs/fail_when_told.py").read_text()


def test_waiting_one_takes_over_from_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    def works(folder: Path) -> None:
        made.append(folder)
        for split in ("train", "val"):
            (folder / split).mkdir()

    command = [sys.executable, "-c", _FAIL_WHEN_TOLD, tmp_path]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "begun\n"
        told = SimpleNamespace(sleep=lambda seconds: (tmp_path / "told").touch())
        monkeypatch.setattr(fetch, "time", told)  # it waits, so the other one may fail now
        archives.make_folder(tmp_path / "it", is_set, works)
        assert "no network" in other.communicate()[1]
    assert len(made) == 1 and is_set(tmp_path / "it")


def test_filesystem_without_locks_is_said(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with pytest.raises(UserError, match="without file locks"):
        _get(tmp_path / "data", archive)
