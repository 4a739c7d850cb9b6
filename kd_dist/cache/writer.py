"""Writing a cache: blocks in any order by any processes, then one file, scanned and published with one rename."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kd_dist.cache.assemble import assemble
from kd_dist.cache.format import (
    LOGITS,
    SPLITS,
    Header,
    Table,
    check_header,
    check_table,
    digest_file_of,
    first_true,
    parts_folder_of,
)
from kd_dist.cache.parts import Block, Parts, blocks, plan_of, row_shapes, writing
from kd_dist.cache.topk import shorten
from kd_dist.errors import UserError
from kd_dist.files import publish, sha256_of, write_atomically


class BlockWriter:
    """The writer of one cache. Every process makes its own, on the same target with the same plan (header and tables).

    A killed job loses at most the blocks in flight, may go on with another number of processes, and ends with the
    same bytes: they depend on the plan and the logits alone. Raises UserError where `target` exists already, unless
    `replace`, and where the folder of its parts holds blocks of another plan; ValueError where the plan contradicts
    itself.
    """

    def __init__(self, target: Path, header: Header, tables: Mapping[str, Table], *, replace: bool = False):
        _check_plan(header, tables)
        self.target, self.header, self.replace = Path(target), header, replace
        self.tables = {split: tables[split] for split in SPLITS}
        self._parts = Parts(parts_folder_of(self.target), plan_of(header, self.tables), header)
        with writing(self.target):
            self._claim()

    def _claim(self) -> None:
        if not self._parts.exist():
            if self.target.exists() and not self.replace:
                raise UserError(f"{self.target} exists already: move it away, or choose another place for the new one.")
            self._parts.start()
        self._parts.check_plan()

    def missing(self) -> list[Block]:
        """The blocks that still have to be put, in fixed order; damaged ones are among them."""
        return [block for block in blocks(self.tables) if self._parts.read(block) is None]

    def put(self, block: Block, logits_BK: np.ndarray) -> None:
        """Store a block's raw logits, float16 [stop - start, K], durably; of a top-k cache what is kept of them.

        Raises ValueError on another type or shape; UserError on values that are not finite, and on a full disk.
        """
        shape = (len(block), len(self.header.classes))
        if logits_BK.dtype != LOGITS.dtype or logits_BK.shape != shape:
            raise ValueError(f"{block}: {logits_BK.dtype} {logits_BK.shape} instead of {LOGITS.dtype} {shape}")
        self._refuse_overflow(block, logits_BK)
        self.put_rows(block, shorten(logits_BK, self.header.top_k) if self.header.top_k else (logits_BK,))

    def put_rows(self, block: Block, columns: Sequence[np.ndarray]) -> None:
        """Store what another cache of the same kind holds of a block, column by column as Header.row_columns lists
        them. Raises ValueError on other types or shapes.
        """
        found = [(values.dtype, values.shape) for values in columns]
        if found != row_shapes(self.header, block):
            raise ValueError(f"{block}: {found} instead of {row_shapes(self.header, block)}")
        self._parts.write(block, columns)

    def publish(self) -> Path:
        """Assemble all blocks, scan the result, put it in place with its digest file beside it, then drop the blocks.

        One process calls it, once every block was put. Killed at any point it leaves the blocks, or the whole cache
        with its digest, or both; calling it again ends with the same bytes. Raises UserError on missing blocks, a
        full disk, or another file at `target`.
        """
        missing = self.missing()
        if missing:
            share = f"{len(missing)} of {len(blocks(self.tables))} blocks"
            raise UserError(f"{share} of {self.target} are missing, first {missing[0]}: run the same command again.")
        temporary = self.target.with_name(f".{self.target.name}.tmp")
        try:
            with writing(self.target):
                assemble(temporary, self.header, self.tables, self._parts.read)
                self._install(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        self._parts.drop()
        return self.target

    def _refuse_overflow(self, block: Block, logits_BK: np.ndarray) -> None:
        row = first_true(~np.isfinite(logits_BK).all(axis=1))
        if row is None:
            return
        sample = block.start + row
        where = f"{block.split} view {block.view} of sample {sample} ({self.tables[block.split].paths[sample]})"
        raise UserError(
            f"the teacher's logits of {where} are NaN or beyond float16's 65504: train it again with a lower --lr."
        )

    def _install(self, temporary: Path) -> None:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        digest = sha256_of(temporary)
        if not self.target.exists():
            self._write_digests(digest)
        elif (standing := sha256_of(self.target)) == digest or self.replace:
            # Until the new file has taken the old one's place both digests hold: a kill in between leaves a good pair.
            self._write_digests(standing, digest)
        else:
            raise UserError(f"another file has come to {self.target}: move it away, then run the same command again.")
        publish(temporary, self.target)
        self._write_digests(digest)

    def _write_digests(self, *digests: str) -> None:
        text = "".join(f"{digest}  {self.target.name}\n" for digest in digests)
        write_atomically(digest_file_of(self.target), lambda file: file.write(text.encode()))


def _check_plan(header: Header, tables: Mapping[str, Table]) -> None:
    check_header(header)
    for split in SPLITS:
        check_table(split, tables[split], header)
