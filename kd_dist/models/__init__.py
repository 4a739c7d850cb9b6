"""Networks: ours, those of torchvision and timm, and those that a user's function builds."""

from kd_dist.models.named import build, require_known, restored
from kd_dist.models.networks import STUDENTS, TEACHERS, Cnn5, Float32Linear, count_weights
from kd_dist.models.trial import require_image_size, require_usable

__all__ = [
    "STUDENTS",
    "TEACHERS",
    "Cnn5",
    "Float32Linear",
    "build",
    "count_weights",
    "require_image_size",
    "require_known",
    "require_usable",
    "restored",
]
