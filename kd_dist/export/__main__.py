"""`python -m kd_dist.export MODEL --to DIR`: export a trained model to safetensors, ONNX and torch.export.

Each file is read again and compared with the model before the folder gets its name.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kd_dist import tables
from kd_dist.errors import UserError, exit_code_of, require_installed
from kd_dist.export.card import Measured, card, config
from kd_dist.export.graphs import check, latencies, noise, runs_of, write_graphs
from kd_dist.files import new_folder, require_free, write_json
from kd_dist.hub import licence
from kd_dist.images.decode import decode
from kd_dist.predict import images_in
from kd_dist.run.folder import RunFolder
from kd_dist.run.results import read_val_logits
from kd_dist.trained import CONFIG, WEIGHTS, Model, load

PROG = "kd_dist.export"
DESCRIPTION = "Export a trained model to safetensors, ONNX and torch.export, with a model card."
CARD = "README.md"
COMPARED = 64  # images


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m kd_dist.export`; returns the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code_of(PROG, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    export(options.model, options.to, _folder_of_images(options.data), options.licence, options.with_preprocessing)
    tables.show(f"wrote {options.to}; {options.to / CARD} holds sizes, differences and latency")


def _folder_of_images(typed: str | None) -> str | None:
    """What --data names, else KD_DIST_DATA where that is a folder; it may be a CSV file, or hf:NAME."""
    named = os.environ.get("KD_DIST_DATA")
    return typed or (named if named and os.path.isdir(named) else None)


def export(source: Path, target: Path, data: str | None, licence: str | None, with_preprocessing: bool) -> None:
    """Write a model's folder whole, or nothing. `data` is a folder of images to compare on; without it the model's own
    data are taken, and noise where they are gone.

    Raises UserError: packages are missing, the target is not empty, the model cannot be read or exported, a file
    differs from the model.
    """
    require_installed("export", "onnx", "onnxruntime", "onnxscript")
    require_free(target)
    model = load(source)
    model.facts.update(_scored_images(source, model))
    sample = _images(model, data)
    with new_folder(target) as folder:
        _fill(folder, model, target.resolve().name, licence, sample, with_preprocessing)


def _scored_images(source: Path, model: Model) -> dict[str, int]:
    """How many images a score is of, from the logits in the run's folder, where they are those of this data."""
    folder = RunFolder(source if source.is_dir() else source.parent)
    with suppress(UserError):
        val = read_val_logits(folder.val_logits)
        scores = [model.facts.get(name) for name in ("val_top1", "tune_top1")]
        if val.fingerprint == model.facts["data"]["val"] or val.attrs.get("top1") in scores:
            return {"scored_images": len(val.labels_N)}
    return {}


def _own_data(model: Model) -> str | None:
    """The folder of images that the model was trained on, where it is still there."""
    data = model.facts["settings"].get("data")
    return data if data and os.path.isdir(data) else None


def _images(model: Model, data: str | None) -> tuple[Tensor, str]:
    """Images uint8 [B, 3, S, S] to compare on, and what they are in words."""
    data = data or _own_data(model)
    if data is None:
        return noise(model, COMPARED), f"{COMPARED} images of generated noise, as no --data was named"
    paths = images_in([data])
    chosen = [paths[i * len(paths) // COMPARED] for i in range(COMPARED)] if len(paths) > COMPARED else paths
    pixels_BCHW = torch.stack([model.transform.view(decode(Path(path))) for path in chosen])
    return pixels_BCHW, f"{len(chosen)} images of {Path(data).resolve().name}"


def _fill(
    folder: Path, model: Model, name: str, licence: str | None, sample: tuple[Tensor, str], with_preprocessing: bool
) -> None:
    """Write all files of a model's folder, and check those that hold the network."""
    pixels_BCHW, images = sample
    weights = {key: value.detach().contiguous().clone() for key, value in model.network.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config(model, with_preprocessing))
    write_graphs(model, folder, with_preprocessing)
    measured = _measured(folder, model, pixels_BCHW, with_preprocessing)
    text = card(model, name, licence, images, with_preprocessing, measured)
    (folder / CARD).write_text(text, encoding="utf-8")


def _measured(folder: Path, model: Model, pixels_BCHW: Tensor, with_preprocessing: bool) -> dict[str, Measured]:
    normalised_BCHW = model.transform.normalise(pixels_BCHW)
    with torch.inference_mode():
        expected_BK = model(normalised_BCHW)
    measured = {}
    for file, run in runs_of(folder).items():
        inputs_BCHW = pixels_BCHW if with_preprocessing and file != WEIGHTS else normalised_BCHW
        inputs_BCHW = inputs_BCHW.contiguous()
        checked = check(run, inputs_BCHW, expected_BK)
        checked.require(file)
        measured[file] = Measured((folder / file).stat().st_size, checked, latencies(run, inputs_BCHW))
    return measured


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m {PROG}", description=DESCRIPTION)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a run's folder, a model.pt, or an exported folder")
    add("--to", type=Path, required=True, metavar="DIR", help="the folder to write; missing or empty")
    add(
        "--data",
        metavar="DIR",
        help="images on which the files are compared [$KD_DIST_DATA, or the run's data, else noise]",
    )
    add("--license", dest="licence", type=licence, metavar="ID", help="for the card, such as apache-2.0 [unknown]")
    graphs = "model.onnx and model.pt2 take uint8 images and normalise them themselves"
    add("--with-preprocessing", action="store_true", help=graphs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
