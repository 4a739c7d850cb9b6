"""A cache named by address: fetched once, checked, gone on with, and refused in one sentence."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_dist import distill, errors, fetch, label, teacher
from kd_dist.cache import open_cache
from kd_dist.cache.__main__ import main as cache_main
from kd_dist.data.releases import locate
from kd_dist.dist.endings import StopRequest
from kd_dist.errors import UserError
from kd_dist.fetch import local_file
from launch.plans import _absolute
from tests.entries import call, refused
from tests.ranks import run_ranks
from tests.test_bad_input import TINY
from tests.test_cache_format import write_cache
from tests.test_exactness import open_tiny, small_teacher
from tests.test_fetch import REPOSITORY, Served, server_of

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """No waiting between tries, no proxy, and downloads of one's own."""
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("KD_DIST_DOWNLOADS", str(tmp_path / "downloads"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_cache(tmp_path_factory.mktemp("written") / "logits.h5")


class Shop:
    """What a server has: a cache and its checksum file."""

    def __init__(self, cache: Path):
        self.cache = Served(cache.read_bytes())
        self.digest = hashlib.sha256(self.cache.content).hexdigest()
        self.checksum: Served | None = Served(f"{self.digest}  logits.h5\n".encode())

    def find(self, path: str) -> Served | None:
        return {"/caches/logits.h5": self.cache, "/caches/logits.h5.sha256": self.checksum}.get(path)


@pytest.fixture
def shop(written) -> Iterator[Shop]:
    here = Shop(written)
    with server_of(here.find) as address:
        here.url = f"{address}/caches/logits.h5"
        yield here


def kept(tmp_path: Path) -> set[str]:
    """The files among the downloads."""
    folder = tmp_path / "downloads"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_cache_is_fetched_once_with_its_checksum_file(tmp_path, shop):
    path = local_file(shop.url)
    assert path == tmp_path / "downloads" / shop.digest[:16] / "logits.h5"
    assert open_cache(path).digest == shop.digest and open_cache(path).has_checksum
    folder = shop.digest[:16]
    assert kept(tmp_path) == {f"{folder}/{name}" for name in ("logits.h5", "logits.h5.sha256", ".logits.h5.lock")}
    assert local_file(shop.url) == path
    assert len(shop.cache.requests) == 1 and len(shop.checksum.requests) == 2


def test_a_path_stays_a_path():
    assert local_file("runs/teacher/logits.h5") == Path("runs/teacher/logits.h5")
    assert _absolute("s3://bucket/logits.h5") == "s3://bucket/logits.h5"


def test_the_users_cache_folder_is_where_no_other_is_named(monkeypatch):
    monkeypatch.delenv("KD_DIST_DOWNLOADS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert fetch.downloads() == Path("/caches/kd_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.downloads() == Path.home() / ".cache/kd_dist"


def test_a_cut_transfer_goes_on_at_the_next_start(tmp_path, shop):
    shop.cache.cut_after = [50_000, 0, 0, 0]
    assert "the connection ended after 50,000 of" in refusal(shop.url)
    assert (tmp_path / "downloads" / shop.digest[:16] / "logits.h5.part").stat().st_size == 50_000
    assert open_cache(local_file(shop.url)).digest == shop.digest
    assert shop.cache.requests[-1]["Range"] == "bytes=50000-"


def test_a_digest_in_the_address_needs_no_file_beside_it_and_no_network_later(shop):
    shop.checksum = None
    pinned = f"{shop.url}#sha256={shop.digest.upper()}"
    path = local_file(pinned)
    shop.cache.status = [500] * 9
    assert local_file(pinned) == path and len(shop.cache.requests) == 1


def test_another_cache_at_the_address_is_another_file(shop, tmp_path):
    first = local_file(shop.url)
    other = Shop(write_cache(tmp_path / "more.h5", views=3))
    shop.cache, shop.checksum = other.cache, other.checksum
    assert local_file(shop.url) != first and first.exists()


def refusal(address: str) -> str:
    with pytest.raises(UserError) as caught:
        local_file(address)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_what_cannot_be_fetched_is_one_sentence(tmp_path, shop, monkeypatch):
    missing = shop.url.replace("logits", "absent")
    assert "comes without a digest" in refusal(missing)
    assert "HTTP 404" in refusal(f"{missing}#sha256={'0' * 64}")
    assert f"SHA-256 {shop.digest} instead of {'0' * 64}" in refusal(f"{shop.url}#sha256={'0' * 64}")
    assert "has 64 hexadecimal digits" in refusal(f"{shop.url}#sha256=12")
    shop.checksum.content = b"no digest"
    assert "does not hold one" in refusal(shop.url)
    shop.checksum = None
    assert "sha256sum" in refusal(shop.url)
    shop.checksum = Served(b"x", status=[503] * 9)
    assert "HTTP 503" in refusal(shop.url)
    assert "is not a URL that can be downloaded" in refusal("nothing://a/b")
    assert not any("logits.h5" in name and not name.endswith(".lock") for name in kept(tmp_path))


def test_a_full_disk_is_one_sentence_and_the_bytes_stay(tmp_path, shop, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "publish", full)
        assert "no space left for" in refusal(shop.url)
    assert open_cache(local_file(shop.url)).digest == shop.digest
    assert len(shop.cache.requests) == 1


def test_an_extra_that_is_missing_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(errors.importlib.util, "find_spec", lambda name: None)
        assert 'pip install "kd-dist[remote]"' in refusal("s3://bucket/logits.h5")
    import fsspec.core

    def without_client(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_client)
    assert "Install s3fs" in refusal("s3://bucket/logits.h5") and "[remote]" in refusal("s3://bucket/logits.h5")


def fetched_by_rank(runtime, address: str, folder: str) -> str:
    os.environ.update(KD_DIST_DOWNLOADS=folder, no_proxy="*")
    path = local_file(address, runtime.once_a_node)
    return open_cache(path, runtime.once_a_node).digest


def test_two_ranks_fetch_once(tmp_path, shop):
    assert run_ranks(2, fetched_by_rank, shop.url, str(tmp_path / "downloads")) == [shop.digest] * 2
    assert len(shop.cache.requests) == 1 and len(shop.checksum.requests) == 1


def test_jobs_at_once_fetch_once(shop):
    command = [sys.executable, "-m", "kd_dist.cache", "info", shop.url]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, cwd=REPOSITORY, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert len(shop.cache.requests) == 1
    assert sum("fetching logits.h5" in stderr for _, stderr in said) == 1
    assert all(shop.digest in stdout for stdout, _ in said)


def test_a_student_learns_from_an_address(tiny_root, tmp_path, one_process, capsys):
    data, network = open_tiny(tiny_root), small_teacher(open_tiny(tiny_root).samples.classes)
    plan = label.plan([network], data, label.ViewRule(2, (0.4, 1.0), 5), "float32")
    labeller = label.Labeller([network], data, plan.header, one_process.device)
    label.write_cache(tmp_path / "logits.h5", plan, labeller, one_process, StopRequest(), lambda done, total: None)
    here = Shop(tmp_path / "logits.h5")
    words = ["--data", tiny_root, "--out", tmp_path / "student", *TINY, "--batch-size", 8]
    with server_of(here.find) as address:
        call(distill.main, *words, "--cache", f"{address}/caches/logits.h5")
        assert "comes without a digest" in refused(distill.main, *words, "--cache", f"{address}/none.h5")
    assert (tmp_path / "student/model.pt").exists()


def test_a_cache_is_not_written_to_an_address(tiny_root, tmp_path):
    words = ("--data", tiny_root, "--out", tmp_path / "run", "--cache", "s3://labels/logits.h5")
    assert (
        refused(teacher.main, *words) == "--cache s3://labels/logits.h5 must be a path: only readers take an address."
    )


# ---- object stores


@pytest.fixture(scope="module")
def s3():
    """An S3 of this machine, and a client of it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing"}
    names |= {"AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        client = s3fs.S3FileSystem()
        client.mkdir("labels")
        yield client
    server.stop()


def test_s3_is_fetched_in_ranges_and_gone_on_with(s3, written, tmp_path, monkeypatch):
    digest = open_cache(written).digest
    s3.pipe("labels/logits.h5", written.read_bytes())
    s3.pipe("labels/logits.h5.sha256", f"{digest}  logits.h5\n".encode())
    monkeypatch.setattr(fetch, "RANGE_BYTES", 40_000)
    client, asked = type(s3), []

    async def failing(self, path, start=None, end=None, real=client._cat_file, **options):
        asked.append(start)
        if path.endswith(".h5") and start and len(asked) < 7:
            raise OSError("no answer")
        return await real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(client, "_cat_file", failing)
    assert "no answer" in refusal("s3://labels/logits.h5")
    assert open_cache(local_file("s3://labels/logits.h5")).digest == digest
    rest = asked[6:]
    assert 0 not in rest[1:] and 40_000 in rest  # the first is the checksum file
    before = len(asked)
    cache_main(["info", "s3://labels/logits.h5"])
    assert len(asked) == before + 1


def test_what_is_missing_in_s3_is_one_sentence(s3):
    assert "comes without a digest" in refusal("s3://labels/none.h5")
    assert "there is no s3://labels/none.h5" in refusal(f"s3://labels/none.h5#sha256={'0' * 64}")


def test_an_archive_comes_by_the_same_door(s3, generated_root, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "tiny"), "gztar", generated_root)
    s3.put(archive, "labels/tiny.tar.gz")
    assert (locate(tmp_path / "data", "tiny", "s3://labels/tiny.tar.gz", None, explicit=True) / "train").is_dir()
