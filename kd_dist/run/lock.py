"""The lock of a run's folder: one process at a time trains there.

It is a POSIX lock: children do not inherit it, so loader workers that outlive a killed rank do not hold the folder. The
`filelock` package takes flock's locks, which children inherit.
"""

from __future__ import annotations

import fcntl
import os
import time

from kd_dist.errors import UserError
from kd_dist.run.folder import RunFolder

_LOCK_PATIENCE_S = 20.0  # a killed launcher's ranks notice within seconds and let go


def make_and_lock(folder: RunFolder) -> None:
    """Make the folder and hold its lock until this process ends. Raises UserError: in use, or cannot be written."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"--out {folder.path} cannot be written ({error.strerror or error}); choose another --out."
        ) from error
    if not _locked_in_time(descriptor):
        os.close(descriptor)
        raise UserError(f"--out {folder.path} is in use by another process; wait for it or choose another --out.")


def acquire(folder: RunFolder) -> bool:
    """Lock a run's folder, made where it is missing, for this process until it ends; False where another process has
    it. For a process that takes any run that is free: one that must have this run uses `claim`, which waits a while.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written ({error.strerror or error}).") from error
    if not (ours := _locked(descriptor)):
        os.close(descriptor)
    return ours


def in_use(folder: RunFolder) -> bool:
    """Whether another process has claimed the folder, and does not leave it soon. Not for one that this process has
    claimed: to look would free it.
    """
    try:
        descriptor = os.open(folder.lock, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _locked_in_time(descriptor)
    finally:
        os.close(descriptor)


def _locked_in_time(descriptor: int) -> bool:
    """Take the lock, waiting a while for an earlier attempt of this job that is on its way out."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while not _locked(descriptor):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _locked(descriptor: int) -> bool:
    """Try the lock once. The descriptor stays open: the lock goes when the process ends, however it ends."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: the user has to see to it
        return True
    return True
