"""The lock of a run's folder: one process at a time trains there."""

from kd_dist import lock
from kd_dist.errors import UserError
from kd_dist.run.folder import RunFolder

_LOCK_PATIENCE_S = 20.0  # a killed launcher's ranks notice within seconds and let go


def make_and_lock(folder: RunFolder) -> None:
    """Make the folder and hold its lock until this process ends, waiting a while for an earlier attempt of this job
    that is on its way out. Raises UserError: in use, or cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        ours = lock.take(folder.lock, _LOCK_PATIENCE_S)
    except OSError as error:
        raise UserError(
            f"--out {folder.path} cannot be written ({error.strerror or error}); choose another --out."
        ) from error
    if ours is None:
        raise UserError(
            f"--out {folder.path} is in use by {lock.holder(folder.lock)}; wait for it or choose another --out."
        )


def acquire(folder: RunFolder) -> bool:
    """Lock a run's folder, made where it is missing, for this process until it ends; False where another process has
    it. For a process that takes any run that is free: one that must have this run uses `claim`, which waits a while.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        return lock.take(folder.lock) is not None
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written ({error.strerror or error}).") from error


def in_use(folder: RunFolder) -> bool:
    """Whether another process has claimed the folder, and does not leave it soon. Not for one that this process has
    claimed: to look would free it.
    """
    return lock.is_taken(folder.lock, _LOCK_PATIENCE_S)
