"""`python -m kd_dist.cache`: describe, verify, write, extend, combine, export and import caches of soft labels. write,
extend and verify also run under torchrun.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from kd_dist.cache import combine as combine_caches
from kd_dist.cache import open_cache, render_info
from kd_dist.config import PIXELS
from kd_dist.dist.endings import launched_rank, run_entry
from kd_dist.errors import UserError, require_installed
from kd_dist.files import require_free
from kd_dist.hub import licence
from kd_dist.tables import show

PROG = "python -m kd_dist.cache"


def main(arguments: Sequence[str] | None = None) -> None:
    typed = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(typed) and launched_rank() != 0:
        return
    options = _parser().parse_args(typed)
    options.run(options)


def info(options: argparse.Namespace) -> None:
    """One screen about a cache: what it holds, and its label statistics."""
    if launched_rank() == 0:
        show(render_info(open_cache(options.cache)))


def combine(options: argparse.Namespace) -> None:
    """Write the mean of several caches whose teachers labelled the same views: of logits, which holds at every
    temperature, or of probabilities at one, at which alone it can be used.
    """
    from kd_dist.version import software

    if len(options.caches) < 2:
        raise UserError(f"a mean takes two caches or more; {options.caches[0]} is one.")
    if (options.mean == "probabilities") != (options.temperature is not None):
        raise UserError("--mean probabilities needs --temperature T, at which it is taken; a mean of logits has none.")
    if launched_rank() == 0:
        combine_caches([open_cache(path) for path in options.caches], options.output, options.temperature, software())
        print(f"wrote {options.output}; `{PROG} info {shlex.quote(str(options.output))}` describes it")


def export(options: argparse.Namespace) -> None:
    """Write a cache as a folder to publish."""
    require_installed("hf", "pyarrow")
    from kd_dist.publish.folder import Statement, export

    if launched_rank() == 0:
        require_free(options.to)
        own = {name: getattr(options, name) for name in Statement.__dataclass_fields__}
        export(open_cache(options.cache), options.to, Statement(**own))
        print(f"wrote {options.to}; `{PROG} verify {shlex.quote(str(options.to))}` checks it")


def restore(options: argparse.Namespace) -> None:
    """Write the cache that a published folder was made from."""
    require_installed("hf", "pyarrow")
    from kd_dist.publish.folder import restore

    if launched_rank() == 0:
        restore(options.folder, options.output)
        print(f"wrote {options.output}; `{PROG} info {shlex.quote(str(options.output))}` describes it")


def _labelling(options: argparse.Namespace) -> None:
    """A command that needs images or a teacher. The others do without torch and Pillow."""
    from kd_dist.label import commands

    getattr(commands, options.command)(options)


COMMANDS = {
    "info": (info, "describe a cache and its label statistics", ""),
    "verify": (
        _labelling,
        "check checksums, completeness, values, fit to the data, and logits against the teacher",
        ". What was not checked is printed too.",
    ),
    "write": (
        _labelling,
        "write a cache from a trained teacher's model.pt",
        ". From the teachers of all K folds, each train image is labelled by the one that was not trained on it, and "
        "val by the mean of the K.",
    ),
    "extend": (
        _labelling,
        "write a cache with more views, starting with an existing one's",
        ". The existing file is left alone.",
    ),
    "combine": (
        combine,
        "write the mean of caches whose teachers labelled the same views",
        ": of logits, which holds at every temperature, or of probabilities at one, at which alone it can be used.",
    ),
    "export": (
        export,
        "write a folder to publish: Parquet, data card, Croissant",
        ", without images. What is not stated by a flag is called not stated in the card.",
    ),
    "import": (restore, "write the cache that an exported folder was made from", ""),
}
"""Name -> what runs it, one line of help, and what its own help adds to that."""


class _Parser(argparse.ArgumentParser):
    """Its errors are one sentence; those of its commands too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{PROG} --help` lists the commands, `{PROG} COMMAND --help` their flags.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        description="Caches of soft labels: describe, verify, write from trained teachers, add views, combine, export.",
        epilog=f"Example: {PROG} verify runs/teacher/logits.h5 --data data/imagewoof2-160",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (run, words, more) in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + more)
        command.set_defaults(run=run)
        FLAGS.get(name, partial(_add_flags, name=name))(command.add_argument)
    return parser


def _add_flags(add: Callable[..., object], name: str) -> None:
    if name != "write":
        folder = ", or a folder that export wrote" if name == "verify" else ""
        add("cache", type=Path, metavar="FILE", help=f"the cache, such as runs/teacher/logits.h5{folder}")
    if name == "info":
        return
    of_folds = "; of out-of-fold labels, those of all K teachers"
    foreign = "" if name == "extend" else "; or a network not trained here, torchvision:resnet34 or my_module:build"
    add("--teacher", nargs="+", metavar="FILE", required=name != "verify", help=f"model.pt{of_folds}{foreign}")
    if name != "extend":
        of_weights = "weights of a network not trained here: .safetensors, or a .pt state dict"
        add("--weights", type=Path, metavar="FILE", help=of_weights)
        of_map = "which of its classes is which of the data's: a file of two columns, JSON, or imagenet (by synset)"
        add("--class-map", metavar="FILE", help=of_map)
    add("--data", metavar="DIR", help="the image folder [$KD_DIST_DATA" + ("]" if name == "verify" else " or data]"))
    add("--val-share", type=float, metavar="SHARE", help="share of the images held out as val, as in training")
    add("--unlabelled", metavar="DIR", help="folder of more training images, without labels")
    add("--pixels", choices=PIXELS, default="auto", help="where decoded images are, as in training [auto]")
    add("--pixels-dir", metavar="DIR", help="where decoded images are kept [inside the data folder]")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto [auto]")
    if name == "verify":
        rows = "how many soft labels to compute again and compare [1024]"
        add("--rows", type=_positive, default=1024, metavar="N", help=rows)
        return
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the cache to write; must not exist")
    views = "views of every image, the evaluation view counted"
    add("--views", type=_positive, required=name == "extend", metavar="V", help=views)
    if name == "write":
        _add_flags_of_write(add)


def _add_flags_of_write(add: Callable[..., object]) -> None:
    add(
        "--image-size",
        type=_positive,
        metavar="PX",
        help="side, in pixels, of the square images that a network not trained here takes",
    )
    for name, default in (("mean", "0.485 0.456 0.406"), ("std", "0.229 0.224 0.225")):
        triple = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
        add(
            f"--{name}",
            **triple,
            help=f"{name} of each colour, for pixels scaled to 0..1, that such a network expects [{default}]",
        )
    add("--like", type=Path, metavar="FILE", help="label the same views as this cache, so that the two can be combined")
    add(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="number format of the forward pass [auto]"
    )
    add("--seed", type=int, metavar="N", help="seed of the crops and flips [the teacher's]")
    add(
        "--top-k",
        type=_positive,
        metavar="K",
        help="keep the K largest logits of a view, and the probability mass of the others [all]",
    )
    share = "share of train's drawn views that are mixed, half by mixup and half by CutMix [0]"
    add("--mixed-views", type=float, metavar="SHARE", help=share)
    add(
        "--crop-scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="smallest and largest area of a crop, as a share of the image [the teacher's]",
    )


def _add_flags_of_combine(add: Callable[..., object]) -> None:
    add("caches", type=Path, nargs="+", metavar="FILE", help="caches of the same views, see write --like")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the cache to write; must not exist")
    add(
        "--mean",
        choices=("logits", "probabilities"),
        default="logits",
        help="what to average: logits or probabilities [logits]",
    )
    add(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="temperature at which probabilities are averaged; the cache is valid at this temperature only",
    )


def _add_flags_of_export(add: Callable[..., object]) -> None:
    add("cache", type=Path, metavar="FILE", help="the cache, such as runs/teacher/logits.h5")
    add("--to", type=Path, required=True, metavar="DIR", help="the folder to write; missing or empty")
    add("--license", dest="licence", type=licence, metavar="ID", help="of the labels, such as cc-by-4.0")
    add("--teacher-license", dest="teacher_licence", type=licence, metavar="ID", help="of the teacher's weights")
    add("--source", metavar="TEXT", help="where the images are from, such as an address")
    add("--intended-use", metavar="TEXT", help="what the labels are for")
    add("--creator", metavar="NAME", help="who publishes them")


def _add_flags_of_import(add: Callable[..., object]) -> None:
    add("folder", type=Path, metavar="DIR", help="a folder that export wrote")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the cache to write; must not exist")


FLAGS = {"combine": _add_flags_of_combine, "export": _add_flags_of_export, "import": _add_flags_of_import}


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


if __name__ == "__main__":
    run_entry(main)
