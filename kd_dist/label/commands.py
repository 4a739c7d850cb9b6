"""The commands of `python -m kd_dist.cache` that need the images or a teacher: verify, write and extend."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kd_dist import job, label
from kd_dist.cache import Cache, CachePlan, open_cache
from kd_dist.cache.format import PUBLISHED, checksum_file_of
from kd_dist.config import MEAN, STD, DataConfig, check_crop_scale, check_mixed_views, check_seed, command
from kd_dist.data.releases import locate
from kd_dist.data.samples import SPLITS
from kd_dist.data.scan import scan
from kd_dist.dist.endings import StopRequest
from kd_dist.dist.runtime import Runtime, joined
from kd_dist.errors import UserError, require_installed
from kd_dist.images import views
from kd_dist.inference import compute_dtype
from kd_dist.label.foreign import ForeignTeacher, is_foreign
from kd_dist.label.teachers import Teacher
from kd_dist.label.verify import largest_difference, why_not_computed

TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""How far a logit that is computed again may lie from the stored one, as a share of max(1, |logit|), by the type that
convolutions run in.

float16 storage alone costs 0.0005. The rest covers other hardware adding in another order, and bfloat16's three digits.
"""


def verify(options: argparse.Namespace) -> None:
    """Check a cache by itself, against the data, and against the teacher."""
    data = options.data or os.environ.get("KD_DIST_DATA")
    with joined(options.device) as runtime, _opened(options.cache, runtime) as cache:
        rows = sum(len(table) * table.views for table in cache.splits.values())
        if not cache.has_checksum:
            job.say(runtime, f"checksum: not checked; there is no {checksum_file_of(cache.path).name} beside it")
        job.say(runtime, f"file: SHA-256 {cache.digest[:16]}..., complete, {rows:,} rows, all finite")
        if data is None and options.teacher is None:
            job.say(runtime, "data: not checked; name the image folder with --data or KD_DIST_DATA")
            job.say(runtime, "teacher: not checked; name its model.pt with --teacher (needs --data)")
            return
        if data is None:
            raise UserError("--teacher computes logits again from the images; name their folder with --data.")
        _verify_data(cache, Path(data), options, runtime)
        if options.teacher is None:
            job.say(runtime, "teacher: not checked; name its model.pt with --teacher")
        else:
            _verify_teacher(cache, options, runtime)


@contextmanager
def _opened(path: Path, runtime: Runtime) -> Iterator[Cache]:
    """The cache, or the one that a folder written by `export` gives back, in a temporary file of each node."""
    if not (path / PUBLISHED).is_file():
        yield open_cache(path, runtime.once_a_node)
        return
    require_installed("hf", "pyarrow")
    from kd_dist.publish.folder import restore

    scratch = Path(runtime.once_a_node(f"make a folder for {path}", lambda: tempfile.mkdtemp(prefix="kd_dist-")))
    try:
        target = scratch / "logits.h5"
        same = runtime.once_a_node(f"restore {path}", lambda: restore(path, target))
        cache = open_cache(target, runtime.once_a_node)
        version = "" if same else "; another version of HDF5 wrote that one"
        job.say(runtime, f"folder: the Parquet files give back the columns of the exported cache{version}")
        yield replace(cache, path=path)
        runtime.wait_for_all()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _verify_data(cache: Cache, data: Path, options: argparse.Namespace, runtime: Runtime) -> None:
    share, unlabelled = options.val_share, Path(options.unlabelled) if options.unlabelled else None
    root = locate(data, explicit=True, val_share=share)
    samples = scan(root, val_share=share, unlabelled=unlabelled)  # without the stored digests: all are read again
    cache.check_fits(samples.name, samples.classes, {split: samples.split(split) for split in SPLITS})
    job.say(
        runtime,
        f"data: {len(samples.train):,} train and {len(samples.val):,} val images in {root} are the cache's, in its "
        "order",
    )


def _verify_teacher(cache: Cache, options: argparse.Namespace, runtime: Runtime) -> None:
    header = cache.header
    data, teachers = _data_and_teachers(options, runtime, (header.image_size, header.mean, header.std))
    known = {row.sha256: row.trained_on for row in cache.header.teachers if not row.members}
    for teacher in teachers:
        if teacher.row.sha256 not in known:
            raise UserError(
                f"{teacher.path} has digest {teacher.row.sha256}, but {cache.path} was labelled by "
                f"{', '.join(known)}; name that teacher's model.pt."
            )
    views.require_renderer(cache.header.renderer, cache.path)
    labeller = label.Labeller(teachers, data, cache.header, runtime.device)
    why_not = why_not_computed(cache, labeller)
    if why_not:
        job.say(runtime, f"teacher: not checked; {why_not}")
        return
    worst, rows = largest_difference(cache, labeller, options.rows, runtime)
    allowed = TOLERANCE[cache.header.compute_dtype]
    if not worst <= allowed:
        raise UserError(
            f"{cache.path} does not hold what {', '.join(map(str, options.teacher))} gives: over {rows:,} rows that "
            f"were computed again a logit differs by {worst:.3g} (share of max(1, |logit|)), {allowed} is allowed; "
            "write the cache anew."
        )
    job.say(
        runtime,
        f"teacher: {rows:,} rows computed again, largest difference {worst:.2g} of max(1, |logit|), {allowed} is "
        "allowed",
    )
    if absent := [text for digest, text in known.items() if digest not in {teacher.row.sha256 for teacher in teachers}]:
        job.say(runtime, f"teacher: not checked are rows of the teachers trained {', '.join(absent)}: name them too")


def write(options: argparse.Namespace) -> None:
    """Write a cache from one teacher's checkpoint, or from those of all folds."""
    _require_one_source_of_views(options)
    with joined(options.device) as runtime:
        like = open_cache(options.like, runtime.once_a_node) if options.like else None
        size, mean, std = options.image_size, options.mean or MEAN, options.std or STD
        data, teachers = _data_and_teachers(options, runtime, (size, mean, std))
        rule = None if like else _rule(options, teachers[0])
        dtype = compute_dtype(runtime.device, options.precision)
        if like:
            plan = label.plan_like(teachers, data, like, dtype, options.top_k)
        else:
            assert rule is not None
            plan = label.plan(teachers, data, rule, dtype, options.top_k)
        _write(options.output, plan, teachers, data, runtime)


def _data_and_teachers(
    options: argparse.Namespace, runtime: Runtime, seen: tuple[int | None, tuple[float, ...], tuple[float, ...]]
) -> tuple[label.LabelData, list[Teacher]]:
    """The images, and the teachers that --teacher names; one that was not trained here `seen` images of this size,
    normalised by this mean and deviation.
    """
    foreign = [name for name in options.teacher if is_foreign(name, options.weights)]
    if not foreign:
        _require_no_flags_of_foreign_teachers(options)
        teachers = [label.load_teacher(Path(path), runtime.device) for path in options.teacher]
        return _open_data(options, runtime), teachers
    if len(options.teacher) > 1:
        raise UserError(f"--teacher {foreign[0]} was not trained here, so it labels alone; name one teacher.")
    image_size, mean, std = seen
    if image_size is None:
        raise UserError(f"which size does --teacher {foreign[0]} see images at? Add --image-size 224, say.")
    teacher = ForeignTeacher(foreign[0], options.weights, options.class_map)
    data = _open_data(options, runtime)
    job.say(runtime, teacher.what_it_saw(data.samples.classes))
    return data, [teacher.teacher(data.samples.classes, image_size, mean, std, runtime.device)]


def _require_no_flags_of_foreign_teachers(options: argparse.Namespace) -> None:
    for name in ("class_map", "image_size", "mean", "std"):
        if getattr(options, name, None) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is for a teacher that was not trained here; {options.teacher[0]} has its own.")


def _require_one_source_of_views(options: argparse.Namespace) -> None:
    if options.like is None and options.views is None:
        raise UserError(
            "--views V or --like FILE is required: how many views to draw, or the cache whose views to label."
        )
    for name in ("views", "mixed_views", "seed", "crop_scale"):
        if options.like is not None and getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--like takes the views of {options.like} as they are: leave out {flag}.")


def _rule(options: argparse.Namespace, teacher: Teacher) -> label.ViewRule:
    """How views are drawn; crop scale and seed are the teacher's own where none were typed."""
    rule = label.ViewRule(
        views=options.views,
        crop_scale=tuple(options.crop_scale or teacher.crop_scale),
        seed=max(0, teacher.row.seed) if options.seed is None else options.seed,
        mixed_share=options.mixed_views or 0.0,
    )
    check_seed(rule.seed)
    check_crop_scale(rule.crop_scale)
    check_mixed_views(rule.mixed_share, rule.views)
    return rule


def extend(options: argparse.Namespace) -> None:
    """Write a cache with more views, starting with those of an existing one."""
    with joined(options.device) as runtime:
        cache = open_cache(options.cache, runtime.once_a_node)
        if options.views <= cache.views:
            raise UserError(f"--views {options.views}, but {cache.path} holds {cache.views} already; ask for more.")
        if cache.is_combined:
            raise UserError(f"{cache.path} is the mean of other caches: extend those, then combine them again.")
        teachers = [label.load_teacher(Path(path), runtime.device) for path in options.teacher]
        data = _open_data(options, runtime)
        plan = label.plan_extended(teachers, data, cache, options.views)
        _write(options.output, plan, teachers, data, runtime)


def _write(target: Path, plan: CachePlan, teachers: list[Teacher], data: label.LabelData, runtime: Runtime) -> None:
    labeller = label.Labeller(teachers, data, plan.header, runtime.device)
    progress = job.progress_lines(runtime, "writing the cache, blocks")
    with StopRequest() as stop:
        label.write_cache(target, plan, labeller, runtime, stop, progress)
    job.say(runtime, f"wrote {target}; `{command('kd_dist.cache', 'info', target)}` describes it")


def _open_data(options: argparse.Namespace, runtime: Runtime) -> label.LabelData:
    names = ("data", "val_share", "unlabelled", "pixels", "pixels_dir")
    return job.open_data(DataConfig(**{name: getattr(options, name) for name in names}), runtime)
