"""A run as recorded in its folder, for tables: what was asked for, its metrics, how it stands."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_dist.run.claim import read_settings
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.run.state import read_state


@dataclass(frozen=True)
class Run:
    """The files of a run's folder, and the name to show it under. Reading raises UserError where they are damaged."""

    folder: RunFolder
    name: str

    @cached_property
    def kind(self) -> str:
        return read_settings(self.folder)[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_settings(self.folder)[1]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json; empty where the run has not started."""
        return read_state(self.folder) or {}

    @property
    def scores(self) -> dict[str, Any]:
        """The metrics of the last epoch that ended with an evaluation; empty where none did yet."""
        scored = (row for row in reversed(self.metrics) if f"{self.prefix}_top1" in row)
        return next(scored, {})

    @property
    def cache(self) -> Path | None:
        """The cache that this run wrote or reads."""
        named = self.settings.get("cache")
        return Path(named) if named else self.folder.cache if self.kind == "teacher" else None

    @property
    def prefix(self) -> str:
        """The start of its metrics' names: "tune" where it is scored on a part of train, else "val"."""
        return "tune" if self.settings.get("tune") else "val"
