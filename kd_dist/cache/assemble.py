"""One file out of all rows of a cache, written block by block with flat memory, then read again from end to end."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from kd_dist.cache.format import (
    CHUNK_SAMPLES,
    FLAG,
    Header,
    Table,
    binding_of,
    pieces_of,
    row_bytes,
    val_top1_of,
    with_val_top1,
)
from kd_dist.cache.parts import BLOCK_SAMPLES, Block, blocks
from kd_dist.cache.reader import read_cache
from kd_dist.cache.skeleton import LAYOUT, skeleton
from kd_dist.files import disk_full

INDEX_BYTES = 256  # more than HDF5 takes to find a chunk again: its checksum and its share of the index
SPARE_BYTES = 1 << 16

ReadBlock = Callable[[Block], tuple[np.ndarray, ...]]
"""block -> what each of Header.row_columns holds of it."""


def assemble(temporary: Path, header: Header, tables: Mapping[str, Table], read: ReadBlock) -> None:
    """Write the whole cache to `temporary`. `read` is asked for every block, more than once.

    Raises UserError and ValueError as opening does, and OSError on a full disk.
    """
    sources = {split: _Rows(header, split, table, read) for split, table in tables.items()}
    proofs = {"val_top1": val_top1_of(header, sources["val"].pieces, tables["val"].labels_N)}
    for split, rows in sources.items():
        proofs[f"{split}_rows"] = binding_of(tables[split], len(header.row_columns), rows.pieces)
    header = with_val_top1(header, proofs["val_top1"])
    _reserve(temporary, skeleton(header, tables, proofs), header, tables)
    with _opened(temporary) as file:
        for split, rows in sources.items():
            rows.write(file[split])
    read_cache(temporary, digest="", complete=False, memory=0)
    with _opened(temporary) as file:
        file.attrs.modify("complete", FLAG.type(1))


def _opened(path: Path) -> h5py.File:
    # Without a cache of chunks each goes straight to the file, whole, and they lie there in the order of writing.
    return h5py.File(path, "r+", libver=LAYOUT, locking=False, rdcc_nbytes=0)


@dataclass(frozen=True)
class _Rows:
    """Where the rows of one split come from."""

    header: Header
    split: str
    table: Table
    read: ReadBlock

    def pieces(self, position: int, view: int) -> Iterator[np.ndarray]:
        """What one of the row columns holds in a view, block by block."""
        for start in range(0, len(self.table), BLOCK_SAMPLES):
            yield self.read(Block(self.split, view, start, min(start + BLOCK_SAMPLES, len(self.table))))[position]

    def write(self, group: h5py.Group) -> None:
        """Fill the columns over N and V, one after the other, so that each lies in the file as it will be read."""
        for column, values in self.table.of_views.items():
            _fill(group[column.name], partial(pieces_of, values))
        for position, column in enumerate(self.header.row_columns):
            _fill(group[column.name], partial(self.pieces, position))


def _fill(dataset: h5py.Dataset, pieces: Callable[[int], Iterator[np.ndarray]]) -> None:
    for view in range(dataset.shape[1]):
        start = 0
        for values in pieces(view):
            dataset[start : start + len(values), view] = values
            start += len(values)


def _reserve(temporary: Path, start: bytes, header: Header, tables: Mapping[str, Table]) -> None:
    """Claim all space by plain system calls: HDF5 that meets a full disk itself may crash when the process ends.

    What HDF5 does not use of it, it gives back when it closes the file.
    """
    columns = (*tables["train"].of_views, *header.row_columns)
    widths = [row_bytes(column, header) for column in columns]
    rows = (min(len(tables[block.split]), CHUNK_SAMPLES) for block in blocks(tables))
    bound = len(start) + SPARE_BYTES + sum(count * width + INDEX_BYTES for count in rows for width in widths)
    with open(temporary, "wb") as file:
        file.write(start)
        try:
            os.posix_fallocate(file.fileno(), 0, bound)
        except (AttributeError, OSError) as error:  # some systems cannot claim space: then HDF5 takes it as it goes
            if disk_full(error):
                raise
