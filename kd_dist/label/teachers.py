"""Trained teachers as their run folders hold them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kd_dist.cache import TeacherRow
from kd_dist.errors import UserError
from kd_dist.models import restored
from kd_dist.run import checkpoint


@dataclass(frozen=True)
class Teacher:
    """A trained teacher as its run folder's model.pt holds it."""

    model: nn.Module
    row: TeacherRow
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]
    crop_scale: tuple[float, float]
    finished: str
    path: Path = Path("model.pt")
    data: str = ""  # fingerprint of the train split that it was trained on, or on folds of


def load_teacher(path: Path, device: torch.device) -> Teacher:
    """Read a teacher's final weights. Raises UserError where the file is missing, damaged, or not a teacher's."""
    saved = checkpoint.load_model(path)
    if saved.get("kind") != "teacher":
        raise UserError(f"{path} holds a {saved.get('kind')}, not a teacher; pass a teacher's model.pt.")
    fold = saved.get("fold") or {"number": -1, "folds": 0}
    model = restored(saved, path)
    row = TeacherRow(
        sha256=checkpoint.weights_digest(saved["weights"]),
        arch=saved["arch"],
        seed=saved["seed"],
        fold=fold["number"],
        image_size=saved["image_size"],
        val_top1=saved.get("val_top1"),
        folds=fold["folds"],
    )
    return Teacher(
        model=model.to(device).to(memory_format=torch.channels_last).eval(),
        row=row,
        mean=tuple(saved["mean"]),
        std=tuple(saved["std"]),
        classes=tuple(saved["classes"]),
        crop_scale=tuple(saved["settings"]["crop_scale"]),
        finished=saved["finished"],
        path=path,
        data=saved["data"]["train"],
    )
