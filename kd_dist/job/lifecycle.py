"""How a run stands and how it ended, kept in its folder for other programs: its state and its events."""

import contextlib
import time
from collections.abc import Callable, Iterator

from kd_dist.dist import endings
from kd_dist.dist.endings import Interrupted, StopRequest
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import Failure, UserError
from kd_dist.run import events
from kd_dist.run.events import Code, Reason
from kd_dist.run.folder import RunFolder
from kd_dist.run.state import read_state, write_state
from kd_dist.training import HEARTBEAT_SECONDS


@contextlib.contextmanager
def running(folder: RunFolder, runtime: Runtime, stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """From here on a signal is a request, and the run folder's state says how the run stands and how it ended.

    `stop` is the request of a command that does several runs and listens already.
    """
    _note(folder, runtime, "running", "")
    emit(folder, runtime, Code.DATA_READY)
    try:
        with (
            endings.noting(lambda failure: _note_failure(folder, failure)),
            contextlib.nullcontext(stop) if stop else StopRequest() as stop,
        ):
            yield stop
    except (Interrupted, KeyboardInterrupt) as error:
        lost = runtime.failure  # the launcher stops the ranks that are left when one has failed
        if lost and runtime.is_main:
            _note_failure(folder, lost)
        elif not lost:
            _note(folder, runtime, "interrupted", str(error), code=Reason.STOPPED)
            emit(folder, runtime, Code.RUN_INTERRUPTED, reason=Reason.STOPPED, message=str(error))
        raise
    except BaseException as error:
        failure = endings.failure_of(error)
        if runtime.world_size > 1:  # a rank that trains alone may continue with another run
            endings.tell(failure)
        if runtime.is_main:
            _note_failure(folder, failure)
        raise
    _note(folder, runtime, "finished", "")
    emit(folder, runtime, Code.RUN_FINISHED)


def _note_failure(folder: RunFolder, failure: Failure) -> None:
    reason = Reason.of_exit_code(failure.code)
    _write_state(folder, "failed", failure.sentence, code=reason)
    events.emit(folder.path, Code.RUN_FAILED, reason=reason, message=failure.sentence)


def emit(folder: RunFolder, runtime: Runtime, code: Code, **facts: object) -> None:
    """Append an event of the run, on rank 0."""
    if runtime.is_main:
        events.emit(folder.path, code, **facts)


def _note(folder: RunFolder, runtime: Runtime, status: str, message: str, **facts: object) -> None:
    if runtime.is_main:
        _write_state(folder, status, message, **facts)


def _write_state(folder: RunFolder, status: str, message: str, **facts: object) -> None:
    with contextlib.suppress(UserError):  # a full disk must not hide the reason
        last = read_state(folder) or {}
        reached = {name: last[name] for name in ("step", "epoch", "epochs") if name in last}
        write_state(folder, status, **reached, message=message, **facts)


def heartbeat(folder: RunFolder, runtime: Runtime, then: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A progress callback that shows the run's state to be alive now and then, and passes on to `then`."""
    beat_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal beat_at
        if time.monotonic() - beat_at > HEARTBEAT_SECONDS:
            beat_at = time.monotonic()
            _note(folder, runtime, "running", "")
        then(done, total)

    return progress
