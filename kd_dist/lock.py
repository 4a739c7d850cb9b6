"""The one kind of lock: on a file of its own, for a run's folder, a study's documents, an image set or a cache that one
process makes for all.

It is a POSIX lock (fcntl). The kernel frees it when the process ends, however it ends, so none is ever left over; the
file stays, since to delete it would be a race. Children do not inherit it: loader processes that outlive a killed rank
hold nothing. Hosts that share the folder exclude each other as far as the file system carries locks, as NFS does. The
`filelock` package has neither: its locks are flock's, which children inherit, or files, which a killed process leaves.

One process may take a lock twice, and frees it by the first file that it closes: threads do not exclude each other.
"""

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

LOOK_AGAIN_S = 0.2
SHOWN = 160  # characters of the holder's command


@dataclass(frozen=True)
class Lock:
    """A lock that this process has until `release`, or until it ends. `excludes` is false on a file system without
    locks, where nothing keeps others out.
    """

    descriptor: int
    excludes: bool

    def release(self) -> None:
        """Let others have it."""
        os.close(self.descriptor)


def take(path: Path, patience_s: float = 0.0) -> Lock | None:
    """The lock of this name, or None where another process still has it after so many seconds. Raises OSError where
    the file cannot be made.
    """
    descriptor, deadline = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + patience_s
    while (excludes := _try(descriptor)) is None:
        if time.monotonic() >= deadline:
            os.close(descriptor)
            return None
        time.sleep(LOOK_AGAIN_S)
    if excludes:
        _sign(descriptor)
    return Lock(descriptor, excludes)


def is_taken(path: Path, patience_s: float = 0.0) -> bool:
    """Whether another process has the lock, and does not leave it within so many seconds. Not to be asked by a process
    that has it: to look would free it.
    """
    if not path.exists():
        return False
    try:
        lock = take(path, patience_s)
    except OSError:
        return False
    if lock is not None:
        lock.release()
    return lock is None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock, waiting for it; for work that takes no time. A file system without locks is taken at its word:
    there nothing is held.
    """
    lock = take(path, float("inf"))
    assert lock is not None  # it was waited for
    try:
        yield
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Who took the lock last, in words: "process 41 on node7 (python -m kd_dist.distill)"."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def _try(descriptor: int) -> bool | None:
    """True where the lock is ours now, False where there are no locks here, None where another process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return None
    except OSError:
        return False
    return True


def _sign(descriptor: int) -> None:
    """Write who has the lock into its file, for `holder`; a full disk is no reason not to have it."""
    command = shorten(shlex.join(["python", *sys.orig_argv[1:]]), SHOWN, placeholder=" ...")
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({command})\n".encode(), 0)


# ---- files that are mapped


def keep_in_use(path: Path) -> int:
    """Mark a file as mapped until the descriptor that this gives is closed, here and in every child that inherits it.

    A mark is a shared flock on the file itself: children have the mapping too, and any number may be there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks, where nothing is deleted either
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def require_unused(path: Path) -> None:
    """Raise OSError where a process has marked a file as mapped, or that cannot be found out."""
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
