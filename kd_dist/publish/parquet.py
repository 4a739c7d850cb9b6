"""A split of a cache as a Parquet file: a row an image, a column for each column of the cache, and back.

Rows are written and read BLOCK_SAMPLES at a time, a row group each. The columns over V and K are nested lists.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_dist.cache.assemble import ReadBlock
from kd_dist.cache.format import MIXED, NUMBERS, PATH, Column, Header, Table, shape_of
from kd_dist.cache.mixed import MIXED_VIEWS, Mixed
from kd_dist.cache.plan import BLOCK_SAMPLES, Block
from kd_dist.cache.reader import LabelledTable

SHA256 = "sha256"
PLURALS = {"view/box": "boxes", "view/flip": "flips"}


def name_of(column: Column) -> str:
    """What a column of the cache is called here: view/box is boxes, top/index is top_index."""
    return PLURALS.get(column.name, column.name.removeprefix("view/").replace("/", "_"))


def columns_of(header: Header) -> tuple[Column, ...]:
    """The columns of a split, in their order."""
    mixed = MIXED if MIXED_VIEWS in header.features else ()
    return (PATH, *NUMBERS, *mixed, *header.logit_columns)


def lengths_of(column: Column, header: Header) -> tuple[int, ...]:
    """The lengths of a row's nested lists in a column, the outermost first; -1 for V, which splits may differ in."""
    return () if column.name in (PATH.name, SHA256) else shape_of(column.axes[1:], {"V": -1, **header.sizes})


def write_split(path: Path, table: LabelledTable, header: Header) -> None:
    """Write a split. Raises OSError on a full disk."""
    schema = _schema(header)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(table), BLOCK_SAMPLES):
            rows = slice(start, start + BLOCK_SAMPLES)
            values = [table.paths[rows], *(each[rows] for each in (*table.numbers.values(), *table.logit_columns))]
            arrays = [_to_arrow(column, of) for column, of in zip(columns_of(header), values, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), BLOCK_SAMPLES)


def read_table(path: Path, header: Header) -> Table:
    """All of a split but its logits. Raises ValueError where the file has other columns."""
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(_schema(header)):
            raise ValueError(f"the columns of {path.name} are not those that the header asks for")
        columns = [column for column in columns_of(header) if column not in header.logit_columns]
        found = file.read([name_of(column) for column in columns])
    values = {column.field: _from_arrow(column, found, header) for column in columns}
    mixed = {column.field: values.pop(column.field) for column in columns if column in MIXED}
    return Table(**values, mixed=Mixed(**mixed) if mixed else None)


def block_reader(paths: dict[str, Path], header: Header) -> ReadBlock:
    """Reads the logits of blocks. Blocks of the same samples in several views are to come one after another: their row
    group is read once.
    """
    files = {split: pq.ParquetFile(path) for split, path in paths.items()}
    names = [name_of(column) for column in header.logit_columns]
    last: dict[tuple[str, int], list[np.ndarray]] = {}

    def read(block: Block) -> Sequence[np.ndarray]:
        key = (block.split, block.start // BLOCK_SAMPLES)
        if key not in last:
            last.clear()
            group = files[block.split].read_row_group(key[1], names)
            last[key] = [_from_arrow(column, group, header) for column in header.logit_columns]
        return [values[:, block.view] for values in last[key]]

    return read


def _schema(header: Header) -> pa.Schema:
    """The types of all columns, and what Hugging Face's `datasets` reads of them in the same words as ever: lists of
    numbers, and a label with its class names.
    """
    columns = columns_of(header)
    fields = [pa.field(name_of(column), _type_of(column, lengths_of(column, header))) for column in columns]
    features = {name_of(column): _feature(column, lengths_of(column, header)) for column in columns}
    features["label"] = {"names": list(header.classes), "_type": "ClassLabel"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _type_of(column: Column, lengths: Sequence[int]) -> pa.DataType:
    if not lengths:
        return pa.string() if column.name in (PATH.name, SHA256) else pa.from_numpy_dtype(column.dtype)
    return pa.list_(_type_of(column, lengths[1:]), lengths[0])


def _feature(column: Column, lengths: Sequence[int]) -> dict[str, Any]:
    if lengths:
        return {"feature": _feature(column, lengths[1:]), "length": lengths[0], "_type": "Sequence"}
    dtype = "string" if column.name in (PATH.name, SHA256) else column.dtype.name
    return {"dtype": dtype, "_type": "Value"}


def _to_arrow(column: Column, values: Any) -> pa.Array:
    """Some rows of a column."""
    if column.name == PATH.name:
        return pa.array(values, pa.string())
    if column.name == SHA256:
        return pa.array([row.tobytes().hex() for row in values], pa.string())
    found = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        size = values.shape[axis]
        if column.axes[axis] == "V":
            offsets = pa.array(np.arange(0, len(found) + 1, size, dtype=np.int32))
            found = pa.ListArray.from_arrays(offsets, found)
        else:
            found = pa.FixedSizeListArray.from_arrays(found, size)
    return found


def _from_arrow(column: Column, table: pa.Table, header: Header) -> Any:
    """All rows of a column. Raises ValueError where they differ in their number of views, or a digest is none."""
    chunks = table[name_of(column)].chunks
    if column.name == PATH.name:
        return tuple(path for chunk in chunks for path in chunk.to_pylist())
    if column.name == SHA256:
        digests = bytes.fromhex("".join(text for chunk in chunks for text in chunk.to_pylist()))
        return np.frombuffer(digests, np.uint8).reshape(-1, 32)
    return np.concatenate([_numbers(column, chunk, lengths_of(column, header)) for chunk in chunks])


def _numbers(column: Column, rows: pa.Array, lengths: Sequence[int]) -> np.ndarray:
    if lengths and len(pc.unique(pc.list_value_length(rows))) != 1:
        raise ValueError(f"the rows of {name_of(column)} have different numbers of views")
    count = len(rows)
    for _ in lengths:
        rows = rows.flatten()
    return rows.to_numpy(zero_copy_only=False).astype(column.dtype, copy=False).reshape(count, *lengths)
