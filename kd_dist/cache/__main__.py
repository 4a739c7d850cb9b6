"""`python -m kd_dist.cache`: describe, verify, write, extend and combine caches of soft labels. write, extend and
verify also run under torchrun.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_dist.cache.card import render_info
from kd_dist.cache.format import digest_file_of
from kd_dist.cache.reader import Cache, open_cache
from kd_dist.config import PIXELS, check_crop_scale, check_mixed_views, check_seed
from kd_dist.errors import UserError
from kd_dist.runtime import Runtime, StopRequest, joined, launched_rank, run_entry

TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""How far a recomputed logit may lie from the stored one, as a share of max(1, |logit|), by the type that convolutions
run in.

float16 storage alone costs 0.0005. The rest covers other hardware adding in another order, and bfloat16's three digits.
"""

PROG = "python -m kd_dist.cache"


def main(arguments: Sequence[str] | None = None) -> None:
    typed = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(typed) and launched_rank() != 0:
        return
    options = _parser().parse_args(typed)
    options.run(options)


def info(options: argparse.Namespace) -> None:
    """One screen about a cache and what its labels are worth."""
    cache = open_cache(options.cache)
    if launched_rank() == 0:
        print(render_info(cache))


def verify(options: argparse.Namespace) -> None:
    """Check a cache by itself, against the data, and against the teacher, saying what was checked and what was not."""
    from kd_dist import job

    cache = open_cache(options.cache)
    with joined(options.device) as runtime:
        rows = sum(table.logits_NVK.shape[0] * table.views for table in cache.splits.values())
        if not cache.noted:
            job.say(runtime, f"digest: not checked; there is no {digest_file_of(cache.path).name} beside it")
        job.say(runtime, f"file: digest {cache.digest[:16]}..., complete, {rows:,} rows, all finite")
        if options.data is None and options.teacher is None:
            job.say(runtime, "data: not checked; name the image folder with --data")
            job.say(runtime, "teacher: not checked; name its model.pt with --teacher (needs --data)")
            return
        if options.data is None:
            raise UserError("--teacher recomputes rows from the pictures; name their folder with --data.")
        _verify_data(cache, options, runtime)
        if options.teacher is None:
            job.say(runtime, "teacher: not checked; name its model.pt with --teacher")
        else:
            _verify_teacher(cache, options, runtime)


def _verify_data(cache: Cache, options: argparse.Namespace, runtime: Runtime) -> None:
    from kd_dist import job
    from kd_dist.dataset import locate, scan

    root = locate(Path(options.data), explicit=True)
    samples = scan(root)  # without the stored digests: every image is read again
    cache.check_fits(samples.name, samples.classes, {"train": samples.train, "val": samples.val})
    job.say(
        runtime,
        f"data: {len(samples.train):,} train and {len(samples.val):,} val images in {root} are the cache's, in its "
        "order",
    )


def _verify_teacher(cache: Cache, options: argparse.Namespace, runtime: Runtime) -> None:
    from kd_dist import job, label, views

    teachers = [label.load_teacher(path, runtime.device) for path in options.teacher]
    known = {row.sha256: row.trained_on for row in cache.header.teachers if not row.members}
    for teacher in teachers:
        if teacher.row.sha256 not in known:
            raise UserError(
                f"{teacher.path} has digest {teacher.row.sha256}, but {cache.path} was labelled by "
                f"{', '.join(known)}; name that teacher's model.pt."
            )
    views.require_renderer(cache.header.renderer, cache.path)
    data = job.open_data(_source(options), runtime)
    labeller = label.Labeller(teachers, data, cache.header, runtime.device)
    why_not = label.why_not_computed(cache, labeller, teachers)
    if why_not:
        job.say(runtime, f"teacher: not checked; {why_not}")
        return
    worst, rows = label.largest_difference(cache, labeller, options.rows, runtime)
    allowed = TOLERANCE[cache.header.compute_dtype]
    if not worst <= allowed:
        raise UserError(
            f"{cache.path} does not hold what {', '.join(map(str, options.teacher))} gives: over {rows:,} recomputed "
            f"rows a logit differs by {worst:.3g} (share of max(1, |logit|)), {allowed} is allowed; write the cache "
            "anew."
        )
    job.say(
        runtime,
        f"teacher: {rows:,} rows recomputed, largest difference {worst:.2g} of max(1, |logit|), {allowed} is allowed",
    )
    if absent := [text for digest, text in known.items() if digest not in {teacher.row.sha256 for teacher in teachers}]:
        job.say(runtime, f"teacher: not checked are rows of the teachers trained {', '.join(absent)}: name them too")


def write(options: argparse.Namespace) -> None:
    """Write a cache from an existing checkpoint; from those of all K folds, each train image by the one teacher that
    never saw it, and val by the mean of the K.
    """
    from kd_dist import job, label
    from kd_dist.inference import compute_dtype

    like = _open_like(options)
    with joined(options.device) as runtime:
        teachers = [label.load_teacher(path, runtime.device) for path in options.teacher]
        data = job.open_data(_source(options), runtime)
        dtype = compute_dtype(runtime.device, options.precision)
        if like is not None:
            header, tables = label.plan_like(teachers[0], data, like, dtype)
        else:
            drawn = _drawn(options, teachers[0])
            header, tables = label.plan(teachers[0], data, options.views, *drawn, dtype)
        header = label.shortened(header, options.top_k)
        if len(teachers) > 1:
            header, tables = label.out_of_fold(header, tables, teachers, data)
        header, tables = label.mixed(header, tables, options.mixed_views or 0.0)
        _label(options.output, teachers, data, header, tables, runtime, None)


def _open_like(options: argparse.Namespace) -> Cache | None:
    """The cache whose views are to be labelled, None where new ones are drawn."""
    if options.like is None:
        if options.views is None:
            raise UserError("how many views? Add --views 16, or --like FILE for those of another cache.")
        return None
    for name in ("views", "mixed_views", "seed", "crop_scale"):
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--like takes the views of {options.like} as they are: leave out {flag}.")
    return open_cache(options.like)


def _drawn(options: argparse.Namespace, teacher) -> tuple[tuple[float, float], int]:
    """How views are drawn: area shares and seed, the teacher's own where none were typed."""
    crop_scale = tuple(options.crop_scale or teacher.crop_scale)
    seed = teacher.row.seed if options.seed is None else options.seed
    check_seed(seed)
    check_crop_scale(crop_scale)
    check_mixed_views(options.mixed_views or 0.0, options.views)
    return crop_scale, seed


def extend(options: argparse.Namespace) -> None:
    """Write a cache with more views that starts with the views of an existing one; the existing file is left alone."""
    from kd_dist import job, label, views

    cache = open_cache(options.cache)
    if options.views <= cache.views:
        raise UserError(f"--views {options.views}, but {cache.path} holds {cache.views} already; ask for more.")
    if cache.is_combined:
        raise UserError(f"{cache.path} is the mean of other caches: extend those, then combine them again.")
    crop_scale = views.crop_scale_of(cache.header.view_sampler)
    if crop_scale is None:
        raise UserError(
            f"{cache.path} drew its views by {cache.header.view_sampler}, which this version does not know; write a "
            "new cache."
        )
    with joined(options.device) as runtime:
        teachers = [label.load_teacher(path, runtime.device) for path in options.teacher]
        if {teacher.row.sha256 for teacher in teachers} != cache.teacher_digests:
            raise UserError(
                f"{', '.join(map(str, options.teacher))} {'are' if len(teachers) > 1 else 'is'} not what labelled "
                f"{cache.path}; name the model.pt of {'each' if len(cache.teacher_digests) > 1 else 'that'} teacher."
            )
        data = job.open_data(_source(options), runtime)
        data.require_fit(cache)
        views.require_renderer(cache.header.renderer, cache.path)
        drawn = (options.views, crop_scale, cache.header.seed, cache.header.compute_dtype)
        header, tables = label.plan(teachers[0], data, *drawn)
        header = label.shortened(header, cache.header.top_k or None)
        if len(teachers) > 1:
            header, tables = label.out_of_fold(header, tables, teachers, data)
        header, tables = label.mixed(header, tables, views.mixed_share_of(cache.header.view_sampler))
        tables = {split: label.keep_views(table, cache.split(split)) for split, table in tables.items()}
        _label(options.output, teachers, data, header, tables, runtime, cache)


def combine(options: argparse.Namespace) -> None:
    """Write the mean of several caches whose teachers labelled the same views: of logits, which holds at every
    temperature, or of probabilities at one, at which alone it can be used.
    """
    from kd_dist.cache.combine import combine as combine_caches
    from kd_dist.version import software

    if len(options.caches) < 2:
        raise UserError(f"a mean takes two caches or more; {options.caches[0]} is one.")
    if (options.mean == "probabilities") != (options.temperature is not None):
        raise UserError("--mean probabilities needs --temperature T, at which it is taken; a mean of logits has none.")
    if launched_rank() == 0:
        combine_caches([open_cache(path) for path in options.caches], options.output, options.temperature, software())
        print(f"wrote {options.output}; `{PROG} info {options.output}` describes it")


def _label(target: Path, teachers, data, header, tables, runtime: Runtime, known: Cache | None) -> None:
    from kd_dist import job, label

    progress = job.progress_lines(runtime, "writing the cache, blocks")
    with StopRequest() as stop:
        label.write_cache(target, teachers, data, header, tables, runtime, stop, progress, known)
    job.say(runtime, f"wrote {target}; `{PROG} info {target}` describes it")


def _source(options: argparse.Namespace):
    from kd_dist.job import DataSource

    return DataSource(data=options.data, pixels=options.pixels, pixels_dir=options.pixels_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Caches of soft labels: describe, verify, write from trained teachers, add views, combine.",
        epilog=f"Example: {PROG} verify runs/teacher/logits.h5 --data data/imagewoof2-160",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, words in (
        (info, "describe a cache and what its labels are worth"),
        (verify, "check digest, completeness, values, fit to the data, and rows against the teacher"),
        (write, "write a cache from a trained teacher's model.pt"),
        (extend, "write a cache with more views, starting with an existing one's"),
        (combine, "write the mean of caches whose teachers labelled the same views"),
    ):
        command = commands.add_parser(run.__name__, help=words, description=run.__doc__)
        command.set_defaults(run=run)
        _add_flags(command, run)
    for each in (parser, *commands.choices.values()):
        each.error = _refuse
    return parser


def _add_flags(command: argparse.ArgumentParser, run) -> None:
    add = command.add_argument
    if run is combine:
        _add_flags_of_combine(add)
        return
    if run is not write:
        add("cache", type=Path, metavar="FILE", help="the cache, such as runs/teacher/logits.h5")
    if run is info:
        return
    of_folds = "; of out-of-fold labels, those of all K teachers"
    add("--teacher", type=Path, nargs="+", metavar="FILE", required=run is not verify, help=f"model.pt{of_folds}")
    add("--data", metavar="DIR", help="the image folder" + ("" if run is verify else " [$KD_DIST_DATA or data]"))
    add("--pixels", choices=PIXELS, default="auto", help="where decoded pictures are, as in training [auto]")
    add("--pixels-dir", metavar="DIR", help="where decoded pictures are kept [inside the data folder]")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto [auto]")
    if run is verify:
        rows = "rows to recompute, in whole forward batches [1024]"
        add("--rows", type=_positive, default=1024, metavar="N", help=rows)
        return
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the cache to write; must not exist")
    views = "views of every image, the evaluation view counted"
    add("--views", type=_positive, required=run is extend, metavar="V", help=views)
    if run is write:
        add("--like", type=Path, metavar="FILE", help="label the very views of this cache, to combine the two")
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="what the network computes in [auto]")
        add("--seed", type=int, metavar="N", help="of the crops and flips [the teacher's]")
        add(
            "--top-k", type=_positive, metavar="K", help="keep the K largest logits of a row and the others' mass [all]"
        )
        share = "share of train's random crops that are mixed: half by mixup, half by CutMix [0]"
        add("--mixed-views", type=float, metavar="SHARE", help=share)
        add("--crop-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="area share of a crop [the teacher's]")


def _add_flags_of_combine(add) -> None:
    add("caches", type=Path, nargs="+", metavar="FILE", help="caches of the same views, see write --like")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the cache to write; must not exist")
    add("--mean", choices=("logits", "probabilities"), default="logits", help="what the mean is taken of [logits]")
    add("--temperature", type=_temperature, metavar="T", help="of a mean of probabilities: valid at this one alone")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _refuse(message: str):
    raise UserError(f"{message}; `{PROG} --help` lists the commands, `{PROG} COMMAND --help` their flags.")


if __name__ == "__main__":
    run_entry(main)
