"""A network's own logits on the images that it is scored on: val_logits.h5. h5py is imported where it is used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.errors import UserError
from kd_dist.files import write_atomically, writing

_VERSION = 1
_VAL_LOGITS = "kd_dist.val_logits"


def write_val_logits(
    path: Path, logits_NK: np.ndarray, labels_N: np.ndarray, paths: Sequence[str], fingerprint: str, **attrs: Any
) -> None:
    """Publish a model's raw logits on val as HDF5: /logits [N, K] float32, /label [N] int64, /path [N] UTF-8.

    Rows stand in the order of the sample list that `fingerprint` names; `attrs`, such as top1= in [0, 1], become
    attributes. A run under --tune writes the logits of its part of train: of= says which, and is "val" otherwise.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update({"format": _VAL_LOGITS, "version": _VERSION, "fingerprint": fingerprint, **attrs})
        file.create_dataset("logits", data=np.asarray(logits_NK, np.float32), fletcher32=True)
        file.create_dataset("label", data=np.asarray(labels_N, np.int64), fletcher32=True)
        file.create_dataset("path", data=np.array([name.encode() for name in paths]))
    with writing(path):
        write_atomically(path, lambda target: target.write(buffer.getbuffer()))


@dataclass(frozen=True)
class ValLogits:
    """A val_logits.h5 in memory: logits_NK float32, labels_N int64, the sample list's fingerprint, all attributes."""

    logits_NK: np.ndarray
    labels_N: np.ndarray
    paths: tuple[str, ...]
    fingerprint: str
    attrs: dict[str, Any]

    @property
    def of(self) -> str:
        """ "val", or the part of train that a run under --tune is scored on."""
        return self.attrs.get("of", "val")


def read_val_logits(path: Path) -> ValLogits:
    """What write_val_logits wrote. Raises UserError: missing, damaged, or not written by this program."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            attrs = dict(file.attrs)
            if attrs.get("format") != _VAL_LOGITS or attrs.get("version") != _VERSION:
                raise UserError(f"{path} was not written by this program as {_VAL_LOGITS} version {_VERSION}.")
            paths = tuple(name.decode() for name in file["path"][()])
            return ValLogits(file["logits"][()], file["label"][()], paths, attrs["fingerprint"], attrs)
    except FileNotFoundError:
        raise UserError(f"there is no {path}; finish the run first.") from None
    except (OSError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise UserError(f"{path} is truncated, damaged or not written by kd_dist.") from error
