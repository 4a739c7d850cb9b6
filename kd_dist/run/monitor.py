"""What a run shows while it works: TensorBoard curves, and a progress bar or plain lines. Ranks but the first are mute.

Nothing here may end a training run: a full disk under TensorBoard or a closed terminal costs the image, not the work.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

_BAR_EVERY_S = 0.5


class Monitor:
    """Curves in `folder` (None: no curves) and progress on `stream` (None: standard output); mute unless `enabled`.

    `resume_step` is the step of the checkpoint that the run goes on from, 0 for none: TensorBoard then drops what an
    earlier attempt logged after it, so that curves stay single. Plain lines come at most every `lines_every_s` seconds.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool,
        resume_step: int = 0,
        lines_every_s: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self._screen = _Screen(stream or sys.stdout)
        self._on_terminal = self._screen.isatty()
        self._clock = clock
        self._every_s = _BAR_EVERY_S if self._on_terminal else lines_every_s
        self._next_s = clock() + (0 if self._on_terminal else lines_every_s)
        self._curves: SummaryWriter | None = None
        self._thread_hook = threading.excepthook
        if enabled and folder is not None:
            self._guarded(lambda: self._open(folder, resume_step))

    def _open(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # The writer's thread would print a traceback of what _guarded says in one line.
        threading.excepthook = self._thread_failed
        self._curves = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._thread_hook(failure)

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Add one point at `step` (optimizer updates so far) to each named curve, such as {"train/loss": 0.7}."""
        if self._curves is not None:
            curves = self._curves

            def write() -> None:
                for name, value in values.items():
                    curves.add_scalar(name, float(value), step)

            self._guarded(write)

    def flush(self) -> None:
        """Bring all points to disk. Call it before saving a checkpoint: what is lost before it is not logged again."""
        if self._curves is not None:
            self._guarded(self._curves.flush)

    def close(self) -> None:
        if self._curves is not None:
            self._guarded(self._curves.close)
            self._curves = None
        threading.excepthook = self._thread_hook

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, text: str) -> None:
        """Show one line, above the bar where there is one, headed by the time of day."""
        if not self.enabled:
            return
        text = f"{time.strftime('%H:%M:%S')} {text}"
        if self._on_terminal:
            from tqdm import tqdm

            tqdm.write(text, file=self._screen)
        else:
            print(text, file=self._screen, flush=True)

    @contextlib.contextmanager
    def epoch(self, epoch: int, epochs: int, steps: int, done: int = 0) -> Iterator[EpochProgress]:
        """Progress of one epoch of `steps` steps, `done` of them before a resume."""
        title = f"epoch {epoch}/{epochs}"
        if not (self.enabled and self._on_terminal):
            yield EpochProgress(self, title, steps)
            return
        from tqdm import tqdm

        with tqdm(total=steps, initial=done, desc=title, file=self._screen, leave=False, dynamic_ncols=True) as bar:
            yield EpochProgress(self, title, steps, bar)

    def _due(self) -> bool:
        """Whether it is time to show something again; True starts the next wait."""
        if not self.enabled or self._clock() < self._next_s:
            return False
        self._next_s = self._clock() + self._every_s
        return True

    def _guarded(self, write: Callable[[], object]) -> None:
        """SummaryWriter writes from a thread of its own and raises its errors in later calls: any call can fail."""
        try:
            write()
        except Exception as error:
            self._curves = None
            self.line(f"TensorBoard curves end here, the run goes on: {error}")


@dataclass(frozen=True)
class EpochProgress:
    """One bar on a terminal, else a plain line now and then. Made by Monitor.epoch."""

    monitor: Monitor
    title: str
    steps: int
    bar: tqdm | None = None

    def update(self, step: int, loss: SupportsFloat, images_per_s: SupportsFloat) -> None:
        """Say that `step` steps of the epoch are done. `loss` may be a tensor on a device, read only where shown."""
        if not self.monitor._due():
            return
        facts = f"loss {float(loss):.4f}, {float(images_per_s):.0f} images/s"
        if self.bar is None:
            self.monitor.line(f"{self.title}, step {step}/{self.steps}, {facts}")
        else:
            self.bar.n = step
            self.bar.set_postfix_str(facts)


class _Screen:
    """A text stream that shows what it can: what its encoding lacks is escaped, what it fails to write is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "ascii"

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a log on a full disk, a pipe whose reader went, a closed file
            self._stream.write(text.encode(self._encoding, "backslashreplace").decode(self._encoding))

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
