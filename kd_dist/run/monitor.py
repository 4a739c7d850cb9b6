"""What a run shows while it works: a progress bar or plain lines, and curves. Ranks but the first are mute.

Nothing here may end a training run: a full disk under TensorBoard or a closed terminal costs the image, not the work.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO

from kd_dist.run import events
from kd_dist.run.curves import Curves, Description

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR_EVERY_S = 0.5


class Monitor:
    """Curves in `folder` (None: no curves) and progress on `stream` (None: standard output); mute unless `enabled`.

    `resume_at` is the number of images seen at the checkpoint that the run resumes from, 0 for none; see Curves. Plain
    lines come at most every `lines_every_s` seconds.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool,
        resume_at: int = 0,
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
        self._folder, self._pictures_failed = folder, False
        self.curves = Curves(folder, resume_at, self.line) if enabled and folder is not None else None

    def scalars(self, at: int, values: Mapping[str, SupportsFloat]) -> None:
        """Add one point at `at` training images to each named curve, such as {"3_steps/total": 0.7}."""
        if self.curves is not None:
            self.curves.scalars(at, values)

    def describe(self, at: int, description: Description) -> None:
        """Show what the run is, and the attempts so far."""
        if self.curves is not None:
            assert self._folder is not None
            texts = dict(description.texts)
            with contextlib.suppress(OSError):
                texts["attempts"] = events.history(events.read(self._folder / events.NAME))
            self.curves.describe(at, replace(description, texts=texts))

    def pictures(self, at: int, draw: Callable[[], Mapping[str, tuple[bytes, tuple[int, int]]]]) -> None:
        """Add the pictures that `draw` gives by tag: PNG or JPEG, and width and height. Not called without curves; an
        error in it ends the pictures, not the run.
        """
        if self.curves is None or self._pictures_failed:
            return
        try:
            for tag, (encoded, size) in draw().items():
                self.curves.picture(at, tag, encoded, size)
        except Exception as error:
            self._pictures_failed = True
            self.line(f"there are no more pictures in TensorBoard, the run goes on: {error!r}")

    def finished(self, at: int) -> None:
        """The run has come to its end."""
        if self.curves is not None:
            self.curves.finished(at)

    def flush(self) -> None:
        """Bring all points to disk, see Curves.flush."""
        if self.curves is not None:
            self.curves.flush()

    def close(self) -> None:
        if self.curves is not None:
            self.curves.close()
            self.curves = None

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
