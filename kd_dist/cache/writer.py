"""Writing a cache: blocks in any order by any processes, then one file, published with one rename."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_dist.cache.assemble import assemble
from kd_dist.cache.format import LOGITS, checksum_file_of, first_true, shards_folder_of
from kd_dist.cache.plan import Block, CachePlan
from kd_dist.cache.shards import RESUMES, Shards
from kd_dist.cache.topk import shorten
from kd_dist.errors import UserError
from kd_dist.files import publish, sha256_of, write_atomically, writing


class BlockWriter:
    """The writer of one cache. Every process makes its own, on the same target with the same plan.

    A killed job loses at most the blocks in flight, may resume with another number of processes, and ends with the
    same bytes: they depend on the plan and the logits alone. Raises UserError where `target` exists already and
    where its folder of shards belongs to another plan; ValueError where the plan contradicts itself.
    """

    def __init__(self, target: Path, plan: CachePlan):
        plan.check()
        self.target, self.plan = Path(target), plan
        self._shards = Shards(shards_folder_of(self.target), plan)
        with writing(self.target, RESUMES):
            self._acquire()

    def _acquire(self) -> None:
        if not self._shards.exist():
            if self.target.exists():
                raise UserError(
                    f"{self.target} already exists: move it away, or choose another path for the new cache."
                )
            self._shards.start()
        self._shards.check_plan()

    def missing(self) -> list[Block]:
        """The blocks that still have to be put, in fixed order; damaged ones are among them."""
        return [block for block in self.plan.blocks if self._shards.read(block) is None]

    def put(self, block: Block, logits_BK: np.ndarray) -> None:
        """Store a block's raw logits, float16 [stop - start, K], durably; of a top-k cache what is kept of them.

        Raises ValueError on another type or shape; UserError on values that are not finite, and on a full disk.
        """
        shape = (len(block), len(self.plan.header.classes))
        if logits_BK.dtype != LOGITS.dtype or logits_BK.shape != shape:
            raise ValueError(f"{block}: {logits_BK.dtype} {logits_BK.shape} instead of {LOGITS.dtype} {shape}")
        self._refuse_overflow(block, logits_BK)
        top_k = self.plan.header.top_k
        self.put_columns(block, shorten(logits_BK, top_k) if top_k else (logits_BK,))

    def put_columns(self, block: Block, columns: Sequence[np.ndarray]) -> None:
        """Store what another cache of the same kind holds of a block, column by column as Header.logit_columns lists
        them. Raises ValueError on other types or shapes.
        """
        found, expected = [(values.dtype, values.shape) for values in columns], self.plan.block_shapes(block)
        if found != expected:
            raise ValueError(f"{block}: {found} instead of {expected}")
        self._shards.write(block, columns)

    def is_known(self, block: Block) -> bool:
        """Whether the plan's known cache holds this block."""
        known = self.plan.known
        return known is not None and block.view < known[block.split].views

    def take_known(self, block: Block) -> None:
        """Store a known block as the known cache holds it."""
        known = self.plan.known
        assert known is not None  # the block is_known
        columns = known[block.split].logit_columns
        self.put_columns(block, [column[block.start : block.stop, block.view] for column in columns])

    def publish(self) -> Path:
        """Assemble all shards, put the file in place with its checksum file beside it, then drop the shards.

        One process calls it, once every block was put. Killed at any point it leaves the shards, or the whole cache
        with its checksum, or both; calling it again ends with the same bytes. Raises UserError on missing blocks, a
        full disk, or another file at `target`.
        """
        temporary = self.target.with_name(f".{self.target.name}.tmp")
        try:
            with writing(self.target, RESUMES):
                digest = assemble(temporary, self.plan, self._read)
                self._install(temporary, digest)
        finally:
            temporary.unlink(missing_ok=True)
        self._shards.drop()
        return self.target

    def _read(self, block: Block) -> tuple[np.ndarray, ...]:
        columns = self._shards.read(block)
        if columns is None:
            missing = self.missing()
            share = f"{len(missing)} of {len(self.plan.blocks)} blocks"
            raise UserError(f"{share} of {self.target} are missing, first {missing[0]}: run the same command again.")
        return columns

    def _refuse_overflow(self, block: Block, logits_BK: np.ndarray) -> None:
        row = first_true(~np.isfinite(logits_BK).all(axis=1))
        if row is None:
            return
        sample = block.start + row
        where = f"{block.split} view {block.view} of sample {sample} ({self.plan.tables[block.split].paths[sample]})"
        raise UserError(
            f"the teacher's logits of {where} are NaN or beyond float16's 65504: train the teacher again with a lower "
            "--lr."
        )

    def _install(self, temporary: Path, digest: str) -> None:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if self.target.exists() and sha256_of(self.target) != digest:  # the same one: a kill came after the rename
            raise UserError(
                f"another process created {self.target} meanwhile: move it away, then run the same command again."
            )
        text = f"{digest}  {self.target.name}\n"
        write_atomically(checksum_file_of(self.target), lambda file: file.write(text.encode()))
        publish(temporary, self.target)
