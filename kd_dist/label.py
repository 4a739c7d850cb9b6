"""Writing the cache: a trained teacher's logits on views of every image, by all ranks in blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_dist import checkpoint, views
from kd_dist.cache import BlockWriter, Cache, Header, Table, TeacherRow
from kd_dist.dataset import SampleList
from kd_dist.errors import UserError
from kd_dist.inference import FORWARD_BATCH, Forward
from kd_dist.job import Data, software
from kd_dist.models import TEACHERS
from kd_dist.runtime import Interrupted, Runtime, StopRequest


@dataclass(frozen=True)
class Teacher:
    """A trained teacher as its run folder's model.pt holds it."""

    model: nn.Module
    row: TeacherRow
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]
    crop_scale: tuple[float, float]
    finished: str


def load_teacher(path: Path, device: torch.device) -> Teacher:
    """Read a teacher's final weights. Raises UserError where the file is missing, damaged, or not a teacher's."""
    saved = checkpoint.load_model(path)
    if saved.get("kind") != "teacher":
        raise UserError(f"{path} holds a {saved.get('kind')}, not a teacher; name a teacher's model.pt.")
    if saved["arch"] not in TEACHERS:
        raise UserError(f"{path} is a {saved['arch']}, which is not known; add it to TEACHERS in kd_dist/models.py.")
    model = TEACHERS[saved["arch"]](len(saved["classes"]))
    model.load_state_dict(saved["weights"])
    row = TeacherRow(
        sha256=checkpoint.weights_digest(saved["weights"]),
        arch=saved["arch"],
        seed=saved["seed"],
        fold=-1,
        image_size=saved["image_size"],
        val_top1=saved["val_top1"],
    )
    model = model.to(device, memory_format=torch.channels_last).eval()
    return Teacher(
        model,
        row,
        mean=tuple(saved["mean"]),
        std=tuple(saved["std"]),
        classes=tuple(saved["classes"]),
        crop_scale=tuple(saved["settings"]["crop_scale"]),
        finished=saved["finished"],
    )


def plan(
    teacher: Teacher, data: Data, views_V: int, crop_scale: tuple[float, float], seed: int, dtype: str
) -> tuple[Header, dict[str, Table]]:
    """Everything of a cache but the logits: its header and, for each split, its table."""
    if teacher.classes != data.samples.classes:
        raise UserError(
            f"the teacher knows {len(teacher.classes)} classes ({teacher.classes[0]}, ...), {data.samples.root} has "
            f"{len(data.samples.classes)} ({data.samples.classes[0]}, ...); name the data it was trained on with "
            "--data."
        )
    header = Header(
        classes=teacher.classes,
        dataset=data.samples.name,
        image_size=teacher.row.image_size,
        mean=teacher.mean,
        std=teacher.std,
        renderer=views.RENDERER,
        compute_dtype=dtype,
        view_sampler=views.sampler_name(crop_scale),
        seed=seed,
        created=teacher.finished,
        software=software(),
        teachers=(teacher.row,),
    )
    tables = {
        split: _table(samples, views.cached_views(seed, split, data.pixels[split].sizes_N2, range(views_V), crop_scale))
        for split, samples in (("train", data.samples.train), ("val", data.samples.val))
    }
    return header, tables


def _table(samples: SampleList, boxes_and_flips: tuple[np.ndarray, np.ndarray]) -> Table:
    box_NV4, flip_NV = boxes_and_flips
    teacher_N = np.zeros(len(samples), np.int16)
    return Table(samples.paths, samples.labels_N, samples.bytes_N, samples.sha256_N32, teacher_N, box_NV4, flip_NV)


def write_cache(
    target: Path,
    teacher: Teacher,
    data: Data,
    header: Header,
    tables: Mapping[str, Table],
    runtime: Runtime,
    stop: StopRequest,
    progress: Callable[[int, int], None],
    known: Cache | None = None,
) -> None:
    """Label what is missing, share by share on all ranks, and publish. Raises UserError where it cannot be written.

    `known` is a cache of the same teacher and data with fewer views, whose rows are taken over. Blocks written before
    an interruption are kept, whatever the number of ranks was then.
    """
    # Rank 0 makes the parts folder before the others look into it.
    runtime.on_main(lambda: BlockWriter(target, header, tables) and None)
    writer = BlockWriter(target, header, tables)
    missing = runtime.on_main(writer.missing)
    forward = {split: _forward(teacher, data, split, header, runtime.device) for split in tables}
    mine = runtime.shard(len(missing))
    for done, position in enumerate(mine, start=1):
        if stop.signal is not None:  # no need to agree: every block that was put is safe
            raise Interrupted(stop.signal)
        block = missing[position]
        writer.put(block, _labels(block, forward, tables, known))
        progress(done, len(mine))
    runtime.wait_for_all(f"label {target}")
    runtime.on_main(lambda: writer.publish() and None)


def _forward(teacher: Teacher, data: Data, split: str, header: Header, device: torch.device) -> Forward:
    pictures = (data.pixels[split], header.image_size, header.mean, header.std)
    return Forward(teacher.model, *pictures, device, header.compute_dtype)


def _labels(block, forward: Mapping[str, Forward], tables: Mapping[str, Table], known: Cache | None) -> np.ndarray:
    if known is not None and block.view < known.split(block.split).views:
        return known.split(block.split).logits_NVK[block.start : block.stop, block.view]
    shown = _shown(tables[block.split], block.view, block.start, block.stop)
    with np.errstate(over="ignore"):  # the writer refuses what does not fit float16, naming the image
        return forward[block.split].logits(shown).astype(np.float16)


def _shown(table: Table, view: int, start: int, stop: int) -> views.Shown:
    return views.Shown.plain(np.arange(start, stop), table.box_NV4[start:stop, view], table.flip_NV[start:stop, view])


def keep_views(table: Table, known: Table) -> Table:
    """A longer table whose first views are a cache's own, whatever this version's generator would draw for them."""
    v = known.views
    box_NV4 = np.concatenate([known.box_NV4, table.box_NV4[:, v:]], axis=1)
    return replace(table, box_NV4=box_NV4, flip_NV=np.concatenate([known.flip_NV, table.flip_NV[:, v:]], axis=1))


def largest_difference(cache: Cache, teacher: Teacher, data: Data, rows: int, runtime: Runtime) -> tuple[float, int]:
    """Recompute about `rows` rows, drawn in whole forward batches over splits and views: the largest |new - stored| /
    max(1, |stored|), and how many rows were compared.
    """
    batches = [
        (split, view, start)
        for split, table in cache.splits.items()
        for view in range(table.views)
        for start in range(0, len(table), FORWARD_BATCH)
    ]
    drawn = np.random.default_rng(0).permutation(len(batches))[: max(1, round(rows / FORWARD_BATCH))]
    differences = [
        _difference(cache, teacher, data, *batches[drawn[i]], runtime.device) for i in runtime.shard(len(drawn))
    ]
    everyone = [pair for mine in runtime.gather(differences) for pair in mine]
    return float(np.max([worst for worst, _ in everyone])), sum(count for _, count in everyone)


def _difference(
    cache: Cache, teacher: Teacher, data: Data, split: str, view: int, start: int, device
) -> tuple[float, int]:
    table, header = cache.split(split), cache.header
    stop = min(len(table), start + FORWARD_BATCH)
    forward = _forward(teacher, data, split, header, device)
    new_BK = forward.logits(_shown(table, view, start, stop))
    stored_BK = table.logits_NVK[start:stop, view].astype(np.float32)
    difference_BK = np.abs(new_BK - stored_BK) / np.maximum(1, np.abs(stored_BK))
    return float(difference_BK.max()), stop - start
