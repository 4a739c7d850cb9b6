"""The command `python -m kd_dist.dataset`: download or check a data set, on a login node too, and list its content."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_dist.data.releases import DEFAULT_FOLDER, DEFAULT_RELEASE, RELEASES, locate
from kd_dist.data.samples import SPLITS, Dataset
from kd_dist.data.scan import default_folder, scan
from kd_dist.errors import exit_code_of
from kd_dist.fetch import PrintedProgress
from kd_dist.fingerprint import UNKNOWN
from kd_dist.tables import show

DEFAULT_DATA = "data"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.dataset`; returns the exit code."""
    options = _parser().parse_args(arguments)
    work = _print_releases if options.list else lambda: _print_set(_prepare(options))
    try:
        return exit_code_of("kd_dist.dataset", work)
    except KeyboardInterrupt:
        print("kd_dist.dataset: interrupted; run the same command again to resume.", file=sys.stderr)
        return 130


def _prepare(options: argparse.Namespace) -> Dataset:
    progress = PrintedProgress()
    typed = options.data or os.environ.get("KD_DIST_DATA")
    data = Path(typed or DEFAULT_FOLDER)
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
    own = "the data set's folder, CSV file or hf:NAME, or the folder to download it into [$KD_DIST_DATA, else data]"
    add("--data", metavar="DIR", help=own)
    add("--val-share", type=float, metavar="FRACTION", help="hold out this fraction of the images as val")
    add("--unlabelled", type=Path, metavar="DIR", help="folder of more training images, without labels")
    add("--release", metavar="NAME", help=f"data set to download, see --list [{DEFAULT_RELEASE}]")
    add("--archive", metavar="FILE_OR_URL", help="read the data set from this tar file or http(s) URL instead")
    add("--sha256", metavar="HEX", help="SHA-256 that the archive must have")
    add("--list", action="store_true", help="print the known releases and exit")
    return parser


_HELP = """\
Download or check a data set and list its classes and counts. No GPU is needed, so it can run on a login node.

A folder with train/<class>/* and val/<class>/* is used as it is (valid/, validation/ and test/ pass for val/),
and so is a CSV file of path,label,split; of a folder of class folders, --val-share holds a part out as val.
A Hugging Face image set (hf:NAME, or a folder of Parquet files) is converted into a folder of images in data/.
Otherwise the release is looked for in the folder by name, and fetched when it is not there: downloaded (an
interrupted download resumes where it stopped), checked, unpacked aside, and put in place with one rename. A
folder given by --data must already hold a data set, unless --release or --archive is given too."""

_EXAMPLES = """\
examples:
  python -m kd_dist.dataset                                        Imagewoof, 160 pixels, into data/
  python -m kd_dist.dataset --release demo                         synthetic, generated without internet access
  python -m kd_dist.dataset --archive /mirror/imagewoof2-160.tgz   from a copy
  python -m kd_dist.dataset --data /datasets/pets                  a folder of your own
  python -m kd_dist.dataset --data /datasets/birds --val-share 0.1 class folders, a tenth held out as val
  python -m kd_dist.dataset --data /datasets/list.csv              lines of path,label,split
  python -m kd_dist.dataset --data hf:OWNER/NAME                   of the Hugging Face hub, into data/"""


if __name__ == "__main__":
    sys.exit(main())
