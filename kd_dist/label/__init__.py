"""Labelling: trained teachers' logits on views of every image, written to a cache by all ranks in blocks."""

from kd_dist.label.labeller import LabelData, Labeller
from kd_dist.label.plans import ViewRule, plan, plan_extended, plan_like
from kd_dist.label.teachers import Teacher, load_teacher
from kd_dist.label.write import write_cache

__all__ = [
    "LabelData",
    "Labeller",
    "Teacher",
    "ViewRule",
    "load_teacher",
    "plan",
    "plan_extended",
    "plan_like",
    "write_cache",
]
