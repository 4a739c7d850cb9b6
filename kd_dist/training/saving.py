"""Checkpoints and signs of life of a run, written by a thread so that training does not wait for the disk."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch

from kd_dist.errors import UserError
from kd_dist.run import checkpoint
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import sync_metrics
from kd_dist.run.state import write_state

HEARTBEAT_SECONDS = 30.0


class Checkpoints:
    """Saves a run's checkpoints on `disk`, a thread; for rank 0.

    `save` copies what is saved and returns; the thread hashes, writes and flushes. One checkpoint is written at a time:
    `save` waits for the one before.
    """

    def __init__(self, folder: RunFolder, minutes: float, disk: Executor):
        self.folder, self.seconds, self._disk = folder, minutes * 60, disk
        self._writing: Future | None = None
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint and none is being written: one that is due does not wait for the disk."""
        return self._is_idle() and time.monotonic() - self._saved_at > self.seconds

    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` raises why."""
        return self._is_idle() and self._writing is not None and self._writing.exception() is not None

    def save(self, step: int, payload: dict[str, Any], then: Callable[[], None]) -> None:
        """Copy `payload` and have it written, with `then` called in the thread afterwards. Raises UserError where the
        checkpoint before this one could not be written.
        """
        self.wait()
        copied, ready = snapshot(payload)
        self._writing = self._disk.submit(self._write, step, copied, ready, then)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises UserError where it could not be."""
        if self._writing is not None:
            self._writing.result()

    def _is_idle(self) -> bool:
        return self._writing is None or self._writing.done()

    def _write(
        self, step: int, payload: dict[str, Any], ready: torch.cuda.Event | None, then: Callable[[], None]
    ) -> None:
        if ready is not None:
            ready.synchronize()
        sync_metrics(self.folder)  # the rows up to a checkpoint must not be lost where it is not
        checkpoint.save_checkpoint(self.folder, step, payload)
        then()


def snapshot(tree: Any) -> tuple[Any, torch.cuda.Event | None]:
    """A copy of dicts, lists and tensors, on the CPU, and the event after which it is whole (None: at once).

    Tensors on a GPU are copied to pinned memory without the host waiting; the steps enqueued afterwards run after it.
    """
    devices: set[torch.device] = set()

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [copied(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        devices.add(value.device)
        if not value.is_cuda:
            return value.detach().clone()
        pinned = torch.empty_like(value, device="cpu", pin_memory=True)
        return pinned.copy_(value.detach(), non_blocking=True)

    whole = copied(tree)
    on_gpu = next((device for device in devices if device.type == "cuda"), None)
    return whole, None if on_gpu is None else torch.cuda.current_stream(on_gpu).record_event()


class Heartbeat:
    """Shows in a run's state.json now and then that it is alive, and how far it is; written on `disk`, a thread."""

    def __init__(self, folder: RunFolder, disk: Executor):
        self.folder, self._disk = folder, disk
        self._beat_at = time.monotonic()

    def beat(self, **facts: Any) -> None:
        """Write the state if the last time is a while ago."""
        if time.monotonic() - self._beat_at > HEARTBEAT_SECONDS:
            self._disk.submit(self.write, **facts)
            self._beat_at = time.monotonic()

    def write(self, **facts: Any) -> None:
        """Write the state now."""
        with contextlib.suppress(UserError):  # it may fail; the next checkpoint will say why
            write_state(self.folder, "running", **facts)
