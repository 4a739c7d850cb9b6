"""Lines of progress, from rank 0 alone."""

import time
from collections.abc import Callable

from kd_dist.dist.runtime import Runtime

PROGRESS_SECONDS = 10.0


def say(runtime: Runtime, text: str) -> None:
    """One line of progress from rank 0, headed by the time of day."""
    if runtime.is_main:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def progress_lines(runtime: Runtime, what: str) -> Callable[[int, int], None]:
    """A callback (done, all) that prints a line now and then on rank 0."""
    said_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > PROGRESS_SECONDS:
            said_at = time.monotonic()
            say(runtime, f"{what}: {done:,} of {total:,}")

    return progress


def progress_by_name(runtime: Runtime) -> Callable[[str, int, int], None]:
    """As progress_lines, for work that names its own steps: a callback (what, done, all)."""
    lines: dict[str, Callable[[int, int], None]] = {}

    def progress(what: str, done: int, total: int) -> None:
        lines.setdefault(what, progress_lines(runtime, what))(done, total)

    return progress
