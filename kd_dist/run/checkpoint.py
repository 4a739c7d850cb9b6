"""Checkpoints and weights: files of torch with a SHA-256 of all their bytes at the end. torch is imported where it is
used, so that a login node can look at runs quickly.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_dist.errors import UserError
from kd_dist.files import write_atomically, writing
from kd_dist.run import events
from kd_dist.run.folder import RunFolder
from kd_dist.run.foreign import foreign_kind

if TYPE_CHECKING:
    import torch

_VERSION = 1
_CHECKPOINT, _MODEL = "kd_dist.checkpoint", "kd_dist.model"


_OUR_MARK = b"kd_dist."  # the format's name begins so, and torch.save does not compress it


_CHECKSUM_LENGTH = 64  # hex digits of a SHA-256


def save_checkpoint(folder: RunFolder, step: int, payload: Mapping[str, Any]) -> Path:
    """Publish a checkpoint of `step` and keep it with the one before it; rank 0 only.

    `payload` holds tensors, numbers, strings and containers of them (what torch.load(weights_only=True) takes). Raises
    UserError when it cannot be written, with the older checkpoints untouched.
    """
    path = folder.checkpoint(step)
    older = [saved for saved in folder.saved_steps() if saved < step]
    last = f"from {folder.checkpoint(older[-1])}" if older else "from the start, for there is no checkpoint yet"
    with writing(path, resumes=last):
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_torch(path, {"format": _CHECKPOINT, "version": _VERSION, "step": step, "payload": dict(payload)})
    events.emit(folder.path, events.Code.CHECKPOINT_WRITTEN, step=step)
    # A later step than this one is a damaged file that was passed over on resuming: it does not count as one to keep.
    for saved in set(folder.saved_steps()) - {step, *older[-1:]}:
        folder.checkpoint(saved).unlink(missing_ok=True)
    return path


def newest_checkpoint(
    folder: RunFolder, warn: Callable[[str], None] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint as (path, payload with "step"), on the CPU; None where there is no file at all.

    Damaged ones are passed over, and `warn` gets a sentence for each. Raises UserError when all are damaged.
    """
    damaged = []
    for step in reversed(folder.saved_steps()):
        path = folder.checkpoint(step)
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            damaged.append(str(path))
            if warn:
                warn(f"skipping a checkpoint: {error}")
    if damaged:
        names = ", ".join(damaged)
        raise UserError(f"no checkpoint can be read ({names}); restore one, or add --start-over to start from scratch.")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The payload of one checkpoint and its "step", on the CPU. Raises UserError: missing, damaged, not ours."""
    document = _read_torch(path, _CHECKPOINT)
    return {**document["payload"], "step": document["step"]}


def save_model(path: Path, payload: Mapping[str, Any]) -> None:
    """Publish a run's weights and what is worth knowing of them; `payload` as in save_checkpoint."""
    with writing(path):
        _write_torch(path, {"format": _MODEL, "version": _VERSION, "payload": dict(payload)})


def load_model(path: Path) -> dict[str, Any]:
    """What save_model wrote, on the CPU. Raises UserError: missing, damaged, or not written by this program."""
    return _read_torch(path, _MODEL)["payload"]


def weights_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over the weights in name order; it names a model, whatever file it is stored in.

    For each tensor, sorted by name: its name ("conv1.weight"), dtype ("float32") and shape ("64,3,7,7", "" for a
    scalar), each in UTF-8 after its length in bytes as 8 little-endian bytes, then the elements in C order,
    little-endian.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        plain = tensor.detach().cpu()
        for text in (name, str(plain.dtype).removeprefix("torch."), ",".join(map(str, plain.shape))):
            digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_torch(path: Path, document: dict[str, Any]) -> None:
    data = _with_checksum(document)
    write_atomically(path, lambda file: file.write(data.getbuffer()))


def _with_checksum(document: dict[str, Any]) -> io.BytesIO:
    """What torch.save writes, a zip archive, with the SHA-256 of all its bytes as the archive's comment at the end.

    torch.load reads it as ever. The records' own CRC-32 are not enough: torch.load does not look at them, and a flipped
    byte in the archive's directory leads it to other bytes of the file without an error.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(document, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_CHECKSUM_LENGTH.to_bytes(2, "little"))  # an archive ends with its comment's length, then the comment
    buffer.write(_checksum_of(buffer.getbuffer()))
    return buffer


def _checksum_of(data: memoryview) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _read_torch(path: Path, format_name: str) -> dict[str, Any]:
    """A document of ours. Raises UserError that names what the file is instead."""
    import torch

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no {path}; train first, or pass the right file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    if data[-_CHECKSUM_LENGTH:] != _checksum_of(memoryview(data)[:-_CHECKSUM_LENGTH]):
        if data.startswith(b"PK") and _OUR_MARK in data:
            raise UserError(
                f"{path} is truncated or damaged: the SHA-256 at its end does not match its content; copy it again, or "
                "train again."
            )
        raise UserError(
            f"{path} was not written by kd_dist: it is {foreign_kind(data)}, but a run's model.pt is needed; pass the "
            f"model.pt of a run. For a teacher trained elsewhere, use --teacher NAME --weights {path}, where NAME is "
            "torchvision:resnet34, for example."
        )
    try:
        document = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and plain values, so it was not loaded.") from error
    if not isinstance(document, dict) or document.get("format") != format_name or document.get("version") != _VERSION:
        raise UserError(f"{path} was not written by this program as {format_name} version {_VERSION}.")
    return document
