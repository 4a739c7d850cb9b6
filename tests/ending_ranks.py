"""What one rank of a job does in the tests of how all ranks end: python -m tests.ending_ranks SCENE RUN_FOLDER

Each scene runs inside `joined` and `job.running`, as the jobs do.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kd_dist import job
from kd_dist.dist.endings import Interrupted, StopRequest, run_entry
from kd_dist.dist.runtime import Runtime, joined
from kd_dist.errors import UserError
from kd_dist.run.folder import RunFolder


def wait_in_c() -> None:
    """As a rank in an NCCL collective: in C, without Python's lock. No signal interrupts it, so no handler runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
    ctypes.CDLL(None).sleep(3600)


def blocked(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """All ranks wait in C but the last one, which waits in Python, where the test kills or stops it."""
    ready(runtime, folder)
    if runtime.rank == runtime.world_size - 1:
        time.sleep(3600)
    wait_in_c()


def rank_0_waits(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """All ranks wait in C but rank 0."""
    ready(runtime, folder)
    if runtime.rank == 0:
        time.sleep(3600)
    wait_in_c()


def in_a_collective(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """All ranks but the last wait in one of gloo's collectives."""
    ready(runtime, folder)
    if runtime.rank == runtime.world_size - 1:
        time.sleep(3600)
    runtime.sum(torch.zeros(1))


def refuses(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """The last rank alone finds something wrong, while the others wait in C."""
    ready(runtime, folder)
    if runtime.rank == runtime.world_size - 1:
        raise UserError("the file of rank 1 is damaged; copy it again.")
    wait_in_c()


def nccl(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """The last rank fails with one of NCCL's errors that no other rank caused."""
    ready(runtime, folder)
    if runtime.rank == runtime.world_size - 1:
        raise dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'peer access denied'"
        )
    wait_in_c()


def slow_to_stop(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """A stop signal comes while the last rank is slow, so that the others wait for it; then all of them save."""
    ready(runtime, folder)
    if runtime.rank == runtime.world_size - 1:
        while stop.signal is None:
            time.sleep(0.1)
        time.sleep(8)
    runtime.sum(torch.zeros(1))
    (folder / f"saved-{runtime.rank}").touch()
    raise Interrupted(max(runtime.gather(stop.signal or 0)))


def leaves_early(runtime: Runtime, stop: StopRequest, folder: Path) -> None:
    """The last rank stops by itself at a signal, while the others wait for all."""
    ready(runtime, folder)
    while runtime.rank == runtime.world_size - 1:
        time.sleep(0.1)
        if stop.signal:
            raise Interrupted(stop.signal)
    runtime.wait_for_all()


def ready(runtime: Runtime, folder: Path) -> None:
    runtime.sum(torch.zeros(1))
    (folder / f"pid-{runtime.rank}").write_text(str(os.getpid()))


def main() -> None:
    scene, folder = sys.argv[1], Path(sys.argv[2])
    with joined("cpu", timeout_seconds=300) as runtime, job.running(RunFolder(folder), runtime) as stop:
        globals()[scene](runtime, stop, folder)


if __name__ == "__main__":
    run_entry(main)
