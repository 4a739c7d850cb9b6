"""`python -m kd_dist.cache`: describe, verify, write and extend caches of soft labels. write, extend and verify also
run under torchrun.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_dist.cache.card import render_info
from kd_dist.cache.format import digest_file_of
from kd_dist.cache.reader import Cache, open_cache
from kd_dist.config import check_crop_scale, check_seed
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

    teacher = label.load_teacher(options.teacher, runtime.device)
    known = [row.sha256 for row in cache.header.teachers]
    if teacher.row.sha256 not in known:
        raise UserError(
            f"{options.teacher} has digest {teacher.row.sha256}, but {cache.path} was labelled by "
            f"{', '.join(known)}; name that teacher's model.pt."
        )
    views.require_renderer(cache.header.renderer, cache.path)
    data = job.open_data(_source(options), runtime)
    worst, rows = label.largest_difference(cache, teacher, data, options.rows, runtime)
    allowed = TOLERANCE[cache.header.compute_dtype]
    if not worst <= allowed:
        raise UserError(
            f"{cache.path} does not hold what {options.teacher} gives: over {rows:,} recomputed rows a logit differs "
            f"by {worst:.3g} "
            f"(share of max(1, |logit|)), {allowed} is allowed; write the cache anew."
        )
    job.say(
        runtime,
        f"teacher: {rows:,} rows recomputed, largest difference {worst:.2g} of max(1, |logit|), {allowed} is allowed",
    )


def write(options: argparse.Namespace) -> None:
    """Write a cache from an existing checkpoint."""
    from kd_dist import job, label
    from kd_dist.inference import compute_dtype

    with joined(options.device) as runtime:
        teacher = label.load_teacher(options.teacher, runtime.device)
        data = job.open_data(_source(options), runtime)
        crop_scale = tuple(options.crop_scale or teacher.crop_scale)
        seed = teacher.row.seed if options.seed is None else options.seed
        dtype = compute_dtype(runtime.device, options.precision)
        check_seed(seed)
        check_crop_scale(crop_scale)
        header, tables = label.plan(teacher, data, options.views, crop_scale, seed, dtype)
        _label(options.output, teacher, data, header, tables, runtime, None)


def extend(options: argparse.Namespace) -> None:
    """Write a cache with more views that starts with the views of an existing one; the existing file is left alone."""
    from kd_dist import job, label, views

    cache = open_cache(options.cache)
    if options.views <= cache.views:
        raise UserError(f"--views {options.views}, but {cache.path} holds {cache.views} already; ask for more.")
    crop_scale = views.crop_scale_of(cache.header.view_sampler)
    if crop_scale is None:
        raise UserError(
            f"{cache.path} drew its views by {cache.header.view_sampler}, which this version does not know; write a "
            "new cache."
        )
    with joined(options.device) as runtime:
        teacher = label.load_teacher(options.teacher, runtime.device)
        if [teacher.row.sha256] != [row.sha256 for row in cache.header.teachers]:
            raise UserError(
                f"{options.teacher} is not the teacher that labelled {cache.path}; name that teacher's model.pt."
            )
        data = job.open_data(_source(options), runtime)
        data.require_fit(cache)
        views.require_renderer(cache.header.renderer, cache.path)
        header, tables = label.plan(
            teacher, data, options.views, crop_scale, cache.header.seed, cache.header.compute_dtype
        )
        tables = {split: label.keep_views(table, cache.split(split)) for split, table in tables.items()}
        _label(options.output, teacher, data, header, tables, runtime, cache)


def _label(target: Path, teacher, data, header, tables, runtime: Runtime, known: Cache | None) -> None:
    from kd_dist import job, label

    progress = job.progress_lines(runtime, "writing the cache, blocks")
    with StopRequest() as stop:
        label.write_cache(target, teacher, data, header, tables, runtime, stop, progress, known)
    job.say(runtime, f"wrote {target}; `{PROG} info {target}` describes it")


def _source(options: argparse.Namespace):
    from kd_dist.job import DataSource

    return DataSource(data=options.data, pixels_dir=options.pixels_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Caches of soft labels: describe, verify, write one from a trained teacher, or add views to one.",
        epilog=f"Example: {PROG} verify runs/teacher/logits.h5 --data data/imagewoof2-160",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, words in (
        (info, "describe a cache and what its labels are worth"),
        (verify, "check digest, completeness, values, fit to the data, and rows against the teacher"),
        (write, "write a cache from a trained teacher's model.pt"),
        (extend, "write a cache with more views, starting with an existing one's"),
    ):
        command = commands.add_parser(run.__name__, help=words, description=run.__doc__)
        command.set_defaults(run=run)
        _add_flags(command, run)
    for each in (parser, *commands.choices.values()):
        each.error = _refuse
    return parser


def _add_flags(command: argparse.ArgumentParser, run) -> None:
    add = command.add_argument
    if run is not write:
        add("cache", type=Path, metavar="FILE", help="the cache, such as runs/teacher/logits.h5")
    if run is info:
        return
    needs_teacher = run is not verify
    add("--teacher", type=Path, metavar="FILE", required=needs_teacher, help="the teacher's model.pt")
    add("--data", metavar="DIR", help="the image folder" + ("" if run is verify else " [$KD_DIST_DATA or data]"))
    add("--pixels-dir", metavar="DIR", help="where decoded pictures are kept [inside the data folder]")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto [auto]")
    if run is verify:
        add(
            "--rows",
            type=_positive,
            default=1024,
            metavar="N",
            help="rows to recompute, in whole forward batches [1024]",
        )
        return
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the cache to write; must not exist")
    add("--views", type=_positive, required=True, metavar="V", help="views of every image, the evaluation view counted")
    if run is write:
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="what the network computes in [auto]")
        add("--seed", type=int, metavar="N", help="of the crops and flips [the teacher's]")
        add("--crop-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="area share of a crop [the teacher's]")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _refuse(message: str):
    raise UserError(f"{message}; `{PROG} --help` lists the commands, `{PROG} COMMAND --help` their flags.")


if __name__ == "__main__":
    run_entry(main)
