"""Columns that stay on file: rows are read as they are asked for, in the order of the file, with flat memory.

HDF5 says where its chunks lie; they hold plain rows and a checksum, so that rows are read past HDF5, many by one system
call. That what is read this way is right is proved when the cache is opened: the digests of the rows are computed from
it.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kd_dist.errors import UserError

SPAN_BYTES = 1 << 20  # read at once at most
GAP_BYTES = 1 << 14  # what is read and thrown away rather than read by another call
CHECKSUM_BYTES = 4


class Source:
    """A file held open, so that one which takes its place does not mix with it. Other processes get it by fork or by
    pickle.

    Raises UserError, when it is read or unpickled, where the content is no longer what it was.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open()
        self._state, self._digest = self.state, ""

    def _open(self) -> None:
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - held open as long as this object lives

    @property
    def state(self) -> tuple[int, ...]:
        """What tells this file from another, or from itself before a change."""
        return state_of(os.fstat(self._file.fileno()))

    def digest(self) -> str:
        """Hex SHA-256 of the whole file."""
        sha256, buffer = hashlib.sha256(), bytearray(SPAN_BYTES)
        start = 0
        while got := os.preadv(self._file.fileno(), [buffer], start):
            sha256.update(memoryview(buffer)[:got])
            start += got
        self._digest = sha256.hexdigest()
        return self._digest

    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on. Raises ValueError where the file ends before that."""
        done = 0
        while done < len(into):
            got = os.preadv(self._file.fileno(), [into[done:]], start + done)
            if got == 0:
                raise ValueError(f"the file ends at byte {start + done}, rows go on to {start + len(into)}")
            done += got

    def gather(self, starts_B: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes from each of these ascending positions on: void [B]."""
        found_B = np.empty(len(starts_B), np.dtype((np.void, size)))
        buffer = bytearray(max(SPAN_BYTES, size))
        edges = np.flatnonzero(np.diff(starts_B) > GAP_BYTES + size) + 1
        low = 0
        for edge in (*edges.tolist(), len(starts_B)):
            while low < edge:
                start = int(starts_B[low])
                reach = int(np.searchsorted(starts_B[low:edge], start + len(buffer) - size, "right"))
                bytes_read = int(starts_B[low + reach - 1]) + size - start
                self.read(start, memoryview(buffer)[:bytes_read])
                anywhere = np.ndarray(bytes_read - size + 1, found_B.dtype, buffer, strides=(1,))
                found_B[low : low + reach] = anywhere[starts_B[low : low + reach] - start]
                low += reach
        self.require_unchanged()
        return found_B

    def require_unchanged(self) -> None:
        """Raise UserError where the content changed. A new time stamp alone is no change."""
        state = self.state
        if state != self._state:
            before = self._digest
            if self.digest() != before:
                raise UserError(
                    f"the cache {self.path} was changed while it was being read: put the file back that this run began "
                    "with, then run the same command again."
                )
            self._state = state

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
        self.require_unchanged()


def state_of(status: os.stat_result) -> tuple[int, ...]:
    """Device, number, size and time of change of a file."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Stored:
    """A column over N and V on file, indexed like the array it stands for: [index_B, view_B] gives those rows,
    [start:stop, view] a piece of one view, [:, :v] the column with the first v views only.
    """

    source: Source
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, int]  # samples and views in a chunk
    starts: np.ndarray  # byte at which each chunk begins, int64 [chunks over N, chunks over V]

    def __getitem__(self, key: tuple[Any, Any]) -> Any:
        samples, views = key
        if isinstance(views, slice):
            if samples != slice(None):
                raise IndexError("a column on file gives rows by [index, view]; its views are cut by [:, :v]")
            return replace(self, shape=(self.shape[0], len(range(self.shape[1])[views]), *self.shape[2:]))
        if not isinstance(samples, slice) and np.ndim(samples) == 0:
            return self[np.array([samples]), views][0]
        index_B = np.arange(*samples.indices(self.shape[0])) if isinstance(samples, slice) else np.asarray(samples)
        return self._take(index_B, np.broadcast_to(np.asarray(views), index_B.shape))

    def _take(self, index_B: np.ndarray, view_B: np.ndarray) -> np.ndarray:
        for what_B, limit in ((index_B, self.shape[0]), (view_B, self.shape[1])):
            if what_B.size and (what_B.min() < 0 or what_B.max() >= limit):
                raise IndexError(f"rows outside of {list(self.shape)} were asked for")
        row_shape = self.shape[2:]
        row_bytes = int(np.prod(row_shape, dtype=int)) * self.dtype.itemsize
        chunk_B, place_B = np.divmod(index_B, self.chunk[0])
        chunk_view_B, view_place_B = np.divmod(view_B, self.chunk[1])
        start_B = self.starts[chunk_B, chunk_view_B] + (place_B * self.chunk[1] + view_place_B) * row_bytes
        order_B = np.argsort(start_B, kind="stable")
        found_B = np.empty(len(start_B), np.dtype((np.void, row_bytes)))
        found_B[order_B] = self.source.gather(start_B[order_B], row_bytes)
        return found_B.view(self.dtype).reshape(len(start_B), *row_shape)


def stored(dataset: h5py.Dataset, source: Source) -> Stored:
    """The column that a dataset of this file holds. Raises ValueError where its chunks are not whole rows."""
    chunk, shape = dataset.chunks, dataset.shape
    if chunk[2:] != shape[2:]:
        raise ValueError(f"{dataset.name[1:]} is stored in chunks of {list(chunk)}, which cut rows")
    size = int(np.prod(chunk)) * dataset.dtype.itemsize + CHECKSUM_BYTES
    starts = np.full([-(-length // step) for length, step in zip(shape[:2], chunk[:2], strict=True)], -1, np.int64)

    def note(info: Any) -> None:
        if info.size != size or info.filter_mask:
            raise ValueError(f"{dataset.name[1:]} has a chunk of {info.size} bytes instead of {size}")
        starts[info.chunk_offset[0] // chunk[0], info.chunk_offset[1] // chunk[1]] = info.byte_offset

    dataset.id.chunk_iter(note)
    if (starts < 0).any():
        raise ValueError(f"{dataset.name[1:]} lacks chunks")
    return Stored(source, shape, dataset.dtype, chunk[:2], starts)
