"""A trace of some training steps, for `--profile`."""

import contextlib
from collections.abc import Callable
from typing import Any, Self

import torch

from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import write_trace

TRACE_AFTER_STEPS, TRACED_STEPS = 20, 10


class Trace:
    """A profiler of TRACED_STEPS steps once the run is warm, for OUT/trace.json; does nothing unless `enabled`.

    `say` shows where the trace is, or why there is none: a trace that cannot be written does not end the run.
    """

    def __init__(self, folder: RunFolder, steps: int, say: Callable[[str], None], *, enabled: bool):
        self.folder, self.say = folder, say
        self._profiler = self._make(steps) if enabled else None

    def _make(self, steps: int) -> torch.profiler.profile:
        first = min(TRACE_AFTER_STEPS, steps // 2)
        plan = torch.profiler.schedule(skip_first=first, wait=0, warmup=1, active=TRACED_STEPS, repeat=1)
        return torch.profiler.profile(schedule=plan, on_trace_ready=self._keep)

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        if self._profiler:
            self._stack.enter_context(self._profiler)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def step(self) -> None:
        """One training step is done."""
        if self._profiler:
            self._profiler.step()

    def _keep(self, profiler: torch.profiler.profile) -> None:
        try:
            write_trace(self.folder, profiler.export_chrome_trace)
            self.say(f"traced some steps: open {self.folder.trace} at https://ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            self.say(f"no trace was written; the run continues: {error}")
