"""What computes the logits of a block: each image's own teacher, or the mean of several."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from kd_dist.cache import Block, Header, Table
from kd_dist.data.samples import Dataset
from kd_dist.images import views
from kd_dist.images.store import ImageStore
from kd_dist.inference import Forward
from kd_dist.label.teachers import Teacher


class LabelData(Protocol):
    """The images that are labelled, and their pixels by split; `threads` of a rank may draw them ahead."""

    @property
    def samples(self) -> Dataset: ...

    @property
    def pixels(self) -> Mapping[str, ImageStore]: ...

    @property
    def threads(self) -> int: ...


class Labeller:
    """The logits of a header's teachers on views of the data, as far as these teachers and means of them go."""

    def __init__(self, teachers: Sequence[Teacher], data: LabelData, header: Header, device: torch.device):
        models = {teacher.row.sha256: teacher.model for teacher in teachers}
        self.teachers, self.rows, self.device = teachers, header.teachers, device
        self.forwards = {
            (split, number): Forward(
                model=models[row.sha256],
                pixels=data.pixels[split],
                image_size=header.image_size,
                mean=header.mean,
                std=header.std,
                device=device,
                dtype=header.compute_dtype,
                threads=data.threads,
            )
            for split in data.pixels
            for number, row in enumerate(self.rows)
            if row.sha256 in models
        }

    def knows(self, number: int) -> bool:
        """Whether the logits of this teacher can be computed."""
        members = self.rows[number].member_rows
        return all(map(self.knows, members)) if members else ("train", number) in self.forwards

    def known_samples(self, table: Table) -> np.ndarray:
        """The rows of a split whose teachers can be computed: int64 [M]."""
        known_T = np.array([self.knows(number) for number in range(len(self.rows))])
        return np.flatnonzero(known_T[table.teacher_N])

    def block(self, block: Block, table: Table) -> np.ndarray:
        """Logits float16 [B, K] of a block; beyond 65504 infinite, which the writer refuses, naming the image."""
        with np.errstate(over="ignore"):
            rows_B = np.arange(block.start, block.stop)
            return self.logits(block.split, table, rows_B, block.view).astype(np.float16)

    def logits(self, split: str, table: Table, index_B: np.ndarray, view: int) -> np.ndarray:
        """Logits float32 [B, K] of some samples in one view, each by its own teacher.

        A teacher's samples go through it in their order in fixed batches, so that equal calls give equal bits.
        """
        shown, teacher_B = views.shown_in(table, index_B, view), table.teacher_N[index_B]
        logits_BK = np.empty((0, 0), np.float32)
        for number in np.unique(teacher_B):
            places = np.flatnonzero(teacher_B == number)
            rows = self._of_teacher(split, int(number), shown.at(places))
            logits_BK = np.empty((len(index_B), rows.shape[1]), np.float32) if not len(logits_BK) else logits_BK
            logits_BK[places] = rows
        return logits_BK

    def _of_teacher(self, split: str, number: int, shown: views.Shown) -> np.ndarray:
        members = self.rows[number].member_rows
        if not members:
            return self.forwards[split, number].logits(shown)
        total_BK = sum(self._of_teacher(split, member, shown).astype(np.float64) for member in members)
        return np.asarray(total_BK / len(members), np.float32)
