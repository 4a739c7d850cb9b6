"""A trained student or teacher ready for use: `kd_dist.load(path)`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as parse
from torch import Tensor, nn

from kd_dist.errors import UserError
from kd_dist.files import read_json
from kd_dist.images import views
from kd_dist.images.decode import rgb_of
from kd_dist.models import restored
from kd_dist.run.checkpoint import load_model, weights_digest
from kd_dist.run.folder import RunFolder

FORMAT, VERSION = "kd_dist.export", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Transform:
    """PIL image -> network input, float32 [3, S, S]: the evaluation view (the centre square, resized), normalised.

    Raises UserError for an image with a side of more than 32,767 pixels.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalise(self.view(rgb_of(image))[None])[0]

    def view(self, image_HWC: np.ndarray) -> Tensor:
        """The evaluation view uint8 [3, S, S] of an RGB image uint8 [H, W, 3]."""
        box_4 = views.evaluation_boxes(np.array([image_HWC.shape[:2]]))[0]
        return views.render(torch.from_numpy(image_HWC), box_4, False, self.image_size)

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Network input float32 from uint8 images [B, 3, S, S], on their device."""
        return views.Normalise(self.mean, self.std, torch.float32, images_BCHW.device)(images_BCHW)


class Model(nn.Module):
    """A trained network in evaluation mode: normalised images float32 [B, 3, S, S] -> logits [B, K].

    `classes` are the K names, `transform` makes the input from a PIL image, `facts` is all that the model's file holds
    besides the weights: arch, data, settings, scores, teacher.
    """

    def __init__(self, network: nn.Module, facts: Mapping[str, Any]):
        super().__init__()
        self.network = network
        self.facts = dict(facts)
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        self.image_size: int = facts["image_size"]
        self.mean: tuple[float, ...] = tuple(facts["mean"])
        self.std: tuple[float, ...] = tuple(facts["std"])
        self.transform = Transform(self.image_size, self.mean, self.std)
        self.eval().requires_grad_(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network(images_BCHW)


def load(path: str | Path) -> Model:
    """The network of a run's folder, a model.pt, or a folder that `python -m kd_dist.export` wrote, on the CPU.

    Raises UserError where it is missing, damaged, or not written by this program.
    """
    path = Path(path)
    if path.is_dir() and (path / CONFIG).exists():
        return _load_exported(path)
    file = RunFolder(path).model if path.is_dir() else path
    facts = load_model(file)
    return _built(file, facts, facts.pop("weights"))


def _load_exported(folder: Path) -> Model:
    """As `load`, from config.json and model.safetensors."""
    file = folder / WEIGHTS
    config = read_json(folder / CONFIG, mend="export the model again.") or {}
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise UserError(f"{folder / CONFIG} was not written by this program as {FORMAT} version {VERSION}.")
    try:
        weights = parse(file.read_bytes())
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read ({reason}); export the model again.") from error
    if weights_digest(weights) != config["weights_sha256"]:
        raise UserError(f"{file} does not hold the weights that {CONFIG} names; export the model again.")
    return _built(file, config["facts"], weights)


def _built(file: Path, facts: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Model:
    """The network that the facts name, with these weights. Raises UserError where they do not fit."""
    network = restored({**facts, "weights": weights}, file)
    return Model(network.to(memory_format=torch.channels_last), facts)
