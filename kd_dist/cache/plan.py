"""The plan of a cache: everything but its logits, and the blocks of logits that are still to be computed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kd_dist.cache.format import (
    SPLITS,
    TABLE_FEATURES,
    TOP_K,
    Header,
    Table,
    TeacherRow,
    check_header,
    check_table,
    checksum_of,
    digest_of,
    shape_of,
)
from kd_dist.cache.mixed import MIXED_VIEWS, Mixed
from kd_dist.cache.reader import Cache, LabelledTable
from kd_dist.errors import UserError

BLOCK_SAMPLES = 1024


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


@dataclass(frozen=True, eq=False)
class CachePlan:
    """The header and both tables of a cache to be written. `known` holds the splits of a cache whose logits are taken
    over for the first views.
    """

    header: Header
    tables: Mapping[str, Table]
    known: Mapping[str, LabelledTable] | None = None

    @classmethod
    def like(cls, cache: Cache, header: Header) -> "CachePlan":
        """The same views as another cache, labelled by the one teacher of `header`."""
        features = tuple(feature for feature in cache.header.features if feature in TABLE_FEATURES)
        drawn = {name: getattr(cache.header, name) for name in ("view_rule", "crop_scale", "mixed_share", "seed")}
        tables = {
            split: table.without_logits(teacher_N=np.zeros(len(table), np.int16))
            for split, table in cache.splits.items()
        }
        return cls(replace(header, features=features, **drawn), tables)

    def keeping_top(self, k: int | None) -> "CachePlan":
        """The same with the k largest logits of each row alone; with all of them where k is None.

        Raises UserError where that would leave no class out.
        """
        if k is None:
            return self
        check_top_k(k, len(self.header.classes))
        return self._with_header(features=(*self.header.features, TOP_K), top_k=k)

    def labelled_by(self, teachers: Sequence[TeacherRow], created: str, **teacher_N: np.ndarray) -> "CachePlan":
        """The same with these teachers; `train` and `val` are the teacher of each sample, int [N]."""
        tables = {
            split: replace(table, teacher_N=teacher_N[split].astype(np.int16)) for split, table in self.tables.items()
        }
        return replace(self._with_header(teachers=tuple(teachers), created=created), tables=tables)

    def mixing(self, share: float, mixed: Mapping[str, Mixed]) -> "CachePlan":
        """The same with a share of train's drawn views mixed; `mixed` has what each split's views are mixed with."""
        plan = self._with_header(features=(*self.header.features, MIXED_VIEWS), mixed_share=share)
        return replace(plan, tables={split: replace(table, mixed=mixed[split]) for split, table in self.tables.items()})

    def beginning_with(self, cache: Cache) -> "CachePlan":
        """The same with the views and the logits of a cache in front, whatever this version would draw for them."""
        tables = {split: _joined(cache.split(split), table) for split, table in self.tables.items()}
        return replace(self, tables=tables, known=cache.splits)

    def _with_header(self, **changes: Any) -> "CachePlan":
        return replace(self, header=replace(self.header, **changes))

    def check(self) -> None:
        """Raise ValueError where the plan contradicts itself."""
        check_header(self.header)
        for split in SPLITS:
            check_table(split, self.tables[split], self.header)

    @property
    def blocks(self) -> list[Block]:
        """All blocks in fixed order."""
        return [
            Block(split, view, start, min(start + BLOCK_SAMPLES, len(self.tables[split])))
            for split in SPLITS
            for view in range(self.tables[split].views)
            for start in range(0, len(self.tables[split]), BLOCK_SAMPLES)
        ]

    def block_shapes(self, block: Block) -> list[tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of what a block holds of each logit column."""
        columns, sizes = self.header.logit_columns, self.header.sizes
        return [(column.dtype, (len(block), *shape_of(column.axes[2:], sizes))) for column in columns]

    @cached_property
    def document(self) -> dict[str, Any]:
        """What shards belong to, as plain JSON values: the header, and size and checksum of each split's table."""
        splits = {
            split: {
                "samples": len(table),
                "views": table.views,
                "checksum": checksum_of(table.fingerprint, map(digest_of, table.numbers.values())),
            }
            for split, table in self.tables.items()
        }
        return json.loads(json.dumps(asdict(self.header) | splits))


def _joined(known: LabelledTable, table: Table) -> Table:
    """A table whose first views are those of a cache."""
    longer: dict[str, Any] = {
        column.field: np.concatenate([known.of_views[column], values[:, known.views :]], axis=1)
        for column, values in table.of_views.items()
    }
    box_and_flip = {name: longer.pop(name) for name in ("box_NV4", "flip_NV")}
    return replace(table, **box_and_flip, mixed=Mixed(**longer) if longer else None)


def check_top_k(k: int | None, classes: int) -> None:
    """Raise UserError where the k largest logits of a row would be all of them."""
    if k is not None and k >= classes:
        raise UserError(
            f"--top-k {k} must be less than the number of classes, {classes}; leave the flag out to keep all logits."
        )
