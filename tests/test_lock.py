"""The one kind of lock: who has it, for how long, and what others are told."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kd_dist import lock

REPOSITORY = Path(__file__).parents[1]
HOLD = (Path(__file__).parent / "programs/hold_lock.py").read_text()


@pytest.fixture(params=["alone", "fork"])
def holder(request, tmp_path):
    """A process that has the lock; with "fork" it has a child that outlives it."""
    command = [sys.executable, "-c", HOLD, tmp_path / "it.lock", request.param]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True) as other:
        assert int(other.stdout.readline()) == other.pid
        yield other
        os.killpg(other.pid, signal.SIGKILL)


def test_others_wait_and_are_told_who_has_it(holder, tmp_path):
    path = tmp_path / "it.lock"
    assert lock.take(path) is None and lock.is_taken(path)
    said = lock.holder(path)
    assert said.startswith(f"process {holder.pid} on ") and "python -c" in said and "\n" not in said
    os.kill(holder.pid, signal.SIGKILL)  # a child that it left does not hold it
    mine = lock.take(path, patience_s=20)
    assert mine is not None and mine.excludes
    assert lock.holder(path).startswith(f"process {os.getpid()} on ")
    mine.release()


def test_a_lock_that_was_never_taken_has_no_holder(tmp_path):
    assert not lock.is_taken(tmp_path / "none.lock") and not (tmp_path / "none.lock").exists()
    assert lock.holder(tmp_path / "none.lock") == "another process"


def test_a_file_system_without_locks_excludes_nobody(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    mine = lock.take(tmp_path / "it.lock")
    assert mine is not None and not mine.excludes
    with lock.locked(tmp_path / "it.lock"):
        pass


def test_a_full_disk_does_not_keep_the_lock_from_its_holder(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "pwrite", full)
    assert lock.take(tmp_path / "it.lock").excludes


def test_a_mapped_file_is_in_use_until_the_mark_goes(tmp_path):
    path = tmp_path / "images.u8"
    path.write_bytes(b"1")
    mark = lock.keep_in_use(path)
    with pytest.raises(BlockingIOError):
        lock.require_unused(path)
    os.close(mark)
    lock.require_unused(path)
