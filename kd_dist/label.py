"""Writing the cache: trained teachers' logits on views of every image, by all ranks in blocks."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_dist import checkpoint, views
from kd_dist.cache import (
    MIXED_VIEWS,
    TOP_K,
    VIEW_FEATURES,
    Block,
    BlockWriter,
    Cache,
    Header,
    Mixed,
    Table,
    TeacherRow,
    TopK,
    bare,
    mean_of,
    rows_of,
)
from kd_dist.dataset import SampleList
from kd_dist.errors import UserError
from kd_dist.folds import parts_of
from kd_dist.inference import FORWARD_BATCH, Forward, ahead
from kd_dist.job import Data
from kd_dist.models import TEACHERS
from kd_dist.runtime import Interrupted, Runtime, StopRequest
from kd_dist.version import software

GPU_BLOCKS_AT_ONCE = 2


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
    path: Path = Path("model.pt")
    data: str = ""  # fingerprint of the train split that it was trained on, or on a part of


def load_teacher(path: Path, device: torch.device) -> Teacher:
    """Read a teacher's final weights. Raises UserError where the file is missing, damaged, or not a teacher's."""
    saved = checkpoint.load_model(path)
    if saved.get("kind") != "teacher":
        raise UserError(f"{path} holds a {saved.get('kind')}, not a teacher; name a teacher's model.pt.")
    if saved["arch"] not in TEACHERS:
        raise UserError(f"{path} is a {saved['arch']}, which is not known; add it to TEACHERS in kd_dist/models.py.")
    fold = saved.get("fold") or {"number": -1, "folds": 0}
    model = TEACHERS[saved["arch"]](len(saved["classes"]))
    model.load_state_dict(saved["weights"])
    row = TeacherRow(
        sha256=checkpoint.weights_digest(saved["weights"]),
        arch=saved["arch"],
        seed=saved["seed"],
        fold=fold["number"],
        image_size=saved["image_size"],
        val_top1=saved.get("val_top1"),
        folds=fold["folds"],
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
        path=path,
        data=saved["data"]["train"],
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
        renderer=data.pixels["train"].renderer,
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


def shortened(header: Header, top_k: int | None) -> Header:
    """The header of a cache that keeps the k largest logits of each row; the same where that is None.

    Raises UserError where that would leave no class out.
    """
    if top_k is None:
        return header
    if top_k >= len(header.classes):
        raise UserError(
            f"--top-k {top_k} of {len(header.classes)} classes leaves none out: use a smaller one, or leave it out to "
            "keep all logits."
        )
    return replace(header, features=(*header.features, TOP_K), top_k=top_k)


def _table(samples: SampleList, boxes_and_flips: tuple[np.ndarray, np.ndarray]) -> Table:
    box_NV4, flip_NV = boxes_and_flips
    teacher_N = np.zeros(len(samples), np.int16)
    return Table(samples.paths, samples.labels_N, samples.bytes_N, samples.sha256_N32, teacher_N, box_NV4, flip_NV)


def plan_like(teacher: Teacher, data: Data, like: Cache, dtype: str) -> tuple[Header, dict[str, Table]]:
    """As plan, with the very views of another cache, whatever this version's generator would draw.

    Raises UserError where that cache is of other data, or of pictures that are not drawn here.
    """
    data.require_fit(like)
    views.require_renderer(like.header.renderer, like.path)
    header, _ = plan(teacher, data, 1, teacher.crop_scale, like.header.seed, dtype)
    features = tuple(feature for feature in like.header.features if feature in VIEW_FEATURES)
    header = replace(header, view_sampler=like.header.view_sampler, features=features)
    return header, {split: by_one(like.split(split)) for split in ("train", "val")}


def by_one(table: Table) -> Table:
    """A cache's table without its logits, for the first teacher to label."""
    return replace(bare(table), teacher_N=np.zeros(len(table), np.int16))


def out_of_fold(
    header: Header, tables: Mapping[str, Table], teachers: Sequence[Teacher], data: Data
) -> tuple[Header, dict[str, Table]]:
    """A plan in which each train image is labelled by the one teacher that never saw it, and val by the mean of all.

    Raises UserError unless these are the teachers of all parts of this train split, and see pictures alike.
    """
    teachers = _in_order_of_folds(teachers, data)
    rows = [teacher.row for teacher in teachers]
    train = data.samples.train
    part_N = parts_of(train.labels_N, train.sha256_N32, len(rows))
    _require_partners_share(part_N, tables["train"].mixed)
    created = max(teacher.finished for teacher in teachers)
    header = replace(header, teachers=(*rows, mean_of(rows, range(len(rows)))), created=created)
    of_val_N = np.full(len(tables["val"]), len(rows), np.int16)
    return header, {
        "train": replace(tables["train"], teacher_N=part_N.astype(np.int16)),
        "val": replace(tables["val"], teacher_N=of_val_N),
    }


def mixed(header: Header, tables: Mapping[str, Table], share: float) -> tuple[Header, dict[str, Table]]:
    """A plan in which a share of train's drawn views are mixed views; the same where that is 0. val has none.

    Where train is cut into parts the two images of a picture are of one part: who never saw the one saw neither.
    """
    if not share:
        return header, dict(tables)
    train, folds = tables["train"], max(row.folds for row in header.teachers)
    group_N = parts_of(train.labels_N, train.sha256_N32, folds) if folds else None
    rules = {"train": (share, group_N), "val": (0.0,)}
    blends = {
        split: Mixed(*views.mixed_views(header.seed, split, len(table), range(table.views), *rules[split]))
        for split, table in tables.items()
    }
    name = views.sampler_name(views.crop_scale_of(header.view_sampler), share)
    header = replace(header, view_sampler=name, features=(*header.features, MIXED_VIEWS))
    return header, {split: replace(table, mixed=blends[split]) for split, table in tables.items()}


def _in_order_of_folds(teachers: Sequence[Teacher], data: Data) -> list[Teacher]:
    first, fingerprint = teachers[0], data.samples.train.fingerprint
    for teacher in teachers:
        row = teacher.row
        if row.fold < 0 or row.val_top1 is None:
            why = "on all of train" if row.fold < 0 else "with --tune"
            raise UserError(f"{teacher.path} was trained {why}: train teachers with --folds K --fold 0 to K - 1 alone.")
        if teacher.data != fingerprint:
            raise UserError(
                f"{teacher.path} was trained on train images {teacher.data[:12]}, {data.samples.root} has "
                f"{fingerprint[:12]}: name the data it was trained on with --data."
            )
        for name, ours, theirs in (
            ("folds", first.row.folds, row.folds),
            ("image size", first.row.image_size, row.image_size),
            ("mean and std", (first.mean, first.std), (teacher.mean, teacher.std)),
        ):
            if ours != theirs:
                raise UserError(f"{first.path} has {name} {ours}, {teacher.path} {theirs}: name teachers of one set.")
    return _one_of_each([*teachers], first.row.folds)


def _require_partners_share(part_N: np.ndarray, blends: Mixed | None) -> None:
    for view in () if blends is None else blends.mixed_views():
        partner_N = blends.in_view(view)[0]
        if (part_N[partner_N] != part_N).any():
            raise UserError(
                "the views given by --like are mixed of images of different parts of train, and a teacher has seen one "
                "of the two: draw other views by --views and --mixed-views."
            )


def _one_of_each(teachers: list[Teacher], folds: int) -> list[Teacher]:
    by_fold: dict[int, Teacher] = {}
    for teacher in teachers:
        if (other := by_fold.get(teacher.row.fold)) is not None:
            part = f"part {teacher.row.fold} of {folds}"
            raise UserError(f"{other.path} and {teacher.path} both leave out {part}: name one teacher of each.")
        by_fold[teacher.row.fold] = teacher
    if missing := sorted(set(range(folds)) - by_fold.keys()):
        raise UserError(
            f"no teacher leaves out part {', '.join(map(str, missing))} of {folds}: train it with --folds {folds} "
            f"--fold {missing[0]}, and name all {folds}."
        )
    return [by_fold[fold] for fold in range(folds)]


class Labeller:
    """The logits of a header's teachers on views of the data, as far as these teachers and means of them go."""

    def __init__(self, teachers: Sequence[Teacher], data: Data, header: Header, device: torch.device):
        models = {teacher.row.sha256: teacher.model for teacher in teachers}
        pictures = (header.image_size, header.mean, header.std, device, header.compute_dtype)
        self.rows = header.teachers
        self.forwards = {
            (split, number): Forward(models[row.sha256], data.pixels[split], *pictures, data.threads)
            for split in data.pixels
            for number, row in enumerate(self.rows)
            if row.sha256 in models
        }

    def knows(self, number: int) -> bool:
        """Whether the rows of this teacher can be computed."""
        members = self.rows[number].member_rows
        return all(map(self.knows, members)) if members else ("train", number) in self.forwards

    def logits(self, split: str, table: Table, index_B: np.ndarray, view: int) -> np.ndarray:
        """Logits float32 [B, K] of some samples in one view, each by its own teacher.

        A teacher's samples go through it in their order in fixed batches, so that equal calls give equal bits.
        """
        shown, teacher_B = views.shown_in(table, index_B, view), table.teacher_N[index_B]
        logits_BK = None
        for number in np.unique(teacher_B):
            places = np.flatnonzero(teacher_B == number)
            rows = self._of_teacher(split, int(number), shown.at(places))
            logits_BK = np.empty((len(index_B), rows.shape[1]), np.float32) if logits_BK is None else logits_BK
            logits_BK[places] = rows
        return logits_BK

    def _of_teacher(self, split: str, number: int, shown: views.Shown) -> np.ndarray:
        members = self.rows[number].member_rows
        if not members:
            return self.forwards[split, number].logits(shown)
        total_BK = sum(self._of_teacher(split, member, shown).astype(np.float64) for member in members)
        return (total_BK / len(members)).astype(np.float32)


def write_cache(
    target: Path,
    teachers: Sequence[Teacher],
    data: Data,
    header: Header,
    tables: Mapping[str, Table],
    runtime: Runtime,
    stop: StopRequest,
    progress: Callable[[int, int], None],
    known: Cache | None = None,
) -> None:
    """Label what is missing, share by share on all ranks, and publish. Raises UserError where it cannot be written.

    `known` is a cache of the same teachers and data with fewer views, whose rows are taken over. Blocks written before
    an interruption are kept, whatever the number of ranks was then.
    """
    # Rank 0 makes the parts folder before the others look into it.
    runtime.on_main(lambda: BlockWriter(target, header, tables) and None)
    writer = BlockWriter(target, header, tables)
    missing = runtime.on_main(writer.missing)
    labeller = Labeller(teachers, data, header, runtime.device)
    mine = [missing[position] for position in runtime.shard(len(missing))]
    labelled = _labelled(mine, writer, labeller, tables, known, runtime.device, stop)
    with ThreadPoolExecutor(1) as files:  # a block is written while the next one is computed
        writing = deque()
        for done, write in enumerate(labelled, start=1):
            writing.append(files.submit(write))
            if len(writing) > 1:
                writing.popleft().result()
            progress(done, len(mine))
        while writing:
            writing.popleft().result()
    runtime.wait_for_all(f"label {target}")
    runtime.on_main(lambda: writer.publish() and None)


def _labelled(
    blocks: Sequence[Block],
    writer: BlockWriter,
    labeller: Labeller,
    tables: Mapping[str, Table],
    known: Cache | None,
    device: torch.device,
    stop: StopRequest,
) -> Iterator[Callable[[], None]]:
    """What writes each block, its rows computed. On a GPU two are worked on at once: one's pictures are drawn, or its
    logits fetched, while the other is in the network. Raises Interrupted.
    """

    def until_stopped() -> Iterator[Block]:
        for block in blocks:
            if stop.signal is not None:  # no need to agree: every block that was put is safe
                raise Interrupted(stop.signal)
            yield block

    def compute(block: Block) -> Callable[[], None]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins on the first one
        if known is not None and block.view < known.split(block.split).views:
            columns = known.split(block.split).row_columns
            return partial(writer.put_rows, block, [column[block.start : block.stop, block.view] for column in columns])
        return partial(writer.put, block, _labels(block, labeller, tables))

    return ahead(compute, until_stopped(), GPU_BLOCKS_AT_ONCE if device.type == "cuda" else 0)


def _labels(block: Block, labeller: Labeller, tables: Mapping[str, Table]) -> np.ndarray:
    rows_B = np.arange(block.start, block.stop)
    with np.errstate(over="ignore"):  # the writer refuses what does not fit float16, naming the image
        return labeller.logits(block.split, tables[block.split], rows_B, block.view).astype(np.float16)


def keep_views(table: Table, known: Table) -> Table:
    """A longer table whose first views are a cache's own, whatever this version's generator would draw for them."""
    longer = {
        column.field: np.concatenate([rows_of(known.of_views[column], 0, len(known)), values[:, known.views :]], axis=1)
        for column, values in table.of_views.items()
    }
    box_and_flip = {name: longer.pop(name) for name in ("box_NV4", "flip_NV")}
    return replace(table, **box_and_flip, mixed=Mixed(**longer) if longer else None)


def why_not_computed(cache: Cache, labeller: Labeller, teachers: Sequence[Teacher]) -> str | None:
    """Why no row of a cache can be computed from these teachers, in words; None where some can."""
    header = cache.header
    if header.temperature is not None:
        return (
            f"the rows are means of probabilities at temperature {header.temperature:g}, which the teachers' logits do "
            "not give again one by one: verify the caches it was combined from"
        )
    of_header = (header.image_size, header.mean, header.std)
    alike = all((teacher.row.image_size, teacher.mean, teacher.std) == of_header for teacher in teachers)
    if cache.is_combined and not (alike and " and " not in header.compute_dtype):
        return "the teachers saw or computed differently, see the caches it was combined from: verify those"
    if not any(len(_known(labeller, table)) for table in cache.splits.values()):
        return "each row is a mean of several teachers: name the model.pt of all of them"
    return None


def largest_difference(cache: Cache, labeller: Labeller, rows: int, runtime: Runtime) -> tuple[float, int]:
    """Recompute about `rows` rows, drawn in whole forward batches over splits and views: the largest |new - stored| /
    max(1, |stored|), and how many rows were compared. Rows of teachers that are not at hand are passed over.
    """
    known_N = {split: _known(labeller, table) for split, table in cache.splits.items()}
    batches = [
        (split, view, start)
        for split, table in cache.splits.items()
        for view in range(table.views)
        for start in range(0, len(known_N[split]), FORWARD_BATCH)
    ]
    drawn = np.random.default_rng(0).permutation(len(batches))[: max(1, round(rows / FORWARD_BATCH))]
    differences = []
    for split, view, start in (batches[drawn[i]] for i in runtime.shard(len(drawn))):
        index_B = known_N[split][start : start + FORWARD_BATCH]
        differences.append((_difference(cache, labeller, split, view, index_B), len(index_B)))
    everyone = [pair for mine in runtime.gather(differences) for pair in mine]
    return float(np.max([worst for worst, _ in everyone])), sum(count for _, count in everyone)


def _known(labeller: Labeller, table: Table) -> np.ndarray:
    """The rows of a split whose teachers are at hand."""
    known_T = np.array([labeller.knows(number) for number in range(len(labeller.rows))])
    return np.flatnonzero(known_T[table.teacher_N])


def _difference(cache: Cache, labeller: Labeller, split: str, view: int, index_B: np.ndarray) -> float:
    table = cache.split(split)
    new_BK = labeller.logits(split, table, index_B, view)
    if isinstance(table.logits_NVK, TopK):
        stored_BK, new_BK = table.logits_NVK.compared(new_BK, index_B, view)
    else:
        stored_BK = table.logits_NVK[index_B, view].astype(np.float32)
    return float((np.abs(new_BK - stored_BK) / np.maximum(1, np.abs(stored_BK))).max())
