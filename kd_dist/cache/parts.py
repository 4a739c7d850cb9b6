"""The blocks of a cache that is not finished yet: a small file each, in a folder that says what they belong to."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kd_dist.cache.format import CHUNK_SAMPLES, SPLITS, Header, Table, rows_of, shape_of
from kd_dist.errors import UserError
from kd_dist.files import disk_full, write_atomically

BLOCK_SAMPLES = CHUNK_SAMPLES  # a block fills one chunk of the file, which is therefore written once, whole
SEAL_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Block:
    """Samples start to stop - 1 of a split in one view: the unit of work and of storage."""

    split: str
    view: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.split}-view{self.view:05d}-sample{self.start:09d}"


def blocks(tables: Mapping[str, Table]) -> list[Block]:
    """All blocks of a cache, in the order in which they go into the file."""
    return [
        Block(split, view, start, min(start + BLOCK_SAMPLES, len(tables[split])))
        for split in SPLITS
        for view in range(tables[split].views)
        for start in range(0, len(tables[split]), BLOCK_SAMPLES)
    ]


def plan_of(header: Header, tables: Mapping[str, Table]) -> dict:
    """What blocks belong to, as plain JSON values: the header, and the size and digest of each split's columns."""
    splits = {split: _plan_of_table(tables[split]) for split in SPLITS}
    return json.loads(json.dumps(asdict(header) | splits))


def row_shapes(header: Header, block: Block) -> list[tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of what a block holds of each of Header.row_columns."""
    columns = header.row_columns
    return [(column.dtype, (len(block), *shape_of(column.axes[2:], header.sizes))) for column in columns]


def _plan_of_table(table: Table) -> dict:
    columns = hashlib.sha256("\0".join(table.paths).encode())
    for column, values in table.numbers.items():
        for start in range(0, len(table), CHUNK_SAMPLES):
            piece = slice(start, min(start + CHUNK_SAMPLES, len(table)))
            rows = rows_of(values, piece.start, piece.stop) if "V" in column.axes else values[piece]
            columns.update(rows.tobytes())
    return {"samples": len(table), "views": table.views, "columns_sha256": columns.hexdigest()}


class Parts:
    """A folder of blocks that all belong to one plan; any number of processes may work in it at once.

    A block's file is a seal and the rows. The seal is a digest over the plan, the block's name and the rows, so
    that a block that was cut short, changed, misnamed or brought in from elsewhere counts as missing.
    """

    def __init__(self, folder: Path, plan: dict, header: Header):
        self.folder, self.plan, self.header = folder, plan, header
        self._plan_file = folder / "plan.json"
        self._plan_digest = hashlib.sha256(_text(plan)).digest()
        self._dropped = folder.with_name(f".{folder.name}.old")

    def exist(self) -> bool:
        """Whether blocks of some plan lie here."""
        return self._plan_file.exists()

    def start(self) -> None:
        """Make the folder and note the plan in it."""
        with writing(self.folder):
            shutil.rmtree(self._dropped, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._plan_file, lambda file: file.write(_text(self.plan)))

    def check_plan(self) -> None:
        """Raise UserError where the blocks belong to another plan, naming what differs."""
        try:
            noted = json.loads(self._plan_file.read_bytes())
        except ValueError:
            noted = None
        if noted != self.plan:
            raise UserError(
                f"{self.folder} holds blocks of another cache ({_difference(noted, self.plan)}): "
                "finish that one with its own settings, or delete the folder and run this again."
            )

    def write(self, block: Block, columns: Sequence[np.ndarray]) -> None:
        """Store what a block holds of each row column durably, in place of an earlier one."""
        rows = b"".join(values.tobytes() for values in columns)
        with writing(self.folder):
            write_atomically(self._file(block), lambda file: file.write(self._seal(block, rows) + rows))

    def read(self, block: Block) -> tuple[np.ndarray, ...] | None:
        """What a block holds of each row column, or None where it is missing or damaged."""
        try:
            content = self._file(block).read_bytes()
        except FileNotFoundError:
            return None
        if content[:SEAL_BYTES] != self._seal(block, content[SEAL_BYTES:]):
            return None
        columns, start = [], SEAL_BYTES
        for dtype, shape in row_shapes(self.header, block):
            columns.append(np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape))
            start += columns[-1].nbytes
        return tuple(columns)

    def drop(self) -> None:
        """Take the folder away by one rename before deleting, so that no one meets half of it."""
        shutil.rmtree(self._dropped, ignore_errors=True)
        os.replace(self.folder, self._dropped)
        shutil.rmtree(self._dropped, ignore_errors=True)

    def _file(self, block: Block) -> Path:
        return self.folder / f"{block}.part"

    def _seal(self, block: Block, rows: bytes) -> bytes:
        return hashlib.sha256(self._plan_digest + str(block).encode() + rows).digest()


def _text(plan: dict) -> bytes:
    return json.dumps(plan, indent=1, sort_keys=True).encode()


def _difference(noted: object, plan: dict) -> str:
    if not isinstance(noted, dict):
        return "its plan.json is no plan"
    key = next(key for key in plan | noted if noted.get(key) != plan.get(key))
    old, new = noted.get(key), plan.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        return f"{key}: {_difference(old, new)}"
    return f"its {key} is {old!r:.100}, here it is {new!r:.100}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one sentence, which names the place, of a full disk and of what else the system says against writing."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            wrong = "no space left to write"
            mend = "free some and run the same command again; the stored blocks are kept"
        elif error.errno:
            wrong, mend = "cannot write", "choose a folder that can be written"
        else:  # not the system's word but HDF5's
            raise
        raise UserError(f"{wrong} {path} ({os.strerror(error.errno or errno.ENOSPC)}): {mend}.") from error
