"""The trainer's own steps, a few at a time, so that two jobs can take turns in one process."""

import time

import torch

from kd_dist.training import Trainer
from kd_dist.training.batches import Batch


class Steps:
    """An arm: the next `count` steps of a trainer, as its `run` would take them; gives the seconds a step took.

    A step is all of it: the batch as the trainer prepares it, beside the step before on a GPU, forward, backward,
    update, bookkeeping, and what the ranks do together; the start of an epoch counts with each step's share. What comes
    once an epoch, evaluation and checkpoint, is left out: `gpu_rows` times whole runs too.
    With `fixed` every step gets the same batch, in memory on the device but not yet normalised: that is part of a step.
    """

    def __init__(self, trainer: Trainer, count: int, fixed: bool = False):
        self.trainer, self.count = trainer, count
        self.epoch, self.left = -1, 0
        self.epoch_start_seconds = 0.0
        trainer.sums.start_clock()
        self.fixed = next(trainer.data.epoch(0, trainer.runtime)).to(trainer.runtime.device) if fixed else None

    def __call__(self) -> float:
        if self.fixed is None and self.left < self.count:
            self._start_epoch()
        synchronise(self.trainer.runtime.device)
        started = time.perf_counter()
        for _ in range(self.count):
            self._step(self.trainer.prepare(self.fixed) if self.fixed else self._coming())
        synchronise(self.trainer.runtime.device)
        seconds = (time.perf_counter() - started) / self.count
        return seconds if self.fixed else seconds + self.epoch_start_seconds / self.trainer.steps_per_epoch

    def _start_epoch(self) -> None:
        """Draw up the next epoch, up to its first batch; a rest of the last one too short for a turn is left out."""
        trainer = self.trainer
        self.epoch, self.left = self.epoch + 1, trainer.steps_per_epoch
        started = time.perf_counter()
        self._batches = trainer.batches(self.epoch)
        self._next = next(self._batches)
        self.epoch_start_seconds = time.perf_counter() - started

    def _coming(self) -> Batch:
        if self.left == 0:
            self._start_epoch()
        batch = self._next if self._next is not None else next(self._batches)
        self._next, self.left = None, self.left - 1
        return batch

    def _step(self, batch: Batch) -> None:
        trainer = self.trainer
        trainer.train_step(batch)
        # At an epoch's end the synchronisation also saves, which is not a step's work.
        if trainer.step % trainer.sync_every == 0 and trainer.step % trainer.steps_per_epoch:
            trainer.sync()


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
