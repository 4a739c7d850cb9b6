"""Plans of caches that teachers are to write: which views of which images, and which teacher labels each image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_dist.cache import UNLABELLED_IMAGES, Cache, CachePlan, Header, Mixed, Table, mean_of
from kd_dist.data.folds import fold_numbers
from kd_dist.data.samples import SPLITS, Dataset
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.label.labeller import LabelData
from kd_dist.label.teachers import Teacher
from kd_dist.version import software


@dataclass(frozen=True)
class ViewRule:
    """How views are drawn: V of each image, the evaluation view among them, with crops of these area shares;
    `mixed_share` of train's drawn views are mixed.
    """

    views: int
    crop_scale: tuple[float, float]
    seed: int
    mixed_share: float = 0.0


def plan(
    teachers: Sequence[Teacher], data: LabelData, rule: ViewRule, dtype: str, top_k: int | None = None
) -> CachePlan:
    """A cache of views that are drawn now. One teacher labels all images; of several, each labels the images of train
    that it was not trained on, and val has the mean of all.

    Raises UserError unless they are one, or the teachers of all folds of this train split and see images alike.
    """
    tables = {split: _table(data, split, rule) for split in SPLITS}
    drawn = CachePlan(_header(teachers[0], data, rule, dtype), tables).keeping_top(top_k)
    return _mixing(_by_folds(drawn, teachers, data), rule)


def plan_like(
    teachers: Sequence[Teacher], data: LabelData, like: Cache, dtype: str, top_k: int | None = None
) -> CachePlan:
    """As plan, with the same views as another cache, whatever this version would draw.

    Raises UserError where that cache is of other data, or of images that are not rendered here.
    """
    _require_fit(data.samples, like)
    views.require_renderer(like.header.renderer, like.path)
    rule = ViewRule(like.views, like.header.crop_scale, like.header.seed)
    header = _header(teachers[0], data, rule, dtype)
    return _by_folds(CachePlan.like(like, header).keeping_top(top_k), teachers, data)


def plan_extended(teachers: Sequence[Teacher], data: LabelData, cache: Cache, views_V: int) -> CachePlan:
    """A cache that begins with the views and logits of an existing one and has V views.

    Raises UserError where that cache is of other data or teachers, or its views are not drawn and rendered here.
    """
    header = cache.header
    if header.view_rule != views.SAMPLER:
        raise UserError(
            f"{cache.path} drew its views by {header.view_rule}, which this version does not know; write a new cache."
        )
    if {teacher.row.sha256 for teacher in teachers} != cache.teacher_digests:
        raise UserError(
            f"{', '.join(str(teacher.path) for teacher in teachers)} {'are' if len(teachers) > 1 else 'is'} not what "
            f"labelled {cache.path}; name the model.pt of {'each' if len(cache.teacher_digests) > 1 else 'that'} "
            "teacher."
        )
    _require_fit(data.samples, cache)
    views.require_renderer(header.renderer, cache.path)
    rule = ViewRule(views_V, header.crop_scale, header.seed, header.mixed_share)
    return plan(teachers, data, rule, header.compute_dtype, header.top_k or None).beginning_with(cache)


def _require_fit(samples: Dataset, cache: Cache) -> None:
    cache.check_fits(samples.name, samples.classes, {split: samples.split(split) for split in SPLITS})


def _header(teacher: Teacher, data: LabelData, rule: ViewRule, dtype: str) -> Header:
    samples = data.samples
    if teacher.classes != samples.classes:
        raise UserError(
            f"the teacher knows {len(teacher.classes)} classes ({teacher.classes[0]}, ...), {samples.root} has "
            f"{len(samples.classes)} ({samples.classes[0]}, ...); name the data it was trained on with --data."
        )
    return Header(
        classes=teacher.classes,
        dataset=samples.name,
        image_size=teacher.row.image_size,
        mean=teacher.mean,
        std=teacher.std,
        renderer=data.pixels["train"].renderer,
        compute_dtype=dtype,
        view_rule=views.SAMPLER,
        crop_scale=rule.crop_scale,
        seed=rule.seed,
        created=teacher.finished,
        software=software(),
        teachers=(teacher.row,),
        features=() if samples.train.is_labelled_N.all() else (UNLABELLED_IMAGES,),
    )


def _table(data: LabelData, split: str, rule: ViewRule) -> Table:
    samples, sizes_N2 = data.samples.split(split), data.pixels[split].sizes_N2
    box_NV4, flip_NV = views.cached_views(rule.seed, split, sizes_N2, range(rule.views), rule.crop_scale)
    return Table(
        paths=samples.paths,
        labels_N=samples.labels_N,
        bytes_N=samples.bytes_N,
        sha256_N32=samples.sha256_N32,
        teacher_N=np.zeros(len(samples), np.int16),
        box_NV4=box_NV4,
        flip_NV=flip_NV,
    )


def _mixing(plan: CachePlan, rule: ViewRule) -> CachePlan:
    """The same with a share of train's drawn views mixed; val has no mixed views.

    Where train is cut into folds, both images of a mixed view are of one fold: a teacher that was not trained on the
    one was not trained on the other.
    """
    if not rule.mixed_share:
        return plan
    train, folds = plan.tables["train"], max(row.folds for row in plan.header.teachers)
    group_N = fold_numbers(train.labels_N, train.sha256_N32, folds) if folds else None
    mixed = {"train": _mixed(plan, "train", rule.mixed_share, group_N), "val": _mixed(plan, "val", 0.0, None)}
    return plan.mixing(rule.mixed_share, mixed)


def _mixed(plan: CachePlan, split: str, share: float, group_N: np.ndarray | None) -> Mixed:
    table, seed = plan.tables[split], plan.header.seed
    partner_NV, partner_view_NV, weight_NV, paste_NV4 = views.mixed_views(
        seed, split, len(table), range(table.views), share, group_N
    )
    return Mixed(partner_NV=partner_NV, partner_view_NV=partner_view_NV, weight_NV=weight_NV, paste_NV4=paste_NV4)


def _by_folds(plan: CachePlan, teachers: Sequence[Teacher], data: LabelData) -> CachePlan:
    """The same with each train image labelled by the one teacher that was not trained on it, and val by the mean."""
    if len(teachers) == 1:
        return plan
    teachers = _in_order_of_folds(teachers, data)
    rows, train = [teacher.row for teacher in teachers], data.samples.train
    fold_N = fold_numbers(train.labels_N, train.sha256_N32, len(rows))
    require_partners_share(fold_N, plan.tables["train"].mixed)
    of_val_N = np.full(len(plan.tables["val"]), len(rows))
    created = max(teacher.finished for teacher in teachers)
    return plan.labelled_by((*rows, mean_of(rows, range(len(rows)))), created, train=fold_N, val=of_val_N)


def _in_order_of_folds(teachers: Sequence[Teacher], data: LabelData) -> list[Teacher]:
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
    return _one_of_each(teachers, first.row.folds)


def _one_of_each(teachers: Sequence[Teacher], folds: int) -> list[Teacher]:
    by_fold: dict[int, Teacher] = {}
    for teacher in teachers:
        if (other := by_fold.get(teacher.row.fold)) is not None:
            fold = f"fold {teacher.row.fold} of {folds}"
            raise UserError(f"{other.path} and {teacher.path} both leave out {fold}: name one teacher of each.")
        by_fold[teacher.row.fold] = teacher
    if missing := sorted(set(range(folds)) - by_fold.keys()):
        raise UserError(
            f"no teacher leaves out fold {', '.join(map(str, missing))} of {folds}: train it with --folds {folds} "
            f"--fold {missing[0]}, and name all {folds}."
        )
    return [by_fold[fold] for fold in range(folds)]


def require_partners_share(fold_N: np.ndarray, mixed: Mixed | None) -> None:
    """Raise UserError where a mixed view is made of images of two folds: each teacher was trained on one of them."""
    if mixed is not None and (fold_N[mixed.partner_NV] != fold_N[:, None]).any():
        raise UserError(
            "the views given by --like are mixed of images of different folds of train, and a teacher was trained on "
            "one of the two: draw other views by --views and --mixed-views."
        )
