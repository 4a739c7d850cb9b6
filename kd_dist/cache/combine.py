"""One cache out of several whose teachers labelled the same views: each row is the mean of theirs.

A mean of logits holds at every temperature: its softmax is the normalised geometric mean of the members' probabilities,
at any T. A mean of probabilities is taken at one temperature T and stored as T * log(mean), whose softmax at T, and at
no other, it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from kd_dist.cache.fits import Pair, check_classes, check_samples
from kd_dist.cache.format import (
    LOGITS,
    ONE_TEMPERATURE,
    SPLITS,
    TABLE_FEATURES,
    Table,
    TeacherRow,
    first_true,
    mean_of,
)
from kd_dist.cache.plan import Block, CachePlan
from kd_dist.cache.reader import Cache
from kd_dist.cache.writer import BlockWriter
from kd_dist.errors import UserError

MEND = "label the views of one with the other's teacher by `python -m kd_dist.cache write --like FILE`"


def combine(caches: Sequence[Cache], target: Path, temperature: float | None, software: str) -> None:
    """Write the mean of the caches' logits, or of their probabilities at `temperature`, to `target`.

    Raises UserError, naming both values, where they are not of the same views, and where `target` cannot be written.
    One process does it, a block at a time; interrupted, it goes on with the missing blocks.
    """
    for cache in caches:
        _require_logits(cache)
    for one, other in pairwise(caches):
        check_same_views(one, other)
    writer = BlockWriter(target, _plan(caches, temperature, software))
    for block in writer.missing():
        writer.put(block, _mean(caches, block, temperature))
    writer.publish()


def check_same_views(one: Cache, other: Cache) -> None:
    """Raise UserError, naming both values, unless two caches are of the same views of the same images."""
    names = Pair(f"the cache {one.path}", str(other.path), MEND)
    check_classes(names, one.classes, other.classes)
    if renderer_rule(one.header.renderer) != renderer_rule(other.header.renderer):
        names.refuse(f"images rendered by {one.header.renderer}", other.header.renderer)
    for split in SPLITS:
        ours, theirs = one.split(split), other.split(split)
        check_samples(names, split, ours, theirs)
        if ours.views != theirs.views:
            names.refuse(f"{ours.views} views of {split}", str(theirs.views))
        mixed, theirs_mixed = ("no mixed views" if table.mixed is None else "mixed views" for table in (ours, theirs))
        if mixed != theirs_mixed:
            names.refuse(f"{mixed} of {split}", theirs_mixed)
        for column, values in ours.of_views.items():
            _check_column(names, ours, column.name, values, theirs.of_views[column])


def _check_column(names: Pair, table: Table, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    for view in range(table.views):
        row = first_true((ours[:, view] != theirs[:, view]).reshape(len(table), -1).any(axis=1))
        if row is not None:
            where = f"{name} {ours[row, view].tolist()} for view {view} of {table.paths[row]}"
            names.refuse(where, str(theirs[row, view].tolist()))


def renderer_rule(renderer: str) -> str:
    """The rule of a renderer's name; "RULE batched" gives the images of RULE, a grey level here and there aside."""
    return renderer.removesuffix(" batched")


def _require_logits(cache: Cache) -> None:
    other = sorted(set(cache.header.features) - TABLE_FEATURES)
    if other:
        raise UserError(
            f"{cache.path} does not hold teachers' logits as they were (it uses {', '.join(other)}); combine the files "
            "it was made from."
        )


def _plan(caches: Sequence[Cache], temperature: float | None, software: str) -> CachePlan:
    """The first cache's header and tables, with the teachers of all, and a row for each mean that occurs."""
    rows, numbers = _all_teachers(caches)
    of_splits = {split: _members(caches, numbers, split) for split in SPLITS}
    means, mean_M = np.unique(np.concatenate(list(of_splits.values())), axis=0, return_inverse=True)
    for members in means:
        _require_distinct(rows, members.tolist(), caches)
    how = "" if temperature is None else f" of probabilities at T={temperature:g}"
    teachers = (*rows, *(mean_of(rows, members.tolist(), how) for members in means))
    column_M = len(rows) + mean_M.reshape(-1)
    types = sorted({cache.header.compute_dtype for cache in caches})
    header = replace(caches[0].header, software=software, compute_dtype=" and ".join(types))
    if temperature is not None:
        header = replace(header, features=(*header.features, ONE_TEMPERATURE), temperature=temperature)
    plan = CachePlan(header, {split: table.without_logits() for split, table in caches[0].splits.items()})
    train = len(of_splits["train"])
    created = max(cache.header.created for cache in caches)
    return plan.labelled_by(teachers, created, train=column_M[:train], val=column_M[train:])


def _require_distinct(rows: Sequence[TeacherRow], members: Sequence[int], caches: Sequence[Cache]) -> None:
    """Raise UserError where one teacher would count twice in a mean."""
    singles = [rows[single].sha256 for member in members for single in _singles(rows, member)]
    twice = next((digest for digest in singles if singles.count(digest) > 1), None)
    if twice is not None:
        files = dict.fromkeys(str(cache.path) for cache in caches if twice in cache.teacher_digests)
        raise UserError(
            f"{', '.join(files)}: logits of the same teacher (SHA-256 {twice[:16]}...) would count twice in the mean; "
            "name caches of different teachers."
        )


def _singles(rows: Sequence[TeacherRow], number: int) -> list[int]:
    """The single teachers that a row stands for."""
    members = rows[number].member_rows
    return [single for member in members for single in _singles(rows, member)] if members else [number]


def _all_teachers(caches: Sequence[Cache]) -> tuple[list[TeacherRow], list[np.ndarray]]:
    """The teachers of all caches, each once, and for each cache where its own now stand."""
    rows: list[TeacherRow] = []
    numbers = []
    for cache in caches:
        new: list[int] = []
        for row in cache.header.teachers:
            row = replace(row, members=" ".join(str(new[member]) for member in row.member_rows))
            if row not in rows:
                rows.append(row)
            new.append(rows.index(row))
        numbers.append(np.array(new))
    return rows, numbers


def _members(caches: Sequence[Cache], numbers: Sequence[np.ndarray], split: str) -> np.ndarray:
    """The teacher that each cache has for each sample: int [N, caches]."""
    columns = (number[cache.split(split).teacher_N] for cache, number in zip(caches, numbers, strict=True))
    return np.stack(list(columns), axis=1)


def _mean(caches: Sequence[Cache], block: Block, temperature: float | None) -> np.ndarray:
    """A block's rows, float16 [B, K], computed in float64."""
    rows = (cache.split(block.split).logits_NVK[block.start : block.stop, block.view] for cache in caches)
    if temperature is None:
        return np.asarray(sum(logits_BK.astype(np.float64) for logits_BK in rows) / len(caches), LOGITS.dtype)
    log_p_BK = np.full((1, 1), -np.inf)
    for logits_BK in rows:
        log_p_BK = np.logaddexp(log_p_BK, _log_softmax(logits_BK.astype(np.float64) / temperature))
    lowest = np.finfo(LOGITS.dtype).min
    return np.maximum(temperature * (log_p_BK - np.log(len(caches))), lowest).astype(LOGITS.dtype)


def _log_softmax(logits_BK: np.ndarray) -> np.ndarray:
    return logits_BK - np.logaddexp.reduce(logits_BK, axis=1, keepdims=True)
