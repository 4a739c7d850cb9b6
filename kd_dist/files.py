"""Files that are either whole or absent: atomic publishing, small documents, digests; what a full disk looks like."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kd_dist.errors import UserError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place with one rename.

    A reader sees the old file or the new one, never half of either; a crash leaves the old one. On any error the
    temporary file is removed and the error goes on.
    """
    # Nodes may share the folder, and threads the process.
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this name against other processes of this machine, waiting for it however long that takes.

    A file system without locks is taken at its word: there nothing is held.
    """
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to its name and make the rename itself durable."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free(target: Path) -> None:
    """Raise UserError unless the folder that --to names is missing or empty."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--to {target} exists already and is not an empty folder; name another one.")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` with one rename when the block ends, and goes when it raises.

    Raises UserError where the target is there and not empty, and on a failed write.
    """
    require_free(target)
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with writing(target, goes_on="from the start"):
            temporary.mkdir(parents=True)
            yield temporary
            _sync_tree(temporary)
            publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush all files below a folder to disk, and then their folders' entries."""
    for path in folder.iterdir():
        if path.is_dir():
            _sync_tree(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(error: BaseException | None) -> bool:
    """Whether an error means that no more can be written: disk full, quota used up, or file size limit.

    h5py and torch raise errors of their own around the system's, so the chain of causes and the text are looked at too.
    """
    while error is not None:
        if getattr(error, "errno", None) in _NO_SPACE:
            return True
        text = str(error)
        if any(os.strerror(number) in text or f"errno = {number}," in text for number in _NO_SPACE):
            return True
        if "unexpected pos" in text:  # torch.save's words when a write came back short
            return True
        error = error.__cause__ or error.__context__
    return False


def read_json(path: Path, mend: str) -> dict[str, Any] | None:
    """A small document, None where there is none. Raises UserError where it cannot be read; `mend` is its ending."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {mend}") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Publish a small document. Raises UserError where it cannot be written."""
    write_bytes(path, (json.dumps(document, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Publish a small file. Raises UserError where it cannot be written."""
    with writing(path):
        write_atomically(path, lambda file: file.write(data))


@contextlib.contextmanager
def writing(path: Path, goes_on: str = "where it stopped") -> Iterator[None]:
    """Turn what the system says on a failed write into a UserError that names the path and how to go on."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if disk_full(error):
            message = f"no space left to write {path}; free some and type the same command again: it goes on {goes_on}."
        elif isinstance(error, OSError):
            message = (
                f"{path} cannot be written ({error.strerror or error}); mend that and type the same command again."
            )
        else:
            raise
        raise UserError(message) from error
