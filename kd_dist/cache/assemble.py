"""One file out of all shards of a cache, in one pass: each shard is read once, its logits are hashed and written to
their place, and the finished file is read once for its digest.

Nothing in the file depends on the clock or the machine, so the same plan and the same logits give the same bytes.
HDF5's oldest file layout is used, which every version of the library reads.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from kd_dist.cache.format import (
    CHECK_ATTRIBUTES,
    FLAG,
    FLOAT,
    FORMAT,
    HEADER_ATTRIBUTES,
    INT,
    PATH,
    TAIL_TEMPERATURES,
    TEACHER_COLUMNS,
    TEMPERATURE,
    TEXT,
    VERSION,
    Column,
    Header,
    Table,
    checksum_of,
    hits_of,
    little_endian,
    pieces_of,
    shape_of,
)
from kd_dist.cache.plan import BLOCK_SAMPLES, Block, CachePlan
from kd_dist.files import disk_full, sha256_of

LAYOUT = "earliest"
ALIGNMENT = 64  # bytes: columns are mapped into memory, where numbers should lie at multiples of their size
SPARE_BYTES = 1 << 16  # more than HDF5 adds for the columns over N and V

ReadBlock = Callable[[Block], Sequence[np.ndarray]]
"""block -> what each of Header.logit_columns holds of it; asked once for each block."""


def assemble(temporary: Path, plan: CachePlan, read: ReadBlock) -> str:
    """Write the whole cache to `temporary` and give the file's hex SHA-256. Raises OSError on a full disk."""
    columns = {split: (*table.of_views, *plan.header.logit_columns) for split, table in plan.tables.items()}
    _reserve(temporary, _empty_file(plan), plan, columns)
    with _opened(temporary) as file:
        offsets = {split: _allocate(file[split], plan, split, columns[split]) for split in columns}
    found: dict[str, Any] = {}
    with open(temporary, "r+b", buffering=0) as raw:
        for split in columns:
            filling = _Filling(plan, split, {name: _Region(raw, start) for name, start in offsets[split].items()})
            found[f"{split}_checksum"] = filling.fill(read)
    found["val_top1"] = filling.hits / len(plan.tables["val"])  # val is the last split
    with _opened(temporary) as file:
        _write_checks(file, plan.header, found)
    return sha256_of(temporary)


class _Region:
    """The place of a column in the file: rows are appended, and hashed on the way."""

    def __init__(self, file: BinaryIO, start: int):
        self._file, self._end, self._sha256 = file, start, sha256()

    def append(self, rows: np.ndarray) -> None:
        """Write the next rows. Raises OSError on a full disk."""
        content = little_endian(rows)
        self._sha256.update(content)
        while content:
            written = os.pwrite(self._file.fileno(), content, self._end)
            self._end, content = self._end + written, content[written:]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all rows."""
        return self._sha256.hexdigest()


class _Filling:
    """Writes the columns over N and V of one split, and counts the labels that view 0 of the logits gets right."""

    def __init__(self, plan: CachePlan, split: str, regions: Mapping[str, _Region]):
        self.plan, self.split, self.regions, self.hits = plan, split, regions, 0
        self.table = plan.tables[split]

    def fill(self, read: ReadBlock) -> str:
        """Write all rows; gives the split's checksum."""
        digests = [self._write(column, values) for column, values in self.table.numbers.items()]
        logit_regions = [self.regions[column.name] for column in self.plan.header.logit_columns]
        for columns in self._rows(read):
            for region, rows in zip(logit_regions, columns, strict=True):
                region.append(rows)
        return checksum_of(self.table.fingerprint, [*digests, *(region.digest for region in logit_regions)])

    def _write(self, column: Column, values: Any) -> str:
        """The digest of a column of the table; those over N alone are in the file already."""
        region = self.regions.get(column.name)
        if region is None:
            return sha256(little_endian(values)).hexdigest()
        for _, rows in pieces_of(values):
            region.append(rows)
        return region.digest

    def _rows(self, read: ReadBlock) -> Iterator[list[np.ndarray]]:
        """The logit columns [B, V, ...], BLOCK_SAMPLES samples at a time."""
        for start in range(0, len(self.table), BLOCK_SAMPLES):
            stop = min(start + BLOCK_SAMPLES, len(self.table))
            views = [read(Block(self.split, view, start, stop)) for view in range(self.table.views)]
            self.hits += hits_of(views[0][0], self.table.labels_N[start:stop], self.plan.header)
            yield [np.stack(column, axis=1) for column in zip(*views, strict=True)]


def _write_checks(file: h5py.File, header: Header, found: Mapping[str, Any]) -> None:
    """Everything that is known once all logits were seen; `complete` last."""
    for name, dtype in CHECK_ATTRIBUTES.items():
        file.attrs.modify(name, _as_array(dtype, found[name]))
    rows = [found["val_top1"] if row.val_top1 is None else row.val_top1 for row in header.teachers]
    file["teachers/val_top1"][...] = rows
    file.attrs.modify("complete", FLAG.type(1))


def _opened(path: Path) -> h5py.File:
    alignment = {"alignment_threshold": ALIGNMENT, "alignment_interval": ALIGNMENT}
    return h5py.File(path, "r+", libver=LAYOUT, locking=False, **alignment)


def _allocate(group: h5py.Group, plan: CachePlan, split: str, columns: Sequence[Column]) -> dict[str, int]:
    """Make the columns over N and V, without values: where each begins in the file."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    made.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shapes = ((column, _shape(column, plan, split)) for column in columns)
    datasets = {
        column.name: group.create_dataset(column.name, shape, column.dtype, dcpl=made, track_times=False)
        for column, shape in shapes
    }
    return {name: dataset.id.get_offset() for name, dataset in datasets.items()}


def _shape(column: Column, plan: CachePlan, split: str) -> tuple[int, ...]:
    table = plan.tables[split]
    return shape_of(column.axes, {"N": len(table), "V": table.views, **plan.header.sizes})


def _reserve(temporary: Path, start: bytes, plan: CachePlan, columns: Mapping[str, Sequence[Column]]) -> None:
    """Claim all space by plain system calls: HDF5 that meets a full disk itself may crash when the process ends.

    HDF5 gives back what is left over when it closes the file.
    """
    sizes = [
        np.prod(_shape(column, plan, split), dtype=np.int64) * column.dtype.itemsize + ALIGNMENT
        for split, of_split in columns.items()
        for column in of_split
    ]
    with open(temporary, "wb") as file:
        file.write(start)
        try:
            os.posix_fallocate(file.fileno(), 0, len(start) + SPARE_BYTES + int(sum(sizes)))
        except (AttributeError, OSError) as error:  # some systems cannot claim space: then the file grows as it goes
            if disk_full(error):
                raise


def _empty_file(plan: CachePlan) -> bytes:
    """The bytes of a cache that lacks its columns over N and V, with `complete` still 0."""
    header = plan.header
    with h5py.File("empty", "w", driver="core", backing_store=False, libver=LAYOUT) as file:
        _write_attributes(file, header)
        _write_column(file, "classes", TEXT, header.classes)
        for name, dtype in TEACHER_COLUMNS.items():
            values = [getattr(row, name) for row in header.teachers]
            _write_column(file, f"teachers/{name}", dtype, [0 if value is None else value for value in values])
        for split, table in plan.tables.items():
            _write_table(file.create_group(split), table)
        file.flush()
        return file.id.get_file_image()


def _write_table(group: h5py.Group, table: Table) -> None:
    for column, values in ({PATH: table.paths} | table.numbers).items():
        if "V" not in column.axes:
            _write_column(group, column.name, column.dtype, values)


def _write_attributes(file: h5py.File, header: Header) -> None:
    values = {
        "format": (TEXT, FORMAT),
        "version": (INT, VERSION),
        "required_features": (TEXT, header.features),
        "complete": (FLAG, 0),
        **{name: (dtype, getattr(header, name)) for name, (dtype, _) in HEADER_ATTRIBUTES.items()},
        **{name: (dtype, 0 if dtype is FLOAT else 64 * "0") for name, dtype in CHECK_ATTRIBUTES.items()},
    }
    if header.temperature is not None:
        values[TEMPERATURE[0]] = (TEMPERATURE[1], header.temperature)
    if header.top_k:
        values["tail_temperatures"] = (FLOAT, TAIL_TEMPERATURES)
    for name, (dtype, value) in values.items():
        array = _as_array(dtype, value)
        file.attrs.create(name, array, dtype=array.dtype)


def _write_column(group: h5py.Group, name: str, dtype: np.dtype, values: Sequence | np.ndarray) -> None:
    array = _as_array(dtype, values)
    group.create_dataset(name, data=array, dtype=array.dtype, track_times=False)


def _as_array(dtype: np.dtype, value: Any) -> np.ndarray:
    if dtype is not TEXT:
        return np.asarray(value, dtype)
    texts = [text.encode() for text in ([value] if isinstance(value, str) else value)]
    array = np.array(texts, dtype=h5py.string_dtype("utf-8", max([1, *map(len, texts)])))
    return array.reshape(()) if isinstance(value, str) else array
