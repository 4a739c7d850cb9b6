"""What an exported folder says of itself: config.json and README.md, a model card for the Hugging Face Hub."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_dist import tables
from kd_dist.dist.cores import available_cores
from kd_dist.export.graphs import BATCHES, Check, Latency
from kd_dist.hub import front_matter
from kd_dist.images.views import RENDERER
from kd_dist.models import count_weights
from kd_dist.run.checkpoint import weights_digest
from kd_dist.trained import FORMAT, VERSION, Model
from kd_dist.version import software

LOCAL = {
    "data",
    "unlabelled",
    "release",
    "archive",
    "pixels_dir",
    "cache",
    "out",
    "init",
}  # settings that name places on a machine


@dataclass(frozen=True)
class Measured:
    """What was measured of one file: its size in bytes, its check, and the latency at each size of BATCHES."""

    size: int
    check: Check
    latencies: tuple[Latency, ...]


def published(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a model without paths of the machine that trained it."""
    kept = {name: value for name, value in facts.items() if name not in ("settings", "cache")}
    kept["settings"] = {name: value for name, value in facts["settings"].items() if name not in LOCAL}
    if cache := facts.get("cache"):
        kept["cache"] = {name: value for name, value in cache.items() if name != "path"}
    return kept


def config(model: Model, with_preprocessing: bool) -> dict[str, Any]:
    """The content of config.json."""
    size = model.image_size
    return {
        "format": FORMAT,
        "version": VERSION,
        "architecture": model.facts["arch"],
        "classes": list(model.classes),
        "image_size": size,
        "mean": list(model.mean),
        "std": list(model.std),
        "preprocessing": {
            "renderer": RENDERER,
            "steps": steps(model),
            "inside_graphs": with_preprocessing,
            "graph_input": {"dtype": "uint8" if with_preprocessing else "float32", "shape": ["batch", 3, size, size]},
        },
        "weights": count_weights(model),
        "weights_sha256": weights_digest(model.network.state_dict()),
        "exported_by": software(),
        "facts": published(model.facts),
    }


def steps(model: Model) -> list[str]:
    """How an image becomes the input, one sentence a step."""
    return [
        "Turn the image as its EXIF orientation says and convert it to RGB.",
        "Cut out the centre square of the shorter side (odd rests rounded down).",
        f"Resize to {model.image_size} x {model.image_size} pixels, bilinear with antialiasing, uint8.",
        "Divide by 255, subtract the mean and divide by the standard deviation of each channel.",
    ]


def card(
    model: Model, name: str, licence: str | None, images: str, with_preprocessing: bool, files: Mapping[str, Measured]
) -> str:
    """The content of README.md. `images` says on which images the files were compared."""
    parts = (
        *(_front_matter(model, name, licence), f"# {name}", _introduction(model, licence)),
        *("## Scores", _scores(model.facts), "## Use", _use(model, with_preprocessing)),
        *("## Preprocessing", "\n".join(f"{n}. {step}" for n, step in enumerate(steps(model), 1))),
        *("## Files", _files(files, images), "## Latency", _latency(files), "## Training", _training(model.facts)),
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Model, name: str, licence: str | None) -> str:
    scores = {key: value for key, value in model.facts.items() if key.endswith("_top1")}
    metrics = [{"type": "accuracy", "value": score, "name": key} for key, score in scores.items()]
    data = {"name": model.facts["data"]["name"], "type": "image-folder"}
    task = {"type": "image-classification"}
    fields = {
        "license": licence or "unknown",
        "library_name": "kd-dist",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "onnx"],
        "model-index": [{"name": name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}],
    }
    return front_matter(fields)


def _introduction(model: Model, licence: str | None) -> str:
    facts, data, cache = model.facts, model.facts["data"], model.facts.get("cache")
    taught = "Trained from labels alone."
    if cache:
        teachers = ", ".join(cache["teachers"])
        taught = f"Teacher (SHA-256 of the weights): {teachers}. Cache of soft labels (SHA-256): {cache['sha256']}."
    said = f"Licence: {licence}." if licence else "No licence was named at the export."
    return (
        f"An image classifier, {facts['arch']}, with {count_weights(model):,} weights, trained as a {facts['kind']} on "
        f"{data['name']} at {model.image_size} pixels. Classes: {', '.join(model.classes)}.\n\nData: {data['name']}, "
        f"fingerprint of train {data['train']}, of val {data['val']}.\n\n{taught}\n\n{said}"
    )


def _scores(facts: Mapping[str, Any]) -> str:
    names = {"val_top1": "val", "tune_top1": "a part of train that was left out"}
    n = f"n = {facts['scored_images']:,}" if "scored_images" in facts else "n was not recorded"
    lines = [f"Top-1 on {names[key]}: {facts[key]:.4f} ({n})." for key in names if facts.get(key) is not None]
    return "\n".join(lines) or "No score was recorded."


def _use(model: Model, with_preprocessing: bool) -> str:
    normalise = "" if with_preprocessing else "\npixels = (pixels / 255 - config['mean']) / config['std']"
    dtype = "uint8" if with_preprocessing else "float32"
    return f"""With kd_dist: `kd_dist.load(FOLDER)`, or `python -m kd_dist.predict FOLDER IMAGE`.

With ONNX Runtime alone:

```python
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

config = json.load(open("config.json"))
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
side = min(image.size)
left, top = (image.width - side) // 2, (image.height - side) // 2
square = image.crop((left, top, left + side, top + side))
pixels = np.asarray(square.resize((config["image_size"],) * 2, Image.Resampling.BILINEAR)){normalise}
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None].astype("{dtype}")}})[0]
print(config["classes"][logits[0].argmax()])
```"""


def _files(files: Mapping[str, Measured], images: str) -> str:
    rows = [("file", "bytes", "largest difference of a logit", "same top-1")]
    for name, measured in files.items():
        check = measured.check
        rows.append(
            (name, f"{measured.size:,}", f"{check.largest_difference:.1e}", f"{check.same_top1}/{check.images}")
        )
    return f"Each file was read again and compared with the trained model on {images}.\n\n{tables.markdown(rows)}"


def _latency(files: Mapping[str, Measured]) -> str:
    rows = [("file", *(f"batch {size}: median (quartiles) in ms, calls" for size in BATCHES))]
    for name, measured in files.items():
        rows.append((name, *map(_quartiles, measured.latencies)))
    machine = f"{_processor()}, {available_cores()} cores, {torch.get_num_threads()} threads"
    return f"Measured at the export on {machine}, float32, CPU; other jobs may have run too.\n\n{tables.markdown(rows)}"


def _quartiles(latency: Latency) -> str:
    low, median, high = latency.quartiles_ms
    return f"{median:.2f} ({low:.2f} to {high:.2f}), {latency.calls}"


def _processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _training(facts: Mapping[str, Any]) -> str:
    settings = published(facts)["settings"]
    rows = [("setting", "value"), *((name, json.dumps(value)) for name, value in settings.items())]
    return f"Trained by {facts['software']}, finished {facts['finished']}.\n\n{tables.markdown(rows)}"
