"""Reading an HDF5 file that may come from anyone: what the writer does not make is refused before HDF5 acts on it.

Links, virtual datasets, external storage, filters and absurd shapes could make HDF5 read other files, load code, or
fill the memory.
"""

import mmap
from math import prod
from typing import Any

import h5py
import numpy as np

from kd_dist.cache.format import SPLITS, TEXT, shape_of

GROUPS = ("/", "teachers", *SPLITS, *(f"{split}/view" for split in SPLITS))


def attribute(file: h5py.File, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> Any:
    """The value of an attribute of exactly this type and shape (None: one axis of any length), as plain Python.

    Raises ValueError where it is missing or another.
    """
    if name not in file.attrs:
        raise ValueError(f"the attribute {name} is missing")
    found = file.attrs.get_id(name)
    _check_type(f"the attribute {name}", found.dtype, dtype)
    if found.shape != shape and not (shape is None and len(found.shape) == 1):
        raise ValueError(f"the attribute {name} has shape {list(found.shape)}")
    return _plain(file.attrs[name])


def _plain(array: np.ndarray | np.generic) -> Any:
    """Tuples, strings and numbers of Python instead of numpy's."""
    value = array.tolist()
    if isinstance(value, list):
        return tuple(item.decode() if isinstance(item, bytes) else item for item in value)
    return value.decode() if isinstance(value, bytes) else value


def _check_type(what: str, found: np.dtype, dtype: np.dtype) -> None:
    fits = found.kind == "S" if dtype is TEXT else found == dtype
    if not fits:
        raise ValueError(f"{what} is of type {found} instead of {'fixed-length text' if dtype is TEXT else dtype}")


def _fits(axes: tuple[str | int, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is what `sizes` says of its axes; named axes that it lacks are added."""
    for axis, size in zip(axes, shape, strict=False):
        if isinstance(axis, str):
            sizes.setdefault(axis, size)
    return len(shape) == len(axes) and shape == shape_of(axes, sizes)


class Columns:
    """The datasets of an open file that is mapped into memory as a whole. Raises ValueError where one is refused."""

    def __init__(self, file: h5py.File, mapped: mmap.mmap):
        self._file, self._mapped = file, mapped
        for name in (*GROUPS, *(f"{split}/top" for split in SPLITS if f"{split}/top" in file)):
            self._refuse_links(name)

    def read(self, name: str, dtype: np.dtype, axes: tuple[str | int, ...], sizes: dict[str, int]) -> Any:
        """A dataset: a tuple of strings or numbers, an array, or of a column over N and V the mapped file's own bytes.

        Its shape has to be what `sizes` says of its named axes; one that is not in there yet is added.
        """
        dataset = self._dataset(name)
        _check_type(name, dataset.dtype, dtype)
        if not _fits(axes, dataset.shape, sizes):
            raise ValueError(f"{name} has shape {list(dataset.shape)}, which does not fit the other columns")
        offset = self._offset(name, dataset)
        if "V" in axes:
            return np.ndarray(dataset.shape, dataset.dtype, self._mapped, offset)
        values = dataset[()]
        return _plain(values) if dtype is TEXT or axes == ("T",) else values

    def length_of(self, name: str, axis: int) -> int:
        """The length of one axis of a dataset."""
        shape = self._dataset(name).shape
        return shape[axis] if axis < len(shape) else 0

    def _refuse_links(self, name: str) -> None:
        group = self._node(name) if name != "/" else self._file
        if not isinstance(group, h5py.Group):
            raise ValueError(f"{name} is not a group")
        for member in group:
            if not isinstance(group.get(member, getlink=True), h5py.HardLink):
                raise ValueError(f"{member} in {name} is a link to elsewhere")

    def _node(self, name: str) -> object:
        node = self._file
        for part in name.split("/"):
            if not isinstance(node, h5py.Group) or part not in node:
                raise ValueError(f"{name} is missing")
            node = node[part]
        return node

    def _dataset(self, name: str) -> h5py.Dataset:
        dataset = self._node(name)
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError(f"{name} is not a dataset")
        made = dataset.id.get_create_plist()
        if made.get_layout() != h5py.h5d.CONTIGUOUS or made.get_external_count() or made.get_nfilters():
            raise ValueError(f"{name} is not stored in one piece of this file")
        return dataset

    def _offset(self, name: str, dataset: h5py.Dataset) -> int:
        declared, offset = prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_offset()
        if offset is None or dataset.id.get_storage_size() < declared or offset + declared > len(self._mapped):
            raise ValueError(f"{name} declares {declared} bytes that the file does not hold")
        return offset
