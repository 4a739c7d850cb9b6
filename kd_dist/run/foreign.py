"""What a file of weights is that another program wrote, in words; nothing in it is run."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def foreign_kind(data: bytes) -> str:
    """What another program's weights file is, in words; nothing in it is run."""
    if not data.strip():
        return "an empty file"
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, such as a cache of logits"
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data):
        return "a safetensors file of another program"
    if data.startswith(b"PK"):
        return _foreign_torch_kind(data)
    if data.startswith(b"\x80"):
        return "a pickle of another program, as older versions of torch.save write"
    return "a file of another kind"


def _foreign_torch_kind(data: bytes) -> str:
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return "a file of another program that is cut short or damaged"
    if "constants.pkl" in names:
        return "a TorchScript module of another program"
    if "data.pkl" not in names:
        return "a zip archive of another kind"
    try:
        document = torch.load(io.BytesIO(data), map_location="meta", weights_only=True)
    except Exception:  # torch raises almost anything on a file that it cannot read
        return "a whole pickled network or checkpoint of another program"
    if isinstance(document, dict) and document and all(isinstance(value, torch.Tensor) for value in document.values()):
        return "a PyTorch state dict of another program"
    return "a PyTorch checkpoint of another program"
