"""The names of the files in a run's folder. This package is the only one that spells, writes and removes them.

    runs/student/
        settings.json      what the run was asked to do; a resume is checked against it
        state.json         how it stands: running, finished, interrupted or failed
        metrics.jsonl      one line per epoch
        events.jsonl       timestamped events, as codes (kd_dist/run/events.py)
        checkpoints/       step-00000141.pt ..., the last two
        model.pt           the final weights
        model-epoch-20.pt  those after 20 epochs, where they were asked for (teachers)
        val_logits.h5      the network's own logits on what it is scored on: val, or under --tune a part of train
        logits.h5          the cache of soft labels, with logits.h5.sha256 (teachers)
        costs.json         seconds of work that no epoch's row counts, such as writing the cache (teachers)
        trace.json         a profile of some steps, where one was asked for
        events.out.tfevents.*                TensorBoard

Files are replaced by one rename, so a reader never meets half of one; metrics.jsonl is appended to, and its readers
pass over a last line that was cut. Only rank 0 writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kd_dist.run import events


@dataclass(frozen=True)
class RunFolder:
    """The names inside one run's folder. Making one touches no disk."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / events.NAME

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    def model_after(self, epochs: int) -> Path:
        """Where the weights after so many epochs are kept, if they are asked for."""
        return self.path / f"model-epoch-{epochs}.pt"

    @property
    def val_logits(self) -> Path:
        return self.path / "val_logits.h5"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def cache(self) -> Path:
        return self.path / "logits.h5"

    @property
    def costs(self) -> Path:
        return self.path / "costs.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint file, whole or not, oldest first."""
        names = (re.fullmatch(r"step-(\d{8,})\.pt", path.name) for path in self.checkpoints.glob("step-*.pt"))
        return sorted(int(name[1]) for name in names if name)

    def products(self) -> list[Path]:
        """The names of all that a run makes, but for settings.json and the lock, in the order in which to remove it.

        The state goes first: a removal that is cut short must not leave a run that calls itself finished.
        """
        cache_companions = [*self.path.glob(f"{self.cache.name}.*"), *self.path.glob(f".{self.cache.name}.*")]
        return [
            *(self.state, self.model, self.val_logits, self.trace, self.cache, self.costs, self.events),
            *cache_companions,  # its digest, and the parts of one that was not finished
            *(self.checkpoint(step) for step in self.saved_steps()),
            *self.path.glob("events.out.tfevents.*"),
            *(path for path in self.path.glob("model-epoch-*.pt") if re.fullmatch(r"model-epoch-\d+\.pt", path.name)),
            self.metrics,
        ]

    def left_overs(self) -> list[Path]:
        """Temporary files of writers that were killed; those of a cache are its own writer's business."""
        named = (self.settings, self.state, self.metrics, self.model, self.val_logits, self.trace, self.costs)
        names = [path.name for path in named]
        found = [path for name in names for path in self.path.glob(f".{name}.*.tmp")]
        found += self.path.glob(".model-epoch-*.tmp")
        return [*found, *self.checkpoints.glob(".step-*.tmp")]
