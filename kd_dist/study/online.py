"""The teacher in the loop, for comparison: it labels every crop as the student is shown it, in the same process."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_dist import config, distill
from kd_dist.cache import Cache
from kd_dist.config import StudentConfig
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.images.store import ImageStore
from kd_dist.job import Data
from kd_dist.label import Teacher, load_teacher
from kd_dist.training import LossTerms
from kd_dist.training.batches import Batch


@dataclass(frozen=True, eq=False)
class OnlineTeacher:
    """A cache's teacher and the images it labels; called with (settings, classes) it is the student's loss."""

    teacher: Teacher
    pixels: ImageStore
    device: torch.device

    @property
    def digest(self) -> str:
        """Names the teacher's weights."""
        return self.teacher.row.sha256

    def __call__(self, settings: StudentConfig, classes: int) -> LossTerms:
        """The loss that the settings name, against the teacher's logits on the very images of the batch."""
        cached = distill.loss_of(settings, classes)
        mean, std, size = self.teacher.mean, self.teacher.std, self.teacher.row.image_size
        normalise = views.Normalise(mean, std, torch.float32, self.device)
        sees_the_same = (size, mean, std) == (settings.augmentation.image_size, config.MEAN, config.STD)

        def terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            with torch.no_grad():  # not inference mode: the soft loss keeps these logits for its gradient
                images_BCHW = batch.images_BCHW
                if not sees_the_same:
                    assert batch.shown is not None  # as the trainer's batches have it
                    images_BCHW = normalise(self.pixels.show(batch.shown, size).to(self.device))
                teacher_logits_BK = self.teacher.model(images_BCHW)
            return cached(model, replace(batch, teacher_logits_BK=teacher_logits_BK))

        return terms


def open_teacher(path: Path, data: Data, cache: Cache, device: torch.device) -> OnlineTeacher:
    """Read the teacher's weights. Raises UserError where it is none, or not one that labelled the cache."""
    teacher = load_teacher(path, device)
    labelled = [row.sha256 for row in cache.header.teachers]
    if teacher.row.sha256 not in labelled:
        raise UserError(
            f"--teacher-model {path} is the teacher {teacher.row.sha256[:12]}, but {cache.path} was labelled by "
            f"{', '.join(sha256[:12] for sha256 in labelled)}; name the model.pt beside that cache."
        )
    return OnlineTeacher(teacher, data.pixels["train"], device)
