"""The HDF5 side of writing a cache: a file with everything in place but what each image has in each view.

Nothing in it depends on the clock or on the machine, so the same plan gives the same bytes. HDF5's oldest file
layout is used, which every version of the library reads.
"""

from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from kd_dist.cache.format import (
    CHUNK_SAMPLES,
    FLAG,
    FLOAT,
    FORMAT,
    HEADER_ATTRIBUTES,
    INT,
    LATER_TEACHER_COLUMNS,
    PATH,
    PROOF_ATTRIBUTES,
    TAIL_TEMPERATURES,
    TEACHER_COLUMNS,
    TEMPERATURE,
    TEXT,
    VERSION,
    Header,
    Table,
    shape_of,
)

LAYOUT = "earliest"


def skeleton(header: Header, tables: Mapping[str, Table], proofs: Mapping[str, object]) -> bytes:
    """The bytes of a cache with everything in place but the values over N and V, and `complete` still 0; `proofs` has a
    value for each of PROOF_ATTRIBUTES.
    """
    with h5py.File("skeleton", "w", driver="core", backing_store=False, libver=LAYOUT) as file:
        _write_attributes(file, header, proofs)
        _write_column(file, "classes", TEXT, ("K",), header.classes)
        for name, dtype in (TEACHER_COLUMNS | LATER_TEACHER_COLUMNS).items():
            _write_column(file, f"teachers/{name}", dtype, ("T",), [getattr(row, name) for row in header.teachers])
        for split, table in tables.items():
            _write_table(file, split, table, header)
        file.flush()
        return file.id.get_file_image()


def _write_table(file: h5py.File, split: str, table: Table, header: Header) -> None:
    of_views = table.of_views
    for column, values in ({PATH: table.paths} | table.numbers).items():
        if column not in of_views:
            _write_column(file, f"{split}/{column.name}", column.dtype, column.axes, values)
    sizes = {"N": len(table), "V": table.views, **header.sizes}
    for column in (*of_views, *header.row_columns):
        _create_column(file, f"{split}/{column.name}", column.dtype, column.axes, shape_of(column.axes, sizes))


def _write_attributes(file: h5py.File, header: Header, proofs: Mapping[str, object]) -> None:
    _write_attribute(file, "format", TEXT, FORMAT)
    _write_attribute(file, "version", INT, VERSION)
    _write_attribute(file, "required_features", TEXT, header.features)
    _write_attribute(file, "complete", FLAG, 0)
    for name, (dtype, _) in HEADER_ATTRIBUTES.items():
        _write_attribute(file, name, dtype, getattr(header, name))
    if header.temperature is not None:
        _write_attribute(file, *TEMPERATURE, header.temperature)
    if header.top_k:
        _write_attribute(file, "tail_temperatures", FLOAT, TAIL_TEMPERATURES)
    for name, dtype in PROOF_ATTRIBUTES.items():
        _write_attribute(file, name, dtype, proofs[name])


def _write_attribute(file: h5py.File, name: str, dtype: np.dtype | None, value: object) -> None:
    array = _as_array(dtype, value)
    file.attrs.create(name, array, dtype=array.dtype)


def _write_column(file: h5py.File, name: str, dtype: np.dtype | None, axes: tuple, values: Sequence) -> None:
    array = _as_array(dtype, values)
    _create_column(file, name, array.dtype, axes, array.shape)[...] = array


def _create_column(file: h5py.File, name: str, dtype: np.dtype, axes: tuple, shape: tuple[int, ...]) -> h5py.Dataset:
    """A checksummed place for values, in chunks of CHUNK_SAMPLES samples in one view, that can grow in V."""
    chunk = [1 if axis == "V" else size for axis, size in zip(axes, shape, strict=True)]
    chunk[0] = min(chunk[0], CHUNK_SAMPLES)
    limit = tuple(None if axis == "V" else size for axis, size in zip(axes, shape, strict=True))
    options = {"chunks": tuple(chunk), "maxshape": limit, "fletcher32": True, "track_times": False}
    return file.create_dataset(name, shape, dtype, **options)


def _as_array(dtype: np.dtype | None, value: object) -> np.ndarray:
    if dtype is not TEXT:
        return np.asarray(value, dtype)
    texts = [text.encode() for text in ([value] if isinstance(value, str) else value)]
    array = np.array(texts, dtype=h5py.string_dtype("utf-8", max([1, *map(len, texts)])))
    return array.reshape(()) if isinstance(value, str) else array
