"""The command `python -m kd_dist.dataset`: get an image set ready, on a login node too, and say what is in it."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_dist.data.releases import DEFAULT_RELEASE, RELEASES, locate
from kd_dist.data.samples import SPLITS, Dataset
from kd_dist.data.scan import default_folder, scan
from kd_dist.errors import exit_code_of
from kd_dist.fingerprint import UNKNOWN
from kd_dist.tables import show

DEFAULT_DATA = "data"
PROGRESS_SECONDS = 5.0


class PrintedProgress:
    """Progress as plain lines on stderr: when something begins, every few seconds, and when it is done."""

    def __init__(self) -> None:
        self._what, self._said_at = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what == self._what and done != total and now - self._said_at < PROGRESS_SECONDS:
            return
        self._what, self._said_at = what, now
        print(f"{what}: {done:,} of {total:,}" if total else f"{what}: {done:,}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.dataset`; returns the exit code."""
    options = _parser().parse_args(arguments)
    work = _print_releases if options.list else lambda: _print_set(_prepare(options))
    try:
        return exit_code_of("kd_dist.dataset", work)
    except KeyboardInterrupt:
        print("kd_dist.dataset: stopped; the same command goes on with what is there.", file=sys.stderr)
        return 130


def _prepare(options: argparse.Namespace) -> Dataset:
    progress = PrintedProgress()
    typed = options.data or os.environ.get("KD_DIST_DATA")
    data = Path(typed or DEFAULT_DATA)
    share, unlabelled, named = options.val_share, options.unlabelled, (options.release, options.archive, options.sha256)
    root = locate(data, *named, explicit=bool(typed), val_share=share, progress=progress)
    return scan(root, val_share=share, unlabelled=unlabelled, manifest_folder=default_folder(root), progress=progress)


def _print_set(dataset: Dataset) -> None:
    print(f"{dataset.name} in {dataset.root.resolve()}: {dataset.layout}")
    print(f"{'class':<32} {'train':>8} {'val':>8}")
    labels = [dataset.split(split).labels_N for split in SPLITS]
    counts = [np.bincount(labels_N[labels_N != UNKNOWN], minlength=len(dataset.classes)) for labels_N in labels]
    for name, train, val in zip(dataset.classes, *counts, strict=True):
        print(f"{name:<32} {train:>8,} {val:>8,}")
    if unlabelled := int((~dataset.train.is_labelled_N).sum()):
        print(f"{'without a label':<32} {unlabelled:>8,} {0:>8,}")
    print(f"{f'{len(dataset.classes)} classes':<32} {len(dataset.train):>8,} {len(dataset.val):>8,}")
    for split in SPLITS:
        print(f"fingerprint of {split:<5} {dataset.split(split).fingerprint}")
    for note in dataset.notes():
        print(note)


def _print_releases() -> None:
    for release in RELEASES.values():
        show(f"{release.name}{' (default)' * (release.name == DEFAULT_RELEASE)}\n    {release.about}")
        if release.url:
            show(f"    {release.url}\n    SHA-256 {release.sha256 or 'not known'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_dist.dataset",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_HELP,
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="the set's folder or CSV file, or where to put it [$KD_DIST_DATA, else data]")
    add("--val-share", type=float, metavar="SHARE", help="hold this share of the images out as val")
    add("--unlabelled", type=Path, metavar="DIR", help="a folder of more training images, without labels")
    add("--release", metavar="NAME", help=f"which set to fetch, see --list [{DEFAULT_RELEASE}]")
    add("--archive", metavar="FILE_OR_URL", help="take the set from this tar file or http(s) address instead")
    add("--sha256", metavar="HEX", help="the digest that the archive must have")
    add("--list", action="store_true", help="print the known releases and stop")
    return parser


_HELP = """\
Get an image set ready and say what is in it. No GPU is needed, so a login node will do.

A folder with train/<class>/* and val/<class>/* is used as it is (valid/, validation/ and test/ pass for val/),
and so is a CSV file of path,label,split; of a folder of class folders, --val-share holds a part out as val.
Otherwise the release is looked for in the folder by name, and fetched when it is not there: downloaded (an
interrupted download goes on where it stopped), checked, unpacked aside, and put in place with one rename. A
folder that you name must hold a set, unless you name a release or an archive to put into it."""

_EXAMPLES = """\
examples:
  python -m kd_dist.dataset                                        Imagewoof, 160 pixels, into data/
  python -m kd_dist.dataset --release demo                         a set that is drawn, without a network
  python -m kd_dist.dataset --archive /mirror/imagewoof2-160.tgz   from a copy
  python -m kd_dist.dataset --data /datasets/pets                  a folder of your own
  python -m kd_dist.dataset --data /datasets/birds --val-share 0.1 class folders, a tenth held out as val
  python -m kd_dist.dataset --data /datasets/list.csv              lines of path,label,split"""


if __name__ == "__main__":
    sys.exit(main())
