"""How a rank ends: on a stop signal, a wrong input, a defect, or the end of another rank. One rank of a job says why.

torchrun reports a failed job by the error file of the rank that failed first; the sentence is written there too, so
that torchrun's "Root Cause" shows it.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist

from kd_dist.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, Failure, MachineError, UserError
from kd_dist.dist.watch import GO_ON, Watch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
# A rank that prints nothing waits this long: if it ended first, the launcher would end the one that prints.
GRACE_SECONDS = 5.0
# Before a dead peer is reported: where a launcher ends all ranks by one signal, none of them is to report another.
SIGNAL_SECONDS = 0.2
MAIN_THREAD_SECONDS = 3.0  # for the main thread to end by itself where a peer that lives reported a failure
WATCH_SECONDS = 2.0  # in which the watch names the peer whose connection a collective has lost
SAME_CTRL_C_SECONDS = 2.0
# Endings of the names by which parallel starters of all kinds number their tasks.
TASK_NUMBERS = ("_PROCID", "_COMM_WORLD_RANK", "PMI_RANK")
# gloo's, NCCL's and torch's words for a connection that ended under a collective.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exit",
)
TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout")


class _Process:
    """What this process ends with: its watch, its store, and what notes a failure in the folder of the current run."""

    watch: Watch | None = None
    store: dist.Store | None = None
    note: Callable[[Failure], None] | None = None
    ending = threading.Lock()


def watch_by(watch: Watch | None, store: dist.Store | None) -> None:
    """From now on a failure of this process is told to the peers of this watch, and they agree by this store on the
    one that speaks.
    """
    _Process.watch, _Process.store = watch, store


@contextlib.contextmanager
def noting(note: Callable[[Failure], None]) -> Iterator[None]:
    """Within, a failure that ends the process from the watch's thread is noted by `note(failure)`."""
    before, _Process.note = _Process.note, note
    try:
        yield
    finally:
        _Process.note = before


class StopRequest:
    """Remembers that a signal asked this process to stop, so that the loop can finish its step first.

    SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 (a scheduler's warning) count alike. A second Ctrl-C ends the process at once,
    unless it comes with the first: a terminal signals every process, and torchrun passes its own signal on.
    """

    def __init__(self):
        self.signal: int | None = None
        self._first = 0.0  # when that signal came

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT == self.signal and time.monotonic() > self._first + SAME_CTRL_C_SECONDS:
            _leave(number)
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()


class Interrupted(Exception):
    """A run that stopped on request with everything saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.exit_code = 128 + number


def ignore_stop_signals(_worker: int = 0) -> None:
    """For loader processes: they get the group's signals too, and must work on until their rank's step is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_entry(main: Callable[[], None]) -> None:
    """Run an entry point and end the process: code 0, 2 after a UserError's one sentence, 3 where another rank was
    lost, 128 + signal after a stop, 1 after a defect.

    However many ranks fail, and in whatever order, one of them speaks; the others wait for the launcher to end them.
    """
    try:
        main()
    except Interrupted as stop:
        _leave(stop.signal)
        _end(Failure(f"{stop}; run the same command again to go on.", stop.exit_code))
    except (KeyboardInterrupt, BrokenPipeError):
        _leave(signal.SIGINT)
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        failure = failure_of(error)
        tell(failure)
        _end(failure, at_once=isinstance(error, MachineError) and not environment_number("LOCAL_RANK"))
    # All is written and closed. Python's own way out now and then aborts a rank ("terminate called without an active
    # exception") while torch's threads are still there, and a finished job would count as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def environment_number(name: str) -> int | None:
    """An environment variable that is a whole number, None where it is not set or is none."""
    value = os.environ.get(name)
    return int(value) if value and value.isdigit() else None


def launched_rank() -> int:
    """This process's rank as its launcher set it, 0 where there is none; needs no process group."""
    return environment_number("RANK") or 0


def largest_number(endings: Sequence[str]) -> int:
    """The largest number that the environment holds under a name with one of these endings, 0 where there is none."""
    values = (value for name, value in os.environ.items() if name.endswith(tuple(endings)) and value.isdigit())
    return max(map(int, values), default=0)


# ---- why


def failure_of(error: BaseException) -> Failure:
    """What an exception means to the user. Where a collective lost a peer, it is the watch's sentence on that peer."""
    if isinstance(error, UserError):
        return Failure(str(error), EXIT_USER_ERROR)
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError):
        if "out of memory" in text and ("CUDA" in text or isinstance(error, torch.OutOfMemoryError)):
            return Failure(_out_of_memory(text), EXIT_USER_ERROR)
        if isinstance(error, dist.DistNetworkError) or any(words in text for words in LOST_PEER):
            lost = f"the connection to another rank broke ({_first_line(error)}); {GO_ON}"
            return _from_watch() or Failure(lost, EXIT_PEER_LOST)
        if any(words in text for words in TIMED_OUT):
            return Failure(
                f"a rank did not come to a collective in time ({_first_line(error)}); {GO_ON}", EXIT_PEER_LOST
            )
        if isinstance(error, dist.DistBackendError):
            return Failure(f"NCCL failed: {text}; NCCL_DEBUG=INFO shows more.", 1)
    known = _Process.watch.failure if _Process.watch else None
    return known or Failure(f"{type(error).__name__}: {text}", 1, traceback="".join(traceback.format_exception(error)))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _out_of_memory(text: str) -> str:
    return (
        f"the GPU's memory is full ({text.split(' If reserved')[0].split(' Of the allocated')[0].rstrip('.')}); use a "
        "smaller --batch-size, or --pixels memory to keep the decoded images in the host's memory."
    )


def _from_watch() -> Failure | None:
    """The failure that the watch knows of, or hears of soon."""
    deadline = time.monotonic() + (WATCH_SECONDS if _Process.watch else 0)
    while _Process.watch and _Process.watch.failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return _Process.watch.failure if _Process.watch else None


def known_failure() -> Failure | None:
    """The failure of this or another rank, None while there is none."""
    return _Process.watch.failure if _Process.watch else None


def tell(failure: Failure) -> None:
    """Tell the other ranks why this one fails."""
    if _Process.watch:
        _Process.watch.tell(failure)


def _leave(number: int) -> None:
    if _Process.watch:
        _Process.watch.leave(stopped_by=number)


# ---- the end, in the main thread or in the watch's


def end_after(failure: Failure) -> None:
    """End this process for what the watch saw, in the watch's thread: the main thread may wait in C for ever."""
    time.sleep(MAIN_THREAD_SECONDS if failure.lost_rank is None else SIGNAL_SECONDS)
    if launched_rank() == 0 or (failure.lost_rank == 0 and _is_first_here()):
        _note(failure)
    _end(failure)


def _note(failure: Failure) -> None:
    with contextlib.suppress(Exception):
        if _Process.note:
            _Process.note(failure)


def _end(failure: Failure, at_once: bool = False) -> None:
    """End this process. Of the two threads that may want to, the first one does."""
    if not _Process.ending.acquire(blocking=False):
        time.sleep(10 * GRACE_SECONDS)
    _write_error_file(failure)
    if at_once or _may_speak(failure):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            print(failure.traceback or f"kd_dist: {failure.sentence}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
    os._exit(failure.code)  # no clean-up: peers may be waiting in a collective that will never end


def _write_error_file(failure: Failure) -> None:
    """The JSON that torch.distributed.elastic reads when this rank is the first that failed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            message = failure.traceback or f"kd_dist: {failure.sentence}"
            json.dump({"message": message, "timestamp": int(time.time())}, file)


def _may_speak(failure: Failure) -> bool:
    """Whether this rank is the one that says why the job ends: the first one to ask."""
    if failure.lost_rank == 0:  # the store may have been its
        return _is_first_here()
    if _Process.store is None:
        return launched_rank() == 0 and ("RANK" in os.environ or largest_number(TASK_NUMBERS) == 0)
    try:
        return _Process.store.add("kd_dist/spoken", 1) == 1
    except Exception:
        return launched_rank() == 0


def _is_first_here() -> bool:
    """Whether this is the lowest rank of its machine but rank 0."""
    return (environment_number("LOCAL_RANK") or 0) == (1 if launched_rank() == environment_number("LOCAL_RANK") else 0)
