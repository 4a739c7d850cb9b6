"""Classify images with a trained student or teacher: `python -m kd_dist.predict MODEL IMAGE_OR_FOLDER ...`.

Images are decoded, classified and printed a batch at a time, in the order of the arguments and, within a folder, of
the names: memory does not grow with their number, except by their names. An image that cannot be read is named on
stderr, the others are classified, and the exit code is 1.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kd_dist import tables
from kd_dist.data.layout import IMAGE_SUFFIXES
from kd_dist.dist.cores import available_cores
from kd_dist.dist.rendezvous import choose_device
from kd_dist.errors import UserError, exit_code_of
from kd_dist.images.decode import decode
from kd_dist.inference import ahead
from kd_dist.trained import Model, load

PROG = "kd_dist.predict"
BATCH = 64
COLUMNS = ("image", "rank", "class", "probability")
EXIT_SOME_BROKEN = 1


@dataclass(frozen=True)
class Prediction:
    """An image's most probable classes with their probabilities in [0, 1], the most probable first."""

    image: str
    top: tuple[tuple[str, float], ...]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """A row for each class, with one cell for each of COLUMNS."""
        for rank, (name, probability) in enumerate(self.top, start=1):
            yield self.image, str(rank), name, f"{probability:.6f}"

    def as_json(self) -> str:
        """One line of JSON: {"image": ..., "top": [{"class": ..., "probability": ...}, ...]}."""
        top = [{"class": name, "probability": round(probability, 6)} for name, probability in self.top]
        return json.dumps({"image": self.image, "top": top})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.predict`; returns the exit code."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    broken: list[str] = []
    try:
        code = exit_code_of(PROG, lambda: _run(options, broken))
    except KeyboardInterrupt:
        print(f"{PROG}: stopped.", file=sys.stderr)
        return 130
    if broken and code == 0:
        print(f"{PROG}: images that could not be read: {len(broken):,}; they are named above.", file=sys.stderr)
        return EXIT_SOME_BROKEN
    return code


def _run(options: argparse.Namespace, broken: list[str]) -> None:
    images = images_in(options.images)
    model = load(options.model).to(choose_device(options.device, 0, 1))
    if options.top_k > len(model.classes):
        most = len(model.classes)
        raise UserError(f"--top-k {options.top_k}, but the model has {most} classes; use --top-k {most} or less.")
    with tqdm(total=len(images), unit="image", disable=None, file=sys.stderr) as bar:

        def failed(image: str, sentence: str) -> None:
            broken.append(image)
            with tqdm.external_write_mode(sys.stderr):
                print(f"{PROG}: {sentence}", file=sys.stderr)

        batches = predict(model, images, options.top_k, failed)
        for text, done in _texts(batches, options.format, images, model.classes):
            with tqdm.external_write_mode(sys.stdout):
                if text and not tables.show(text):
                    return  # the reader has left
            bar.update(done)


def images_in(entries: Sequence[str]) -> list[str]:
    """The image files that these paths are or hold, in the order of the paths, those of a folder sorted by path.

    In folders, files with a suffix of IMAGE_SUFFIXES count, hidden ones do not. Raises UserError for a path that does
    not exist, or a folder without images.
    """
    return list(chain.from_iterable(_images_at(entry) for entry in entries))


def _images_at(entry: str) -> list[str]:
    if os.path.isdir(entry):
        found = sorted(_images_below(entry))
        if not found:
            raise UserError(f"{entry} holds no images; name a folder of {', '.join(IMAGE_SUFFIXES)} files.")
        return found
    if not os.path.exists(entry):
        raise UserError(f"there is no {entry}; name an image or a folder of images.")
    return [entry]


def _images_below(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (name for name in files if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename} ({error.strerror}): mend its permissions.") from error


def predict(
    model: Model, images: Iterable[str], top_k: int, failed: Callable[[str, str], None]
) -> Iterator[list[Prediction]]:
    """Predictions of these image files in their order, up to BATCH at a time; fewer where some cannot be read.

    `failed` is called with the path and a sentence for each of these. Threads decode a few images ahead. Raises
    UserError where the model gives values that are not finite.
    """
    device = next(model.parameters()).device
    views_read = ahead(lambda image: _view(model, image), images, available_cores())
    while batch := list(islice(views_read, BATCH)):
        for image, _, sentence in batch:
            if sentence:
                failed(image, sentence)
        whole = [(image, view_CHW) for image, view_CHW, _ in batch if view_CHW is not None]
        yield _classified(model, whole, top_k, device) if whole else []


def _view(model: Model, image: str) -> tuple[str, Tensor | None, str | None]:
    """The path, and the evaluation view uint8 [3, S, S] or a sentence that says why there is none."""
    try:
        return image, model.transform.view(decode(Path(image))), None
    except UserError as error:
        return image, None, str(error) if image in str(error) else f"{image}: {error}"


@torch.inference_mode()
def _classified(
    model: Model, whole: Sequence[tuple[str, Tensor]], top_k: int, device: torch.device
) -> list[Prediction]:
    images_BCHW = torch.stack([view_CHW for _, view_CHW in whole]).to(device)
    logits_BK = model(model.transform.normalise(images_BCHW)).double()
    if not torch.isfinite(logits_BK).all():
        raise UserError("the model gives logits that are not finite; train it again, or name another model.")
    top = logits_BK.softmax(dim=1).topk(top_k, dim=1)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    named = [tuple((model.classes[index], p) for index, p in zip(*row, strict=True)) for row in rows]
    return [Prediction(image, top) for (image, _), top in zip(whole, named, strict=True)]


def _texts(
    batches: Iterable[list[Prediction]], how: str, images: Sequence[str], classes: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """The text to print for each batch, and how many images it was made from; the header goes before the first."""
    widths = [max(map(len, column)) for column in ((COLUMNS[0], *images), COLUMNS[1:2], (COLUMNS[2], *classes))]
    widths.append(len(COLUMNS[3]))
    format_rows = {"csv": _csv, "table": lambda rows: "\n".join(tables.streamed(rows, widths))}.get(how)
    if format_rows:
        yield format_rows([COLUMNS]), 0
    left = len(images)
    for batch in batches:
        done, left = min(BATCH, left), left - BATCH
        if format_rows:
            yield format_rows([row for prediction in batch for row in prediction.rows()]), done
        else:
            yield "\n".join(prediction.as_json() for prediction in batch), done


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().removesuffix("\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m {PROG}", description=__doc__.split("\n\n")[0].split(":")[0] + ".")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's folder, a model.pt, or a folder that kd_dist.export wrote")
    add("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, or folders of them at any depth")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", dest="format", action="store_const", const="json", help="print a JSON line an image")
    formats.add_argument("--csv", dest="format", action="store_const", const="csv", help="print CSV")
    add("--top-k", type=_positive, default=1, metavar="K", help="classes of each image, the most probable first [1]")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto [auto]")
    parser.set_defaults(format="table")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
