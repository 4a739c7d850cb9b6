"""The shards of a cache that is not finished yet: a small file for each block of logits, in a folder that says which
plan they belong to.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_dist.cache.plan import Block, CachePlan
from kd_dist.errors import UserError
from kd_dist.files import write_atomically, writing

RESUMES = "with the blocks that are missing"  # after a failed write
CHECKSUM_BYTES = hashlib.sha256().digest_size


class Shards:
    """A folder of blocks that all belong to one plan; any number of processes may work in it at once.

    A shard is a checksum and the logits. The checksum is a digest over the plan, the block's name and the logits, so
    that a shard that was cut short, changed, misnamed or brought in from elsewhere counts as missing.
    """

    def __init__(self, folder: Path, plan: CachePlan):
        self.folder, self.plan = folder, plan
        self._plan_file = folder / "plan.json"
        self._plan_digest = hashlib.sha256(_text(plan.document)).digest()
        self._dropped = folder.with_name(f".{folder.name}.old")

    def exist(self) -> bool:
        """Whether shards of some plan lie here."""
        return self._plan_file.exists()

    def start(self) -> None:
        """Make the folder and write the plan into it."""
        with writing(self.folder, RESUMES):
            shutil.rmtree(self._dropped, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._plan_file, lambda file: file.write(_text(self.plan.document)))

    def check_plan(self) -> None:
        """Raise UserError where the shards belong to another plan, naming what differs."""
        try:
            stored = json.loads(self._plan_file.read_bytes())
        except ValueError:
            stored = None
        if stored != self.plan.document:
            raise UserError(
                f"{self.folder} holds the shards of another cache ({_difference(stored, self.plan.document)}): finish "
                "that one with its own settings, or delete the folder and run this command again."
            )

    def write(self, block: Block, columns: Sequence[np.ndarray]) -> None:
        """Store what a block holds of each logit column durably, in place of an earlier shard."""
        logits = b"".join(values.tobytes() for values in columns)
        with writing(self.folder, RESUMES):
            write_atomically(self._file(block), lambda file: file.write(self._checksum(block, logits) + logits))

    def read(self, block: Block) -> tuple[np.ndarray, ...] | None:
        """What a block holds of each logit column, or None where its shard is missing or damaged."""
        try:
            content = self._file(block).read_bytes()
        except FileNotFoundError:
            return None
        logits = memoryview(content)[CHECKSUM_BYTES:]
        if content[:CHECKSUM_BYTES] != self._checksum(block, logits):
            return None
        columns, start = [], CHECKSUM_BYTES
        for dtype, shape in self.plan.block_shapes(block):
            columns.append(np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape))
            start += columns[-1].nbytes
        return tuple(columns)

    def drop(self) -> None:
        """Take the folder away by one rename before deleting, so that no one meets half of it."""
        shutil.rmtree(self._dropped, ignore_errors=True)
        os.replace(self.folder, self._dropped)
        shutil.rmtree(self._dropped, ignore_errors=True)

    def _file(self, block: Block) -> Path:
        return self.folder / f"{block}.shard"

    def _checksum(self, block: Block, logits: bytes | memoryview) -> bytes:
        digest = hashlib.sha256(self._plan_digest + str(block).encode())
        digest.update(logits)
        return digest.digest()


def _text(document: dict) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()


def _difference(stored: object, document: dict) -> str:
    if not isinstance(stored, dict):
        return "its plan.json cannot be read"
    key = next(key for key in document | stored if stored.get(key) != document.get(key))
    old, new = stored.get(key), document.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        return f"{key}: {_difference(old, new)}"
    return f"its {key} is {old!r:.100}, here it is {new!r:.100}"
