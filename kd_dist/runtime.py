"""Where this process stands among its peers: ranks, device, exact sharding, reductions, and how all of them end
together.

Ranks come from torch's own variables (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), which
torchrun sets and our SLURM launcher too. With none of them set this is one process and no process group is made.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from kd_dist.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, UserError

PEER_IS_GONE = (
    "kd_dist: another rank died or stopped answering, or the network failed; run the same command again to go on from "
    "the last checkpoint."
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.2
FAILURE_KEY = "kd_dist/failure"
SAME_CTRL_C_SECONDS = 2.0
MEETING_SECONDS = 10.0  # how long rank 0's port may stay closed; KD_DIST_MEETING_SECONDS changes it
# Endings of the names by which parallel starters of all kinds tell a task how many there are, and which one it is.
TASK_COUNTS = ("_STEP_NUM_TASKS", "_COMM_WORLD_SIZE", "PMI_SIZE")
TASK_NUMBERS = ("_PROCID", "_COMM_WORLD_RANK", "PMI_RANK")


@dataclass(frozen=True)
class Runtime:
    """One process's place in the group, and what it can ask of the group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This rank's part of range(count): every number on exactly one rank."""
        return range(self.rank, count, self.world_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor, on every rank, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def take_from_main(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite tensors by rank 0's, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 do something short, and give its result, or raise its UserError, on every rank."""
        outcome = self.gather(self._outcome(work) if self.is_main else None)[0]
        if outcome["error"] is not None:
            raise UserError(outcome["error"])
        return outcome["result"]

    def once_a_node(self, task: str, work: Callable[[], Any]) -> Any:
        """Let one process a node do something long while its peers wait outside any collective, where no time-out runs.

        Gives its result, which must be plain JSON, on every rank of the node, and raises its UserError there.
        """
        if self.store is None:
            return work()
        key = f"kd_dist/{task}/{self.rank - self.local_rank}"
        if self.local_rank == 0:
            outcome = self._outcome(work)
            self.store.set(key, json.dumps(outcome))
        else:
            while not self.store.check([key]):
                time.sleep(POLL_SECONDS)
            outcome = json.loads(self.store.get(key))
        if outcome["error"] is not None:
            raise UserError(outcome["error"])
        return outcome["result"]

    def wait_for_all(self, task: str) -> None:
        """Wait until all ranks are here, however long the slowest takes: no collective, so no time-out runs."""
        if self.store is None:
            return
        key = f"kd_dist/{task}/arrived"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world_size:
            time.sleep(POLL_SECONDS)

    def announce(self, reason: str) -> None:
        """Leave word of why this rank fails, for those that will only see it gone."""
        if self.store is not None:
            with contextlib.suppress(Exception):
                self.store.set(FAILURE_KEY, reason)

    def announced(self) -> str | None:
        """The reason that some rank left, None where there is none."""
        if self.store is not None:
            with contextlib.suppress(Exception):
                if self.store.check([FAILURE_KEY]):
                    return self.store.get(FAILURE_KEY).decode()
        return None

    @staticmethod
    def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"result": work(), "error": None}
        except UserError as error:
            return {"result": None, "error": str(error)}


def _environment(name: str) -> int | None:
    value = os.environ.get(name)
    return int(value) if value and value.isdigit() else None


def launched_rank() -> int:
    """This process's rank as its launcher told it, 0 where there is none; needs no process group."""
    return _environment("RANK") or 0


@contextlib.contextmanager
def joined(device: str = "auto", timeout_seconds: float = 1800.0) -> Iterator[Runtime]:
    """Join the process group that the environment describes, and leave it at the end.

    Raises UserError for a device that is not there, more ranks than GPUs, or a rendezvous that cannot be reached.
    """
    _refuse_strays()
    rank, world_size = launched_rank(), _environment("WORLD_SIZE") or 1
    local_rank = _environment("LOCAL_RANK") or 0
    local_world_size = _environment("LOCAL_WORLD_SIZE") or 1
    chosen = choose_device(device, local_rank, local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store = None
    if "RANK" in os.environ:
        _end_with_parent()
    if world_size > 1:
        _check_meeting_point(rank, local_world_size < world_size)
        store = _make_group(chosen, timeout_seconds)
    runtime = Runtime(rank, world_size, local_rank, local_world_size, chosen, store)
    _refuse_shared_gpus(runtime)
    yield runtime
    if store is not None:
        dist.destroy_process_group()


def _task_environment(endings: Sequence[str]) -> int:
    """The largest number that the environment holds under a name with one of these endings, 0 where there is none."""
    values = (value for name, value in os.environ.items() if name.endswith(tuple(endings)) and value.isdigit())
    return max(map(int, values), default=0)


def _refuse_strays() -> None:
    """Refuse to be one of several tasks to which nobody gave a rank: each would be a whole job in the same folder."""
    tasks = _task_environment(TASK_COUNTS)
    if tasks > 1 and _environment("WORLD_SIZE") is None:
        raise UserError(
            f"{tasks} tasks were started side by side, but none was told its rank, so each would train alone in the "
            "same folder; start them by `python -m launch.submit`, or one task a node by `srun torchrun` (see slurm/)."
        )


def _check_meeting_point(rank: int, several_machines: bool) -> None:
    """Raise UserError where rank 0's address does not resolve or its port stays closed, which torch takes for half an
    hour to say. Under torchrun the ranks have met already.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        raise UnreachableError(
            f"MASTER_ADDR {host}:{port} does not resolve on {socket.gethostname()} ({error.strerror or error}); name "
            "rank 0's machine as the others know it."
        ) from error
    if rank != 0 and not _opens(address):
        loopback = several_machines and address[0].startswith(("127.", "::1"))
        hint = ", a loopback address, leads to this machine itself" if loopback else ""
        raise UnreachableError(
            f"nothing answers at MASTER_ADDR:MASTER_PORT {host}:{port} ({address[0]}{hint}) as seen from "
            f"{socket.gethostname()}; check that rank 0 runs there and that no firewall stands between."
        )


def _opens(address: tuple) -> bool:
    patience = float(os.environ.get("KD_DIST_MEETING_SECONDS", MEETING_SECONDS))
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(address[:2], timeout=min(5.0, patience)).close()
            return True
        time.sleep(POLL_SECONDS)
    return False


def choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of a rank: its own GPU, or the CPU. Raises UserError where the GPUs asked for are not there."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and visible == 0):
        return torch.device("cpu")
    if visible == 0:
        raise MachineError(
            "--device cuda, but no GPU is visible here; use --device cpu, or look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES."
        )
    if visible == 1:  # the machine's only one, or this rank's own of several: told apart once the ranks can talk
        return torch.device("cuda", 0)
    if visible < local_world_size:
        raise MachineError(
            f"{local_world_size} ranks on this machine but {visible} GPUs; use --nproc_per_node={visible}, or "
            "--device cpu to run without GPUs."
        )
    return torch.device("cuda", local_rank)


def _make_group(device: torch.device, timeout_seconds: float) -> dist.Store:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    except (dist.DistError, ValueError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(
                f"the port of {address} is in use; choose another by --master_port, or use torchrun --standalone."
            ) from error
        raise UserError(
            f"the ranks could not meet at {address} (MASTER_ADDR:MASTER_PORT): {str(error).splitlines()[0]}; check "
            "that every node can reach it."
        ) from error
    return dist.distributed_c10d._get_default_store()


def _refuse_shared_gpus(runtime: Runtime) -> None:
    if runtime.device.type != "cuda" or runtime.world_size == 1:
        return
    uuid = str(torch.cuda.get_device_properties(runtime.device).uuid)
    mine = (socket.gethostname(), uuid)
    everyone = runtime.gather(mine)
    here = {gpu for host, gpu in everyone if host == mine[0]}
    if len(set(everyone)) < len(everyone):
        raise UserError(
            f"{runtime.local_world_size} ranks on this machine but {len(here)} GPUs; use "
            f"--nproc_per_node={len(here)}, or --device cpu."
        )


def _end_with_parent() -> None:
    """End this rank when the process that started it is gone: a launcher killed outright cannot tell its ranks."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


class MachineError(UserError):
    """Something is wrong with one machine, before the ranks have met: one rank of each machine concerned says so."""


class UnreachableError(MachineError):
    """Rank 0 cannot be reached from this machine."""


class StopRequest:
    """Remembers that a signal asked this process to stop, so that the loop can finish its step first.

    SIGTERM, SIGINT (Ctrl-C) and SIGUSR2 (a scheduler's warning) count alike. A second Ctrl-C ends the process at once,
    unless it comes with the first: a terminal signals every process, and torchrun passes its own signal on.
    """

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT == self.signal and time.monotonic() > self._first + SAME_CTRL_C_SECONDS:
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()


class Interrupted(Exception):
    """A run that stopped on request with everything saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def ignore_stop_signals(_worker: int = 0) -> None:
    """For loader processes: they get the group's signals too, and must work on until their rank's step is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_entry(main: Callable[[], None]) -> None:
    """Run an entry point and end the process: code 0, 2 after a UserError's one sentence, 3 where only another rank
    was lost, 128 + signal after a stop, 1 after a defect.

    However many ranks fail, and in whatever order, one of them speaks; the others wait for the launcher to end them.
    """
    try:
        main()
    except UserError as error:
        at_once = isinstance(error, MachineError) and not _environment("LOCAL_RANK")
        _end(EXIT_USER_ERROR, f"kd_dist: {error}", at_once=at_once)
    except Interrupted as stop:
        _end(stop.exit_code, f"kd_dist: {stop}; run the same command again to go on.")
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        if peer_is_gone(error):
            _end(EXIT_PEER_LOST, f"{PEER_IS_GONE} ({str(error).strip().splitlines()[0]})", patience=1.0)
        _end(1, traceback.format_exc())
    # All is written and closed. Python's own way out now and then aborts a rank ("terminate called without an active
    # exception") while torch's threads are still there, and a finished job would count as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def peer_is_gone(error: BaseException) -> bool:
    """Whether an error means that another rank ended, or cannot be reached any more."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "NCCL",
        "gloo",
    )
    return isinstance(error, (dist.DistError, RuntimeError)) and any(word in str(error) for word in words)


def _end(code: int, message: str, patience: float = 0.0, at_once: bool = False) -> None:
    time.sleep(patience)  # a rank that only lost its peer lets the one with the reason speak first
    if at_once or _may_speak():
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)  # ending first would have the launcher stop the speaker in mid-sentence
    os._exit(code)  # no clean-up: peers may be waiting in a collective that will never end


def _may_speak() -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return launched_rank() == 0 and ("RANK" in os.environ or _task_environment(TASK_NUMBERS) == 0)
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"kd_dist/spoken/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except Exception:
        return launched_rank() == 0
