"""What can be known before training: whether batch, images, ranks, network and initial weights go together."""

from pathlib import Path

from torch import nn

from kd_dist.config import RULE_HOLDS_TO, JobConfig, LabelUse
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.job.data import Data
from kd_dist.job.selection import members_of
from kd_dist.models import require_usable
from kd_dist.models.weights import misfits
from kd_dist.run import checkpoint
from kd_dist.run.folder import RunFolder
from kd_dist.training.batches import steps_in_epoch

FEWEST_IMAGES_A_GPU = 128  # in a step; with fewer a GPU waits for its kernels to be launched
ALL_LABELS = LabelUse()


def require_trainable(
    config: JobConfig,
    data: Data,
    model: nn.Module,
    runtime: Runtime,
    labels: LabelUse = ALL_LABELS,
    name: str = "the network",
) -> None:
    """Raise UserError where the batch does not suit the data and the ranks, or the network (of this name) the task and
    the image size.
    """
    members_M = members_of(config.split, labels, data)
    images, ranks = len(data.samples.train if members_M is None else members_M), runtime.world_size
    batch_size = config.optimisation.batch_size
    if batch_size > images:
        raise UserError(
            f"--batch-size {batch_size} is larger than the {images} training images"
            f"{f' that --label-fraction {labels.fraction:g} leaves' if labels.fraction < 1 else ''}; use --batch-size "
            f"{images} or less."
        )
    steps = steps_in_epoch(images, batch_size)
    if images // steps < 2 * ranks:
        raise UserError(
            f"--batch-size {batch_size} over {ranks} ranks leaves some with fewer than two of the {images} "
            "images a step; use a larger --batch-size or fewer ranks."
        )
    require_usable(name, model, len(data.samples.classes), config.augmentation.image_size)


def batch_warnings(batch_size: int, ranks: int, device: str) -> list[str]:
    """What speaks against a batch of so many images over all ranks: too few on each GPU, or more than the rule for the
    learning rate was shown for.
    """
    warnings = []
    if device == "cuda" and batch_size / ranks < FEWEST_IMAGES_A_GPU:
        warnings.append(
            f"{batch_size / ranks:g} images a rank keep no GPU busy, {FEWEST_IMAGES_A_GPU} or more do; use fewer GPUs "
            "or a larger --batch-size"
        )
    if batch_size > RULE_HOLDS_TO:
        warnings.append(
            f"linear scaling of the learning rate was shown up to {RULE_HOLDS_TO} images a step, this is "
            f"{batch_size}; try other values of --lr"
        )
    return warnings


def start_from(model: nn.Module, init: str | None) -> dict[str, str]:
    """Take over the weights of a run or a model.pt where --init names one, and give what binds a run to them.

    Raises UserError where they are not there, are not ours, or do not fit the network.
    """
    if init is None:
        return {}
    path = Path(init)
    path = RunFolder(path).model if path.is_dir() else path
    given = checkpoint.load_model(path)["weights"]
    if wrong := misfits(model.state_dict(), given):
        raise UserError(f"--init {path} does not fit this network: {wrong}; name the weights of the same network.")
    model.load_state_dict(given)
    return {"initial weights": checkpoint.weights_digest(given)}
