"""A teacher that was not trained here: any network, with weights from a file or from its own function."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_dist import models
from kd_dist.cache import TeacherRow
from kd_dist.errors import UserError
from kd_dist.label.class_map import IMAGENET, picked, read_class_map, synsets
from kd_dist.label.teachers import Teacher
from kd_dist.models.weights import classes_of, read_weights, take_weights
from kd_dist.run import checkpoint

CROP_SCALE = (0.35, 1.0)
UNKNOWN_SEED = -1


class Picked(nn.Module):
    """A network of which some of the logits are used, in another order."""

    def __init__(self, network: nn.Module, index: Sequence[int]):
        super().__init__()
        self.network = network
        self.register_buffer("index_K", torch.tensor(index), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network(images_BCHW)[:, self.index_K]


def is_foreign(teacher: str, weights: Path | None) -> bool:
    """Whether --teacher names a network rather than a model.pt."""
    return weights is not None or (":" in teacher and not Path(teacher).exists())


class ForeignTeacher:
    """What the command line says of such a teacher, read and checked as far as that goes without the data.

    Raises UserError for a name that is not known, weights that cannot be read, or a class map that cannot be.
    """

    def __init__(self, name: str, weights: Path | None, class_map: str | None):
        models.require_known(name, "--teacher")
        if weights is None and name.partition(":")[0] in ("torchvision", "timm"):
            raise UserError(f"--teacher {name} would have random weights; add --weights FILE.")
        self.name, self.path, self.class_map = name, weights, class_map
        self.weights = read_weights(weights) if weights else None
        self.pairs = read_class_map(class_map) if class_map else None

    def teacher(
        self,
        classes: tuple[str, ...],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> Teacher:
        """The teacher of the data's classes, on the device. Raises UserError where weights, classes or image size do
        not fit.
        """
        network = self._network(len(classes))
        outputs = _outputs_of(self.name, network, image_size)
        digest = checkpoint.weights_digest(network.state_dict())
        if self.pairs is not None:
            network = Picked(network, picked(self.pairs, self.class_map or "", classes, outputs))
        elif outputs != len(classes):
            raise UserError(
                f"--teacher {self.name} has {outputs} classes, the data has {len(classes)}; name which of them these "
                "are with --class-map."
            )
        return Teacher(
            model=network.to(device).to(memory_format=torch.channels_last).eval(),
            row=TeacherRow(digest, self.name, UNKNOWN_SEED, -1, image_size, None),
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            classes=classes,
            crop_scale=CROP_SCALE,
            finished=self._written(),
            path=self.path or Path(self.name),
        )

    def _network(self, classes: int) -> nn.Module:
        network = models.build(self.name, classes)
        if self.weights is None or self.path is None:
            return network
        outputs = classes_of(self.weights, network, classes)
        if outputs != classes:
            network = models.build(self.name, outputs)
        take_weights(network, self.weights, self.path, outputs)
        return network

    def _written(self) -> str:
        """The time of the weights' file: a cache's plan must not change when its writing goes on."""
        seconds = self.path.stat().st_mtime if self.path else 0
        return datetime.fromtimestamp(int(seconds), UTC).isoformat(timespec="seconds")

    def what_it_saw(self, classes: Sequence[str]) -> str:
        """One line on whether the teacher may have seen the data's val images."""
        if set(classes) <= set(synsets()) and self.class_map is not None:
            return (
                f"the data's classes are ImageNet's: a teacher that was trained on ImageNet's {IMAGENET:,} classes has "
                "seen images of val (Imagewoof's are drawn from there), so its val accuracy is not that on new images"
            )
        return "whether the teacher has seen images of val is not known: its val accuracy may not be that on new images"


def _outputs_of(name: str, network: nn.Module, image_size: int) -> int:
    """How many logits a network gives. Raises UserError where it gives anything else, or cannot take the image size."""
    models.require_image_size(image_size, network, name)
    with torch.inference_mode():
        logits = network.eval()(torch.zeros(2, 3, image_size, image_size))
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2 or not logits.is_floating_point():
        raise UserError(f"--teacher {name} does not give logits [B, K] of a floating type.")
    if not logits.isfinite().all():
        raise UserError(f"--teacher {name} gives logits that are not finite; name other weights.")
    return logits.shape[1]
